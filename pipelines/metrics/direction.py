"""Scores of one direction (source → to): outputs, beside what doing nothing and real images would score.

A `Direction` holds all that does not depend on the generator, baselines included, so that a search or a training loop
pays for it once and then only for the outputs. `score_generator` does the rest; it needs no Ray and no file.

Names of scores: `kid_<extractor>` and `frechet_<extractor>` compare with the target's training images, without pairs;
`l1`, `psnr`, `ssim`, `retrieval_top1` compare with the true image of each source and exist on aligned splits only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from models.errors import ConfigError, nearest
from pipelines.metrics import frechet, kid, paired
from pipelines.metrics.reference import Reference

UNPAIRED = ("kid", "frechet")
PAIRED: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "l1": paired.l1,
    "psnr": paired.psnr,
    "ssim": paired.ssim,
    "retrieval_top1": paired.retrieval_top1,
}
METRICS = (*UNPAIRED, *PAIRED)
RATIOS = ("kid", "l1")
_ALIASES = {"fid": "frechet", "retrieval": "retrieval_top1"}

Translate = Callable[[np.ndarray, str, str], np.ndarray]
"""(uint8 images (n, h, w, 3), source, to) → uint8 images of the same shape."""


@dataclass(frozen=True)
class Scored:
    """Scores of one set of images, and what is needed for errors and ratios.

    Attributes:
        scores: name → number, with `<name>_stderr` beside KID.
        kid: None where KID was not asked for.
        errors: L1 of each image; None on a split that is not aligned.
    """

    scores: dict[str, float]
    kid: kid.KidResult | None = None
    errors: np.ndarray | None = None


@dataclass(frozen=True)
class Direction:
    """A direction of translation, ready to be scored.

    Attributes:
        sources: held-out images of the source domain, uint8 (n, h, w, 3).
        truth: the true translation of each; None where the split is not aligned.
        reference: training images of the target domain.
        metrics: names out of `METRICS`.
        baselines: `do_nothing` (the sources themselves), `random_target` (training images of the target; compared
            with the others of the reference), `real` (held-out images of the target: what a perfect generator gets).
    """

    source: str
    to: str
    sources: np.ndarray
    truth: np.ndarray | None
    reference: Reference
    metrics: tuple[str, ...]
    baselines: dict[str, Scored]

    @property
    def name(self) -> str:
        """As in reports: `a->b`."""
        return f"{self.source}->{self.to}"


def check_metrics(names: Sequence[str] | None) -> tuple[str, ...]:
    """Metrics by name, in the usual order; None means all. `fid` means `frechet`; an extractor's suffix is allowed.

    Raises:
        ConfigError: no such metric, or none at all.
    """
    if names is None:
        return METRICS
    chosen = set()
    for name in names:
        base = _ALIASES.get(name.strip(), name.strip())
        base = next((m for m in UNPAIRED if base.startswith(f"{m}_")), base)
        if base not in METRICS:
            hint = nearest(name, (*METRICS, *_ALIASES))
            raise ConfigError(f"unknown metric '{name}'", code="E_METRIC", hint=hint)
        chosen.add(base)
    if not chosen:
        raise ConfigError("no metric is named", code="E_METRIC", hint=f"known: {', '.join(METRICS)}")
    return tuple(m for m in METRICS if m in chosen)


def prepare_direction(
    source: str,
    to: str,
    *,
    sources: np.ndarray,
    real: np.ndarray,
    aligned: bool,
    reference: Reference,
    random_rows: np.ndarray,
    random_images: np.ndarray,
    metrics: tuple[str, ...] = METRICS,
) -> Direction:
    """Compute the baselines of a direction.

    Args:
        sources, real: held-out images of both domains, uint8 (n, h, w, 3).
        aligned: whether `real[i]` is the true translation of `sources[i]`.
        random_rows, random_images: which images of the reference stand for random ones, and their pixels; their number
            may differ from that of the sources.
    """
    truth = real if aligned else None
    rest = reference.without(random_rows)
    drawn = random_images[np.arange(len(sources)) % len(random_images)]
    baselines = {
        "do_nothing": score_images(sources, reference, truth, metrics),
        "random_target": Scored(
            {
                **score_images(random_images, rest, None, metrics).scores,
                **score_images(drawn, reference, truth, tuple(m for m in metrics if m in PAIRED)).scores,
            }
        ),
        "real": score_images(real, reference, None, metrics),
    }
    return Direction(source, to, sources, truth, reference, metrics, baselines)


def score_images(
    images: np.ndarray, reference: Reference, truth: np.ndarray | None, metrics: tuple[str, ...]
) -> Scored:
    """Scores of uint8 images (n, h, w, 3) against a reference and, where `truth` is given, against it."""
    scores: dict[str, float] = {}
    suffix, result = reference.extractor.name, None
    if set(metrics) & set(UNPAIRED):
        features = reference.features_of(images)
        if "kid" in metrics:
            result = kid.kid(features, reference.features, y_sums=reference.sums)
            scores[f"kid_{suffix}"] = result.value
            scores[f"kid_{suffix}_stderr"] = result.stderr
        if "frechet" in metrics:
            scores[f"frechet_{suffix}"] = frechet.frechet(features, reference.gaussian)
    errors = None
    if truth is not None:
        for name in (m for m in metrics if m in PAIRED):
            values = PAIRED[name](images, truth)
            scores[name] = float(values.mean())
            if name == "l1":
                errors = values
    return Scored(scores, result, errors)


def score_direction(outputs: np.ndarray, direction: Direction) -> dict[str, Any]:
    """`{"scores", "baselines", "ratios"}` of outputs for `direction.sources`, in their order; JSON-able.

    A ratio is to doing nothing, `{"value", "stderr"}`; both None where doing nothing scores no worse than real images.
    """
    if outputs.shape != direction.sources.shape:
        raise ValueError(f"{direction.name}: outputs {outputs.shape} do not match inputs {direction.sources.shape}")
    scored = score_images(outputs, direction.reference, direction.truth, direction.metrics)
    return {
        "scores": scored.scores,
        "baselines": {name: baseline.scores for name, baseline in direction.baselines.items()},
        "ratios": _ratios(scored, direction.baselines["do_nothing"], direction.reference.extractor.name),
    }


def _ratios(scored: Scored, nothing: Scored, suffix: str) -> dict[str, dict[str, float | None]]:
    found: dict[str, kid.Estimate | None] = {}
    if scored.kid is not None and nothing.kid is not None:
        found[f"kid_{suffix}"] = kid.kid_ratio(scored.kid, nothing.kid)
    if scored.errors is not None and nothing.errors is not None:
        a, b = scored.errors, nothing.errors
        cov = np.cov(a, b) / len(a)
        found["l1"] = kid.ratio(float(a.mean()), float(b.mean()), cov[0, 0], cov[1, 1], cov[0, 1])
    return {
        k: {"value": e.value, "stderr": e.stderr} if e else {"value": None, "stderr": None} for k, e in found.items()
    }


def score_generator(translate: Translate, directions: Sequence[Direction], batch: int = 64) -> dict[str, Any]:
    """Translate the held-out images of each direction and score them.

    Args:
        translate: see `Translate`; called with at most `batch` images at a time.

    Returns:
        Direction's name → as `score_direction`.
    """
    results = {}
    for direction in directions:
        starts = range(0, len(direction.sources), batch)
        parts = [translate(direction.sources[i : i + batch], direction.source, direction.to) for i in starts]
        results[direction.name] = score_direction(np.concatenate(parts), direction)
    return results


def flat(results: dict[str, Any], primary: str | None = None) -> dict[str, float]:
    """Results of `score_generator` as plain metrics for a log or a search.

    The scores of the primary direction (the first by default) by name, its ratios as `<name>_ratio`; those of every
    other direction as `<direction>/<name>`.
    """
    primary = primary or next(iter(results))
    found: dict[str, float] = {}
    for direction, result in results.items():
        prefix = "" if direction == primary else f"{direction}/"
        found.update({prefix + name: value for name, value in result["scores"].items()})
        for name, ratio in result["ratios"].items():
            if ratio["value"] is not None:
                found[f"{prefix}{name}_ratio"] = ratio["value"]
    return found
