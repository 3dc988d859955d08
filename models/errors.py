"""The exception tree of the project.

    I2IError
    ├── UserError (ValueError)      the caller's mistake: one readable message, exit status 2, HTTP 4xx
    │   ├── ConfigError             an option, a value range, a combination of settings
    │   ├── DataError               a dataset or a stored object that is missing, empty or wrong
    │   │   └── ImageError          one image that cannot be used; `code` is one of the E_IMG_* codes
    │   ├── BundleError             a bundle that cannot be loaded
    │   └── RequestError            a request that asks for what a model does not offer
    ├── StorageError                a store that does not answer, or answers wrongly, after all retries
    ├── CheckpointError             a checkpoint that cannot be written or verified
    └── NonFiniteLoss               training diverged; names step, phase and term

Each carries a stable machine-readable `code` and an optional `hint` that says what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class I2IError(Exception):
    """Root of everything this project raises on purpose."""

    code = "E_INTERNAL"

    def __init__(self, message: str, *, code: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if code is not None:
            self.code = code

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message

    def __reduce__(self):
        # Keyword arguments survive the trip between processes.
        return _rebuild, (type(self), self.message, self.code, self.hint)


def _rebuild(kind: type[I2IError], message: str, code: str, hint: str | None) -> I2IError:
    return kind(message, code=code, hint=hint)


class UserError(I2IError, ValueError):
    """The caller's mistake."""

    code = "E_USER"


class ConfigError(UserError):
    code = "E_CONFIG"


class DataError(UserError):
    code = "E_DATA"


class ImageError(DataError):
    code = "E_IMG_CORRUPT"


class BundleError(UserError):
    code = "E_BUNDLE"


class RequestError(UserError):
    code = "E_REQUEST"


class StorageError(I2IError):
    code = "E_STORAGE"


class CheckpointError(I2IError):
    code = "E_CHECKPOINT"


class NonFiniteLoss(I2IError):
    """A loss term stopped being a finite number; training cannot go on."""

    code = "E_NON_FINITE"


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'? known: a, b` for a message about an unknown word."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    guess = f"did you mean '{close[0]}'? " if close else ""
    return f"{guess}known: {', '.join(names)}"
