from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.bundle import copy_bundle, load_bundle, read_config, save_bundle, update_scores
from models.errors import BundleError
from tests.tiny_system import Tiny, register

DATA = {"uri": "s3://bucket/data", "digest": "abc", "licence": "CC0-1.0"}


@pytest.fixture
def bundle_dir(tmp_path, monkeypatch) -> Path:
    register(monkeypatch)
    torch.manual_seed(1)
    system = Tiny(Tiny.Config(), ("photo", "drawing"))
    save_bundle(tmp_path / "b", system, size=64, step=7, ema=False, data=DATA, weights={"cycle": 10.0})
    return tmp_path / "b"


def test_save_bundle__same_weights_same_bytes(tmp_path, bundle_dir):
    torch.manual_seed(1)
    system = Tiny(Tiny.Config(), ("photo", "drawing")).to(memory_format=torch.channels_last)
    digest = save_bundle(tmp_path / "again", system, size=64, step=9, ema=True)
    raw = (bundle_dir / "weights.safetensors").read_bytes()
    assert digest == hashlib.sha256(raw).hexdigest()
    assert raw == (tmp_path / "again" / "weights.safetensors").read_bytes()


def test_save_bundle__holds_generators_only(bundle_dir):
    names = list(load_file(bundle_dir / "weights.safetensors"))
    assert sorted(names) == ["g_ab.bias", "g_ab.weight", "g_ba.bias", "g_ba.weight"]


def test_load_bundle__gives_back_what_was_saved(bundle_dir):
    torch.manual_seed(1)
    original = Tiny(Tiny.Config(), ("photo", "drawing"))
    bundle = load_bundle(bundle_dir)
    assert bundle.name == "tiny" and bundle.domains == ("photo", "drawing") and bundle.size == 64
    assert isinstance(bundle.system, Tiny) and bundle.system.config == Tiny.Config()
    assert list(bundle.system.networks) == ["g_ab", "g_ba"]
    assert torch.equal(bundle.system.g_ab.weight, original.g_ab.weight)
    assert not bundle.system.training and not any(p.requires_grad for p in bundle.system.parameters())


def test_load_bundle__flipped_bit_is_refused(bundle_dir):
    path = bundle_dir / "weights.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(BundleError, match="damaged or was replaced") as error:
        load_bundle(bundle_dir)
    assert error.value.code == "E_BUNDLE_DIGEST"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"format": 2}, "E_BUNDLE_FORMAT"),
        ({"system": "cyclgan"}, "E_BUNDLE"),
        ({"config": {"widht": 3}}, "E_BUNDLE"),
        ({"weights_sha256": None}, "E_BUNDLE_CONFIG"),
    ],
)
def test_load_bundle__wrong_config_is_refused(bundle_dir, change, code):
    document = json.loads((bundle_dir / "config.json").read_text()) | change
    (bundle_dir / "config.json").write_text(json.dumps(document))
    with pytest.raises(BundleError) as error:
        load_bundle(bundle_dir)
    assert error.value.code == code


@pytest.mark.parametrize("case", ["missing", "extra", "shape", "nan", "garbage"])
def test_load_bundle__wrong_weights_are_refused(bundle_dir, case):
    path = bundle_dir / "weights.safetensors"
    tensors = load_file(path)
    if case == "missing":
        del tensors["g_ab.bias"]
    elif case == "extra":
        tensors["g_xy.bias"] = torch.zeros(3)
    elif case == "shape":
        tensors["g_ab.bias"] = torch.zeros(4)
    elif case == "nan":
        tensors["g_ab.bias"] = torch.full((3,), float("nan"))
    save_file(tensors, path)
    if case == "garbage":
        path.write_bytes(b"\x80\x04pickle")
    document = json.loads((bundle_dir / "config.json").read_text())
    document["weights_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (bundle_dir / "config.json").write_text(json.dumps(document))
    with pytest.raises(BundleError) as error:
        load_bundle(bundle_dir)
    assert error.value.code == "E_BUNDLE_WEIGHTS"


def test_load_bundle__no_bundle_there(tmp_path):
    with pytest.raises(BundleError, match="no such directory"):
        load_bundle(tmp_path / "nothing")
    with pytest.raises(BundleError, match=r"config\.json is missing"):
        load_bundle(tmp_path)


def test_update_scores__weights_stay(bundle_dir):
    before = (bundle_dir / "weights.safetensors").read_bytes()
    update_scores(bundle_dir, {"kid_random_v1": 0.125, "baselines": {"do_nothing": {"l1": 0.25}}})
    assert read_config(bundle_dir)["scores"]["kid_random_v1"] == 0.125
    assert (bundle_dir / "weights.safetensors").read_bytes() == before
    card = (bundle_dir / "card.md").read_text()
    assert "* kid_random_v1: 0.125" in card and "* baselines.do_nothing.l1: 0.25" in card and "CC0-1.0" in card


def test_copy_bundle__verified_and_reused(bundle_dir, tmp_path):
    asked = []

    def read(name: str) -> bytes:
        asked.append(name)
        return (bundle_dir / name).read_bytes()

    first = copy_bundle(read, "s3://bucket/b", tmp_path / "cache")
    again = copy_bundle(read, "s3://bucket/b", tmp_path / "cache")
    assert first == again and asked == ["config.json", "weights.safetensors", "config.json"]
    assert load_bundle(first).sha256 == load_bundle(bundle_dir).sha256
    (first / "weights.safetensors").write_bytes(b"damaged since")
    assert copy_bundle(read, "s3://bucket/b", tmp_path / "cache") == first
    assert load_bundle(first).sha256 == load_bundle(bundle_dir).sha256


def test_copy_bundle__damaged_weights_leave_nothing(bundle_dir, tmp_path):
    def read(name: str) -> bytes:
        return (bundle_dir / name).read_bytes() + (b"x" if name == "weights.safetensors" else b"")

    with pytest.raises(BundleError, match="s3://bucket/b"):
        copy_bundle(read, "s3://bucket/b", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
