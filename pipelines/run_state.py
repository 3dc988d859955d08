"""The state of a run on its way into a checkpoint and back: every worker's part, agreed on by all."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from models.engine import Engine
from models.errors import CheckpointError, DataError
from pipelines import checkpoint, console
from pipelines.shards import Dataset
from pipelines.storage import Store
from pipelines.version import code_version

if TYPE_CHECKING:
    from pipelines.context import WorkerContext


def save(
    store: Store,
    step: int,
    engine: Engine,
    orders: Mapping[int, str],
    context: WorkerContext,
    about: Mapping[str, Any],
) -> None:
    """Write a verified checkpoint of what is behind `step` steps. Collective.

    Args:
        orders: hosted logical rank → digest of the samples it was trained on.
        about: JSON to keep beside it.

    Raises:
        NonFiniteLoss: a network holds a number that is not finite.
        CheckpointError: what was written could not be verified.
    """
    shared, pools = engine.state()
    name = _from_first(checkpoint.new_name(step))
    parts = {f"pools-{v}.safetensors": checkpoint.pack(tensors) for v, tensors in pools.items()}
    all_orders = gather(dict(orders))
    if context.rank == 0:
        meta = {
            "step": step,
            "orders": {str(v): order for part in all_orders for v, order in part.items()},
            "environment": _environment(context),
            **about,
        }
        parts[checkpoint.STATE] = checkpoint.pack(shared)
        parts[checkpoint.META] = json.dumps(meta, indent=1, sort_keys=True).encode()
    digests = gather(checkpoint.write_part(store, name, parts))
    if context.rank == 0:
        checkpoint.commit(store, name, {k: v for part in digests for k, v in part.items()})
    _barrier()


def restore(
    store: Store, engine: Engine, dataset: Dataset, context: WorkerContext, hosted: tuple[int, ...]
) -> checkpoint.Checkpoint | None:
    """Load the newest verified checkpoint into the engine, if there is one. Collective.

    Raises:
        CheckpointError: all are damaged, or workers see different ones.
        DataError: the dataset is not the one the run was begun with.
        ConfigError: the stored networks are of another shape.
    """
    found = checkpoint.latest(store, hosted)
    name = found.name if found else ""
    if _from_first(name) != name:
        raise CheckpointError(f"workers see different checkpoints in {store.uri}; it must be shared storage")
    if found is None:
        return None
    if found.meta["index_digest"] != dataset.manifest.digest:
        raise DataError(
            f"{dataset.uri} is not the dataset that this run was begun with "
            f"(digest {dataset.manifest.digest[:12]}…, then {found.meta['index_digest'][:12]}…)",
            hint="restore it, or begin another run",
        )
    now, then = _environment(context), found.meta["environment"]
    for key in now:
        if now[key] != then.get(key) and context.rank == 0:
            console.warn(f"{key} is {now[key]}, was {then.get(key)}: the run may not continue bit for bit")
    engine.load_state(found.shared, found.pools)
    if context.rank == 0:
        checkpoint.discard_after(store, found)
    return found


def _environment(context: WorkerContext) -> dict[str, Any]:
    """What besides the configuration can change the bits of a result."""
    device = torch.cuda.get_device_name() if context.device.type == "cuda" else platform.machine()
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "workers": context.world,
        "device": device,
        "code": code_version(),
    }


def gather(value: Any) -> list[Any]:
    """Collective: `value` of every process, by rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _from_first(value: str) -> str:
    """Rank 0's value, on every process."""
    return gather(value)[0]


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
