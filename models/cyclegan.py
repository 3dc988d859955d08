"""CycleGAN: unpaired image-to-image translation by cycle consistency.

Zhu, Park, Isola, Efros, "Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial Networks", ICCV 2017,
arXiv:1703.10593.

Two generators translate between domains A and B; each must undo the other. A discriminator a domain judges whether
images look like it.

    L_GAN(G, D_B)   = E_b (D_B(b) − 1)² + E_a D_B(G(a))²                       least-squares form of Eq. 1
    L_cyc(G, F)     = E_a |F(G(a)) − a| + E_b |G(F(b)) − b|                     Eq. 2
    L_idt(G, F)     = E_b |G(b) − b| + E_a |F(a) − a|                           Sec. 5.2
    L               = L_GAN(G, D_B) + L_GAN(F, D_A) + λ (L_cyc + ½ L_idt)       Eq. 3, λ = 10

    paper           here
    G, F            g_ab, g_ba
    D_Y, D_X        d_b, d_a       (named after the domain they judge)
    G(x), F(G(x))   x_ab, x_aba
    λ, ½ λ          weights.cycle, weights.identity

Deviations:
    [D1] One epoch of each domain is each image once, at its own pace; the paper pairs each image of A with a random one
         of B.
    [D2] The learning rate decays continuously over the second half of the run, not once an epoch.
    [D3] Instance norm has no scale and shift, as in the authors' PyTorch release; the Torch release has them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.batch import Unpaired
from models.checks import check_patches, check_record
from models.losses import GAN_MODES, GanMode, gan_fake, gan_generator, gan_real, l1
from models.nets.init import normal_002
from models.nets.patchgan import PatchGAN
from models.nets.resnet import ResNetGenerator
from models.replay import ReplayPool
from models.schedule import LinearDecay, Schedule
from models.system import Condition, Draws, Optimiser, Phase, PhaseOutput, StepContext, System


@dataclass(frozen=True)
class CycleGANWeights:
    """Loss weights; one field covers both directions."""

    adv: float | Schedule = 1.0
    cycle: float | Schedule = 10.0  # λ of Eq. 3
    identity: float | Schedule = 5.0  # ½ λ, Sec. 5.2
    adv_d: float | Schedule = 1.0  # its ½ ("divide the objective by 2", Sec. 4) is inside the term


@dataclass(frozen=True)
class CycleGANConfig:
    """Sizes and optimisation; defaults are the published ones (Sec. 4 and 7.1) unless said."""

    size: int = 256
    width: int = 64
    blocks: int | None = None  # None: 9 at 256 px and above, 6 below
    d_width: int | None = None  # None: as `width`
    d_layers: int = 3  # 70 × 70 patches
    pool: int = 50
    gan_mode: GanMode = "lsgan"
    lr: float = 2e-4
    beta1: float = 0.5
    decay_begin: float = 0.5  # fraction of the run: 100 of 200 epochs

    def __post_init__(self) -> None:
        check_record(
            self,
            at_least={"size": 16, "width": 1, "blocks": 0, "d_width": 1, "d_layers": 0, "pool": 0},
            above_zero=("lr",),
            fractions=("beta1", "decay_begin"),
            multiples={"size": 4},
            choices={"gan_mode": GAN_MODES},
        )
        check_patches(self.size, self.d_layers)


class CycleGAN(System):
    """G first (both generators together), then D on pooled fakes."""

    name = "cyclegan"
    batch = Unpaired
    Config = CycleGANConfig
    Weights = CycleGANWeights
    generators = ("g_ab", "g_ba")
    published_steps = 266_800  # 200 epochs of horse2zebra's larger domain (1,334 images), batch 1

    def __init__(self, config: CycleGANConfig, domains: tuple[str, ...] = ("a", "b")) -> None:
        super().__init__()
        self.config, self.domains = config, domains
        blocks = config.blocks if config.blocks is not None else (9 if config.size >= 256 else 6)
        d_width = config.d_width or config.width
        self.g_ab = ResNetGenerator(width=config.width, blocks=blocks)
        self.g_ba = ResNetGenerator(width=config.width, blocks=blocks)
        self.d_a = PatchGAN(3, d_width, config.d_layers)
        self.d_b = PatchGAN(3, d_width, config.d_layers)
        normal_002(self)

    @property
    def optimisers(self) -> dict[str, Optimiser]:
        c = self.config
        schedule = LinearDecay(begin=c.decay_begin)
        return {
            "g": Optimiser(("g_ab", "g_ba"), c.lr, (c.beta1, 0.999), schedule=schedule),
            "d": Optimiser(("d_a", "d_b"), c.lr, (c.beta1, 0.999), schedule=schedule),
        }

    @property
    def pools(self) -> dict[str, int]:
        return {"a": self.config.pool, "b": self.config.pool}

    @property
    def conditioning(self) -> dict:
        a, b = self.domains
        return {"directions": [{"source": a, "to": b}, {"source": b, "to": a}], "attributes": [], "style": None}

    @property
    def size_multiple(self) -> int:
        return 4

    def translate(self, x: Tensor, condition: Condition) -> Tensor:
        source, _ = self.direction(condition)
        return self.g_ab(x) if source == self.domains[0] else self.g_ba(x)

    def draw(self, generator: torch.Generator, n: int) -> Draws:
        return {"pool_a": ReplayPool.draw(generator, n), "pool_b": ReplayPool.draw(generator, n)}

    def phases(self, step: int) -> list[Phase]:
        return [
            Phase("g", ("g",), ("adv", "cycle", "identity"), self.g_losses),
            Phase("d", ("d",), ("adv_d",), self.d_losses),
        ]

    def g_losses(self, batch: Unpaired, carry: dict[str, Tensor], ctx: StepContext) -> PhaseOutput:
        """Eq. 3 for both generators."""
        a, b, mode = batch.a, batch.b, self.config.gan_mode
        x_ab, x_ba = self.g_ab(a), self.g_ba(b)
        terms = {}
        if "adv" in ctx.active:  # Eq. 1
            terms["adv"] = gan_generator(mode, self.d_b(x_ab)) + gan_generator(mode, self.d_a(x_ba))
        if "cycle" in ctx.active:  # Eq. 2
            terms["cycle"] = l1(self.g_ba(x_ab), a) + l1(self.g_ab(x_ba), b)
        if "identity" in ctx.active:  # Sec. 5.2
            terms["identity"] = l1(self.g_ab(b), b) + l1(self.g_ba(a), a)
        return PhaseOutput(terms, {"x_ab": x_ab.detach(), "x_ba": x_ba.detach()})

    def d_losses(self, batch: Unpaired, carry: dict[str, Tensor], ctx: StepContext) -> PhaseOutput:
        """Eq. 1 for both discriminators, on fakes from the pools."""
        if "adv_d" not in ctx.active:
            return PhaseOutput({})
        mode = self.config.gan_mode
        fake_b = ctx.pools["b"].query(carry["x_ab"], ctx.draws["pool_b"])
        fake_a = ctx.pools["a"].query(carry["x_ba"], ctx.draws["pool_a"])
        loss_b = gan_real(mode, self.d_b(batch.b)) + gan_fake(mode, self.d_b(fake_b))
        loss_a = gan_real(mode, self.d_a(batch.a)) + gan_fake(mode, self.d_a(fake_a))
        return PhaseOutput({"adv_d": 0.5 * (loss_a + loss_b)})
