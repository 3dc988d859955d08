"""Images in, images out: a bundle applied to images of any size. Serving, whole-prefix translation and evaluation all
run this code, so they give the same pixels."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from models import codec
from models.bundle import Bundle
from models.errors import BundleError, ConfigError, RequestError, nearest
from models.system import Condition

Pixels = np.ndarray
PRECISIONS = ("fp32", "bf16")


class Translator:
    """A bundle on a device.

    Args:
        precision: "fp32", or "bf16" for automatic mixed precision.
        batch: most images that go through the network at once.
    """

    def __init__(self, bundle: Bundle, device: str = "cpu", precision: str = "fp32", batch: int = 8) -> None:
        if precision not in PRECISIONS:
            raise ConfigError(f"unknown precision '{precision}'", hint=nearest(precision, PRECISIONS))
        self.bundle, self.device, self.batch = bundle, torch.device(device), batch
        self.precision = precision
        system = bundle.system.to(self.device)
        self.system = system.to(memory_format=torch.channels_last).eval()  # pyright: ignore[reportCallIssue]

    def check(self, condition: Condition) -> tuple[str, str]:
        """(source, to) of a condition that this bundle can fulfil.

        Raises:
            RequestError: it asks for what the bundle does not offer.
        """
        check_condition(self.bundle.conditioning, condition)
        return self.system.direction(condition)

    def pixels(self, images: Sequence[Pixels], condition: Condition) -> list[Pixels]:
        """Translate images `(h, w, 3)` uint8 of any sizes; each result has the size of its image.

        Images are edge-padded by reflection to what the network takes and cropped back; where the network takes one
        size only, they are resized to it and back. Images of one shape share a batch, which changes no result.
        """
        self.check(condition)
        prepared = [self._fit(image) for image in images]
        groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        for i, image in enumerate(prepared):
            groups[image.shape[:2]].append(i)
        results: list[Pixels] = [np.empty(0)] * len(images)
        for members in groups.values():
            for start in range(0, len(members), self.batch):
                part = members[start : start + self.batch]
                for i, out in zip(part, self._run(np.stack([prepared[i] for i in part]), condition), strict=True):
                    results[i] = self._unfit(out, images[i].shape[:2])
        return results

    def image_bytes(
        self,
        data: bytes,
        condition: Condition,
        format: str = "png",
        limits: codec.Limits = codec.Limits(),
        quality: int = 95,
    ) -> tuple[bytes, dict[str, Any]]:
        """An encoded image → the encoded translation, of the same width and height.

        Returns:
            The bytes, and `width`, `height`, `resized` (whether the network's one size was imposed), `decode_s`,
            `model_s`, `encode_s`.

        Raises:
            ImageError: the bytes are no image that `limits` allow.
            RequestError: the condition asks for what the bundle does not offer.
        """
        began = time.perf_counter()
        image = codec.decode(data, limits)
        decoded = time.perf_counter()
        (result,) = self.pixels([image], condition)
        ran = time.perf_counter()
        encoded = codec.encode(result, format, quality)
        height, width = image.shape[:2]
        return encoded, {
            "width": width,
            "height": height,
            "resized": self.resizes(height, width),
            "decode_s": decoded - began,
            "model_s": ran - decoded,
            "encode_s": time.perf_counter() - ran,
        }

    def resizes(self, height: int, width: int) -> bool:
        """Whether an image of this size is resized for the network, rather than padded."""
        fixed = self.system.fixed_size
        return fixed is not None and (height, width) != (fixed, fixed)

    def reference(self, image: Pixels) -> torch.Tensor:
        """A style image `(h, w, 3)` uint8 as `Condition.reference` wants it: square, at the training size."""
        return self._tensor(codec.resize(image, self.bundle.size)[None])

    def golden(self, size: int | None = None) -> Pixels:
        """Translate a fixed synthetic image in every direction; a network that is broken shows here.

        Returns:
            The translations, stacked.

        Raises:
            BundleError: an output is not finite.
        """
        side = size or self.system.fixed_size or max(32, self.bundle.size)
        ramp = np.linspace(0, 255, side, dtype=np.uint8)
        image = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None, :], ramp[::-1, None]), axis=-1)
        directions = self.bundle.conditioning["directions"]
        outputs = [self.pixels([image], Condition(source=d["source"], to=d["to"]))[0] for d in directions]
        return np.stack(outputs)

    def _fit(self, image: Pixels) -> Pixels:
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(f"an image must be uint8 (h, w, 3): got {image.dtype} {image.shape}")
        height, width = image.shape[:2]
        if self.system.fixed_size is not None:
            return codec.resize(image, self.system.fixed_size) if self.resizes(height, width) else image
        multiple = self.system.size_multiple
        below, right = -height % multiple, -width % multiple
        if not below and not right:
            return image
        mode = "reflect" if min(height, width) > 1 else "edge"
        return np.pad(image, ((0, below), (0, right), (0, 0)), mode=mode)

    def _unfit(self, image: Pixels, size: tuple[int, int]) -> Pixels:
        if self.system.fixed_size is not None:
            return image if image.shape[:2] == size else codec.resize(image, size)
        return np.ascontiguousarray(image[: size[0], : size[1]])

    def _tensor(self, images: Pixels) -> torch.Tensor:
        low, high = self.system.value_range
        # NHWC memory seen as NCHW is channels-last already.
        x = torch.from_numpy(np.ascontiguousarray(images)).to(self.device).permute(0, 3, 1, 2)
        return x.to(torch.float32).mul_((high - low) / 255.0).add_(low)

    def _run(self, images: Pixels, condition: Condition) -> Pixels:
        low, high = self.system.value_range
        reduced = self.precision == "bf16"
        with torch.inference_mode():
            with torch.autocast(self.device.type, torch.bfloat16) if reduced else nullcontext():
                out = self.system.translate(self._tensor(images), condition)
            out = out.float()
            if not bool(torch.isfinite(out).all()):
                raise BundleError("the model gave numbers that are not finite", code="E_BUNDLE_OUTPUT")
            out = out.sub_(low).mul_(255.0 / (high - low)).round_().clamp_(0, 255).to(torch.uint8)
            return out.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def check_condition(conditioning: Mapping[str, Any], condition: Condition) -> None:
    """Refuse what a model's conditioning does not offer; directions aside, which `System.direction` checks.

    Raises:
        RequestError: naming the parameter and what is offered.
    """
    style, offered = conditioning.get("style") or {}, conditioning.get("attributes") or []
    if condition.attributes:
        for name, value in condition.attributes.items():
            if name not in offered:
                hint = nearest(name, offered) if offered else "this model has none: leave `attributes` away"
                raise RequestError(f"unknown attribute '{name}'", code="E_ATTRIBUTE", hint=hint)
            if not 0.0 <= value <= 1.0:  # also refuses NaN
                raise RequestError(f"attribute '{name}' is {value}; it must be in [0, 1]", code="E_ATTRIBUTE")
    if condition.seed is not None:
        if not (style.get("seed") or conditioning.get("seed")):
            raise RequestError("this model has no random style", code="E_PARAMETER", hint="leave `seed` away")
        if not 0 <= condition.seed < 2**63:
            raise RequestError(f"seed is {condition.seed}; it must be in [0, 2^63)", code="E_PARAMETER")
    if condition.reference is not None and not style.get("reference"):
        raise RequestError("this model takes no reference image", code="E_PARAMETER", hint="leave `reference` away")
    if condition.strength is not None:
        if not conditioning.get("strength"):
            raise RequestError("this model has no strength", code="E_PARAMETER", hint="leave `strength` away")
        if not 0.0 <= condition.strength <= 1.0:
            raise RequestError(f"strength is {condition.strength}; it must be in [0, 1]", code="E_PARAMETER")
