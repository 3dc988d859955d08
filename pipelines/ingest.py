"""From a source file to a row of a shard: check it, make it upright 8-bit RGB, write shards. Ray-free.

These functions are what the tasks of pipelines.prepare run; each takes and returns plain values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import cv2
import numpy as np

from models import codec
from models.errors import DataError, ImageError
from pipelines import shards
from pipelines.storage import Store

LIMITS = codec.Limits(formats=codec.ALL_FORMATS)
# One file in so many is encoded while it is checked, to know how large the shards will be.
_MEASURED = 8


@dataclass(frozen=True)
class Checked:
    """What the first pass found out about a file; `code` is "" for a good one, then the rest is set.

    `height`, `width` and `stored_bytes` are those of a row (of one half, for side-by-side); `stored_bytes` is 0 where
    it was not measured.
    """

    path: str
    code: str = ""
    reason: str = ""
    height: int = 0
    width: int = 0
    stored_bytes: int = 0
    digest: str = ""


@dataclass(frozen=True)
class ShardTask:
    """One shard to write: which rows, in which order; `half` is "", "left" or "right" for all of them."""

    domain: str
    split: str
    part: int
    keys: Sequence[str]
    paths: Sequence[str]
    half: str


def normalise(data: bytes, size: int | None = None, half: str = "") -> bytes:
    """What is stored of a file: its own encoding where it is an upright 8-bit JPEG or PNG, else a lossless PNG.

    Args:
        data: the file.
        size: shrink so that the shorter side has this many pixels; smaller images stay as they are.
        half: "left" or "right" of a side-by-side image.

    Raises:
        ImageError: the codes of models.codec.
    """
    info = codec.probe(data, LIMITS)
    shrinks = size is not None and min(info.height, info.width // (2 if half else 1)) > size
    if info.plain and info.format in ("jpeg", "png") and not half and not shrinks:
        return codec.strip(data)
    return codec.encode(_shape(codec.decode(data, LIMITS), size, half), "png")


def _shape(pixels: np.ndarray, size: int | None, half: str) -> np.ndarray:
    if half:
        width = pixels.shape[1]
        if width % 2:
            raise ImageError(f"a side-by-side image of odd width: {width} pixels", code="E_IMG_SIZE")
        pixels = pixels[:, : width // 2] if half == "left" else pixels[:, width // 2 :]
        if min(pixels.shape[:2]) < LIMITS.min_side:
            raise ImageError(
                f"too small: each half has {pixels.shape[1]} x {pixels.shape[0]} pixels; at least {LIMITS.min_side}",
                code="E_IMG_SIZE",
            )
    short = min(pixels.shape[:2])
    if size is not None and short > size:
        height, width = (max(size, round(side * size / short)) for side in pixels.shape[:2])
        pixels = codec.resize(pixels, (height, width))
    return pixels


def check_file(store: Store, path: str, size: int | None, doubles: bool) -> Checked:
    """Read and decode one file wholly; every fault of the file is told in the answer, none is raised.

    Raises:
        StorageError: the store does not answer.
        DataError: faults of the store as a whole (no such bucket, credentials).
    """
    try:
        data = store.read(path)
    except DataError as error:
        if error.code not in ("E_NOT_FOUND", "E_PERMISSION"):
            raise
        return Checked(path, error.code, error.message)
    digest = hashlib.blake2b(data, digest_size=16)
    try:
        half = "left" if doubles else ""
        info = codec.probe(data, LIMITS)
        pixels = _shape(codec.decode(data, LIMITS), size, half)
        stored = 0
        if (
            info.plain
            and info.format in ("jpeg", "png")
            and not doubles
            and pixels.shape[:2] == (info.height, info.width)
        ):
            stored = len(codec.strip(data))
        elif digest.digest()[0] % _MEASURED == 0:
            stored = len(codec.encode(pixels, "png"))
    except ImageError as error:
        return Checked(path, error.code, str(error))
    return Checked(path, "", "", pixels.shape[0], pixels.shape[1], stored, digest.hexdigest())


def check_files(uri: str, paths: Sequence[str], size: int | None, doubles: bool) -> list[dict[str, Any]]:
    """`check_file` for many; the fields of Checked."""
    cv2.setNumThreads(1)
    store = Store(uri)
    return [asdict(check_file(store, path, size, doubles)) for path in paths]


def write_shard(src: str, dest: str, task: Mapping[str, Any], size: int | None) -> dict[str, Any]:
    """Read the files of one shard again, write it unless it is there already, and describe it.

    Args:
        src: URI of the source.
        dest: URI of the dataset.
        task: the fields of a ShardTask.
        size: as for `normalise`.

    Returns:
        The fields of shards.ShardInfo, and `reused`.

    Raises:
        DataError: E_DATA_CHANGED, where a file is no longer what the first pass saw.
    """
    cv2.setNumThreads(1)
    source, target, shard = Store(src), Store(dest), ShardTask(**task)
    images = []
    for path in shard.paths:
        try:
            images.append(normalise(source.read(path), size, shard.half))
        except DataError as error:
            if not isinstance(error, ImageError) and error.code != "E_NOT_FOUND":
                raise
            raise DataError(
                f"{source.join(path)} changed while it was being prepared: {error.message}",
                code="E_DATA_CHANGED",
                hint="prepare again when nothing writes there",
            ) from error
    raw = shards.write_shard(shard.keys, images)
    sha256 = hashlib.sha256(raw).hexdigest()
    uri = shards.shard_path(shard.split, shard.domain, shard.part, sha256)
    reused = _holds(target, uri, raw)
    if not reused:
        target.write(uri, raw)
    return {
        "domain": shard.domain,
        "split": shard.split,
        "part": shard.part,
        "uri": uri,
        "rows": len(images),
        "bytes": len(raw),
        "sha256": sha256,
        "reused": reused,
    }


def _holds(store: Store, path: str, raw: bytes) -> bool:
    return store.exists(path) and store.read(path) == raw
