"""`prepare` and `inspect` on real Ray: local folders and S3, good input and bad."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from models import codec
from models.errors import ConfigError, DataError
from pipelines import prepare as prepare_module
from pipelines import ray_tasks, shards
from pipelines.inspect import inspect_dataset
from pipelines.prepare import PrepareResult, prepare
from pipelines.storage import Store
from tests.s3 import S3Server

pytestmark = pytest.mark.usefixtures("ray_session")


def fill(folder: Path, keys: list[str], seed: int, size: tuple[int, int] = (40, 40), format: str = "png") -> None:
    """Write one random image for each key."""
    rng = np.random.default_rng(seed)
    for key in keys:
        file = folder / f"{key}.{format}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(codec.encode(rng.integers(0, 256, (*size, 3), np.uint8), format))


def keys(count: int, prefix: str = "") -> list[str]:
    return [f"{prefix}{i:03d}" for i in range(count)]


def rows(dataset: shards.Dataset, domain: str, split: str) -> dict[str, bytes]:
    tables = [shards.read_shard(dataset.fetch(shard)) for shard in dataset.shards(domain, split)]
    return {key: image for t in tables for key, image in zip(t["key"].to_pylist(), t["image"].to_pylist(), strict=True)}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two unequal domains: 100 JPEG, 60 PNG."""
    fill(tmp_path / "src/photo", keys(100, "p"), 1, format="jpeg")
    fill(tmp_path / "src/drawing", keys(60, "d"), 2, (48, 64))
    return tmp_path / "src"


def test_prepare__every_image_arrives_in_its_own_encoding(photos: Path, tmp_path: Path) -> None:
    (photos / "notes.txt").write_text("not an image")
    (photos / "photo/.DS_Store").write_bytes(b"\0")
    result = prepare(str(photos), str(tmp_path / "set"), licence="CC0-1.0")
    dataset = shards.open_dataset(str(tmp_path / "set"))
    assert isinstance(result, PrepareResult)
    assert result.digest == dataset.manifest.digest
    assert sum(result.domains["photo"].values()) == 100
    assert sum(result.domains["drawing"].values()) == 60
    assert set(result.domains["photo"]) == {"train", "val", "test"}
    assert (result.quarantined, result.skipped, result.aligned) == (0, {".txt": 1, "hidden": 1}, ())
    assert Path(result.report).read_text() == ""
    assert (dataset.manifest.licence, dataset.manifest.size) == ("CC0-1.0", None)
    assert dataset.manifest.provenance["source"] == str(photos)
    for domain, suffix in (("photo", "jpeg"), ("drawing", "png")):
        stored = {
            key: image for split in dataset.manifest.splits for key, image in rows(dataset, domain, split).items()
        }
        assert stored == {f.stem: codec.strip(f.read_bytes()) for f in (photos / domain).glob(f"*.{suffix}")}


def test_prepare__twice_gives_the_same_and_reuses(photos: Path, tmp_path: Path) -> None:
    first = prepare(str(photos), str(tmp_path / "one"))
    other = prepare(str(photos), str(tmp_path / "two"))
    again = prepare(str(photos), str(tmp_path / "one"))
    assert first.digest == other.digest == again.digest
    assert (first.reused, again.reused) == (0, again.shards)
    smaller = prepare(str(photos), str(tmp_path / "one"), size=32)
    assert smaller.digest != first.digest
    files = {path for path, _ in Store(str(tmp_path / "one")).list("shards")}
    assert files == {shard.uri for shard in shards.open_dataset(str(tmp_path / "one")).index}


def test_prepare__one_truncated_image_is_listed_and_the_rest_kept(photos: Path, tmp_path: Path) -> None:
    broken = photos / "photo/p042.jpeg"
    broken.write_bytes(broken.read_bytes()[:700])
    result = prepare(str(photos), str(tmp_path / "set"))
    assert sum(result.domains["photo"].values()) == 99
    assert result.quarantined == 1
    (line,) = Path(result.report).read_text().splitlines()
    row = json.loads(line)
    assert (row["path"], row["code"], row["bytes"]) == ("photo/p042.jpeg", "E_IMG_TRUNCATED", 700)
    assert "ends too early" in row["reason"]


