"""The smallest useful configuration of every registered system, and batches for it."""

from __future__ import annotations

from typing import Any

import torch

from models import SYSTEMS, system_class
from models.batch import Batch
from models.engine import Engine, EngineConfig, random_stream
from models.sync import GradientSync
from models.system import System

SIZE = 32
SMALL: dict[str, dict[str, Any]] = {
    "cyclegan": {"size": SIZE, "width": 8, "blocks": 1, "pool": 2},
    "pix2pix": {"size": SIZE, "width": 8, "dropout_stages": 2},
}
NAMES = sorted(SYSTEMS)
DOMAINS = ("photo", "drawing")


def build(name: str, seed: int = 0, **changes: Any) -> System:
    torch.manual_seed(seed)
    cls = system_class(name)
    return cls(cls.Config(**{**SMALL[name], **changes}), domains=DOMAINS)


def engine(system: System, *, ranks: int = 1, hosted: tuple[int, ...] = (0,), **settings: Any) -> Engine:
    config = EngineConfig(**{"total_steps": 20, **settings}, logical_ranks=ranks, hosted=hosted)
    return Engine(system, type(system).Weights(), config, torch.device("cpu"), GradientSync())


def batch(system: System, rank: int, step: int, n: int = 2) -> Batch:
    """A batch that is a function of (rank, step)."""
    generator = random_stream("contract", rank, step)
    fields = [name for stream in system.batch.streams for name in stream.images]
    images = {f: torch.rand(n, 3, SIZE, SIZE, generator=generator) * 2 - 1 for f in fields}
    return system.batch(**{f: x.contiguous(memory_format=torch.channels_last) for f, x in images.items()})


def train(engine: Engine, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        engine.step(step, {v: batch(engine.system, v, step) for v in engine.config.hosted})


def flat(engine: Engine) -> dict[str, torch.Tensor]:
    """Everything that is training state, by name."""
    shared, pools = engine.state()
    return shared | {f"pools.{v}.{k}": t for v, named in pools.items() for k, t in named.items()}
