"""The micro-batches of a run as one continuous stream, read ahead of training: in a thread, or by Ray Data.

Both ways give the same bytes in the same order, from any step on: what is read is decided by `pipelines.plan`.

The Ray Data way is one execution a reader and run, without epochs: a read task that yields chunks of steps as it
is asked for them, behind `streaming_split(1)`, so that neither reading nor the executor lives in the training process.
Several readers take the chunks in turn. A run of a million steps starts as fast as one of a hundred: nothing is
planned ahead, and Ray's own limits on memory keep the reader from running away.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import queue
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import pyarrow as pa

from models.errors import I2IError
from pipelines import console
from pipelines.reader import MicroBatch, SampleReader

if TYPE_CHECKING:
    from ray.data import DataIterator

T = TypeVar("T")

_STEPS_AHEAD = 4
_CHUNK_BYTES = 4 * 2**20
_MAX_CHUNK_STEPS = 64
_READER_CPUS = 0.5
_MAX_RESTARTS = 5


@dataclass(frozen=True)
class StepBatch:
    """What the lanes of one worker are fed at one step: lane → its samples."""

    step: int
    micro: dict[int, MicroBatch]


class ReadAhead(Generic[T]):
    """An iterator whose items are made by a thread, a few ahead; it starts at once.

    Errors of the thread are raised where the items are taken. `close` (or dropping the object) ends the thread.
    """

    def __init__(self, produce: Callable[[], Iterator[T]], depth: int) -> None:
        self._queue: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=_fill, args=(produce, self._queue, self._stop), name="read-ahead", daemon=True
        )
        weakref.finalize(self, self._stop.set)
        self._ended = False
        self._thread.start()

    def __iter__(self) -> ReadAhead[T]:
        return self

    def __next__(self) -> T:
        if self._ended:
            raise StopIteration
        kind, value = self._queue.get()
        if kind == "item":
            return value
        self._ended = True
        if kind == "error":
            raise value
        raise StopIteration

    def close(self) -> None:
        """End the thread; no more items."""
        self._ended = True
        self._stop.set()
        self._thread.join(timeout=10)


def _fill(produce: Callable[[], Iterator[T]], items: queue.Queue, stop: threading.Event) -> None:
    """Body of the thread; a function, so that the thread keeps no `ReadAhead` alive."""

    def put(kind: str, value: object) -> None:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                items.put((kind, value), timeout=0.2)
                return

    try:
        source = produce()
        try:
            for item in source:
                put("item", item)
                if stop.is_set():
                    return
        finally:
            close = getattr(source, "close", None)
            if close is not None:
                close()
        put("end", None)
    except Exception as error:  # noqa: BLE001  raised again by the consumer
        put("error", error)


def local_stream(
    reader: SampleReader, lanes_hosted: Sequence[int], start_step: int, end_step: int
) -> ReadAhead[StepBatch]:
    """Steps `start_step` … `end_step - 1` of the hosted lanes, read by a thread of this process. Needs no Ray."""

    def steps() -> Iterator[StepBatch]:
        for step in range(start_step, end_step):
            yield StepBatch(step, {lane: reader.micro_batch(lane, step) for lane in lanes_hosted})

    return ReadAhead(steps, _STEPS_AHEAD)


def ray_stream(
    reader_spec: Mapping[str, Any], lanes_hosted: Sequence[int], start_step: int, end_step: int, num_readers: int = 1
) -> ReadAhead[StepBatch]:
    """The same steps, read by `num_readers` processes through Ray Data; to be called in a Ray worker or driver.

    A reader that dies is replaced, and reading goes on with the next step.

    Args:
        reader_spec: `SampleReader.spec`.
        lanes_hosted: the logical ranks of the calling worker.
        start_step, end_step: the steps to read; the end is excluded.
        num_readers: processes; each reserves half a CPU of Ray's accounting.
    """
    spec, lanes = dict(reader_spec), list(lanes_hosted)
    return ReadAhead(partial(_ray_steps, spec, lanes, start_step, end_step, num_readers), _STEPS_AHEAD)


def _ray_steps(spec: dict[str, Any], lanes: list[int], step: int, end: int, num_readers: int) -> Iterator[StepBatch]:
    from ray.exceptions import RayError

    restarts = 0
    while step < end:
        try:
            for batch in _execution(spec, lanes, step, end, num_readers):
                yield batch
                step = batch.step + 1
                restarts = 0
        except (RayError, I2IError) as error:
            _raise_ours(error)
            restarts += 1
            if restarts > _MAX_RESTARTS:
                raise
            console.warn(f"a reader was lost ({type(error).__name__}); reading goes on at step {step}")


def _raise_ours(error: BaseException) -> None:
    """Raise what lies behind `error`, unless that is the loss of a process: an error of this project as itself."""
    from ray.exceptions import RayError, RayTaskError

    seen: BaseException | None = error
    while isinstance(seen, RayTaskError):
        seen = seen.cause
    if isinstance(seen, I2IError):
        raise seen
    if not isinstance(seen, RayError):
        raise error


def _execution(spec: dict[str, Any], lanes: list[int], start: int, end: int, num_readers: int) -> Iterator[StepBatch]:
    """One Ray Data execution a reader; their chunks in turn."""
    splits = [_split(spec, lanes, start, end, number, num_readers) for number in range(num_readers)]
    rows = [ReadAhead(partial(_rows, split), 1) for split in splits]
    try:
        for number in itertools.cycle(range(num_readers)):
            row = next(rows[number], None)
            if row is None:
                return
            yield from _unpack(row, spec, lanes)
    finally:
        for row_stream in rows:
            row_stream.close()


def _rows(split: DataIterator) -> Iterator[pa.Table]:
    blocks: Any = split
    for block in blocks.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
        for row in range(block.num_rows):
            yield block.slice(row, 1)


def _split(spec: dict[str, Any], lanes: list[int], start: int, end: int, number: int, num_readers: int) -> DataIterator:
    """The chunks of one reader as a Ray Data stream."""
    from ray.data import Datasource, ExecutionResources, read_datasource
    from ray.data.block import BlockMetadata
    from ray.data.datasource import ReadTask

    from pipelines.pace import Pace

    chunk_bytes = max(_CHUNK_BYTES, _step_bytes(spec, lanes))
    task = ReadTask(
        partial(_read_chunks, spec, lanes, start, end, number, num_readers),
        BlockMetadata(num_rows=None, size_bytes=chunk_bytes, input_files=None, exec_stats=None),
    )

    class Steps(Datasource):
        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(self, parallelism: int, **_: Any) -> list[ReadTask]:
            return [task]

    with warnings.catch_warnings():
        # There is no other way yet to turn off Ray's retries. A retried task begins at the first step of the run and
        # reads everything again; this module starts a new one where the lost one stopped.
        warnings.simplefilter("ignore", DeprecationWarning)
        dataset = read_datasource(
            Steps(), override_num_blocks=1, num_cpus=_READER_CPUS, ray_remote_args={"max_retries": 0}
        )
    context = dataset.context
    context.target_max_block_size = 1  # a block a chunk: each is passed on as soon as it is there
    context.enable_progress_bars = False
    context.custom_execution_callback_classes = [Pace]
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ExecutionResources.for_limits(
        cpu=_READER_CPUS, gpu=0, object_store_memory=max(64 * 2**20, 8 * chunk_bytes)
    )
    return dataset.streaming_split(1)[0]


def _read_chunks(
    spec: dict[str, Any], lanes: list[int], start: int, end: int, number: int, num_readers: int
) -> Iterator[pa.Table]:
    """Body of a read task: one row a chunk, holding all streams of all lanes for a few steps."""
    pa.set_cpu_count(1)
    reader = SampleReader.from_spec(spec)
    size = min(_MAX_CHUNK_STEPS, max(1, _CHUNK_BYTES // _step_bytes(spec, lanes)))
    for first, last in itertools.islice(_chunks(start, end, size), number, None, num_readers):
        micro = [[reader.micro_batch(lane, step) for lane in lanes] for step in range(first, last)]
        flat = [batch for step in micro for batch in step]
        columns: dict[str, pa.Array] = {
            "first": pa.array([first], pa.int64()),
            "last": pa.array([last], pa.int64()),
            "ids": pa.array([json.dumps([batch.ids for batch in flat])], pa.string()),
        }
        for field in flat[0].images:
            pixels = np.stack([batch.images[field] for batch in flat])
            offsets = pa.py_buffer(np.array([0, pixels.nbytes], np.int64))
            columns[f"image:{field}"] = pa.Array.from_buffers(
                pa.large_binary(), 1, [None, offsets, pa.py_buffer(pixels)]
            )
        yield pa.table(columns)


def _chunks(start: int, end: int, size: int) -> Iterator[tuple[int, int]]:
    """Pieces of [start, end): of 1, 2, 4, … and then `size` steps, so that the first one is there soon."""
    now = 1
    while start < end:
        yield start, min(start + now, end)
        start += now
        now = min(2 * now, size)


def _unpack(row: pa.Table, spec: dict[str, Any], lanes: list[int]) -> Iterator[StepBatch]:
    """Inverse of `_read_chunks`. Pixels are copied out of Ray's shared memory, which is read-only and scarce."""
    first, last = row["first"][0].as_py(), row["last"][0].as_py()
    ids = json.loads(row["ids"][0].as_py())
    side = spec["augment"]["size"]
    shape = (last - first, len(lanes), spec["batch"], side, side, 3)
    images = {
        name.removeprefix("image:"): np.frombuffer(row[name][0].as_buffer(), np.uint8).reshape(shape)
        for name in row.column_names
        if name.startswith("image:")
    }
    for index, step in enumerate(range(first, last)):
        yield StepBatch(
            step,
            {
                lane: MicroBatch(
                    {field: pixels[index, place].copy() for field, pixels in images.items()},
                    ids[index * len(lanes) + place],
                )
                for place, lane in enumerate(lanes)
            },
        )


def _step_bytes(spec: dict[str, Any], lanes: list[int]) -> int:
    fields = sum(len(images) for _, images in spec["streams"])
    return len(lanes) * spec["batch"] * fields * spec["augment"]["size"] ** 2 * 3
