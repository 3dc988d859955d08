"""Which code made a result."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
from pathlib import Path

_PACKAGES = ("models", "pipelines", "tune_spaces", "deploy")


@functools.cache
def code_version() -> str:
    """`<version>+<digest>`: the digest is over the project's own Python files, so that an edit shows."""
    try:
        version = importlib.metadata.version("i2i")
    except importlib.metadata.PackageNotFoundError:
        version = "0"
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for package in _PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode())
            digest.update(path.read_bytes())
    return f"{version}+{digest.hexdigest()[:12]}"
