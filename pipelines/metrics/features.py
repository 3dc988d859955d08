"""Feature extractors: images → vectors in which sets of images are compared.

An extractor is named in every score that rests on it (`kid_random_v1`). `load_extractor` knows

    random_v1          the embedded default: no file needed, see `RandomV1`
    inception:URI      Inception-v3 with torchvision's weights, read from a file; scores comparable with published ones
    dinov2:URI         DINOv2 vision transformer with the published weights, read from a file
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.errors import ConfigError, nearest
from pipelines.metrics.resize import resize_area

KINDS = ("random_v1", "inception:URI", "dinov2:URI")


class Extractor:
    """Base of the extractors.

    Attributes:
        name: part of the name of a score.
        digest: sha256 of the weights, hexadecimal.
        standardised: whether features are to be standardised by the target's training images (see
            `pipelines.metrics.reference`); published scores on Inception and DINOv2 use them as they are.
        protocol: how an image is brought to the network, in words.
    """

    name: str
    digest: str
    standardised: bool
    protocol: str
    batch = 64
    device: torch.device

    def embed(self, images: Tensor) -> Tensor:
        """uint8 (n, 3, h, w) on `device` → (n, d) float32."""
        raise NotImplementedError

    @torch.inference_mode()
    def __call__(self, images: np.ndarray | Iterable[np.ndarray]) -> np.ndarray:
        """uint8 images, an array (n, h, w, 3) or an iterable of (h, w, 3) of one shape → features (n, d) float64."""
        parts, waiting = [], []
        for image in images:
            waiting.append(image)
            if len(waiting) == self.batch:
                parts.append(self._embed(waiting))
                waiting = []
        if waiting:
            parts.append(self._embed(waiting))
        if not parts:
            raise ValueError("no image to extract features from")
        return np.concatenate(parts)

    def _embed(self, images: list[np.ndarray]) -> np.ndarray:
        batch = torch.from_numpy(np.stack(images)).to(self.device).permute(0, 3, 1, 2)
        return self.embed(batch).double().cpu().numpy()

    def describe(self) -> dict[str, Any]:
        """What a reader of a score must know of the extractor, as JSON."""
        return {
            "extractor": self.name,
            "weights_sha256": self.digest,
            "images": self.protocol,
            "standardised": "by the reference, bounded to (-3, 3)" if self.standardised else "no",
        }


class RandomV1(Extractor):
    """`random_v1`: a convolutional embedding with fixed random weights. No training, no download, the same everywhere.

    Input      resized to 64 × 64 (area averages down, linear up), values / 127.5 - 1, hence in [-1, 1]; 3 channels
    Scale 1    convolution 5 × 5,  3 →  32, at 64 × 64; then y = √2 · max(x, 0)
    Scale 2    mean of 2 × 2 blocks; convolution 3 × 3, 32 →  64, at 32 × 32; the same y
    Scale 3    mean of 2 × 2 blocks; convolution 3 × 3, 64 → 128, at 16 × 16; the same y
    Features   mean over space and standard deviation over space (divisor: count) of y, at each scale:
               32 means, 32 deviations, 64, 64, 128, 128 = 448 numbers

    Convolutions have stride 1, no bias, and reflect at the edge. Weights of a layer, as a matrix with one row a filter:
    normal numbers in row-major order (channels, height, width); in the first layer, the mean over space is then taken
    from each channel of the first 16 filters, which makes them blind to flat colour; rows made orthonormal by modified
    Gram-Schmidt, first to last, in float64; rounded to 5 decimals; cast to float32. Normal numbers: Box-Muller (cosine
    for one, sine for the next) from 53-bit uniforms of numpy's PCG64(1) raw stream, one stream for the three layers.
    The contrast filters and the deviations answer to strokes and edges; the others, and the means, to tone and colour.

    What it is good for: telling which of two sets is nearer to a third, within one dataset. Its values mean nothing
    across datasets and are not comparable with Inception scores. Any change of the above is `random_v2`.
    """

    name = "random_v1"
    standardised = True
    protocol = "64 x 64 px, area averages; values in [-1, 1]"
    batch = 16  # of 64 px: what stays in the cache of a core is twice as fast
    SIZE, SEED, CONTRAST_FILTERS = 64, 1, 16
    LAYERS = ((3, 32, 5), (32, 64, 3), (64, 128, 3))

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        weights = random_v1_weights()
        self.digest = hashlib.sha256(b"".join(w.astype("<f4").tobytes() for w in weights)).hexdigest()
        self.weights = [torch.from_numpy(w).to(self.device, memory_format=torch.channels_last) for w in weights]

    def embed(self, images: Tensor) -> Tensor:
        x = resize_area(images.float() / 127.5 - 1, self.SIZE).contiguous(memory_format=torch.channels_last)
        features = []
        for scale, weight in enumerate(self.weights):
            if scale:
                x = torch.nn.functional.avg_pool2d(x, 2)
            x = torch.nn.functional.pad(x, (weight.shape[-1] // 2,) * 4, mode="reflect")
            x = torch.nn.functional.conv2d(x, weight).relu_().mul_(2**0.5)
            mean = x.mean(dim=(2, 3))
            variance = x.square().mean(dim=(2, 3)) - mean.square()
            features += [mean, variance.clamp(min=0).sqrt()]
        return torch.cat(features, dim=1)


@functools.lru_cache(maxsize=1)
def random_v1_weights() -> list[np.ndarray]:
    """The weights of `RandomV1`, float32 (out, in, k, k) a layer."""
    normal = _Normals(RandomV1.SEED)
    weights = []
    for layer, (inputs, outputs, side) in enumerate(RandomV1.LAYERS):
        w = normal.take(outputs * inputs * side * side).reshape(outputs, inputs, side, side)
        if layer == 0:
            contrast = w[: RandomV1.CONTRAST_FILTERS]
            contrast -= contrast.mean(axis=(2, 3), keepdims=True)
        weights.append(_orthonormal(w.reshape(outputs, -1)).round(5).astype(np.float32).reshape(w.shape))
    return weights


class _Normals:
    """Normal numbers from the raw stream of a bit generator: that numpy keeps stable, its own normals it may change."""

    def __init__(self, seed: int) -> None:
        self._bits = np.random.PCG64(seed)

    def take(self, count: int) -> np.ndarray:
        assert count % 2 == 0, "normal numbers come in pairs"
        uniform = (self._bits.random_raw(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        radius = np.sqrt(-2 * np.log1p(-uniform[0::2]))
        angle = 2 * np.pi * uniform[1::2]
        return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)


def _orthonormal(rows: np.ndarray) -> np.ndarray:
    """Modified Gram-Schmidt. Not a library's QR: signs and last digits of that differ between machines."""
    rows = rows.copy()
    for i in range(len(rows)):
        rows[i] /= np.sqrt((rows[i] * rows[i]).sum())
        rows[i + 1 :] -= (rows[i + 1 :] * rows[i]).sum(axis=1, keepdims=True) * rows[i]
    return rows


def load_extractor(spec: str = "random_v1", device: str | torch.device = "cpu") -> Extractor:
    """The extractor that `spec` names: "random_v1", "inception:URI" or "dinov2:URI" (a .safetensors or .pth file, local
    or s3://).

    Raises:
        ConfigError: no such extractor.
        DataError: the file is missing, or does not hold the weights of that network.
    """
    kind, _, uri = spec.partition(":")
    if kind == "random_v1" and not uri:
        return RandomV1(device)
    if kind in ("inception", "dinov2") and uri:
        from pipelines.metrics import dinov2, inception

        return inception.Inception(uri, device) if kind == "inception" else dinov2.DinoV2(uri, device)
    raise ConfigError(f"unknown feature extractor '{spec}'", code="E_EXTRACTOR", hint=nearest(spec, KINDS))
