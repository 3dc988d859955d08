"""A whole folder or prefix of images through a bundle, by Ray Data.

    i2i translate runs/demo/bundle photos s3://bucket/drawings --to drawing

Names are kept. What fails is listed in `translate_report.jsonl` beside the results, and stops nothing else.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from models.bundle import read_config
from models.errors import ConfigError, DataError, I2IError, StorageError
from models.system import Condition
from models.translator import check_condition
from pipelines.bundle_uri import local_bundle
from pipelines.console import Progress, say
from pipelines.storage import Store, absolute

REPORT = "translate_report.jsonl"
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_EXTENSIONS = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
_BLOCK = 16


@dataclass(frozen=True)
class TranslateResult:
    """What became of a prefix.

    Attributes:
        done: images translated now.
        skipped: images whose result was there already (`resume`).
        failed: images listed in the report.
        report: URI of the report, written anew by each run.
        seconds: of wall clock.
    """

    done: int
    skipped: int
    failed: int
    report: str
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def translate(
    bundle_uri: str,
    src: str,
    dest: str,
    condition: Condition = Condition(),
    workers: int = 1,
    resume: bool = False,
    *,
    format: str = "png",
    gpu: bool = False,
    precision: str = "fp32",
    threads: int | None = None,
) -> TranslateResult:
    """Translate every image below `src` to `dest`, under the same relative path with the extension of `format`.

    Args:
        condition: what is wanted of the model; a `reference` is not possible here.
        workers: processes, each with the model loaded.
        gpu: give each worker a GPU.
        resume: leave alone what is in `dest` already.
        threads: of each worker; by default the cores are shared out.

    Raises:
        ConfigError, BundleError, RequestError, DataError: the caller's mistakes, before anything is translated.
        StorageError: every image failed because the stores do not answer.
        I2IError: E_WORKER: workers do not start, or die again and again; what was done stays.
    """
    began = time.monotonic()
    if format not in _EXTENSIONS:
        raise ConfigError(f"unknown format '{format}'", hint=f"one of {', '.join(_EXTENSIONS)}")
    if workers < 1:
        raise ConfigError(f"workers={workers}: at least 1")
    _check(bundle_uri, condition)
    source, target = Store(absolute(src)), Store(absolute(dest))
    pairs = _plan(source, target, _EXTENSIONS[format])
    there = {path for path, _ in target.list()} if resume else set()
    todo = [(path, result) for path, result in pairs if result not in there]
    report = _Report(target)
    if todo:
        job = {
            "bundle": absolute(bundle_uri),
            "source": source.uri,
            "target": target.uri,
            "condition": _plain(condition),
            "format": format,
            "device": "cuda" if gpu else "cpu",
            "precision": precision,
            "threads": threads or max(1, (os.cpu_count() or 1) // workers),
        }
        _run(job, todo, workers, report, already=len(pairs) - len(todo))
    report.close()
    if report.failures and not report.done and report.codes <= {"E_STORAGE", "E_S3", "E_PERMISSION"}:
        first = report.failures[0]
        raise StorageError(f"no image could be translated: {first['error']}", code=first["code"])
    return TranslateResult(
        report.done, len(pairs) - len(todo), len(report.failures), report.uri, time.monotonic() - began
    )


class _Report:
    """Counts, and the failures as JSON lines in the destination."""

    def __init__(self, target: Store) -> None:
        self._target, self.uri = target, target.join(REPORT)
        self.done, self.failures = 0, []
        self.codes: set[str] = set()

    def add(self, row: dict[str, Any]) -> None:
        if not row["error"]:
            self.done += 1
            return
        self.failures.append({"path": row["path"], "code": row["code"], "error": row["error"]})
        self.codes.add(row["code"])

    def close(self) -> None:
        lines = [json.dumps(failure) + "\n" for failure in sorted(self.failures, key=lambda f: f["path"])]
        self._target.write(REPORT, "".join(lines).encode())


def _check(bundle_uri: str, condition: Condition) -> None:
    if condition.reference is not None:
        raise ConfigError("a reference image cannot be given for a whole prefix", hint="give a seed")
    document = read_config(local_bundle(bundle_uri))
    check_condition(document["conditioning"], condition)
    _check_direction(document, condition)


def _check_direction(document: dict[str, Any], condition: Condition) -> None:
    """As `System.direction`, without building the system."""
    offered = [(d["source"], d["to"]) for d in document["conditioning"]["directions"]]
    for source, to in offered:
        if condition.to in (None, to) and condition.source in (None, source):
            return
    wanted = f"{condition.source or 'any'} to {condition.to or 'any'}"
    listed = ", ".join(f"{source} to {to}" for source, to in offered)
    raise ConfigError(f"this model does not translate {wanted}", code="E_DOMAIN", hint=f"it offers {listed}")


def _plan(source: Store, target: Store, extension: str) -> list[tuple[str, str]]:
    """(path below the source, path below the destination) of every image."""
    inside = f"{target.uri}/".startswith(f"{source.uri}/")
    if inside:
        raise ConfigError(f"the destination lies inside the source: {target.uri}", hint="choose another place")
    pairs = []
    for path, _ in source.list():
        hidden = any(part.startswith(".") for part in path.split("/"))
        if path.lower().endswith(_SUFFIXES) and not hidden:
            pairs.append((path, os.path.splitext(path)[0] + extension))
    if not pairs:
        raise DataError(f"no images below {source.uri}", code="E_DATA_EMPTY", hint=f"looked for {', '.join(_SUFFIXES)}")
    seen: dict[str, str] = {}
    for path, result in pairs:
        if result in seen:
            message = f"two images would get one name: {seen[result]} and {path}"
            raise DataError(message, code="E_DATA_NAMES", hint="rename one of them")
        seen[result] = path
    return pairs


def _run(job: dict[str, Any], todo: list[tuple[str, str]], workers: int, report: _Report, already: int) -> None:
    import ray

    from pipelines.cluster import connect

    connect()
    if job["device"] == "cuda":
        check_gpus(ray.cluster_resources(), workers)
    progress = Progress("translate", len(todo) + already, already)
    for row in _in_one_line(_rows(_dataset(job, todo, workers)), len(todo), report):
        report.add(row)
        finished = report.done + len(report.failures)
        detail = f"{len(report.failures)} failed" if report.failures else ""
        progress.update(already + finished, detail, force=finished == len(todo))
    progress.close()
    if report.failures:
        say(f"{len(report.failures)} of {len(todo)} images failed: see {report.uri}")


def check_gpus(have: Mapping[str, float], workers: int) -> None:
    """Ray would wait for missing GPUs for ever.

    Raises:
        ConfigError: `have`, the cluster's resources, holds fewer GPUs than one a worker.
    """
    if have.get("GPU", 0) < workers:
        raise ConfigError(
            f"{workers} workers need {workers} GPUs, the cluster has {have.get('GPU', 0):.0f}",
            hint="lower --workers, or translate with --cpu",
        )


def _dataset(job: dict[str, Any], todo: list[tuple[str, str]], workers: int) -> Any:
    import ray.data

    rows = [{"path": path, "result": result} for path, result in todo]
    # Enough blocks for all workers, and no more images behind one slow one than need be.
    blocks = max(1, min(len(rows), max(workers, -(-len(rows) // _BLOCK))))
    with warnings.catch_warnings():
        # The two limits have no other way in yet; without them an image that kills its worker is tried for ever.
        warnings.simplefilter("ignore")
        return ray.data.from_items(rows, override_num_blocks=blocks).map_batches(
            _Worker,
            fn_constructor_kwargs={"job": job},
            batch_size=_BLOCK,
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=0.5,
            num_gpus=1 if job["device"] == "cuda" else None,
            max_restarts=2,
            max_task_retries=2,
        )


def _in_one_line(rows: Iterator[dict[str, Any]], total: int, report: _Report) -> Iterator[dict[str, Any]]:
    """The rows; where Ray gives up, because workers do not start or die, the report is written and one error raised."""
    from ray.exceptions import RayError

    # Ray Data would print its own stack first.
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield from rows
    except RayError as error:
        report.close()
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        cause = next((line for line in reversed(lines) if "Error: " in line), type(error).__name__)
        cause = re.sub(r"^[\w.]+\.(\w+): ", r"\1: ", cause)
        left = total - report.done - len(report.failures)
        raise I2IError(
            f"translating workers do not start, or die: {cause[:300]}; "
            f"{report.done} images done, {len(report.failures)} failed, {left} left out",
            code="E_WORKER",
            hint="an image may crash its decoder, or memory may be short; --resume goes on with what is left",
        ) from error
    finally:
        logger.setLevel(level)


def _rows(dataset: Any) -> Iterator[dict[str, Any]]:
    for batch in dataset.iter_batches(batch_size=None, prefetch_batches=0):
        names = list(batch)
        for values in zip(*(batch[name] for name in names), strict=True):
            yield {name: str(value) for name, value in zip(names, values, strict=True)}


class _Worker:
    """One process with the model loaded; answers `path`, `error` and `code` for each image."""

    def __init__(self, job: dict[str, Any]) -> None:
        import torch

        from models.bundle import load_bundle
        from models.translator import Translator

        torch.set_num_threads(job["threads"])
        bundle = load_bundle(local_bundle(job["bundle"]), job["device"])
        self.translator = Translator(bundle, job["device"], job["precision"])
        self.source, self.target = Store(job["source"]), Store(job["target"])
        self.condition, self.format = Condition(**job["condition"]), job["format"]

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """Translate the images of a batch, one by one."""
        out: dict[str, list[str]] = {"path": [], "error": [], "code": []}
        for path, result in zip(batch["path"], batch["result"], strict=True):
            error, code = self._one(str(path), str(result))
            out["path"].append(str(path))
            out["error"].append(error)
            out["code"].append(code)
        return out

    def _one(self, path: str, result: str) -> tuple[str, str]:
        try:
            data, _ = self.translator.image_bytes(self.source.read(path), self.condition, self.format)
            self.target.write(result, data)
        except I2IError as error:
            return str(error), error.code
        except (RuntimeError, MemoryError) as error:
            # Out of memory at one huge image must not end the rest.
            return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}", "E_INTERNAL"
        return "", ""


def _plain(condition: Condition) -> dict[str, Any]:
    return {
        "to": condition.to,
        "source": condition.source,
        "attributes": dict(condition.attributes) if condition.attributes else None,
        "seed": condition.seed,
        "strength": condition.strength,
    }
