"""Verified shards at hand: in memory for the moment, on the node's disk for the next epoch, other workers and trials.

A shard of a store is fetched whole, its sha256 checked, and kept in a directory under that sha256; what is read back
from there is checked again. Shards of a local dataset are read in place, and checked just as well.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa

from pipelines import console
from pipelines.shards import Dataset, ShardInfo, read_shard
from pipelines.storage import parse_uri

_FETCHERS = 4
_STALE_S = 3600.0


class DiskCache:
    """A directory of shards, named by their sha256 and shared by every process of the node.

    Files appear whole, by rename. Beyond `limit_bytes` the least recently used ones go. Where the directory
    cannot be written or the disk is full, shards are used without being kept, with one warning.
    """

    def __init__(self, directory: str | Path, limit_bytes: int) -> None:
        self.directory = Path(directory)
        self.limit_bytes = limit_bytes
        self._warned = False

    def get(self, shard: ShardInfo, fetch: Callable[[ShardInfo], bytes]) -> bytes:
        """The bytes of a shard; `fetch` is called where they are not here, by one process of the node at a time."""
        path = self.directory / f"{shard.sha256}.parquet"
        data = self._read(path, shard)
        if data is None:
            with self._lock(shard.sha256[:2]):
                data = self._read(path, shard)
                if data is None:
                    data = fetch(shard)
                    self._keep(path, data)
        return data

    def holds(self, shard: ShardInfo) -> bool:
        """Whether the shard is here (not whether it is intact)."""
        return os.path.exists(self.directory / f"{shard.sha256}.parquet")

    def _read(self, path: Path, shard: ShardInfo) -> bytes | None:
        try:
            data = path.read_bytes()
        except OSError:
            return None
        if hashlib.sha256(data).hexdigest() != shard.sha256:
            console.warn(f"{path} was damaged on this node's disk; it is fetched again")
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # the order of eviction
        return data

    def _keep(self, path: Path, data: bytes) -> None:
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            temporary.write_bytes(data)
            os.replace(temporary, path)
            self._evict(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            self._warn(error)

    def _evict(self, newest: Path) -> None:
        with self._lock("evict"):
            entries = []
            for entry in os.scandir(self.directory):
                with contextlib.suppress(FileNotFoundError):
                    found = entry.stat()
                    if entry.name.endswith(".parquet"):
                        entries.append((found.st_mtime_ns, found.st_size, entry.path))
                    elif entry.name.endswith(".tmp") and found.st_mtime < time.time() - _STALE_S:
                        os.unlink(entry.path)
            total = sum(size for _, size, _ in entries)
            for _, size, name in sorted(entries):
                if total <= self.limit_bytes:
                    break
                if name != str(newest):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(name)
                    total -= size

    @contextlib.contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        # The system drops the lock of a process that dies; the empty lock files stay, there are few of them.
        with contextlib.ExitStack() as stack:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                fcntl.flock(stack.enter_context(open(self.directory / f"{name}.lock", "w")), fcntl.LOCK_EX)
            except OSError as error:
                self._warn(error)  # without the lock, at worst, a shard is fetched twice
            yield

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            console.warn(f"the shard cache {self.directory} cannot be written ({error.strerror}); going on without")
            self._warned = True


class ShardSource:
    """The shards of a dataset as tables, the last few of them in memory.

    Args:
        dataset: where they come from.
        cache_dir: of the node-local cache; None for none. Not used for a dataset on the local disk.
        limit_bytes: of the node-local cache.
    """

    def __init__(self, dataset: Dataset, cache_dir: str | Path | None, limit_bytes: int) -> None:
        self.dataset = dataset
        self.remote = parse_uri(dataset.uri)[0] != "file"
        self._disk = DiskCache(cache_dir, limit_bytes) if cache_dir is not None and self.remote else None
        self._tables: OrderedDict[str, pa.Table] = OrderedDict()
        self._coming: dict[str, Future] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._room = 2

    def reserve(self, tables: int) -> None:
        """Say how many tables are in use at the same time; fewer in memory would mean reading them over and over."""
        self._room = max(self._room, tables)

    def table(self, shard: ShardInfo) -> pa.Table:
        """The rows of a shard: `key`, `image`.

        Raises:
            DataError, StorageError: the shard is missing, is not what the index says, or cannot be fetched.
        """
        table = self._tables.get(shard.uri)
        if table is None:
            coming = self._coming.pop(shard.uri, None)
            loaded = coming.result() if coming is not None else None
            table = loaded if loaded is not None else read_shard(self._bytes(shard))
            self._tables[shard.uri] = table
            while len(self._tables) > self._room:
                self._tables.popitem(last=False)
        self._tables.move_to_end(shard.uri)
        return table

    def ahead(self, shards: Iterable[ShardInfo]) -> None:
        """Begin to fetch shards that will be asked for soon; nothing to do where the dataset is on the local disk."""
        if not self.remote:
            return
        self._pool = self._pool or ThreadPoolExecutor(_FETCHERS, thread_name_prefix="shards")
        for shard in shards:
            if shard.uri not in self._tables and shard.uri not in self._coming:
                self._coming[shard.uri] = self._pool.submit(self._bring, shard)
        # What a jump to another step has made useless must not pile up.
        for uri in list(self._coming)[: -2 * self._room]:
            self._coming.pop(uri).cancel()

    def close(self) -> None:
        """Drop what is in memory and let go of the fetching threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        self._pool = None
        self._coming.clear()
        self._tables.clear()

    def _bring(self, shard: ShardInfo) -> pa.Table | None:
        """To the node's disk, or to memory where there is no cache on disk."""
        if self._disk is None:
            return read_shard(self._bytes(shard))
        data = None if self._disk.holds(shard) else self._disk.get(shard, self.dataset.fetch)
        # What the disk did not take would be fetched again.
        return None if data is None or self._disk.holds(shard) else read_shard(data)

    def _bytes(self, shard: ShardInfo) -> bytes:
        return self.dataset.fetch(shard) if self._disk is None else self._disk.get(shard, self.dataset.fetch)
