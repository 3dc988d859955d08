"""Where served bundles come from: a directory, an object store, or an alias in the MLflow registry.

MLflow is asked where a version lies and what its digest is; its own loaders, which execute what they load, are never
used. What is served is what the registry's `weights_sha256` tag names, or nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.schemas import ServeArgs
from models.bundle import copy_bundle, read_config
from models.errors import BundleError, ConfigError, StorageError
from pipelines import mlflow_env
from pipelines.bundle_uri import local_bundle
from pipelines.mlflow_env import NAME, NAME_RULE
from pipelines.storage import absolute, cache_directory

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
        uri = absolute(uri)  # replicas may run in another directory than the command
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
        ConfigError: there is no registry, because MLflow is switched off.
        DataError, StorageError: the store refuses or does not answer.
    """
    into = Path(cache or cache_directory("bundles")).expanduser()
    if source.uri is not None:
        directory = local_bundle(source.uri, into)
        digest = read_config(directory)["weights_sha256"]
        return Located(directory, digest[:12], digest)
    return _locate_registered(source, into, tracking_uri)


def _locate_registered(source: Source, into: Path, tracking_uri: str | None) -> Located:
    from mlflow.exceptions import MlflowException

    uri = tracking_uri or mlflow_env.tracking_uri()
    path = mlflow_env.database(uri or "")
    if path is not None and not path.exists():
        hint = "promote a model first, or set MLFLOW_TRACKING_URI"
        raise BundleError(f"no model registry at {path}", code="E_BUNDLE_REGISTRY", hint=hint)
    client = mlflow_env.client(uri)
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
    directory = _fetch_version(client, version, into, where)
    found = read_config(directory)["weights_sha256"]
    if found != digest:
        message = f"{where}: the registry names weights {digest[:16]}…, its bundle holds {found[:16]}…"
        raise BundleError(message, code="E_BUNDLE_DIGEST")
    return Located(directory, str(version.version), digest)


def _fetch_version(client: Any, version: Any, into: Path, where: str) -> Path:
    uri = client.get_model_version_download_uri(version.name, version.version)
    if _PLAIN.match(uri):
        return local_bundle(uri, into)
    if not uri.startswith(("runs:/", "mlflow-artifacts:/", "models:/")):
        raise BundleError(f"{where}: its source is at an address that is not allowed", code="E_BUNDLE_REGISTRY")
    import mlflow.artifacts

    def read(name: str) -> bytes:
        local = mlflow.artifacts.download_artifacts(artifact_uri=f"{uri}/{name}", tracking_uri=client.tracking_uri)
        return Path(local).read_bytes()

    return copy_bundle(read, where, into)


def _name_from(uri: str) -> str:
    """`runs/cyclegan-demo/bundle` → `cyclegan-demo`."""
    parts = [part for part in uri.split("/") if part]
    if len(parts) > 1 and parts[-1] == "bundle":
        parts.pop()
    name = re.sub(r"[^a-z0-9_-]+", "-", parts[-1].lower() if parts else "").strip("-_")[:63]
    return name if NAME.fullmatch(name) else "model"


def _checked(name: str, text: str) -> str:
    if not NAME.fullmatch(name):
        raise ConfigError(f"not a name of a model: '{name}' in '{text}'", code="E_NAME", hint=NAME_RULE)
    return name
