"""The HTTP API as an ASGI app over a pool of models; knows nothing of how or where they run."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from deploy.limits import Limits, LimitsMiddleware, extra_headers
from deploy.request import check_query, images, parse_attributes
from deploy.schemas import (
    MAX_STYLES,
    ErrorBody,
    ErrorDetail,
    Health,
    ModelInfo,
    ModelList,
    check_name,
    status_of,
)
from models.errors import I2IError, RequestError, nearest

logger = logging.getLogger("ray.serve")
WEB = Path(__file__).parent / "web"
PAGES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/style.css": ("style.css", "text/css; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
    "/docs": ("docs.html", "text/html; charset=utf-8"),
    "/docs.js": ("docs.js", "text/javascript; charset=utf-8"),
}
# The page loads nothing from elsewhere, and may be framed nowhere.
_CSP = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
_PAGE_HEADERS = {
    "Content-Security-Policy": _CSP + "form-action 'none'; frame-ancestors 'none'; base-uri 'none'",
    "Cache-Control": "no-cache",
}


class Caller(Protocol):
    """A model to which requests are passed; see `HostedModel` for the values."""

    async def translate(self, data: bytes, request: dict[str, Any], reference: bytes | None) -> dict[str, Any]:
        """Translate an encoded image."""
        ...

    async def describe(self) -> dict[str, Any]:
        """`ModelInfo` as JSON."""
        ...


class Pool:
    """Models by name, with what is known of each.

    A model is ready when it has described itself, which it can only after it was loaded and answered its golden input.
    """

    def __init__(self, callers: Mapping[str, Caller], period_s: float = 5.0, patience_s: float = 10.0) -> None:
        self.callers, self.period_s, self.patience_s = dict(callers), period_s, patience_s
        self.known: dict[str, ModelInfo] = {
            name: ModelInfo(name=name, version=None, ready=False, reason="loading") for name in callers
        }

    async def refresh(self) -> None:
        """Ask every model once."""
        await asyncio.gather(*(self._ask(name, caller) for name, caller in self.callers.items()))

    async def watch(self) -> None:
        """Ask again and again; more often until all are ready."""
        while True:
            await self.refresh()
            ready = all(info.ready for info in self.known.values())
            await asyncio.sleep(self.period_s if ready else min(0.5, self.period_s))

    async def _ask(self, name: str, caller: Caller) -> None:
        before = self.known[name]
        try:
            async with asyncio.timeout(self.patience_s):
                answer = await caller.describe()
            self.known[name] = ModelInfo.model_validate(answer)
        except TimeoutError:
            # A model that is busy is still a model that is loaded.
            if not before.ready:
                self.known[name] = before.model_copy(update={"reason": "loading"})
        except Exception:
            logger.warning("model %s does not answer", name, exc_info=True)
            update = {"ready": False, "reason": "it does not answer"}
            self.known[name] = before.model_copy(update=update)


def make_api(pool: Pool, limits: Limits, watch: bool = True) -> LimitsMiddleware:
    """The whole server as an ASGI app.

    Args:
        watch: keep asking the models for their state while the app runs.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(pool.watch()) if watch else None
        yield
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    app = FastAPI(
        title="i2i",
        version="1",
        description="Image-to-image translation: an image in, the same image in another domain out.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    _add_error_shape(app)
    _add_pages(app)
    _add_probes(app, pool)
    _add_models(app, pool)
    return LimitsMiddleware(app, limits)


def _add_probes(app: FastAPI, pool: Pool) -> None:
    @app.get("/healthz", tags=["probes"])
    async def healthz() -> Health:
        """Whether the server runs."""
        return Health(status="ok")

    @app.get("/readyz", tags=["probes"], responses={503: {"model": Health}})
    async def readyz() -> JSONResponse:
        """Whether every model is loaded and has answered its golden input."""
        states = {name: "ready" if info.ready else info.reason or "loading" for name, info in pool.known.items()}
        ready = all(info.ready for info in pool.known.values())
        body = Health(status="ok" if ready else "not ready", models=states)
        return JSONResponse(body.model_dump(), 200 if ready else 503, extra_headers(200 if ready else 503))


def _add_models(app: FastAPI, pool: Pool) -> None:
    errors: dict[int | str, dict[str, Any]] = {
        code: {"model": ErrorBody} for code in (400, 401, 404, 408, 413, 415, 422, 429, 503)
    }

    @app.get("/v1/models", tags=["models"], responses={401: {"model": ErrorBody}})
    async def models() -> ModelList:
        """The models that are hosted, and what may be asked of each."""
        return ModelList(models=list(pool.known.values()))

    @app.post(
        "/v1/models/{name:path}/translate",
        tags=["models"],
        response_class=Response,
        responses={200: _IMAGE_ANSWER, **errors},
        openapi_extra={"requestBody": _BODY},
    )
    async def translate(
        name: str,
        request: Request,
        to: Annotated[str | None, Query(description="domain that is wanted", max_length=128)] = None,
        source: Annotated[str | None, Query(description="domain of the image", max_length=128)] = None,
        seed: Annotated[int | None, Query(description="of the random style", ge=0, lt=2**63)] = None,
        attributes: Annotated[str | None, Query(description="such as Smiling=1,Young=0", max_length=4096)] = None,
        strength: Annotated[float | None, Query(ge=0, le=1, allow_inf_nan=False)] = None,
        format: Annotated[Literal["png", "jpeg", "webp"], Query(description="of the answer")] = "png",
        n: Annotated[int, Query(description="number of styles, side by side", ge=1, le=MAX_STYLES)] = 1,
    ) -> Response:
        """Translate one image; the answer has its width and height."""
        began = time.perf_counter()
        check_name(name)
        if name not in pool.callers:
            raise RequestError(f"no model '{name}'", code="E_MODEL_UNKNOWN", hint=nearest(name, pool.callers))
        check_query(request)
        asked = {
            "to": to,
            "source": source,
            "seed": seed,
            "attributes": parse_attributes(attributes),
            "strength": strength,
            "format": format,
            "n": n,
        }
        image, reference = await images(request)
        answer = await pool.callers[name].translate(image, asked, reference)
        return _answer(answer, time.perf_counter() - began)


def _answer(answer: dict[str, Any], total_s: float) -> Response:
    if "error" in answer:
        body = ErrorBody(error=ErrorDetail(**answer["error"]))
        return JSONResponse(body.model_dump(), answer["status"], extra_headers(answer["status"]))
    stages = {**answer["timings"], "total": total_s}
    headers = {
        "X-Model-Version": answer["version"],
        "Server-Timing": ", ".join(f"{stage};dur={1000 * spent:.1f}" for stage, spent in stages.items()),
        "Cache-Control": "no-store",
    }
    if answer["resized"]:
        headers["X-Resized"] = "the network takes one size; the image was resized to it and back"
    return Response(answer["body"], media_type=answer["media_type"], headers=headers)


def _add_pages(app: FastAPI) -> None:
    for path, (file, media_type) in PAGES.items():
        app.add_api_route(path, _page((WEB / file).read_bytes(), media_type), include_in_schema=False)


def _page(content: bytes, media_type: str) -> Callable[[], Any]:
    async def page() -> Response:
        return Response(content, media_type=media_type, headers=_PAGE_HEADERS)

    return page


def _add_error_shape(app: FastAPI) -> None:
    def respond(error: I2IError, headers: Mapping[str, str] | None = None) -> JSONResponse:
        status = status_of(error.code)
        return JSONResponse(ErrorBody.of(error).model_dump(), status, {**extra_headers(status), **(headers or {})})

    @app.exception_handler(I2IError)
    async def ours(_: Request, error: I2IError) -> JSONResponse:
        if status_of(error.code) == 500:
            logger.error("request failed", exc_info=error)
        return respond(error)

    @app.exception_handler(RequestValidationError)
    async def parameters(_: Request, error: RequestValidationError) -> JSONResponse:
        wrong = []
        for item in error.errors():
            name = str(item["loc"][-1])
            wrong.append(f"{name}={str(item.get('input'))[:64]!r}: {item['msg']}")
        return respond(RequestError("; ".join(wrong), code="E_PARAMETER"))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        if error.status_code == 405:
            message = f"{request.method[:16]} is not possible here"
            return respond(RequestError(message, code="E_METHOD"), error.headers)
        if error.status_code == 404:
            return respond(RequestError("there is nothing at this address", code="E_NOT_FOUND", hint="see /docs"))
        return respond(RequestError(f"the form cannot be read: {error.detail}", code="E_REQ_FORM"))

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        logger.error("request failed", exc_info=error)
        return respond(I2IError("unexpected"))


_BINARY = {"schema": {"type": "string", "format": "binary"}}
_IMAGE_ANSWER: dict[str, Any] = {
    "description": "the translated image",
    "content": {kind: _BINARY for kind in ("image/png", "image/jpeg", "image/webp")},
    "headers": {
        "X-Model-Version": {"schema": {"type": "string"}},
        "X-Request-Id": {"schema": {"type": "string"}},
        "Server-Timing": {"schema": {"type": "string"}},
    },
}
_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        **{kind: _BINARY for kind in ("image/png", "image/jpeg", "image/webp", "application/octet-stream")},
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["image"],
                "properties": {
                    "image": {"type": "string", "format": "binary"},
                    "reference": {"type": "string", "format": "binary"},
                },
            }
        },
    },
}
