"""Where served bundles come from: a directory, an object store, or an alias in the MLflow registry.

MLflow is asked where a version lies and what its digest is; its own loaders, which execute what they load, are never
used. What is served is what the registry's `weights_sha256` tag names, or nothing.
"""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.schemas import NAME, NAME_RULE, ServeArgs
from models.bundle import CONFIG, copy_bundle, read_config
from models.errors import BundleError, ConfigError, StorageError
from pipelines.storage import Store, join, parse_uri

DEFAULT_ALIAS = "champion"
_PLAIN = re.compile(r"^(s3://|file:///|/|\.|[A-Za-z0-9_-]+(/|$))")


@dataclass(frozen=True)
class Source:
    """Where a model comes from: `uri` of a bundle, or `registered` name with an `alias` (or a version number)."""

    name: str
    uri: str | None = None
    alias: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain values, for another process."""
        return {"name": self.name, "uri": self.uri, "alias": self.alias}


@dataclass(frozen=True)
class Located:
    """A bundle on this machine.

    Attributes:
        directory: local.
        version: of the registry, or the first 12 digits of the weights' sha256.
    """

    directory: Path
    version: str
    weights_sha256: str


def sources(args: ServeArgs) -> list[Source]:
    """What the settings ask to serve, each under a name of its own.

    Raises:
        ConfigError: a name of a wrong form, or one given twice.
    """
    found = []
    for text in args.models:
        name, _, alias = text.partition("@")
        found.append(Source(_checked(name, text), alias=_checked(alias or DEFAULT_ALIAS, text)))
    for text in args.bundles:
        name, equals, uri = text.partition("=")
        if not equals or "/" in name:
            name, uri = "", text
        kind, path = parse_uri(uri)
        # Replicas may run in another directory than the command.
        uri = uri if kind == "s3" else os.path.abspath(path)
        found.append(Source(_checked(name, text) if name else _name_from(uri), uri=uri))
    names = [source.name for source in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"two models of the name {', '.join(twice)}", hint="name a bundle: --bundle NAME=PATH")
    return found


def locate(source: Source, cache: str | None = None, tracking_uri: str | None = None) -> Located:
    """Bring the bundle of a source to this machine.

    Raises:
        BundleError: no such model, alias or bundle, or one that is not what its digest says.
        DataError, StorageError: the store refuses or does not answer.
    """
    into = Path(cache or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "i2i", "bundles")).expanduser()
    if source.uri is not None:
        directory = _fetch(source.uri, into)
        digest = read_config(directory)["weights_sha256"]
        return Located(directory, digest[:12], digest)
    return _locate_registered(source, into, tracking_uri)


def default_tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, else the sqlite file in the current directory's `runs/`, as an absolute address."""
    given = os.environ.get("MLFLOW_TRACKING_URI")
    return given or f"sqlite:///{Path('runs/mlflow.db').absolute()}"


def _locate_registered(source: Source, into: Path, tracking_uri: str | None) -> Located:
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    uri = tracking_uri or default_tracking_uri()
    if uri == "none":
        hint = "set MLFLOW_TRACKING_URI, or serve a bundle by its path"
        raise BundleError(
            "there is no model registry: MLFLOW_TRACKING_URI is 'none'", code="E_BUNDLE_REGISTRY", hint=hint
        )
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    path = uri.removeprefix("sqlite:///") if uri.startswith("sqlite:///") else None
    if path is not None and not os.path.exists(path):
        hint = "promote a model first, or set MLFLOW_TRACKING_URI"
        raise BundleError(f"no model registry at {path}", code="E_BUNDLE_REGISTRY", hint=hint)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    assert source.alias is not None
    try:
        if source.alias.isdigit():
            version = client.get_model_version(source.name, source.alias)
        else:
            version = client.get_model_version_by_alias(source.name, source.alias)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            # The text may hold the address with its password.
            raise StorageError(f"the model registry did not answer ({error.error_code})") from None
        what = f"{source.name}@{source.alias}"
        hint = "`i2i promote` registers one, MLFLOW_TRACKING_URI says where"
        raise BundleError(f"the registry has no model {what}", code="E_BUNDLE_REGISTRY", hint=hint) from None
    digest = (version.tags or {}).get("weights_sha256")
    where = f"{source.name} version {version.version}"
    if not digest:
        hint = "register it with `i2i promote`"
        raise BundleError(f"{where} has no tag weights_sha256", code="E_BUNDLE_REGISTRY", hint=hint)
    directory = _fetch_version(client, version, into, where, uri)
    found = read_config(directory)["weights_sha256"]
    if found != digest:
        message = f"{where}: the registry names weights {digest[:16]}…, its bundle holds {found[:16]}…"
        raise BundleError(message, code="E_BUNDLE_DIGEST")
    return Located(directory, str(version.version), digest)


def _fetch_version(client: Any, version: Any, into: Path, where: str, tracking_uri: str) -> Path:
    uri = client.get_model_version_download_uri(version.name, version.version)
    if _PLAIN.match(uri):
        return _fetch(uri, into)
    if not uri.startswith(("runs:/", "mlflow-artifacts:/", "models:/")):
        raise BundleError(f"{where}: its source is at an address that is not allowed", code="E_BUNDLE_REGISTRY")
    import mlflow.artifacts

    def read(name: str) -> bytes:
        local = mlflow.artifacts.download_artifacts(artifact_uri=f"{uri}/{name}", tracking_uri=tracking_uri)
        return Path(local).read_bytes()

    return copy_bundle(read, where, into)


def _fetch(uri: str, into: Path) -> Path:
    """A bundle, or the one in a run directory."""
    if Store(uri).exists(f"bundle/{CONFIG}"):
        uri = join(uri, "bundle")
    store = Store(uri)
    return Path(store.uri) if store.is_local else copy_bundle(store.read, uri, into)


def _name_from(uri: str) -> str:
    """`runs/cyclegan-demo/bundle` → `cyclegan-demo`."""
    parts = [part for part in uri.split("/") if part]
    if len(parts) > 1 and parts[-1] == "bundle":
        parts.pop()
    name = re.sub(r"[^a-z0-9_-]+", "-", parts[-1].lower() if parts else "").strip("-_")[:63]
    return name if NAME.match(name) else "model"


def _checked(name: str, text: str) -> str:
    if not NAME.match(name):
        raise ConfigError(f"not a name of a model: '{name}' in '{text}'", code="E_NAME", hint=NAME_RULE)
    return name
