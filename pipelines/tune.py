"""Search the loss weights of a system on a held-out score.

    i2i tune cyclegan --data s3://bucket/dataset --trials 16 --steps 1000

A trial is one training run in its own process (no worker group and its start-up), scored on the validation split at a
few rungs; ASHA ends those that are behind. The published weights are trial 0, so the winner can be compared with
them. What is searched is in `tune_spaces`; what came out is in study.json, which `promote` takes.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import tune_spaces
from models.errors import ConfigError, I2IError, nearest
from pipelines import study as studies
from pipelines.config import RunConfig, merge, resolve
from pipelines.shards import open_dataset
from pipelines.storage import Store, join
from pipelines.tracking import EXPERIMENT, Tracker
from pipelines.trial import SPLIT, Goal, run_name, run_trial

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
    goal = _goal(config, space, objective, features)
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
        _run(settings, space, study, trials, scheduler, search, concurrent)
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


def points(space: tune_spaces.Space, trials: int, seed: int) -> list[dict[str, float]]:
    """The published weights, then `trials − 1` points spread evenly over the space; a function of the seed."""
    engine = torch.quasirandom.SobolEngine(len(space.weights), scramble=True, seed=seed)
    drawn = engine.draw(max(trials - 1, 1)).tolist()[: trials - 1]
    named = [{n: r.at(x) for (n, r), x in zip(space.weights.items(), row, strict=True)} for row in drawn]
    return [space.published(), *named]


def _check_options(config: RunConfig, trials: int, scheduler: str, search: str) -> None:
    if trials < 1:
        raise ConfigError(f"--trials {trials}: at least 1 is needed")
    for what, value, known in (("scheduler", scheduler, SCHEDULERS), ("search", search, SEARCHES)):
        if value not in known:
            raise ConfigError(f"unknown {what} '{value}'", hint=nearest(value, known))
    if config.train.workers > 1:
        raise ConfigError(f"a trial is one process, not {config.train.workers}", hint="leave out train.workers")


def _goal(config: RunConfig, space: tune_spaces.Space, objective: str | None, features: str) -> Goal:
    """The objective, checked against the data before the first trial."""
    from pipelines.loop import resolve_domains
    from pipelines.metrics.direction import PAIRED, check_metrics
    from pipelines.metrics.features import load_extractor
    from pipelines.metrics.heldout import choose_split

    dataset = open_dataset(config.data.uri)
    domains = resolve_domains(config, dataset)
    choose_split(dataset, domains, SPLIT)
    default = space.objective
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
    """What trials share: a single process, checkpoints and samples only at the end, addresses that hold anywhere."""
    steps = steps or config.train.steps
    train = {"steps": steps, "workers": 0, "logical_ranks": 1, "checkpoint_every": steps, "sample_every": steps}
    train["log_every"] = min(config.train.log_every, max(1, steps // _RUNGS))
    over = {"out": _absolute(config.out), "data": {"uri": _absolute(config.data.uri)}, "train": train}
    return resolve(merge(config.model_dump(mode="json"), over))


def _absolute(uri: str) -> str:
    store = Store(uri)
    return str(Path(store.uri).resolve()) if store.is_local else store.uri


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


def _run(
    settings: dict[str, Any],
    space: tune_spaces.Space,
    study: studies.Study,
    trials: int,
    scheduler: str,
    search: str,
    concurrent: int | None,
) -> None:
    """Hand the trials to Ray Tune and wait for the last."""
    from pipelines import cluster

    cluster.connect()
    import ray
    from ray import tune as ray_tune

    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    gpu = settings["config"]["train"]["gpu"]
    have = ray.cluster_resources()
    cores = _cores(have)
    concurrent = min(trials, concurrent or (int(have.get("GPU", 1)) if gpu else cores))
    settings = {**settings, "threads": max(1, cores // concurrent)}
    resources = {"CPU": 1.0, **({"GPU": min(1.0, have.get("GPU", 1) / concurrent)} if gpu else {})}
    seed, last = settings["config"]["train"]["seed"], settings["config"]["train"]["steps"]
    if search == "random":
        drawn = points(space, trials, seed)
        choice: Any = ray_tune.grid_search([{"number": i, "weights": w} for i, w in enumerate(drawn)])
        algorithm, samples = None, 1
    else:
        choice = {"weights": {n: _distribution(r) for n, r in space.weights.items()}}
        algorithm, samples = _optuna(space, seed), trials
    asha = None
    if scheduler == "asha" and trials > 1:
        from ray.tune.schedulers import ASHAScheduler

        # Rungs at a quarter and at half of the steps; at each, the worse half ends.
        asha = ASHAScheduler(time_attr="step", max_t=last, grace_period=settings["rung"], reduction_factor=2)
    with _storage(study.store) as storage, _quiet():
        tuner = ray_tune.Tuner(
            ray_tune.with_resources(run_trial, resources),
            param_space={"trial": choice, "settings": settings},
            tune_config=ray_tune.TuneConfig(
                metric=study.about["metric"],
                mode=study.about["mode"],
                scheduler=asha,
                search_alg=algorithm,
                num_samples=samples,
                max_concurrent_trials=concurrent,
                trial_dirname_creator=_trial_id,
                reuse_actors=True,  # a fresh process would import torch anew for each trial
            ),
            run_config=ray_tune.RunConfig(
                name="ray",
                storage_path=storage,
                verbose=0,
                callbacks=[_callback(study)],
                failure_config=ray_tune.FailureConfig(max_failures=0),
            ),
        )
        tuner.fit()


def _trial_id(trial: Any) -> str:
    return trial.trial_id


def _callback(study: studies.Study) -> Any:
    """Ray Tune's events → the study. Made here because the base class lives in Ray."""
    from ray.tune import Callback

    class Watch(Callback):
        def __reduce__(self) -> tuple[Any, ...]:
            return Callback, ()  # Ray Tune pickles its callbacks; the study keeps itself

        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            if trial.trial_id not in study.trials:
                chosen = trial.config["trial"]
                number = chosen.get("number", len(study.trials))
                study.start(trial.trial_id, number, chosen["weights"], run_name(chosen, trial.trial_id))

        def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict, **info: Any) -> None:
            study.score(trial.trial_id, result)

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            study.end(trial.trial_id)

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            if trial.trial_id in study.trials:
                study.end(trial.trial_id, _reason(trial.error_file))

    return Watch()


