"""The image pool of CycleGAN: discriminators judge a mix of fresh and earlier translations.

Source: Shrivastava et al. 2017, as used by Zhu et al. 2017 (pool of 50).
"""

from __future__ import annotations

import torch
from torch import Tensor


class ReplayPool:
    """A pool of at most `capacity` detached images. Part of the training state.

    While it fills, an image is stored and returned. When full, an image is, with probability ½, returned unchanged;
    otherwise it takes the place of a stored one, which is returned. The choice comes from outside (`draw`), so that
    a step is a function of its inputs.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.images: Tensor | None = None
        self.count = 0

    @staticmethod
    def draw(generator: torch.Generator, n: int) -> Tensor:
        """Two uniform numbers an image, `(n, 2)`: swap or not, and which slot."""
        return torch.rand(n, 2, generator=generator)

    def query(self, images: Tensor, choices: Tensor) -> Tensor:
        """Images `(n, c, h, w)` and `draw`'s `(n, 2)` choices (on the CPU) → what the discriminator is shown."""
        if self.capacity == 0:
            return images.detach()
        images = images.detach()
        if self.images is None:
            self.images = images.new_empty((self.capacity, *images.shape[1:]))
        shown = []
        for image, (coin, slot) in zip(images, choices.tolist(), strict=True):
            if self.count < self.capacity:
                self.images[self.count].copy_(image)
                self.count += 1
                shown.append(image)
            elif coin < 0.5:
                shown.append(image)
            else:
                at = min(int(slot * self.capacity), self.capacity - 1)
                shown.append(self.images[at].clone())
                self.images[at].copy_(image)
        return torch.stack(shown).contiguous(memory_format=torch.channels_last)

    def state_dict(self) -> dict[str, Tensor]:
        """Stored images only; an empty pool is an empty mapping."""
        return {} if self.images is None else {"images": self.images[: self.count].clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state_dict`."""
        stored = state.get("images")
        self.count = 0 if stored is None else stored.shape[0]
        if stored is None:
            self.images = None
        else:
            self.images = stored.new_empty((self.capacity, *stored.shape[1:]))
            self.images[: self.count].copy_(stored)
