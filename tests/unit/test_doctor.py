"""What the doctor finds, without Ray (tests/integration starts it)."""

from __future__ import annotations

import socket

import pytest

from pipelines import doctor
from pipelines.doctor import Check


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)


def test_doctor__a_good_machine(here):
    checks = doctor.doctor(start_ray=False)
    assert not doctor.failed(checks), doctor.render(checks)
    assert {"python", "packages", "device", "cores", "memory", "mlflow", "s3"} <= by_name(checks).keys()
    assert by_name(checks)["mlflow"].status == "ok"
    assert "torch 2.13.0" in by_name(checks)["packages"].found


def test_doctor__names_the_source_of_an_identity_but_never_the_key(here, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7EXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMIEXAMPLEKEY")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://me:pw@127.0.0.1:9")
    check = next(doctor._s3())
    assert check.found == "http://127.0.0.1:9; identity from: env"
    assert check.status == "ok"


def test_doctor__a_dead_tracking_server_is_a_warning(here, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    check = next(doctor._mlflow())
    assert check.status == "warn"
    assert "connection refused" in check.found


def test_doctor__a_port_in_use(monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        monkeypatch.setattr(doctor, "SERVE_PORT", other.getsockname()[1])
        check = next(doctor._ports())
    assert check.status == "warn"
    assert "--port" in check.advice


def test_doctor__packages_off_their_pins(monkeypatch):
    lines = ["torch==1.0", "numpy>=99", "no-such-package-i2i>=1", "pytest; extra == 'dev'"]
    monkeypatch.setattr(doctor, "_requirements", lambda: lines)
    check = next(doctor._packages())
    assert check.status == "FAIL"
    assert "no-such-package-i2i" in check.found
    assert "wanted ==1.0" in check.found


def test_doctor__a_look_that_breaks_is_a_failure_of_one_line(here, monkeypatch):
    monkeypatch.setattr(doctor, "_cpu_flags", lambda: 1 / 0)
    checks = doctor.doctor(start_ray=False, data="s4://nowhere")
    assert by_name(checks)["torch"].status == "FAIL"
    assert doctor.failed(checks)
    assert checks[-1].status == "FAIL"


def test_render():
    text = doctor.render([Check("ray", "ok", "fine"), Check("mlflow", "warn", "gone", "start it")])
    assert text.splitlines() == [
        "ok    ray     fine",
        "warn  mlflow  gone",
        "              → start it",
        "1 ok, 1 to look at, 0 failed",
    ]
