"""A run directory: `run.yaml`, `metrics.jsonl`, `samples/`, `checkpoints/`, `bundle/`, and at the end `result.json`."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from models import bundle as bundles
from models.errors import DataError
from models.system import System
from pipelines.config import RunConfig
from pipelines.storage import Store

RUN = "run.yaml"
METRICS = "metrics.jsonl"
RESULT = "result.json"
TRACKING = "mlflow-run-id"
BUNDLE = "bundle"


class RunDirectory:
    """What a run leaves behind, on a local disk or in a bucket."""

    def __init__(self, uri: str) -> None:
        self.store = Store(uri)
        self._rows: list[str] = []

    def config(self) -> RunConfig | None:
        """The stored configuration, or None where no run was begun here."""
        return RunConfig.from_yaml(self.store.read(RUN)) if self.store.exists(RUN) else None

    def result(self) -> dict[str, Any] | None:
        """What a finished run wrote last, or None."""
        return json.loads(self.store.read(RESULT)) if self.store.exists(RESULT) else None

    def write_config(self, config: RunConfig) -> None:
        self.store.write(RUN, config.to_yaml().encode())

    def write_result(self, result: dict[str, Any]) -> None:
        self.store.write(RESULT, json.dumps(result, indent=1).encode())

    def tracking_id(self) -> str | None:
        """Id of the MLflow run that an earlier attempt began, or None."""
        return self.store.read(TRACKING).decode() if self.store.exists(TRACKING) else None

    def write_tracking_id(self, run_id: str) -> None:
        self.store.write(TRACKING, run_id.encode())

    def write_sample(self, step: int, png: bytes) -> None:
        self.store.write(f"samples/step-{step:08d}.png", png)

    def resume_metrics(self, step: int) -> None:
        """Take up the metrics of an earlier attempt, without those of steps that will be done again."""
        self._rows = []
        if step and self.store.exists(METRICS):
            lines = self.store.read(METRICS).decode().splitlines()
            self._rows = [line for line in lines if _step(line) <= step]
        self.store.write(METRICS, "".join(line + "\n" for line in self._rows).encode())

    def add_metrics(self, row: dict[str, Any]) -> None:
        """Append a line; in a bucket it appears with the next `flush_metrics`."""
        line = json.dumps(row)
        self._rows.append(line)
        if self.store.is_local:
            with open(Path(self.store.uri, METRICS), "a") as file:
                file.write(line + "\n")

    def flush_metrics(self) -> None:
        if not self.store.is_local:
            self.store.write(METRICS, "".join(line + "\n" for line in self._rows).encode())

    def write_bundle(self, system: System, **about: Any) -> str:
        """Save a bundle (arguments as `save_bundle`) below `bundle/`; the digest of its weights."""
        if self.store.is_local:
            return bundles.save_bundle(Path(self.store.uri, BUNDLE), system, **about)
        with tempfile.TemporaryDirectory() as directory:
            digest = bundles.save_bundle(directory, system, **about)
            for name in bundles.FILES:
                self.store.upload_file(f"{BUNDLE}/{name}", Path(directory, name))
        return digest


def read_metrics(uri: str) -> list[dict[str, Any]]:
    """All lines of a run's `metrics.jsonl`; DataError where there is none."""
    store = Store(uri)
    if not store.exists(METRICS):
        raise DataError(f"{uri} holds no {METRICS}; a run directory was expected", code="E_NOT_FOUND")
    return [json.loads(line) for line in store.read(METRICS).decode().splitlines()]


def _step(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 2**62
