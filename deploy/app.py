"""The server on Ray Serve.

    i2i serve --bundle runs/demo/bundle
    serve run deploy.app:build_app bundles=runs/demo/bundle

A gateway checks and reads requests; each model is a deployment of its own, which takes an image once, as the bytes that
came, decodes it where it is batched, and answers with encoded bytes. Nothing happens at import.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deploy.launch import PROXY_GRACE_S, check_port, start_serve, stop_serve, wait_ready
from deploy.registry import locate, sources
from deploy.schemas import RETRY_AFTER_S, ServeArgs
from models.errors import ConfigError
from pipelines import mlflow_env

TOKEN_VARIABLE = "I2I_SERVE_TOKEN"
MIN_TOKEN_CHARACTERS = 16


def build_app(args: dict[str, Any]) -> Any:
    """The Ray Serve application for settings as in `ServeArgs`; also the builder that serve.yaml names.

    The token is read here, from the file `token_file` or the variable I2I_SERVE_TOKEN; only its digest goes further.

    Raises:
        ConfigError: settings that are wrong; a host beyond this machine without a token.
    """
    from ray import serve

    from deploy.gateway import Gateway
    from deploy.model import HostedModel

    settings = ServeArgs.parse(dict(args))
    token = _checked_token(settings)
    wanted = sources(settings)
    plain = settings.model_dump(mode="json")
    common = {
        "max_surge_percent": 100,  # a new version is up before the old one goes
        "graceful_shutdown_wait_loop_s": 0.2,
        "graceful_shutdown_timeout_s": settings.timeout_s + PROXY_GRACE_S,
        "max_constructor_retry_count": 2,
    }
    gpus = _gpus_each(settings, len(wanted))
    model = serve.deployment(
        HostedModel,
        num_replicas=settings.replicas,
        max_ongoing_requests=settings.max_ongoing,
        max_queued_requests=settings.max_queued,
        backpressure_config={"status_code": 429, "retry_after_s": RETRY_AFTER_S},
        ray_actor_options={"num_cpus": 0.5, **({"num_gpus": gpus} if gpus else {})},
        **common,
    )
    handles = {s.name: model.options(name=f"model-{s.name}").bind(s.to_json(), plain) for s in wanted}
    held = settings.replicas * settings.max_ongoing + settings.max_queued
    gateway = serve.deployment(
        serve.ingress()(Gateway),
        name="gateway",
        # Probes and refusals must find a place when all models are full.
        max_ongoing_requests=len(wanted) * held + 64,
        max_queued_requests=64,
        backpressure_config={"status_code": 429, "retry_after_s": RETRY_AFTER_S},
        ray_actor_options={"num_cpus": 0.1},
        **common,
    )
    digest = hashlib.sha256(token.encode()).hexdigest() if token else None
    return gateway.bind(plain, digest, handles)


def start(
    models: Sequence[str] = (),
    bundles: Sequence[str] = (),
    host: str = "127.0.0.1",
    port: int = 8000,
    verbose: bool = False,
    **settings: Any,
) -> str:
    """Start serving and come back when every model is ready.

    Args:
        models: NAME@ALIAS of the registry.
        bundles: directories or URIs, or NAME=URI.
        port: 0 takes a free one.
        settings: other fields of `ServeArgs`.

    Returns:
        The base URL, such as http://127.0.0.1:8000.

    Raises:
        ConfigError: settings that are wrong, a port in use.
        BundleError: a bundle or a registered model that cannot be served.
    """
    from pipelines.cluster import connect

    args, port = _check(models, bundles, host, port, settings)
    connect(verbose=verbose)
    return _launch(args, port, verbose)


def stop() -> None:
    """Stop serving; Ray itself stays as it is. Nothing happens where nothing is served."""
    import ray

    if ray.is_initialized():
        stop_serve()


def run(
    models: Sequence[str] = (),
    bundles: Sequence[str] = (),
    host: str = "127.0.0.1",
    port: int = 8000,
    verbose: bool = False,
    on_ready: Callable[[str], None] | None = None,
    **settings: Any,
) -> int:
    """Serve until SIGINT or SIGTERM; see `start` for the arguments.

    Args:
        on_ready: called with the base URL; by default the URL is shown on stderr.

    Returns:
        The exit status: 0 after SIGINT, 143 after SIGTERM.
    """
    from pipelines.cluster import connect
    from pipelines.console import say

    args, port = _check(models, bundles, host, port, settings)
    ended = threading.Event()
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        received.append(number)
        ended.set()

    # After ray.init, which puts a SIGTERM handler of its own in place, one that aborts the process.
    connect(verbose=verbose)
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        url = _launch(args, port, verbose)
        if not ended.is_set():
            (on_ready or (lambda address: say(f"serving on {address} (Ctrl-C ends it)")))(url)
        ended.wait()
        say("stopping")
    finally:
        stop()
        for number, handler in before.items():
            signal.signal(number, handler)
    return 143 if received[0] == signal.SIGTERM else 0


def _check(
    models: Sequence[str], bundles: Sequence[str], host: str, port: int, settings: dict[str, Any]
) -> tuple[ServeArgs, int]:
    """Everything that may be the user's mistake, before a cluster is started; the settings and the port."""
    asked = {**settings, "models": tuple(models), "bundles": tuple(bundles), "host": host}
    args = ServeArgs.parse({name: value for name, value in asked.items() if value is not None})
    registry = mlflow_env.tracking_uri()
    if args.models and args.tracking_uri is None and registry is not None and "@" not in registry:
        # Replicas run elsewhere; an address with a password in it stays in the environment.
        args = args.model_copy(update={"tracking_uri": registry})
    _checked_token(args)
    port = check_port(host, port)
    for source in sources(args):
        locate(source, args.cache, args.tracking_uri)
    return args, port


