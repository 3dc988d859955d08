"""Images → shards, a Ray Data job: `i2i prepare photos/ s3://bucket/dataset --size 256`.

Two passes over the source. The first decodes every file and brings back facts only: splits, alignment and the size of
shards are known before anything is written. The second reads again and writes shards. `manifest.json` comes last, so a
run that was killed leaves no dataset that lies. The same input gives the same bytes; shards already there are kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from models import codec
from models.errors import ConfigError, DataError, ImageError
from pipelines import cluster, console, curate, ingest, shards
from pipelines import layout as layouts
from pipelines.layout import Sample
from pipelines.ray_tasks import run_tasks
from pipelines.storage import Store, absolute, split_name
from pipelines.version import code_version

_FILES_PER_TASK = 64
_MAX_TASKS = 4096
_SPLIT_ORDER = ("train", "val", "test")


@dataclass(frozen=True)
class PrepareResult:
    """What was prepared. `domains[name][split]` are counts; `skipped` counts files that are no images, by kind."""

    uri: str
    digest: str
    layout: str
    domains: dict[str, dict[str, int]]
    aligned: tuple[str, ...]
    quarantined: int
    report: str
    skipped: dict[str, int]
    shards: int
    reused: int
    warnings: tuple[str, ...]


def prepare(
    src: str,
    dest: str,
    *,
    layout: str = "auto",
    select: Mapping[str, str] | None = None,
    val: float = 0.05,
    test: float = 0.1,
    group: str | None = None,
    size: int | None = None,
    max_bad: float = 0.01,
    seed: int = 0,
    licence: str | None = None,
) -> PrepareResult:
    """Prepare the images below `src` as a dataset at `dest`.

    Args:
        src: folder or s3:// prefix, in one of the layouts of pipelines.layout.
        dest: where the dataset goes; one that was made from the same source is replaced.
        layout: auto, domains, paired or side-by-side.
        select: domain → file that lists, one a line, the keys to use in train and val.
        val: share of the images held out for validation, where no folder says which.
        test: the same for the test split.
        group: regular expression; keys with the same match (its first group, if it has one) stay in one split.
        size: shrink so that the shorter side has this many pixels; None keeps images as they are.
        max_bad: share of unusable files beyond which the job fails.
        seed: of the cut into splits.
        licence: recorded in the manifest.

    Raises:
        ConfigError: an option out of range.
        DataError: the source is missing, empty or not usable; too many files are broken (E_DATA_BAD).
        StorageError: a store does not answer.
    """
    _check_options(size, max_bad)
    source, target = _open_stores(src, dest)
    found = _read_layout(source, layout)
    samples = layouts.cut_splits(found.samples, found.given, val=val, test=test, seed=seed, group=group)
    keys = {domain: _read_keys(domain, uri) for domain, uri in (select or {}).items()}
    samples, warnings = layouts.select_keys(samples, keys)
    domains = sorted({sample.domain for sample in samples})
    curate.require_images(samples, domains, source.uri)

    cluster.connect()
    checked = _check_all(source, samples, size, doubles=found.kind == "side-by-side")
    good, bad = curate.separate(samples, checked, layouts.find_duplicate_keys(samples))
    report = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in bad)
    target.write(shards.REPORT, report.encode())
    _check_share(bad, len(checked), max_bad, target)
    if found.kind == "paired":
        good, dropped = curate.complete_pairs(good, samples, source.uri)
        warnings += [f"{dropped} usable images were left out, because a partner could not be used"] if dropped else []
    curate.require_images(good, domains, source.uri)
    lost = sorted(curate.aligned_splits(samples) - curate.aligned_splits(good))
    warnings += curate.check_content(good, checked, lost)

    rows = curate.rows_per_shard(good, checked)
    written = _write_all(source, target, curate.plan_shards(good, rows), size)
    options = {"layout": found.kind, "select": dict(select or {}), "val": val, "test": test, "group": group}
    manifest, index = _describe(
        good,
        written,
        rows_per_shard=rows,
        size=curate.common_size(good, checked),
        provenance={"source": source.uri, "options": options | {"size": size, "max_bad": max_bad, "seed": seed}},
        licence=licence,
    )
    _commit(target, manifest, index)
    for warning in warnings:
        console.warn(warning)
    return PrepareResult(
        uri=target.uri,
        digest=manifest.digest,
        layout=found.kind,
        domains={name: {split: manifest.count(name, split) for split in manifest.splits} for name in manifest.domains},
        aligned=tuple(split for split in manifest.splits if manifest.aligned(manifest.domains, split)),
        quarantined=len(bad),
        report=target.join(shards.REPORT),
        skipped=dict(found.skipped),
        shards=len(written),
        reused=sum(bool(row["reused"]) for row in written),
        warnings=tuple(warnings),
    )


def _check_options(size: int | None, max_bad: float) -> None:
    if size is not None and not ingest.LIMITS.min_side <= size <= 8192:
        raise ConfigError(f"--size is out of range: {size}; allowed: {ingest.LIMITS.min_side} to 8192 pixels")
    if not 0 <= max_bad <= 1:
        raise ConfigError(f"--max-bad is a share of the images: {max_bad}; allowed: 0 to 1")


def _open_stores(src: str, dest: str) -> tuple[Store, Store]:
    """Both stores, with absolute paths (tasks run in other directories), if the destination may be written."""
    source, target = Store(absolute(src)), Store(absolute(dest))
    for outer, inner in ((source.uri, target.uri), (target.uri, source.uri)):
        if f"{inner}/".startswith(f"{outer}/"):
            raise ConfigError(f"source and destination overlap: {source.uri}, {target.uri}; use another destination")
    if source.is_local and not os.path.isdir(source.uri):
        what = "is not a folder" if os.path.exists(source.uri) else "does not exist"
        raise DataError(f"the source {source.uri} {what}", code="E_DATA_EMPTY", hint="check the path")
    if target.exists(shards.MANIFEST):
        _check_ours(target, source)
    return source, target


def _check_ours(target: Store, source: Store) -> None:
    """Only a dataset of the same source may be replaced, and no other program's files."""
    hint = "use another destination or delete it"
    try:
        former = shards.Manifest.from_json(target.read(shards.MANIFEST)).provenance.get("source")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{target.uri} holds a {shards.MANIFEST} that is not of ours", hint=hint) from None
    if former != source.uri:
        raise ConfigError(f"{target.uri} already holds a dataset prepared from {former or 'elsewhere'}", hint=hint)


