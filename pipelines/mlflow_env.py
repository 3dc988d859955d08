"""Where MLflow is and how it is spoken to: shared by what logs, what registers, and what serves. Knows no Ray.

`MLFLOW_TRACKING_URI`, else `sqlite:///<working directory>/runs/mlflow.db`; `none` switches MLflow off.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from models.errors import ConfigError

if TYPE_CHECKING:
    from mlflow import MlflowClient

# Of a registered model and an alias. MLflow itself takes any, also what could be read as a path.
NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
NAME_RULE = "1 to 63 of a-z, 0-9, _ and -, not beginning with _ or -"

# With the defaults one call against a dead server blocks for four minutes.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
_USERINFO = re.compile(r"(?<=://)[^/@\s]+@")


def tracking_uri() -> str | None:
    """Where MLflow is, absolute, so that processes in other directories agree; None where it is switched off."""
    given = os.environ.get("MLFLOW_TRACKING_URI", "").strip()
    if given.lower() == "none":
        return None
    return given or f"sqlite:///{Path('runs/mlflow.db').resolve()}"


def shown(text: str) -> str:
    """An address, or a text with addresses, without user names and passwords."""
    return _USERINFO.sub("", text)


def client(uri: str | None = None) -> MlflowClient:
    """An MLflow client with short timeouts and no chatter.

    Raises:
        ConfigError: tracking is switched off, or the URI is of no kind that MLflow knows.
    """
    uri = uri or tracking_uri()
    if uri is None:
        raise ConfigError(
            "this needs MLflow, and tracking is switched off: MLFLOW_TRACKING_URI is 'none'",
            hint="unset it, or give a server or sqlite:///path.db",
        )
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    file = database(uri)
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        return MlflowClient(tracking_uri=uri, registry_uri=uri)
    except MlflowException as error:
        raise ConfigError(f"MLFLOW_TRACKING_URI {shown(uri)} is not usable: {brief(error)}") from error


def experiment_id(mlflow_client: MlflowClient, name: str, uri: str) -> str:
    """The experiment `name`, made if it is new; the artifacts of a sqlite store lie beside its file."""
    from mlflow.exceptions import MlflowException

    found = mlflow_client.get_experiment_by_name(name)
    if found is None:
        file = database(uri)
        # MLflow's own default would be ./mlruns of whichever process comes first.
        root = str(file.parent / "artifacts" / re.sub(r"[^\w-]", "_", name)) if file else None
        try:
            return mlflow_client.create_experiment(name, artifact_location=root)
        except MlflowException:
            found = mlflow_client.get_experiment_by_name(name)  # another process was faster
            if found is None:
                raise
    return found.experiment_id


def brief(error: BaseException) -> str:
    """The first line of an error, short and without credentials."""
    text = str(error).strip()
    for known in (
        "Connection refused",
        "timed out",
        "Name or service not known",
        "Temporary failure in name resolution",
    ):
        if known in text:
            return known.lower()
    lines = text.splitlines()
    return shown(lines[0] if lines else type(error).__name__)[:160]


def database(uri: str) -> Path | None:
    """The file of a sqlite store; None for any other."""
    return Path(unquote(uri[len("sqlite:///") :])).resolve() if uri.startswith("sqlite:///") else None
