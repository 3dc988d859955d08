"""Register a bundle in MLflow's model registry and let an alias point to it: `i2i promote RUN|STUDY --name MODEL`.

The registry holds paths, digests and scores. The bundle's files are plain artifacts of an MLflow run; no model flavour
is used, because those are pickle, and whoever serves the version checks the digests in its tags.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from models.bundle import CONFIG, FILES, copy_bundle, load_bundle
from models.errors import BundleError, ConfigError, DataError, StorageError
from pipelines import tracking
from pipelines.storage import Store, join

NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
_RESERVED = re.compile(r"latest|v\d+")  # MLflow keeps these aliases for itself


@dataclass(frozen=True)
class PromoteResult:
    """What was registered.

    Attributes:
        bundle: URI of the bundle that was promoted.
        weights_sha256: of its weights.
        replaced: version the alias pointed to before, or None.
    """

    model: str
    version: int
    alias: str
    bundle: str
    weights_sha256: str
    replaced: int | None

    def to_json(self) -> dict[str, Any]:
        """The result of `i2i promote --json`."""
        return asdict(self)


@dataclass(frozen=True)
class Candidate:
    """A bundle and what is known of its origin; `score` is that of the study's objective."""

    bundle: str
    trial: int | None = None
    metric: str | None = None
    mode: str = "min"
    score: float | None = None
    data_digest: str | None = None


def promote(source: str, name: str, alias: str = "champion", force: bool = False) -> PromoteResult:
    """Verify a bundle, register it as the next version of `name`, and set the alias.

    Args:
        source: a study (its best trial), a run, or a bundle directory; local or s3://.
        name: of the registered model; made if new.
        alias: that will point to the new version.
        force: promote even if the present holder of the alias scored better in a study on the same data.

    Raises:
        ConfigError: a bad name, or a worse score without `force`.
        BundleError: the bundle does not load.
        StorageError: MLflow does not answer.
    """
    check_name("model name", name)
    check_name("alias", alias)
    if _RESERVED.fullmatch(alias):
        raise ConfigError(f"alias '{alias}' is reserved by MLflow; allowed: champion, challenger, staging, …")
    found = locate(source)
    uri = tracking.tracking_uri()
    client = tracking.client(uri)
    with tempfile.TemporaryDirectory(prefix="i2i-promote-") as scratch:
        directory = copy_bundle(Store(found.bundle).read, found.bundle, scratch)
        bundle = load_bundle(directory)  # what does not load is not registered
        if sorted(path.name for path in directory.iterdir()) != sorted(FILES):
            raise BundleError(f"{found.bundle}: a bundle holds exactly {', '.join(FILES)}")
        tags = _tags(found, bundle.document, (directory / CONFIG).read_bytes())
        try:
            holder = _holder(client, name, alias)
            if holder is not None and not force:
                _refuse_worse(found, holder, f"{name}@{alias}")
            version = _register(client, str(uri), name, alias, directory, tags)
        except ConfigError:
            raise
        except Exception as error:
            where = tracking.shown(str(uri))
            hint = "check MLFLOW_TRACKING_URI and that the server is up"
            raise StorageError(
                f"MLflow at {where} did not register {name}: {tracking.brief(error)}", hint=hint
            ) from error
    replaced = int(holder.version) if holder is not None else None
    return PromoteResult(name, version, alias, found.bundle, bundle.sha256, replaced)


def check_name(what: str, value: str) -> None:
    """Refuse a name that could be read as a path; MLflow itself takes any.

    Raises:
        ConfigError: `value` is not one.
    """
    if not NAME.fullmatch(value):
        rule = "allowed: a-z, 0-9, '-' and '_', beginning with a letter or digit, at most 63"
        raise ConfigError(f"{what} {value[:80]!r} cannot be used; {rule}")


def locate(source: str) -> Candidate:
    """The bundle that `source` (a study, a run or a bundle) stands for.

    Raises:
        DataError: it is none of the three, or a study without a winner.
    """
    store = Store(source)
    if store.exists("study.json"):
        study = json.loads(store.read("study.json"))
        best = study.get("best")
        trial = next((t for t in study["trials"] if t["trial"] == best and t.get("bundle")), None)
        if trial is None:
            raise DataError(f"{source}: the study has no winner; its study.json lists what became of each trial")
        return Candidate(
            join(store.uri, trial["bundle"]),
            trial=trial["trial"],
            metric=study["metric"],
            mode=study["mode"],
            score=trial["score"],
            data_digest=study.get("data_digest"),
        )
    if store.exists(CONFIG):
        return Candidate(store.uri)
    if store.exists(f"bundle/{CONFIG}"):
        return Candidate(join(store.uri, "bundle"))
    raise DataError(
        f"{source} is no study, run or bundle: there is no study.json, bundle/{CONFIG} or {CONFIG} in it",
        code="E_NOT_FOUND",
        hint="give the directory that train or tune printed; an unfinished run has no bundle yet",
    )


def _tags(found: Candidate, document: dict[str, Any], raw_config: bytes) -> dict[str, str]:
    data = document.get("data") or {}
    tags: dict[str, Any] = {
        "weights_sha256": document["weights_sha256"],
        "config_sha256": hashlib.sha256(raw_config).hexdigest(),
        "system": document["system"],
        "domains": ",".join(document["domains"]),
        "size": document["size"],
        "step": document.get("step"),
        "code_version": document.get("code_version"),
        "data_digest": data.get("digest"),
        "bundle": tracking.shown(found.bundle),
        "trial": found.trial,
        "objective": found.metric,
        "objective_score": found.score,
        "objective_data": found.data_digest,
    }
    for key, value in (document.get("scores") or {}).items():
        if isinstance(value, (int, float)):
            tags[f"score.{key}"] = value
    return {key: str(value) for key, value in tags.items() if value not in (None, "")}


def _holder(client: Any, name: str, alias: str) -> Any | None:
    """The version that the alias points to now."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None  # no such model, or no such alias of it
        raise


def _refuse_worse(found: Candidate, holder: Any, where: str) -> None:
    """Scores are compared only where both come from the same metric on the same data."""
    tags = holder.tags
    same = found.metric is not None and tags.get("objective") == found.metric
    same = same and tags.get("objective_data") == str(found.data_digest)
    if not same or found.score is None or "objective_score" not in tags:
        return
    held = float(tags["objective_score"])
    if (found.score > held) if found.mode == "min" else (found.score < held):
        raise ConfigError(
            f"{where} is version {holder.version} with {found.metric} {held:.4g}; the candidate has {found.score:.4g}, "
            "which is worse",
            hint="--force promotes it nevertheless",
        )


def _register(client: Any, uri: str, name: str, alias: str, directory: Path, tags: dict[str, str]) -> int:
    from mlflow.exceptions import MlflowException

    experiment = tracking.experiment_id(client, tracking.EXPERIMENT, uri)
    run = client.create_run(experiment, run_name=f"promote {name}", tags={**tags, "kind": "promotion"})
    run_id = run.info.run_id
    try:
        client.log_artifacts(run_id, str(directory), "bundle")
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        # A server accepts only a source inside the artifacts of a run that it knows.
        source = f"{run.info.artifact_uri}/bundle"
        version = client.create_model_version(name, source, run_id=run_id, tags=tags, await_creation_for=30)
        client.set_registered_model_alias(name, alias, version.version)
    except BaseException:
        client.set_terminated(run_id, "FAILED")
        raise
    client.set_terminated(run_id)
    return int(version.version)
