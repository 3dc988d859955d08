"""A real search: Ray Tune, trials that finish, are stopped, diverge and crash, and MLflow's record of them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

import tune_spaces
from models.bundle import load_bundle
from models.errors import ConfigError, DataError, I2IError
from pipelines import mlflow_env, search, tracking
from pipelines.config import RunConfig, resolve
from pipelines.promote import locate
from pipelines.search import points
from pipelines.tune import describe, tune
from tests.datasets import keys, write_dataset

KID = "kid_random_v1"
STEPS = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    directory = tmp_path_factory.mktemp("tune") / "data"
    splits = {
        "train": {"a": keys("p", 24), "b": keys("q", 24)},
        "val": {"a": keys("r", 8), "b": keys("s", 8)},
    }
    write_dataset(directory, splits)
    return str(directory)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(data: str, out: str = "study", **weights: float) -> RunConfig:
    return resolve(
        {
            "name": "cyclegan",
            "out": out,
            "data": {"uri": data},
            "system": {"size": 32, "width": 2, "blocks": 0, "d_width": 2, "d_layers": 1},
            "weights": weights,
            "train": {"steps": STEPS, "batch": 2, "seed": 3, "workers": 0, "precision": "fp32"},
        }
    )


def test_tune__finds_the_best_of_its_trials_and_records_them(here, data, ray_session, capfd):
    result = tune(config(data), trials=4, concurrent=2)
    printed = capfd.readouterr()
    lines = [line for line in printed.err.splitlines() if line.startswith("trial ")]
    assert len(lines) == 4
    assert "(published)" in "".join(lines)
    assert "Traceback" not in printed.out + printed.err
    assert printed.out == ""

    study = json.loads((here / "study/study.json").read_text())
    trials = study["trials"]
    assert [t["trial"] for t in trials] == [0, 1, 2, 3]
    assert trials[0]["weights"] == {"cycle": 10.0, "identity": 5.0}
    assert {t["status"] for t in trials} <= {"finished", "stopped"}
    assert all(t["step"] == STEPS for t in trials if t["status"] == "finished")
    assert all(t["rungs"][0][0] == STEPS // 4 for t in trials)
    done = [t for t in trials if t["status"] == "finished"]
    assert study["best"] == result.best == min(done, key=lambda t: t["score"])["trial"]
    assert (study["metric"], study["mode"], study["split"]) == (KID, "min", "val")
    assert math.isfinite(study["do_nothing"])

    bundle = load_bundle(result.bundle)
    assert bundle.scores[KID] == pytest.approx(trials[result.best]["score"], rel=1e-6)
    assert bundle.document["loss_weights"]["cycle"] == trials[result.best]["weights"]["cycle"]
    assert locate(result.study).bundle == result.bundle
    assert describe(result).endswith(result.study)

    client = mlflow_env.client()
    experiment = client.get_experiment_by_name(tracking.EXPERIMENT).experiment_id
    runs = client.search_runs([experiment])
    parents = [r for r in runs if r.data.tags.get("kind") == "study"]
    children = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == parents[0].info.run_id]
    assert len(parents) == 1
    assert sorted(r.info.run_name for r in children) == [f"trial {i:03d}" for i in range(4)]
    assert all(KID in r.data.metrics and r.info.status == "FINISHED" for r in children)


def test_tune__optuna__starts_from_the_published_weights(here, data, ray_session):
    result = tune(config(data), trials=2, search="optuna", scheduler="none", concurrent=1)
    assert [t["status"] for t in result.trials] == ["finished", "finished"]
    assert result.trials[0]["weights"] == {"cycle": 10.0, "identity": 5.0}
    assert result.trials[1]["weights"] != result.trials[0]["weights"]
    assert load_bundle(result.bundle).name == "cyclegan"


def test_tune__trials_that_crash_are_listed_and_the_others_go_on(here, data, ray_session, monkeypatch, capfd):
    def three(space, trials, seed):
        return [space.published(), {"cycle": -1.0, "identity": 5.0}, {"cycle": 2.0, "identity": 2.0}]

    monkeypatch.setattr(search, "points", three)
    (here / "study/trials").mkdir(parents=True)
    (here / "study/trials/002").write_text("in the way")
    result = tune(config(data), trials=3, scheduler="none", concurrent=1)
    assert result.best == 0
    assert [t["status"] for t in result.trials] == ["finished", "failed", "failed"]
    assert result.trials[1]["error"].startswith("ConfigError: weights.cycle=-1.0: a finite number of at least 0")
    assert "002" in result.trials[2]["error"]
    assert all(t["score"] is None and t["bundle"] is None for t in result.trials[1:])
    assert "Traceback" not in capfd.readouterr().err


def test_tune__a_diverging_trial_ends(here, data, ray_session):
    diverging = config(data)
    diverging = diverging.model_copy(update={"system": {**diverging.system, "lr": 1e25}})
    with pytest.raises(I2IError, match=r"none of the 1 trials came to its end; the first: NonFiniteLoss: step \d"):
        tune(diverging, trials=1)
    assert json.loads((here / "study/study.json").read_text())["best"] is None


def test_tune__into_a_bucket(here, data, ray_session, s3):
    uri = s3.uri("studies/first")
    result = tune(config(data, out=uri), trials=1)
    assert result.bundle == "s3://studies/first/trials/000/bundle"
    assert locate(uri).bundle == result.bundle


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trials": 0}, "at least 1"),
        ({"scheduler": "ahsa"}, "did you mean 'asha'"),
        ({"search": "grid"}, "known: optuna, random"),
        ({"objective": "kld"}, "did you mean 'kid'"),
        ({"objective": "l1"}, "not aligned"),
        ({"features": "inceptoin"}, "unknown feature extractor"),
    ],
)
def test_tune__bad_options_before_the_first_trial(here, data, options, message):
    with pytest.raises(ConfigError, match=message):
        tune(config(data), **{"trials": 2, **options})
    assert not (here / "study").exists()


def test_tune__too_few_images_before_the_first_trial(here, tmp_path):
    splits = {"train": {"a": keys("p", 9), "b": keys("q", 9)}, "val": {"a": keys("r", 9), "b": keys("s", 4)}}
    write_dataset(tmp_path / "few", splits)
    with pytest.raises(DataError, match=r"domain 'b' has 4 images in 'val'; scores need at least 6"):
        tune(config(str(tmp_path / "few")), trials=2)
    assert not (here / "study").exists()


def test_tune__does_not_overwrite_a_study(here, data):
    (here / "study").mkdir()
    (here / "study/study.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds a study already"):
        tune(config(data), trials=2)


def test_points__published_first_then_spread_over_the_space():
    space = tune_spaces.load("cyclegan")
    drawn = points(space, 17, seed=1)
    assert drawn[0] == space.published()
    assert drawn == points(space, 17, seed=1)
    assert drawn != points(space, 17, seed=2)
    for name, bounds in space.weights.items():
        values = [point[name] for point in drawn[1:]]
        assert all(bounds.low <= value <= bounds.high for value in values)
        middle = bounds.at(0.5)
        assert sum(value < middle for value in values) == 8
    assert points(space, 1, seed=0) == [space.published()]
