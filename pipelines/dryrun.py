"""What a run would be, without data and without a cluster: settings, networks, phases, an estimate of memory."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from pipelines.config import RunConfig, resolve


def dry_run(options: Mapping[str, Any]) -> dict[str, Any]:
    """The resolved configuration and what follows from it; nothing is allocated, read or written.

    Returns:
        `config`, `networks` (name → parameters), `weights`, `phases`, `batch` (micro-batch shapes), `memory_bytes`.
    """
    options = copy.deepcopy(dict(options))
    options.setdefault("out", "runs/dry-run")
    options["data"] = {"uri": "not-given", **{k: v for k, v in (options.get("data") or {}).items() if v is not None}}
    config = resolve(options)
    domains = config.data.domains or tuple("abcdefgh"[: _num_domains(config)])
    with torch.device("meta"):
        system = config.build_system(domains)
    networks = {name: sum(p.numel() for p in network.parameters()) for name, network in system.networks.items()}
    micro = config.train.batch // config.train.logical_ranks
    shape = [micro, 3, config.size, config.size]
    fields = [name for stream in system.batch.streams for name in stream.images]
    phases = [{"name": p.name, "optimisers": list(p.optimisers), "terms": list(p.terms)} for p in system.phases(0)]
    return {
        "config": config.model_dump(mode="json"),
        "networks": networks,
        "weights": config.weights,
        "phases": phases,
        "batch": dict.fromkeys(fields, shape),
        "memory_bytes": _memory_bytes(config, system, sum(networks.values())),
    }


def describe(report: Mapping[str, Any]) -> str:
    """The report as text."""
    import yaml

    lines = [yaml.safe_dump(report["config"], sort_keys=False).rstrip(), ""]
    lines += [f"network {name}: {count:,} parameters" for name, count in report["networks"].items()]
    lines += [
        f"phase {p['name']}: steps {', '.join(p['optimisers'])} on {', '.join(p['terms'])}" for p in report["phases"]
    ]
    lines += [f"batch {name}: {' x '.join(map(str, shape))}" for name, shape in report["batch"].items()]
    lines.append(f"memory of a worker: about {report['memory_bytes'] / 2**30:.2f} GiB")
    return "\n".join(lines)


def _num_domains(config: RunConfig) -> int:
    from models import system_class

    return system_class(config.name).batch.num_domains


def _memory_bytes(config: RunConfig, system: Any, parameters: int) -> int:
    """Weights, gradients and Adam's two moments in float32, replay pools, and the activations of the widest phase.

    Activations are counted by running every network once on the meta device and summing what its layers put out; each
    is kept once for backward, in every use that a step makes of a network (about three).
    """
    micro = config.train.batch // config.train.logical_ranks
    image = micro * 3 * config.size**2
    pools = sum(capacity for capacity in system.pools.values()) * 3 * config.size**2 * 4
    outputs = 0

    def count(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
        nonlocal outputs
        if isinstance(output, torch.Tensor):
            outputs += output.numel()

    for network in system.networks.values():
        first = next(m for m in network.modules() if isinstance(m, torch.nn.Conv2d))
        leaves = [m for m in network.modules() if not list(m.children())]
        hooks = [leaf.register_forward_hook(count) for leaf in leaves]
        network(torch.empty(micro, first.in_channels, config.size, config.size, device="meta"))
        for hook in hooks:
            hook.remove()
    width = 2 if config.train.precision == "bf16" else 4
    hosted = max(1, config.train.logical_ranks // max(1, config.train.workers))
    return 16 * parameters + hosted * pools + 3 * width * outputs + 8 * image
