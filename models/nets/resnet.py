"""The ResNet generator of Johnson et al. 2016 in CycleGAN's form."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from models.nets.norm import InstanceNorm


class ResidualBlock(nn.Module):
    """R-cyc: conv3–IN–ReLU–conv3–IN, plus the input; reflection padding; nothing after the sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, padding_mode="reflect"),
            InstanceNorm(),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1, padding_mode="reflect"),
            InstanceNorm(),
        )

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        return x + self.body(x)


class ResNetGenerator(nn.Module):
    """conv7–down–down–`blocks` × R-cyc–up–up–conv7–tanh; `(n, c, h, w)` → `(n, c', h, w)` in [-1, 1].

    Args:
        width: channels at full resolution (64 in the paper); doubled at each of the two strided convolutions.
        blocks: residual blocks: 9 at 256 px and above, 6 at 128 px.

    Sides must be multiples of 4.
    """

    def __init__(self, in_channels: int = 3, out_channels: int = 3, width: int = 64, blocks: int = 9) -> None:
        super().__init__()
        w = width
        self.body = nn.Sequential(
            nn.Conv2d(in_channels, w, 7, padding=3, padding_mode="reflect"),
            *_norm_relu(),
            nn.Conv2d(w, 2 * w, 3, stride=2, padding=1),
            *_norm_relu(),
            nn.Conv2d(2 * w, 4 * w, 3, stride=2, padding=1),
            *_norm_relu(),
            *(ResidualBlock(4 * w) for _ in range(blocks)),
            nn.ConvTranspose2d(4 * w, 2 * w, 3, stride=2, padding=1, output_padding=1),
            *_norm_relu(),
            nn.ConvTranspose2d(2 * w, w, 3, stride=2, padding=1, output_padding=1),
            *_norm_relu(),
            nn.Conv2d(w, out_channels, 7, padding=3, padding_mode="reflect"),
            nn.Tanh(),
        )

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d h w"]:
        return self.body(x)


def _norm_relu() -> tuple[nn.Module, nn.Module]:
    return InstanceNorm(), nn.ReLU(inplace=True)
