from __future__ import annotations

import hashlib
import os
import signal
import time

import numpy as np
import pytest

from models.batch import Paired, Unpaired
from models.errors import DataError
from pipelines import shards
from pipelines.reader import SampleReader
from pipelines.stream import ReadAhead, StepBatch, local_stream, ray_stream
from pipelines.transforms import augment_config
from tests.datasets import keys, write_dataset

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    train = {"a": keys("a", 70), "b": keys("b", 43), "left": keys("p", 31), "right": keys("p", 31)}
    return write_dataset(tmp_path_factory.mktemp("set"), {"train": train}, rows_per_shard=16)


def make_reader(dataset, batch_type=Unpaired, domains=("a", "b"), lanes=2):
    return SampleReader(
        dataset,
        streams=batch_type.streams,
        domains=domains,
        lanes=lanes,
        batch=3,
        augment=augment_config("jitter", 32),
        seed=5,
    )


def digest(batch: StepBatch, lane: int) -> str:
    h = hashlib.sha256(repr(sorted(batch.micro[lane].ids.items())).encode())
    for field in sorted(batch.micro[lane].images):
        pixels = batch.micro[lane].images[field]
        h.update(f"{field}{pixels.shape}{pixels.dtype}".encode() + pixels.tobytes())
    return h.hexdigest()


def order(stream) -> dict[tuple[int, int], str]:
    """(step, lane) → digest of what was received; the steps must come in order."""
    batches = list(stream)
    assert [b.step for b in batches] == list(range(batches[0].step, batches[0].step + len(batches)))
    return {(batch.step, lane): digest(batch, lane) for batch in batches for lane in batch.micro}


def consume(spec, lanes, start, end, readers):
    """A worker: what the loop of one training process does."""
    return order(ray_stream(spec, lanes, start, end, readers))


@pytest.mark.parametrize(("batch_type", "domains"), [(Unpaired, ("a", "b")), (Paired, ("left", "right"))])
def test_ray_stream__is_byte_identical_to_the_local_one(ray_session, dataset, batch_type, domains):
    import ray

    reader = make_reader(dataset, batch_type, domains)
    expected = order(local_stream(reader, [0, 1], 7, 160))
    assert len(expected) == 2 * 153
    worker = ray.remote(num_cpus=0.5)(consume)
    assert ray.get(worker.remote(reader.spec, [0, 1], 7, 160, 1)) == expected


def test_ray_stream__two_workers_with_a_lane_each_are_one_with_both(ray_session, dataset):
    import ray

    spec = make_reader(dataset).spec
    worker = ray.remote(num_cpus=0.5)(consume)
    one, first, second = ray.get(
        [worker.remote(spec, [0, 1], 0, 90, 2), worker.remote(spec, [0], 0, 90, 1), worker.remote(spec, [1], 0, 90, 1)]
    )
    assert first | second == one
    assert set(first) == {(step, 0) for step in range(90)}


def test_ray_stream__reads_s3_through_the_cache_of_the_node(ray_session, s3, dataset, tmp_path):
    train = {"a": keys("a", 70), "b": keys("b", 43)}
    uri = s3.uri("stream/set")
    far = make_reader(write_dataset(uri, {"train": train}, rows_per_shard=16))
    far.cache_dir = str(tmp_path / "cache")
    near = order(local_stream(make_reader(dataset), [1], 0, 40))
    assert order(ray_stream(far.spec, [1], 0, 40)) == near
    held = {path.stem for path in (tmp_path / "cache").glob("*.parquet")}
    assert held == {shard.sha256 for shard in far.dataset.index}
    secret = s3.env["AWS_SECRET_ACCESS_KEY"]
    assert secret not in repr(far.spec)


def test_ray_stream__pixels_may_be_written_to(ray_session, dataset):
    stream = ray_stream(make_reader(dataset).spec, (0,), 0, 3)
    for batch in stream:
        assert all(pixels.flags.writeable for pixels in batch.micro[0].images.values())


