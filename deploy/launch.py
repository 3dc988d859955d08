"""How Ray Serve is started, watched until it is ready, and ended, without its noise."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import socket
import time
import urllib.error
import urllib.request
from typing import Any

from deploy.schemas import ServeArgs
from models.errors import ConfigError, StorageError

APP = "i2i"
PROXY_GRACE_S = 5.0
_logger = logging.getLogger("ray.serve")


def check_port(host: str, port: int) -> int:
    """`port`, or a free one for 0.

    Raises:
        ConfigError: it is in use, out of range, or cannot be bound.
    """
    if not 0 <= port <= 65535:
        raise ConfigError(f"port {port} is out of range", code="E_PORT", hint="1 to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            return probe.getsockname()[1]
        except PermissionError:
            hint = "ports below 1024 need root: choose another with --port"
            raise ConfigError(f"port {port} on {host} is not permitted", code="E_PORT", hint=hint) from None
        except socket.gaierror:
            raise ConfigError(f"unknown host '{host}'", code="E_HOST", hint="give an address with --host") from None
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                message = f"port {port} on {host} is in use: choose another with --port"
                raise ConfigError(message, code="E_PORT") from None
            raise ConfigError(f"cannot bind to {host}:{port}: {error.strerror}", code="E_PORT") from None


def start_serve(application: Any, args: ServeArgs, port: int, verbose: bool) -> None:
    """Start Ray Serve's controller and proxy if need be, and run the application.

    Raises:
        StorageError: E_SERVE, a deployment failed.
    """
    from ray import serve

    options = {
        "host": args.host,
        "port": port,
        # Ours, in deploy.limits, comes first and cannot be switched off by a client as this one can.
        "request_timeout_s": args.timeout_s + PROXY_GRACE_S,
    }
    logs = {"enable_access_log": True, "log_level": "INFO" if verbose else "WARNING"}
    with contextlib.nullcontext() if verbose else _quiet():
        try:
            serve.start(proxy_location="HeadOnly", http_options=options, logging_config=logs)
            serve.run(application, name=APP, route_prefix="/", logging_config=logs)
        except (RuntimeError, TimeoutError) as error:
            reason = _reason()
            stop_serve()
            raise StorageError(f"serving did not start: {reason or error}", code="E_SERVE") from None


def stop_serve() -> None:
    """End the application, the proxy and the controller; nothing happens where nothing is served."""
    from ray import serve

    with _quiet():
        _end_controller()
        serve.shutdown()


def _end_controller() -> None:
    """What `serve.shutdown` does first, with the one call of it not retried.

    The controller ends itself while it answers; Ray then announces on stdout that the call "failed" and is retried.
    """
    import ray
    from ray.exceptions import RayError
    from ray.serve.context import _get_global_client
    from ray.serve.exceptions import RayServeException

    try:
        client = _get_global_client()
    except RayServeException:
        return  # nothing is served
    assert client is not None
    client.shutdown_cached_handles()
    with contextlib.suppress(RayError):
        ray.get(client._controller.graceful_shutdown.options(max_task_retries=0).remote(), timeout=30)
    client._shutdown = True


def _reason() -> str:
    """The last line of what Ray Serve knows of a deployment that failed."""
    from ray import serve

    application = serve.status().applications.get(APP)
    for deployment in application.deployments.values() if application else ():
        if "FAILED" in str(deployment.status) or "UNHEALTHY" in str(deployment.status):
            lines = [line.strip() for line in deployment.message.splitlines() if line.strip()]
            named = [line for line in lines if "Error: " in line]
            return (named or lines or [""])[-1]
    return ""


def wait_ready(url: str, token: str | None, patience_s: float = 120.0) -> None:
    """Wait until /readyz answers 200.

    Raises:
        StorageError: E_SERVE, it did not within `patience_s`.
    """
    request = urllib.request.Request(f"{url}/readyz", headers={"Authorization": f"Bearer {token}"} if token else {})
    # Requests to this machine go to no proxy.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline, seen = time.monotonic() + patience_s, "no answer"
    while time.monotonic() < deadline:
        try:
            with opener.open(request, timeout=5):
                return
        except urllib.error.HTTPError as error:
            with contextlib.suppress(ValueError):
                seen = str(json.loads(error.read()).get("models") or f"status {error.code}")
            error.close()
        except OSError as error:
            seen = str(error)
        time.sleep(0.1)
    stop_serve()
    raise StorageError(f"the server at {url} was not ready within {patience_s:g} s: {seen}", code="E_SERVE")


@contextlib.contextmanager
def _quiet():
    """Ray Serve sets the level of its own logger whenever it starts something."""
    handlers = [(handler, handler.level) for handler in _logger.handlers]
    level = _logger.level
    _logger.setLevel(logging.CRITICAL)
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        _logger.setLevel(level)
        for handler, old in handlers:
            handler.setLevel(old)
