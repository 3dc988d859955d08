"""The search itself, by Ray Tune: which weightings are tried, which trials end early, what the study is told."""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import tune_spaces
from pipelines import study as studies
from pipelines.storage import Store
from pipelines.trial import run_name, run_trial


def points(space: tune_spaces.Space, trials: int, seed: int) -> list[dict[str, float]]:
    """The published weights, then `trials − 1` points spread evenly over the space; a function of the seed."""
    engine = torch.quasirandom.SobolEngine(len(space.weights), scramble=True, seed=seed)
    drawn = engine.draw(max(trials - 1, 1)).tolist()[: trials - 1]
    named = [{n: r.at(x) for (n, r), x in zip(space.weights.items(), row, strict=True)} for row in drawn]
    return [space.published(), *named]


def run_trials(
    settings: dict[str, Any],
    space: tune_spaces.Space,
    study: studies.Study,
    trials: int,
    scheduler: str,
    search: str,
    concurrent: int | None,
) -> None:
    """Hand the trials to Ray Tune and wait for the last; what becomes of them is in the study.

    Args:
        settings: of every trial, as `trial.run_trial` takes them.
        scheduler, search, concurrent: as for `tune`.
    """
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
