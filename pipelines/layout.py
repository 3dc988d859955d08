"""Which file is which sample: folders → (domain, split, key), and the cuts into train, val and test. Ray-free.

    domains        SRC/<domain>/…, or SRC/{train,val,test}/<domain>/…, or SRC/<domain>/{train,val,test}/…,
                   or SRC/trainA, SRC/testB, … (domains `a`, `b`)
    paired         the same, and the domains must hold the same keys
    side-by-side   SRC/… or SRC/{train,val,test}/…: one image holds both, left is domain `a`, right is `b`

A key is the path below the domain's folder, without extension.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from models.errors import ConfigError, DataError, nearest
from pipelines.storage import Store

LAYOUTS = ("auto", "domains", "paired", "side-by-side")
_SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_LETTERED = re.compile(r"(train|val|valid|validation|test)[_-]?([A-Z])")
_DOMAIN_NAME = re.compile(r"[\w][\w .+-]{0,62}")
_NOT_IMAGES = {
    ".txt",
    ".csv",
    ".tsv",
    ".json",
    ".jsonl",
    ".md",
    ".rst",
    ".xml",
    ".yaml",
    ".yml",
    ".html",
    ".log",
    ".ini",
}


@dataclass(frozen=True)
class Sample:
    """One sample before it is cut: `path` below the source, `half` of the image ("left", "right", or "" for all)."""

    path: str
    bytes: int
    domain: str
    split: str
    key: str
    half: str = ""


@dataclass(frozen=True)
class Layout:
    """What was found below a source. `given` are the splits that folders fix; `skipped` counts other files by kind."""

    kind: str
    samples: tuple[Sample, ...]
    given: frozenset[str]
    skipped: Mapping[str, int]


def read_layout(store: Store, kind: str, is_double: Callable[[Sequence[str]], bool]) -> Layout:
    """List a source and say what each file is.

    Args:
        store: the source.
        kind: one of LAYOUTS.
        is_double: whether some files (relative paths) are twice as wide as high; asked for `auto` only.

    Raises:
        ConfigError: an unknown layout.
        DataError: E_DATA_EMPTY, E_DATA_LAYOUT, E_NAME, E_NOT_FOUND, E_BUCKET.
    """
    if kind not in LAYOUTS:
        raise ConfigError(f"unknown layout '{kind}'; {nearest(kind, LAYOUTS)}")
    files, skipped = _candidates(store)
    if not files:
        others = f" (only {sum(skipped.values())} other files)" if skipped else ""
        raise DataError(
            f"no images below {store.uri}{others}",
            code="E_DATA_EMPTY",
            hint="the source must exist and hold a folder of images for each domain",
        )
    if kind == "side-by-side" or (kind == "auto" and _is_flat(files) and is_double([path for path, _ in files[:8]])):
        samples, given = _side_by_side(files)
        return Layout("side-by-side", tuple(samples), given, skipped)
    samples, given = _by_folders(files, store.uri)
    _check_domains(store, {sample.domain for sample in samples}, files, skipped)
    return Layout("domains" if kind == "auto" else kind, tuple(samples), given, skipped)


def _candidates(store: Store) -> tuple[list[tuple[str, int]], Counter[str]]:
    """Files that may be images; the rest counted by extension. Nothing is said about hidden ones."""
    files, skipped = [], Counter[str]()
    for path, size in store.list():
        parts = PurePosixPath(path).parts
        if any(part.startswith(".") or part == "__MACOSX" for part in parts) or parts[-1].lower() == "thumbs.db":
            skipped["hidden"] += 1
        elif (suffix := PurePosixPath(path).suffix.lower()) in _NOT_IMAGES:
            skipped[suffix] += 1
        else:
            files.append((path, size))
    return files, skipped


def _check_domains(store: Store, domains: set[str], files: Sequence[tuple[str, int]], skipped: Counter[str]) -> None:
    """Refuse names that cannot be used, folders with nothing in them, and fewer than two domains."""
    for domain in sorted(domains):
        if not _DOMAIN_NAME.fullmatch(domain):
            raise DataError(
                f"{store.uri}: '{domain}' cannot be the name of a domain; allowed: letters, digits, '_ .+-'",
                code="E_NAME",
            )
    folders = [name for name in store.folders() if not name.startswith((".", "__MACOSX"))]
    inner = [name for name in folders if name.lower() in _SPLITS]
    if inner:
        folders = [f"{name}/{child}" for name in inner for child in store.folders(name) if not child.startswith(".")]
    used = {path for file, _ in files for path in (file.split("/")[0], "/".join(file.split("/")[:2]))}
    for folder in folders:
        name = folder.split("/")[-1]
        lettered = _LETTERED.fullmatch(name)
        if folder in used or (lettered[2].lower() if lettered else name) in domains:
            continue
        if len(domains) < 2 or not store.list(folder):
            raise DataError(f"domain '{name}' is empty: no images in {store.join(folder)}", code="E_DATA_EMPTY")
        skipped[f"{folder}/"] += 1
    if len(domains) < 2:
        raise DataError(
            f"{store.uri} holds one domain only ('{next(iter(domains))}')",
            code="E_DATA_LAYOUT",
            hint="give the folder above it, with one folder for each of two or more domains",
        )


def _is_flat(files: Iterable[tuple[str, int]]) -> bool:
    """No folders but those of splits."""
    parts = [path.lower().split("/") for path, _ in files]
    return all(len(part) == 1 or (len(part) == 2 and part[0] in _SPLITS) for part in parts)


def _side_by_side(files: Sequence[tuple[str, int]]) -> tuple[list[Sample], frozenset[str]]:
    samples, given = [], set()
    by_split = all(_SPLITS.get(path.split("/")[0].lower()) and "/" in path for path, _ in files)
    for path, size in files:
        split, rest = "", path
        if by_split:
            head, _, rest = path.partition("/")
            split = _SPLITS[head.lower()]
            given.add(split)
        key = _key(rest)
        samples += [Sample(path, size, "a", split, key, "left"), Sample(path, size, "b", split, key, "right")]
    return samples, frozenset(given)


def _by_folders(files: Sequence[tuple[str, int]], uri: str) -> tuple[list[Sample], frozenset[str]]:
    tops = {path.partition("/")[0] for path, _ in files if "/" in path}
    loose = [path for path, _ in files if "/" not in path]
    splits = {top for top in tops if top.lower() in _SPLITS}
    lettered = {top for top in tops if _LETTERED.fullmatch(top)}
    strange = loose or sorted(tops - (splits or lettered or tops))
    if strange:
        beside = "folders of splits" if splits or lettered else "folders of domains"
        what = f"images lie beside the {beside}" if tops else "images lie directly in it, in no folder of a domain"
        raise DataError(
            f"{uri}: {what}: {', '.join(strange[:3])}{', …' if len(strange) > 3 else ''}",
            code="E_DATA_LAYOUT",
            hint="one folder a domain, or --layout side-by-side for images that hold both domains",
        )
    # SRC/<domain>/<split>/…, where every folder is built so.
    inner = not splits and not lettered and all(_inner_split(path) for path, _ in files)
    samples = []
    for path, size in files:
        top, _, rest = path.partition("/")
        if splits:
            domain, _, rest = rest.partition("/")
            if not rest:
                raise DataError(
                    f"{uri}: '{path}' lies in a split, but in no folder of a domain",
                    code="E_DATA_LAYOUT",
                    hint="use SRC/train/<domain>/…, or --layout side-by-side for images that hold both domains",
                )
            split = _SPLITS[top.lower()]
        elif match := _LETTERED.fullmatch(top):
            domain, split = match[2].lower(), _SPLITS[match[1]]
        elif inner:
            split, _, rest = rest.partition("/")
            domain, split = top, _SPLITS[split.lower()]
        else:
            domain, split = top, ""
        samples.append(Sample(path, size, domain, split, _key(rest)))
    return samples, frozenset(sample.split for sample in samples if sample.split)


def _inner_split(path: str) -> bool:
    parts = path.split("/")
    return len(parts) >= 3 and parts[1].lower() in _SPLITS


def _key(path: str) -> str:
    return str(PurePosixPath(path).with_suffix(""))


def find_duplicate_keys(samples: Iterable[Sample]) -> list[Sample]:
    """Samples whose (domain, split, key) another file has already, as a.png beside a.jpg."""
    seen: set[tuple[str, str, str]] = set()
    again = []
    for sample in samples:
        name = (sample.domain, sample.split, sample.key)
        if name in seen:
            again.append(sample)
        seen.add(name)
    return again


def cut_splits(
    samples: Sequence[Sample],
    given: frozenset[str],
    *,
    val: float,
    test: float,
    seed: int,
    group: str | None = None,
) -> list[Sample]:
    """Give every sample its split.

    Splits given by folders are kept. Without any, `test` and `val` are shares of all; with some, `val` is a share of
    train where there is no val folder. The cut is by a hash of the key (of the group, where a pattern is given): a key
    is in the same split in every domain. A share above zero gives each domain of several groups at least one.

    Raises:
        ConfigError: shares out of range, or a pattern that is not a regular expression.
    """
    shares = {"test": 0.0 if given else test, "val": 0.0 if "val" in given else val}
    for name, share in (("--val", val), ("--test", test)):
        if not 0 <= share < 1:
            raise ConfigError(f"{name} is a share of the images: {share}; allowed: 0 up to (but not) 1")
    if val + test >= 1:
        raise ConfigError(f"--val {val} and --test {test} leave nothing to train on; their sum must be below 1")
    try:
        pattern = re.compile(group) if group else None
    except re.error as error:
        raise ConfigError(f"--group '{group}' is not a regular expression: {error}") from error
    ranks: dict[str, float] = {}

    def rank(key: str) -> float:
        name = _group_name(key, pattern)
        if name not in ranks:
            digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
            ranks[name] = int.from_bytes(digest, "big") / 2**64
        return ranks[name]

    by_domain: dict[str, list[float]] = defaultdict(list)
    for sample in samples:
        if sample.split in ("", "train"):
            by_domain[sample.domain].append(rank(sample.key))
    bounds = {domain: _bounds(found, shares) for domain, found in by_domain.items()}

    def cut(sample: Sample) -> Sample:
        if sample.split not in ("", "train"):
            return sample
        below_test, below_val = bounds[sample.domain]
        value = rank(sample.key)
        split = "test" if value < below_test else "val" if value < below_val else "train"
        return replace(sample, split=split)

    return [cut(sample) for sample in samples]


def _bounds(ranks: Sequence[float], shares: Mapping[str, float]) -> tuple[float, float]:
    """Ranks below the first are test, below the second val; raised where a wanted split would be empty."""
    distinct = sorted(set(ranks))
    below_test, below_val = shares["test"], shares["test"] + shares["val"]
    wanted = [name for name, share in shares.items() if share > 0]
    if len(distinct) <= len(wanted):
        return below_test, below_val

    def raised(bound: float, floor: float) -> float:
        if any(floor <= value < bound for value in distinct):
            return bound
        first = next((i for i, value in enumerate(distinct) if value >= floor), len(distinct) - 1)
        # Half-way to the next rank: exactly one group falls below.
        return (distinct[first] + distinct[first + 1]) / 2 if first + 1 < len(distinct) else bound

    if shares["test"] > 0:
        below_test = raised(below_test, 0.0)
        below_val = max(below_val, below_test)
    if shares["val"] > 0:
        below_val = raised(below_val, below_test)
    return below_test, below_val


def _group_name(key: str, pattern: re.Pattern[str] | None) -> str:
    match = pattern.search(key) if pattern else None
    if match is None:
        return key
    return (match[1] if match.re.groups and match[1] is not None else match[0]) or key


def select_keys(samples: Sequence[Sample], select: Mapping[str, frozenset[str]]) -> tuple[list[Sample], list[str]]:
    """Keep the listed keys of the listed domains in train and val; the test split is left whole.

    Returns:
        The samples that remain, and warnings about listed keys that do not exist.

    Raises:
        ConfigError: a domain that does not exist.
        DataError: E_DATA_EMPTY, where no listed key exists.
    """
    domains = {sample.domain for sample in samples}
    warnings = []
    for domain, wanted in select.items():
        if domain not in domains:
            raise ConfigError(f"--select: there is no domain '{domain}'; {nearest(domain, domains)}")
        there = {sample.key for sample in samples if sample.domain == domain and sample.split != "test"}
        missing = sorted(wanted - there)
        if len(missing) == len(wanted):
            example = f"; its keys look like '{min(there)}'" if there else ""
            raise DataError(
                f"--select: none of the {len(wanted)} keys listed for '{domain}' exists{example}", code="E_DATA_EMPTY"
            )
        if missing:
            warnings.append(f"--select: {len(missing)} keys listed for '{domain}' do not exist, as '{missing[0]}'")
    kept = [s for s in samples if s.split == "test" or s.domain not in select or s.key in select[s.domain]]
    return kept, warnings
