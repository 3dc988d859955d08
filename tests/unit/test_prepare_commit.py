"""What `prepare` may delete and replace at its destination."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from models.errors import ConfigError, DataError
from pipelines import prepare, shards
from pipelines.storage import Store
from tests.datasets import keys, write_dataset

FOREIGN = ("shards/train/a/part-00000-ffffffff.parquet", "shards/other.parquet", "table.parquet")


def test_commit__deletes_only_shards_of_the_former_index(tmp_path: Path) -> None:
    new = write_dataset(tmp_path / "new", {"train": {"a": keys("x", 12)}})
    old = write_dataset(tmp_path / "set", {"train": {"a": keys("y", 12)}})
    store = Store(str(tmp_path / "set"))
    for path in FOREIGN:
        store.write(path, b"not ours")
    for info in new.index:
        store.write(info.uri, new.fetch(info))
    index = (tmp_path / "new" / shards.INDEX).read_bytes()
    prepare._commit(store, new.manifest, index)
    kept = {path for path, _ in store.list()}
    assert kept == {*FOREIGN, *(info.uri for info in new.index), shards.INDEX, shards.MANIFEST}
    assert not kept & {info.uri for info in old.index}


def test_commit__without_a_former_dataset_deletes_nothing(tmp_path: Path) -> None:
    new = write_dataset(tmp_path / "new", {"train": {"a": keys("x", 12)}})
    index = (tmp_path / "new" / shards.INDEX).read_bytes()
    store = Store(str(tmp_path / "set"))
    for path in FOREIGN:
        store.write(path, b"not ours")
    store.write(shards.INDEX, index)  # an index alone is no dataset
    prepare._commit(store, new.manifest, index)
    assert {*FOREIGN} < {path for path, _ in store.list()}


@pytest.mark.parametrize("manifest", ["{}", "[1]", "not JSON", json.dumps({"version": 1, "name": "an extension"})])
def test_prepare__a_manifest_of_another_kind_is_refused(tmp_path: Path, manifest: str) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / shards.MANIFEST).write_text(manifest)
    with pytest.raises(ConfigError, match=r"holds a manifest\.json that is not of ours; use another destination"):
        prepare.prepare(str(tmp_path / "src"), str(tmp_path / "set"))
    assert (tmp_path / "set" / shards.MANIFEST).read_text() == manifest


def test_prepare__a_dataset_of_unknown_source_is_refused(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    write_dataset(tmp_path / "set", {"train": {"a": keys("x", 2)}})
    with pytest.raises(ConfigError, match="already holds a dataset prepared from elsewhere"):
        prepare.prepare(str(tmp_path / "src"), str(tmp_path / "set"))


def test_check_share__exactly_the_share_is_allowed(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    bad = [{"code": "E_IMG_SIZE", "path": "x", "reason": "small"}] * 8
    prepare._check_share(bad[:7], 100, 0.07, store)
    with pytest.raises(DataError, match="8 of 100 images"):
        prepare._check_share(bad, 100, 0.07, store)
