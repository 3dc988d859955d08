"""Shards, index, manifest; and the Ray-free parts of prepare: layouts, splits, pairs, cuts."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from models import codec
from models.errors import ConfigError, DataError
from pipelines import curate, ingest, layout, shards
from pipelines.ingest import Checked
from pipelines.layout import Sample
from pipelines.storage import Store


def small_dataset(root: Path, keys: dict[str, list[str]], rows: int = 64) -> shards.Dataset:
    """A dataset of made-up bytes: domain → keys of its train split."""
    store, infos, splits = Store(str(root)), [], {"train": {}}
    for domain, names in keys.items():
        ordered = sorted(names, key=shards.key_order)
        for part, first in enumerate(range(0, len(ordered), rows)):
            here = ordered[first : first + rows]
            raw = shards.write_shard(here, [name.encode() for name in here])
            sha256 = hashlib.sha256(raw).hexdigest()
            uri = shards.shard_path("train", domain, part, sha256)
            store.write(uri, raw)
            infos.append(shards.ShardInfo(domain, "train", part, uri, len(here), len(raw), sha256))
        count = sum(info.domain == domain for info in infos)
        splits["train"][domain] = {"count": len(names), "shards": count, "keys_sha256": shards.keys_digest(ordered)}
    index = shards.write_index(infos)
    manifest = shards.Manifest(rows, tuple(keys), splits, hashlib.sha256(index).hexdigest(), size=(64, 64))
    store.write(shards.INDEX, index)
    store.write(shards.MANIFEST, manifest.to_json().encode())
    return shards.open_dataset(str(root))


def test_shard__same_rows_same_bytes_and_row_groups() -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    keys, images = [f"k{i}" for i in range(150)], [bytes([i]) * 100 for i in range(150)]
    raw = shards.write_shard(keys, images)
    assert raw == shards.write_shard(keys, images)
    file = pq.ParquetFile(pa.BufferReader(raw))
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [64, 64, 22]
    column = file.metadata.row_group(0).column(1)
    assert (column.compression, column.has_dictionary_page, column.statistics) == ("UNCOMPRESSED", False, None)
    table = shards.read_shard(raw)
    assert table["key"].to_pylist() == keys
    assert table["image"].to_pylist() == images


def test_open_dataset__round_trip(tmp_path: Path) -> None:
    dataset = small_dataset(
        tmp_path, {"a": [f"{i}" for i in range(150)], "b": [f"{i}" for i in range(150)], "c": ["x"]}
    )
    assert dataset.manifest == shards.Manifest.from_json(dataset.manifest.to_json())
    assert dataset.manifest.size == (64, 64)
    assert [shard.part for shard in dataset.shards("a", "train")] == [0, 1, 2]
    assert [shard.rows for shard in dataset.shards("a", "train")] == [64, 64, 22]
    assert dataset.manifest.count("a", "train") == 150
    assert dataset.manifest.count("a", "test") == 0
    assert dataset.manifest.aligned(("a", "b"), "train")
    assert not dataset.manifest.aligned(("a", "c"), "train")
    assert not dataset.manifest.aligned(("a", "b"), "test")
    for one, other in zip(dataset.shards("a", "train"), dataset.shards("b", "train"), strict=True):
        assert shards.read_shard(dataset.fetch(one))["key"] == shards.read_shard(dataset.fetch(other))["key"]


def test_require__names_domain_and_split(tmp_path: Path) -> None:
    dataset = small_dataset(tmp_path, {"photo": ["1"], "drawing": ["2"]})
    dataset.require("photo", "drawing", split="train")
    with pytest.raises(DataError, match="did you mean 'photo'") as caught:
        dataset.shards("photos", "train")
    assert caught.value.code == "E_DATA_DOMAIN"
    with pytest.raises(DataError, match="domain 'photo' has no images in 'test'") as caught:
        dataset.require("photo", split="test")
    assert caught.value.code == "E_DATA_EMPTY"


def test_open_dataset__faults_are_told_apart(tmp_path: Path) -> None:
    dataset = small_dataset(tmp_path / "set", {"a": ["1"], "b": ["2"]})

    def code(path: Path) -> str:
        with pytest.raises(DataError) as caught:
            shards.open_dataset(str(path))
        return caught.value.code

    assert code(tmp_path / "nothing") == "E_DATA_EMPTY"
    assert code(tmp_path) == "E_DATA_MANIFEST"
    manifest = tmp_path / "set/manifest.json"
    text = manifest.read_text()
    for wrong in ("{", "[]", "{}", json.dumps({**json.loads(text), "version": 99}), text.replace("count", "counts")):
        manifest.write_text(wrong)
        assert code(tmp_path / "set") == "E_DATA_MANIFEST"
    manifest.write_text(text)
    shard = dataset.shards("a", "train")[0]
    file = tmp_path / "set" / shard.uri
    raw = bytearray(file.read_bytes())
    raw[10] ^= 1
    file.write_bytes(raw)
    with pytest.raises(DataError, match="expected") as caught:
        dataset.fetch(shard)
    assert caught.value.code == "E_SHARD_DIGEST"
    file.unlink()
    with pytest.raises(DataError, match=shard.uri) as caught:
        dataset.fetch(shard)
    assert caught.value.code == "E_SHARD_MISSING"
    index = tmp_path / "set/index.parquet"
    index.write_bytes(index.read_bytes() + b"x")
    assert code(tmp_path / "set") == "E_DATA_MANIFEST"


def lay(tmp_path: Path, *paths: str, kind: str = "auto", double: bool = False) -> layout.Layout:
    for path in paths:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        if not path.endswith("/"):
            file.write_bytes(b"x")
        else:
            file.mkdir(exist_ok=True)
    return layout.read_layout(Store(str(tmp_path)), kind, lambda _: double)


def names(found: layout.Layout) -> set[tuple[str, str, str]]:
    return {(sample.domain, sample.split, sample.key) for sample in found.samples}


def test_layout__folders_of_domains(tmp_path: Path) -> None:
    found = lay(tmp_path, "day/1.png", "day/sub/2.JPG", "night/1.png", "day/Thumbs.db", ".git/x.png", "readme.txt")
    assert names(found) == {("day", "", "1"), ("day", "", "sub/2"), ("night", "", "1")}
    assert found.given == frozenset()
    assert dict(found.skipped) == {"hidden": 2, ".txt": 1}


@pytest.mark.parametrize(
    "paths",
    [
        ("train/a/1.png", "train/b/2.png", "test/a/3.png", "test/b/3.png"),
        ("a/train/1.png", "b/train/2.png", "a/test/3.png", "b/test/3.png"),
        ("trainA/1.png", "trainB/2.png", "testA/3.png", "testB/3.png"),
    ],
)
def test_layout__folders_of_splits(tmp_path: Path, paths: tuple[str, ...]) -> None:
    found = lay(tmp_path, *paths)
    assert names(found) == {("a", "train", "1"), ("b", "train", "2"), ("a", "test", "3"), ("b", "test", "3")}
    assert found.given == {"train", "test"}


@pytest.mark.parametrize("prefix", ["", "train/"])
def test_layout__side_by_side(tmp_path: Path, prefix: str) -> None:
    found = lay(tmp_path, f"{prefix}1.jpg", double=True)
    split = prefix.rstrip("/")
    assert found.kind == "side-by-side"
    assert {(s.domain, s.split, s.key, s.half) for s in found.samples} == {
        ("a", split, "1", "left"),
        ("b", split, "1", "right"),
    }


@pytest.mark.parametrize(
    ("paths", "code", "words"),
    [
        ((), "E_DATA_EMPTY", "no images below"),
        (("notes.txt",), "E_DATA_EMPTY", "only 1 other files"),
        (("a/1.png",), "E_DATA_LAYOUT", "one domain only"),
        (("a/1.png", "b/"), "E_DATA_EMPTY", "domain 'b' is empty"),
        (("a/1.png", "b/notes.txt"), "E_DATA_EMPTY", "domain 'b' is empty"),
        (("1.png", "2.png"), "E_DATA_LAYOUT", "in no folder of a domain"),
        (("a/1.png", "b/1.png", "loose.png"), "E_DATA_LAYOUT", "loose.png"),
        (("train/a/1.png", "train/b/1.png", "extra/1.png"), "E_DATA_LAYOUT", "extra"),
        (("train/1.png", "train/b/1.png"), "E_DATA_LAYOUT", "train/1.png"),
        (("a,b/1.png", "c/1.png"), "E_NAME", "a,b"),
    ],
)
def test_layout__refusals_say_why(tmp_path: Path, paths: tuple[str, ...], code: str, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        lay(tmp_path, *paths)
    assert caught.value.code == code


def test_layout__unknown_kind(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'paired'"):
        lay(tmp_path, kind="pair")


def made(domain: str, count: int, split: str = "", prefix: str = "") -> list[Sample]:
    return [Sample(f"{domain}/{prefix}{i}.png", 10, domain, split, f"{prefix}{i}") for i in range(count)]


def test_cut_splits__by_hash_of_the_key_in_every_domain() -> None:
    samples = layout.cut_splits(made("a", 1000) + made("b", 500), frozenset(), val=0.05, test=0.1, seed=0)
    of = {domain: {s.key: s.split for s in samples if s.domain == domain} for domain in "ab"}
    assert all(of["a"][key] == split for key, split in of["b"].items())
    shares = {split: sum(value == split for value in of["a"].values()) / 1000 for split in ("test", "val")}
    assert shares["test"] == pytest.approx(0.1, abs=0.03)
    assert shares["val"] == pytest.approx(0.05, abs=0.02)
    again = layout.cut_splits(made("a", 1000), frozenset(), val=0.05, test=0.1, seed=0)
    assert {s.key: s.split for s in again} == of["a"]
    other = layout.cut_splits(made("a", 1000), frozenset(), val=0.05, test=0.1, seed=1)
    assert {s.key: s.split for s in other} != of["a"]


def test_cut_splits__given_folders_are_kept() -> None:
    samples = made("a", 100, "train") + made("a", 10, "test", "t")
    cut = layout.cut_splits(samples, frozenset({"train", "test"}), val=0.2, test=0.5, seed=0)
    assert sum(s.split == "test" for s in cut) == 10
    assert 5 < sum(s.split == "val" for s in cut) < 40
    whole = layout.cut_splits(
        samples + made("a", 3, "val", "v"), frozenset({"train", "val"}), val=0.2, test=0.5, seed=0
    )
    assert sum(s.split == "val" for s in whole) == 3


@pytest.mark.parametrize("count", [3, 4, 10, 20])
def test_cut_splits__small_domains_get_one_of_each(count: int) -> None:
    cut = layout.cut_splits(made("a", count), frozenset(), val=0.05, test=0.1, seed=0)
    assert {s.split for s in cut} == {"train", "val", "test"}


def test_cut_splits__groups_stay_together() -> None:
    samples = [Sample(f"a/p{i // 5}_{i}.png", 1, "a", "", f"p{i // 5}_{i}") for i in range(200)]
    cut = layout.cut_splits(samples, frozenset(), val=0.2, test=0.2, seed=0, group=r"^(p\d+)_")
    assert all(len({s.split for s in cut[i : i + 5]}) == 1 for i in range(0, 200, 5))
    assert {s.split for s in cut} == {"train", "val", "test"}


@pytest.mark.parametrize("options", [{"val": -0.1}, {"test": 1.0}, {"val": 0.6, "test": 0.4}, {"group": "("}])
def test_cut_splits__impossible_options(options: dict[str, object]) -> None:
    arguments = {"val": 0.05, "test": 0.1, "seed": 0, "group": None} | options
    with pytest.raises(ConfigError):
        layout.cut_splits(made("a", 5), frozenset(), **arguments)  # pyright: ignore[reportArgumentType]


def test_select_keys__limits_train_and_leaves_test() -> None:
    samples = made("a", 10, "train") + made("b", 10, "train") + made("a", 5, "test", "t")
    kept, warnings = layout.select_keys(samples, {"a": frozenset({"1", "2", "nope"})})
    assert {s.key for s in kept if s.domain == "a" and s.split == "train"} == {"1", "2"}
    assert sum(s.domain == "b" for s in kept) == 10
    assert sum(s.split == "test" for s in kept) == 5
    assert warnings == ["--select: 1 keys listed for 'a' do not exist, as 'nope'"]
    with pytest.raises(ConfigError, match="there is no domain 'c'"):
        layout.select_keys(samples, {"c": frozenset({"1"})})
    with pytest.raises(DataError, match="its keys look like '0'"):
        layout.select_keys(samples, {"a": frozenset({"x"})})


def checked_of(samples: list[Sample], **bad: str) -> dict[str, Checked]:
    good = {s.path: Checked(s.path, "", "", 64, 64, 5000, s.path) for s in samples}
    return good | {path: Checked(path, code, "why") for path, code in bad.items()}


def test_separate__bad_files_and_second_names() -> None:
    samples = [*made("a", 3), Sample("a/1.jpg", 7, "a", "", "1")]
    checked = checked_of(samples) | {"a/2.png": Checked("a/2.png", "E_IMG_EMPTY", "empty")}
    good, bad = curate.separate(samples, checked, layout.find_duplicate_keys(samples))
    assert [s.path for s in good] == ["a/0.png", "a/1.png"]
    assert [(row["path"], row["code"], row["bytes"]) for row in bad] == [
        ("a/1.jpg", "E_DATA_KEY", 7),
        ("a/2.png", "E_IMG_EMPTY", 10),
    ]


def test_complete_pairs__drops_partners_and_refuses_unpaired() -> None:
    samples = made("a", 5, "train") + made("b", 5, "train")
    kept, dropped = curate.complete_pairs(samples[1:], samples, "SRC")
    assert dropped == 1
    assert {s.key for s in kept} == {"1", "2", "3", "4"}
    with pytest.raises(DataError, match=r"not paired in train: 1 of 5 keys are in one only, as '4' \('a', not 'b'\)"):
        curate.complete_pairs(samples, samples[:-1], "SRC")


def test_check_content__same_folder_twice_and_leaks() -> None:
    twice = made("a", 5, "train") + made("b", 5, "train")
    same = {s.path: Checked(s.path, "", "", 64, 64, 1, s.key) for s in twice}
    with pytest.raises(DataError, match="'a' and 'b' hold the same 5 images"):
        curate.check_content(twice, same, ())
    leak = made("a", 5, "train") + made("a", 3, "test", "t")
    digests = {s.path: Checked(s.path, "", "", 64, 64, 1, s.key.lstrip("t")) for s in leak}
    with pytest.raises(DataError, match="all 3 images of test are in train too"):
        curate.check_content(leak, digests, ())
    one = digests | {s.path: dataclasses.replace(digests[s.path], digest=s.path) for s in leak[6:]}
    assert curate.check_content(leak, one, ("test",)) == [
        "domain 'a': 1 files of test are the same as files of train",
        "test: the domains are no longer aligned, because files could not be used; "
        "--layout paired keeps complete pairs only",
    ]


def test_rows_per_shard__fills_8_to_16_mb_of_the_largest_images() -> None:
    samples = made("small", 100) + made("large", 100)
    checked = checked_of(samples)
    for sample in samples[100:]:
        checked[sample.path] = dataclasses.replace(checked[sample.path], stored_bytes=100_000)
    rows = curate.rows_per_shard(samples, checked)
    assert rows % shards.ROW_GROUP == 0
    assert 8e6 <= rows * 100_000 <= 16.8e6
    unmeasured = {path: dataclasses.replace(found, stored_bytes=0) for path, found in checked.items()}
    assert curate.rows_per_shard(samples, unmeasured) == round(12 * 1024**2 / (64 * 64 * 1.5) / 64) * 64


def test_plan_shards__constant_rows_and_aligned_order() -> None:
    tasks = curate.plan_shards(made("a", 150, "train") + list(reversed(made("b", 150, "train"))), 64)
    by_domain = {domain: [task for task in tasks if task.domain == domain] for domain in "ab"}
    assert [len(task.keys) for task in by_domain["a"]] == [64, 64, 22]
    assert [task.keys for task in by_domain["a"]] == [task.keys for task in by_domain["b"]]


def test_normalise__keeps_plain_encodings_and_shrinks_the_rest() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 128, 3), np.uint8)
    jpeg, png = codec.encode(pixels, "jpeg"), codec.encode(pixels)
    assert ingest.normalise(jpeg) == codec.strip(jpeg)
    assert ingest.normalise(png, size=64) == png
    assert codec.decode(ingest.normalise(png, size=32)).shape == (32, 64, 3)
    assert np.array_equal(codec.decode(ingest.normalise(png, half="left")), pixels[:, :64])
    assert np.array_equal(codec.decode(ingest.normalise(png, half="right")), pixels[:, 64:])
    webp = codec.encode(pixels, "webp")
    assert np.array_equal(codec.decode(ingest.normalise(webp)), codec.decode(webp))
    assert codec.probe(ingest.normalise(webp)).format == "png"


def test_check_file__tells_faults_and_facts(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    pixels = np.random.default_rng(0).integers(0, 256, (48, 80, 3), np.uint8)
    store.write("good.png", codec.encode(pixels))
    store.write("cut.jpg", codec.encode(pixels, "jpeg")[:900])
    store.write("odd.png", codec.encode(pixels[:, :79]))
    good = ingest.check_file(store, "good.png", None, False)
    assert (good.code, good.height, good.width) == ("", 48, 80)
    assert good.stored_bytes == len(codec.encode(pixels))
    assert ingest.check_file(store, "cut.jpg", None, False).code == "E_IMG_TRUNCATED"
    assert ingest.check_file(store, "gone.png", None, False).code == "E_NOT_FOUND"
    assert ingest.check_file(store, "odd.png", None, True).code == "E_IMG_SIZE"
    assert ingest.check_file(store, "good.png", None, True).width == 40


def test_write_shard__reuses_and_notices_changes(tmp_path: Path) -> None:
    source, dest = Store(str(tmp_path / "src")), str(tmp_path / "dest")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    source.write("a/1.png", codec.encode(pixels))
    task = {"domain": "a", "split": "train", "part": 0, "keys": ["1"], "paths": ["a/1.png"], "half": ""}
    first = ingest.write_shard(source.uri, dest, task, None)
    again = ingest.write_shard(source.uri, dest, task, None)
    assert not first["reused"]
    assert again["reused"]
    assert first["sha256"] == again["sha256"]
    source.write("a/1.png", b"garbage")
    with pytest.raises(DataError, match=r"a/1\.png changed while it was being prepared"):
        ingest.write_shard(source.uri, dest, task, None)
