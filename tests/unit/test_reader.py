from __future__ import annotations

import os
import shutil
from collections import Counter

import numpy as np
import pytest

from models.batch import Paired, Unpaired
from models.errors import DataError, ImageError
from pipelines import shards
from pipelines.reader import SampleReader, iterate_split
from pipelines.shard_cache import DiskCache, ShardSource
from pipelines.transforms import AugmentConfig
from tests.datasets import keys, tinted, write_dataset

PLAIN = AugmentConfig(32)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    train = {"a": keys("a", 57), "b": keys("b", 23), "left": keys("p", 31), "right": keys("p", 31)}
    return write_dataset(tmp_path_factory.mktemp("set"), {"train": train, "test": {"a": keys("t", 12)}})


def reader(dataset, batch_type=Unpaired, domains=("a", "b"), **changes):
    options = {"lanes": 1, "batch": 4, "augment": PLAIN, "seed": 3, "window_shards": 2} | changes
    return SampleReader(dataset, streams=batch_type.streams, domains=domains, **options)


def same(first, second) -> bool:
    return first.ids == second.ids and all(np.array_equal(first.images[f], second.images[f]) for f in first.images)


def test_micro_batch__gives_the_pixels_of_its_keys(dataset):
    micro = reader(dataset).micro_batch(0, 5)
    for field in ("a", "b"):
        assert micro.images[field].shape == (4, 32, 32, 3)
        assert micro.images[field].dtype == np.uint8
        for key, pixels in zip(micro.ids[field], micro.images[field], strict=True):
            np.testing.assert_array_equal(pixels, tinted(field, key))


def test_micro_batch__paired_fields_share_keys_and_augmentation(dataset):
    augment = AugmentConfig(32, 40, crop=True, flip=True)
    made = reader(dataset, Paired, ("left", "right"), augment=augment)
    alone = reader(dataset, Paired, ("left", "left"), augment=augment)
    for step in range(10):
        micro, twice = made.micro_batch(0, step), alone.micro_batch(0, step)
        assert set(micro.ids) == {"pair"}
        np.testing.assert_array_equal(twice.images["a"], twice.images["b"])
        np.testing.assert_array_equal(micro.images["a"], twice.images["a"])


