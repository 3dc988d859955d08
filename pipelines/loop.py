"""The training loop: stream → engine → metrics, samples, checkpoints, and a bundle at the end.

The same code runs in the command's own process, in a Tune trial and as a worker of Ray Train; it imports no Ray.
Everything it needs of its surroundings is in `WorkerContext`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from models import codec, system_class
from models.batch import Batch
from models.engine import Engine, EngineConfig
from models.errors import ConfigError, DataError
from models.sync import GradientSync
from models.system import System
from pipelines import run_state
from pipelines.config import RunConfig
from pipelines.grid import to_tensor, translation_grid
from pipelines.reader import SampleReader, iterate_split
from pipelines.rundir import RunDirectory
from pipelines.shards import Dataset, open_dataset
from pipelines.storage import cache_directory
from pipelines.transforms import augment_config
from pipelines.version import code_version

if TYPE_CHECKING:
    from pipelines.context import WorkerContext
    from pipelines.stream import StepBatch

Evaluate = Callable[[int, System], Mapping[str, float]]

_NUM_SAMPLES = 8
_LOOK_UP_S = 5.0


@dataclass(frozen=True)
class LoopResult:
    """How a run ended.

    Attributes:
        steps: done in all.
        finished: False where it was asked to stop before its last step.
        bundle_sha256: of the bundle's weights; None where it is not finished.
        data_order_sha256: over the ids of all samples in the order they were trained on.
    """

    run: str
    steps: int
    finished: bool
    bundle_sha256: str | None
    data_order_sha256: str


@dataclass
class _Clock:
    """Where the time of the current logging window went."""

    started: float = field(default_factory=time.monotonic)
    waited: float = 0.0
    paused: float = 0.0

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Time that is neither training nor waiting for data: checkpoints, samples, evaluation."""
        begin = time.monotonic()
        yield
        self.paused += time.monotonic() - begin


def train_loop(
    config: RunConfig, context: WorkerContext, evaluate: Evaluate | None = None, evaluate_every: int | None = None
) -> LoopResult:
    """Train, from the newest verified checkpoint of the run directory or from the start, to the last step.

    Args:
        evaluate: called on rank 0 with the number of steps done and the system in evaluation mode; the scores are
            reported and logged.
        evaluate_every: steps between evaluations; one follows the last step in any case.

    Raises:
        NonFiniteLoss: training diverged; the last checkpoint is from before.
        DataError, ConfigError: the dataset does not fit the system.
    """
    _prepare_torch(config, context)
    dataset = open_dataset(config.data.uri)
    domains = resolve_domains(config, dataset)
    run = RunDirectory(config.out)
    hosted = tuple(range(context.rank, config.train.logical_ranks, context.world))
    engine = _build_engine(config, context, domains, hosted)
    found = run_state.restore(run.store, engine, dataset, context, hosted)
    start = found.step if found else 0
    orders = {v: found.meta["orders"][str(v)] if found else "" for v in hosted}
    scores = dict(found.meta["scores"]) if found else {}
    if context.rank == 0:
        run.resume_metrics(start)
    loop = _Loop(config, context, run, dataset, domains, engine, orders, scores, evaluate, evaluate_every)
    return loop.run_from(start, hosted)


def resolve_domains(config: RunConfig, dataset: Dataset) -> tuple[str, ...]:
    """The dataset's domains in the order of the system's streams.

    Raises:
        DataError, ConfigError: names that are not there, too many to choose from, pairs that are not aligned.
    """
    batch = system_class(config.name).batch
    known = dataset.manifest.domains
    domains = config.data.domains
    if domains is None:
        if len(known) != batch.num_domains:
            raise ConfigError(
                f"{config.data.uri} has {len(known)} domains ({', '.join(known)}), "
                f"{config.name} needs {batch.num_domains}",
                code="E_DOMAINS",
                hint="name them in order with --domains",
            )
        domains = tuple(known)
    dataset.require(*domains, split="train")
    for stream in batch.streams:
        together = [domains[i] for i in stream.images.values()]
        if len(together) > 1 and not dataset.manifest.aligned(together, "train"):
            raise DataError(
                f"{config.data.uri}: {' and '.join(together)} are not aligned in the train split; "
                f"{config.name} needs pairs",
                code="E_DATA_UNALIGNED",
                hint="a pair has the same file name in both folders; `i2i prepare --layout paired` says what lacks",
            )
    return domains