def _launch(args: ServeArgs, port: int, verbose: bool) -> str:
    start_serve(build_app(args.model_dump(mode="json")), args, port, verbose)
    shown = f"[{args.host}]" if ":" in args.host else args.host
    url = f"http://{'127.0.0.1' if args.host in ('0.0.0.0', '::') else shown}:{port}"
    wait_ready(url, read_token(args))
    return url


def _checked_token(args: ServeArgs) -> str | None:
    """The token; a host beyond this machine needs one."""
    token = read_token(args)
    if token is None and not _is_loopback(args.host):
        hint = f"set {TOKEN_VARIABLE}, or --token-file FILE, or bind to 127.0.0.1"
        raise ConfigError(f"refusing to serve on {args.host} without a token", code="E_TOKEN", hint=hint)
    return token


def read_token(args: ServeArgs) -> str | None:
    """The token that callers must bring, or None.

    Raises:
        ConfigError: a token file that cannot be read or is empty, or a token that is too short.
    """
    if args.token_file is not None:
        where = f"token file {args.token_file}"
        try:
            token = Path(args.token_file).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{where} cannot be read", hint=str(getattr(error, "strerror", "not text"))) from None
    else:
        where = TOKEN_VARIABLE
        token = os.environ.get(TOKEN_VARIABLE, "").strip()
        if not token:
            return None
    if len(token) < MIN_TOKEN_CHARACTERS or not token.isascii() or any(c.isspace() for c in token):
        hint = f"at least {MIN_TOKEN_CHARACTERS} ASCII characters without spaces, such as `openssl rand -hex 32` prints"
        raise ConfigError(f"{where} holds no usable token", code="E_TOKEN", hint=hint)
    return token


def _gpus_each(settings: ServeArgs, num_models: int) -> float:
    """Share of a GPU for each replica; 0 where the CPU is used."""
    if settings.device == "cpu":
        return 0.0
    import ray

    available = ray.cluster_resources().get("GPU", 0.0) if ray.is_initialized() else 0.0
    if not available:
        if settings.device == "cuda":
            raise ConfigError("device=cuda: the cluster has no GPU", hint="leave `device` out, or set it to cpu")
        return 0.0
    return min(1.0, int(100 * available / (num_models * settings.replicas)) / 100)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
