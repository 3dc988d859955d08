"""Where each sample is, as a pure function: nothing is stored, hence any step can be asked for at once.

An epoch of a stream is the same rows in another order:

    shards            0 1 2 3 4 5            parts of a domain, `rows_per_shard` rows each, the last one shorter
    permuted          4 0 5 | 2 1 3          keyed by (seed, stream, epoch); cut in windows of a few shards
    rows in a window  shuffled               keyed by (seed, stream, epoch, window)
    lanes             ├───┼───┼───┤          the sequence cut in contiguous pieces, lengths differ by one at most

A lane repeats this for epoch 0, 1, …; its `position` counts rows from the start of the run. Every lane belongs to one
logical rank, so the order of samples does not depend on the number of workers. Windows bound how many shards a
lane has to hold open at a time; a domain of `window_shards` shards or fewer is shuffled completely.

Permutations are Feistel networks with cycle-walking: a bijection on {0 … n-1} in constant memory. Up to 256 numbers,
where a Feistel network has too few different orders, they are sorted by a keyed hash instead.
Source: Black and Rogaway 2002, "Ciphers with arbitrary finite domains", §4–5.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from models.errors import DataError

Indices = np.ndarray  # int64

_ROUNDS = 6
_SORTED_UP_TO = 256


@dataclass(frozen=True)
class Permutation:
    """A keyed bijection on {0 … count-1}, with its inverse; works on arrays of int64."""

    count: int
    keys: tuple[int, ...]

    @classmethod
    def keyed(cls, count: int, *key: int | str) -> Permutation:
        """The permutation named by `key`; the same on every machine and Python."""
        raw = hashlib.blake2b(repr(key).encode(), digest_size=8 * _ROUNDS).digest()
        return cls(count, tuple(int.from_bytes(raw[i : i + 8], "little") for i in range(0, len(raw), 8)))

    def forward(self, index: Indices) -> Indices:
        """Image of each index."""
        return self._sorted()[index] if self.count <= _SORTED_UP_TO else self._walk(index, self.keys, False)

    def inverse(self, index: Indices) -> Indices:
        """The index that `forward` takes to each given one."""
        if self.count <= _SORTED_UP_TO:
            return np.argsort(self._sorted())[index]
        return self._walk(index, self.keys[::-1], True)

    def _sorted(self) -> Indices:
        hashes = np.arange(self.count, dtype=np.uint64)
        for key in self.keys[:2]:
            hashes = _mix(hashes ^ np.uint64(key))
        return np.argsort(hashes, kind="stable")

    def _walk(self, index: Indices, keys: tuple[int, ...], backwards: bool) -> Indices:
        result = np.array(index, dtype=np.int64)
        todo = np.arange(result.size)
        while todo.size:
            # Values outside the domain are sent round again: the cycle they lie on leads back into it.
            result[todo] = self._cipher(result[todo].astype(np.uint64), keys, backwards)
            todo = todo[result[todo] >= self.count]
        return result

    def _cipher(self, value: np.ndarray, keys: tuple[int, ...], backwards: bool) -> np.ndarray:
        bits = ((self.count - 1).bit_length() + 1) // 2
        half, mask = np.uint64(bits), np.uint64((1 << bits) - 1)
        left, right = value >> half, value & mask
        if backwards:
            left, right = right, left
        for key in keys:
            left, right = right, left ^ (_mix(right ^ np.uint64(key)) & mask)
        if backwards:
            left, right = right, left
        return ((left << half) | right).astype(np.int64)


def _mix(value: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al. 2014): every input bit reaches every output bit."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@dataclass(frozen=True)
class LanePlan:
    """The endless sequence of samples of one lane of one stream.

    Args:
        rows_per_shard: rows of every shard but the last.
        total_rows: samples of the domain (of each of the aligned domains) in the split.
        seed, stream: key of the order.
        lane, lanes: which piece of the sequence, of how many.
        window_shards: consecutive shards whose rows are shuffled together.

    Raises:
        DataError: fewer samples than lanes.
    """

    rows_per_shard: int
    total_rows: int
    seed: int
    stream: str
    lane: int
    lanes: int
    window_shards: int = 4

    def __post_init__(self) -> None:
        assert min(self.rows_per_shard, self.window_shards) > 0, self
        assert 0 <= self.lane < self.lanes, self
        if self.total_rows < self.lanes:
            raise DataError(
                f"stream '{self.stream}' has {self.total_rows} samples for {self.lanes} logical ranks",
                code="E_DATA_EMPTY",
                hint="add images or lower train.logical_ranks",
            )

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.total_rows // self.rows_per_shard)

    @property
    def start(self) -> int:
        """First row of this lane in the sequence of an epoch."""
        return self.lane * self.total_rows // self.lanes

    @property
    def length(self) -> int:
        """Rows of this lane in an epoch."""
        return (self.lane + 1) * self.total_rows // self.lanes - self.start

    def locate(self, position: int) -> tuple[int, int, int]:
        """(epoch, shard part, row in the shard) of a position >= 0."""
        epoch, part, row = self.locate_many(position, 1)
        return int(epoch[0]), int(part[0]), int(row[0])

    def locate_many(self, start: int, n: int) -> tuple[Indices, Indices, Indices]:
        """(epochs, parts, rows) of positions start … start+n-1, each an int64 array of n."""
        epochs, parts, rows = (np.empty(n, dtype=np.int64) for _ in range(3))
        done = 0
        while done < n:
            epoch, offset = divmod(start + done, self.length)
            order = self._epoch(epoch)
            taken = 0
            while taken < min(self.length - offset, n - done):
                # One window at a time: its rows share a permutation.
                window, first, last = order.window_at(self.start + offset + taken)
                begin = self.start + offset + taken
                end = min(last, self.start + self.length, begin + n - done - taken)
                shuffle = Permutation.keyed(last - first, self.seed, self.stream, epoch, window)
                at = first + shuffle.forward(np.arange(begin - first, end - first))
                piece = slice(done + taken, done + taken + end - begin)
                parts[piece], rows[piece] = order.place(at)
                epochs[piece] = epoch
                taken += end - begin
            done += taken
        return epochs, parts, rows

    def window_parts(self, position: int) -> tuple[int, int, list[int]]:
        """(epoch, window, its shard parts): what has to be at hand around a position."""
        epoch, offset = divmod(position, self.length)
        order = self._epoch(epoch)
        window, _, _ = order.window_at(self.start + offset)
        slots = np.arange(window * self.window_shards, min((window + 1) * self.window_shards, self.shards))
        return epoch, window, order.parts(slots).tolist()

    def next_window(self, position: int) -> int:
        """The first position after `position` that lies in another window or epoch."""
        epoch, offset = divmod(position, self.length)
        _, _, last = self._epoch(epoch).window_at(self.start + offset)
        return position + min(last, self.start + self.length) - (self.start + offset)

    def _epoch(self, epoch: int) -> _Epoch:
        return _epoch_of(self.rows_per_shard, self.total_rows, self.seed, self.stream, self.window_shards, epoch)


@dataclass(frozen=True)
class _Epoch:
    """The order of shards in one epoch. A *slot* is a place in the permuted sequence of shards."""

    rows_per_shard: int
    total_rows: int
    window_shards: int
    order: Permutation
    short_slot: int  # where the last, shorter shard has gone

    def parts(self, slots: Indices) -> Indices:
        return self.order.forward(slots)

    def place(self, at: Indices) -> tuple[Indices, Indices]:
        """(parts, rows) of rows of the sequence."""
        slots, rows = self._slots(at)
        return self.parts(slots), rows

    def window_at(self, at: int) -> tuple[int, int, int]:
        """(number, first row, row after the last) of the window that holds a row of the sequence."""
        slot = (at + (self.missing if at >= self.short_end else 0)) // self.rows_per_shard
        window = slot // self.window_shards
        return window, self._row_of(window * self.window_shards), self._row_of((window + 1) * self.window_shards)

    @property
    def missing(self) -> int:
        """Rows by which the last shard is shorter than the others."""
        return self.order.count * self.rows_per_shard - self.total_rows

    @property
    def short_end(self) -> int:
        """The row of the sequence that follows the short shard."""
        return (self.short_slot + 1) * self.rows_per_shard - self.missing

    def _slots(self, at: Indices) -> tuple[Indices, Indices]:
        # Rows behind the short shard are counted as if it were full.
        return np.divmod(at + np.where(at >= self.short_end, self.missing, 0), self.rows_per_shard)

    def _row_of(self, slot: int) -> int:
        full = min(slot, self.order.count) * self.rows_per_shard
        return full - (self.missing if slot > self.short_slot else 0)


@lru_cache(maxsize=256)
def _epoch_of(rows_per_shard: int, total_rows: int, seed: int, stream: str, window_shards: int, epoch: int) -> _Epoch:
    shards = -(-total_rows // rows_per_shard)
    order = Permutation.keyed(shards, seed, stream, epoch)
    short_slot = int(order.inverse(np.array([shards - 1]))[0])
    return _Epoch(rows_per_shard, total_rows, window_shards, order, short_slot)
