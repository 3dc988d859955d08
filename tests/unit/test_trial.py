"""What a trial tells Ray Tune."""

from __future__ import annotations

import pytest
import torch

from models.errors import NonFiniteLoss
from pipelines.config import resolve
from pipelines.trial import Goal, _Scorer, run_name

KID = "kid_random_v1"


class Evaluator:
    """Stands for scores that are known."""

    def __init__(self, *values: float) -> None:
        self.values = values

    def results(self, system):
        def part(value):
            scores = {KID: value, f"{KID}_stderr": 0.5}
            return {"scores": scores, "baselines": {"do_nothing": {KID: 4.0}}, "ratios": {KID: {"value": 0.25}}}

        return {f"direction {i}": part(value) for i, value in enumerate(self.values)}


def scorer(directions: str, *values: float) -> _Scorer:
    goal = Goal("kid", KID, "min", directions, "")
    settings = {"goal": vars(goal), "features": "random_v1", "limit": 8}
    run = resolve({"name": "cyclegan", "out": "o", "data": {"uri": "d"}, "system": {"size": 32}})
    from unittest import mock

    with mock.patch("pipelines.trial._evaluator", return_value=Evaluator(*values)):
        return _Scorer(settings, run, torch.device("cpu"))


def test_scorer__one_direction_with_its_error():
    score = scorer("first", 1.0)
    assert score(7, None) == {KID: 1.0, f"{KID}_stderr": 0.5, f"{KID}_ratio": 0.25}
    assert score.last == {"step": 7, KID: 1.0, f"{KID}_stderr": 0.5, "do_nothing": 4.0}


def test_scorer__the_mean_over_directions():
    score = scorer("all", 1.0, 3.0)
    score(7, None)
    assert score.last == {"step": 7, KID: 2.0, "do_nothing": 4.0}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scorer__a_score_that_is_no_number_ends_the_trial(value):
    with pytest.raises(NonFiniteLoss, match=f"step 7: the score {KID} is"):
        scorer("first", value)(7, None)


def test_run_name():
    assert run_name({"number": 3}, "abc_1") == "trials/003"
    assert run_name({}, "abc_1") == "trials/abc_1"
