"""Files in a local directory or an S3 bucket, by URI: whole objects, with retries, deadlines and digests.

The only place that turns a URI into a filesystem. Keys and endpoint come from the usual AWS variables, are read in the
process that uses them, and are part of no pickle, message or log.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import re
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from models.errors import DataError, StorageError
from pipelines import storage_s3

T = TypeVar("T")

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/")
_ALLOWED = "allowed: a local path, or s3://bucket/path"


def parse_uri(uri: str) -> tuple[str, str]:
    """Split a URI into its kind and path: `("file", path)` or `("s3", "bucket/path")`, without trailing slashes.

    Raises:
        DataError: E_URI, for another scheme, a malformed address, an impossible bucket name, stray spaces.
    """
    if not isinstance(uri, str) or not uri.strip():
        raise _bad_uri(uri, "it is empty")
    if uri != uri.strip():
        raise _bad_uri(uri, "it begins or ends with a space")
    if any(ord(c) < 32 or ord(c) == 127 for c in uri):
        raise _bad_uri(uri, "it contains a control character")
    match = _SCHEME.match(uri)
    if match is None:
        return "file", os.path.normpath(uri)
    scheme = match[1]
    if scheme == "file" and uri.startswith("file:///"):
        return "file", os.path.normpath(uri[len("file://") :])
    if scheme != "s3":
        raise _bad_uri(uri, f"the scheme '{scheme}' is not known")
    if not uri.startswith("s3://"):
        raise _bad_uri(uri, "two slashes belong after 's3:'")
    bucket, _, key = uri[len("s3://") :].partition("/")
    if not _BUCKET.fullmatch(bucket):
        raise _bad_uri(uri, f"'{bucket}' is not a bucket name (3-63 lower-case letters, digits, '-' and '.')")
    key = key.rstrip("/")
    if any(part in ("", ".", "..") for part in key.split("/")) and key:
        raise _bad_uri(uri, "its path has an empty, '.' or '..' component")
    return "s3", f"{bucket}/{key}" if key else bucket


def _bad_uri(uri: object, why: str) -> DataError:
    return DataError(f"not a usable address: {uri!r}: {why}", code="E_URI", hint=_ALLOWED)


def absolute(uri: str) -> str:
    """The same place named so that a process in another directory finds it too."""
    kind, path = parse_uri(uri)
    return f"s3://{path}" if kind == "s3" else os.path.abspath(path)


def join(uri: str, *parts: str) -> str:
    """`join("s3://b/x", "y", "z")` → `s3://b/x/y/z`."""
    return "/".join([uri.rstrip("/") if uri != "/" else "", *(part.strip("/") for part in parts if part)])


def split_name(uri: str) -> tuple[str, str]:
    """Directory and name of a file: `s3://b/x/y` → (`s3://b/x`, `y`), `/y` → (`/`, `y`), `y` → (`.`, `y`)."""
    folder, slash, name = uri.rpartition("/")
    return folder or slash or ".", name


def cache_directory(kind: str) -> Path:
    """Where this machine keeps copies of what lies elsewhere: `i2i/<kind>` below XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "i2i", kind)


