"""One trial of a search, as it runs in a process of Ray Tune's: the training loop, and a score at every rung."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

from models.errors import NonFiniteLoss
from models.system import System
from pipelines.config import RunConfig, merge, resolve
from pipelines.evaluate import Evaluator
from pipelines.rundir import RunDirectory
from pipelines.shards import open_dataset
from pipelines.storage import join

SPLIT = "val"  # what is chosen by looking at the test split could not be judged by it


@dataclass(frozen=True)
class Goal:
    """The score that decides: `score` is its name in results, `metric` what the evaluator is asked for."""

    metric: str
    score: str
    mode: str
    directions: str
    reason: str


def run_trial(config: dict[str, Any]) -> None:
    """One trial, in a process of Ray Tune's: train, report the score at every rung, leave a bundle."""
    from ray import tune as ray_tune

    from pipelines.context import LocalContext
    from pipelines.loop import train_loop

    settings = config["settings"]
    base = settings["config"]
    over = {
        "out": join(base["out"], run_name(config["trial"], ray_tune.get_context().get_trial_id())),
        "weights": config["trial"]["weights"],
        "train": {"threads": settings["threads"]},
    }
    run = resolve(merge(base, over))
    torch.set_num_threads(settings["threads"])
    device = torch.device("cuda" if run.train.gpu else "cpu")
    score = _Scorer(settings, run, device)
    RunDirectory(run.out).write_config(run)

    def on_report(event: Mapping[str, Any]) -> None:
        # The scheduler may end a trial inside the call that reports its score: the last one waits for the bundle.
        if event["kind"] == "scores" and event["step"] < run.train.steps:
            ray_tune.report(score.last)

    train_loop(run, LocalContext(device, on_report=on_report), evaluate=score, evaluate_every=settings["rung"])
    ray_tune.report(score.last)


class _Scorer:
    """`train_loop(evaluate=…)` of a trial; keeps what Ray Tune is told."""

    def __init__(self, settings: Mapping[str, Any], run: RunConfig, device: torch.device) -> None:
        self.goal = Goal(**settings["goal"])
        first = self.goal.directions == "first"
        self.evaluator = _evaluator(
            run.data.uri, run.size, self.goal.metric, settings["features"], first, settings["limit"], device
        )
        self.last: dict[str, Any] = {}

    def __call__(self, step: int, system: System) -> dict[str, float]:
        from pipelines.metrics.direction import flat

        results = self.evaluator.results(system)
        name = self.goal.score
        value = fmean(r["scores"][name] for r in results.values())
        if not math.isfinite(value):
            # ASHA compares with quantiles, and no comparison with NaN ever ends a trial.
            raise NonFiniteLoss(f"step {step}: the score {name} is {value}")
        self.last = {"step": step, name: value}
        self.last["do_nothing"] = fmean(r["baselines"]["do_nothing"][name] for r in results.values())
        if len(results) == 1:
            self.last[f"{name}_stderr"] = next(iter(results.values()))["scores"].get(f"{name}_stderr")
        return flat(results)


@functools.lru_cache(maxsize=2)
def _evaluator(
    data: str, size: int, metric: str, features: str, first: bool, limit: int, device: torch.device
) -> Evaluator:
    """Trials that share a process share the features of the real images."""
    return Evaluator(
        open_dataset(data),
        size=size,
        split=SPLIT,
        metrics=[metric],
        features=features,
        primary_only=first,
        limit=limit,
        device=device,
    )


def run_name(trial: Mapping[str, Any], trial_id: str) -> str:
    """Directory of a trial, relative to the study."""
    return f"trials/{trial['number']:03d}" if "number" in trial else f"trials/{trial_id}"
