"""Train a system, on this machine or on a Ray cluster.

i2i train cyclegan --data s3://bucket/dataset --domains photo,drawing --workers 4
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from models.errors import ConfigError
from pipelines import cluster, console
from pipelines.config import RunConfig, merge, resolve
from pipelines.context import LocalContext
from pipelines.group import check_resources, train_on_ray
from pipelines.lease import Lease
from pipelines.loop import resolve_domains, train_loop
from pipelines.rundir import BUNDLE, RunDirectory
from pipelines.shards import open_dataset
from pipelines.storage import join
from pipelines.tracking import EXPERIMENT, Tracker


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves behind.

    Attributes:
        run, bundle: URIs; `bundle` is None where the run was stopped before its end.
        finished: whether the last step was done; a stopped run goes on with `--resume`.
    """

    run: str
    bundle: str | None
    steps: int
    finished: bool
    bundle_sha256: str | None
    data_order_sha256: str | None


def plan_run(options: Mapping[str, Any], *, resume: bool = False, extend: bool = False) -> RunConfig:
    """The configuration of a new run, or of the one in `options["out"]` that is to go on.

    Args:
        options: as for `resolve`; on resuming, only what the caller named.
        extend: go on with another number of steps (schedules are laid over the new length).

    Raises:
        ConfigError: the directory holds a run already, or none, or one of other settings.
    """
    stored = RunDirectory(str(options["out"])).config()
    if stored is None:
        if resume or extend:
            raise ConfigError(f"{options['out']} holds no run to resume", hint="leave out --resume to begin one")
        return resolve(options)
    if not (resume or extend):
        raise ConfigError(
            f"{options['out']} holds a run already", code="E_RUN_EXISTS", hint="give --resume, or another --out"
        )
    base = stored.model_dump(mode="json")
    config = resolve(merge(base, options))
    changed = _differences(base, config.model_dump(mode="json"))
    # What changes neither the weights of a step nor the order of samples; the dataset is known by its digest.
    allowed = {"out", "data.uri", "data.cache_gb"}
    allowed |= {f"train.{k}" for k in ("workers", "threads", "gpu", "readers", "log_every", "sample_every")}
    allowed |= {"train.checkpoint_every"}
    if extend:
        allowed.add("train.steps")
    refused = {k: v for k, v in changed.items() if k not in allowed}
    if extend and config.train.steps < stored.train.steps:
        raise ConfigError(
            f"--extend: {options['out']} was begun with {stored.train.steps} steps, {config.train.steps} are fewer",
            hint="give more --steps",
        )
    if "train.steps" in refused:
        before, after = refused["train.steps"]
        raise ConfigError(
            f"{options['out']} was begun with {before} steps, not {after}", hint="to change its length give --extend"
        )
    if refused:
        listed = "; ".join(f"{key} was {before}, now {after}" for key, (before, after) in sorted(refused.items()))
        raise ConfigError(
            f"{options['out']} was begun with other settings: {listed}", hint="begin another run for them"
        )
    return config


def train(config: RunConfig, *, parent: str | None = None, progress: bool = True, verbose: bool = False) -> TrainResult:
    """Run `config` to its end; a run that is there already goes on from its newest verified checkpoint.

    Args:
        parent: id of the MLflow run that this one belongs to.
        progress: show the progress line.
        verbose: show Ray's own log lines.

    Raises:
        ConfigError, DataError: the configuration does not fit the data or the cluster, or the run is in use.
        NonFiniteLoss: training diverged.
    """
    run = RunDirectory(config.out)
    done = run.result()
    if done is not None and done["steps"] >= config.train.steps:
        console.say(f"{config.out} is finished already ({done['steps']} steps)")
        return _result(config, done)
    # What the user can have got wrong is looked at before anything is started or written.
    resolve_domains(config, open_dataset(config.data.uri))
    with _stop_on_sigterm() as stop, Lease(run.store, on_lost=stop.set) as lease:
        if config.train.workers:
            cluster.connect(verbose=verbose)
            check_resources(config)
        elif config.train.gpu and not torch.cuda.is_available():
            raise ConfigError(
                "training on a GPU was asked for, and there is none that torch can use", hint="give --cpu"
            )
        run.write_config(config)
        console.say(f"{config.name} for {config.train.steps} steps, seed {config.train.seed}, into {config.out}")
        step = _train_tracked(config, run, stop, parent, progress)
    if lease.lost.is_set():
        raise ConfigError(f"{config.out} was taken over by another process; this one stopped", code="E_RUN_LOCKED")
    done = run.result()
    if done is None or done["steps"] < config.train.steps:
        console.say(f"stopped at step {step}; go on with --resume --out {config.out}")
        return TrainResult(config.out, None, step, False, None, None)
    return _result(config, done)