def test_prepare__too_many_bad_files(photos: Path, tmp_path: Path) -> None:
    for name in keys(4, "p"):
        (photos / f"photo/{name}.jpeg").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"4 of 160 images \(2\.5 %\) could not be used, more than --max-bad 0\.01"
    ) as caught:
        prepare(str(photos), str(tmp_path / "set"))
    assert caught.value.code == "E_DATA_BAD"
    assert len((tmp_path / "set/quarantine/report.jsonl").read_text().splitlines()) == 4
    assert not (tmp_path / "set/manifest.json").exists()
    assert prepare(str(photos), str(tmp_path / "set"), max_bad=0.05).quarantined == 4


def test_prepare__select_makes_unpaired_halves_and_leaves_test_aligned(tmp_path: Path) -> None:
    for domain, seed in (("color", 1), ("mono", 2)):
        fill(tmp_path / "src/train" / domain, keys(80), seed)
        fill(tmp_path / "src/test" / domain, keys(10, "t"), seed + 10)
    (tmp_path / "half_a.txt").write_text("\n".join(keys(80)[::2]) + "\n")
    (tmp_path / "half_b.txt").write_text("# the others\n" + "\n".join(keys(80)[1::2]) + "\n\n")
    select = {"color": str(tmp_path / "half_a.txt"), "mono": str(tmp_path / "half_b.txt")}
    result = prepare(str(tmp_path / "src"), str(tmp_path / "set"), select=select, val=0.2)
    assert result.aligned == ("test",)
    dataset = shards.open_dataset(str(tmp_path / "set"))
    seen = {
        domain: set(rows(dataset, domain, "train")) | set(rows(dataset, domain, "val")) for domain in ("color", "mono")
    }
    assert seen == {"color": set(keys(80)[::2]), "mono": set(keys(80)[1::2])}
    assert list(rows(dataset, "color", "test")) == list(rows(dataset, "mono", "test"))
    assert dataset.manifest.size == (40, 40)


def test_prepare__paired_keeps_complete_pairs(tmp_path: Path) -> None:
    fill(tmp_path / "src/a", keys(60), 1)
    fill(tmp_path / "src/b", keys(60), 2)
    (tmp_path / "src/a/007.png").write_bytes(b"broken")
    result = prepare(str(tmp_path / "src"), str(tmp_path / "set"), layout="paired")
    assert result.domains["a"] == result.domains["b"]
    assert sum(result.domains["a"].values()) == 59
    assert result.aligned == ("train", "val", "test")
    assert result.warnings == ("1 usable images were left out, because a partner could not be used",)
    loose = prepare(str(tmp_path / "src"), str(tmp_path / "loose"))
    assert sum(loose.domains["b"].values()) == 60
    assert any("no longer aligned" in warning for warning in loose.warnings)
    (tmp_path / "src/b/007.png").unlink()
    with pytest.raises(DataError, match="are not paired in"):
        prepare(str(tmp_path / "src"), str(tmp_path / "set"), layout="paired")


def test_prepare__side_by_side_is_found_and_cut(tmp_path: Path) -> None:
    fill(tmp_path / "src/train", keys(30), 1, (40, 80))
    fill(tmp_path / "src/test", keys(5), 2, (40, 80))
    result = prepare(str(tmp_path / "src"), str(tmp_path / "set"), val=0.2)
    assert result.layout == "side-by-side"
    assert result.aligned == ("train", "val", "test")
    dataset = shards.open_dataset(str(tmp_path / "set"))
    whole = codec.decode((tmp_path / "src/test/003.png").read_bytes())
    assert np.array_equal(codec.decode(rows(dataset, "a", "test")["003"]), whole[:, :40])
    assert np.array_equal(codec.decode(rows(dataset, "b", "test")["003"]), whole[:, 40:])


def test_prepare__several_shards_are_aligned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "src/a", keys(150), 1)
    fill(tmp_path / "src/b", keys(150), 2)
    monkeypatch.setattr(prepare_module.curate, "_SHARD_BYTES", 64 * 4800)
    prepare(str(tmp_path / "src"), str(tmp_path / "set"), val=0, test=0)
    dataset = shards.open_dataset(str(tmp_path / "set"))
    assert dataset.manifest.rows_per_shard == 64
    assert [shard.rows for shard in dataset.shards("a", "train")] == [64, 64, 22]
    for one, other in zip(dataset.shards("a", "train"), dataset.shards("b", "train"), strict=True):
        assert shards.read_shard(dataset.fetch(one))["key"] == shards.read_shard(dataset.fetch(other))["key"]
    report = inspect_dataset(str(tmp_path / "set"), verify=True)
    assert (report["verified_shards"], report["verified_images"]) == (6, 300)


