"""A bundle: a servable generator in a local directory. It holds everything that inference needs, and nothing else.

    weights.safetensors   the generator networks, keys "<network>.<parameter>"
    config.json           how to build them, what may be asked of them, scores, origin; sha256 of the weights
    card.md               the same for people

Nothing in it is code, and nothing in it is executed at load.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from models import system_class
from models.card import card
from models.errors import BundleError, ConfigError
from models.system import System

FORMAT = 1
WEIGHTS, CONFIG, CARD = "weights.safetensors", "config.json", "card.md"
FILES = (WEIGHTS, CARD, CONFIG)
_REQUIRED = {
    "system": str,
    "config": dict,
    "domains": list,
    "conditioning": dict,
    "size": int,
    "weights_sha256": str,
}


@dataclass(frozen=True)
class Bundle:
    """A loaded bundle.

    Attributes:
        name: of the system, as in `models.SYSTEMS`.
        system: in evaluation mode, with the generator networks only.
        config: of the system, as JSON.
        domains: names, in the order of training.
        size: side in pixels of the images it was trained on.
        sha256: of weights.safetensors.
        conditioning: what a caller may ask for (`System.conditioning`).
        scores: of the last evaluation, or empty.
        document: config.json as it is.
    """

    name: str
    system: System
    config: dict[str, Any]
    domains: tuple[str, ...]
    size: int
    sha256: str
    conditioning: dict[str, Any]
    scores: dict[str, Any]
    document: dict[str, Any]


def save_bundle(
    directory: str | Path,
    system: System,
    *,
    size: int,
    step: int,
    ema: bool,
    scores: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    code_version: str = "",
    weights: Mapping[str, Any] | None = None,
) -> str:
    """Write the generator networks of `system`, as they are, into `directory`.

    The same weights give the same bytes: keys are sorted and no time is stored. config.json is written last, so a
    directory without it is not a bundle.

    Args:
        size: side in pixels of the training images.
        step: optimiser steps behind these weights.
        ema: whether they are the moving average.
        data: `uri`, `digest` and `licence` of the training data.
        weights: loss weights of the run, for the record.

    Returns:
        sha256 of weights.safetensors, as hex.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    raw = save_tensors(_generator_tensors(system))
    digest = hashlib.sha256(raw).hexdigest()
    document = {
        "format": FORMAT,
        "system": system.name,
        "config": dataclasses.asdict(system.config),
        "domains": list(system.domains),
        "conditioning": system.conditioning,
        "size": size,
        "size_multiple": system.size_multiple,
        "fixed_size": system.fixed_size,
        "value_range": list(system.value_range),
        "image": {"channels": 3, "depth": 8},
        "step": step,
        "ema": ema,
        "weights_sha256": digest,
        "loss_weights": dict(weights or {}),
        "scores": dict(scores or {}),
        "data": dict(data or {}),
        "code_version": code_version,
    }
    (directory / CONFIG).unlink(missing_ok=True)
    _write(directory / WEIGHTS, raw)
    _write_documents(directory, document)
    return digest


def load_bundle(directory: str | Path, device: str | torch.device = "cpu") -> Bundle:
    """Build the system of a bundle and load its generators; the digest of the weights is checked.

    Raises:
        BundleError: not a bundle, an unknown format or system, weights that do not match digest or architecture.
    """
    directory = Path(directory)
    document = read_config(directory)
    raw = _read(directory, WEIGHTS)
    _check_digest(directory, document, raw)
    try:
        tensors = load_tensors(raw)
    except SafetensorError as error:
        raise BundleError(f"{directory}: {WEIGHTS} cannot be read: {error}", code="E_BUNDLE_WEIGHTS") from None
    system = _build(directory, document)
    _load_generators(directory, system, tensors)
    return Bundle(
        name=document["system"],
        system=system.to(device).eval().requires_grad_(False),
        config=document["config"],
        domains=tuple(document["domains"]),
        size=document["size"],
        sha256=document["weights_sha256"],
        conditioning=document["conditioning"],
        scores=document.get("scores") or {},
        document=document,
    )


def read_config(directory: str | Path) -> dict[str, Any]:
    """config.json of a bundle, checked for format and required fields; loads no weights.

    Raises:
        BundleError: there is none, or it is not one.
    """
    directory = Path(directory)
    return _parse_config(str(directory), _read(directory, CONFIG))


def update_scores(directory: str | Path, scores: Mapping[str, Any]) -> None:
    """Replace the scores of a bundle; the weights stay."""
    directory = Path(directory)
    document = read_config(directory)
    document["scores"] = dict(scores)
    _write_documents(directory, document)


