"""Scores of outputs against the one true image of each: they need an aligned split.

All take uint8 arrays (n, h, w, 3) and give one number an image, so that errors and ratios can be formed from them.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pipelines.metrics.resize import resize_area

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
THUMBNAIL_PX = 16
_BATCH = 16
_LUMA = (0.299, 0.587, 0.114)


def l1(outputs: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Mean absolute difference of an image, in [0, 1]; (n,)."""
    return _by_batch(lambda x, y: (x - y).abs().mean(dim=(1, 2, 3)), outputs, truth)


def psnr(outputs: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of an image in dB; (n,). 100 at most, which identical images get."""
    mse = _by_batch(lambda x, y: (x - y).square().mean(dim=(1, 2, 3)), outputs, truth)
    return -10.0 * np.log10(np.maximum(mse, 1e-10))


def ssim(outputs: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Structural similarity of an image, mean over channels and over all positions; (n,), at most 1.

    Source: Wang et al. 2004, Eq. 13, K1 = 0.01, K2 = 0.03, Gaussian window of 11 pixels, σ = 1.5, reflected at
    the edges (as torchmetrics has it).
    """
    return _by_batch(_ssim, outputs, truth)


def _ssim(x: Tensor, y: Tensor) -> Tensor:
    n = len(x)
    stacked = torch.cat([x, y, x * x, y * y, x * y])
    mean_x, mean_y, xx, yy, xy = (_blur(stacked)).split(n)
    c1, c2 = 0.01**2, 0.03**2
    top = (2 * mean_x * mean_y + c1) * (2 * (xy - mean_x * mean_y) + c2)
    bottom = (mean_x**2 + mean_y**2 + c1) * (xx - mean_x**2 + yy - mean_y**2 + c2)
    return (top / bottom).mean(dim=(1, 2, 3))


def _blur(images: Tensor) -> Tensor:
    """Gaussian window around every position, separable."""
    offsets = torch.arange(SSIM_WINDOW, dtype=images.dtype) - SSIM_WINDOW // 2
    window = torch.exp(-(offsets**2) / (2 * SSIM_SIGMA**2))
    window /= window.sum()
    flat = torch.nn.functional.pad(images, (SSIM_WINDOW // 2,) * 4, mode="reflect")
    flat = flat.reshape(-1, 1, *flat.shape[-2:])
    flat = torch.nn.functional.conv2d(flat, window.view(1, 1, -1, 1))
    flat = torch.nn.functional.conv2d(flat, window.view(1, 1, 1, -1))
    return flat.reshape(images.shape)


def retrieval_top1(outputs: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """1 for each output whose own true image is the one, of all the true images, that it resembles most; else 0; (n,).

    Resemblance is Pearson's correlation of grey thumbnails of 16 × 16 pixels (area averages). A tie is no success, so a
    blank output has none.
    """
    seen, known = _thumbnails(outputs), _thumbnails(truth)
    correlation = seen @ known.T
    own = correlation.diagonal().copy()
    np.fill_diagonal(correlation, -np.inf)
    return (own > correlation.max(axis=1, initial=-np.inf) + 1e-9).astype(np.float64)


def _thumbnails(images: np.ndarray) -> np.ndarray:
    """(n, 256) rows of mean 0 and length 1; rows of zeros where an image is blank."""
    rows = []
    for start in range(0, len(images), _BATCH):
        x = as_floats(images[start : start + _BATCH])
        grey = (x * torch.tensor(_LUMA, dtype=x.dtype).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)
        rows.append(resize_area(grey, THUMBNAIL_PX).flatten(1))
    flat = torch.cat(rows).double().numpy()
    flat -= flat.mean(axis=1, keepdims=True)
    length = np.linalg.norm(flat, axis=1, keepdims=True)
    return np.where(length > 1e-4, flat / np.maximum(length, 1e-4), 0.0)


def as_floats(images: np.ndarray) -> Tensor:
    """uint8 (n, h, w, 3) → float64 (n, 3, h, w) in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).double() / 255


def _by_batch(score, outputs: np.ndarray, truth: np.ndarray) -> np.ndarray:
    if outputs.shape != truth.shape:
        raise ValueError(f"outputs and true images differ in shape: {outputs.shape} and {truth.shape}")
    steps = range(0, len(outputs), _BATCH)
    return np.concatenate(
        [score(as_floats(outputs[i : i + _BATCH]), as_floats(truth[i : i + _BATCH])).numpy() for i in steps]
    )
