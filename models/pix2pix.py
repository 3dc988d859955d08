"""pix2pix: image-to-image translation from aligned pairs with a conditional GAN.

Isola, Zhu, Zhou, Efros, "Image-to-Image Translation with Conditional Adversarial Networks", CVPR 2017,
arXiv:1611.07004.

A U-Net turns `a` into `b`; a patch discriminator sees input and output together, and an L1 term ties the output to the
truth.

    L_cGAN(G, D) = E log D(a, b) + E log(1 − D(a, G(a)))          Eq. 1 (noise enters as dropout)
    L_L1(G)      = E |b − G(a)|                                   Eq. 3
    G*           = arg min_G max_D L_cGAN + λ L_L1                Eq. 4, λ = 100

    paper        here
    x, y         a, b
    G, D         g, d
    λ            weights.l1

Deviations:
    [D1] Statistics of batch norm are taken per image by default (`statistics="sample"`), in training as at inference.
         At the published batch size 1 this is the same; at larger ones it keeps an output a function of its own input,
         and independent of how a batch is split over workers. `statistics="batch"` trains with batch statistics.
    [D2] Dropout is on in training only (`test_dropout=True` for the published behaviour, seeded by the request), on the
         three innermost decoder stages at 256 px as in the paper and the Torch release; on one less for each level less
         as in the PyTorch release, because there the third one holds detail.
    [D3] The learning rate decays over the second half of the run as in the PyTorch release; the Torch release keeps it.
    [D4] One epoch is each pair once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from models.batch import Paired
from models.checks import check_patches, check_record
from models.errors import ConfigError
from models.losses import GAN_MODES, GanMode, gan_fake, gan_generator, gan_real, l1
from models.nets.init import normal_002
from models.nets.norm import BatchNorm, Statistics
from models.nets.patchgan import PatchGAN
from models.schedule import LinearDecay, Schedule
from models.system import Condition, Draws, Optimiser, Phase, PhaseOutput, StepContext, System


@dataclass(frozen=True)
class Pix2PixWeights:
    """Loss weights."""

    adv: float | Schedule = 1.0
    l1: float | Schedule = 100.0  # λ of Eq. 4
    adv_d: float | Schedule = 1.0  # its ½ (appendix 6.2: "divide the objective by 2") is inside the term


@dataclass(frozen=True)
class Pix2PixConfig:
    """Sizes and optimisation; defaults are the published ones (Sec. 3.3 and appendix 6.1) unless said."""

    size: int = 256
    width: int = 64
    levels: int | None = None  # None: log2(size), at most 8: down to 1 × 1
    d_width: int | None = None  # None: as `width`
    d_layers: int = 3  # 70 × 70 patches
    statistics: Statistics = "sample"  # [D1]
    dropout: float = 0.5
    dropout_stages: int | None = None  # None: levels − 5, which is 3 at 256 px [D2]
    test_dropout: bool = False  # [D2]
    gan_mode: GanMode = "vanilla"
    lr: float = 2e-4
    beta1: float = 0.5
    decay_begin: float = 0.5  # [D3]

    def __post_init__(self) -> None:
        check_record(
            self,
            at_least={"size": 32, "width": 1, "levels": 4, "d_width": 1, "d_layers": 0, "dropout_stages": 0},
            above_zero=("lr",),
            fractions=("beta1", "decay_begin", "dropout"),
            choices={"gan_mode": GAN_MODES, "statistics": ("batch", "sample")},
        )
        check_patches(self.size, self.d_layers)
        multiple = 2**self.num_levels
        if self.size % multiple:
            near = max(multiple, round(self.size / multiple) * multiple)
            raise ConfigError(
                f"pix2pix: size={self.size} is not a multiple of {multiple} (2^levels)",
                code="E_SIZE",
                hint=f"nearest size {near}, or set system.levels",
            )

    @property
    def num_levels(self) -> int:
        """Strided stages of the U-Net."""
        return self.levels if self.levels is not None else min(8, int(math.log2(self.size)))

    @property
    def num_dropouts(self) -> int:
        """Decoder stages with dropout, counted from the innermost; 0 where `dropout` is 0."""
        stages = self.dropout_stages if self.dropout_stages is not None else max(0, self.num_levels - 5)
        return min(stages, self.num_levels - 1) if self.dropout else 0


class UNet(nn.Module):
    """U-Net with 4×4 strided convolutions; `(n, 3, h, w)` → `(n, 3, h, w)` in [-1, 1].

    Channels `width` × (1, 2, 4, 8, 8, …); skips join stages of equal size. No norm after the first, at the innermost
    and after the last stage. Sides must be multiples of 2^levels.
    """

    def __init__(self, width: int = 64, levels: int = 8, statistics: Statistics = "batch") -> None:
        super().__init__()
        channels = [width * min(2**i, 8) for i in range(levels)]
        self.down = nn.ModuleList()
        for i in range(levels):
            normed = 0 < i < levels - 1
            source = 3 if i == 0 else channels[i - 1]
            layers: list[nn.Module] = [] if i == 0 else [nn.LeakyReLU(0.2)]
            # The published network has no bias in any strided convolution, not even where no norm follows.
            layers.append(nn.Conv2d(source, channels[i], 4, stride=2, padding=1, bias=False))
            self.down.append(nn.Sequential(*layers, *([BatchNorm(channels[i], statistics)] if normed else [])))
        self.up = nn.ModuleList()
        for i in reversed(range(1, levels)):
            source = channels[i] * (1 if i == levels - 1 else 2)
            up = nn.ConvTranspose2d(source, channels[i - 1], 4, stride=2, padding=1, bias=False)
            self.up.append(nn.Sequential(nn.ReLU(), up, BatchNorm(channels[i - 1], statistics)))
        self.last = nn.ConvTranspose2d(2 * channels[0], 3, 4, stride=2, padding=1)

    def forward(self, x: Float[Tensor, "n c h w"], masks: list[Tensor] | None = None) -> Float[Tensor, "n d h w"]:
        """`masks`: factors for the innermost decoder stages (0 or 1/(1−p)), None for no dropout."""
        skips = []
        for stage in self.down:
            x = stage(x)
            skips.append(x)
        skips.pop()
        for i, stage in enumerate(self.up):
            x = stage(x)
            if masks is not None and i < len(masks):
                x = x * masks[i].to(x.dtype)
            x = torch.cat([x, skips.pop()], dim=1)
        return torch.tanh(self.last(torch.relu(x)))


class Pix2Pix(System):
    """One forward of G; D first, then G against the new D."""

    name = "pix2pix"
    batch = Paired
    Config = Pix2PixConfig
    Weights = Pix2PixWeights
    generators = ("g",)
    published_steps = 80_000  # 200 epochs of facades (400 pairs), batch 1

    def __init__(self, config: Pix2PixConfig, domains: tuple[str, ...] = ("a", "b")) -> None:
        super().__init__()
        self.config, self.domains = config, domains
        self.g = UNet(config.width, config.num_levels, config.statistics)
        self.d = PatchGAN(6, config.d_width or config.width, config.d_layers, "batch", config.statistics)
        normal_002(self)

    @property
    def optimisers(self) -> dict[str, Optimiser]:
        c = self.config
        schedule = LinearDecay(begin=c.decay_begin)
        return {n: Optimiser((n,), c.lr, (c.beta1, 0.999), schedule=schedule) for n in ("g", "d")}

    @property
    def conditioning(self) -> dict:
        a, b = self.domains
        seeded = {"seed": True} if self.config.test_dropout else {}
        return {"directions": [{"source": a, "to": b}], "attributes": [], "style": None, **seeded}

    @property
    def size_multiple(self) -> int:
        return 2**self.config.num_levels

    def translate(self, x: Tensor, condition: Condition) -> Tensor:
        self.direction(condition)
        if not (self.config.test_dropout and self.config.num_dropouts):
            return self.g(x)
        generator = torch.Generator().manual_seed(condition.seed or 0)
        # The same masks for every image of the batch: a batch of four equals four singles.
        masks = [m.to(x.device) for m in self._masks(generator, 1, (x.shape[-2], x.shape[-1]))]
        return self.g(x, masks)

    def draw(self, generator: torch.Generator, n: int) -> Draws:
        masks = self._masks(generator, n, (self.config.size, self.config.size))
        return {f"dropout_{i}": mask for i, mask in enumerate(masks)}

    def _masks(self, generator: torch.Generator, n: int, size: tuple[int, int]) -> list[Tensor]:
        """Dropout factors of the innermost decoder stages for images of (height, width) `size`."""
        levels, keep = self.config.num_levels, 1 - self.config.dropout
        masks = []
        for i in range(self.config.num_dropouts):
            channels = self.config.width * min(2 ** (levels - 2 - i), 8)
            shape = (n, channels, size[0] >> (levels - 1 - i), size[1] >> (levels - 1 - i))
            masks.append((torch.rand(shape, generator=generator) < keep) / keep)
        return masks

    def phases(self, step: int) -> list[Phase]:
        return [
            Phase("d", ("d",), ("adv_d",), self.d_losses),
            Phase("g", ("g",), ("adv", "l1"), self.g_losses),
        ]

    def d_losses(self, batch: Paired, carry: dict[str, Tensor], ctx: StepContext) -> PhaseOutput:
        """Eq. 1 for D, on the pair and on the input with its translation."""
        masks = [ctx.draws[k] for k in sorted(ctx.draws)] if ctx.draws else None
        x_ab = self.g(batch.a, masks)
        terms = {}
        if "adv_d" in ctx.active:
            real = self.d(torch.cat([batch.a, batch.b], dim=1))
            fake = self.d(torch.cat([batch.a, x_ab.detach().to(batch.a.dtype)], dim=1))
            terms["adv_d"] = 0.5 * (gan_real(self.config.gan_mode, real) + gan_fake(self.config.gan_mode, fake))
        return PhaseOutput(terms, {"x_ab": x_ab})

    def g_losses(self, batch: Paired, carry: dict[str, Tensor], ctx: StepContext) -> PhaseOutput:
        """Eq. 4 for G: the same translation, judged by D's new weights."""
        x_ab = carry["x_ab"]
        terms = {}
        if "adv" in ctx.active:
            logits = self.d(torch.cat([batch.a, x_ab.to(batch.a.dtype)], dim=1))
            terms["adv"] = gan_generator(self.config.gan_mode, logits)
        if "l1" in ctx.active:
            terms["l1"] = l1(x_ab, batch.b)
        return PhaseOutput(terms, {})
