"""What one training step is fed: frozen records of images, one record type for each data contract.

A record type declares its **streams**: independent sequences of samples, each over one domain or over several aligned
ones (the same key in each). The data pipeline reads these declarations and knows nothing else of a system.

Images are `float32`, channels-last in memory, in the value range of the system (`System.value_range`, mostly [-1, 1]),
shape `(n, channels, height, width)`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Stream:
    """One sequence of samples.

    Attributes:
        name: of the stream; part of the key of every random choice made for it.
        images: batch field → index of the domain (in `--domains` order) it is read from. More than one entry means
            aligned domains: one sample gives one image of each, augmented alike.
    """

    name: str
    images: dict[str, int]


@dataclass(frozen=True)
class Batch:
    """Base of all records."""

    streams: ClassVar[tuple[Stream, ...]]
    num_domains: ClassVar[int]

    @property
    def size(self) -> int:
        """Number of samples."""
        return getattr(self, fields(self)[0].name).shape[0]


@dataclass(frozen=True)
class Unpaired(Batch):
    """Images of two domains, drawn independently of each other."""

    streams: ClassVar[tuple[Stream, ...]] = (Stream("a", {"a": 0}), Stream("b", {"b": 1}))
    num_domains: ClassVar[int] = 2

    a: Float[Tensor, "n c h w"]
    b: Float[Tensor, "n c h w"]


@dataclass(frozen=True)
class Paired(Batch):
    """Images of two aligned domains: `b[i]` is the truth for `a[i]`."""

    streams: ClassVar[tuple[Stream, ...]] = (Stream("pair", {"a": 0, "b": 1}),)
    num_domains: ClassVar[int] = 2

    a: Float[Tensor, "n c h w"]
    b: Float[Tensor, "n c h w"]
