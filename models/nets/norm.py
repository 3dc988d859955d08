"""Normalisation layers. None has running statistics: training and inference compute the same function.

Under autocast statistics are accumulated in float32; the result has the type of the input.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Statistics = Literal["batch", "sample"]


class InstanceNorm(nn.Module):
    """IN: each channel of each image to mean 0, variance 1 (biased, eps 1e-5); no affine parameters.

    Source: Ulyanov et al. 2016.
    """

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        return F.instance_norm(x)


class BatchNorm(nn.Module):
    """BN with scale and shift, without running statistics.

    Args:
        channels: of the input.
        statistics: over what mean and variance are taken while training. `"batch"` is Ioffe and Szegedy 2015;
            `"sample"` takes them per image, which is what batch norm does at batch size 1. In evaluation mode they are
            always per image, so that an output depends on its own input alone.
    """

    def __init__(self, channels: int, statistics: Statistics = "batch") -> None:
        super().__init__()
        self.statistics = statistics
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        if self.training and self.statistics == "batch":
            return F.batch_norm(x, None, None, self.weight, self.bias, training=True)
        return F.instance_norm(x, weight=self.weight, bias=self.bias)
