"""One writer a run directory: a lease that names its holder and is renewed while it is held."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from types import TracebackType

from models.errors import ConfigError, I2IError
from pipelines import console
from pipelines.storage import Store

_FILE = "lease.json"
_RENEW_S = 10.0
_EXPIRES_S = 60.0
_SETTLE_S = 0.2


class Lease:
    """Context manager around everything that writes to a run directory.

    A lease left behind by a process that died on this machine is taken over at once; one from elsewhere when it has not
    been renewed for a minute. A store that does not honour conditional puts can let two writers in at the same moment:
    then the last to write holds the lease, and the other learns of it at once or at its next renewal.

    Args:
        on_lost: called, in another thread, where another writer has taken the lease; the holder must stop writing.

    Attributes:
        lost: set at the same moment.

    Raises:
        ConfigError: the directory is in use.
    """

    def __init__(self, store: Store, on_lost: Callable[[], None] = lambda: None) -> None:
        self.lost = threading.Event()
        self._store, self._on_lost = store, on_lost
        self._id = uuid.uuid4().hex
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="i2i-lease", daemon=True)

    def __enter__(self) -> Lease:
        new = self._store.write_new(_FILE, self._document())
        if not new:
            self._take_over()
        if not (new and self._store.is_local):
            self._confirm()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        try:
            if self._holder().get("id") == self._id:
                self._store.delete(_FILE)
        except I2IError as problem:
            console.warn(f"the lease on {self._store.uri} could not be given back: {problem}")

    def _take_over(self) -> None:
        holder = self._holder()
        age = time.time() - float(holder.get("time", 0))
        here = holder.get("host") == socket.gethostname()
        dead = here and not _alive(int(holder.get("pid", 0)), str(holder.get("started", "")))
        if holder and not dead and age < _EXPIRES_S:
            raise ConfigError(
                f"{self._store.uri} is being written by process {holder.get('pid')} on {holder.get('host')}",
                code="E_RUN_LOCKED",
                hint=f"wait for it, or stop it; a lease lapses {_EXPIRES_S:.0f} s after its holder's death",
            )
        self._store.write(_FILE, self._document())

    def _confirm(self) -> None:
        """Another process may have written at the same moment: the last one holds it."""
        time.sleep(_SETTLE_S)
        if self._holder().get("id") != self._id:
            raise ConfigError(f"{self._store.uri} was taken by another process just now", code="E_RUN_LOCKED")

    def _renew(self) -> None:
        while not self._stop.wait(_RENEW_S):
            holder = self._holder()
            if holder.get("id", self._id) != self._id:
                console.warn(
                    f"{self._store.uri} was taken by process {holder.get('pid')} on {holder.get('host')}; stopping"
                )
                self.lost.set()
                self._on_lost()
                return
            try:
                self._store.write(_FILE, self._document())
            except I2IError as problem:
                console.warn(f"the lease on {self._store.uri} could not be renewed: {problem}")

    def _holder(self) -> dict:
        try:
            return json.loads(self._store.read(_FILE))
        except (I2IError, ValueError):
            return {}

    def _document(self) -> bytes:
        pid = os.getpid()
        holder = {
            "id": self._id,
            "pid": pid,
            "host": socket.gethostname(),
            "started": _start_time(pid),
            "time": time.time(),
        }
        return json.dumps(holder).encode()


def _alive(pid: int, started: str) -> bool:
    """Whether the process that began at `started` still runs under this number; if unknown, assume so."""
    if not started:
        return pid > 0
    return _start_time(pid) == started


def _start_time(pid: int) -> str:
    """Start of a process in clock ticks since boot; empty where there is none, or where /proc does not tell."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            stat = file.read().rpartition(")")[2].split()
        return "" if stat[0] == "Z" else stat[19]
    except OSError:
        return ""
