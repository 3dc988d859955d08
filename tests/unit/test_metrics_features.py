from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from models.errors import ConfigError, DataError
from pipelines.metrics.dinov2 import VisionTransformer, sizes
from pipelines.metrics.features import RandomV1, load_extractor, random_v1_weights
from pipelines.metrics.frechet import frechet
from pipelines.metrics.inception import InceptionV3
from pipelines.metrics.kid import kid
from pipelines.metrics.reference import BOUND, Reference, make_reference

RANDOM_V1_SHA256 = "93d05fc02a94faaeb3aae60dce79064ca09f8cc9f68fa6f9c999961ff18bf8ab"


def _strokes(seed: int, n: int, style: str = "line", side: int = 64) -> np.ndarray:
    """Black strokes on white. "line": single; "double": the outline of the same; "red": coloured."""
    rng = np.random.default_rng(seed)
    images = np.full((n, side, side, 3), 255, np.uint8)
    for image in images:
        canvas = np.zeros((side, side), np.uint8)
        points = rng.integers(8, side - 8, (4, 2)).astype(np.int32)
        cv2.polylines(canvas, [points], False, 255, 7, cv2.LINE_AA)
        if style == "double":
            canvas -= cv2.erode(canvas, np.ones((5, 5), np.uint8))
        image[...] = 255 - canvas[..., None] * (np.array([0, 1, 1]) if style == "red" else 1)
    return images


@pytest.fixture(scope="module")
def reference() -> Reference:
    extractor = RandomV1()
    return make_reference("line", extractor, extractor(_strokes(0, 300)))


def _kid(images: np.ndarray, reference: Reference) -> float:
    return kid(reference.features_of(images), reference.features, y_sums=reference.sums).value


def test_random_v1__weights_are_those_of_version_1():
    assert RandomV1().digest == RANDOM_V1_SHA256


def test_random_v1__filters_are_orthonormal_and_half_of_the_first_blind_to_flat_colour():
    weights = random_v1_weights()
    for w in weights:
        rows = w.reshape(len(w), -1).astype(np.float64)
        assert np.abs(rows @ rows.T - np.eye(len(w))).max() < 1e-4
    assert np.abs(weights[0][: RandomV1.CONTRAST_FILTERS].mean(axis=(2, 3))).max() < 1e-5


def test_random_v1__an_image_does_not_depend_on_its_batch():
    extractor, images = RandomV1(), _strokes(3, 20)
    together = extractor(images)
    assert together.shape == (20, 448)
    assert np.allclose(together[17:], extractor(images[17:]), atol=1e-5)


def test_random_v1__any_size():
    assert RandomV1()(_strokes(3, 2, side=100)).shape == (2, 448)
    assert RandomV1()(np.zeros((1, 33, 70, 3), np.uint8)).shape == (1, 448)


def test_random_v1__real_images_are_near_and_other_styles_far(reference):
    real, double, red = (_kid(_strokes(1, 150, style), reference) for style in ("line", "double", "red"))
    assert abs(real) < 0.02
    assert min(double, red) > 50 * abs(real)
    assert min(double, red) > 0.5
    assert _kid(np.full((150, 64, 64, 3), 255, np.uint8), reference) > double


@pytest.mark.parametrize("harm", ["blur", "noise", "mix"])
def test_random_v1__scores_worsen_with_the_harm(harm, reference):
    images, other = _strokes(1, 100), _strokes(1, 100, "double")
    rng = np.random.default_rng(0)
    series = []
    for level in (0, 1, 2, 4):
        harmed = images.copy()
        if harm == "mix":
            harmed[: 25 * level] = other[: 25 * level]
        elif level and harm == "blur":
            harmed = np.stack([cv2.GaussianBlur(image, (0, 0), 0.4 * level) for image in images])
        elif level:
            harmed = np.clip(images + rng.normal(0, 8 * level, images.shape), 0, 255).round().astype(np.uint8)
        features = reference.features_of(harmed)
        series.append((kid(features, reference.features).value, frechet(features, reference.gaussian)))
    for values in zip(*series, strict=True):
        assert list(values) == sorted(values)
        assert values[-1] > values[0] + 0.1


