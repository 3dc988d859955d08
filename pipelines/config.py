"""The configuration of a training run: one document in, one document out (`run.yaml`).

Three sections are the same for every system (`data`, `train`, `schedule`); `system` and `weights` are checked against
the system's own records. All mistakes come in one message.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any, Literal, get_type_hints

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from models import system_class
from models.errors import ConfigError, nearest
from models.system import System
from pipelines.storage import absolute

SECTIONS = ("data", "system", "weights", "schedule", "train")

_MAX_DOCUMENT_BYTES = 1_000_000


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataConfig(_Section):
    """What is read.

    Attributes:
        uri: dataset written by `prepare`.
        domains: names in the order of the system's streams; None where the dataset has exactly as many as needed.
        augment: "jitter" resizes to 286/256 of the size and crops, then flips; "flip" only flips; "none" only resizes.
        cache_gb: limit of the node-local shard cache (objects from S3 only).
    """

    uri: str
    domains: tuple[str, ...] | None = None
    augment: Literal["jitter", "flip", "none"] = "jitter"
    cache_gb: float = Field(20.0, gt=0)


class TrainConfig(_Section):
    """How the run goes.

    Attributes:
        steps: of the whole run.
        batch: samples of each stream a step, over all workers; a multiple of `logical_ranks`.
        logical_ranks: fixed for the run; may be hosted by fewer workers with the same result.
        workers: training processes; 0 trains in the command's own process, without Ray.
        threads: of each worker's torch, None for an even share of the cores.
        ema: decay of a moving average of the generators' weights, used for samples and the bundle.
        readers: reader processes of each worker.
    """

    steps: int = Field(ge=1)
    batch: int = Field(ge=1)
    logical_ranks: int = Field(1, ge=1)
    workers: int = Field(1, ge=0)
    threads: int | None = Field(None, ge=1)
    gpu: bool = False
    seed: int = Field(ge=0, lt=2**63)
    precision: Literal["fp32", "bf16"] = "fp32"
    deterministic: bool = False
    ema: float | None = Field(None, gt=0, lt=1)
    readers: int = Field(1, ge=1)
    checkpoint_every: int = Field(500, ge=1)
    sample_every: int = Field(500, ge=1)
    log_every: int = Field(50, ge=1)


class ScheduleConfig(_Section):
    """How learning rates and curricula are laid over the run.

    Attributes:
        absolute: keep the published step counts; by default schedules are fractions of the run.
    """

    absolute: bool = False


class RunConfig(_Section):
    """A resolved run. `system` and `weights` are complete: every field with its value."""

    name: str
    out: str
    data: DataConfig
    system: dict[str, Any]
    weights: dict[str, Any]
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig

    def build_system(self, domains: Sequence[str]) -> System:
        """The system with freshly drawn weights (from torch's global generator)."""
        cls = system_class(self.name)
        return cls(cls.Config(**self.system), domains=tuple(domains))

    def build_weights(self) -> Any:
        """The system's record of loss weights."""
        return system_class(self.name).Weights(**self.weights)

    @property
    def schedule_steps(self) -> int:
        """Steps over which learning rates and curricula are laid."""
        return system_class(self.name).published_steps if self.schedule.absolute else self.train.steps

    @property
    def size(self) -> int:
        """Side in pixels of training images."""
        return self.system["size"]

    def to_yaml(self) -> str:
        """The document `from_yaml` reads."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    @staticmethod
    def from_yaml(text: str | bytes) -> RunConfig:
        """Raises ConfigError where the text is no resolved run."""
        return resolve(_document(text))


def resolve(options: Mapping[str, Any]) -> RunConfig:
    """Options as nested mappings (sections may be partial) → a complete, checked configuration.

    Raises:
        ConfigError: all mistakes in one message: unknown keys with the nearest known one, values out of range, numbers
            that do not fit together.
    """
    options = {k: _without_none(v) if isinstance(v, Mapping) else v for k, v in options.items()}
    unknown = sorted(set(options) - set(RunConfig.model_fields))
    if unknown:
        raise ConfigError(f"unknown setting '{unknown[0]}'", hint=nearest(unknown[0], RunConfig.model_fields))
    cls = system_class(str(options.get("name", "")))
    problems: list[str] = []
    options["system"] = _record(cls.Config, options.get("system") or {}, "system", problems)
    options["weights"] = _weights(cls.Weights, options.get("weights") or {}, problems)
    options["train"] = {**_train_defaults(cls, options.get("train") or {}), **(options.get("train") or {})}
    config = None
    try:
        config = RunConfig.model_validate(options)
    except ValidationError as error:
        problems += [_readable(e) for e in error.errors()]
    if config is not None:
        problems += _fit(config)
    if problems:
        raise ConfigError("; ".join(problems), hint="`i2i train SYSTEM --dry-run` prints every setting")
    assert config is not None
    cls.Config(**config.system)  # raises where the values do not fit together
    data = config.data.model_copy(update={"uri": absolute(config.data.uri)})
    return config.model_copy(update={"out": absolute(config.out), "data": data})


def _train_defaults(cls: type[System], train: Mapping[str, Any]) -> dict[str, Any]:
    workers, ranks = train.get("workers", 1), train.get("logical_ranks")
    if not isinstance(ranks, int):
        ranks = workers if isinstance(workers, int) else 1
    ranks = max(1, ranks)
    return {
        "steps": cls.published_steps,
        "batch": math.ceil(cls.published_batch / ranks) * ranks,
        "seed": secrets.randbelow(2**31),
        "logical_ranks": ranks,
        "precision": default_precision(bool(train.get("gpu"))),
    }


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """`["weights.cycle=5", "train.ema=0.999"]` → nested mappings; values are read as YAML.

    Raises:
        ConfigError: a setting is not of the form section.key=value.
    """
    result: dict[str, Any] = {}
    for setting in settings:
        path, equals, text = setting.partition("=")
        section, dot, key = path.strip().partition(".")
        if not (equals and dot and key):
            raise ConfigError(f"--set {setting}: not of the form section.key=value", hint="for example weights.cycle=5")
        if section not in SECTIONS:
            raise ConfigError(f"--set {setting}: unknown section '{section}'", hint=nearest(section, SECTIONS))
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"--set {setting}: the value cannot be read", hint="quote text that holds ': '") from None
        result.setdefault(section, {})[key] = value
    return result


def _without_none(section: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in section.items() if v is not None}


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`, section by section; None in `over` changes nothing."""
    result = {k: dict(v) if isinstance(v, Mapping) else v for k, v in base.items()}
    for key, value in over.items():
        if isinstance(value, Mapping):
            result[key] = {**(result.get(key) or {}), **{k: v for k, v in value.items() if v is not None}}
        elif value is not None:
            result[key] = value
    return result


def load_document(text: str | bytes) -> dict[str, Any]:
    """A YAML document of partial options, as for `resolve`; ConfigError where it is no mapping."""
    return _document(text)


def default_precision(gpu: bool) -> Literal["fp32", "bf16"]:
    """bf16 where the hardware multiplies it faster than fp32, else fp32."""
    if gpu:
        return (
            "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
        )
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"


def _document(text: str | bytes) -> dict[str, Any]:
    if len(text) > _MAX_DOCUMENT_BYTES:
        raise ConfigError(f"the configuration has {len(text):,} bytes; at most {_MAX_DOCUMENT_BYTES:,} are read")
    try:
        text = text.decode() if isinstance(text, bytes) else text
        if "&" in text and "*" in text and any(isinstance(t, yaml.AliasToken) for t in yaml.scan(text)):
            raise ConfigError("the configuration uses YAML aliases", hint="write the values out")
        document = yaml.safe_load(text)
    except UnicodeDecodeError:
        raise ConfigError("the configuration is not UTF-8 text") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"the configuration is not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(document, dict):
        raise ConfigError("the configuration is not a mapping of sections")
    flat = [key for key in SECTIONS if key in document and not isinstance(document[key], dict)]
    if flat:
        raise ConfigError(f"the configuration's section '{flat[0]}' is not a mapping")
    return document


def _record(cls: type, given: Any, section: str, problems: list[str]) -> dict[str, Any]:
    """Values of a frozen record from partial ones, each converted to the field's type; mistakes go to `problems`."""
    if not isinstance(given, Mapping):
        problems.append(f"{section} is not a mapping")
        return {}
    hints = get_type_hints(cls)
    values = asdict(cls())
    for key, value in given.items():
        if key not in values:
            problems.append(f"unknown setting '{section}.{key}'; {nearest(key, values)}")
            continue
        try:
            values[key] = TypeAdapter(hints[key]).validate_python(value)
        except ValidationError as error:
            problems.append(f"{section}.{key}={value}: {error.errors()[0]['msg'].lower()}")
    return values


def _weights(cls: type, given: Any, problems: list[str]) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        problems.append("weights is not a mapping")
        return {}
    values = {f.name: f.default for f in fields(cls)}
    for key, value in given.items():
        if key not in values:
            problems.append(f"unknown setting 'weights.{key}'; {nearest(key, values)}")
            continue
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if isinstance(value, bool) or not (math.isfinite(number) and number >= 0):
            problems.append(f"weights.{key}={value}: a finite number of at least 0 is needed")
        else:
            values[key] = number
    return values


def _readable(error: Any) -> str:
    path = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        section = {"data": DataConfig, "train": TrainConfig, "schedule": ScheduleConfig}.get(error["loc"][0], RunConfig)
        return f"unknown setting '{path}'; {nearest(str(error['loc'][-1]), section.model_fields)}"
    if error["type"] == "missing":
        return f"{path} is missing"
    return f"{path}={error['input']}: {error['msg'][0].lower()}{error['msg'][1:]}"


def _fit(config: RunConfig) -> list[str]:
    """What is wrong between settings that are each legal."""
    train, wrong = config.train, []
    if not any(config.weights.values()):
        wrong.append("every loss weight is 0: there is nothing to train")
    if train.batch % train.logical_ranks:
        near = max(1, round(train.batch / train.logical_ranks)) * train.logical_ranks
        wrong.append(
            f"train.batch={train.batch} is not a multiple of train.logical_ranks={train.logical_ranks} (nearest {near})"
        )
    if train.workers and train.logical_ranks % train.workers:
        wrong.append(
            f"train.logical_ranks={train.logical_ranks} cannot be shared evenly by {train.workers} workers; "
            f"take a multiple of {train.workers}"
        )
    domains = config.data.domains
    needed = system_class(config.name).batch.num_domains
    if domains is not None and (len(domains) != needed or len(set(domains)) != len(domains)):
        wrong.append(f"{config.name} needs {needed} different domains, --domains names {', '.join(domains) or 'none'}")
    return wrong
