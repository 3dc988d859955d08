"""The outermost layer of the server, plain ASGI: who may ask, how much, and for how long.

Nothing a client sends can raise a limit: bytes are counted as they arrive, whatever Content-Length says, and the
deadline is ours, whatever headers ask of the proxy before us.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import json
import re
import time
import uuid
from dataclasses import dataclass
from typing import Any

from deploy.schemas import RETRY_AFTER_S, ErrorBody, status_of
from models.errors import I2IError, RequestError

Scope = dict[str, Any]
# Ray Serve's proxy reads these from any client: they would switch off its timeout, keep abandoned work alive, or steer
# requests between replicas.
STRIPPED = (b"x-request-timeout-seconds", b"x-request-disconnect-disabled", b"serve_multiplexed_model_id")
STRIPPED_PREFIXES = (b"x-serve-router-", b"serve-multiplexed", b"x-session")
PUBLIC = frozenset({"/healthz", "/", "/app.js", "/style.css", "/icon.svg", "/docs", "/docs.js", "/openapi.json"})
REQUEST_ID = re.compile(r"^[A-Za-z0-9._-]{1,128}$")
MAX_HEADER_BYTES = 16 * 1024
MAX_TOKEN_BYTES = 1024
_LOOPBACK_NAMES = {"localhost", "127.0.0.1", "[::1]", "::1"}


@dataclass(frozen=True)
class Limits:
    """Limits of one server.

    Attributes:
        token_sha256: of the token that callers must bring, or None: then only callers on this machine are served.
        max_body_bytes: of one request.
        max_buffered_bytes: of all request bodies being held at a time.
        timeout_s: from the first header to the last byte of the answer's start.
        echo_request_id: whether to send X-Request-Id (a proxy before us may do it).
    """

    token_sha256: str | None = None
    max_body_bytes: int = 33 * 1024**2
    max_buffered_bytes: int = 512 * 1024**2
    timeout_s: float = 30.0
    echo_request_id: bool = True


@dataclass
class _Exchange:
    """State of one request."""

    request_id: str
    began: float
    started: bool = False
    received: int = 0


class LimitsMiddleware:
    """Wraps an ASGI app; see `Limits`."""

    def __init__(self, app: Any, limits: Limits) -> None:
        self.app, self.limits = app, limits
        self.buffered = 0

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """ASGI."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1003})
        headers = scope["headers"]
        given = next((value for name, value in headers if name == b"x-request-id"), b"").decode("latin-1")
        valid = bool(REQUEST_ID.fullmatch(given))
        exchange = _Exchange(given if valid else uuid.uuid4().hex, time.perf_counter())
        scope = {**scope, "headers": [pair for pair in headers if not _stripped(pair[0])]}
        scope["state"] = {**scope.get("state", {}), "request_id": exchange.request_id}

        async def respond(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                exchange.started = True
                message = {**message, "headers": [*message["headers"], *self._headers(exchange)]}
            await send(message)

        try:
            if given and not valid:
                hint = "1 to 128 of A-Z, a-z, 0-9, '.', '_' and '-'"
                raise RequestError("x-request-id has a wrong form", code="E_HEADER", hint=hint)
            self._admit(scope)
            async with asyncio.timeout(self.limits.timeout_s):
                await self.app(scope, self._counted(receive, exchange), respond)
        except TimeoutError:
            if exchange.started:
                raise
            hint = "send a smaller image, or ask the operator for a longer limit"
            message = f"no answer within {self.limits.timeout_s:g} s"
            await refuse(respond, RequestError(message, code="E_TIMEOUT", hint=hint))
        except I2IError as error:
            if exchange.started:
                raise
            await refuse(respond, error)
        finally:
            self.buffered -= exchange.received

    def _headers(self, exchange: _Exchange) -> list[tuple[bytes, bytes]]:
        pairs = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]
        if self.limits.echo_request_id:
            pairs.append((b"x-request-id", exchange.request_id.encode()))
        return pairs

    def _admit(self, scope: Scope) -> None:
        """Refuse by headers alone."""
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        if sum(len(name) + len(value) for name, value in headers) > MAX_HEADER_BYTES:
            message = f"the headers are larger than {MAX_HEADER_BYTES:,} bytes"
            raise RequestError(message, code="E_HEADERS_SIZE")
        names = [name for name, _ in headers]
        if b"content-length" in names and b"transfer-encoding" in names:
            raise RequestError("both Content-Length and Transfer-Encoding", code="E_HEADER", hint="send one of them")
        self._authorise(scope)
        encoding = next((value for name, value in headers if name == b"content-encoding"), b"identity")
        if encoding.strip().lower() not in (b"identity", b""):
            raise RequestError("an encoded body is not accepted", code="E_ENCODING", hint="send the image as it is")
        length = next((value for name, value in headers if name == b"content-length"), b"")
        if length.isdigit() and int(length) > self.limits.max_body_bytes:
            raise self._too_large()

    def _authorise(self, scope: Scope) -> None:
        if self.limits.token_sha256 is None:
            _check_loopback(scope)
            return
        if scope["path"] in PUBLIC:
            return
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(given) > 1 or any(len(value) > MAX_TOKEN_BYTES for value in given):
            raise RequestError("more than one Authorization header, or a very long one", code="E_HEADER")
        scheme, _, token = given[0].partition(b" ") if given else (b"", b"", b"")
        # Digests are compared, so that neither the length nor a common prefix shows in the time it takes.
        digest = hashlib.sha256(token.strip()).hexdigest()
        if not hmac.compare_digest(digest, self.limits.token_sha256) or scheme.lower() != b"bearer":
            hint = "send the header 'Authorization: Bearer TOKEN'"
            raise RequestError("a valid token is needed", code="E_TOKEN", hint=hint)

    def _too_large(self) -> RequestError:
        allowed = self.limits.max_body_bytes
        message = f"the body is larger than {allowed:,} bytes ({allowed / 1024**2:.0f} MB)"
        return RequestError(message, code="E_BODY_SIZE", hint="send a smaller file")

    def _counted(self, receive: Any, exchange: _Exchange) -> Any:
        async def counted() -> dict[str, Any]:
            message = await receive()
            if message["type"] == "http.request":
                size = len(message.get("body", b""))
                exchange.received += size
                self.buffered += size
                if exchange.received > self.limits.max_body_bytes:
                    raise self._too_large()
                if self.buffered > self.limits.max_buffered_bytes:
                    raise RequestError("the server is busy", code="E_QUEUE", hint="try again shortly")
            return message

        return counted