class Store:
    """The objects below one URI; `path` arguments are relative to it, with forward slashes.

    A store holds no connection and no key: it may be pickled and sent to another process.

    Args:
        uri: local directory (made when first written to) or s3://bucket/prefix.
        deadline_s: how long one call may go on trying.

    Raises:
        DataError: E_URI, E_BUCKET (no such bucket), E_NOT_FOUND, E_S3_AUTH, E_PERMISSION, E_DIGEST.
        StorageError: the store does not answer, or answers wrongly, until the deadline.
    """

    def __init__(self, uri: str, *, deadline_s: float = 60.0) -> None:
        kind, path = parse_uri(uri)
        self.uri = f"s3://{path}" if kind == "s3" else path
        self.deadline_s = deadline_s
        self.is_local = kind == "file"
        self._backend: Any = _Local(path) if self.is_local else storage_s3.S3(path)

    def __repr__(self) -> str:
        return f"Store({self.uri!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_store, (self.uri, self.deadline_s)

    def join(self, path: str) -> str:
        """The URI of an object."""
        return join(self.uri, path) if path else self.uri

    def read(self, path: str) -> bytes:
        """A whole object; DataError E_NOT_FOUND where there is none."""
        return self._retry("read", path, lambda: self._backend.read(path))

    def read_verified(self, path: str, sha256: str, size: int) -> bytes:
        """A whole object whose length and sha256 are known; read again up to three times on a difference.

        Raises:
            DataError: E_DIGEST, with expected and actual.
        """
        data, actual = b"", ""
        for _ in range(3):
            data = self.read(path)
            actual = hashlib.sha256(data).hexdigest()
            if len(data) == size and actual == sha256:
                return data
        raise DataError(
            f"{self.join(path)} is not what was written: {len(data):,} bytes, sha256 {actual[:12]}…; "
            f"expected {size:,} bytes, sha256 {sha256[:12]}…",
            code="E_DIGEST",
            hint="it was damaged or replaced; write it again",
        )

    def write(self, path: str, data: bytes) -> None:
        """Write or replace an object in one piece: a reader sees the old one or the new one."""
        self._retry("write", path, lambda: self._backend.write(path, data))

    def write_new(self, path: str, data: bytes) -> bool:
        """Write an object unless there is one already; False where there is.

        Atomic on local disks and on stores that honour If-None-Match; elsewhere looked up first, then written.
        """
        attempts = 0

        def attempt() -> bool:
            nonlocal attempts
            attempts += 1
            return self._backend.write_new(path, data)

        if self.exists(path):
            return False
        written = self._retry("write", path, attempt)
        # A lost answer to a put that did succeed makes its own retry fail: then what is there is ours.
        return written or (attempts > 1 and self.read(path) == data)

    def upload_file(self, path: str, local: str | Path) -> None:
        """Copy a local file to `path`, and check that it arrived whole."""
        size = os.path.getsize(local)
        self._retry("write", path, lambda: self._backend.upload(path, Path(local)))
        found = self._retry("read", path, lambda: self._backend.size(path))
        if found != size:
            raise StorageError(f"{self.join(path)} holds {found:,} bytes after an upload of {size:,}; check the store")

    def exists(self, path: str) -> bool:
        """Whether there is an object (not a directory) of this name."""
        return self._retry("look up", path, lambda: self._backend.size(path)) is not None

    def list(self, prefix: str = "") -> list[tuple[str, int]]:
        """(path, bytes) of every object below the directory `prefix`, sorted; empty where there is none."""
        return sorted(self._retry("list", prefix, lambda: self._backend.list(prefix.strip("/"))))

    def folders(self, prefix: str = "") -> list[str]:
        """Names of the directories directly below `prefix`, empty ones too where the store knows them."""
        return sorted(self._retry("list", prefix, lambda: self._backend.folders(prefix.strip("/"))))

    def delete(self, path: str) -> None:
        """Remove an object; nothing happens where there is none."""
        self._retry("delete", path, lambda: self._backend.delete(path))

    def _retry(self, verb: str, path: str, call: Callable[[], T]) -> T:
        """Call until it succeeds, with full-jitter backoff (0.1 s … 5 s), within the deadline."""
        started = time.monotonic()
        attempt = 0
        while True:
            attempt += 1
            try:
                return call()
            except Exception as error:
                if self.is_local:
                    if isinstance(error, OSError):
                        raise _local_error(verb, self.join(path), error) from error
                    raise
                fault = storage_s3.explain(error)
                if fault is None:
                    raise
            if fault.code == "E_S3_EXPIRED" and attempt == 1:
                storage_s3.forget_client()  # keys may have been renewed in the meantime
                continue
            passed = time.monotonic() - started
            if not fault.transient or passed >= min(self.deadline_s, fault.patience_s):
                kind = StorageError if fault.transient else DataError
                tries = f" ({attempt} tries in {passed:.0f} s)" if attempt > 1 else ""
                raise kind(f"cannot {verb} {self.join(path)}: {fault.cause}{tries}", code=fault.code, hint=fault.check)
            time.sleep(random.uniform(0.05, min(5.0, 0.1 * 2**attempt)))


def _open_store(uri: str, deadline_s: float) -> Store:
    return Store(uri, deadline_s=deadline_s)


def _local_error(verb: str, path: str, error: OSError) -> Exception:
    if isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError)):
        return DataError(f"cannot {verb} {path}: no such file", code="E_NOT_FOUND")
    if isinstance(error, PermissionError):
        return DataError(f"cannot {verb} {path}: permission denied", code="E_PERMISSION")
    return StorageError(f"cannot {verb} {path}: {error.strerror or error}")


class _Local:
    """A directory. Writes go to a temporary name in the same directory and are renamed."""

    def __init__(self, root: str) -> None:
        self.root = Path(root)

    def read(self, path: str) -> bytes:
        return (self.root / path).read_bytes()

    def size(self, path: str) -> int | None:
        target = self.root / path
        return target.stat().st_size if target.is_file() else None

    def write(self, path: str, data: bytes) -> None:
        with self._temporary(path, data) as (temporary, target):
            os.replace(temporary, target)

    def write_new(self, path: str, data: bytes) -> bool:
        with self._temporary(path, data) as (temporary, target):
            try:
                # A hard link fails where the name exists, and appears with its whole content.
                os.link(temporary, target)
            except FileExistsError:
                return False
        return True

    def upload(self, path: str, local: Path) -> None:
        self.write(path, local.read_bytes())

    def list(self, prefix: str) -> list[tuple[str, int]]:
        found: list[tuple[str, int]] = []
        _walk(str(self.root / prefix) if prefix else str(self.root), prefix, (), found)
        return found

    def folders(self, prefix: str) -> list[str]:
        try:
            return [entry.name for entry in os.scandir(self.root / prefix) if entry.is_dir()]
        except (FileNotFoundError, NotADirectoryError):
            return []

    def delete(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            (self.root / path).unlink()

    @contextlib.contextmanager
    def _temporary(self, path: str, data: bytes):
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield temporary, target
        finally:
            temporary.unlink(missing_ok=True)


def _walk(directory: str, prefix: str, ancestors: tuple[str, ...], found: list[tuple[str, int]]) -> None:
    """Follow links to directories, but no link to a directory that holds it."""
    real = os.path.realpath(directory)
    if real in ancestors:
        return
    try:
        entries = list(os.scandir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        path = f"{prefix}/{entry.name}" if prefix else entry.name
        try:
            if entry.is_dir():
                _walk(entry.path, path, (*ancestors, real), found)
            elif entry.is_file() and not entry.name.endswith(".tmp"):
                found.append((path, entry.stat().st_size))
        except FileNotFoundError:
            continue  # removed since it was listed
