"""The contract of an image-to-image translation system.

A GAN is a game whose players take turns. What differs between the systems is who moves, in what order, for what score.
A `System` owns networks and says which optimisers step them; `phases(step)` lists the turns of one step. The engine
(`models.engine`) plays them and knows no system by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from models.batch import Batch
from models.errors import RequestError, nearest
from models.replay import ReplayPool
from models.schedule import Constant, Schedule

Draws = dict[str, Tensor]
Terms = dict[str, Tensor]


@dataclass(frozen=True)
class Condition:
    """What a caller asks of `translate`; everything is optional.

    Attributes:
        to, source: names of domains.
        attributes: attribute name → value in [0, 1].
        seed: of the random style, or of dropout where the system keeps it at test time.
        reference: image whose style is wanted, `(1, c, h, w)` in the system's value range.
        strength: of a loss-conditional generator, in [0, 1].
    """

    to: str | None = None
    source: str | None = None
    attributes: Mapping[str, float] | None = None
    seed: int | None = None
    reference: Tensor | None = None
    strength: float | None = None


@dataclass(frozen=True)
class Optimiser:
    """Adam over some networks. Learning rate at a step = `lr` × `schedule(fraction of the run)`."""

    networks: tuple[str, ...]
    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    schedule: Schedule = field(default_factory=Constant)


@dataclass(frozen=True)
class PhaseOutput:
    """What one turn gives for one logical rank.

    Attributes:
        terms: *unweighted* scalar loss terms, exactly the names in `Phase.terms` that are active.
        carry: tensors for later phases of the same step and the same logical rank.
    """

    terms: Terms
    carry: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class StepContext:
    """What a phase may look at besides its batch.

    Attributes:
        step: number of the step, from 0.
        active: names of the terms whose weight is not zero now; the work for the others is to be skipped.
        draws: the random numbers of this step, made by `System.draw`.
        pools: replay pools of this logical rank by name.
    """

    step: int
    active: frozenset[str]
    draws: Draws
    pools: Mapping[str, ReplayPool]


Losses = Callable[[Any, dict[str, Tensor], StepContext], PhaseOutput]


@dataclass(frozen=True)
class Phase:
    """One turn: which optimisers step, on which loss terms.

    `losses(batch, carry, ctx)` computes them. `after()` runs once when the optimisers have stepped (weight clipping).
    """

    name: str
    optimisers: tuple[str, ...]
    terms: tuple[str, ...]
    losses: Losses
    after: Callable[[], None] | None = None


class System(nn.Module):
    """Base of the systems; each is final (none inherits from another).

    Class attributes:
        name: as in `models.SYSTEMS`.
        batch: the data contract.
        Config, Weights: frozen records; `Weights` has one field per loss term, which is what a search varies.
        generators: the networks that `translate` needs, hence what a bundle holds.
        value_range: of images at the input of the networks.
        published_steps, published_batch: of the published training, the defaults of a run.
    """

    name: ClassVar[str]
    batch: ClassVar[type[Batch]]
    Config: ClassVar[type]
    Weights: ClassVar[type]
    generators: ClassVar[tuple[str, ...]]
    value_range: ClassVar[tuple[float, float]] = (-1.0, 1.0)
    published_steps: ClassVar[int]
    published_batch: ClassVar[int] = 1

    config: Any
    domains: tuple[str, ...]

    @property
    def networks(self) -> dict[str, nn.Module]:
        """Every network by its instance name."""
        return dict(self.named_children())

    @property
    def optimisers(self) -> dict[str, Optimiser]:
        """The optimisers by name; together they own every network exactly once."""
        raise NotImplementedError

    @property
    def pools(self) -> dict[str, int]:
        """Replay pools by name, with their capacity in images; each logical rank has its own."""
        return {}

    def phases(self, step: int) -> list[Phase]:
        """The turns of one step, in order."""
        raise NotImplementedError

    def draw(self, generator: torch.Generator, n: int) -> Draws:
        """Every random number that one step on `n` samples needs, on the CPU; made outside compiled code.

        What is named `pool…` stays on the CPU, where the replay pools decide; the rest goes to the device.
        """
        return {}

    def translate(self, x: Tensor, condition: Condition) -> Tensor:
        """Images `(n, c, h, w)` in `value_range` → images of the same shape. A function of each image alone:
        a batch of four equals four singles."""
        raise NotImplementedError

    @property
    def conditioning(self) -> dict[str, Any]:
        """What a caller may ask for, as JSON: `directions` (list of {source, to}), `attributes`, `style`."""
        raise NotImplementedError

    @property
    def size_multiple(self) -> int:
        """Image sides at `translate` must be a multiple of this many pixels."""
        return 1

    @property
    def fixed_size(self) -> int | None:
        """The only image side that `translate` accepts, or None where any multiple of `size_multiple` will do."""
        return None

    def direction(self, condition: Condition) -> tuple[str, str]:
        """(source, to) of a request among `conditioning["directions"]`; the first one where nothing is asked.

        Raises:
            RequestError: the asked direction does not exist.
        """
        offered = [(d["source"], d["to"]) for d in self.conditioning["directions"]]
        for name in (condition.to, condition.source):
            if name is not None and name not in self.domains:
                raise RequestError(f"unknown domain '{name}'", code="E_DOMAIN", hint=nearest(name, self.domains))
        for source, to in offered:
            if condition.to in (None, to) and condition.source in (None, source):
                return source, to
        wanted = f"{condition.source or 'any'} to {condition.to or 'any'}"
        listed = ", ".join(f"{s} to {t}" for s, t in offered)
        raise RequestError(f"this model does not translate {wanted}", code="E_DOMAIN", hint=f"it offers {listed}")
