"""From a step of the run to its pixels: locate, read, decode, augment. Needs no Ray.

What a reader gives depends on its specification, the lane and the step, and on nothing it did before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import cv2
import numpy as np
import pyarrow as pa

from models.codec import decode, resize
from models.errors import DataError, ImageError
from pipelines.plan import LanePlan
from pipelines.shard_cache import ShardSource
from pipelines.shards import Dataset, ShardInfo, open_dataset, read_shard
from pipelines.transforms import AugmentConfig, augment

_LOCATE_AT_ONCE = 256


class StreamLike(Protocol):
    """What a reader needs to know of `models.batch.Stream`; importing that would load torch into every reader."""

    @property
    def name(self) -> str:
        """Part of the key of every random choice."""
        ...

    @property
    def images(self) -> dict[str, int]:
        """Batch field → index of the domain it is read from."""
        ...


class _Stream(NamedTuple):
    name: str
    images: dict[str, int]


@dataclass(frozen=True)
class MicroBatch:
    """The samples of one logical rank at one step.

    Attributes:
        images: batch field → uint8 `(m, size, size, 3)`.
        ids: stream → the m keys of its samples, in order.
    """

    images: dict[str, np.ndarray]
    ids: dict[str, list[str]]


class SampleReader:
    """Reads the micro-batches of a run. Not to be shared between threads.

    Args:
        dataset: an opened dataset.
        streams: of the system's batch type.
        domains: names, in the order the streams count them.
        split: where training samples come from.
        lanes: number of logical ranks.
        batch: samples of each stream for one logical rank at one step.
        augment: what happens to each image.
        seed: of the order and of the augmentation.
        cache_dir: node-local cache for shards of a remote dataset; None for none.
        cache_limit_bytes: of that cache.
        window_shards: see `pipelines.plan`.

    Raises:
        DataError: a domain is missing or empty, has fewer samples than lanes, or domains that a stream needs aligned
            are not.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        streams: Sequence[StreamLike],
        domains: Sequence[str],
        split: str = "train",
        lanes: int,
        batch: int,
        augment: AugmentConfig,
        seed: int,
        cache_dir: str | None = None,
        cache_limit_bytes: int = 20 * 10**9,
        window_shards: int = 4,
    ) -> None:
        cv2.setNumThreads(1)  # the cores belong to training
        self.dataset, self.domains, self.split = dataset, tuple(domains), split
        self.streams = tuple(_Stream(stream.name, dict(stream.images)) for stream in streams)
        self.lanes, self.batch, self.augment, self.seed = lanes, batch, augment, seed
        self.cache_dir, self.cache_limit_bytes, self.window_shards = cache_dir, cache_limit_bytes, window_shards
        used = [self.domains[index] for stream in self.streams for index in stream.images.values()]
        dataset.require(*used, split=split)
        self._shards = {domain: dataset.shards(domain, split) for domain in used}
        self._plans = {(s.name, lane): self._plan(s, lane) for s in self.streams for lane in range(lanes)}
        self._source = ShardSource(dataset, cache_dir, cache_limit_bytes)
        self._located: dict[tuple[str, int], tuple[int, np.ndarray, np.ndarray]] = {}
        self._fetched_to: dict[tuple[str, int], tuple[int, int]] = {}

    @property
    def spec(self) -> dict[str, Any]:
        """Plain values from which `from_spec` makes the same reader in another process."""
        return {
            "uri": self.dataset.uri,
            "index_sha256": self.dataset.manifest.digest,
            "streams": [[stream.name, stream.images] for stream in self.streams],
            "domains": list(self.domains),
            "split": self.split,
            "lanes": self.lanes,
            "batch": self.batch,
            "augment": asdict(self.augment),
            "seed": self.seed,
            "cache_dir": self.cache_dir,
            "cache_limit_bytes": self.cache_limit_bytes,
            "window_shards": self.window_shards,
        }

    @staticmethod
    def from_spec(spec: Mapping[str, Any]) -> SampleReader:
        """Open the dataset of `spec` and read from it.

        Raises:
            DataError: also where the dataset is no longer the one the specification was made from.
        """
        fields = dict(spec)
        dataset = open_dataset(fields.pop("uri"))
        expected = fields.pop("index_sha256")
        if dataset.manifest.digest != expected:
            raise DataError(
                f"{dataset.uri} has changed since this run began: index {dataset.manifest.digest[:12]}…, was "
                f"{expected[:12]}…",
                code="E_DATA_CHANGED",
                hint="restore it, or start a new run",
            )
        fields["streams"] = [_Stream(name, images) for name, images in fields["streams"]]
        fields["augment"] = AugmentConfig(**fields["augment"])
        return SampleReader(dataset, **fields)

    def micro_batch(self, lane: int, step: int) -> MicroBatch:
        """What logical rank `lane` is fed at `step`.

        Raises:
            DataError, StorageError: a shard is missing, damaged or out of reach, or a stored image cannot be decoded.
        """
        images: dict[str, list[np.ndarray]] = {field: [] for stream in self.streams for field in stream.images}
        ids: dict[str, list[str]] = {}
        for stream in self.streams:
            start = step * self.batch
            parts, rows = self._locate(stream, lane, start)
            keys = ids[stream.name] = []
            for offset, (part, row) in enumerate(zip(parts.tolist(), rows.tolist(), strict=True)):
                key, decoded = self._sample(stream, part, row)
                keys.append(key)
                done = augment(
                    decoded, self.augment, seed=self.seed, stream=stream.name, lane=lane, position=start + offset
                )
                for field, pixels in zip(stream.images, done, strict=True):
                    images[field].append(pixels)
        return MicroBatch({field: np.stack(arrays) for field, arrays in images.items()}, ids)

    def close(self) -> None:
        """Let go of tables and threads."""
        self._source.close()

    def _plan(self, stream: _Stream, lane: int) -> LanePlan:
        names = [self.domains[index] for index in stream.images.values()]
        manifest = self.dataset.manifest
        if len(names) > 1 and not manifest.aligned(names, self.split):
            raise DataError(
                f"{self.dataset.uri}: domains {' and '.join(map(repr, names))} are not aligned in '{self.split}'; "
                "this system needs the same keys in each",
                code="E_DATA_ALIGN",
                hint="prepare them with --layout paired, or train a system for unpaired domains",
            )
        return LanePlan(
            manifest.rows_per_shard,
            manifest.count(names[0], self.split),
            self.seed,
            stream.name,
            lane,
            self.lanes,
            self.window_shards,
        )

    def _locate(self, stream: _Stream, lane: int, start: int) -> tuple[np.ndarray, np.ndarray]:
        """(parts, rows) of the next `batch` positions; planned for many steps at a time."""
        key = (stream.name, lane)
        begin, parts, rows = self._located.get(key, (0, np.empty(0), np.empty(0)))
        if not begin <= start <= begin + len(parts) - self.batch:
            begin, (_, parts, rows) = start, self._plans[key].locate_many(start, max(_LOCATE_AT_ONCE, self.batch))
            self._located[key] = begin, parts, rows
            fields = sum(len(s.images) for s in self.streams for name, _ in self._located if name == s.name)
            self._source.reserve(fields * (self.window_shards + 1))
        self._fetch_ahead(stream, lane, start)
        piece = slice(start - begin, start - begin + self.batch)
        return parts[piece], rows[piece]

    def _fetch_ahead(self, stream: _Stream, lane: int, start: int) -> None:
        """On entering a window: begin to fetch its shards, all at once, and then those of the next."""
        key = (stream.name, lane)
        begin, end = self._fetched_to.get(key, (0, 0))
        if not self._source.remote or begin <= start < end:
            return
        plan = self._plans[key]
        end = plan.next_window(start)
        self._fetched_to[key] = start, end
        parts = [*plan.window_parts(start)[2], *plan.window_parts(end)[2]]
        wanted = dict.fromkeys(parts)
        self._source.ahead(self._shard(index, part) for part in wanted for index in stream.images.values())

    def _shard(self, domain: int, part: int) -> ShardInfo:
        return self._shards[self.domains[domain]][part]

    def _sample(self, stream: _Stream, part: int, row: int) -> tuple[str, list[np.ndarray]]:
        """Key and decoded images of one sample, in the order of the stream's fields."""
        key = None
        decoded = []
        for index in stream.images.values():
            shard = self._shard(index, part)
            table = self._source.table(shard)
            found = table.column("key")[row].as_py()
            if key is not None and found != key:
                raise DataError(
                    f"{self.dataset.uri}/{shard.uri}: row {row} is '{found}', its counterpart is '{key}'; the domains "
                    "are not aligned though the manifest says so",
                    code="E_DATA_ALIGN",
                    hint="run `i2i prepare` again",
                )
            key = found
            decoded.append(_decode(self.dataset, shard, table, row))
        assert key is not None, "a stream without images"
        return key, decoded


def iterate_split(
    dataset: Dataset, domain: str, split: str, size: int | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Every sample of a split once, in stored order and unaugmented: (key, uint8 `(size, size, 3)`).

    `size` None keeps each image's own size. Aligned domains give the same keys in the same order.
    """
    dataset.require(domain, split=split)
    for shard in dataset.shards(domain, split):
        table = read_shard(dataset.fetch(shard))
        for row in range(table.num_rows):
            pixels = _decode(dataset, shard, table, row)
            yield table.column("key")[row].as_py(), pixels if size is None else resize(pixels, size)


def _decode(dataset: Dataset, shard: ShardInfo, table: pa.Table, row: int) -> np.ndarray:
    try:
        return decode(table.column("image")[row].as_py())
    except ImageError as error:
        where = f"{dataset.uri}/{shard.uri}: row {row} ('{table.column('key')[row].as_py()}')"
        raise ImageError(f"{where}: {error.message}", code=error.code, hint="run `i2i prepare` again") from error
