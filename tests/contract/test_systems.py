"""One suite for every registered system: what the engine and the pipeline rely on."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from models.errors import NonFiniteLoss, RequestError
from models.system import Condition
from tests.contract.small import DOMAINS, NAMES, SIZE, batch, build, engine, flat, train

pytestmark = pytest.mark.parametrize("name", NAMES)


def test_terms__are_the_weight_fields(name: str) -> None:
    system = build(name)
    terms = {term for step in range(10) for phase in system.phases(step) for term in phase.terms}
    assert terms == {f.name for f in dataclasses.fields(type(system).Weights)}


def test_optimisers__own_every_network_once(name: str) -> None:
    system = build(name)
    owned = [network for spec in system.optimisers.values() for network in spec.networks]
    assert sorted(owned) == sorted(system.networks)


def test_step__every_term_is_finite(name: str) -> None:
    e = engine(build(name))
    train(e, 3)
    rows = e.read()
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(torch.isfinite(torch.tensor(list(row.values()))).all() for row in rows)


def test_phase__changes_its_networks_and_no_other(name: str) -> None:
    """Gradient routing: the parameters a phase steps all move, the others stay bit for bit."""
    system = build(name)
    phases = system.phases(0)
    for chosen in range(len(phases)):
        e = engine(build(name))
        before = {n: [p.clone() for p in net.parameters()] for n, net in e.system.networks.items()}
        moving = {n for o in phases[chosen].optimisers for n in e.system.optimisers[o].networks}
        for optimiser, spec in e.system.optimisers.items():
            if not set(spec.networks) <= moving:
                e.optimisers[optimiser].step = lambda: None  # other phases only compute
        train(e, 1)
        for network, parameters in before.items():
            after = list(e.system.networks[network].parameters())
            if network in moving:
                assert all(not torch.equal(a, b) for a, b in zip(parameters, after, strict=True)), network
            else:
                assert all(torch.equal(a, b) for a, b in zip(parameters, after, strict=True)), network


def test_step__same_seed_gives_the_same_bits(name: str) -> None:
    one, two = engine(build(name)), engine(build(name))
    train(one, 3)
    train(two, 3)
    assert _equal(flat(one), flat(two))


def test_step__another_seed_draws_other_numbers(name: str) -> None:
    """Steps until the random numbers matter (a pool has to fill first); the initial weights are the same."""
    one, two = engine(build(name), seed=0), engine(build(name), seed=1)
    train(one, 5)
    train(two, 5)
    assert not _equal(flat(one), flat(two))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_state__save_load_step_equals_step(name: str, precision: str) -> None:
    one = engine(build(name), precision=precision, ema=0.9)
    train(one, 4)
    shared, pools = one.state()
    two = engine(build(name, seed=5), precision=precision, ema=0.9)
    two.load_state(shared, pools)
    for optimiser in two.optimisers.values():
        for parameter, entry in optimiser.state.items():
            assert entry["exp_avg"].stride() == parameter.stride()
    train(one, 3, first=4)
    train(two, 3, first=4)
    assert _equal(flat(one), flat(two))


def test_load_state__names_the_tensor_of_another_shape(name: str) -> None:
    shared, pools = engine(build(name)).state()
    with pytest.raises(ValueError, match=r"stored \(.*expected"):
        engine(build(name, width=4)).load_state(shared, pools)


def test_weight_zero__skips_the_term(name: str) -> None:
    system = build(name)
    for field in dataclasses.fields(type(system).Weights):
        e = engine(build(name))
        e.weights[field.name] = 0.0
        train(e, 1)
        assert field.name not in e.read()[0]


def test_step__non_finite_input_is_named_and_steps_nothing(name: str) -> None:
    e = engine(build(name))
    train(e, 1)
    e.read()
    before = {n: [p.clone() for p in net.parameters()] for n, net in e.system.networks.items()}
    poisoned = batch(e.system, 0, 1)
    field = dataclasses.fields(poisoned)[0].name
    e.step(1, {0: dataclasses.replace(poisoned, **{field: torch.full_like(getattr(poisoned, field), float("nan"))})})
    with pytest.raises(NonFiniteLoss, match="step 1, phase"):
        e.read()
    for network, parameters in before.items():
        assert all(torch.equal(a, b) for a, b in zip(parameters, e.system.networks[network].parameters(), strict=True))


def test_engine__overfits_one_batch(name: str) -> None:
    """The terms that tie outputs to inputs fall when the same batch is seen again and again."""
    quick = {"lr": 2e-3} | ({"pool": 0} if "pool" in _fields(name) else {})
    e = engine(build(name, **quick), total_steps=120)
    same = {0: batch(e.system, 0, 0)}
    for step in range(60):
        e.step(step, same)
    rows = e.read()
    anchor = "l1" if "l1" in rows[0] else "cycle"
    assert rows[-1][anchor] < 0.8 * rows[0][anchor]


def test_translate__is_deterministic_and_keeps_the_shape(name: str) -> None:
    system = build(name).eval()
    x = torch.rand(2, 3, SIZE, 2 * SIZE) * 2 - 1
    with torch.inference_mode():
        for direction in system.conditioning["directions"]:
            condition = Condition(**direction)
            y = system.translate(x, condition)
            assert y.shape == x.shape
            assert torch.equal(y, system.translate(x, condition))


def test_translate__four_images_are_four_singles(name: str) -> None:
    system = build(name).eval()
    x = torch.rand(4, 3, SIZE, SIZE) * 2 - 1
    with torch.inference_mode():
        together = system.translate(x, Condition())
        alone = torch.cat([system.translate(image[None], Condition()) for image in x])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_translate__refuses_an_unknown_domain(name: str) -> None:
    with pytest.raises(RequestError, match="unknown domain 'phot'; did you mean 'photo'"):
        build(name).translate(torch.zeros(1, 3, SIZE, SIZE), Condition(source="phot"))


def test_conditioning__names_the_domains(name: str) -> None:
    conditioning = build(name).conditioning
    assert {"directions", "attributes", "style"} <= set(conditioning)
    assert all({d["source"], d["to"]} <= set(DOMAINS) for d in conditioning["directions"])


def test_two_processes__give_the_gradients_of_one(name: str, tmp_path: Path) -> None:
    """Two processes with two logical ranks each do what one process with all four does."""
    expected = _gradients_of_a_run(name, (0, 1, 2, 3))
    largest = max(value.abs().max().item() for key, value in expected.items() if key.startswith("gradient."))
    mp.spawn(_process, args=(name, str(tmp_path)), nprocs=2)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found.keys() >= {key for key in expected if not key.startswith("pools.")}
        for key, value in found.items():
            # Against the largest entry of the tensor: small ones are sums that cancel. A bias before an instance norm
            # has no gradient but rounding, hence the second bound, against the largest of all gradients.
            scale = expected[key].abs().max().item()
            error = (value - expected[key]).abs().max().item()
            assert error <= 1e-5 * scale + 1e-5 * largest, f"{key}: off by {error:.2g} of {scale:.2g}"


def _process(rank: int, name: str, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    torch.save(_gradients_of_a_run(name, (rank, rank + 2)), f"{directory}/{rank}.pt")
    _nan_on_one_process(rank, name)
    dist.barrier()
    # Not through the interpreter's exit: gloo's threads may still run when their objects are torn down, which aborts.
    os._exit(0)


def _gradients_of_a_run(name: str, hosted: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """The gradients that every optimiser of the first step is given, then the state after three steps."""
    e = engine(build(name), ranks=4, hosted=hosted)
    seen: dict[str, torch.Tensor] = {}
    for which, optimiser in e.optimisers.items():
        step = optimiser.step

        def spy(which: str = which, optimiser: torch.optim.Optimizer = optimiser, step=step) -> None:
            for i, p in enumerate(optimiser.param_groups[0]["params"]):
                seen.setdefault(f"gradient.{which}.{i}", p.grad.clone())
            step()

        optimiser.step = spy
    train(e, 3)
    # Adam divides by the gradient's size: where that is all rounding, so are moments and steps. Weights bound them.
    state = {key: value for key, value in flat(e).items() if key.startswith("networks.")}
    return seen | {f"{key}.norm": value.norm() for key, value in state.items() if value.dim() == 4}


def _nan_on_one_process(rank: int, name: str) -> None:
    """What one process meets, all raise; none is left waiting."""
    e = engine(build(name), ranks=2, hosted=(rank,))
    poisoned = batch(e.system, rank, 0)
    if rank == 1:
        field = dataclasses.fields(poisoned)[0].name
        poisoned = dataclasses.replace(poisoned, **{field: torch.full_like(getattr(poisoned, field), float("nan"))})
    e.step(0, {rank: poisoned})
    with pytest.raises(NonFiniteLoss, match="step 0"):
        e.read()


def _equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    assert one.keys() == two.keys()
    return all(torch.equal(one[key], two[key]) for key in one)


def _fields(name: str) -> set[str]:
    return {f.name for f in dataclasses.fields(type(build(name)).Config)}
