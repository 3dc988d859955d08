"""Checks of configuration records: every mistake of a record in one message."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from models.errors import ConfigError


def check_record(
    record: Any,
    *,
    at_least: Mapping[str, float] | None = None,
    above_zero: Sequence[str] = (),
    fractions: Sequence[str] = (),
    multiples: Mapping[str, int] | None = None,
    choices: Mapping[str, Sequence[Any]] | None = None,
) -> None:
    """Check fields of a frozen record; a field that is None passes.

    Args:
        at_least: field → smallest legal value.
        above_zero: fields that must be finite and greater than 0.
        fractions: fields that must lie in [0, 1).
        multiples: field → number it must be a multiple of.
        choices: field → legal values.

    Raises:
        ConfigError: lists every field that is wrong, what was given and what is allowed.
    """
    wrong: list[str] = []

    def value(field: str) -> Any:
        return getattr(record, field)

    for field, smallest in (at_least or {}).items():
        if value(field) is not None and not value(field) >= smallest:
            wrong.append(f"{field}={value(field)} (at least {smallest:g})")
    for field in above_zero:
        if not (math.isfinite(value(field)) and value(field) > 0):
            wrong.append(f"{field}={value(field)} (a finite number above 0)")
    for field in fractions:
        if not 0 <= value(field) < 1:
            wrong.append(f"{field}={value(field)} (from 0 to below 1)")
    for field, factor in (multiples or {}).items():
        given = value(field)
        if given % factor:
            near = max(factor, round(given / factor) * factor)
            wrong.append(f"{field}={given} (a multiple of {factor}, nearest {near})")
    for field, legal in (choices or {}).items():
        if value(field) not in legal:
            wrong.append(f"{field}={value(field)!r} (one of {', '.join(map(str, legal))})")
    if wrong:
        raise ConfigError(f"{type(record).__name__}: {'; '.join(wrong)}")


def check_patches(size: int, layers: int) -> None:
    """A PatchGAN of `layers` strided layers must have something to normalise at its last norm.

    Raises:
        ConfigError: the image side `size` is too small; names the smallest one and the most layers.
    """
    if layers >= 1 and size // 2**layers < 3:
        most = max(n for n in range(layers) if n == 0 or size // 2**n >= 3)
        raise ConfigError(
            f"size={size} is too small for d_layers={layers}",
            code="E_SIZE",
            hint=f"at least {3 * 2**layers} px, or d_layers={most}",
        )
