from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from models.bundle import read_config, save_bundle
from models.errors import BundleError, ConfigError, DataError, NonFiniteLoss, RequestError
from pipelines.bundle_uri import local_bundle
from pipelines.evaluate import Evaluator, evaluate, save_scores, system_translate
from pipelines.metrics import heldout
from pipelines.shards import Dataset
from tests.datasets import keys, write_dataset
from tests.tiny_system import Tiny, register


@pytest.fixture
def dataset(tmp_path) -> Dataset:
    shared = keys("t", 12)
    return write_dataset(
        tmp_path / "data",
        {
            "train": {"a": keys("a", 25), "b": keys("b", 30)},
            "val": {"a": keys("va", 8), "b": keys("vb", 9)},
            "test": {"a": shared, "b": shared},
        },
    )


@pytest.fixture
def bundle(tmp_path, monkeypatch) -> str:
    register(monkeypatch)
    save_bundle(tmp_path / "bundle", Tiny(Tiny.Config(), ("a", "b")).invert(), size=32, step=1, ema=False)
    return str(tmp_path / "bundle")


def test_evaluate__both_directions_with_baselines(bundle, dataset):
    result = evaluate(bundle, dataset.uri)
    assert (result.split, result.primary) == ("test", "a->b")
    assert set(result.directions) == {"a->b", "b->a"}
    assert set(result.baselines) == {"do_nothing", "random_target", "real"}
    assert {"kid_random_v1", "kid_random_v1_stderr", "frechet_random_v1", "l1", "psnr", "ssim"} < set(result.scores)
    # The way back is the identity, which is what doing nothing means.
    back = result.directions["b->a"]
    assert back["scores"] == pytest.approx(back["baselines"]["do_nothing"], rel=1e-6)
    assert back["ratios"]["l1"]["value"] == pytest.approx(1)
    assert result.scores["l1"] != result.baselines["do_nothing"]["l1"]
    assert result.protocol["reference_images"] == {"a": 25, "b": 30}
    assert result.protocol["held_out_images"] == {"a": 12, "b": 12}
    assert "singular" in result.protocol["frechet"]
    document = result.to_json()
    assert json.loads(json.dumps(document, allow_nan=False)) == document


def test_evaluate__same_seed_same_scores_and_a_direction_of_choice(bundle, dataset):
    first = evaluate(bundle, dataset.uri, source="b", limit=8)
    assert first.primary == "b->a"
    assert set(first.directions) == {"b->a"}
    assert first.protocol["held_out_images"] == {"b": 8}
    assert evaluate(bundle, dataset.uri, source="b", limit=8).to_json() == first.to_json()


def test_evaluate__val_is_not_aligned(bundle, dataset):
    result = evaluate(bundle, dataset.uri, split="val", metrics=["kid", "l1"])
    assert set(result.scores) == {"kid_random_v1", "kid_random_v1_stderr"}
    with pytest.raises(ConfigError, match="not aligned; add one of kid, frechet"):
        evaluate(bundle, dataset.uri, split="val", metrics=["l1"])


def test_evaluate__mistakes(bundle, dataset, tmp_path):
    with pytest.raises(ConfigError, match="cannot evaluate on split 'tests'; did you mean 'test'"):
        evaluate(bundle, dataset.uri, split="tests")
    with pytest.raises(ConfigError, match="unknown feature extractor"):
        evaluate(bundle, dataset.uri, features="inception")
    with pytest.raises(ConfigError, match="cannot score 2 images; allowed: 6 or more"):
        evaluate(bundle, dataset.uri, limit=2)
    with pytest.raises(RequestError, match="unknown domain 'c'"):
        evaluate(bundle, dataset.uri, to="c")
    with pytest.raises(BundleError):
        evaluate(str(tmp_path / "none"), dataset.uri)
    few = write_dataset(
        tmp_path / "few",
        {"train": {"a": keys("a", 3), "b": keys("b", 3)}, "test": {"a": keys("x", 9), "b": keys("x", 9)}},
    )
    with pytest.raises(DataError, match="has 3 images in 'train'; scores need at least 6"):
        evaluate(bundle, few.uri)
    empty = write_dataset(tmp_path / "empty", {"train": {"a": keys("a", 9), "b": keys("b", 9)}})
    with pytest.raises(DataError, match="no held-out images"):
        evaluate(bundle, empty.uri)


def test_evaluate__run_directory_and_data_on_s3(s3, bundle, dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    local = evaluate(bundle, dataset.uri)
    s3.put(tmp_path / "bundle", "scores/run/bundle")
    run = s3.uri("scores/run")
    remote = evaluate(run, s3.put(tmp_path / "data", "scores/data"))
    assert remote.directions == local.directions
    save_scores(run, remote)
    assert read_config(local_bundle(run))["scores"]["l1"] == remote.scores["l1"]


def test_save_scores__tell_how_they_came_about(bundle, dataset, tmp_path):
    result = evaluate(bundle, dataset.uri, limit=8)
    save_scores(str(tmp_path), result)
    stored = read_config(bundle)["scores"]
    assert {name: stored[name] for name in result.scores} == result.scores
    assert (stored["split"], stored["direction"], stored["protocol"]) == ("test", "a->b", result.protocol)
    assert "* protocol.held_out_images.a: 8\n" in (tmp_path / "bundle/card.md").read_text()


def test_evaluator__reads_once_and_gives_flat_numbers(dataset, monkeypatch):
    reads = []
    real = heldout.iterate_split
    monkeypatch.setattr(heldout, "iterate_split", lambda *args: reads.append(args) or real(*args))
    monkeypatch.setattr(heldout, "_references", heldout.OrderedDict())
    evaluator = Evaluator(dataset, size=32, primary_only=True)
    system = Tiny(Tiny.Config(), ("a", "b")).invert()
    first = evaluator(0, system)
    count = len(reads)
    assert evaluator(10, system) == first
    assert len(reads) == count
    assert {"kid_random_v1", "kid_random_v1_ratio", "frechet_random_v1"} <= set(first)
    assert all(isinstance(value, float) and np.isfinite(value) for value in first.values())
    Evaluator(dataset, size=32, primary_only=True)(0, system)
    assert len(reads) == 2 * count - 1  # the reference is shared


def test_evaluator__agrees_with_evaluate(bundle, dataset):
    system = Tiny(Tiny.Config(), ("a", "b")).invert()
    scores = Evaluator(dataset, size=32, split="test")(0, system)
    result = evaluate(bundle, dataset.uri)
    assert scores["kid_random_v1"] == pytest.approx(result.scores["kid_random_v1"])
    assert scores["b->a/l1"] == pytest.approx(result.directions["b->a"]["scores"]["l1"])


def test_system_translate__numbers_that_are_not_finite():
    system = Tiny(Tiny.Config(), ("a", "b")).invert()
    torch.nn.init.constant_(system.g_ab.weight, float("nan"))
    with pytest.raises(NonFiniteLoss, match="a to b"):
        system_translate(system)(np.zeros((2, 32, 32, 3), np.uint8), "a", "b")
