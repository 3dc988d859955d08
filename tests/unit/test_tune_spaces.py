"""Every search space fits its system."""

from __future__ import annotations

from dataclasses import fields

import pytest

import tune_spaces
from models import SYSTEMS, system_class
from models.errors import ConfigError
from tune_spaces import Range


@pytest.mark.parametrize("system", sorted(SYSTEMS))
def test_space__names_weights_of_the_system_and_contains_the_published_ones(system):
    space = tune_spaces.load(system)
    assert space.weights.keys() <= {field.name for field in fields(system_class(system).Weights)}
    assert space.weights
    for name, value in space.published().items():
        bounds = space.weights[name]
        assert bounds.low < value < bounds.high
        assert bounds.low > 0 or not bounds.log
        assert bounds.reason
    assert space.objective.mode in ("min", "max")
    assert space.objective.directions in ("first", "all")
    assert space.objective.reason


def test_range__its_ends_and_its_middle():
    assert Range(1.0, 100.0, "x").at(0.5) == pytest.approx(10.0)
    assert Range(0.0, 100.0, "x", log=False).at(0.5) == 50.0
    assert [round(Range(2.0, 8.0, "x").at(share), 9) for share in (0.0, 1.0)] == [2.0, 8.0]


def test_load__unknown_system():
    with pytest.raises(ConfigError, match="did you mean 'cyclegan'"):
        tune_spaces.load("cycelgan")
