from __future__ import annotations

from pathlib import Path

import pytest

from models.bundle import save_bundle
from models.errors import BundleError, StorageError
from pipelines.bundle_uri import find_bundle, local_bundle
from tests.tiny_system import Tiny, register


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    register(monkeypatch)
    save_bundle(tmp_path / "run/bundle", Tiny(Tiny.Config(), ("a", "b")), size=32, step=1, ema=False)
    return tmp_path / "run"


def test_local_bundle__a_run_directory_will_do(run):
    for uri in (run, run / "bundle", f"file://{run}/"):
        assert local_bundle(str(uri)) == run / "bundle"


def test_find_bundle__none_there(tmp_path):
    for place in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(BundleError, match=rf"no bundle at {place}: config\.json is missing"):
            find_bundle(str(place))


def test_local_bundle__a_far_one_is_copied_and_a_cache_in_the_way_is_one_line(run, tmp_path, s3):
    uri = s3.put(run, "bundles/run")
    assert find_bundle(uri) == "s3://bundles/run/bundle"
    copy = local_bundle(uri, tmp_path / "cache")
    assert copy.parent == tmp_path / "cache"
    assert (copy / "config.json").read_bytes() == (run / "bundle/config.json").read_bytes()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot write to the cache"):
        local_bundle(uri, tmp_path / "file")