def test_micro_batch__each_stream_has_its_own_epochs(dataset):
    made = reader(dataset, batch=1, lanes=3)
    for field, count in (("a", 57), ("b", 23)):
        lengths = [(lane + 1) * count // 3 - lane * count // 3 for lane in range(3)]
        seen = Counter(made.micro_batch(lane, step).ids[field][0] for lane in range(3) for step in range(lengths[lane]))
        assert seen == Counter(keys(field, count))


def test_micro_batch__does_not_depend_on_what_was_read_before(dataset):
    walked, jumped = reader(dataset, lanes=2), reader(dataset, lanes=2)
    expected = {(step, lane): walked.micro_batch(lane, step) for step in range(90) for lane in range(2)}
    for step in (80, 3, 77, 0):
        assert same(jumped.micro_batch(1, step), expected[step, 1])


def test_spec__makes_the_same_reader_elsewhere(dataset):
    made = reader(dataset)
    again = SampleReader.from_spec(made.spec)
    assert all(same(made.micro_batch(0, step), again.micro_batch(0, step)) for step in (0, 9))
    with pytest.raises(DataError, match="has changed since this run began"):
        SampleReader.from_spec({**made.spec, "index_sha256": "0" * 64})


def test_reader__refuses_what_cannot_be_trained_on(dataset):
    with pytest.raises(DataError, match="no domain 'c'"):
        reader(dataset, domains=("a", "c"))
    with pytest.raises(DataError, match="'b' has no images in 'test'"):
        reader(dataset, split="test")
    with pytest.raises(DataError, match="'a' and 'b' are not aligned in 'train'"):
        reader(dataset, Paired)
    with pytest.raises(DataError, match="23 samples for 24 logical ranks"):
        reader(dataset, lanes=24)


def test_iterate_split__every_sample_once_in_stored_order(dataset):
    found = list(iterate_split(dataset, "a", "test", 32))
    assert [key for key, _ in found] == sorted(keys("t", 12), key=shards.key_order)
    assert all(np.array_equal(pixels, tinted("a", key)) for key, pixels in found)
    assert next(iter(iterate_split(dataset, "a", "test", 48)))[1].shape == (48, 48, 3)


def test_micro_batch__a_changed_shard_is_refused_by_name(dataset, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(dataset.uri, copy)
    opened = shards.open_dataset(str(copy))
    for info in opened.shards("b", "train"):
        data = bytearray((copy / info.uri).read_bytes())
        data[len(data) // 2] ^= 1
        (copy / info.uri).write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"part-0000") as caught:
        reader(opened).micro_batch(0, 0)
    assert caught.value.code == "E_SHARD_DIGEST"


def test_iterate_split__an_undecodable_image_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.datasets.encode", lambda pixels: b"\x89PNG\r\n\x1a\nnothing")
    broken = write_dataset(tmp_path, {"test": {"a": ["x"]}})
    with pytest.raises(ImageError, match=r"part-00000-\w+\.parquet: row 0 \('x'\)"):
        list(iterate_split(broken, "a", "test", 32))


class Counting:
    """A dataset's `fetch`, counted."""

    def __init__(self, dataset):
        self.dataset, self.calls = dataset, []

    def __call__(self, shard):
        self.calls.append(shard.uri)
        return self.dataset.fetch(shard)


def test_disk_cache__fetches_once_and_notices_damage(dataset, tmp_path, capsys):
    fetch = Counting(dataset)
    cache = DiskCache(tmp_path / "cache", 10**9)
    shard = dataset.shards("a", "train")[0]
    expected = dataset.fetch(shard)
    assert cache.get(shard, fetch) == cache.get(shard, fetch) == expected
    assert DiskCache(tmp_path / "cache", 10**9).get(shard, fetch) == expected
    assert len(fetch.calls) == 1
    (tmp_path / "cache" / f"{shard.sha256}.parquet").write_bytes(expected[:-1])
    assert cache.get(shard, fetch) == expected
    assert len(fetch.calls) == 2
    assert "was damaged" in capsys.readouterr().err


def test_disk_cache__evicts_the_least_recently_used(dataset, tmp_path):
    fetch = Counting(dataset)
    first, second, third, *_ = dataset.shards("a", "train")
    cache = DiskCache(tmp_path, first.bytes + second.bytes + third.bytes // 2)
    for number, shard in enumerate((first, second)):
        cache.get(shard, fetch)
        os.utime(tmp_path / f"{shard.sha256}.parquet", (number, number))
    cache.get(first, fetch)  # now the second is the oldest
    cache.get(third, fetch)
    assert [cache.holds(shard) for shard in (first, second, third)] == [True, False, True]
    assert not list(tmp_path.glob("*.tmp"))


def test_disk_cache__a_full_disk_does_not_stop_reading(dataset, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    cache = DiskCache(tmp_path, 10**9)
    shard = dataset.shards("a", "train")[0]
    with monkeypatch.context() as patched:
        patched.setattr("os.replace", full)
        assert cache.get(shard, dataset.fetch) == dataset.fetch(shard)
    assert "No space left" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.parquet"))


def test_disk_cache__a_directory_that_cannot_be_made_is_one_warning(dataset, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    cache = DiskCache(tmp_path / "file", 10**9)
    for shard in dataset.shards("a", "train")[:2]:
        assert cache.get(shard, dataset.fetch) == dataset.fetch(shard)
        assert not cache.holds(shard)
    err = capsys.readouterr().err
    assert err.count("cannot be written") == 1
    assert len(err.splitlines()) == 1


def test_shard_source__memory_is_bounded(dataset):
    source = ShardSource(dataset, None, 0)
    source.reserve(3)
    for shard in dataset.shards("a", "train"):
        source.table(shard)
    assert len(source._tables) == 3


@pytest.mark.parametrize("disk", [True, False])
def test_reader__a_remote_dataset_is_fetched_ahead_once_per_node(dataset, tmp_path, monkeypatch, disk):
    """Run on local files that pretend to be far away."""
    monkeypatch.setattr("pipelines.shard_cache.parse_uri", lambda uri: ("s3", uri))
    fetched: list[str] = []
    original = shards.Dataset.fetch
    monkeypatch.setattr(shards.Dataset, "fetch", lambda self, shard: fetched.append(shard.uri) or original(self, shard))
    cache_dir = str(tmp_path / "cache") if disk else None
    near = SampleReader.from_spec(reader(dataset).spec)
    far = reader(dataset, cache_dir=cache_dir)
    near._source.remote = False
    far.micro_batch(0, 0)
    far._source._pool.shutdown(wait=True)
    far._source._pool = None
    fetched_at_first = len(fetched)
    assert fetched_at_first >= 6, "two windows of two shards of a, three shards of b"
    for step in range(60):
        assert same(far.micro_batch(0, step), near.micro_batch(0, step))
    if disk:
        fetched.clear()
        again = reader(dataset, cache_dir=cache_dir)
        for step in range(60):
            again.micro_batch(0, step)
        assert not fetched
        again.close()
    far.close()