def test_ray_stream__an_error_of_the_data_arrives_as_itself(ray_session, tmp_path):
    dataset = write_dataset(tmp_path, {"train": {"a": keys("a", 20), "b": keys("b", 20)}})
    spec = make_reader(dataset).spec
    for info in dataset.index:
        (tmp_path / info.uri).unlink()
    with pytest.raises(DataError) as caught:
        list(ray_stream(spec, [0], 0, 10))
    assert caught.value.code == "E_SHARD_MISSING"
    assert "part-0000" in caught.value.message


def read_chunks_and_tell(path, original, *arguments):
    path.write_text(str(os.getpid()))
    yield from original(*arguments)


def test_ray_stream__a_killed_reader_is_replaced_and_nothing_is_lost(ray_session, dataset, tmp_path, monkeypatch):
    from functools import partial

    from pipelines import stream as module

    told = tmp_path / "pid"
    monkeypatch.setattr(module, "_read_chunks", partial(read_chunks_and_tell, told, module._read_chunks))
    reader = make_reader(dataset)
    # More steps than can be buffered: the reader is at work when it is killed.
    steps = 5000
    received = {}
    for batch in ray_stream(reader.spec, [0], 0, steps):
        received[batch.step, 0] = digest(batch, 0)
        if batch.step == 40:
            os.kill(int(told.read_text()), signal.SIGKILL)
            told.unlink()
    assert told.exists(), "a second reader was started"
    assert list(received) == [(step, 0) for step in range(steps)]
    for step in (39, 40, 41, 100, 3000, steps - 1):
        micro = reader.micro_batch(0, step)
        assert received[step, 0] == digest(StepBatch(step, {0: micro}), 0)


def test_ray_stream__stops_early_without_a_trace(ray_session, dataset):
    stream = ray_stream(make_reader(dataset).spec, [0], 0, 10**6)
    started = time.monotonic()
    assert next(stream).step == 0
    assert time.monotonic() - started < 60, "the length of a run must not delay its start"
    stream.close()
    assert next(stream, None) is None
    assert not stream._thread.is_alive()


def test_local_stream__reads_a_bounded_number_ahead_and_stops(dataset, monkeypatch):
    reader = make_reader(dataset)
    asked = []
    original = SampleReader.micro_batch
    monkeypatch.setattr(
        SampleReader, "micro_batch", lambda self, lane, step: asked.append(step) or original(self, lane, step)
    )
    stream = local_stream(reader, [1], 0, 10**6)
    assert next(stream).step == 0
    time.sleep(0.3)
    assert max(asked) <= 6
    stream.close()
    assert next(stream, None) is None


def test_local_stream__an_empty_range_ends_at_once(dataset):
    assert list(local_stream(make_reader(dataset), [0], 5, 5)) == []


def test_read_ahead__an_error_comes_after_the_items_before_it():
    def produce():
        yield 1
        raise ValueError("broken")

    items = ReadAhead(produce, 3)
    assert next(items) == 1
    with pytest.raises(ValueError, match="broken"):
        next(items)
    assert list(items) == []


def test_stream__no_stall_at_the_end_of_an_epoch(dataset):
    """43 samples of b, 3 a step: an epoch ends every 14 steps. Nothing may wait there."""
    gaps = []
    last = time.perf_counter()
    for _ in local_stream(make_reader(dataset, lanes=1), [0], 0, 300):
        now = time.perf_counter()
        gaps.append(now - last)
        last = now
    ends = [step for step in range(20, 300) if (3 * step) // 43 != (3 * (step - 1)) // 43]
    assert np.median([gaps[step] for step in ends]) < 5 * np.median(gaps[20:]) + 0.005


def test_spec__is_plain(dataset):
    import json

    spec = make_reader(dataset).spec
    assert json.loads(json.dumps(spec)) == spec
    assert shards.open_dataset(spec["uri"]).manifest.digest == spec["index_sha256"]
