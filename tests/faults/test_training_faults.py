"""Training on Ray, disturbed: killed workers and drivers, signals, divergence. Nothing is lost or tried in vain."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.config import merge
from pipelines.rundir import RunDirectory, read_metrics
from pipelines.train import plan_run, train
from tests.datasets import keys, write_dataset

pytestmark = [pytest.mark.faults, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[2]
OPTIONS = [
    *("--domains", "photo,drawing", "--size", "32", "--batch", "4", "--steps", "150", "--seed", "7", "--workers", "1"),
    *(
        "--precision",
        "fp32",
        "--cpu",
        "--set",
        "system.width=4",
        "--set",
        "system.blocks=1",
        "--set",
        "train.threads=1",
    ),
    *("--set", "train.checkpoint_every=10", "--set", "train.log_every=5", "--set", "train.sample_every=1000"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = str(tmp_path_factory.mktemp("data") / "set")
    domains = {"photo": keys("p", 23), "drawing": keys("d", 17)}
    write_dataset(uri, {"train": domains, "val": {"photo": keys("v", 8), "drawing": keys("v", 8)}})
    return uri


@pytest.fixture(autouse=True)
def _own_tracking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")


def _start(data: str, out: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pipelines", "train", "cyclegan", "--data", data, "--out", str(out)]
    return subprocess.Popen([*command, *OPTIONS, *more], cwd=ROOT, stderr=subprocess.PIPE, text=True)


def _wait_for(out: Path, pattern: str, process: subprocess.Popen[str]) -> None:
    while not list(out.glob(pattern)):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)


def _undisturbed(data: str, out: Path) -> dict:
    """The same run in this process, without Ray."""
    process = _start(data, out, "--workers", "0")
    assert process.wait() == 0, process.communicate()[1]
    process.communicate()
    result = RunDirectory(str(out)).result()
    assert result is not None
    return result


def _worker_pids() -> list[int]:
    listed = subprocess.run(["pgrep", "-f", "ray::RayTrainWorker"], capture_output=True, text=True, check=False)
    return [int(pid) for pid in listed.stdout.split()]


def test_train__a_killed_worker_is_replaced(data: str, tmp_path: Path) -> None:
    process = _start(data, tmp_path / "run")
    _wait_for(tmp_path / "run", "checkpoints/step-00000020-*/COMPLETE", process)
    pids = _worker_pids()
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert RunDirectory(str(tmp_path / "run")).result() == _undisturbed(data, tmp_path / "undisturbed")


def test_train__a_killed_driver_is_resumed_bit_for_bit(data: str, tmp_path: Path) -> None:
    process = _start(data, tmp_path / "run")
    _wait_for(tmp_path / "run", "checkpoints/step-00000020-*/COMPLETE", process)
    process.kill()
    process.communicate()
    resumed = _start(data, tmp_path / "run", "--resume")
    _, stderr = resumed.communicate()
    assert resumed.returncode == 0, stderr
    assert RunDirectory(str(tmp_path / "run")).result() == _undisturbed(data, tmp_path / "undisturbed")


def test_train__sigterm_saves_and_exits_143(data: str, tmp_path: Path) -> None:
    process = _start(data, tmp_path / "run", "--set", "train.checkpoint_every=1000")
    _wait_for(tmp_path / "run", "metrics.jsonl", process)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate()
    assert process.returncode == 143, stderr
    assert "go on with --resume" in stderr
    assert "Traceback" not in stderr
    assert list((tmp_path / "run/checkpoints").glob("*/COMPLETE"))
    resumed = _start(data, tmp_path / "run", "--set", "train.checkpoint_every=1000", "--resume")
    _, stderr = resumed.communicate()
    assert resumed.returncode == 0, stderr
    assert RunDirectory(str(tmp_path / "run")).result() == _undisturbed(data, tmp_path / "undisturbed")


def test_train__divergence_is_named_and_tried_once(data: str, tmp_path: Path) -> None:
    process = _start(data, tmp_path / "run", "--set", "weights.cycle=3e38", "--set", "weights.identity=3e38")
    _, stderr = process.communicate()
    assert process.returncode == 1, stderr
    assert "error: step 0, phase 'g': the term 'weighted sum' is inf" in stderr
    assert "Traceback" not in stderr
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_train__two_writers_are_refused(data: str, tmp_path: Path) -> None:
    process = _start(data, tmp_path / "run")
    _wait_for(tmp_path / "run", "metrics.jsonl", process)
    second = _start(data, tmp_path / "run", "--resume")
    _, stderr = second.communicate()
    assert second.returncode == 2
    assert "is being written by process" in stderr
    process.communicate()
    assert process.returncode == 0


def test_train__another_number_of_workers_after_a_kill(data: str, tmp_path: Path) -> None:
    """Begun by one worker, ended by two: the same samples, losses equal to rounding."""
    ranks = ("--set", "train.logical_ranks=2")
    process = _start(data, tmp_path / "run", *ranks)
    _wait_for(tmp_path / "run", "checkpoints/step-00000020-*/COMPLETE", process)
    process.kill()
    process.communicate()
    resumed = _start(data, tmp_path / "run", *ranks, "--resume", "--workers", "2")
    _, stderr = resumed.communicate()
    assert resumed.returncode == 0, stderr
    options = merge({"name": "cyclegan", "out": str(tmp_path / "run")}, {})
    stored = plan_run(options, resume=True)
    alone = stored.model_copy(
        update={"out": str(tmp_path / "alone"), "train": stored.train.model_copy(update={"workers": 0})}
    )
    result = train(alone, progress=False)
    done = RunDirectory(str(tmp_path / "run")).result()
    assert done is not None
    assert done["data_order_sha256"] == result.data_order_sha256
    found = {row["step"]: row for row in read_metrics(str(tmp_path / "run"))}
    for row in read_metrics(str(tmp_path / "alone"))[:8]:
        assert found[row["step"]]["cycle"] == pytest.approx(row["cycle"], rel=1e-3)