def _reason(error_file: str | None) -> str:
    """The last line of a trial's traceback, or the first of what Ray says of a process that is gone."""
    text = Path(error_file).read_text() if error_file and Path(error_file).exists() else ""
    lines = [line.strip() for line in text.splitlines()[1:] if line.strip()]  # the first one counts and dates
    if not lines:
        return "its process ended without a word"
    line = lines[-1] if "Traceback" in text or "ray::" in text else lines[0]
    return re.sub(r"^[\w.]+\.(\w+): ", r"\1: ", line)[:300]


def _why(study: studies.Study) -> str:
    reasons = [t.error or f"stopped at step {t.step}" for t in study.trials.values()]
    return f"the first: {reasons[0]}; all are in {study.store.join(studies.FILE)}" if reasons else "none was started"


def _distribution(bounds: tune_spaces.Range) -> Any:
    from ray import tune as ray_tune

    return (ray_tune.loguniform if bounds.log else ray_tune.uniform)(bounds.low, bounds.high)


def _optuna(space: tune_spaces.Space, seed: int) -> Any:
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    first = {f"trial/weights/{name}": value for name, value in space.published().items()}
    return OptunaSearch(points_to_evaluate=[first], seed=seed)


def _cores(have: Mapping[str, float]) -> int:
    """Cores for trials: a cluster's own count; on this machine Ray is told of more than there are."""
    return max(1, int(have.get("CPU", 1)) if os.environ.get("RAY_ADDRESS") else os.cpu_count() or 1)


@contextmanager
def _storage(store: Store) -> Iterator[str]:
    """Where Ray Tune keeps its own state: below the study, or a temporary directory where that is in a bucket."""
    if store.is_local:
        yield store.uri
        return
    with tempfile.TemporaryDirectory(prefix="i2i-tune-") as scratch:
        yield scratch


@contextmanager
def _quiet() -> Iterator[None]:
    """A trial that fails is one line of ours, not a traceback of Ray's."""
    loggers = [logging.getLogger(name) for name in ("ray.tune", "ray.train")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
