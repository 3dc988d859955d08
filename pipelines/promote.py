"""Register a bundle in MLflow's model registry and let an alias point to it: `i2i promote RUN|STUDY --name MODEL`.

The registry holds paths, digests and scores. The bundle's files are plain artifacts of an MLflow run; no model flavour
is used, because those are pickle, and whoever serves the version checks the digests in its tags.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from models.bundle import CONFIG, FILES, copy_bundle, load_bundle
from models.errors import BundleError, ConfigError, DataError, I2IError, StorageError
from pipelines import mlflow_env
from pipelines.bundle_uri import find_bundle
from pipelines.mlflow_env import NAME, NAME_RULE
from pipelines.storage import Store, join
from pipelines.tracking import EXPERIMENT, redact

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
    client = mlflow_env.client()
    with tempfile.TemporaryDirectory(prefix="i2i-promote-") as scratch:
        directory = copy_bundle(Store(found.bundle).read, found.bundle, scratch)
        bundle = load_bundle(directory)  # what does not load is not registered
        if sorted(path.name for path in directory.iterdir()) != sorted(FILES):
            raise BundleError(f"{found.bundle}: a bundle holds exactly {', '.join(FILES)}")
        tags = _tags(found, bundle.document, (directory / CONFIG).read_bytes())
        with _in_one_line(client, f"register {name}"):
            holder = _holder(client, name, alias)
            if holder is not None and not force:
                _refuse_worse(found, holder, f"{name}@{alias}")
            version = _register(client, name, directory, tags)
            if holder is not None:
                client.set_registered_model_tag(name, _previous(alias), holder.version)
            client.set_registered_model_alias(name, alias, version)
    replaced = int(holder.version) if holder is not None else None
    return PromoteResult(name, int(version), alias, found.bundle, bundle.sha256, replaced)


def rollback(name: str, alias: str = "champion") -> PromoteResult:
    """Let an alias point to the version that the last promotion took it from.

    Only the last promotion can be undone: a second rollback is refused, not a way forth again.

    Raises:
        ConfigError: a bad name, or nothing to go back to.
        StorageError: MLflow does not answer.
    """
    check_name("model name", name)
    check_name("alias", alias)
    client = mlflow_env.client()
    with _in_one_line(client, f"roll {name}@{alias} back"):
        holder = _holder(client, name, alias)
        former = client.get_registered_model(name).tags.get(_previous(alias)) if holder is not None else None
        if holder is None or former is None:
            raise ConfigError(
                f"{name}@{alias} has nothing to go back to",
                hint="only the last promotion over another version can be undone, once",
            )
        version = client.get_model_version(name, former)
        client.set_registered_model_alias(name, alias, former)
        client.delete_registered_model_tag(name, _previous(alias))
    bundle, digest = version.tags.get("bundle", ""), version.tags.get("weights_sha256", "")
    return PromoteResult(name, int(former), alias, bundle, digest, int(holder.version))


def _previous(alias: str) -> str:
    """Tag of a registered model: the version that `alias` pointed to before the last promotion."""
    return f"previous.{alias}"


@contextmanager
def _in_one_line(client: Any, action: str) -> Iterator[None]:
    """Whatever MLflow raises, as a StorageError."""
    try:
        yield
    except I2IError:
        raise
    except Exception as error:
        where = mlflow_env.shown(client.tracking_uri)
        hint = "check MLFLOW_TRACKING_URI and that the server is up"
        raise StorageError(f"MLflow at {where} did not {action}: {mlflow_env.brief(error)}", hint=hint) from error


def check_name(what: str, value: str) -> None:
    """Refuse a name that could be read as a path; MLflow itself takes any.

    Raises:
        ConfigError: `value` is not one.
    """
    if not NAME.fullmatch(value):
        raise ConfigError(f"{what} {value[:80]!r} cannot be used", hint=f"allowed: {NAME_RULE}")


def locate(source: str) -> Candidate:
    """The bundle that `source` (a study, a run or a bundle) stands for.

    Raises:
        BundleError: it is none of the three.
        DataError: a study without a winner.
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
    return Candidate(find_bundle(source))


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
        "bundle": mlflow_env.shown(found.bundle),
        "trial": found.trial,
        "objective": found.metric,
        "objective_score": found.score,
        "objective_data": found.data_digest,
    }
    scores = redact(document.get("scores") or {}, "score.")
    return {key: str(value) for key, value in tags.items() if value not in (None, "")} | scores


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


def _register(client: Any, name: str, directory: Path, tags: dict[str, str]) -> str:
    """Upload the bundle as artifacts of a run, and make it the next version of the model; its number."""
    from mlflow.exceptions import MlflowException

    experiment = mlflow_env.experiment_id(client, EXPERIMENT, client.tracking_uri)
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
    except BaseException:
        client.set_terminated(run_id, "FAILED")
        raise
    client.set_terminated(run_id)
    return str(version.version)
