from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.errors import ConfigError
from pipelines.transforms import AugmentConfig, augment, augment_config


def gradient(height: int, width: int) -> np.ndarray:
    """Every pixel tells where it was: channel 0 is the row, 1 the column."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = np.arange(height)[:, None]
    image[..., 1] = np.arange(width)
    return image


def at(images, config, position, **changes):
    return augment(images, config, **{"seed": 1, "stream": "a", "lane": 0, "position": position} | changes)


def test_augment_config__jitter_is_286_of_256():
    assert augment_config("jitter", 256) == AugmentConfig(256, 286, crop=True, flip=True)
    assert augment_config("jitter", 64).load_size == 72
    assert augment_config("flip", 64) == AugmentConfig(64, None, crop=False, flip=True)
    assert augment_config("none", 64) == AugmentConfig(64)


def test_augment_config__unknown_mode_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'jitter'"):
        augment_config("jiter", 64)
    with pytest.raises(ConfigError, match="load_size 32 is smaller than size 64"):
        AugmentConfig(64, 32)


def test_augment__none_is_the_identity_at_the_right_size():
    image = gradient(64, 64)
    np.testing.assert_array_equal(at([image], augment_config("none", 64), 7)[0], image)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**40), st.integers(0, 10**9), st.integers(32, 80), st.integers(0, 40))
def test_augment__is_a_crop_and_a_flip_alike_for_all_images(seed, position, size, spare):
    config = AugmentConfig(size, size + spare, crop=True, flip=True)
    image = gradient(size + spare, size + spare)
    first, second = at([image, 255 - image], config, position, seed=seed)
    np.testing.assert_array_equal(first, 255 - second)
    assert first.shape == (size, size, 3)
    assert first.flags.c_contiguous
    top, left = int(first[..., 0].min()), int(first[..., 1].min())
    window = image[top : top + size, left : left + size]
    assert any(np.array_equal(first, candidate) for candidate in (window, window[:, ::-1]))


def test_augment__choices_cover_the_range_and_depend_on_every_part_of_the_key():
    config = AugmentConfig(60, 64, crop=True, flip=True)
    image = gradient(64, 64)
    found = [at([image], config, position)[0] for position in range(400)]
    corners = {(int(f[..., 0].min()), int(f[..., 1].min()), bool(f[0, 0, 1] > f[0, -1, 1])) for f in found}
    assert len(corners) == 5 * 5 * 2
    for change in ({"seed": 2}, {"stream": "b"}, {"lane": 1}):
        other = [at([image], config, position, **change)[0] for position in range(400)]
        assert sum(np.array_equal(x, y) for x, y in zip(found, other, strict=True)) < 40


def test_augment__sides_of_any_length_become_the_square():
    (result,) = at([gradient(40, 90)], augment_config("jitter", 64), 0)
    assert result.shape == (64, 64, 3)
    assert result.dtype == np.uint8
