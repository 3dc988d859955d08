"""What crosses the border of the server: its settings, the answers of the API, and the table of error codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from models.errors import ConfigError, I2IError, RequestError
from pipelines.mlflow_env import NAME, NAME_RULE

FORMATS = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
MAX_STYLES = 16
RETRY_AFTER_S = 1

# Code of an error → HTTP status. E_IMG_* not listed here is 422; every other unlisted one is 500 and shows no text.
STATUS = {
    "E_REQ_EMPTY": 400,
    "E_REQ_FORM": 400,
    "E_HEADER": 400,
    "E_HOST": 400,
    "E_NAME": 400,
    "E_URL_UNSUPPORTED": 400,
    "E_TOKEN": 401,
    "E_LOOPBACK": 403,
    "E_NOT_FOUND": 404,
    "E_MODEL_UNKNOWN": 404,
    "E_METHOD": 405,
    "E_TIMEOUT": 408,
    "E_BODY_SIZE": 413,
    "E_IMG_BYTES": 413,
    "E_IMG_PIXELS": 413,
    "E_MEMORY": 413,
    "E_ENCODING": 415,
    "E_IMG_FORMAT": 415,
    "E_REQUEST": 422,
    "E_DOMAIN": 422,
    "E_ATTRIBUTE": 422,
    "E_PARAMETER": 422,
    "E_QUEUE": 429,
    "E_HEADERS_SIZE": 431,
    "E_UNAVAILABLE": 503,
}


def status_of(code: str) -> int:
    """HTTP status of an error code."""
    return STATUS.get(code, 422 if code.startswith("E_IMG_") else 500)


class ErrorDetail(BaseModel):
    """One error: a stable code, what is wrong, what to do."""

    code: str = Field(examples=["E_IMG_TRUNCATED"])
    message: str
    hint: str | None = None


class ErrorBody(BaseModel):
    """The one shape of all errors."""

    error: ErrorDetail

    @classmethod
    def of(cls, error: I2IError) -> ErrorBody:
        """The answer for an error of ours; one that is not the caller's fault loses its text."""
        if status_of(error.code) == 500:
            message = "the server failed on this request; its log has the details"
            return cls(error=ErrorDetail(code="E_INTERNAL", message=message))
        return cls(error=ErrorDetail(code=error.code, message=error.message, hint=error.hint))


class ModelInfo(BaseModel):
    """A hosted model."""

    name: str
    version: str | None = Field(description="of the registry, or the first 12 digits of the weights' sha256")
    system: str | None = None
    domains: list[str] = []
    conditioning: dict[str, Any] = {}
    size: int | None = Field(default=None, description="side in pixels of the training images")
    fixed_size: int | None = Field(default=None, description="the one side the network takes; images are resized")
    weights_sha256: str | None = None
    scores: dict[str, Any] = {}
    ready: bool = Field(description="loaded, and answered its golden input")
    reason: str | None = Field(default=None, description="why it is not ready")


class ModelList(BaseModel):
    """Answer of GET /v1/models."""

    models: list[ModelInfo]


class Health(BaseModel):
    """Answer of the probes."""

    status: Literal["ok", "not ready"]
    models: dict[str, str] = {}


class ServeArgs(BaseModel):
    """Settings of the server; also the `args` of serve.yaml.

    `models` are NAME@ALIAS of the MLflow registry (NAME alone is NAME@champion), `bundles` are directories or URIs of
    bundles, or NAME=URI.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    models: tuple[str, ...] = ()
    bundles: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    token_file: str | None = None
    tracking_uri: str | None = None
    cache: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    threads: int | None = Field(default=None, ge=1)
    replicas: int = Field(default=1, ge=1)
    batch: int = Field(default=8, ge=1)
    max_ongoing: int = Field(default=16, ge=1)
    max_queued: int = Field(default=32, ge=0)
    timeout_s: float = Field(default=30.0, gt=0, le=3600)
    max_bytes: int = Field(default=32 * 1024**2, ge=1024)
    max_pixels: int = Field(default=25_000_000, ge=1024)

    @field_validator("models", "bundles", mode="before")
    @classmethod
    def _one_is_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("token_file", mode="before")
    @classmethod
    def _path_as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    @model_validator(mode="after")
    def _something_to_serve(self) -> ServeArgs:
        if not self.models and not self.bundles:
            raise ValueError("nothing to serve: give a model (NAME@ALIAS) or a bundle (a directory or s3:// URI)")
        return self

    @classmethod
    def parse(cls, args: dict[str, Any]) -> ServeArgs:
        """Validate; every mistake in one message.

        Raises:
            ConfigError: naming each setting, what was given and what is allowed.
        """
        try:
            return cls.model_validate(args)
        except ValidationError as error:
            wrong = []
            for item in error.errors(include_url=False):
                where = ".".join(str(part) for part in item["loc"])
                text = item["msg"].removeprefix("Value error, ")
                wrong.append(f"{where}={item['input']!r}: {text}" if where else text)
            raise ConfigError("; ".join(wrong), hint=None) from None


def check_name(name: str) -> str:
    """`name` if it may be a model's.

    Raises:
        RequestError: it may not (code E_NAME); the name is not repeated in the message.
    """
    if not NAME.fullmatch(name):
        raise RequestError("not a name of a model", code="E_NAME", hint=NAME_RULE)
    return name
