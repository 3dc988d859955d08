"""Search the loss weights of a system on a held-out score.

    i2i tune cyclegan --data s3://bucket/dataset --trials 16 --steps 1000

A trial is one training run in its own process (no worker group and its start-up), scored on the validation split at a
few rungs; ASHA ends those that are behind. The published weights are trial 0, so the winner can be compared with
them. What is searched is in `tune_spaces`; what came out is in study.json, which `promote` takes.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

import torch

import tune_spaces
from models.errors import ConfigError, I2IError, nearest
from pipelines import study as studies
from pipelines.config import RunConfig, merge, resolve
from pipelines.search import run_trials
from pipelines.shards import open_dataset
from pipelines.storage import Store, join
from pipelines.tracking import EXPERIMENT, Tracker
from pipelines.trial import SPLIT, Goal

SEARCHES = ("random", "optuna")
SCHEDULERS = ("asha", "none")
_RUNGS = 4  # a trial is scored after each quarter


@dataclass(frozen=True)
class TuneResult:
    """What a search found.

    Attributes:
        study: URI of the study directory.
        best: number of the winning trial.
        bundle: URI of its bundle.
        trials: as in study.json.
    """

    study: str
    best: int
    bundle: str
    metric: str
    mode: str
    trials: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """The result of `i2i tune --json`."""
        return asdict(self)


def tune(
    config: RunConfig,
    trials: int,
    steps: int | None = None,
    *,
    scheduler: str = "asha",
    search: str = "random",
    concurrent: int | None = None,
    objective: str | None = None,
    features: str = "random_v1",
    limit: int = 256,
) -> TuneResult:
    """Train with `trials` weightings and name the best on the validation split.

    Args:
        config: of every trial; its `out` is the study directory, its weights those that are not searched.
        steps: of a trial that runs to its end; default `config.train.steps`.
        scheduler: "asha" ends trials that are behind others at a quarter or half of the steps; "none" ends none.
        search: "random" spreads the trials evenly over the space (a seeded, scrambled Sobol sequence); "optuna"
            proposes each from the results so far (TPE).
        concurrent: trials at a time; default one a core, or one a GPU.
        objective: metric name; default that of the tune space.
        features: extractor of the metric.
        limit: at most this many validation images of a domain are scored.

    Raises:
        ConfigError: before the first trial, where the options do not fit.
        I2IError: no trial came to its end.
    """
    space = tune_spaces.load(config.name)
    _check_options(config, trials, scheduler, search)
    config = _base(config, steps)
    store = Store(config.out)
    if store.exists(studies.FILE):
        raise ConfigError(f"{config.out} holds a study already", code="E_RUN_EXISTS", hint="give another --out")
    goal = _goal(config, space, objective, features, limit)
    settings = {
        "config": config.model_dump(mode="json"),
        "goal": asdict(goal),
        "features": features,
        "limit": limit,
        "rung": max(1, config.train.steps // _RUNGS),
    }
    about = _about(config, space, goal, settings["rung"])
    with Tracker(EXPERIMENT, os.path.basename(store.uri), {"kind": "study", "system": config.name}) as tracker:
        tracker.params({**about, "space": {k: f"{r.low} to {r.high}" for k, r in space.weights.items()}})
        study = studies.Study(store.uri, about, trials, tracker)
        study.write()  # a store that cannot be written to is better known before the first trial
        run_trials(settings, space, study, trials, scheduler, search, concurrent)
        study.write()
        best = study.best
        if best is None:
            raise I2IError(f"none of the {trials} trials came to its end", hint=_why(study))
        assert best.score is not None
        assert best.bundle is not None
        tracker.metrics({f"best_{goal.score}": best.score, "best_trial": best.trial}, config.train.steps)
        tracker.params({"best": best.weights})
        document = study.document()
    bundle = join(store.uri, best.bundle)
    return TuneResult(store.uri, best.trial, bundle, goal.score, document["mode"], document["trials"])


def describe(result: TuneResult) -> str:
    """The result for people: the winner beside the published weights, then where it is."""
    lines = []
    for trial in (result.trials[result.best], result.trials[0]):
        weights = "  ".join(f"{name} {value:.3g}" for name, value in trial["weights"].items())
        score = "no score" if trial["score"] is None else f"{result.metric} {trial['score']:.4g}"
        name = "published" if trial["trial"] == 0 else f"trial {trial['trial']}"
        lines.append(f"{name}: {weights}  {score} ({trial['status']})")
    return "\n".join([*dict.fromkeys(lines), result.study])


def _check_options(config: RunConfig, trials: int, scheduler: str, search: str) -> None:
    if trials < 1:
        raise ConfigError(f"--trials {trials}: at least 1 is needed")
    for what, value, known in (("scheduler", scheduler, SCHEDULERS), ("search", search, SEARCHES)):
        if value not in known:
            raise ConfigError(f"unknown {what} '{value}'", hint=nearest(value, known))
    if config.train.workers > 1:
        raise ConfigError(f"a trial is one process, not {config.train.workers}", hint="leave out train.workers")


def _goal(config: RunConfig, space: tune_spaces.Space, objective: str | None, features: str, limit: int) -> Goal:
    """The objective, checked against the data before the first trial."""
    from pipelines.loop import resolve_domains
    from pipelines.metrics.direction import PAIRED, check_metrics
    from pipelines.metrics.features import load_extractor
    from pipelines.metrics.heldout import check_enough, choose_split

    dataset = open_dataset(config.data.uri)
    domains = resolve_domains(config, dataset)
    choose_split(dataset, domains, SPLIT)
    default = space.objective
    with torch.device("meta"):
        offered = config.build_system(domains).conditioning["directions"]
    pairs = [(d["source"], d["to"]) for d in offered]
    check_enough(dataset, pairs[:1] if default.directions == "first" else pairs, SPLIT, limit)
    (metric,) = check_metrics([objective or default.metric])[:1]
    if metric in PAIRED and not dataset.manifest.aligned(domains, SPLIT):
        raise ConfigError(
            f"objective '{metric}' compares with the true image of each source, and split '{SPLIT}' is not aligned",
            code="E_METRIC",
            hint="take kid or frechet",
        )
    score = metric if metric in PAIRED else f"{metric}_{load_extractor(features).name}"
    mode = "max" if metric in ("psnr", "ssim", "retrieval_top1") else "min"
    reason = default.reason if metric == default.metric else "as asked for"
    return Goal(metric, score, mode, default.directions, reason)


def _base(config: RunConfig, steps: int | None) -> RunConfig:
    """What trials share: a single process, checkpoints and samples only at the end."""
    steps = steps or config.train.steps
    train = {"steps": steps, "workers": 0, "logical_ranks": 1, "checkpoint_every": steps, "sample_every": steps}
    train["log_every"] = min(config.train.log_every, max(1, steps // _RUNGS))
    return resolve(merge(config.model_dump(mode="json"), {"train": train}))


def _about(config: RunConfig, space: tune_spaces.Space, goal: Goal, rung: int) -> dict[str, Any]:
    return {
        "system": config.name,
        "metric": goal.score,
        "mode": goal.mode,
        "directions": goal.directions,
        "objective_reason": goal.reason,
        "split": SPLIT,
        "steps": config.train.steps,
        "rung": rung,
        "seed": config.train.seed,
        "data": config.data.uri,
        "data_digest": open_dataset(config.data.uri).manifest.digest,
        "space": {name: asdict(bounds) for name, bounds in space.weights.items()},
    }


def _why(study: studies.Study) -> str:
    reasons = [t.error or f"stopped at step {t.step}" for t in study.trials.values()]
    return f"the first: {reasons[0]}; all are in {study.store.join(studies.FILE)}" if reasons else "none was started"
