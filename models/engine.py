"""One training step of any system: its phases in order, for every logical rank that this process hosts.

    for phase in system.phases(step):
        for each hosted logical rank:  losses → Σ weight × term (float32) → backward into the phase's parameters
        sum gradients over processes → optimiser steps → phase.after()
    EMA

The engine knows no system by name. It never waits for the device: loss terms and flags stay there until `read`.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn

from models.batch import Batch
from models.errors import ConfigError, NonFiniteLoss
from models.losses import total
from models.replay import ReplayPool
from models.schedule import Schedule
from models.sync import GradientSync
from models.system import Draws, Phase, StepContext, System

Precision = Literal["fp32", "bf16"]

_TOTAL = "weighted sum"


@dataclass(frozen=True)
class EngineConfig:
    """What does not change in a run.

    Attributes:
        total_steps: length of the run; learning rates and curricula are functions of step / total_steps.
        logical_ranks: V; the global batch is the union of V micro-batches, each with its own random stream and pools.
        hosted: the logical ranks of this process.
        seed: of every random number of the run.
        precision: of the networks' arithmetic; losses, weights and optimisers are in float32 in any case.
        ema: decay of an exponential moving average of the generators, or None.
    """

    total_steps: int
    logical_ranks: int = 1
    hosted: tuple[int, ...] = (0,)
    seed: int = 0
    precision: Precision = "fp32"
    ema: float | None = None


def random_stream(*key: int | str) -> torch.Generator:
    """A generator on the CPU whose sequence is a pure function of `key`."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class Engine:
    """Plays a system's phases and owns what training adds to it: optimisers, replay pools, EMA, terms not yet read."""

    def __init__(
        self, system: System, weights: Any, config: EngineConfig, device: torch.device, sync: GradientSync | None = None
    ) -> None:
        # Convolutions are fastest channels-last; whatever is stored or sent elsewhere is brought back to this layout.
        system.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  torch declares none
        self.system, self.config, self.device = system, config, device
        self.weights: dict[str, float | Schedule] = {f.name: getattr(weights, f.name) for f in fields(weights)}
        self.sync = sync or GradientSync()
        self.optimisers = {name: _adam(system, spec) for name, spec in system.optimisers.items()}
        self.pools = {v: {n: ReplayPool(c) for n, c in system.pools.items()} for v in config.hosted}
        self.ema: dict[str, nn.Module] = {}
        if config.ema is not None:
            self.ema = {n: _frozen_copy(system.networks[n]) for n in system.generators}
        self._unread: list[tuple[int, list[tuple[str, str]], Tensor]] = []
        self._parameters: dict[tuple[str, ...], list[nn.Parameter]] = {}

    def step(self, step: int, batches: Mapping[int, Batch]) -> None:
        """One optimiser step of every phase on the micro-batches of the hosted logical ranks.

        Args:
            step: its number, from 0; also the key of its random numbers.
            batches: hosted logical rank → micro-batch on the engine's device.
        """
        fraction = step / self.config.total_steps
        draws = {v: self.draws(v, step, batches[v].size) for v in self.config.hosted}
        carries: dict[int, dict[str, Tensor]] = {v: {} for v in self.config.hosted}
        self.system.train()
        labels: list[tuple[str, str]] = []
        values: list[Tensor] = []
        for phase in self.system.phases(step):
            terms = self._phase(phase, step, fraction, batches, draws, carries)
            labels += [(phase.name, name) for name in terms]
            values += terms.values()
        if self.config.ema is not None:
            self._update_ema(self.config.ema)
        if values:
            self._unread.append((step, labels, torch.stack(values)))

    def draws(self, rank: int, step: int, n: int) -> Draws:
        """The random numbers of one logical rank at one step, a function of (seed, rank, step)."""
        made = self.system.draw(random_stream(self.config.seed, "draw", rank, step), n)
        return {k: v if k.startswith("pool") else v.to(self.device, non_blocking=True) for k, v in made.items()}

    def _phase(
        self,
        phase: Phase,
        step: int,
        fraction: float,
        batches: Mapping[int, Batch],
        draws: Mapping[int, Draws],
        carries: dict[int, dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        weights = self._weights_now(phase, fraction)
        active = frozenset(name for name, weight in weights.items() if weight != 0)
        parameters = self._parameters_of(phase)
        ranks = self.config.logical_ranks
        sums: dict[str, Tensor] = {}
        for i, v in enumerate(self.config.hosted):
            ctx = StepContext(step, active, draws[v], self.pools[v])
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
                out = phase.losses(batches[v], carries[v], ctx)
            _check_names(phase, out.terms, active)
            carries[v] |= out.carry
            if not out.terms:
                continue
            loss = total(out.terms, weights) / ranks
            if i == len(self.config.hosted) - 1:
                self.sync.watch(parameters)
            torch.autograd.backward(loss, inputs=parameters)
            # The weighted sum can overflow where its terms do not.
            for name, term in (*out.terms.items(), (_TOTAL, loss * ranks)):
                sums[name] = sums.get(name, 0) + term.detach() / ranks
        if not sums:
            return {}
        finite = torch.isfinite(torch.stack(list(sums.values()))).all()
        flag = self.sync.finish((~finite).float())
        for name in phase.optimisers:
            self._step_optimiser(name, fraction, flag)
        if phase.after is not None:
            phase.after()
        return sums

    def _weights_now(self, phase: Phase, fraction: float) -> dict[str, float]:
        missing = [t for t in phase.terms if t not in self.weights]
        assert not missing, f"phase {phase.name} of {self.system.name} has terms without a weight: {missing}"
        chosen = {t: self.weights[t] for t in phase.terms}
        return {t: float(w) if isinstance(w, int | float) else w(fraction) for t, w in chosen.items()}

    def _step_optimiser(self, name: str, fraction: float, flag: Tensor) -> None:
        spec, optimiser = self.system.optimisers[name], self.optimisers[name]
        for group in optimiser.param_groups:
            group["lr"] = spec.lr * spec.schedule(fraction)
        # A step on non-finite gradients is skipped on the device, without waiting for it: fused Adam takes the flag.
        vars(optimiser)["found_inf"] = (flag > 0).float()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    @torch.no_grad()
    def _update_ema(self, decay: float) -> None:
        for name, average in self.ema.items():
            for mean, live in zip(average.parameters(), self.system.networks[name].parameters(), strict=True):
                mean.lerp_(live, 1 - decay)

    def _parameters_of(self, phase: Phase) -> list[nn.Parameter]:
        if phase.optimisers not in self._parameters:
            names = [n for o in phase.optimisers for n in self.system.optimisers[o].networks]
            self._parameters[phase.optimisers] = [p for n in names for p in self.system.networks[n].parameters()]
        return self._parameters[phase.optimisers]

    def read(self) -> list[dict[str, float]]:
        """The loss terms of every step since the last call, in one transfer: `{"step": …, term: mean over the batch}`.

        Collective: every process must call it after the same steps.

        Raises:
            NonFiniteLoss: a term was not finite; no weight has been stepped on it.
        """
        unread, self._unread = self._unread, []
        if not unread:
            return []
        flat = self.sync.sum(torch.cat([values for _, _, values in unread])).tolist()
        rows = []
        for step, labels, values in unread:
            numbers, flat = flat[: len(values)], flat[len(values) :]
            for (phase, term), number in zip(labels, numbers, strict=True):
                if number != number or number in (float("inf"), float("-inf")):
                    raise NonFiniteLoss(
                        f"step {step}, phase '{phase}': the term '{term}' is {number}",
                        hint="resume with a smaller learning rate or weight, or with --precision fp32",
                    )
            terms: dict[str, float] = {}
            for (_, term), number in zip(labels, numbers, strict=True):
                if term != _TOTAL:
                    terms[term] = terms.get(term, 0.0) + number  # two phases may have a term in common
            rows.append({"step": step, **terms})
        return rows

    def state(self) -> tuple[dict[str, Tensor], dict[int, dict[str, Tensor]]]:
        """(what every process holds alike, replay pools of the hosted logical ranks), as copies on the CPU.

        Raises:
            NonFiniteLoss: a network holds a number that is not finite.
        """
        shared: dict[str, Tensor] = {}
        for name, network in self.system.networks.items():
            for key, value in network.state_dict().items():
                shared[f"networks.{name}.{key}"] = value
        for name, tensor in shared.items():
            if not torch.isfinite(tensor).all():
                raise NonFiniteLoss(
                    f"'{name}' holds a number that is not finite", hint="resume from an earlier checkpoint"
                )
        for name, average in self.ema.items():
            for key, value in average.state_dict().items():
                shared[f"ema.{name}.{key}"] = value
        for name, optimiser in self.optimisers.items():
            for index, entry in optimiser.state_dict()["state"].items():
                for key, value in entry.items():
                    shared[f"optimisers.{name}.{index}.{key}"] = value
        pools = {
            v: {f"{name}.{key}": value for name, pool in named.items() for key, value in pool.state_dict().items()}
            for v, named in self.pools.items()
        }
        return _to_cpu(shared), {v: _to_cpu(tensors) for v, tensors in pools.items()}

    def load_state(self, shared: Mapping[str, Tensor], pools: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Inverse of `state`. Strict: a tensor that is missing, unknown or of another shape is an error.

        Raises:
            ConfigError: names the tensor and both shapes.
        """
        for name, network in self.system.networks.items():
            _load_network(network, _below(shared, f"networks.{name}."), name)
        for name, average in self.ema.items():
            _load_network(average, _below(shared, f"ema.{name}."), f"ema of {name}")
        for name, optimiser in self.optimisers.items():
            _load_optimiser(optimiser, _below(shared, f"optimisers.{name}."), name)
        for v, named in self.pools.items():
            if named and v not in pools:
                raise ConfigError(f"the stored state holds no replay pools of logical rank {v}", code="E_ARCHITECTURE")
            for name, pool in named.items():
                images = pools[v].get(f"{name}.images")
                pool.load_state_dict({} if images is None else {"images": images.to(self.device)})

    def inference_system(self) -> System:
        """The system in evaluation mode, with the averaged generators where there is an EMA; shares training's memory.

        The next `step` goes back to training mode by itself.
        """
        system = self.system
        if self.ema:
            system = copy.copy(system)
            system._modules = {**self.system._modules, **self.ema}
        return system.eval()


def _adam(system: System, spec: Any) -> torch.optim.Adam:
    networks = system.networks
    parameters = [p for n in spec.networks for p in networks[n].parameters()]
    return torch.optim.Adam(parameters, lr=spec.lr, betas=spec.betas, weight_decay=spec.weight_decay, fused=True)


def _check_names(phase: Phase, terms: Mapping[str, Tensor], active: frozenset[str]) -> None:
    assert set(terms) == set(active), f"phase {phase.name} returned {sorted(terms)}, active are {sorted(active)}"


def _frozen_copy(network: nn.Module) -> nn.Module:
    return copy.deepcopy(network).requires_grad_(False).eval()


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}


def _load_network(network: nn.Module, tensors: Mapping[str, Tensor], name: str) -> None:
    expected = network.state_dict()
    wrong: Sequence[str] = [
        f"{key}: stored {tuple(tensors[key].shape) if key in tensors else 'nothing'}, "
        f"expected {tuple(expected[key].shape) if key in expected else 'nothing'}"
        for key in sorted(set(expected) | set(tensors))
        if key not in tensors or key not in expected or tensors[key].shape != expected[key].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 1} more" if wrong[1:] else ""
        raise ConfigError(
            f"the stored network '{name}' is of another shape: {wrong[0]}{more}",
            code="E_ARCHITECTURE",
            hint="use the system's settings of the stored run (its run.yaml)",
        )
    network.load_state_dict(dict(tensors))


def _load_optimiser(optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor], name: str) -> None:
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, field = key.split(".", 1)
        parameter = parameters[int(index)] if int(index) < len(parameters) else None
        if parameter is not None and value.shape == parameter.shape:
            # Adam's fused kernel walks moments and parameters side by side: both need the same layout in memory.
            value = torch.empty_like(parameter, memory_format=torch.preserve_format).copy_(value)
        state.setdefault(int(index), {})[field] = value.clone()
    if state and set(state) != set(range(len(parameters))):
        raise ConfigError(
            f"the stored optimiser '{name}' has {len(state)} entries, this one has {len(parameters)}",
            code="E_ARCHITECTURE",
        )
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})


def _to_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Detached copies in contiguous memory (on the CPU, `to` alone would alias what training goes on to change)."""
    return {k: v.detach().to("cpu", copy=True).contiguous() for k, v in tensors.items()}
