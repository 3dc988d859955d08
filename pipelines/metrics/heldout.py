"""From a dataset to `Direction`s that are ready to be scored: which images, how many, in which order."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

from models.errors import ConfigError, DataError, nearest
from pipelines.metrics.direction import Direction, prepare_direction
from pipelines.metrics.features import Extractor
from pipelines.metrics.kid import KERNEL
from pipelines.metrics.reference import Reference, make_reference
from pipelines.reader import iterate_split
from pipelines.shards import Dataset

MAX_REFERENCE = MAX_HELD_OUT = 2000
# KID needs three images on each side, also where half of the reference stands for random ones.
MIN_IMAGES = 6
SPLITS = ("test", "val")

# References of this process, the last few: trials and repeated evaluations share them.
_references: OrderedDict[tuple[Any, ...], Reference] = OrderedDict()
_MAX_CACHED = 8


def choose_split(dataset: Dataset, domains: Sequence[str], split: str | None = None) -> str:
    """The split to score on: the one named, else "test" where all domains have it, else "val".

    Raises:
        ConfigError: a split that is not for scoring.
        DataError: E_DATA_EMPTY, the dataset has none.
    """
    if split is not None and split not in SPLITS:
        raise ConfigError(f"cannot evaluate on split '{split}'", code="E_SPLIT", hint=nearest(split, SPLITS))
    wanted = (split,) if split else SPLITS
    for name in wanted:
        if all(dataset.manifest.count(domain, name) for domain in domains):
            return name
    raise DataError(
        f"{dataset.uri} has no held-out images: nothing in split {' or '.join(wanted)} for {', '.join(domains)}",
        code="E_DATA_EMPTY",
        hint="prepare it with --val or --test",
    )


def check_enough(dataset: Dataset, directions: Sequence[tuple[str, str]], split: str, limit: int | None = None) -> None:
    """Refuse to score these (source, to) directions on too few images, before any is read.

    Raises:
        DataError: a domain is missing or has too few held-out images, or a target too few training images.
        ConfigError: `limit` is too small.
    """
    if limit is not None and limit < MIN_IMAGES:
        raise ConfigError(f"cannot score {limit} images", code="E_LIMIT", hint=f"allowed: {MIN_IMAGES} or more")
    held_out = dict.fromkeys(itertools.chain.from_iterable(directions))
    for domain, where in [*((d, split) for d in held_out), *((to, "train") for _, to in directions)]:
        dataset.require(domain, split=where)
        count = dataset.manifest.count(domain, where)
        if count < MIN_IMAGES:
            raise DataError(
                f"{dataset.uri}: domain '{domain}' has {count} images in '{where}'; scores need at least {MIN_IMAGES}",
                code="E_DATA_FEW",
            )


def load_directions(
    dataset: Dataset,
    directions: Sequence[tuple[str, str]],
    *,
    split: str,
    size: int,
    extractor: Extractor,
    metrics: tuple[str, ...],
    limit: int | None = None,
    seed: int = 0,
) -> list[Direction]:
    """Read the held-out and the reference images, and compute the baselines.

    Args:
        directions: (source, to) pairs of domains.
        size: images are resized to this side in pixels.
        limit: most held-out images a domain, the first in stored order, which is that of a hash of their keys, hence as
            good as random; None means `MAX_HELD_OUT`.
        seed: of the choice of random target images.

    Raises:
        DataError: a domain is missing or has too few images.
        ConfigError: `limit` is too small.
    """
    check_enough(dataset, directions, split, limit)
    held_out = {
        domain: _load(dataset, domain, split, size, limit or MAX_HELD_OUT)
        for domain in dict.fromkeys(itertools.chain.from_iterable(directions))
    }
    found = []
    for source, to in directions:
        reference = reference_of(dataset, to, size, extractor)
        count = len(reference.features)
        rng = np.random.Generator(np.random.PCG64([seed, dataset.manifest.domains.index(to)]))
        rows = np.sort(rng.permutation(count)[: min(len(held_out[source]), count // 2)])
        found.append(
            prepare_direction(
                source,
                to,
                sources=held_out[source],
                real=held_out[to],
                aligned=dataset.manifest.aligned((source, to), split),
                reference=reference,
                random_rows=rows,
                random_images=_load(dataset, to, "train", size, MAX_REFERENCE, rows),
                metrics=metrics,
            )
        )
    return found


def reference_of(dataset: Dataset, domain: str, size: int, extractor: Extractor) -> Reference:
    """The first `MAX_REFERENCE` training images of a domain as features; kept for the next call in this process."""
    key = (dataset.manifest.digest, domain, size, extractor.name, extractor.digest)
    if key not in _references:
        images = (pixels for _, pixels in iterate_split(dataset, domain, "train", size))
        raw = extractor(itertools.islice(images, MAX_REFERENCE))
        _references[key] = make_reference(domain, extractor, raw)
        while len(_references) > _MAX_CACHED:
            _references.popitem(last=False)
    _references.move_to_end(key)
    return _references[key]


def protocol(directions: Sequence[Direction], split: str, size: int, seed: int) -> dict[str, Any]:
    """How the scores came about, for whoever compares them: JSON with plain values, counts by domain."""
    extractor = directions[0].reference.extractor
    held_out: dict[str, int] = {}
    for d in directions:
        held_out[d.source] = len(d.sources)
    reference = {d.to: len(d.reference.features) for d in directions}
    dims = directions[0].reference.features.shape[1]
    few = min(*held_out.values(), *reference.values()) if held_out else 0
    return {
        "split": split,
        "size_px": size,
        **extractor.describe(),
        "features": dims,
        "held_out_images": held_out,
        "reference_images": reference,
        "reference": "training images of the target domain",
        "kid": f"unbiased, all pairs, kernel {KERNEL}; standard error by jackknife",
        "frechet": "covariances as they are"
        + (f"; singular: {few} images, {dims} features" if few <= dims else f"; {few} images or more"),
        "paired": "of aligned images only" if any(d.truth is not None for d in directions) else "none: not aligned",
        "order": "stored",
        "seed": seed,
    }


def _load(
    dataset: Dataset, domain: str, split: str, size: int, limit: int, rows: np.ndarray | None = None
) -> np.ndarray:
    """The first `limit` images, or those in `rows` (ascending) of them: uint8 (n, size, size, 3)."""
    images = (pixels for _, pixels in iterate_split(dataset, domain, split, size))
    last = limit if rows is None else int(rows[-1]) + 1
    wanted = None if rows is None else set(rows.tolist())
    return np.stack([p for i, p in enumerate(itertools.islice(images, last)) if wanted is None or i in wanted])
