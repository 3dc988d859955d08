"""DINOv2's vision transformer, in the names and layout of the published weights; its sizes are read off the weights.

Source: Oquab et al. 2023, "DINOv2", arXiv 2304.07193; Darcet et al. 2023 for register tokens. As features of generated
images: Stein et al. 2023, "Exposing flaws of generative model evaluation metrics", arXiv 2306.04675.
"""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.errors import DataError
from pipelines.metrics.features import Extractor
from pipelines.metrics.weights_file import load_into, normalised, read_state_dict

HEAD_WIDTH = 64


class DinoV2(Extractor):
    """`dinov2`: the class token of a DINOv2 transformer after its last norm, with weights from a file.

    Any published size but the giant one (whose blocks differ): ViT-S/14 gives (n, 384).

    Raises:
        DataError: the file is missing or holds something else.
    """

    name = "dinov2"
    standardised = False
    protocol = "224 x 224 px, bicubic, antialiased; ImageNet mean and deviation; class token after the last norm"
    batch = 16

    def __init__(self, uri: str, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        state, self.digest = read_state_dict(uri)
        state.pop("mask_token", None)
        self.network = VisionTransformer(**sizes(state, uri))
        load_into(self.network, state, uri, "a DINOv2 transformer")
        self.network.to(self.device).eval()

    def embed(self, images: Tensor) -> Tensor:
        side = self.network.patch * 16
        x = F.interpolate(images.float() / 255, size=(side, side), mode="bicubic", align_corners=False, antialias=True)
        return self.network(normalised(x.clamp(0, 1)))


def sizes(state: dict[str, Tensor], uri: str) -> dict[str, int]:
    """The arguments of `VisionTransformer` that fit the weights."""
    wanted = ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight")
    missing = [name for name in wanted if name not in state]
    if missing:
        raise DataError(
            f"{uri} does not hold the weights of a DINOv2 transformer: missing: {', '.join(missing)}", code="E_WEIGHTS"
        )
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    if width % HEAD_WIDTH:
        raise DataError(f"{uri}: width {width} is not a multiple of {HEAD_WIDTH}, a head's", code="E_WEIGHTS")
    found = (re.match(r"blocks\.(\d+)\.", name) for name in state)
    return {
        "width": width,
        "patch": patch,
        "positions": state["pos_embed"].shape[1],
        "depth": 1 + max(int(m[1]) for m in found if m),
        "hidden": state["blocks.0.mlp.fc1.weight"].shape[0],
        "registers": state["register_tokens"].shape[1] if "register_tokens" in state else 0,
    }


class VisionTransformer(nn.Module):
    """Images (n, 3, h, w), normalised, sides multiples of `patch` → class tokens (n, width)."""

    def __init__(self, width: int, depth: int, hidden: int, patch: int, positions: int, registers: int = 0) -> None:
        super().__init__()
        self.patch = patch
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, width))
        if registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, registers, width))
        self.patch_embed = _Patches(width, patch)
        self.blocks = nn.ModuleList(_Block(width, hidden) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images)
        rows, columns = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self._positions(rows, columns)
        if hasattr(self, "register_tokens"):
            x = torch.cat([x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]

    def _positions(self, rows: int, columns: int) -> Tensor:
        """Position embeddings for a grid of patches, resampled as in the published code: for models without registers
        by a factor that is 0.1 patch too large."""
        side = math.isqrt(self.pos_embed.shape[1] - 1)
        if (rows, columns) == (side, side):
            return self.pos_embed
        grid = self.pos_embed[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        if hasattr(self, "register_tokens"):
            grid = F.interpolate(grid, size=(rows, columns), mode="bicubic", antialias=True)
        else:
            factors = ((rows + 0.1) / side, (columns + 0.1) / side)
            grid = F.interpolate(grid, scale_factor=factors, mode="bicubic", recompute_scale_factor=False)
        assert grid.shape[-2:] == (rows, columns), "resampled positions do not match the patches"
        return torch.cat([self.pos_embed[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


class _Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = _Attention(width), _Mlp(width, hidden)
        self.ls1, self.ls2 = _Scale(width), _Scale(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1.gamma * self.attn(self.norm1(x))
        return x + self.ls2.gamma * self.mlp(self.norm2(x))


class _Patches(nn.Module):
    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, stride=patch)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images)


class _Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class _Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))


class _Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        qkv = self.qkv(x).reshape(n, tokens, 3, width // HEAD_WIDTH, HEAD_WIDTH).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(*qkv.unbind(0))
        return self.proj(out.transpose(1, 2).reshape(n, tokens, width))
