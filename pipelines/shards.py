"""A prepared dataset: the shard schema, the index and the manifest; how they are written, opened and read.

    manifest.json                                   small; written last: without it there is no dataset
    index.parquet                                   a row a shard: domain, split, part, uri, rows, bytes, sha256
    shards/<split>/<domain>/part-00000-<sha>.parquet   key (string), image (encoded bytes); row groups of 64
    quarantine/report.jsonl                         the files that could not be used, and why

Rows are ordered by a hash of their key and all shards but the last of a (domain, split) have the same number of rows.
So two domains with the same keys in a split are aligned: row i of shard j is the same sample in both.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from models.errors import DataError, nearest
from pipelines.storage import Store

VERSION = 1
ROW_GROUP = 64
MANIFEST, INDEX, REPORT = "manifest.json", "index.parquet", "quarantine/report.jsonl"
SHARD_SCHEMA = pa.schema([("key", pa.string()), ("image", pa.binary())])
INDEX_SCHEMA = pa.schema(
    [
        ("domain", pa.string()),
        ("split", pa.string()),
        ("part", pa.int32()),
        ("uri", pa.string()),
        ("rows", pa.int64()),
        ("bytes", pa.int64()),
        ("sha256", pa.string()),
    ]
)


@dataclass(frozen=True)
class ShardInfo:
    """One shard; `uri` is relative to the dataset."""

    domain: str
    split: str
    part: int
    uri: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a dataset holds; `splits[split][domain]` = {"count", "shards", "keys_sha256"}, `size` = common (h, w)."""

    rows_per_shard: int
    domains: tuple[str, ...]
    splits: dict[str, dict[str, dict[str, Any]]]
    index_sha256: str
    image: dict[str, int] = field(default_factory=lambda: {"channels": 3, "depth": 8})
    size: tuple[int, int] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    licence: str | None = None
    version: int = VERSION

    @property
    def digest(self) -> str:
        """Identity of the data: sha256 of the index, which holds the sha256 of every shard."""
        return self.index_sha256

    def count(self, domain: str, split: str) -> int:
        """Number of samples; 0 for a split that the domain does not have."""
        return int(self.splits.get(split, {}).get(domain, {}).get("count", 0))

    def aligned(self, domains: Sequence[str], split: str) -> bool:
        """Whether all these domains hold the same keys in the split, at least one."""
        entries = [self.splits.get(split, {}).get(domain) for domain in domains]
        if not entries or any(not entry or not entry["count"] for entry in entries):
            return False
        return len({entry["keys_sha256"] for entry in entries if entry}) == 1

    def to_json(self) -> str:
        """The text of manifest.json."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    @staticmethod
    def from_json(text: str | bytes) -> Manifest:
        """Parse manifest.json; ValueError, KeyError or TypeError where it is none."""
        raw = json.loads(text)
        if not isinstance(raw, dict) or raw.get("version") != VERSION:
            found = raw.get("version") if isinstance(raw, dict) else type(raw).__name__
            raise ValueError(f"manifest version {found!r}; this program reads {VERSION}")
        for entry in (entry for domains in raw["splits"].values() for entry in domains.values()):
            _ = int(entry["count"]), int(entry["shards"]), str(entry["keys_sha256"])
        size = raw.get("size")
        return Manifest(
            rows_per_shard=int(raw["rows_per_shard"]),
            domains=tuple(raw["domains"]),
            splits=raw["splits"],
            index_sha256=str(raw["index_sha256"]),
            image=dict(raw["image"]),
            size=None if size is None else (int(size[0]), int(size[1])),
            provenance=dict(raw.get("provenance") or {}),
            licence=raw.get("licence"),
        )


@dataclass(frozen=True)
class Dataset:
    """An opened dataset: its manifest and its index. Plain values only; cheap to pickle."""

    uri: str
    manifest: Manifest
    index: tuple[ShardInfo, ...]

    def shards(self, domain: str, split: str) -> list[ShardInfo]:
        """The shards of a domain in a split, ordered by part; empty where the split has none of it.

        Raises:
            DataError: E_DATA_DOMAIN, for a domain that the dataset does not have.
        """
        self.require(domain)
        found = [shard for shard in self.index if shard.domain == domain and shard.split == split]
        return sorted(found, key=lambda shard: shard.part)

    def require(self, *domains: str, split: str | None = None) -> None:
        """Check that the domains exist and, where `split` is given, that each has samples in it.

        Raises:
            DataError: E_DATA_DOMAIN, E_DATA_EMPTY.
        """
        for domain in domains:
            if domain not in self.manifest.domains:
                raise DataError(
                    f"{self.uri} has no domain '{domain}'; {nearest(domain, self.manifest.domains)}",
                    code="E_DATA_DOMAIN",
                )
            if split is not None and not self.manifest.count(domain, split):
                raise DataError(f"{self.uri}: domain '{domain}' has no images in '{split}'", code="E_DATA_EMPTY")

    def fetch(self, shard: ShardInfo) -> bytes:
        """The bytes of a shard, verified.

        Raises:
            DataError: E_SHARD_MISSING, E_SHARD_DIGEST (with expected and actual).
        """
        try:
            return Store(self.uri).read_verified(shard.uri, shard.sha256, shard.bytes)
        except DataError as error:
            code = {"E_NOT_FOUND": "E_SHARD_MISSING", "E_DIGEST": "E_SHARD_DIGEST"}.get(error.code, error.code)
            raise DataError(error.message, code=code, hint="run `i2i prepare` again") from error


def open_dataset(uri: str) -> Dataset:
    """Read manifest and index, and check that they belong together.

    Raises:
        DataError: E_DATA_EMPTY (nothing there), E_DATA_MANIFEST (not a dataset, or not a whole one), E_URI, E_BUCKET, …
    """
    store = Store(uri)
    try:
        raw = store.read(MANIFEST)
    except DataError as error:
        if error.code != "E_NOT_FOUND":
            raise
        what, code = (
            ("there is nothing", "E_DATA_EMPTY") if not store.list() else ("no manifest.json", "E_DATA_MANIFEST")
        )
        raise DataError(
            f"{store.uri} is not a prepared dataset: {what} there".replace(
                "there is nothing there", "nothing is there"
            ),
            code=code,
            hint="make one with `i2i prepare SRC DEST`",
        ) from error
    try:
        manifest = Manifest.from_json(raw)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(store, f"manifest.json cannot be read ({type(error).__name__}: {error})") from error
    try:
        index = store.read(INDEX)
    except DataError as error:
        if error.code != "E_NOT_FOUND":
            raise
        raise _damaged(store, "index.parquet is missing") from error
    actual = hashlib.sha256(index).hexdigest()
    if actual != manifest.index_sha256:
        raise _damaged(
            store, f"index.parquet has sha256 {actual[:12]}…, manifest.json says {manifest.index_sha256[:12]}…"
        )
    return Dataset(store.uri, manifest, tuple(read_index(index)))


def _damaged(store: Store, what: str) -> DataError:
    return DataError(
        f"{store.uri} is not a whole dataset: {what}", code="E_DATA_MANIFEST", hint="run `i2i prepare` again"
    )


def read_shard(raw: bytes) -> pa.Table:
    """The rows of a shard: columns `key` and `image`. Row groups of 64 are kept as chunks."""
    return pq.ParquetFile(pa.BufferReader(raw)).read(columns=["key", "image"], use_threads=False)


def write_shard(keys: Sequence[str], images: Sequence[bytes]) -> bytes:
    """A shard of these rows; the same rows give the same bytes."""
    table = pa.table({"key": pa.array(keys, pa.string()), "image": pa.array(images, pa.binary())}, SHARD_SCHEMA)
    return _to_parquet(table, ROW_GROUP)


def read_index(raw: bytes) -> list[ShardInfo]:
    """The rows of index.parquet."""
    return [ShardInfo(**row) for row in pq.ParquetFile(pa.BufferReader(raw)).read(use_threads=False).to_pylist()]


def write_index(shards: Iterable[ShardInfo]) -> bytes:
    """index.parquet, ordered by split, domain and part."""
    rows = sorted(shards, key=lambda shard: (shard.split, shard.domain, shard.part))
    return _to_parquet(pa.Table.from_pylist([asdict(row) for row in rows], schema=INDEX_SCHEMA), 1 << 16)


def _to_parquet(table: pa.Table, row_group: int) -> bytes:
    # Encoded images do not compress; dictionaries and statistics over them are pure cost.
    sink = pa.BufferOutputStream()
    pq.write_table(
        table, sink, row_group_size=row_group, compression="none", use_dictionary=False, write_statistics=False
    )
    return sink.getvalue().to_pybytes()


def shard_path(split: str, domain: str, part: int, sha256: str) -> str:
    """Where a shard lies, relative to the dataset; the name changes with the content."""
    return f"shards/{split}/{domain}/part-{part:05d}-{sha256[:8]}.parquet"


def key_order(key: str) -> bytes:
    """What rows are sorted by: a hash that all domains share, so that equal key sets give equal orders."""
    return hashlib.blake2b(key.encode(), digest_size=16).digest()


def keys_digest(keys: Iterable[str]) -> str:
    """sha256 over the keys in stored order; equal in two domains of a split where these are aligned."""
    digest = hashlib.sha256()
    for key in keys:
        digest.update(key.encode() + b"\0")
    return digest.hexdigest()
