"""Values that change in the course of a run, as functions of the fraction of the run that is over.

A schedule maps `fraction` in [0, 1] to a factor. Expressing it in fractions makes a short run decay as a long one does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@runtime_checkable
class Schedule(Protocol):
    """A function of the run's fraction in [0, 1]."""

    def __call__(self, fraction: float) -> float: ...


@dataclass(frozen=True)
class Constant:
    """The same value throughout."""

    value: float = 1.0

    def __call__(self, fraction: float) -> float:
        return self.value


@dataclass(frozen=True)
class LinearDecay:
    """`start_value` until `begin`, then linearly to `end_value` at the end of the run.

    With `begin=0.5` this is linear-epochs(100, 100) of pix2pix and CycleGAN in continuous form.
    """

    begin: float = 0.5
    start_value: float = 1.0
    end_value: float = 0.0

    def __call__(self, fraction: float) -> float:
        over = min(max((fraction - self.begin) / (1.0 - self.begin), 0.0), 1.0)
        return self.start_value + over * (self.end_value - self.start_value)


@dataclass(frozen=True)
class StepAt:
    """`before` until `at`, `after` from there on (DiscoGAN's mixing rate)."""

    at: float
    before: float
    after: float

    def __call__(self, fraction: float) -> float:
        return self.before if fraction < self.at else self.after


def linear_epochs(epoch: int, constant: int, decay: int) -> float:
    """The published discrete rule: factor at 1-based `epoch`, 1 − max(0, epoch − constant) / (decay + 1).

    Source: pix2pix and CycleGAN. `LinearDecay` is its continuous form; the difference is at most one epoch's slope.
    """
    return 1.0 - max(0, epoch - constant) / (decay + 1)
