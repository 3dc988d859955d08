from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from models.errors import ConfigError
from pipelines import lease as leases
from pipelines.lease import Lease
from pipelines.storage import Store

HOLD = """
import sys, time
from pipelines.lease import Lease
from pipelines.storage import Store
Lease(Store(sys.argv[1])).__enter__()
print("held", flush=True)
time.sleep(600)
"""


def test_lease__is_given_back(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    for _ in range(2):
        with Lease(store):
            assert store.exists("lease.json")
        assert not store.exists("lease.json")


def test_lease__a_second_writer_is_refused_by_name(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    with Lease(store), pytest.raises(ConfigError, match=r"is being written by process \d+ on"), Lease(store):
        pass


def test_lease__of_a_killed_process_is_taken_over_at_once(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    store = Store(str(tmp_path))
    with pytest.raises(ConfigError, match="is being written"), Lease(store):
        pass
    holder.kill()
    holder.wait()
    holder.stdout.close()
    with Lease(store):
        pass


def test_lease__from_another_machine_lapses(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    holder = {"id": "x", "pid": 1, "host": "elsewhere", "started": "1", "time": time.time() - 30}
    store.write("lease.json", json.dumps(holder).encode())
    with pytest.raises(ConfigError, match="elsewhere"), Lease(store):
        pass
    store.write("lease.json", json.dumps(holder | {"time": time.time() - 61}).encode())
    with Lease(store):
        pass


def test_lease__of_two_that_wrote_at_once_the_last_holds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(str(tmp_path))
    store.is_local = False  # such a store lets both in
    other = json.dumps({"id": "other"}).encode()
    monkeypatch.setattr(leases.time, "sleep", lambda seconds: store.write("lease.json", other))
    with pytest.raises(ConfigError, match="taken by another process just now"), Lease(store):
        pass
    assert store.read("lease.json") == other


def test_lease__one_that_was_taken_is_told_and_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(leases, "_RENEW_S", 0.05)
    store, told = Store(str(tmp_path)), []
    other = json.dumps({"id": "other", "pid": 7, "host": "elsewhere"}).encode()
    with Lease(store, on_lost=lambda: told.append(True)) as lease:
        time.sleep(0.2)
        assert not lease.lost.is_set()
        while not lease.lost.wait(0.1):
            store.write("lease.json", other)
    assert told == [True]
    assert store.read("lease.json") == other
    assert "was taken by process 7 on elsewhere" in capsys.readouterr().err
