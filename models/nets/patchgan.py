"""The discriminator that judges overlapping patches. Source: Isola et al. 2017, appendix 6.1.2."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from models.nets.norm import BatchNorm, InstanceNorm, Statistics


class PatchGAN(nn.Module):
    """`(n, c, h, w)` → a map of logits `(n, 1, h', w')`, one for each patch.

    Args:
        in_channels: of the image, or of image and condition together.
        width: channels of the first layer (64 in the paper), doubled up to 8 ×.
        layers: strided layers: receptive field 16, 34, **70**, 142, 286 px for 1 to 5; 0 judges single pixels.
        norm: of the layers between the first and the last. With batch norm the convolutions before it have no bias.
        statistics: see `BatchNorm`.
    """

    def __init__(
        self,
        in_channels: int,
        width: int = 64,
        layers: int = 3,
        norm: Literal["batch", "instance"] = "instance",
        statistics: Statistics = "batch",
    ) -> None:
        super().__init__()
        bias = norm == "instance"

        def normed(channels: int) -> nn.Module:
            return BatchNorm(channels, statistics) if norm == "batch" else InstanceNorm()

        if layers == 0:
            self.body = nn.Sequential(
                nn.Conv2d(in_channels, width, 1),
                nn.LeakyReLU(0.2, inplace=True),
                nn.Conv2d(width, 2 * width, 1, bias=bias),
                normed(2 * width),
                nn.LeakyReLU(0.2, inplace=True),
                nn.Conv2d(2 * width, 1, 1, bias=bias),
            )
            return
        body: list[nn.Module] = [nn.Conv2d(in_channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True)]
        channels = width
        for layer in range(1, layers + 1):
            wider = width * min(2**layer, 8)
            stride = 2 if layer < layers else 1
            body += [
                nn.Conv2d(channels, wider, 4, stride=stride, padding=1, bias=bias),
                normed(wider),
                nn.LeakyReLU(0.2, inplace=True),
            ]
            channels = wider
        body.append(nn.Conv2d(channels, 1, 4, padding=1))
        self.body = nn.Sequential(*body)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 1 p q"]:
        return self.body(x)
