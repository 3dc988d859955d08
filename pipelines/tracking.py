"""MLflow, kept at arm's length: tracking never stalls training and never ends it.

Everything is handed to a background thread through a bounded spool. The thread retries with backoff while the store is
away; the first failure is one warning, and the numbers are in the run's `metrics.jsonl` anyway. This is the only module
that logs to MLflow; where to is in `pipelines.mlflow_env`.
"""

from __future__ import annotations

import math
import re
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

from pipelines import console
from pipelines.mlflow_env import brief, client, experiment_id, shown, tracking_uri

EXPERIMENT = "i2i"

_MAX_METRICS, _MAX_PARAMS, _MAX_VALUE = 900, 90, 500  # of one request; MLflow refuses more
_FLUSH_EVERY_S = 1.0
_REFUSED = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST", "PERMISSION_DENIED"}
_SECRET_KEY = re.compile(r"secret|token|password|passwd|credential|access[_-]?key|api[_-]?key", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"AKIA[0-9A-Z]{16}|eyJ[\w-]{10,}\.[\w-]+\.|-----BEGIN ")

_warned: set[str] = set()
_warned_lock = threading.Lock()


def redact(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested values → flat strings (`train.steps`), with whatever looks like a secret replaced."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(redact(value, f"{name}."))
            continue
        text = shown(str(value))
        hidden = _SECRET_KEY.search(str(key)) or _SECRET_VALUE.search(text)
        flat[re.sub(r"[^\w./ :-]", "_", name)[:250]] = "[redacted]" if hidden else text[:_MAX_VALUE]
    return flat


@dataclass(frozen=True)
class _Record:
    kind: str  # metric | params | artifact | tags
    payload: Any


class Tracker:
    """One MLflow run, written in the background.

    Use as a context manager: leaving with an exception marks the run FAILED.

    Args:
        experiment: its name; made if new.
        run_name: shown in MLflow.
        tags: of the run.
        parent: the run this one is a child of, or its id.
        uri: tracking URI; None takes `tracking_uri()` of this process.
        run_id: continue this run instead of making one (a resumed training).
        spool: how many records wait at most while the store is away; newer metrics beyond it are dropped.
    """

    def __init__(
        self,
        experiment: str,
        run_name: str,
        tags: Mapping[str, Any] | None = None,
        parent: str | Tracker | None = None,
        *,
        uri: str | None = None,
        run_id: str | None = None,
        spool: int = 20_000,
    ) -> None:
        self.uri = uri or tracking_uri()
        self._experiment, self._run_name = experiment, run_name
        self._tags, self._parent = redact(tags or {}), parent
        self._run_id = run_id
        self._continue = run_id is not None
        self._limit = spool
        self._spool: deque[_Record] = deque()
        self._wake = threading.Condition()
        self._ready = threading.Event()
        self._status: str | None = None
        self._failing = False
        self._client: Any = None
        self._thread: threading.Thread | None = None
        if self.uri is not None:
            self._thread = threading.Thread(target=self._work, name="i2i-tracking", daemon=True)
            self._thread.start()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close("FINISHED" if kind is None else "FAILED")

    def run_id(self, timeout_s: float = 30.0) -> str | None:
        """The MLflow run id; waits for the run to be made. None where the store does not answer, or tracking is off."""
        end = time.monotonic() + timeout_s
        while self._thread is not None and time.monotonic() < end and not self._failing:
            if self._ready.wait(0.05):
                return self._run_id
        return self._run_id if self._ready.is_set() else None

    def params(self, values: Mapping[str, Any]) -> None:
        """Log parameters once; nested mappings become dotted names, secrets are redacted."""
        self._put(_Record("params", redact(values)))

    def metrics(self, values: Mapping[str, Any], step: int = 0) -> None:
        """Log the numbers among `values` at `step`; anything that is not a finite number is left out."""
        now = int(time.time() * 1000)
        for key, value in values.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                self._put(_Record("metric", (key, float(value), now, step)))

    def tags(self, values: Mapping[str, Any]) -> None:
        """Set tags of the run."""
        self._put(_Record("tags", redact(values)))

    def artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Upload a local file, or every file of a directory, below `folder` of the run's artifacts."""
        self._put(_Record("artifact", (str(path), folder)))

    def close(self, status: str = "FINISHED", flush_s: float = 20.0) -> None:
        """Send what is left and end the run as FINISHED, FAILED or KILLED; gives up after `flush_s`."""
        with self._wake:
            if self._status is not None:
                return
            self._status = status
            self._wake.notify()
        if self._thread is not None:
            self._thread.join(min(flush_s, 3.0) if self._failing else flush_s)
            if self._thread.is_alive():
                self._warn(TimeoutError(f"no answer within {flush_s:.0f} s"))

    def _put(self, record: _Record) -> None:
        if self._thread is None:
            return
        with self._wake:
            if self._status is None and (len(self._spool) < self._limit or record.kind != "metric"):
                self._spool.append(record)
                self._wake.notify()

    def _work(self) -> None:
        """Send the spool until closed and empty; after a failure, wait 1, 2, 4 … 30 s and try again."""
        wait_s = 1.0
        while True:
            try:
                if not self._ready.is_set():
                    self._open()
                self._flush()
                self._failing, wait_s = False, 1.0
            except Exception as error:  # noqa: BLE001  whatever the client raises, training goes on
                self._failing = True
                self._warn(error)
                if self._status is not None:
                    return
                self._sleep(wait_s)
                wait_s = min(wait_s * 2, 30.0)
                continue
            with self._wake:
                self._wake.wait_for(lambda: self._spool or self._status is not None)
                if not self._spool:
                    break
            self._sleep(_FLUSH_EVERY_S)  # gathers records into one request
        try:
            self._client.set_terminated(self._run_id, self._status)
        except Exception as error:  # noqa: BLE001
            self._warn(error)

    def _sleep(self, seconds: float) -> None:
        """Wait, but not when closing."""
        with self._wake:
            self._wake.wait_for(lambda: self._status is not None, seconds)

    def _open(self) -> None:
        assert self.uri is not None
        self._client = client(self.uri)
        if self._continue:
            try:
                self._client.update_run(self._run_id, status="RUNNING")
                self._ready.set()
                return
            except Exception as error:
                if getattr(error, "error_code", "") != "RESOURCE_DOES_NOT_EXIST":
                    raise
                self._run_id, self._continue = None, False
        experiment = experiment_id(self._client, self._experiment, self.uri)
        parent = self._parent.run_id() if isinstance(self._parent, Tracker) else self._parent
        tags = self._tags | ({"mlflow.parentRunId": parent} if parent else {})
        run = self._client.create_run(experiment, tags=tags, run_name=self._run_name)
        self._run_id = run.info.run_id
        self._ready.set()

    def _flush(self) -> None:
        """Send every waiting record; one leaves the spool only after it was accepted, or refused for good."""
        while self._spool:
            head = self._spool[0]
            group = [head]
            if head.kind == "metric":
                with self._wake:
                    group = list(takewhile(lambda r: r.kind == "metric", islice(self._spool, _MAX_METRICS)))
            try:
                self._send(head.kind, [r.payload for r in group])
            except Exception as error:
                if getattr(error, "error_code", "") not in _REFUSED and not isinstance(error, FileNotFoundError):
                    raise
                self._warn(error)
            for _ in group:
                self._spool.popleft()

    def _send(self, kind: str, payloads: list[Any]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        if kind == "metric":
            self._client.log_batch(self._run_id, metrics=[Metric(*payload) for payload in payloads])
        elif kind == "params":
            items = list(payloads[0].items())
            for start in range(0, len(items), _MAX_PARAMS):
                self._client.log_batch(
                    self._run_id, params=[Param(k, v) for k, v in items[start : start + _MAX_PARAMS]]
                )
        elif kind == "tags":
            self._client.log_batch(self._run_id, tags=[RunTag(k, v) for k, v in payloads[0].items()])
        else:
            path, folder = payloads[0]
            upload = self._client.log_artifacts if Path(path).is_dir() else self._client.log_artifact
            upload(self._run_id, path, folder)

    def _warn(self, error: BaseException) -> None:
        """One warning for a process and a store, however often it fails."""
        assert self.uri is not None
        with _warned_lock:
            if self.uri in _warned:
                return
            _warned.add(self.uri)
        console.warn(
            f"MLflow at {shown(self.uri)} did not take what was logged ({brief(error)}); "
            "the work goes on, and its numbers are in metrics.jsonl"
        )