def test_reference__features_are_bounded_and_a_constant_domain_is_no_trouble():
    extractor = RandomV1()
    blank = make_reference("blank", extractor, extractor(np.full((8, 64, 64, 3), 255, np.uint8)))
    features = blank.features_of(_strokes(0, 8))
    assert np.isfinite(features).all()
    assert np.abs(features).max() <= BOUND


def test_reference__without_rows_keeps_the_scale(reference):
    rest = reference.without(np.array([0, 5]))
    assert len(rest.features) == len(reference.features) - 2
    assert rest.location is reference.location


@pytest.mark.parametrize("spec", ["random_v2", "inception", "random_v1:x", ""])
def test_load_extractor__unknown(spec):
    with pytest.raises(ConfigError, match="known: dinov2:URI, inception:URI, random_v1"):
        load_extractor(spec)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_load_extractor__inception_from_a_file(tmp_path, suffix):
    torch.manual_seed(0)
    state = {**InceptionV3().state_dict(), "fc.weight": torch.zeros(1000, 2048), "AuxLogits.fc.bias": torch.zeros(1)}
    path = tmp_path / f"weights.{suffix}"
    torch.save(state, path) if suffix == "pth" else save_file(state, path)
    extractor = load_extractor(f"inception:{path}")
    features = extractor(_strokes(0, 2))
    assert features.shape == (2, 2048)
    assert np.isfinite(features).all()
    assert sum(p.numel() for p in InceptionV3().parameters()) == 21_785_568  # torchvision's, less fc and AuxLogits
    assert extractor.describe()["standardised"] == "no"


def _vit(**changes: int) -> VisionTransformer:
    torch.manual_seed(0)
    network = VisionTransformer(**{"width": 128, "depth": 2, "hidden": 512, "patch": 14, "positions": 26} | changes)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return network


@pytest.mark.parametrize("registers", [0, 4])
def test_load_extractor__dinov2_sizes_are_read_off_the_weights(tmp_path, registers):
    network = _vit(registers=registers)
    path = tmp_path / "vit.pth"
    torch.save({**network.state_dict(), "mask_token": torch.zeros(1, 128)}, path)
    features = load_extractor(f"dinov2:{path}")(_strokes(0, 3))
    assert features.shape == (3, 128)
    assert features.std(axis=0).mean() > 0
    assert sizes(network.state_dict(), "x")["depth"] == 2


def test_dinov2__small_has_its_published_size():
    small = VisionTransformer(width=384, depth=12, hidden=1536, patch=14, positions=1370)
    assert sum(p.numel() for p in small.parameters()) == 22_056_576 - 384  # without the mask token


def test_load_extractor__wrong_weights_are_named(tmp_path):
    state = _vit().state_dict()
    del state["norm.weight"]
    torch.save(state, tmp_path / "vit.pth")
    with pytest.raises(DataError, match=r"a DINOv2 transformer: missing: norm\.weight"):
        load_extractor(f"dinov2:{tmp_path}/vit.pth")
    with pytest.raises(DataError, match=r"Inception-v3 .*missing: .* more"):
        load_extractor(f"inception:{tmp_path}/vit.pth")


def test_load_extractor__missing_damaged_or_unsafe_files(tmp_path):
    with pytest.raises(DataError, match=r"none\.pth"):
        load_extractor(f"inception:{tmp_path}/none.pth")
    (tmp_path / "bad.pth").write_bytes(b"not weights")
    (tmp_path / "bad.safetensors").write_bytes(b"not weights")
    torch.save({"a": np.random.default_rng}, tmp_path / "code.pth")
    (tmp_path / "name-0cc3c7bd.pth").write_bytes(b"not weights")
    for name, message in (
        ("bad.pth", "cannot read weights"),
        ("bad.safetensors", "cannot read weights"),
        ("code.pth", "cannot read weights"),
        ("name-0cc3c7bd.pth", "not what its name says"),
    ):
        with pytest.raises(DataError, match=message):
            load_extractor(f"inception:{tmp_path}/{name}")
