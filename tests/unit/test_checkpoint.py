from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from models.errors import CheckpointError, StorageError
from pipelines import checkpoint
from pipelines.storage import Store


def _write(store: Store, step: int) -> str:
    name = checkpoint.new_name(step)
    files = {
        checkpoint.STATE: checkpoint.pack({"w": torch.full((3,), float(step))}),
        "pools-1.safetensors": checkpoint.pack({"b.images": torch.ones(1)}),
        checkpoint.META: json.dumps({"step": step}).encode(),
    }
    checkpoint.commit(store, name, checkpoint.write_part(store, name, files))
    return name


def _path(store: Store, name: str, file: str) -> Path:
    return Path(store.uri, "checkpoints", name, file)


def _names(store: Store) -> set[str]:
    return {path.split("/")[1] for path, _ in store.list("checkpoints")}


def test_latest__is_the_newest(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    assert checkpoint.latest(store) is None
    for step in (10, 9, 100):
        _write(store, step)
    found = checkpoint.latest(store)
    assert found is not None
    assert found.step == 100
    assert torch.equal(found.shared["w"], torch.full((3,), 100.0))
    assert torch.equal(found.pools[1]["b.images"], torch.ones(1))


def test_commit__keeps_the_last_two(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    names = [_write(store, step) for step in range(1, 6)]
    assert _names(store) == set(names[-2:])


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "no COMPLETE", "broken COMPLETE"])
def test_latest__falls_back_to_the_one_before_and_says_why(tmp_path: Path, capsys, damage: str) -> None:
    store = Store(str(tmp_path))
    _write(store, 1)
    newest = _write(store, 2)
    state = _path(store, newest, checkpoint.STATE)
    raw = bytearray(state.read_bytes())
    if damage == "flip":
        raw[-1] ^= 1
        state.write_bytes(raw)
    elif damage == "cut":
        state.write_bytes(raw[:-1])
    elif damage == "remove":
        state.unlink()
    elif damage == "no COMPLETE":
        _path(store, newest, checkpoint.COMPLETE).unlink()
    else:
        _path(store, newest, checkpoint.COMPLETE).write_text("{")
    found = checkpoint.latest(store)
    assert found is not None
    assert found.step == 1
    assert f"checkpoint {newest} is skipped" in capsys.readouterr().err


def test_commit__refuses_a_file_that_did_not_arrive_whole(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    _write(store, 1)
    name = checkpoint.new_name(2)
    digests = checkpoint.write_part(store, name, {checkpoint.STATE: b"state"})
    _path(store, name, checkpoint.STATE).write_bytes(b"statf")
    with pytest.raises(CheckpointError, match="could not be verified"):
        checkpoint.commit(store, name, digests)
    found = checkpoint.latest(store)
    assert found is not None
    assert found.step == 1


class _DyingStore(Store):
    """Stops working after some operations that change it, as a killed process does."""

    left = 10**9

    def _spend(self) -> None:
        if self.left == 0:
            raise StorageError("killed here")
        self.left -= 1

    def write(self, path: str, data: bytes) -> None:
        self._spend()
        super().write(path, data)

    def write_new(self, path: str, data: bytes) -> bool:
        self._spend()
        return super().write_new(path, data)

    def delete(self, path: str) -> None:
        self._spend()
        super().delete(path)


def test_commit__killed_between_any_two_writes_loses_nothing(tmp_path: Path) -> None:
    """At every point of the sequence the loader finds the newest checkpoint that was ever complete."""
    for point in range(20):
        store = _DyingStore(str(tmp_path / str(point)))
        _write(store, 1)
        _write(store, 2)
        store.left = point
        died = False
        try:
            _write(store, 3)
        except StorageError:
            died = True
        found = checkpoint.latest(Store(store.uri))
        assert found is not None
        # Three files and COMPLETE: from the fourth write on the new one counts.
        assert found.step == (3 if point >= 4 else 2)
        if not died:
            assert len(_names(store)) == 2
            return
    pytest.fail("the sequence never ended")


def test_discard_after__leaves_two_good_ones_after_a_damaged_one(tmp_path: Path) -> None:
    """A damaged newest one must not take the place of a good one when older ones are deleted."""
    store = Store(str(tmp_path))
    _write(store, 50)
    damaged = _write(store, 100)
    _path(store, damaged, checkpoint.STATE).write_bytes(b"x")
    found = checkpoint.latest(store)
    assert found is not None
    checkpoint.discard_after(store, found)
    good = {_write(store, 60), _write(store, 70)}
    assert _names(store) == good


def test_latest__all_damaged_is_an_error_and_not_a_new_start(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    for step in (1, 2):
        _path(store, _write(store, step), checkpoint.STATE).write_bytes(b"x")
    with pytest.raises(CheckpointError, match="none of 2 checkpoints can be verified"):
        checkpoint.latest(store)


def test_latest__a_store_that_is_out_is_no_damage(tmp_path: Path) -> None:
    class Out(Store):
        def read(self, path: str) -> bytes:
            raise StorageError("the store does not answer")

    _write(Store(str(tmp_path)), 1)
    with pytest.raises(StorageError, match="does not answer"):
        checkpoint.latest(Out(str(tmp_path)))


def test_latest__reads_the_pools_of_the_wanted_ranks_only(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    _write(store, 1)
    found = checkpoint.latest(store, ranks=(0,))
    assert found is not None
    assert found.pools == {}


def test_prune__removes_what_was_begun_earlier_and_never_completed(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    orphan = checkpoint.new_name(1)
    checkpoint.write_part(store, orphan, {checkpoint.STATE: b"x"})
    kept = {_write(store, 2), _write(store, 3)}
    assert _names(store) == kept
