"""Verified checkpoints: everything the next step depends on, as safetensors and JSON.

    checkpoints/step-00000500-<uuid>/
        state.safetensors      networks, optimiser moments, EMA                    written by rank 0
        pools-<v>.safetensors  replay pools of logical rank v                      written by the worker that hosts v
        state.json             step, order digests, configuration, versions        written by rank 0
        COMPLETE               size and sha256 of each of them                      written last, by rank 0

A directory without `COMPLETE`, or with a file that differs from it, is no checkpoint: it is skipped and reported.
Names are never reused. The newest is read back and verified before an older one is deleted; two verified ones stay.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import safetensors.torch
from torch import Tensor

from models.errors import CheckpointError, DataError
from pipelines import console
from pipelines.storage import Store

COMPLETE = "COMPLETE"
STATE = "state.safetensors"
META = "state.json"
KEEP = 2
_FOLDER = "checkpoints"
_NAME = re.compile(r"step-(\d{8,})-[0-9a-f]{8}")

# What the store says of an object that is not what was written.
_DAMAGE = {"E_DIGEST", "E_NOT_FOUND"}

FileDigests = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint, loaded.

    Attributes:
        name: of its directory.
        step: steps behind it; training goes on with this step number.
        shared: what `Engine.state` gave first.
        pools: logical rank → its replay pools.
        meta: the JSON written with it.
    """

    name: str
    step: int
    shared: dict[str, Tensor]
    pools: dict[int, dict[str, Tensor]]
    meta: dict[str, Any]


def new_name(step: int) -> str:
    """A directory name for a checkpoint after `step` steps, unlike any other."""
    return f"step-{step:08d}-{uuid.uuid4().hex[:8]}"


def write_part(store: Store, name: str, files: Mapping[str, bytes]) -> FileDigests:
    """Write some files of a checkpoint; their sizes and digests, for `commit`."""
    digests: FileDigests = {}
    for file, data in files.items():
        store.write(f"{_FOLDER}/{name}/{file}", data)
        digests[file] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return digests


def pack(tensors: Mapping[str, Tensor]) -> bytes:
    """safetensors bytes; the same tensors give the same bytes."""
    return safetensors.torch.save(dict(sorted(tensors.items())))


def commit(store: Store, name: str, digests: FileDigests) -> None:
    """Read every file back, verify it, then write `COMPLETE`; older checkpoints beyond the last two are deleted.

    Raises:
        CheckpointError: a file did not arrive whole, or the name is taken.
    """
    for file, entry in digests.items():
        try:
            store.read_verified(f"{_FOLDER}/{name}/{file}", entry["sha256"], entry["bytes"])
        except DataError as error:
            raise CheckpointError(f"the checkpoint {name} could not be verified: {error}") from error
    document = json.dumps({"files": digests}, indent=1, sort_keys=True).encode()
    if not store.write_new(f"{_FOLDER}/{name}/{COMPLETE}", document):
        raise CheckpointError(f"{store.uri}: the checkpoint {name} is there already; two writers share this run")
    _prune(store)


def latest(store: Store, ranks: Collection[int] | None = None) -> Checkpoint | None:
    """The newest complete and verified checkpoint, or None where no run got as far; those skipped are named on stderr.

    Args:
        ranks: logical ranks whose replay pools are wanted; None for all.

    Raises:
        CheckpointError: there are complete ones, and all of them are damaged.
        StorageError, DataError: the store cannot be read; that says nothing of the checkpoints.
    """
    found = _directories(store)
    for name in sorted(found, key=_step_of, reverse=True):
        try:
            return _load(store, name, found[name], ranks)
        except (CheckpointError, DataError) as error:
            if isinstance(error, DataError) and error.code not in _DAMAGE:
                raise
            console.warn(f"checkpoint {name} is skipped: {error}")
    damaged = [name for name, files in found.items() if COMPLETE in files]
    if damaged:
        raise CheckpointError(
            f"{store.uri}: none of {len(damaged)} checkpoints can be verified",
            hint="restore one of them, or begin another run",
        )
    return None


def discard_after(store: Store, kept: Checkpoint) -> None:
    """Delete what claims to be as new as `kept` or newer: it was skipped for a reason, and its steps are done again."""
    for name, files in _directories(store).items():
        if name != kept.name and _step_of(name) >= kept.step:
            _delete(store, name, files)


def _load(store: Store, name: str, files: set[str], ranks: Collection[int] | None) -> Checkpoint:
    if COMPLETE not in files:
        raise CheckpointError("it was never completed")
    try:
        digests = json.loads(store.read(f"{_FOLDER}/{name}/{COMPLETE}"))["files"]
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{COMPLETE} cannot be read") from None
    raw, pools = {}, {}
    for file, entry in digests.items():
        match = re.fullmatch(r"pools-(\d+)\.safetensors", file)
        if match and ranks is not None and int(match[1]) not in ranks:
            continue
        raw[file] = store.read_verified(f"{_FOLDER}/{name}/{file}", entry["sha256"], entry["bytes"])
        if match:
            pools[int(match[1])] = safetensors.torch.load(raw[file])
    meta = json.loads(raw[META])
    return Checkpoint(name, meta["step"], safetensors.torch.load(raw[STATE]), pools, meta)


def _directories(store: Store) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for path, _ in store.list(_FOLDER):
        name, _, file = path.removeprefix(f"{_FOLDER}/").partition("/")
        if _NAME.fullmatch(name):
            found.setdefault(name, set()).add(file)
    return found


def _step_of(name: str) -> int:
    match = _NAME.fullmatch(name)
    assert match is not None
    return int(match[1])


def _prune(store: Store) -> None:
    """Delete what is older than the last complete ones, and what was begun before them and never completed."""
    found = _directories(store)
    complete = sorted((n for n in found if COMPLETE in found[n]), key=_step_of)
    if len(complete) < KEEP:
        return
    oldest_kept = _step_of(complete[-KEEP])
    for name, files in found.items():
        if name in complete[-KEEP:] or (_step_of(name) > oldest_kept and COMPLETE not in files):
            continue
        _delete(store, name, files)


def _delete(store: Store, name: str, files: set[str]) -> None:
    # COMPLETE goes first: a deletion that stops half-way leaves nothing that looks like a checkpoint.
    for file in sorted(files, key=lambda f: f != COMPLETE):
        store.delete(f"{_FOLDER}/{name}/{file}")
