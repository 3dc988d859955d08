"""What a prepared dataset holds: `i2i inspect s3://bucket/dataset --verify --sheet sheet.png`. Needs no Ray."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from models import codec
from models.errors import DataError, ImageError
from pipelines import console, ingest, shards
from pipelines.storage import Store, split_name

_TILE = 96
_COLUMNS = 10
_GAP = 4
_CAPTION = 18
_SAMPLED = 64


def inspect_dataset(uri: str, verify: bool = False, sheet: str | None = None) -> dict[str, Any]:
    """Describe a dataset as plain values (JSON).

    Args:
        uri: a directory or s3:// prefix that `i2i prepare` wrote.
        verify: read every shard; check digest, rows, order of keys, and decode every image.
        sheet: write a contact sheet (PNG) there: a row of images for each domain and split; aligned ones in columns.

    Returns:
        uri, digest, domains, rows_per_shard, size, image, licence, provenance;
        `splits`: split → domain → count, shards, bytes;
        `aligned`: split → pairs of domains with the same keys; `sizes`: domain → the image sizes of a few samples;
        `quarantined`; `verified_shards` and `verified_images` (0 without `verify`); `sheet`.

    Raises:
        DataError: the codes of shards.open_dataset; E_SHARD_*, where a shard is not what the index says.
    """
    dataset = shards.open_dataset(uri)
    manifest = dataset.manifest
    verified = _verify(dataset) if verify else (0, 0)
    if sheet is not None:
        _write(sheet, contact_sheet(dataset))
    splits: dict[str, dict[str, dict[str, int]]] = {}
    for split in manifest.splits:
        splits[split] = {}
        for domain in manifest.domains:
            found = dataset.shards(domain, split)
            size = sum(shard.bytes for shard in found)
            splits[split][domain] = {
                "count": manifest.count(domain, split),
                "shards": len(found),
                "bytes": size,
            }
    return {
        "uri": dataset.uri,
        "digest": manifest.digest,
        "domains": list(manifest.domains),
        "rows_per_shard": manifest.rows_per_shard,
        "size": list(manifest.size) if manifest.size else None,
        "image": manifest.image,
        "licence": manifest.licence,
        "provenance": manifest.provenance,
        "splits": splits,
        "aligned": {
            split: [list(pair) for pair in itertools.combinations(manifest.domains, 2) if manifest.aligned(pair, split)]
            for split in manifest.splits
        },
        "sizes": {domain: _sizes(dataset, domain) for domain in manifest.domains},
        "quarantined": _quarantined(dataset),
        "verified_shards": verified[0],
        "verified_images": verified[1],
        "sheet": sheet,
    }


def _first_rows(dataset: shards.Dataset, domain: str, split: str, count: int) -> list[tuple[str, bytes]]:
    """The first rows of a domain in stored order."""
    rows: list[tuple[str, bytes]] = []
    for shard in dataset.shards(domain, split):
        table = shards.read_shard(dataset.fetch(shard)).slice(0, count - len(rows))
        rows += zip(table["key"].to_pylist(), table["image"].to_pylist(), strict=True)
        if len(rows) >= count:
            break
    return rows


def _sizes(dataset: shards.Dataset, domain: str) -> dict[str, Any]:
    infos = [codec.probe(image, ingest.LIMITS) for _, image in _first_rows(dataset, domain, "train", _SAMPLED)]
    if not infos:
        return {}
    sides = sorted((info.height, info.width) for info in infos)
    return {
        "sampled": len(infos),
        "smallest": list(sides[0]),
        "median": list(sides[len(sides) // 2]),
        "largest": list(sides[-1]),
        "formats": sorted({info.format for info in infos}),
    }


def _quarantined(dataset: shards.Dataset) -> int:
    try:
        return len(Store(dataset.uri).read(shards.REPORT).splitlines())
    except DataError as error:
        if error.code != "E_NOT_FOUND":
            raise
        return 0


def _verify(dataset: shards.Dataset) -> tuple[int, int]:
    """Number of shards and images checked.

    Raises:
        DataError: E_SHARD_MISSING, E_SHARD_DIGEST, E_SHARD_ROWS, E_SHARD_IMAGE, for the first fault found.
    """
    shard_count, image_count = 0, 0
    progress = console.Progress("verifying shards", len(dataset.index))
    for split in dataset.manifest.splits:
        for domain in dataset.manifest.domains:
            keys: list[str] = []
            for shard in dataset.shards(domain, split):
                table = shards.read_shard(dataset.fetch(shard))
                if table.num_rows != shard.rows:
                    raise _fault(dataset, shard, "E_SHARD_ROWS", f"{table.num_rows} rows; the index says {shard.rows}")
                keys += table["key"].to_pylist()
                _decode_all(dataset, shard, table)
                shard_count, image_count = shard_count + 1, image_count + table.num_rows
                progress.update(shard_count, force=shard_count == len(dataset.index))
            entry = dataset.manifest.splits[split].get(domain, {"count": 0, "keys_sha256": shards.keys_digest(())})
            if len(keys) != entry["count"] or shards.keys_digest(keys) != entry["keys_sha256"]:
                raise DataError(
                    f"{dataset.uri}: the keys of '{domain}' in {split} are not those of the manifest "
                    f"({len(keys)} keys; {entry['count']} expected)",
                    code="E_SHARD_ROWS",
                    hint="run `i2i prepare` again",
                )
    progress.close()
    return shard_count, image_count


def _decode_all(dataset: shards.Dataset, shard: shards.ShardInfo, table: Any) -> None:
    for row, (key, image) in enumerate(zip(table["key"].to_pylist(), table["image"].to_pylist(), strict=True)):
        try:
            codec.decode(image, ingest.LIMITS)
        except ImageError as error:
            what = f"row {row} ('{key}') is not a usable image: {error.message}"
            raise _fault(dataset, shard, "E_SHARD_IMAGE", what) from error


def _fault(dataset: shards.Dataset, shard: shards.ShardInfo, code: str, what: str) -> DataError:
    return DataError(f"{dataset.uri}/{shard.uri}: {what}", code=code, hint="run `i2i prepare` again")


def contact_sheet(dataset: shards.Dataset) -> np.ndarray:
    """The first images of each domain and split as one uint8 RGB array, captioned."""
    strips = []
    for split in dataset.manifest.splits:
        for domain in dataset.manifest.domains:
            rows = _first_rows(dataset, domain, split, _COLUMNS)
            caption = f"{split} / {domain}: {dataset.manifest.count(domain, split):,}"
            strips.append(_strip(caption, [codec.decode(image, ingest.LIMITS) for _, image in rows]))
    return np.concatenate(strips)


def _strip(caption: str, images: Sequence[np.ndarray]) -> np.ndarray:
    width = _GAP + _COLUMNS * (_TILE + _GAP)
    strip = np.full((_CAPTION + _TILE + _GAP, width, 3), 255, np.uint8)
    text = caption.encode("ascii", "replace").decode()  # OpenCV's built-in font knows no other letters
    cv2.putText(strip, text, (_GAP, _CAPTION - 5), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (60, 60, 60), 1, cv2.LINE_AA)
    for column, image in enumerate(images):
        scale = _TILE / max(image.shape[:2])
        small = codec.resize(image, (max(1, round(image.shape[0] * scale)), max(1, round(image.shape[1] * scale))))
        top = _CAPTION + (_TILE - small.shape[0]) // 2
        left = _GAP + column * (_TILE + _GAP) + (_TILE - small.shape[1]) // 2
        strip[top : top + small.shape[0], left : left + small.shape[1]] = small
    return strip


def _write(uri: str, pixels: np.ndarray) -> None:
    folder, name = split_name(uri)
    Store(folder).write(name, codec.encode(pixels, "png"))