def copy_bundle(read: Callable[[str], bytes], where: str, cache: str | Path) -> Path:
    """Bring a bundle that is elsewhere into a local cache, verified; a copy that is there already and intact is used.

    Args:
        read: name of a file of the bundle → its bytes (a store's `read`).
        where: what to call the bundle in messages.
        cache: directory; the bundle goes to a subdirectory named by the digest of its config.json.

    Raises:
        BundleError: as `load_bundle`; nothing is left behind.
    """
    raw_config = read(CONFIG)
    document = _parse_config(where, raw_config)
    target = Path(cache) / hashlib.sha256(raw_config).hexdigest()[:32]
    with contextlib.suppress(OSError, BundleError):
        _check_digest(where, document, (target / WEIGHTS).read_bytes())
        if (target / CONFIG).read_bytes() == raw_config:
            return target
    raw = read(WEIGHTS)
    _check_digest(where, document, raw)
    target.mkdir(parents=True, exist_ok=True)
    _write(target / WEIGHTS, raw)
    _write(target / CARD, card(document).encode())
    _write(target / CONFIG, raw_config)
    return target


def _generator_tensors(system: System) -> dict[str, Tensor]:
    tensors = {}
    for network in sorted(system.generators):
        for name, value in sorted(system.networks[network].state_dict().items()):
            # A clone: safetensors refuses tensors that share memory, and stores no memory format.
            tensors[f"{network}.{name}"] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    return tensors


def _build(directory: Path, document: Mapping[str, Any]) -> System:
    try:
        cls = system_class(document["system"])
        config = cls.Config(**{name: _tuples(value) for name, value in document["config"].items()})
        # On the meta device nothing is allocated or initialised: the stored tensors take the place of the parameters.
        with torch.device("meta"):
            system = cls(config, domains=tuple(document["domains"]))
    except (ConfigError, TypeError) as error:
        raise BundleError(f"{directory}: {CONFIG} does not describe a known system: {error}") from None
    for name in list(system.networks):
        if name not in cls.generators:
            delattr(system, name)
    return system


def _load_generators(directory: Path, system: System, tensors: dict[str, Tensor]) -> None:
    wanted = {f"{n}.{k}": v for n in system.generators for k, v in system.networks[n].state_dict().items()}
    missing, extra = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or extra:
        wrong = f"lacks {missing[0]}" if missing else f"has the unknown {extra[0]}"
        message = f"{directory}: {WEIGHTS} {wrong} ({len(missing)} missing, {len(extra)} unknown)"
        raise BundleError(message, code="E_BUNDLE_WEIGHTS")
    for name, value in wanted.items():
        if value.shape != tensors[name].shape:
            shapes = f"{tuple(tensors[name].shape)}, the architecture needs {tuple(value.shape)}"
            raise BundleError(f"{directory}: tensor {name} has shape {shapes}", code="E_BUNDLE_WEIGHTS")
        if tensors[name].is_floating_point() and not bool(torch.isfinite(tensors[name]).all()):
            raise BundleError(f"{directory}: tensor {name} is not finite", code="E_BUNDLE_WEIGHTS")
    for network in system.generators:
        prefix = f"{network}."
        own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        system.networks[network].load_state_dict(own, assign=True)
    left = [name for name, value in (*system.named_parameters(), *system.named_buffers()) if value.is_meta]
    assert not left, f"tensors that a bundle does not restore: {left}"


def _parse_config(where: str, raw: bytes) -> dict[str, Any]:
    try:
        document = json.loads(raw)
    except ValueError as error:
        raise BundleError(f"{where}: {CONFIG} is not JSON: {error}", code="E_BUNDLE_CONFIG") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        found = document.get("format") if isinstance(document, dict) else None
        message = f"{where}: bundle format {found!r}; this version reads format {FORMAT}"
        raise BundleError(message, code="E_BUNDLE_FORMAT")
    wrong = [name for name, kind in _REQUIRED.items() if not isinstance(document.get(name), kind)]
    if wrong:
        message = f"{where}: {CONFIG} lacks or has a wrong type for: {', '.join(wrong)}"
        raise BundleError(message, code="E_BUNDLE_CONFIG")
    return document


def _check_digest(where: str | Path, document: Mapping[str, Any], raw: bytes) -> None:
    found = hashlib.sha256(raw).hexdigest()
    if found != document["weights_sha256"]:
        expected = f"{CONFIG} expects {document['weights_sha256'][:16]}…"
        message = f"{where}: {WEIGHTS} has sha256 {found[:16]}…, {expected}: the file is damaged or was replaced"
        raise BundleError(message, code="E_BUNDLE_DIGEST")


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _read(directory: Path, name: str) -> bytes:
    try:
        return (directory / name).read_bytes()
    except OSError:
        if not directory.is_dir():
            raise BundleError(
                f"{directory}: no such directory; a bundle was expected", code="E_BUNDLE_MISSING"
            ) from None
        message = f"{directory}: not a bundle: {name} is missing or cannot be read"
        raise BundleError(message, code="E_BUNDLE_MISSING") from None


def _write_documents(directory: Path, document: Mapping[str, Any]) -> None:
    _write(directory / CARD, card(document).encode())
    _write(directory / CONFIG, (json.dumps(document, indent=1, sort_keys=True) + "\n").encode())


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all: a temporary file beside it, then a rename."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
