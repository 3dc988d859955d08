"""Loss terms as pure functions; each returns an unweighted scalar in float32, whatever the type of its input.

`Logits` is the output of a discriminator before any sigmoid, of any shape; means run over all its elements.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

GanMode = Literal["vanilla", "lsgan", "hinge"]
GAN_MODES: tuple[GanMode, ...] = ("vanilla", "lsgan", "hinge")


def gan_real(mode: GanMode, logits: Tensor) -> Float[Tensor, ""]:
    """What a discriminator pays on real images: softplus(−ℓ), (ℓ−1)² or max(0, 1−ℓ), mean over the map.

    Source: Goodfellow et al. 2014; Mao et al. 2017; Lim and Ye 2017.
    """
    logits = logits.float()
    if mode == "vanilla":
        return F.softplus(-logits).mean()
    if mode == "lsgan":
        return (logits - 1).square().mean()
    return F.relu(1 - logits).mean()


def gan_fake(mode: GanMode, logits: Tensor) -> Float[Tensor, ""]:
    """What a discriminator pays on generated images: softplus(ℓ), ℓ² or max(0, 1+ℓ), mean over the map."""
    logits = logits.float()
    if mode == "vanilla":
        return F.softplus(logits).mean()
    if mode == "lsgan":
        return logits.square().mean()
    return F.relu(1 + logits).mean()


def gan_generator(mode: GanMode, logits: Tensor) -> Float[Tensor, ""]:
    """What a generator pays for the logits of its images: softplus(−ℓ) (non-saturating), (ℓ−1)² or −ℓ."""
    if mode == "hinge":
        return -logits.float().mean()
    return gan_real(mode, logits)


def l1(x: Tensor, y: Tensor) -> Float[Tensor, ""]:
    """Mean absolute difference over all elements, >= 0."""
    return (x.float() - y.float()).abs().mean()


def total(terms: dict[str, Tensor], weights: dict[str, float]) -> Float[Tensor, ""]:
    """Σ weight × term in float32; the only weighted sum of the project."""
    parts = [weights[name] * term for name, term in terms.items()]
    return torch.stack(parts).sum()
