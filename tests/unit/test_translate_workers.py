"""What a person is told when the workers of `translate` cannot be had, without starting any."""

from __future__ import annotations

import json

import pytest
from ray.exceptions import RayError, RayTaskError, WorkerCrashedError

from models.errors import ConfigError, I2IError
from pipelines.storage import Store
from pipelines.translate import REPORT, _in_one_line, _Report, check_gpus


def test_check_gpus__fewer_than_workers():
    check_gpus({"GPU": 2.0}, 2)
    with pytest.raises(ConfigError, match="2 workers need 2 GPUs, the cluster has 1; lower --workers"):
        check_gpus({"CPU": 8.0, "GPU": 1.0}, 2)
    with pytest.raises(ConfigError, match="the cluster has 0"):
        check_gpus({"CPU": 8.0}, 1)


@pytest.mark.parametrize(
    ("death", "cause"),
    [
        (RayError("the actor died\nmodels.errors.BundleError: no such bundle\n"), "BundleError: no such bundle"),
        (RayTaskError("map", "Traceback\n  File x\nValueError: wrong", ValueError("wrong")), "ValueError: wrong"),
        (WorkerCrashedError(), "WorkerCrashedError"),
    ],
)
def test_workers__their_death_is_one_line_and_what_is_left_is_counted(tmp_path, death, cause):
    def rows():
        yield {"path": "a.png", "error": "", "code": ""}
        yield {"path": "b.png", "error": "too small", "code": "E_IMG_SIZE"}
        raise death

    report = _Report(Store(str(tmp_path)))
    told = _in_one_line(rows(), 5, report)
    report.add(next(told))
    report.add(next(told))
    with pytest.raises(I2IError, match="1 images done, 1 failed, 3 left out") as caught:
        next(told)
    assert f"or die: {cause}; 1 images" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert json.loads((tmp_path / REPORT).read_text())["path"] == "b.png"
