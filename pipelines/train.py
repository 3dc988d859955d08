"""Train a system, on this machine or on a Ray cluster.

i2i train cyclegan --data s3://bucket/dataset --domains photo,drawing --workers 4
"""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from models.errors import ConfigError, I2IError
from pipelines import console
from pipelines.config import RunConfig, merge, resolve
from pipelines.lease import Lease
from pipelines.rundir import BUNDLE, RunDirectory
from pipelines.storage import join
from pipelines.tracking import EXPERIMENT, Tracker

_POLL_S = 0.5
_START_TIMEOUT_S = 60.0
_MAX_FAILURES = 3


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

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


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
    allowed = {"train.workers", "train.threads", "train.gpu", "train.readers", "data.cache_gb"}
    if extend:
        allowed.add("train.steps")
    refused = {k: v for k, v in changed.items() if k not in allowed}
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
    with Lease(run.store):
        run.write_config(config)
        tags = {"system": config.name, "run": config.out}
        with (
            Tracker(EXPERIMENT, os.path.basename(config.out.rstrip("/")), tags, parent) as tracker,
            _stop_on_sigterm() as stop,
        ):
            tracker.params(config.model_dump(mode="json"))
            watch = _Watcher(config, tracker, progress)
            if config.train.workers == 0:
                _train_here(config, watch, stop)
            else:
                _train_on_ray(config, watch, stop, verbose)
            watch.close()
    done = run.result()
    if done is None or done["steps"] < config.train.steps:
        console.say(f"stopped at step {watch.step}; go on with --resume --out {config.out}")
        return TrainResult(config.out, None, watch.step, False, None, None)
    return _result(config, done)


class _Watcher:
    """Turns events of the loop into the progress line and MLflow metrics."""

    def __init__(self, config: RunConfig, tracker: Tracker, progress: bool) -> None:
        self.step = 0
        self._tracker = tracker
        self._total = config.train.steps
        self._label = f"training {config.name}: step"
        self._progress: console.Progress | None = None
        self._show = progress

    def __call__(self, event: Mapping[str, Any]) -> None:
        values = {k: v for k, v in event.items() if k not in ("kind", "step", "time") and isinstance(v, int | float)}
        self._tracker.metrics(values, int(event["step"]))
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

    def close(self) -> None:
        if self._progress is not None:
            self._progress.close()


def _train_here(config: RunConfig, watch: _Watcher, stop: threading.Event) -> None:
    from pipelines.context import LocalContext
    from pipelines.loop import train_loop

    device = torch.device("cuda" if config.train.gpu else "cpu")
    train_loop(config, LocalContext(device, on_report=watch, stop=stop))


def _train_on_ray(config: RunConfig, watch: _Watcher, stop: threading.Event, verbose: bool) -> None:
    import ray
    from ray.train import FailureConfig, ScalingConfig
    from ray.train import RunConfig as RayRunConfig
    from ray.train.torch import TorchTrainer

    from pipelines import cluster
    from pipelines.mailbox import Mailbox

    cluster.connect(verbose=verbose)
    _check_resources(config, ray.cluster_resources())
    mailbox: Any = ray.remote(num_cpus=0)(Mailbox).remote()
    finished = threading.Event()
    poller = threading.Thread(target=_poll, args=(mailbox, watch, stop, finished), name="i2i-progress", daemon=True)
    # Ray Train's own state is scratch: what a run resumes from is in our run directory.
    with tempfile.TemporaryDirectory(prefix="i2i-train-") as scratch:
        trainer = TorchTrainer(
            _worker,
            train_loop_config={"config": config.to_yaml(), "mailbox": mailbox},
            scaling_config=ScalingConfig(
                num_workers=config.train.workers,
                use_gpu=config.train.gpu,
                resources_per_worker={"CPU": 1, **({"GPU": 1} if config.train.gpu else {})},
            ),
            run_config=RayRunConfig(
                name="train", storage_path=scratch, failure_config=FailureConfig(max_failures=_MAX_FAILURES)
            ),
        )
        poller.start()
        try:
            trainer.fit()
        except Exception as error:
            raise _cause(error) from error
        finally:
            finished.set()
            poller.join(timeout=10)
            ray.kill(mailbox)


def _worker(settings: dict[str, Any]) -> None:
    """What each worker of the group runs."""
    import ray.train

    from pipelines.context import RayContext
    from pipelines.loop import train_loop

    config = RunConfig.from_yaml(settings["config"])
    context = RayContext(settings["mailbox"], config.train.readers)
    result = train_loop(config, context)
    ray.train.report({"steps": result.steps})


def _poll(mailbox: Any, watch: _Watcher, stop: threading.Event, finished: threading.Event) -> None:
    import ray
    from ray.exceptions import RayError

    asked = False
    while True:
        last = finished.wait(_POLL_S)
        try:
            if stop.is_set() and not asked:
                ray.get(mailbox.ask_to_stop.remote(), timeout=30)
                asked = True
            for event in ray.get(mailbox.take.remote(), timeout=30):
                watch(event)
        except RayError as error:
            console.warn(f"progress cannot be shown: {type(error).__name__}")
            return
        if last:
            return


def _check_resources(config: RunConfig, have: Mapping[str, float]) -> None:
    """Ray would wait for missing resources for ever."""
    train = config.train
    if train.gpu and have.get("GPU", 0) < train.workers:
        raise ConfigError(
            f"{train.workers} workers need {train.workers} GPUs, the cluster has {have.get('GPU', 0):.0f}",
            hint="lower --workers, or train with --cpu",
        )
    wanted = train.workers * (1 + 0.5 * train.readers)
    if have.get("CPU", 0) < wanted:
        raise ConfigError(
            f"{train.workers} workers with their readers need {wanted:.0f} CPUs, "
            f"the cluster has {have.get('CPU', 0):.0f}",
            hint="lower --workers",
        )


def _cause(error: BaseException) -> BaseException:
    """The error of ours that is at the bottom of what Ray raises, else the error itself in one line."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, I2IError):
            return seen
        failures = getattr(seen, "worker_failures", None)
        inner = next(iter(failures.values()), None) if failures else None
        seen = inner or getattr(seen, "cause", None) or seen.__cause__
    return I2IError(f"training failed: {str(error).strip().splitlines()[-1]}", hint="see Ray's logs with --verbose")


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
