"""Training on real Ray with a real S3 server: resumption, number of workers, bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from models.bundle import load_bundle
from models.errors import ConfigError
from pipelines import checkpoint
from pipelines.config import RunConfig, merge, resolve
from pipelines.rundir import read_metrics
from pipelines.storage import Store
from pipelines.train import plan_run, train
from tests.datasets import keys, write_dataset

STEPS = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = str(tmp_path_factory.mktemp("data") / "set")
    domains = {"photo": keys("p", 23), "drawing": keys("d", 17)}
    write_dataset(uri, {"train": domains, "val": {"photo": keys("v", 8), "drawing": keys("v", 8)}})
    return uri


@pytest.fixture(autouse=True)
def _own_tracking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")


def _options(data: str, out: Path | str, **changes: Any) -> dict[str, Any]:
    base = {
        "name": "cyclegan",
        "out": str(out),
        "data": {"uri": data, "domains": ("photo", "drawing")},
        "system": {"size": 32, "width": 4, "blocks": 1, "pool": 3},
        "train": {
            "steps": STEPS,
            "batch": 4,
            "seed": 7,
            "workers": 0,
            "threads": 1,
            "precision": "fp32",
            "logical_ranks": 2,
            "checkpoint_every": 3,
            "sample_every": 4,
            "log_every": 2,
        },
    }
    return merge(base, changes)


def _config(data: str, out: Path | str, **changes: Any) -> RunConfig:
    return resolve(_options(data, out, **changes))


def test_train__same_seed_same_weights(data: str, tmp_path: Path) -> None:
    one, two = (train(_config(data, tmp_path / name), progress=False) for name in "ab")
    other = train(_config(data, tmp_path / "c", train={"seed": 8}), progress=False)
    assert one.bundle_sha256 == two.bundle_sha256
    assert one.data_order_sha256 == two.data_order_sha256
    assert one.bundle_sha256 != other.bundle_sha256
    assert one.data_order_sha256 != other.data_order_sha256


def test_train__leaves_a_complete_run_directory(data: str, tmp_path: Path) -> None:
    result = train(_config(data, tmp_path / "run"), progress=False)
    assert result.bundle is not None
    bundle = load_bundle(result.bundle)
    assert bundle.domains == ("photo", "drawing")
    assert bundle.sha256 == result.bundle_sha256
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "run.yaml", "checkpoints", "samples", "metrics.jsonl", "bundle", "result.json", "mlflow-run-id",
    }  # fmt: skip
    assert sorted(p.name for p in (tmp_path / "run/samples").iterdir()) == ["step-00000004.png", "step-00000008.png"]
    rows = read_metrics(str(tmp_path / "run"))
    assert [row["step"] for row in rows if "adv" in row] == [2, 3, 4, 6, 8]
    assert {"adv", "cycle", "identity", "adv_d", "images_per_s", "data_wait"} <= set(rows[0])


def test_train__a_finished_run_says_so(data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = _config(data, tmp_path / "run")
    first = train(config, progress=False)
    again = train(plan_run({"name": "cyclegan", "out": str(tmp_path / "run")}, resume=True), progress=False)
    assert again == first
    assert "is finished already (8 steps)" in capsys.readouterr().err


def test_plan_run__an_existing_run_is_not_overwritten(data: str, tmp_path: Path) -> None:
    options = _options(data, tmp_path / "run")
    with pytest.raises(ConfigError, match="holds no run to resume"):
        plan_run(options, resume=True)
    train(plan_run(options), progress=False)
    with pytest.raises(ConfigError, match="holds a run already; give --resume"):
        plan_run(options)
    with pytest.raises(ConfigError, match=r"begun with other settings: weights.cycle was 10.0, now 5.0"):
        plan_run(merge(options, {"weights": {"cycle": 5}}), resume=True)
    with pytest.raises(ConfigError, match="begun with 8 steps, not 9; to change its length give --extend"):
        plan_run(merge(options, {"train": {"steps": 9}}), resume=True)


def test_train__extend_goes_on(data: str, tmp_path: Path) -> None:
    options = _options(data, tmp_path / "run")
    train(plan_run(options), progress=False)
    longer = plan_run({"name": "cyclegan", "out": options["out"], "train": {"steps": 12}}, extend=True)
    assert train(longer, progress=False).steps == 12


CHILD = """
import sys
from pipelines.config import RunConfig
from pipelines.train import train
train(RunConfig.from_yaml(open(sys.argv[1]).read()), progress=False)
"""


def _start(config: RunConfig, folder: Path) -> subprocess.Popen[bytes]:
    (folder / "config.yaml").write_text(config.to_yaml())
    return subprocess.Popen([sys.executable, "-c", CHILD, str(folder / "config.yaml")], cwd=Path(__file__).parents[2])


def _wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    while not list(path.parent.glob(path.name)):
        assert process.poll() is None, "the run ended before it could be disturbed"
        time.sleep(0.02)


def test_train__killed_and_resumed_is_bit_identical(data: str, tmp_path: Path) -> None:
    """kill -9 in mid-run; the resumed run ends with the very weights of an undisturbed one."""
    long = {"steps": 120, "checkpoint_every": 7, "sample_every": 400}
    undisturbed = train(_config(data, tmp_path / "a", train=long), progress=False)
    config = _config(data, tmp_path / "b", train=long)
    process = _start(config, tmp_path)
    _wait_for(tmp_path / "b/checkpoints/step-00000014-*", process)
    process.kill()
    process.wait()
    assert not (tmp_path / "b/result.json").exists()
    resumed = train(plan_run({"name": "cyclegan", "out": config.out}, resume=True), progress=False)
    assert resumed.bundle_sha256 == undisturbed.bundle_sha256
    assert resumed.data_order_sha256 == undisturbed.data_order_sha256
    one, two = (checkpoint.latest(Store(str(tmp_path / name))) for name in "ab")
    assert one is not None
    assert two is not None
    assert all(torch.equal(one.shared[key], two.shared[key]) for key in one.shared)
    assert all(torch.equal(one.pools[v][key], two.pools[v][key]) for v in one.pools for key in one.pools[v])
    steps = [row["step"] for row in read_metrics(config.out)]
    assert steps == sorted(steps)


def test_train__sigterm_saves_and_says_how_to_go_on(data: str, tmp_path: Path) -> None:
    config = _config(data, tmp_path / "run", train={"steps": 2000, "checkpoint_every": 1000, "log_every": 5})
    process = _start(config, tmp_path)
    _wait_for(tmp_path / "run/metrics.jsonl", process)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    found = checkpoint.latest(Store(config.out))
    assert found is not None
    assert 0 < found.step < 2000
    assert not (tmp_path / "run/lease.json").exists()


@pytest.mark.usefixtures("ray_session")
@pytest.mark.timeout(400)
def test_train__two_workers_do_what_one_does(data: str, tmp_path: Path) -> None:
    """The same logical ranks on one worker and on two: the same samples in the same order, losses equal to rounding."""
    here = train(_config(data, tmp_path / "here"), progress=False)
    two = train(_config(data, tmp_path / "two", train={"workers": 2}), progress=False)
    assert two.finished
    assert here.data_order_sha256 == two.data_order_sha256
    expected, found = read_metrics(str(tmp_path / "here")), read_metrics(str(tmp_path / "two"))
    for row, same in zip(expected, found, strict=True):
        for term in ("adv", "cycle", "identity", "adv_d"):
            assert same[term] == pytest.approx(row[term], rel=1e-5)


@pytest.mark.timeout(400)
def test_train__from_and_to_s3(data: str, tmp_path: Path, s3, ray_session: None) -> None:
    """The dataset is read from a bucket, the run written to one; the weights are those of a local run."""
    local = train(_config(data, tmp_path / "here"), progress=False)
    remote = s3.put(Path(data), "train-data/set")
    result = train(_config(remote, s3.uri("train-runs/run"), train={"workers": 1}), progress=False)
    assert result.bundle == "s3://train-runs/run/bundle"
    assert result.bundle_sha256 == local.bundle_sha256
    found = checkpoint.latest(Store("s3://train-runs/run"))
    assert found is not None
    assert found.step == STEPS
    assert len(read_metrics("s3://train-runs/run")) == 5


def test_train__more_gpus_than_there_are(data: str, tmp_path: Path, ray_session: None) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ConfigError, match="1 workers need 1 GPUs, the cluster has 0"):
        train(_config(data, tmp_path / "run", train={"workers": 1, "gpu": True}), progress=False)


def _i2i(*args: str, **env: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", *args],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, **env},
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def _one_line(stderr: str) -> str:
    lines = stderr.strip().splitlines()
    assert "Traceback" not in stderr
    assert len([line for line in lines if line.startswith("error: ")]) == 1, stderr
    return lines[-1]


def test_cli__unknown_system(data: str) -> None:
    status, _, stderr = _i2i("train", "cyclgan", "--data", data)
    assert status == 2
    assert _one_line(stderr).startswith("error: unknown system 'cyclgan'; did you mean 'cyclegan'? known: ")


def test_cli__typo_in_a_weight(data: str) -> None:
    status, _, stderr = _i2i("train", "cyclegan", "--data", data, "--set", "weights.cycel=3")
    assert status == 2
    assert "did you mean 'cycle'?" in _one_line(stderr)


def test_cli__missing_dataset_and_unknown_option(tmp_path: Path) -> None:
    status, _, stderr = _i2i(
        "train", "cyclegan", "--data", f"{tmp_path}/none", "--out", f"{tmp_path}/r", "--workers", "0"
    )
    assert status == 2
    assert "is not a prepared dataset" in _one_line(stderr)
    status, _, stderr = _i2i("train", "cyclegan", "--dta", "x")
    assert status == 2
    assert "--dta" in _one_line(stderr)


def test_cli__missing_bucket(s3, tmp_path: Path) -> None:
    status, _, stderr = _i2i("train", "cyclegan", "--data", "s3://no-such-bucket/x", "--out", f"{tmp_path}/r", **s3.env)
    assert status == 2
    assert "no-such-bucket" in _one_line(stderr)


def test_cli__unaligned_data_for_pix2pix(data: str, tmp_path: Path) -> None:
    status, _, stderr = _i2i(
        "train", "pix2pix", "--data", data, "--size", "32", "--steps", "1", "--workers", "0", "--out", f"{tmp_path}/r"
    )
    assert status == 2
    assert "photo and drawing are not aligned in the train split; pix2pix needs pairs" in _one_line(stderr)


def test_cli__json_of_a_dry_run() -> None:
    status, stdout, _ = _i2i("train", "pix2pix", "--dry-run", "--json")
    assert status == 0
    report = json.loads(stdout)
    assert report["networks"] == {"g": 54_413_955, "d": 2_768_705}
    assert report["weights"] == {"adv": 1.0, "l1": 100.0, "adv_d": 1.0}
    assert [phase["name"] for phase in report["phases"]] == ["d", "g"]
    assert report["memory_bytes"] > 0
    assert report["config"]["train"]["batch"] == 1
