"""Where a training loop runs: in this process, or as one of the workers of a Ray Train group.

The loop (`pipelines.loop`) is written against `WorkerContext` and imports no Ray.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist

from pipelines import console
from pipelines.reader import SampleReader
from pipelines.stream import ReadAhead, StepBatch, local_stream, ray_stream


class WorkerContext(Protocol):
    """What the loop needs of its surroundings."""

    rank: int
    world: int
    local_world: int  # processes on this machine
    device: torch.device

    def stream(self, reader: SampleReader, lanes: list[int], start: int, end: int) -> ReadAhead[StepBatch]:
        """Micro-batches of the hosted lanes for the steps [start, end), in order."""
        ...

    def report(self, event: Mapping[str, Any]) -> bool:
        """Tell the surroundings how far the run is (rank 0); True where the run is asked to stop."""
        ...


class LocalContext:
    """One process without Ray: a Tune trial, a test, `--workers 0`. Also one of several under `torch.distributed`.

    Args:
        on_report: called with each event; may return True to ask for a stop.
        stop: set from outside (a signal handler) to ask for a stop.
    """

    def __init__(
        self,
        device: torch.device | None = None,
        on_report: Callable[[Mapping[str, Any]], bool | None] | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        self.rank, self.world = _group()
        self.local_world = self.world
        self.device = device or torch.device("cpu")
        self._on_report = on_report
        self._stop = stop or threading.Event()

    def stream(self, reader: SampleReader, lanes: list[int], start: int, end: int) -> ReadAhead[StepBatch]:
        return local_stream(reader, lanes, start, end)

    def report(self, event: Mapping[str, Any]) -> bool:
        asked = bool(self._on_report(event)) if self._on_report is not None else False
        return asked or self._stop.is_set()


class RayContext:
    """A worker of a Ray Train group; images come through Ray Data.

    Args:
        mailbox: actor on the driver's side that takes events and tells whether to stop.
    """

    def __init__(self, mailbox: Any, readers: int) -> None:
        import ray.train.torch

        self.rank, self.world = _group()
        self.local_world = ray.train.get_context().get_local_world_size()
        self.device = ray.train.torch.get_device()
        self._mailbox, self._readers = mailbox, readers

    def stream(self, reader: SampleReader, lanes: list[int], start: int, end: int) -> ReadAhead[StepBatch]:
        return ray_stream(reader.spec, lanes, start, end, self._readers)

    def report(self, event: Mapping[str, Any]) -> bool:
        import ray
        from ray.exceptions import RayError

        try:
            return ray.get(self._mailbox.put.remote(dict(event)), timeout=30)
        except RayError as error:
            # Nobody may be watching any more; that is no reason to stop training.
            console.warn(f"progress could not be reported: {type(error).__name__}")
            return False


def _group() -> tuple[int, int]:
    """(rank, size) of the process group; (0, 1) where there is none."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
