"""One hosted model: a bundle that is loaded, verified, warmed up, and fed in batches."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from deploy.batching import Batcher
from deploy.registry import Source, locate
from deploy.schemas import FORMATS, MAX_STYLES, ErrorBody, ModelInfo, ServeArgs, status_of
from models import codec
from models.bundle import load_bundle
from models.errors import BundleError, I2IError, RequestError
from models.system import Condition
from models.translator import Translator

logger = logging.getLogger("ray.serve")
_MAX_WEBP_SIDE = 16383


class HostedModel:
    """Answers translation requests with one bundle.

    Requests and answers are plain values: they cross process borders, and nothing of ours is pickled by class.

    Args:
        source: `Source.to_json()`.
        settings: `ServeArgs` as JSON.

    Raises:
        BundleError: the bundle is missing, damaged, or does not answer its golden input.
    """

    def __init__(self, source: dict[str, Any], settings: dict[str, Any]) -> None:
        self.args = ServeArgs.parse(settings)
        self.source = Source(**source)
        self.limits = codec.Limits(max_bytes=self.args.max_bytes, max_pixels=self.args.max_pixels)
        self._threads = self.args.threads or os.cpu_count() or 1
        located = locate(self.source, self.args.cache, self.args.tracking_uri)
        device = _device(self.args.device)
        bundle = load_bundle(located.directory, device)
        if bundle.sha256 != located.weights_sha256:
            raise BundleError(f"{located.directory}: replaced while it was loaded", code="E_BUNDLE_DIGEST")
        self.translator = Translator(bundle, device, self.args.precision, self.args.batch)
        self.version = located.version
        torch.set_num_threads(self._threads)
        self.golden_sha256 = hashlib.sha256(self.translator.golden().tobytes()).hexdigest()
        self._batcher = Batcher(self._run, self.args.batch)

    async def describe(self) -> dict[str, Any]:
        """`ModelInfo` as JSON."""
        bundle = self.translator.bundle
        return ModelInfo(
            name=self.source.name,
            version=self.version,
            system=bundle.name,
            domains=list(bundle.domains),
            conditioning=bundle.conditioning,
            size=bundle.size,
            fixed_size=self.translator.system.fixed_size,
            weights_sha256=bundle.sha256,
            scores=bundle.scores,
            ready=True,
        ).model_dump()

    async def translate(self, data: bytes, request: dict[str, Any], reference: bytes | None = None) -> dict[str, Any]:
        """Translate one encoded image.

        Args:
            request: `to`, `source`, `seed`, `attributes`, `strength`, `format`, `n`; all optional.

        Returns:
            `body`, `media_type`, `version`, `width`, `height`, `resized`, `timings` (seconds by stage); or `error`
            (`ErrorDetail` as JSON) and `status`. Nothing is raised.
        """
        try:
            return await self._translate(data, request, reference)
        except I2IError as error:
            return failure(error)
        except (torch.OutOfMemoryError, MemoryError):
            return failure(_no_memory())
        except RuntimeError as error:
            # The CPU allocator has no error class of its own.
            if "can't allocate memory" in str(error):
                return failure(_no_memory())
            logger.exception("translate failed")
            return failure(I2IError("unexpected"))
        except Exception:
            logger.exception("translate failed")
            return failure(I2IError("unexpected"))

    async def _translate(self, data: bytes, request: dict[str, Any], reference: bytes | None) -> dict[str, Any]:
        encoding = request.get("format") or "png"
        if encoding not in FORMATS:
            raise RequestError(f"unknown format '{encoding}'", code="E_PARAMETER", hint=f"one of {', '.join(FORMATS)}")
        condition = Condition(
            to=request.get("to"),
            source=request.get("source"),
            attributes=request.get("attributes"),
            seed=request.get("seed"),
            strength=request.get("strength"),
        )
        self.translator.check(condition)
        seeds = self._seeds(condition, request.get("n") or 1)
        began = time.perf_counter()
        image = await asyncio.to_thread(codec.decode, data, self.limits)
        if reference is not None:
            condition = await self._with_reference(condition, reference)
        if encoding == "webp" and max(image.shape[0], image.shape[1] * len(seeds)) > _MAX_WEBP_SIDE:
            hint = "ask for format=png"
            raise RequestError(f"WebP ends at {_MAX_WEBP_SIDE} pixels a side", code="E_PARAMETER", hint=hint)
        decoded = time.perf_counter()
        outputs, model_s = await self._outputs(image, condition, seeds)
        ran = time.perf_counter()
        body = await asyncio.to_thread(codec.encode, np.concatenate(outputs, axis=1), encoding)
        height, width = image.shape[:2]
        return {
            "body": body,
            "media_type": FORMATS[encoding],
            "version": self.version,
            "width": width * len(seeds),
            "height": height,
            "resized": self.translator.resizes(height, width),
            "timings": {
                "decode": decoded - began,
                "queue": max(0.0, ran - decoded - model_s),
                "model": model_s,
                "encode": time.perf_counter() - ran,
            },
        }

    def _seeds(self, condition: Condition, n: int) -> list[int | None]:
        """Seeds of the `n` styles asked for; they are placed side by side in the answer."""
        if n == 1:
            return [condition.seed]
        if not 1 <= n <= MAX_STYLES:
            raise RequestError(f"n is {n}; it must be in [1, {MAX_STYLES}]", code="E_PARAMETER")
        if not (self.translator.bundle.conditioning.get("style") or {}).get("seed"):
            raise RequestError("this model has one style only", code="E_PARAMETER", hint="leave `n` away")
        first = condition.seed or 0
        return [first + i for i in range(n)]

    async def _with_reference(self, condition: Condition, data: bytes) -> Condition:
        if not (self.translator.bundle.conditioning.get("style") or {}).get("reference"):
            hint = "leave `reference` away"
            raise RequestError("this model takes no reference image", code="E_PARAMETER", hint=hint)
        image = await asyncio.to_thread(codec.decode, data, self.limits)
        style = self.translator.reference(image)
        return Condition(condition.to, condition.source, condition.attributes, condition.seed, style)

    async def _outputs(
        self, image: np.ndarray, condition: Condition, seeds: list[int | None]
    ) -> tuple[list[np.ndarray], float]:
        attributes = tuple(sorted((condition.attributes or {}).items()))
        style = (
            None
            if condition.reference is None
            else hashlib.sha256(condition.reference.cpu().numpy().tobytes()).digest()
        )
        tasks = []
        for seed in seeds:
            asked = Condition(
                condition.to, condition.source, condition.attributes, seed, condition.reference, condition.strength
            )
            key = (image.shape, asked.to, asked.source, attributes, seed, style, asked.strength)
            tasks.append(self._batcher.submit(key, (image, asked)))
        results = await asyncio.gather(*tasks)
        return [output for output, _ in results], sum(spent for _, spent in results)

    def _run(self, key: Any, items: list[Any]) -> Sequence[tuple[np.ndarray, float]]:
        """In the model's thread; all items have one shape and one condition."""
        torch.set_num_threads(self._threads)
        began = time.perf_counter()
        outputs = self.translator.pixels([image for image, _ in items], items[0][1])
        spent = time.perf_counter() - began
        return [(output, spent) for output in outputs]


def failure(error: I2IError) -> dict[str, Any]:
    """An error as the answer of a model."""
    return {"error": ErrorBody.of(error).error.model_dump(), "status": status_of(error.code)}


def _no_memory() -> RequestError:
    return RequestError("not enough memory for an image of this size", code="E_MEMORY", hint="send a smaller one")


def _device(wanted: str) -> str:
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return wanted
