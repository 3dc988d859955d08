"""Published numbers: parameter counts, shapes, loss constants, the image pool, schedules."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from models.cyclegan import CycleGAN, CycleGANConfig, CycleGANWeights
from models.engine import EngineConfig, random_stream
from models.losses import GAN_MODES, gan_fake, gan_generator, gan_real, l1
from models.nets.norm import BatchNorm, InstanceNorm
from models.nets.patchgan import PatchGAN
from models.nets.resnet import ResNetGenerator
from models.pix2pix import Pix2Pix, Pix2PixConfig, Pix2PixWeights, UNet
from models.replay import ReplayPool
from models.schedule import LinearDecay, StepAt, linear_epochs


def _parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (lambda: UNet(levels=8), 54_413_955),
        (lambda: UNet(levels=7), 41_828_995),
        (lambda: UNet(8, 5), 261_715),
        (lambda: UNet(8, 6), 458_579),
        (lambda: UNet(8, 7), 655_443),
        (lambda: UNet(8, 8), 852_307),
        (lambda: PatchGAN(6, norm="batch"), 2_768_705),
        (lambda: PatchGAN(3), 2_764_737),
        (lambda: PatchGAN(6, layers=0, norm="batch"), 9_024),
        (lambda: PatchGAN(3, layers=0), 8_705),
        (lambda: PatchGAN(3, 8), 44_537),
        (lambda: PatchGAN(6, 8, norm="batch"), 45_033),
        (lambda: ResNetGenerator(blocks=9), 11_378_179),
        (lambda: ResNetGenerator(blocks=6), 7_837_699),
        (lambda: ResNetGenerator(width=8, blocks=2), 50_947),
        (lambda: ResNetGenerator(width=8, blocks=6), 124_931),
        (lambda: ResNetGenerator(width=16, blocks=6), 494_083),
    ],
)
def test_parameters__as_published(make, count: int) -> None:
    with torch.device("meta"):
        assert _parameters(make()) == count


def test_systems__have_the_published_networks() -> None:
    with torch.device("meta"):
        cyclegan, pix2pix = CycleGAN(CycleGANConfig()), Pix2Pix(Pix2PixConfig())
        smaller = CycleGAN(CycleGANConfig(size=128))
    assert {n: _parameters(net) for n, net in cyclegan.networks.items()} == {
        "g_ab": 11_378_179,
        "g_ba": 11_378_179,
        "d_a": 2_764_737,
        "d_b": 2_764_737,
    }
    assert {n: _parameters(net) for n, net in pix2pix.networks.items()} == {"g": 54_413_955, "d": 2_768_705}
    assert _parameters(smaller.g_ab) == 7_837_699
    assert CycleGANWeights() == CycleGANWeights(adv=1, cycle=10, identity=5, adv_d=1)
    assert Pix2PixWeights() == Pix2PixWeights(adv=1, l1=100, adv_d=1)


@pytest.mark.parametrize(("side", "patches"), [(64, 6), (70, 6), (128, 14), (256, 30), (286, 33)])
def test_patchgan__number_of_patches(side: int, patches: int) -> None:
    with torch.device("meta"):
        for network, channels in ((PatchGAN(3), 3), (PatchGAN(6, norm="batch"), 6)):
            assert network(torch.empty(1, channels, side, side)).shape == (1, 1, patches, patches)


@pytest.mark.parametrize(("layers", "field"), [(0, 1), (1, 16), (2, 34), (3, 70), (4, 142), (5, 286)])
def test_patchgan__receptive_field(layers: int, field: int) -> None:
    """How far the gradient of one logit reaches into the image."""
    network = PatchGAN(1, width=1, layers=layers)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.ones_(module.weight)
    network.body = nn.Sequential(*(m for m in network.body if isinstance(m, nn.Conv2d)))
    x = torch.ones(1, 1, 640, 640, requires_grad=True)
    logits = network(x)
    middle = logits.shape[-1] // 2
    logits[0, 0, middle, middle].backward()
    touched = x.grad[0, 0].abs().sum(0).nonzero()
    assert touched.max() - touched.min() + 1 == field


def test_generators__keep_the_size() -> None:
    with torch.device("meta"):
        x = torch.empty(1, 3, 256, 256)
        assert ResNetGenerator()(x).shape == x.shape
        assert UNet()(x).shape == x.shape


def test_gan_losses__of_a_silent_discriminator() -> None:
    zero, ln2 = torch.zeros(2, 1, 5, 5), math.log(2)
    assert gan_real("vanilla", zero) + gan_fake("vanilla", zero) == pytest.approx(2 * ln2)
    assert gan_generator("vanilla", zero) == pytest.approx(ln2)
    assert gan_real("lsgan", zero) + gan_fake("lsgan", zero) == pytest.approx(1.0)
    assert gan_generator("lsgan", zero) == pytest.approx(1.0)
    assert gan_real("hinge", zero) + gan_fake("hinge", zero) == pytest.approx(2.0)
    assert gan_generator("hinge", zero) == pytest.approx(0.0)


@pytest.mark.parametrize("mode", GAN_MODES)
def test_gan_losses__do_not_saturate_and_are_float32(mode) -> None:
    logits = torch.tensor([[100.0]], dtype=torch.bfloat16)
    for loss in (gan_real(mode, -logits), gan_fake(mode, logits), gan_generator(mode, -logits)):
        assert loss.dtype == torch.float32
        assert loss >= 99


def _silence(network: nn.Module) -> None:
    for parameter in network.parameters():
        nn.init.zeros_(parameter)


def _terms(system, batch) -> dict[str, float]:
    from models.engine import Engine

    weights = type(system).Weights()
    engine = Engine(system, weights, EngineConfig(total_steps=1), torch.device("cpu"))
    engine.optimisers = {name: _Still() for name in engine.optimisers}
    engine.step(0, {0: batch})
    return engine.read()[0]


class _Still:
    param_groups: tuple = ()

    def step(self) -> None: ...

    def zero_grad(self, set_to_none: bool) -> None: ...


def test_cyclegan__terms_with_silent_discriminators() -> None:
    system = CycleGAN(CycleGANConfig(size=32, width=4, blocks=1))
    _silence(system.d_a)
    _silence(system.d_b)
    terms = _terms(system, system.batch(torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 32)))
    assert terms["adv_d"] == pytest.approx(1.0)  # ½ for each of two domains
    assert terms["adv"] == pytest.approx(2.0)  # 1 for each of two generators


def test_cyclegan__identity_generators_cost_nothing() -> None:
    system = CycleGAN(CycleGANConfig(size=32, width=4, blocks=1))
    system.g_ab.forward = system.g_ba.forward = lambda x: x * 1.0
    batch = system.batch(torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32))
    for parameters in (system.g_ab.parameters(), system.g_ba.parameters()):
        for parameter in parameters:
            parameter.requires_grad_(False)
    ctx_terms = system.g_losses(batch, {}, _context(system, {"cycle", "identity"})).terms
    assert ctx_terms["cycle"] == 0
    assert ctx_terms["identity"] == 0


def test_pix2pix__terms_with_a_silent_discriminator_and_a_perfect_generator() -> None:
    system = Pix2Pix(Pix2PixConfig(size=32, width=4))
    _silence(system.d)
    x = torch.rand(1, 3, 32, 32)
    terms = _terms(system, system.batch(x, x))
    assert terms["adv_d"] == pytest.approx(math.log(2))
    assert terms["adv"] == pytest.approx(math.log(2))
    perfect = system.g_losses(system.batch(x, x), {"x_ab": x}, _context(system, {"l1"})).terms
    assert perfect["l1"] == 0


def _context(system, active: set[str]):
    from models.system import StepContext

    return StepContext(0, frozenset(active), system.draw(random_stream(0), 2), {})


def test_pix2pix__dropout_is_the_only_noise() -> None:
    system = Pix2Pix(Pix2PixConfig(size=32, width=8, dropout_stages=3))
    x = torch.rand(1, 3, 32, 32)
    masks = [list(system.draw(random_stream(seed), 1).values()) for seed in (0, 1, 0)]
    outputs = [system.g(x, m) for m in masks]
    assert not torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(system.g(x), system.g(x))
    assert [tuple(m.shape) for m in masks[0]] == [(1, 64, 2, 2), (1, 32, 4, 4), (1, 16, 8, 8)]


@pytest.mark.parametrize(("size", "stages"), [(256, 3), (128, 2), (64, 1), (32, 0)])
def test_pix2pix__dropout_stays_innermost(size: int, stages: int) -> None:
    assert Pix2PixConfig(size=size).num_dropouts == stages
    assert Pix2PixConfig(size=size, dropout=0.0).num_dropouts == 0


def test_pix2pix__test_dropout_follows_the_seed() -> None:
    from models.system import Condition

    system = Pix2Pix(Pix2PixConfig(size=32, width=8, dropout_stages=2, test_dropout=True)).eval()
    x = torch.rand(2, 3, 32, 32)
    one, same, other = (system.translate(x, Condition(seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_batch_norm__sample_statistics_are_batch_norm_of_one() -> None:
    x = torch.rand(3, 4, 5, 6) * 9 + 2
    norm = BatchNorm(4, "sample")
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    batch = BatchNorm(4, "batch")
    batch.load_state_dict(norm.state_dict())
    single = torch.cat([batch(image[None]) for image in x])
    torch.testing.assert_close(norm(x), single)
    assert not torch.allclose(batch(x), single)
    torch.testing.assert_close(batch.eval()(x), single)


def test_instance_norm__undoes_scale_and_shift_and_has_no_buffers() -> None:
    x = torch.rand(2, 3, 8, 8)
    norm = InstanceNorm()
    torch.testing.assert_close(norm(x * 7 - 3), norm(x), rtol=1e-3, atol=1e-3)
    for network in (ResNetGenerator(width=4, blocks=1), UNet(4, 5), PatchGAN(6, 4, norm="batch")):
        assert list(network.buffers()) == []


def test_l1__is_a_mean() -> None:
    assert l1(torch.full((2, 3, 4, 4), 0.5), torch.zeros(2, 3, 4, 4)) == 0.5


def test_pool__fills_then_swaps_half_the_time() -> None:
    pool = ReplayPool(50)
    generator = random_stream("pool")
    first = torch.arange(50.0).reshape(50, 1, 1, 1)
    assert torch.equal(pool.query(first, ReplayPool.draw(generator, 50)), first)
    later = torch.arange(50.0, 2050.0).reshape(2000, 1, 1, 1)
    shown = pool.query(later, ReplayPool.draw(generator, 2000))
    unchanged = (shown == later).float().mean()
    assert 0.46 < unchanged < 0.54
    earlier = shown[shown != later]
    assert (earlier < later[(shown != later)]).all()
    assert pool.images is not None
    assert pool.images.shape[0] == 50


def test_pool__capacity_zero_returns_the_input() -> None:
    x = torch.rand(3, 1, 2, 2, requires_grad=True)
    shown = ReplayPool(0).query(x, torch.zeros(3, 2))
    assert torch.equal(shown, x)
    assert not shown.requires_grad


def test_linear_epochs__published_values() -> None:
    assert linear_epochs(100, 100, 100) == 1
    assert linear_epochs(150, 100, 100) == pytest.approx(1 - 50 / 101)
    assert linear_epochs(200, 100, 100) == pytest.approx(0.0099, abs=1e-4)
    assert 1 - max(0, 900 - 600) / 601 == pytest.approx(linear_epochs(900, 600, 600), abs=1e-9)


def test_linear_decay__is_linear_epochs_without_steps() -> None:
    decay = LinearDecay(begin=0.5)
    assert decay(0) == decay(0.5) == 1
    assert decay(1) == 0
    for epoch in range(1, 201):
        assert decay((epoch - 0.5) / 200) == pytest.approx(linear_epochs(epoch, 100, 100), abs=0.011)


def test_step_at__flips_once() -> None:
    rate = StepAt(at=0.25, before=0.01, after=0.5)
    assert rate(0.2499) == 0.01
    assert rate(0.25) == 0.5


def test_learning_rate__follows_the_fraction_of_the_run() -> None:
    from models.engine import Engine

    system = CycleGAN(CycleGANConfig(size=32, width=4, blocks=1))
    engine = Engine(system, CycleGANWeights(), EngineConfig(total_steps=4), torch.device("cpu"))
    rates = []
    for step in range(4):
        engine.step(step, {0: system.batch(torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 32))})
        rates.append(engine.optimisers["g"].param_groups[0]["lr"])
    assert rates == pytest.approx([2e-4, 2e-4, 2e-4, 1e-4])
    assert engine.optimisers["g"].param_groups[0]["betas"] == (0.5, 0.999)
