"""Augmentation, as a pure function of the images and of where in the run they are used.

The published recipe ("jitter"): resize both sides to 286/256 of the size, crop a random square, flip at random.
All images of one sample get the same crop and the same flip.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from models.codec import resize
from models.errors import ConfigError, nearest

MODES = ("none", "flip", "jitter")


@dataclass(frozen=True)
class AugmentConfig:
    """What happens to a decoded image before it is trained on.

    Attributes:
        size: side of the result in pixels; results are square.
        load_size: side that an image is resized to first; `size` where None.
        crop: cut a random square of `size` out of it, else the middle one.
        flip: mirror left and right, with probability ½.
    """

    size: int
    load_size: int | None = None
    crop: bool = False
    flip: bool = False

    def __post_init__(self) -> None:
        if self.load_size is not None and self.load_size < self.size:
            raise ConfigError(
                f"load_size {self.load_size} is smaller than size {self.size}; it must be at least as large",
                code="E_SIZE",
            )


def augment_config(mode: str, size: int, load_size: int | None = None) -> AugmentConfig:
    """The named recipe at a size: "none", "flip", or "jitter" (286/256 of the size, as published, where not given).

    Raises:
        ConfigError: unknown mode.
    """
    if mode not in MODES:
        raise ConfigError(f"unknown augmentation '{mode}'", code="E_CONFIG", hint=nearest(mode, MODES))
    if mode == "jitter":
        return AugmentConfig(size, load_size or (size * 286 + 128) // 256, crop=True, flip=True)
    return AugmentConfig(size, load_size, flip=mode == "flip")


def augment(
    images: Sequence[np.ndarray], config: AugmentConfig, *, seed: int, stream: str, lane: int, position: int
) -> list[np.ndarray]:
    """Images `(h, w, 3)` of one sample → images `(size, size, 3)` of the same type, contiguous.

    The choices depend on (seed, stream, lane, position) alone; sides may differ between the images of a sample.
    """
    load = config.load_size or config.size
    spare = load - config.size
    left, top, mirror = spare // 2, spare // 2, False
    if config.crop or config.flip:
        key = repr(("augment", seed, stream, lane, position)).encode()
        draws = np.frombuffer(hashlib.blake2b(key, digest_size=24).digest(), "<u8")
        if config.crop:
            left, top = int(draws[0]) % (spare + 1), int(draws[1]) % (spare + 1)
        mirror = config.flip and bool(draws[2] >> np.uint64(63))
    results = []
    for image in images:
        if image.shape[:2] != (load, load):
            image = resize(image, load)
        image = image[top : top + config.size, left : left + config.size]
        results.append(np.ascontiguousarray(image[:, ::-1] if mirror else image))
    return results
