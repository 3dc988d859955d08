"""Promotion into a real MLflow registry, by sqlite file and by server."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from models.bundle import load_bundle, save_bundle, update_scores
from models.errors import BundleError, ConfigError, DataError, StorageError
from pipelines import mlflow_env
from pipelines.promote import locate, promote, rollback
from tests.tiny_system import Tiny, register


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    register(monkeypatch)
    return tmp_path


def make_bundle(directory: Path) -> str:
    system = Tiny(Tiny.Config(), ("photo", "drawing"))
    data = {"uri": "data", "digest": "d1"}
    return save_bundle(directory, system, size=64, step=7, ema=False, data=data, scores={"kid_random_v1": 0.25})


def make_study(directory: Path, score: float, metric: str = "kid_random_v1") -> Path:
    make_bundle(directory / "trials/001/bundle")
    trials = [
        {"trial": 0, "score": score + 1, "bundle": "trials/000/bundle"},
        {"trial": 1, "score": score, "bundle": "trials/001/bundle"},
        {"trial": 2, "score": None, "bundle": None},
    ]
    study = {"best": 1, "metric": metric, "mode": "min", "data_digest": "d1", "trials": trials}
    (directory / "study.json").write_text(json.dumps(study))
    return directory


def test_promote__a_study_then_a_run(here, capfd):
    first = promote(str(make_study(here / "study", 0.5)), "letters")
    assert (first.model, first.version, first.alias, first.replaced) == ("letters", 1, "champion", None)
    digest = make_bundle(here / "run/bundle")
    second = promote(str(here / "run"), "letters")
    assert (second.version, second.replaced, second.weights_sha256) == (2, 1, digest)

    version = mlflow_env.client().get_model_version_by_alias("letters", "champion")
    assert version.tags["weights_sha256"] == digest
    assert version.tags["score.kid_random_v1"] == "0.25"
    assert version.tags["system"] == "tiny"
    source = Path(version.source)
    assert version.tags["config_sha256"] == hashlib.sha256((source / "config.json").read_bytes()).hexdigest()
    assert load_bundle(source).sha256 == digest
    assert sorted(os.listdir(source)) == ["card.md", "config.json", "weights.safetensors"]
    run = mlflow_env.client().get_run(version.run_id)
    assert run.info.status == "FINISHED"
    assert capfd.readouterr() == ("", "")


def test_promote__scores_of_any_depth_become_tags(here):
    make_bundle(here / "b")
    update_scores(here / "b", {"l1": 0.5, "b->a/l1": 0.25, "split": "test", "protocol": {"held_out": {"a": 9}}})
    promote(str(here / "b"), "letters")
    tags = mlflow_env.client().get_model_version_by_alias("letters", "champion").tags
    assert tags["score.l1"] == "0.5"
    assert tags["score.b-_a/l1"] == "0.25"
    assert tags["score.split"] == "test"
    assert tags["score.protocol.held_out.a"] == "9"


def test_rollback__to_the_version_before_once(here):
    first, second = make_bundle(here / "a"), make_bundle(here / "b/bundle")
    with pytest.raises(ConfigError, match="letters@champion has nothing to go back to"):
        rollback("letters")
    promote(str(here / "a"), "letters")
    with pytest.raises(ConfigError, match="nothing to go back to"):
        rollback("letters")
    promote(str(here / "b"), "letters")
    result = rollback("letters")
    assert (result.version, result.replaced, result.weights_sha256) == (1, 2, first)
    assert mlflow_env.client().get_model_version_by_alias("letters", "champion").tags["weights_sha256"] == first
    with pytest.raises(ConfigError, match="nothing to go back to"):
        rollback("letters")
    assert promote(str(here / "b"), "letters").replaced == 1
    assert second != first


def test_promote__a_worse_candidate_needs_force(here):
    promote(str(make_study(here / "good", 0.5)), "letters")
    worse = str(make_study(here / "worse", 0.7))
    with pytest.raises(ConfigError, match=r"0\.5; the candidate has 0\.7, which is worse; --force"):
        promote(worse, "letters")
    assert promote(worse, "letters", alias="challenger").version == 2
    assert promote(worse, "letters", force=True).replaced == 1
    other_metric = str(make_study(here / "other", 9.0, metric="kid_inception"))
    assert promote(other_metric, "letters").version == 4


@pytest.mark.parametrize("name", ["../x", "Letters", "", "a" * 64, "a b", "-a", "a\x00b"])
def test_promote__bad_names(here, name):
    with pytest.raises(ConfigError, match="cannot be used"):
        promote("nowhere", name)
    with pytest.raises(ConfigError, match="cannot be used"):
        promote("nowhere", "letters", alias=name)


def test_promote__a_damaged_bundle_is_not_registered(here):
    make_bundle(here / "b")
    raw = bytearray((here / "b/weights.safetensors").read_bytes())
    raw[-1] ^= 1
    (here / "b/weights.safetensors").write_bytes(raw)
    with pytest.raises(BundleError, match="damaged"):
        promote(str(here / "b"), "letters")
    assert mlflow_env.client().search_registered_models() == []


def test_locate__neither_study_nor_run_nor_bundle(here):
    with pytest.raises(BundleError, match="no bundle at"):
        locate(str(here))
    (here / "study.json").write_text(json.dumps({"best": None, "trials": []}))
    with pytest.raises(DataError, match="no winner"):
        locate(str(here))


def test_promote__dead_server(here, monkeypatch):
    make_bundle(here / "b")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match="connection refused; check MLFLOW_TRACKING_URI"):
        promote(str(here / "b"), "letters")


@pytest.mark.slow
def test_promote__to_a_server_that_proxies_artifacts(here, monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{here}/server.db", "--artifacts-destination", str(here / "store")]
    with open(here / "server.log", "wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(240):
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=1):
                    break
            except OSError:
                time.sleep(0.25)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        digest = make_bundle(here / "b")
        assert promote(str(here / "b"), "letters").version == 1
        client = mlflow_env.client()
        version = client.get_model_version_by_alias("letters", "champion")
        local = client.download_artifacts(version.run_id, "bundle", str(here))
        assert load_bundle(local).sha256 == digest
    finally:
        os.killpg(server.pid, 15)
        server.wait(20)