def _train_tracked(
    config: RunConfig, run: RunDirectory, stop: threading.Event, parent: str | None, progress: bool
) -> int:
    """Train with progress shown and logged to MLflow; the last step that was reported."""
    tags = {"system": config.name, "run": config.out}
    name = os.path.basename(config.out.rstrip("/"))
    tracker = Tracker(EXPERIMENT, name, tags, parent, run_id=run.tracking_id())
    watch = _Watcher(config, tracker, run, progress)
    status = "FAILED"
    try:
        tracker.params(config.model_dump(mode="json"))
        if config.train.workers == 0:
            device = torch.device("cuda" if config.train.gpu else "cpu")
            train_loop(config, LocalContext(device, on_report=watch, stop=stop))
        else:
            train_on_ray(config, watch, stop)
        status = "KILLED" if stop.is_set() else "FINISHED"
    finally:
        watch.close()
        watch.note_run(timeout_s=5)
        tracker.close(status)
    return watch.step


class _Watcher:
    """Turns events of the loop into the progress line and MLflow metrics."""

    def __init__(self, config: RunConfig, tracker: Tracker, run: RunDirectory, progress: bool) -> None:
        self.step = 0
        self._tracker, self._run, self._noted = tracker, run, False
        self._total = config.train.steps
        self._label = f"training {config.name}: step"
        self._progress: console.Progress | None = None
        self._show = progress

    def __call__(self, event: Mapping[str, Any]) -> None:
        if event["kind"] == "alive":
            return
        values = {k: v for k, v in event.items() if k not in ("kind", "step", "time") and isinstance(v, int | float)}
        self._tracker.metrics(values, int(event["step"]))
        self.note_run(timeout_s=0)
        if event["kind"] != "metrics":
            return
        self.step = int(event["step"])
        if self._progress is None and self._show:
            self._progress = console.Progress(self._label, self._total, done=self.step)
        if self._progress is None:
            return
        rest = ("images_per_s", "data_wait", "pause_s")
        losses = " ".join(f"{name} {value:.3g}" for name, value in values.items() if name not in rest)
        detail = f"{values['images_per_s']:.0f} images/s  data wait {values['data_wait']:.0%}  {losses}"
        self._progress.update(self.step, detail, force=self.step == self._total)

    def note_run(self, timeout_s: float) -> None:
        """Write the id of the MLflow run into the run directory, for the attempt that may come after this one."""
        if not self._noted and (run_id := self._tracker.run_id(timeout_s)):
            self._run.write_tracking_id(run_id)
            self._noted = True

    def close(self) -> None:
        if self._progress is not None:
            self._progress.close()


@contextmanager
def _stop_on_sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets; in other threads than the main one signals are left alone."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)


def _differences(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    found: dict[str, tuple[Any, Any]] = {}
    for key in before:
        if isinstance(before[key], Mapping):
            found |= _differences(before[key], after[key], f"{prefix}{key}.")
        elif before[key] != after[key]:
            found[f"{prefix}{key}"] = before[key], after[key]
    return found


def _result(config: RunConfig, done: Mapping[str, Any]) -> TrainResult:
    return TrainResult(
        run=config.out,
        bundle=join(config.out, BUNDLE),
        steps=done["steps"],
        finished=True,
        bundle_sha256=done["bundle_sha256"],
        data_order_sha256=done["data_order_sha256"],
    )
