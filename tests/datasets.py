"""Small prepared datasets, written directly as shards."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from models.codec import encode
from pipelines import shards
from pipelines.storage import Store


def tinted(domain: str, key: str, size: int = 32) -> np.ndarray:
    """An image that tells its domain and key: uint8 `(size, size, 3)`."""
    digest = hashlib.sha256(f"{domain}/{key}".encode()).digest()
    image = np.zeros((size, size, 3), np.uint8)
    image[:] = np.frombuffer(digest[:3], np.uint8)
    image[: size // 2, : size // 2] = np.frombuffer(digest[3:6], np.uint8)
    return image


def write_dataset(
    uri: str | Path, splits: dict[str, dict[str, list[str]]], *, rows_per_shard: int = 10, size: int = 32
) -> shards.Dataset:
    """Write `splits[split][domain]` = keys as a dataset of `tinted` images, and open it."""
    store = Store(str(uri))
    infos, counts = [], {}
    for split, domains in splits.items():
        counts[split] = {}
        for domain, keys in domains.items():
            ordered = sorted(keys, key=shards.key_order)
            pieces = [ordered[i : i + rows_per_shard] for i in range(0, len(ordered), rows_per_shard)]
            for part, piece in enumerate(pieces):
                data = shards.write_shard(piece, [encode(tinted(domain, key, size)) for key in piece])
                sha256 = hashlib.sha256(data).hexdigest()
                path = shards.shard_path(split, domain, part, sha256)
                store.write(path, data)
                infos.append(shards.ShardInfo(domain, split, part, path, len(piece), len(data), sha256))
            digest = shards.keys_digest(ordered)
            counts[split][domain] = {"count": len(keys), "shards": len(pieces), "keys_sha256": digest}
    index = shards.write_index(infos)
    store.write(shards.INDEX, index)
    names = tuple(dict.fromkeys(domain for domains in splits.values() for domain in domains))
    digest = hashlib.sha256(index).hexdigest()
    manifest = shards.Manifest(rows_per_shard, names, counts, digest, size=(size, size))
    store.write(shards.MANIFEST, manifest.to_json().encode())
    return shards.open_dataset(str(uri))


def keys(prefix: str, count: int) -> list[str]:
    """`count` names."""
    return [f"{prefix}{number:04d}" for number in range(count)]
