"""Bundles by address: wherever a command or the server takes a bundle, a run directory will do as well."""

from __future__ import annotations

from pathlib import Path

from models.bundle import CONFIG, copy_bundle
from models.errors import BundleError, StorageError
from pipelines.storage import Store, cache_directory, join


def find_bundle(uri: str) -> str:
    """URI of the bundle at `uri`, or of the one in the run directory there.

    Raises:
        BundleError: there is none.
        DataError, StorageError: the store refuses or does not answer.
    """
    store = Store(uri)
    if store.exists(CONFIG):
        return store.uri
    if store.exists(f"bundle/{CONFIG}"):
        return join(store.uri, "bundle")
    raise BundleError(
        f"there is no bundle at {store.uri}: {CONFIG} is missing, and bundle/{CONFIG} too",
        code="E_BUNDLE_MISSING",
        hint="give a bundle, or the directory that train printed; an unfinished run has no bundle yet",
    )


def local_bundle(uri: str, cache: str | Path | None = None) -> Path:
    """The bundle at `uri`, or in the run directory there, on this machine: in place, or as a verified copy.

    Args:
        cache: directory for copies; default that of the user.

    Raises:
        BundleError, DataError, StorageError: as `find_bundle` and `copy_bundle`, or the cache cannot be written.
    """
    store = Store(find_bundle(uri))
    if store.is_local:
        return Path(store.uri)
    cache = Path(cache or cache_directory("bundles")).expanduser()
    try:
        return copy_bundle(store.read, store.uri, cache)
    except OSError as error:
        hint = "XDG_CACHE_HOME names another place"
        raise StorageError(f"cannot write to the cache {cache}: {error.strerror or error}", hint=hint) from error