class _Loop:
    """The state of one run of the loop; `run_from` is the loop itself."""

    def __init__(
        self,
        config: RunConfig,
        context: WorkerContext,
        run: RunDirectory,
        dataset: Dataset,
        domains: tuple[str, ...],
        engine: Engine,
        orders: dict[int, str],
        scores: dict[str, float],
        evaluate: Evaluate | None,
        evaluate_every: int | None,
    ) -> None:
        self.config, self.context, self.run, self.dataset = config, context, run, dataset
        self.domains, self.engine, self.orders = domains, engine, orders
        self.evaluate, self.evaluate_every = evaluate, evaluate_every
        self.scores = scores
        self.samples: dict[str, np.ndarray] = {}
        self.logged = 0
        self.looked_up = 0.0
        self.clock = _Clock()

    def run_from(self, start: int, hosted: tuple[int, ...]) -> LoopResult:
        train = self.config.train
        stream = self.context.stream(self._reader(), list(hosted), start, train.steps)
        step, stop = start, False
        self.logged = start
        self.clock = _Clock()
        try:
            while step < train.steps and not stop:
                waiting = time.monotonic()
                batch = next(stream)
                self.clock.waited += time.monotonic() - waiting
                assert batch.step == step, f"the stream gave step {batch.step} instead of {step}"
                self.engine.step(step, self._to_device(batch))
                step += 1
                last = step == train.steps
                if step % train.log_every == 0 or last:
                    stop = self._log(step)
                elif self._impatient():
                    self.looked_up = time.monotonic()
                    stop = self.context.report({"kind": "alive", "step": step})
                with self.clock.pause():
                    if step % train.sample_every == 0 or last:
                        self._sample(step)
                    if self.evaluate and (last or (self.evaluate_every and step % self.evaluate_every == 0)):
                        stop = self._agree(self._evaluate(step)) or stop
                if step % train.checkpoint_every == 0 or last or stop:
                    # Terms are read first: a checkpoint must not hold the result of a step that was not finite.
                    stop = self._log(step) or stop
                    with self.clock.pause():
                        self._save(step)
        finally:
            stream.close()
        return self._finish(step)

    def _impatient(self) -> bool:
        """Whether a lone process should look up: slow steps must not delay a stop by a whole logging window."""
        latest = max(self.clock.started, self.looked_up)
        return self.context.world == 1 and time.monotonic() - latest > _LOOK_UP_S

    def _to_device(self, batch: StepBatch) -> dict[int, Batch]:
        system, device = self.engine.system, self.context.device
        result = {}
        for lane, micro in batch.micro.items():
            seen = ",".join(f"{stream}:{','.join(ids)}" for stream, ids in sorted(micro.ids.items()))
            self.orders[lane] = hashlib.sha256((self.orders[lane] + seen).encode()).hexdigest()
            images = {name: to_tensor(pixels, system.value_range, device) for name, pixels in micro.images.items()}
            result[lane] = system.batch(**images)
        return result

    def _log(self, step: int) -> bool:
        """Read the terms since the last call, write them down, and ask whether to stop. Collective."""
        count, self.logged = step - self.logged, step
        if not count:
            return False
        rows = self.engine.read()
        seconds = max(time.monotonic() - self.clock.started - self.clock.paused, 1e-9)
        stop = False
        if self.context.rank == 0:
            names = {name for row in rows for name in row if name != "step"}
            terms = {n: float(np.mean([row[n] for row in rows if n in row])) for n in sorted(names)}
            row = {
                "step": step,
                "images_per_s": round(count * self.config.train.batch / seconds, 2),
                "data_wait": round(self.clock.waited / seconds, 4),
                "pause_s": round(self.clock.paused, 3),
                "time": round(time.time(), 3),
                **terms,
            }
            self.run.add_metrics(row)
            stop = self.context.report({"kind": "metrics", **row})
        self.clock = _Clock()
        return self._agree(stop)

    def _agree(self, stop: bool) -> bool:
        """Whether any process wants to stop: all leave the loop at the same step. Collective."""
        return bool(self.engine.sync.sum(torch.tensor(float(stop), device=self.context.device)).item())

    def _save(self, step: int) -> None:
        about = {
            "index_digest": self.dataset.manifest.digest,
            "scores": self.scores,
            "config": self.config.model_dump(mode="json"),
        }
        run_state.save(self.run.store, step, self.engine, self.orders, self.context, about)
        if self.context.rank == 0:
            self.run.flush_metrics()

    def _sample(self, step: int) -> None:
        if self.context.rank != 0:
            return
        if not self.samples:
            manifest = self.dataset.manifest
            split = next(s for s in ("val", "test", "train") if all(manifest.count(d, s) for d in self.domains))
            for domain in self.domains:
                images = iterate_split(self.dataset, domain, split, self.config.size)
                first = [image for _, image in zip(range(_NUM_SAMPLES), (image for _, image in images), strict=False)]
                self.samples[domain] = np.stack(first)
        grid = translation_grid(self.engine.inference_system(), self.samples, self.context.device)
        self.run.write_sample(step, codec.encode(grid))

    def _evaluate(self, step: int) -> bool:
        if self.context.rank != 0:
            return False
        assert self.evaluate is not None
        self.scores = dict(self.evaluate(step, self.engine.inference_system()))
        self.run.add_metrics({"step": step, **self.scores})
        return self.context.report({"kind": "scores", "step": step, **self.scores})

    def _finish(self, step: int) -> LoopResult:
        orders = {v: order for part in run_state.gather(self.orders) for v, order in part.items()}
        order = hashlib.sha256("".join(orders[v] for v in sorted(orders)).encode()).hexdigest()
        finished = step >= self.config.train.steps
        digest = None
        if finished and self.context.rank == 0:
            manifest = self.dataset.manifest
            digest = self.run.write_bundle(
                self.engine.inference_system(),
                size=self.config.size,
                step=step,
                ema=self.config.train.ema is not None,
                scores=self.scores,
                data={"uri": self.config.data.uri, "digest": manifest.digest, "licence": manifest.licence},
                code_version=code_version(),
                weights=self.config.weights,
            )
            self.run.flush_metrics()
            result = {"steps": step, "bundle_sha256": digest, "data_order_sha256": order}
            self.run.write_result(result)
        return LoopResult(self.config.out, step, finished, digest, order)

    def _reader(self) -> SampleReader:
        config = self.config
        return SampleReader(
            self.dataset,
            streams=self.engine.system.batch.streams,
            domains=self.domains,
            lanes=config.train.logical_ranks,
            batch=config.train.batch // config.train.logical_ranks,
            augment=augment_config(config.data.augment, config.size),
            seed=config.train.seed,
            cache_dir=str(cache_directory("shards")),
            cache_limit_bytes=int(config.data.cache_gb * 2**30),
        )


def _prepare_torch(config: RunConfig, context: WorkerContext) -> None:
    cores = os.cpu_count() or 1
    torch.set_num_threads(config.train.threads or max(1, cores // context.local_world))
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if context.device.type == "cuda":
        torch.backends.cudnn.benchmark = not config.train.deterministic


def _build_engine(
    config: RunConfig, context: WorkerContext, domains: tuple[str, ...], hosted: tuple[int, ...]
) -> Engine:
    # The same initial weights on every worker, on any number of them.
    torch.manual_seed(config.train.seed)
    system = config.build_system(domains)
    settings = EngineConfig(
        total_steps=config.schedule_steps,
        logical_ranks=config.train.logical_ranks,
        hosted=hosted,
        seed=config.train.seed,
        precision=config.train.precision,
        ema=config.train.ema,
    )
    return Engine(system, config.build_weights(), settings, context.device, GradientSync())
