"""The MLflow tracker against a real sqlite store, and against none at all."""

from __future__ import annotations

import contextlib
import os
import socket
import time

import pytest

from models.errors import ConfigError
from pipelines import mlflow_env, tracking
from pipelines.tracking import Tracker


@pytest.fixture
def store(tmp_path, monkeypatch) -> str:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    return mlflow_env.tracking_uri()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_tracker__stores_params_metrics_tags_artifacts_and_children(store, tmp_path, capfd):
    picture = tmp_path / "grid.txt"
    picture.write_text("grid")
    with Tracker("letters", "first", tags={"system": "cyclegan"}) as tracker:
        tracker.params({"weights": {"cycle": 10.0, "identity": 5.0}, "train": {"steps": 3}})
        for step in range(2000):
            tracker.metrics({"cycle": step / 2, "broken": float("nan"), "note": "text"}, step)
        tracker.artifact(picture, "samples")
        with Tracker("letters", "trial 0", parent=tracker) as child:
            child.metrics({"score": 1.0})
        run_id = tracker.run_id()
    client = mlflow_env.client()
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"weights.cycle": "10.0", "weights.identity": "5.0", "train.steps": "3"}
    assert run.data.metrics == {"cycle": 999.5}
    assert len(client.get_metric_history(run_id, "cycle")) == 2000
    assert run.data.tags["system"] == "cyclegan"
    assert [entry.path for entry in client.list_artifacts(run_id, "samples")] == ["samples/grid.txt"]
    children = client.search_runs([run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run_id}'")
    assert [entry.info.run_name for entry in children] == ["trial 0"]
    assert sorted(os.listdir(tmp_path / "runs")) == ["artifacts", "mlflow.db"]
    assert sorted(os.listdir(tmp_path)) == ["grid.txt", "runs"]
    assert capfd.readouterr() == ("", "")


def test_tracker__an_exception_marks_the_run_failed(store):
    tracker = Tracker("letters", "bad")
    with contextlib.suppress(ZeroDivisionError), tracker:
        raise ZeroDivisionError
    assert mlflow_env.client().get_run(tracker.run_id()).info.status == "FAILED"


def test_tracker__continues_a_run(store):
    with Tracker("letters", "first") as tracker:
        tracker.metrics({"loss": 1.0}, 1)
    with Tracker("letters", "first", run_id=tracker.run_id()) as again:
        again.metrics({"loss": 2.0}, 2)
    assert again.run_id() == tracker.run_id()
    assert len(mlflow_env.client().get_metric_history(tracker.run_id(), "loss")) == 2


def test_tracker__a_refused_record_does_not_block_the_next(store, capsys):
    with Tracker("letters", "first") as tracker:
        tracker.params({"steps": 1})
        tracker.params({"steps": 2})  # MLflow's parameters cannot change
        tracker.artifact("nowhere.png")
        tracker.metrics({"loss": 1.0})
    assert mlflow_env.client().get_run(tracker.run_id()).data.metrics == {"loss": 1.0}
    assert capsys.readouterr().err.count("warning") == 1


def test_tracker__dead_server__one_warning_and_nothing_waits(capsys):
    uri = f"http://someone:hidden@127.0.0.1:{free_port()}"
    started = time.monotonic()
    trackers = [Tracker("letters", f"run {i}", uri=uri) for i in range(2)]
    for tracker in trackers:
        for step in range(500):
            tracker.metrics({"loss": 1.0}, step)
    assert time.monotonic() - started < 1.0
    for tracker in trackers:
        tracker.close(flush_s=4)
    assert time.monotonic() - started < 12
    assert trackers[0].run_id(timeout_s=0.1) is None
    err = capsys.readouterr().err
    assert err.count("warning") == 1
    assert "hidden" not in err


def test_tracker__the_spool_is_bounded():
    tracker = Tracker("letters", "run", uri=f"http://127.0.0.1:{free_port()}", spool=10)
    for step in range(100):
        tracker.metrics({"loss": 1.0}, step)
    assert len(tracker._spool) == 10
    tracker.close(flush_s=0.1)


def test_tracker__off(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")
    with Tracker("letters", "run") as tracker:
        tracker.metrics({"loss": 1.0})
        assert tracker.run_id() is None
    with pytest.raises(ConfigError, match="switched off"):
        mlflow_env.client()


@pytest.mark.parametrize(
    ("key", "value", "hidden"),
    [
        ("aws_secret_access_key", "abc", True),
        ("api-key", "abc", True),
        ("api_key", "abc", True),
        ("note", "AKIAIOSFODNN7EXAMPLE", True),
        ("keys_sha256", "ab12", False),
        ("steps", 3, False),
    ],
)
def test_redact(key, value, hidden):
    assert (tracking.redact({"part": {key: value}})[f"part.{key}"] == "[redacted]") is hidden


def test_redact__takes_the_user_out_of_a_uri():
    assert tracking.redact({"data": "http://me:pw@host/x"}) == {"data": "http://host/x"}
