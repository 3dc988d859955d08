"""Weight initialisations, under the names of the literature."""

from __future__ import annotations

from torch import nn

from models.nets.norm import BatchNorm


def normal_002(network: nn.Module) -> None:
    """N02: convolution and linear weights N(0, 0.02), biases 0; batch-norm scale N(1, 0.02), shift 0.

    Source: Radford et al. 2016, as used by pix2pix and CycleGAN.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            nn.init.normal_(module.weight, 0.0, 0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, BatchNorm):
            nn.init.normal_(module.weight, 1.0, 0.02)
            nn.init.zeros_(module.bias)
