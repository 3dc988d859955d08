"""A system that is hardly one: small enough to test what surrounds systems."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models import SYSTEMS
from models.batch import Unpaired
from models.system import Condition, System


class Tiny(System):
    """`translate` is a pointwise affine map, another one for each direction."""

    name = "tiny"
    batch = Unpaired
    generators = ("g_ab", "g_ba")
    published_steps = 1

    @dataclass(frozen=True)
    class Config:
        multiple: int = 4
        fixed: int | None = None
        shape: tuple[int, ...] = (1, 2)

    @dataclass(frozen=True)
    class Weights:
        cycle: float = 10.0

    def __init__(self, config: Tiny.Config, domains: tuple[str, ...]) -> None:
        super().__init__()
        self.config, self.domains = config, domains
        self.g_ab = nn.Conv2d(3, 3, 1)
        self.g_ba = nn.Conv2d(3, 3, 1)
        self.d_b = nn.Conv2d(3, 1, 1)

    def invert(self) -> Tiny:
        """Set g_ab to the negative image and g_ba to the identity."""
        with torch.no_grad():
            for network, sign in ((self.g_ab, -1.0), (self.g_ba, 1.0)):
                network.weight.copy_(sign * torch.eye(3)[:, :, None, None])
                network.bias.zero_()
        return self

    def translate(self, x: Tensor, condition: Condition) -> Tensor:
        assert x.shape[-1] % self.size_multiple == 0 and x.shape[-2] % self.size_multiple == 0
        _, to = self.direction(condition)
        return self.g_ab(x) if to == self.domains[1] else self.g_ba(x)

    @property
    def conditioning(self) -> dict[str, Any]:
        a, b = self.domains
        directions = [{"source": a, "to": b}, {"source": b, "to": a}]
        return {"directions": directions, "attributes": [], "style": None}

    @property
    def size_multiple(self) -> int:
        return self.config.multiple

    @property
    def fixed_size(self) -> int | None:
        return self.config.fixed


def register(monkeypatch) -> None:
    """Make the tiny system known for one test."""
    monkeypatch.setitem(SYSTEMS, "tiny", (__name__, "Tiny"))
