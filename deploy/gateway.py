"""The side of the server that faces HTTP: checks and reads requests, and passes them to the models' deployments."""

from __future__ import annotations

import logging
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError

from deploy.api import Pool, make_api
from deploy.limits import Limits
from deploy.model import failure
from deploy.schemas import RETRY_AFTER_S, ServeArgs
from models.errors import RequestError

_ROOM_FOR_FORM_BYTES = 64 * 1024
logger = logging.getLogger("ray.serve")


class Gateway:
    """The HTTP side: `deploy.api` over handles of the models' deployments."""

    def __init__(self, settings: dict[str, Any], token_sha256: str | None, handles: dict[str, Any]) -> None:
        self.args = ServeArgs.parse(settings)
        self.token_sha256, self.handles = token_sha256, handles

    def __serve_build_asgi_app__(self) -> Any:
        """Called by Ray Serve in the replica, so that the app itself is never pickled."""
        body = self.args.max_bytes + _ROOM_FOR_FORM_BYTES
        limits = Limits(
            token_sha256=self.token_sha256,
            max_body_bytes=body,
            max_buffered_bytes=max(512 * 1024**2, 4 * body),
            timeout_s=self.args.timeout_s,
            echo_request_id=False,  # Ray Serve's proxy does it
        )
        pool = Pool({name: RemoteModel(handle) for name, handle in self.handles.items()})
        return make_api(pool, limits)


class RemoteModel:
    """A model's deployment as `deploy.api.Caller`."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    async def describe(self) -> dict[str, Any]:
        """`ModelInfo` as JSON."""
        return await self.handle.describe.remote()

    async def translate(self, data: bytes, request: dict[str, Any], reference: bytes | None) -> dict[str, Any]:
        """Pass on; a replica that dies under a request is replaced by another one, once."""
        for last in (False, True):
            try:
                return await self.handle.translate.remote(data, request, reference)
            except BackPressureError:
                hint = f"try again in {RETRY_AFTER_S} s"
                return failure(RequestError("too many requests are waiting", code="E_QUEUE", hint=hint))
            except RayActorError:
                if last:
                    logger.warning("a replica died under a request", exc_info=True)
            except Exception:
                logger.exception("a model did not answer")
                break
        hint = f"try again in {RETRY_AFTER_S} s"
        return failure(RequestError("the model is not available now", code="E_UNAVAILABLE", hint=hint))