def test_prepare__from_s3_to_s3(photos: Path, tmp_path: Path, s3: S3Server) -> None:
    source = s3.put(photos, "prepare/source")
    here = prepare(str(photos), str(tmp_path / "set"))
    there = prepare(source, s3.uri("prepare/set"))
    assert there.digest == here.digest
    sheet = tmp_path / "sheet.png"
    report = inspect_dataset("s3://prepare/set", verify=True, sheet=str(sheet))
    assert report["verified_images"] == 160
    assert report["splits"]["train"]["photo"]["count"] == here.domains["photo"]["train"]
    assert report["sizes"]["drawing"]["smallest"] == [48, 64]
    assert codec.decode(sheet.read_bytes()).shape[2] == 3
    assert prepare(source, "s3://prepare/set").reused == there.shards


def test_inspect__a_damaged_shard_is_found(photos: Path, tmp_path: Path) -> None:
    prepare(str(photos), str(tmp_path / "set"))
    shard = shards.open_dataset(str(tmp_path / "set")).shards("photo", "train")[0]
    file = tmp_path / "set" / shard.uri
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    with pytest.raises(DataError, match=shard.uri) as caught:
        inspect_dataset(str(tmp_path / "set"), verify=True)
    assert caught.value.code == "E_SHARD_DIGEST"
    assert prepare(str(photos), str(tmp_path / "set")).reused == 5
    assert inspect_dataset(str(tmp_path / "set"), verify=True)["verified_shards"] == 6


def test_prepare__a_dying_worker_is_one_error(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ray_tasks._DOING, "_exit", "checking images")
    monkeypatch.setattr(ray_tasks, "_run_block", lambda table, name: os._exit(1))
    monkeypatch.setattr(prepare_module.ingest, "check_files", os._exit)
    with pytest.raises(Exception, match="a worker died while it was checking images") as caught:
        prepare(str(photos), str(tmp_path / "set"))
    assert getattr(caught.value, "code", None) == "E_IMG_DECODER"
    assert not (tmp_path / "set/manifest.json").exists()


def test_prepare__refusals_name_the_place(photos: Path, tmp_path: Path, s3: S3Server) -> None:
    dest = str(tmp_path / "set")

    def refused(code: str, words: str, src: object = photos, to: str = dest, **options: object) -> None:
        with pytest.raises((DataError, ConfigError)) as caught:
            prepare(str(src), to, **options)  # pyright: ignore[reportArgumentType]
        assert caught.value.code == code
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)

    refused("E_DATA_EMPTY", "does not exist", tmp_path / "nowhere")
    refused("E_DATA_EMPTY", "is not a folder", photos / "photo/p001.jpeg")
    refused("E_URI", "'s4://bucket/x'", "s4://bucket/x")
    refused("E_BUCKET", "s3://no-such-bucket/x", "s3://no-such-bucket/x")
    refused("E_BUCKET", "s3://no-such-bucket/y", to="s3://no-such-bucket/y")
    refused("E_DATA_EMPTY", "s3://prepare/nothing", s3.uri("prepare/nothing"))
    refused("E_CONFIG", "overlap", to=str(photos / "set"))
    refused("E_CONFIG", "--size", size=5)
    refused("E_CONFIG", "--max-bad", max_bad=2)
    refused("E_CONFIG", "--val", val=-1)
    refused("E_CONFIG", "did you mean 'paired'", layout="pairs")
    refused("E_CONFIG", "no domain 'foto'; did you mean 'photo'", select={"foto": __file__})
    refused("E_NOT_FOUND", "--select photo=", select={"photo": str(tmp_path / "no.txt")})
    (photos / "empty").mkdir()
    refused("E_DATA_EMPTY", "domain 'empty' is empty")
    (photos / "empty").rmdir()
    (photos / "twin").symlink_to(photos / "photo")
    refused("E_DATA_SAME", "domains 'photo' and 'twin' hold the same 100 images")
    (photos / "twin").unlink()
    for file in (photos / "drawing").iterdir():
        file.write_bytes(b"junk")
    refused("E_DATA_EMPTY", "domain 'drawing' is empty", max_bad=1.0)
    assert not (tmp_path / "set/manifest.json").exists()


def test_prepare__another_dataset_is_not_overwritten(photos: Path, tmp_path: Path) -> None:
    prepare(str(photos), str(tmp_path / "set"))
    fill(tmp_path / "other/a", keys(5), 1)
    fill(tmp_path / "other/b", keys(5), 2)
    with pytest.raises(ConfigError, match="already holds a dataset prepared from"):
        prepare(str(tmp_path / "other"), str(tmp_path / "set"))
