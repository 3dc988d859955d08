"""Weights of a published network from a file, checked by name and digest; no code in the file is run."""

from __future__ import annotations

import hashlib
import io
import pickle
import re

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from models.errors import DataError
from pipelines.storage import Store, split_name

# As torchvision and timm name their files: inception_v3_google-0cc3c7bd.pth
_DIGEST_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.[a-z]+$")


def read_state_dict(uri: str) -> tuple[dict[str, Tensor], str]:
    """(tensors by name, sha256 of the file) of a `.safetensors` file, or a `.pth`/`.pt` one that holds tensors only.

    Where the file's name ends in a digest, as torchvision's do, the content must agree with it.

    Raises:
        DataError: no such file, another format, damaged, or not what its name says.
    """
    folder, name = split_name(uri)
    data = Store(folder).read(name)
    digest = hashlib.sha256(data).hexdigest()
    named = _DIGEST_IN_NAME.search(name)
    if named and not digest.startswith(named[1]):
        raise DataError(
            f"{uri} is not what its name says: sha256 {digest[:16]}…, expected {named[1]}…", code="E_DIGEST"
        )
    if name.endswith(".safetensors"):
        return _read(uri, lambda: safetensors.torch.load(data)), digest
    if name.endswith((".pth", ".pt", ".bin")):
        return _read(uri, lambda: torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)), digest
    raise DataError(
        f"not a weights file: {uri}", code="E_WEIGHTS", hint="allowed: .safetensors, or .pth with tensors only"
    )


def _read(uri: str, parse) -> dict[str, Tensor]:
    try:
        state = parse()
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"cannot read weights from {uri}: {reason}", code="E_WEIGHTS") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise DataError(f"cannot read weights from {uri}: it is not a dictionary of tensors", code="E_WEIGHTS")
    return state


def load_into(network: nn.Module, state: dict[str, Tensor], uri: str, what: str) -> None:
    """Copy the tensors into a network that needs exactly these names and shapes.

    Raises:
        DataError: some are missing, too many, or of another shape.
    """
    wanted = {k: tuple(v.shape) for k, v in network.state_dict().items()}
    given = {k: tuple(v.shape) for k, v in state.items()}
    # Old files lack the count of batches that a batch norm keeps; it plays no role in evaluation.
    missing = sorted(k for k in wanted.keys() - given.keys() if not k.endswith("num_batches_tracked"))
    extra = sorted(given.keys() - wanted.keys())
    differing = sorted(k for k in wanted.keys() & given.keys() if wanted[k] != given[k])
    for names, why in ((missing, "missing"), (extra, "not part of it"), (differing, "of another shape")):
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise DataError(f"{uri} does not hold the weights of {what}: {why}: {shown}", code="E_WEIGHTS")
    network.load_state_dict(state, strict=False)


def normalised(images: Tensor) -> Tensor:
    """Values in [0, 1], (n, 3, h, w) → less ImageNet's channel means, over its deviations."""
    mean = torch.tensor((0.485, 0.456, 0.406), device=images.device).view(1, 3, 1, 1)
    deviation = torch.tensor((0.229, 0.224, 0.225), device=images.device).view(1, 3, 1, 1)
    return (images - mean) / deviation
