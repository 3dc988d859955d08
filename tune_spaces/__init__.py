"""What `i2i tune` searches: one module a system, with the ranges of its loss weights and the objective.

A module holds `SPACE` (weight name → `Range`) and `OBJECTIVE`. Names are those of the system's `Weights`. The published
weights are always the first trial, so a range must contain the published value.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from models import SYSTEMS
from models.errors import ConfigError, nearest


@dataclass(frozen=True)
class Range:
    """Values of one weight, drawn evenly in the logarithm (`log`) or evenly.

    Attributes:
        low, high: both included; `low` above 0 where `log` is set.
        reason: why these ends, for the reader and the report.
    """

    low: float
    high: float
    reason: str
    log: bool = True

    def at(self, share: float) -> float:
        """The value at `share` in [0, 1] of the range."""
        if self.log:
            return math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
        return self.low + share * (self.high - self.low)


@dataclass(frozen=True)
class Objective:
    """The held-out score that decides between trials; never a loss, whose scale the weights themselves change.

    Attributes:
        metric: of `i2i evaluate`, without the name of the feature extractor (which is an option).
        mode: whether less or more is better.
        directions: `first`: only the first direction the system offers; `all`: the mean over its directions.
        reason: why this one.
    """

    metric: str
    mode: Literal["min", "max"]
    directions: Literal["first", "all"]
    reason: str


@dataclass(frozen=True)
class Space:
    """What to search for one system."""

    system: str
    weights: Mapping[str, Range]
    objective: Objective

    def published(self) -> dict[str, float]:
        """The published values of the searched weights, hence the first trial."""
        from models import system_class

        weights: Any = system_class(self.system).Weights()
        return {name: float(getattr(weights, name)) for name in self.weights}


def load(system: str) -> Space:
    """The search space of a system.

    Raises:
        ConfigError: unknown system.
    """
    if system not in SYSTEMS:
        raise ConfigError(f"unknown system '{system}'", hint=nearest(system, SYSTEMS))
    module = importlib.import_module(f"tune_spaces.{system}")
    return Space(system, module.SPACE, module.OBJECTIVE)
