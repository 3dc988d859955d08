from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from models.errors import ConfigError
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
