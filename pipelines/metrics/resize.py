"""Resizing as the scores define it: a separable product with fixed matrices, the same on every machine and library."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor


@functools.lru_cache(maxsize=32)
def resize_matrix(old: int, new: int) -> Tensor:
    """(new, old) float32, rows sum to 1: exact area averages where `new` <= `old`, else linear interpolation between
    pixel centres."""
    weights = np.zeros((new, old))
    scale = old / new
    for row in range(new):
        if new <= old:
            start, end = row * scale, (row + 1) * scale
            for column in range(int(start), min(int(np.ceil(end)), old)):
                weights[row, column] = min(end, column + 1) - max(start, column)
        else:
            centre = min(max((row + 0.5) * scale - 0.5, 0.0), old - 1.0)
            left = min(int(centre), old - 2) if old > 1 else 0
            weights[row, left] = 1 - (centre - left)
            if old > 1:
                weights[row, left + 1] = centre - left
    return torch.from_numpy(weights / weights.sum(axis=1, keepdims=True)).float()


def resize_area(images: Tensor, size: int) -> Tensor:
    """(n, c, h, w) → (n, c, size, size); the aspect ratio is not kept."""
    height, width = images.shape[-2:]
    if height != size:
        images = resize_matrix(height, size).to(images) @ images
    if width != size:
        images = images @ resize_matrix(width, size).to(images).T
    return images