def _read_layout(source: Store, kind: str) -> layouts.Layout:
    def is_double(paths: Sequence[str]) -> bool:
        infos = []
        for path in paths:
            # A broken file says nothing about the layout; it is quarantined later.
            with contextlib.suppress(ImageError):
                infos.append(codec.probe(source.read(path), ingest.LIMITS))
        return bool(infos) and all(info.width == 2 * info.height for info in infos)

    return layouts.read_layout(source, kind, is_double)


def _read_keys(domain: str, uri: str) -> frozenset[str]:
    folder, name = split_name(uri)
    try:
        text = Store(folder).read(name).decode()
    except UnicodeDecodeError as error:
        raise DataError(f"--select {domain}={uri}: not a text file (UTF-8)") from error
    except DataError as error:
        raise DataError(f"--select {domain}={uri}: {error.message}", code=error.code, hint=error.hint) from error
    keys = frozenset(line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#"))
    if not keys:
        raise DataError(f"--select {domain}={uri}: the file lists no keys; one a line is expected", code="E_DATA_EMPTY")
    return keys


def _check_all(source: Store, samples: Sequence[Sample], size: int | None, doubles: bool) -> dict[str, ingest.Checked]:
    """The first pass: facts of every file, by path."""
    paths = sorted({sample.path for sample in samples})
    step = max(_FILES_PER_TASK, -(-len(paths) // _MAX_TASKS))
    tasks = [
        {"uri": source.uri, "paths": paths[first : first + step], "size": size, "doubles": doubles}
        for first in range(0, len(paths), step)
    ]
    checked: dict[str, ingest.Checked] = {}
    bad = 0
    progress = console.Progress("checking images", len(paths))
    for rows in run_tasks(ingest.check_files, tasks):
        for row in rows:
            checked[row["path"]] = ingest.Checked(**row)
            bad += bool(row["code"])
        if (
            len(checked) > len(paths) // 20
        ):  # the first tasks wait for workers to start, and tell nothing about the rest
            progress.update(len(checked), f"{bad} unusable" if bad else "", force=len(checked) == len(paths))
    progress.close()
    return checked


def _check_share(bad: Sequence[Mapping[str, Any]], files: int, max_bad: float, target: Store) -> None:
    if len(bad) <= max_bad * files + 1e-9:  # 0.07 × 100 is a little less than 7
        if bad:
            console.warn(f"{len(bad)} of {files} images could not be used: {target.join(shards.REPORT)}")
        return
    kinds = Counter(row["code"] for row in bad).most_common(3)
    raise DataError(
        f"{len(bad)} of {files} images ({100 * len(bad) / files:.2g} %) could not be used, more than --max-bad "
        f"{max_bad:g}: {', '.join(f'{count} {code}' for code, count in kinds)}, as {bad[0]['path']} "
        f"({bad[0]['reason']})",
        code="E_DATA_BAD",
        hint=f"all are listed in {target.join(shards.REPORT)}; mend them, or allow more with --max-bad",
    )


def _write_all(
    source: Store, target: Store, tasks: Sequence[ingest.ShardTask], size: int | None
) -> list[dict[str, Any]]:
    """The second pass: every shard written, and described."""
    rows = sum(len(task.keys) for task in tasks)
    progress = console.Progress("writing shards", rows)
    written: list[dict[str, Any]] = []
    wanted = [{"src": source.uri, "dest": target.uri, "task": asdict(task), "size": size} for task in tasks]
    done = 0
    for row in run_tasks(ingest.write_shard, wanted):
        written.append(row)
        done += row["rows"]
        progress.update(done, f"{len(written)}/{len(tasks)} shards", force=done == rows)
    progress.close()
    return written


def _describe(
    good: Sequence[Sample], written: Sequence[Mapping[str, Any]], *, provenance: Mapping[str, Any], **facts: Any
) -> tuple[shards.Manifest, bytes]:
    """Manifest and index of what was written."""
    infos = [shards.ShardInfo(**{name: value for name, value in row.items() if name != "reused"}) for row in written]
    index = shards.write_index(infos)
    domains = tuple(sorted({sample.domain for sample in good}))
    keys: dict[tuple[str, str], list[str]] = {}
    for sample in good:
        keys.setdefault((sample.split, sample.domain), []).append(sample.key)
    splits = {}
    for split in (name for name in _SPLIT_ORDER if any(found == name for found, _ in keys)):
        splits[split] = {}
        for domain in domains:
            ordered = sorted(keys.get((split, domain), ()), key=lambda key: (shards.key_order(key), key))
            splits[split][domain] = {
                "count": len(ordered),
                "shards": sum(info.split == split and info.domain == domain for info in infos),
                "keys_sha256": shards.keys_digest(ordered),
            }
    made = {"code_version": code_version(), "prepared_at": datetime.now(UTC).isoformat(timespec="seconds")}
    manifest = shards.Manifest(
        domains=domains,
        splits=splits,
        index_sha256=hashlib.sha256(index).hexdigest(),
        provenance={**provenance, **made},
        **facts,
    )
    return manifest, index


def _commit(target: Store, manifest: shards.Manifest, index: bytes) -> None:
    """Write the index, then the manifest; only then remove the shards that the former index names."""
    former = _former_shards(target)
    target.write(shards.INDEX, index)
    target.write(shards.MANIFEST, manifest.to_json().encode())
    unused = former - {info.uri for info in shards.read_index(index)}
    for path, _ in target.list("shards"):
        if path in unused:
            target.delete(path)


def _former_shards(target: Store) -> set[str]:
    """What our own dataset at the destination consists of; nothing where there is none, or its index is damaged."""
    if not target.exists(shards.MANIFEST):
        return set()
    try:
        return {info.uri for info in shards.read_index(target.read(shards.INDEX))}
    except (DataError, pa.ArrowException, TypeError):
        return set()
