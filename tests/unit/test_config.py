from __future__ import annotations

from typing import Any

import pytest

from models.errors import ConfigError
from pipelines.config import RunConfig, default_precision, load_document, merge, parse_settings, resolve


def _options(**changes: Any) -> dict[str, Any]:
    return merge({"name": "cyclegan", "out": "runs/x", "data": {"uri": "data"}}, changes)


def test_resolve__defaults_are_the_published_ones() -> None:
    config = resolve(_options())
    assert config.system["width"] == 64
    assert config.weights == {"adv": 1, "cycle": 10, "identity": 5, "adv_d": 1}
    assert config.train.batch == 1
    assert config.train.steps == 266_800
    assert config.schedule_steps == 266_800


def test_resolve__an_omitted_seed_is_drawn() -> None:
    assert len({resolve(_options()).train.seed for _ in range(4)}) > 1


def test_resolve__round_trips_through_yaml() -> None:
    config = resolve(_options(weights={"cycle": "5"}, train={"steps": 10}))
    assert config.weights["cycle"] == 5.0
    assert RunConfig.from_yaml(config.to_yaml()) == config


def test_resolve__local_uris_are_made_absolute(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = resolve(_options())
    assert config.data.uri == str(tmp_path / "data")
    assert resolve(_options(out="s3://bucket/run")).out == "s3://bucket/run"


def test_resolve__names_every_mistake_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(_options(weights={"cycel": 3, "cycle": -1}, train={"batch": 0, "stepz": 1}, system={"width": "w"}))
    message = str(caught.value)
    assert "unknown setting 'weights.cycel'; did you mean 'cycle'?" in message
    assert "weights.cycle=-1: a finite number of at least 0" in message
    assert "train.batch=0: input should be greater than or equal to 1" in message
    assert "unknown setting 'train.stepz'; did you mean 'steps'?" in message
    assert "system.width=w" in message
    assert "\n" not in message


@pytest.mark.parametrize("weight", ["nan", "inf", "-0.1", "1e-4x", True])
def test_resolve__refuses_impossible_weights(weight: Any) -> None:
    with pytest.raises(ConfigError, match=r"weights\.cycle"):
        resolve({**_options(), "weights": {"cycle": weight}})


@pytest.mark.parametrize("lr", [0, -1, "nan", "inf", "1e-4x"])
def test_resolve__refuses_impossible_learning_rates(lr: Any) -> None:
    with pytest.raises(ConfigError, match="lr"):
        resolve(_options(system={"lr": lr}))


def test_resolve__the_default_batch_suits_the_workers() -> None:
    assert resolve(_options(train={"workers": 4})).train.batch == 4


def test_resolve__nothing_to_train() -> None:
    with pytest.raises(ConfigError, match="every loss weight is 0"):
        resolve(_options(weights={"adv": 0, "cycle": 0, "identity": 0, "adv_d": 0}))


@pytest.mark.parametrize(("size", "layers"), [(16, 3), (20, 3), (32, 4)])
def test_resolve__size_too_small_for_the_patches(size: int, layers: int) -> None:
    with pytest.raises(ConfigError, match=f"size={size} is too small for d_layers={layers}"):
        resolve(_options(system={"size": size, "d_layers": layers}))


def test_resolve__batch_must_suit_the_logical_ranks() -> None:
    with pytest.raises(ConfigError, match=r"batch=3 is not a multiple of train.logical_ranks=2 \(nearest 4\)"):
        resolve(_options(train={"batch": 3, "workers": 2}))
    with pytest.raises(ConfigError, match="cannot be shared evenly by 2 workers"):
        resolve(_options(train={"batch": 3, "workers": 2, "logical_ranks": 3}))


def test_resolve__wrong_size_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"size=66 \(a multiple of 4, nearest 64\)"):
        resolve(_options(system={"size": 66}))
    with pytest.raises(ConfigError, match="size=100 is not a multiple of 64"):
        resolve({**_options(system={"size": 100}), "name": "pix2pix"})


def test_resolve__number_of_domains() -> None:
    with pytest.raises(ConfigError, match="needs 2 different domains"):
        resolve(_options(data={"domains": ("a", "b", "c")}))
    with pytest.raises(ConfigError, match="needs 2 different domains"):
        resolve(_options(data={"domains": ("a", "a")}))


def test_resolve__unknown_system_and_section() -> None:
    with pytest.raises(ConfigError, match="unknown system 'cyclgan'; did you mean 'cyclegan'"):
        resolve({**_options(), "name": "cyclgan"})
    with pytest.raises(ConfigError, match="unknown setting 'trian'; did you mean 'train'"):
        resolve({**_options(), "trian": {}})


def test_schedule__absolute_keeps_the_published_length() -> None:
    short = {"train": {"steps": 100}}
    assert resolve(_options(**short)).schedule_steps == 100
    assert resolve(_options(**short, schedule={"absolute": True})).schedule_steps == 266_800


def test_parse_settings__nested_values() -> None:
    assert parse_settings(["weights.cycle=5", "train.ema=0.999", "system.blocks=null"]) == {
        "weights": {"cycle": 5},
        "train": {"ema": 0.999},
        "system": {"blocks": None},
    }


@pytest.mark.parametrize("setting", ["cycle=5", "weights.cycle", "=5", "weight.cycle=5"])
def test_parse_settings__refuses_what_it_cannot_place(setting: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        parse_settings([setting])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("train:", "section 'train' is not a mapping"),
        ("- a\n- b", "not a mapping"),
        ("a: [", "not YAML"),
        ("a: !!python/object:os.system {}", "not YAML"),
        ("a: &x [1]\nb: *x", "aliases"),
        ("x" * 1_000_001, "at most"),
        (b"\xff\xfe\x00", "UTF-8"),
        ("data: foo", "section 'data' is not a mapping"),
    ],
)
def test_load_document__refuses(text: str | bytes, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        load_document(text)


def test_default_precision__is_one_of_two() -> None:
    assert default_precision(gpu=False) in ("fp32", "bf16")