async def refuse(send: Any, error: I2IError) -> None:
    """Send an error as a whole answer."""
    status = status_of(error.code)
    body = json.dumps(ErrorBody.of(error).model_dump()).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"cache-control", b"no-store"),
        *((name.lower().encode(), value.encode()) for name, value in extra_headers(status).items()),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def extra_headers(status: int) -> dict[str, str]:
    """Headers that belong to a status."""
    if status in (429, 503):
        return {"Retry-After": str(RETRY_AFTER_S)}
    if status == 401:
        return {"WWW-Authenticate": "Bearer"}
    return {}


def _stripped(name: bytes) -> bool:
    return name in STRIPPED or name.startswith(STRIPPED_PREFIXES)


def _check_loopback(scope: Scope) -> None:
    """Without a token: callers on this machine only, and by its own name (a web page elsewhere may have its name
    point here: DNS rebinding)."""
    client = scope.get("client")
    if client is not None:
        try:
            local = ipaddress.ip_address(client[0]).is_loopback
        except ValueError:
            local = False
        if not local:
            message = "this server has no token and answers its own machine only"
            raise RequestError(message, code="E_LOOPBACK", hint="the operator can set I2I_SERVE_TOKEN")
    host = next((value for name, value in scope["headers"] if name == b"host"), b"localhost").decode("latin-1")
    name = host if host in _LOOPBACK_NAMES else host.rsplit(":", 1)[0]
    if name.lower() not in _LOOPBACK_NAMES:
        raise RequestError("the Host header names another machine", code="E_HOST", hint="use http://127.0.0.1")
