from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from models import codec
from models.bundle import Bundle, load_bundle, save_bundle
from models.errors import BundleError, ConfigError, ImageError, RequestError
from models.system import Condition
from models.translator import Translator, check_condition
from tests.tiny_system import Tiny, register


def load(tmp_path: Path, **config) -> Bundle:
    system = Tiny(Tiny.Config(**config), ("photo", "drawing")).invert()
    save_bundle(tmp_path / "b", system, size=64, step=1, ema=False)
    return load_bundle(tmp_path / "b")


@pytest.fixture
def translator(tmp_path, monkeypatch) -> Translator:
    register(monkeypatch)
    return Translator(load(tmp_path))


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 35), (101, 32)])
def test_pixels__any_size_is_kept(translator, size):
    image = picture(*size)
    (out,) = translator.pixels([image], Condition(to="drawing"))
    assert out.dtype == np.uint8 and np.array_equal(out, 255 - image)


def test_pixels__directions(translator):
    image = picture(32, 32)
    assert np.array_equal(translator.pixels([image], Condition())[0], 255 - image)
    assert np.array_equal(translator.pixels([image], Condition(to="photo"))[0], image)
    with pytest.raises(RequestError, match="unknown domain 'foto'"):
        translator.pixels([image], Condition(to="foto"))


def test_pixels__order_survives_mixed_shapes_and_small_batches(tmp_path, monkeypatch):
    register(monkeypatch)
    translator = Translator(load(tmp_path), batch=2)
    images = [picture(32, 32 + 3 * (i % 3), i) for i in range(8)]
    for image, out in zip(images, translator.pixels(images, Condition()), strict=True):
        assert np.array_equal(out, 255 - image)


def test_pixels__fixed_size_is_resized_and_back(tmp_path, monkeypatch):
    register(monkeypatch)
    translator = Translator(load(tmp_path, fixed=64))
    flat = np.full((40, 90, 3), 60, np.uint8)
    (out,) = translator.pixels([flat], Condition())
    assert out.shape == (40, 90, 3) and np.all(out == 195)
    assert translator.resizes(40, 90) and not translator.resizes(64, 64)


def test_pixels__bf16_is_close(tmp_path, monkeypatch):
    register(monkeypatch)
    bundle = load(tmp_path)
    image = picture(32, 32)
    reduced = Translator(bundle, precision="bf16").pixels([image], Condition())[0]
    assert np.abs(reduced.astype(int) - (255 - image.astype(int))).max() <= 2
    with pytest.raises(ConfigError, match="unknown precision 'fp16'"):
        Translator(bundle, precision="fp16")


def test_pixels__not_a_number_is_an_error(translator):
    with torch.no_grad():
        translator.system.g_ab.bias.fill_(float("nan"))
    with pytest.raises(BundleError, match="not finite"):
        translator.pixels([picture(32, 32)], Condition())
    with pytest.raises(BundleError, match="not finite"):
        translator.golden()


def test_image_bytes__same_size_and_timings(translator):
    image = picture(50, 70)
    data, info = translator.image_bytes(codec.encode(image, "png"), Condition())
    assert np.array_equal(codec.decode(data), 255 - image)
    assert (info["width"], info["height"], info["resized"]) == (70, 50, False)
    assert min(info["decode_s"], info["model_s"], info["encode_s"]) > 0


def test_image_bytes__limits_hold(translator):
    data = codec.encode(picture(50, 70), "png")
    with pytest.raises(ImageError) as error:
        translator.image_bytes(data, Condition(), limits=codec.Limits(max_pixels=1000))
    assert error.value.code == "E_IMG_PIXELS"


def test_golden__every_direction(translator):
    outputs = translator.golden()
    assert outputs.shape == (2, 64, 64, 3) and np.array_equal(outputs[0], 255 - outputs[1])


NOTHING = {"directions": [], "attributes": [], "style": None}


@pytest.mark.parametrize(
    "condition",
    [
        Condition(seed=1),
        Condition(attributes={"Smiling": 1.0}),
        Condition(reference=torch.zeros(1, 3, 8, 8)),
        Condition(strength=0.5),
    ],
)
def test_check_condition__only_what_is_offered(condition):
    with pytest.raises(RequestError, match=r"leave `\w+` away"):
        check_condition(NOTHING, condition)
    rich = {"attributes": ["Smiling"], "style": {"seed": True, "reference": True}, "strength": True}
    check_condition(rich, condition)


@pytest.mark.parametrize(
    "condition",
    [Condition(attributes={"Smiling": 1.5}), Condition(attributes={"Smiling": float("nan")}), Condition(seed=-1)],
)
def test_check_condition__ranges(condition):
    with pytest.raises(RequestError, match="must be in"):
        check_condition({"attributes": ["Smiling"], "style": {"seed": True}}, condition)
