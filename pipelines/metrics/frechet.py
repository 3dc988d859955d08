"""Fréchet distance between two sets of features, each taken as a Gaussian.

    d = |μ1 - μ2|² + tr(Σ1 + Σ2 - 2 (Σ1 Σ2)^½)

Source: Heusel et al. 2017, "GANs trained by a two time-scale update rule", Eq. 6. Covariances are the plain unbiased
ones, nothing is added to their diagonals. With A = Σ2^½, tr (Σ1 Σ2)^½ = tr (A Σ1 A)^½: every matrix is symmetric, and
float64 eigenvalues are all that is needed. The estimate is biased upwards when images are few: compare only scores with
the same counts, which the protocol of a score states. With fewer images than features a covariance is singular; the
distance is still defined.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Gaussian:
    """A reference set: its mean (d,), the trace of its covariance, and the symmetric root of the covariance (d, d)."""

    mean: np.ndarray
    trace: float
    root: np.ndarray
    count: int


def fit(y: np.ndarray) -> Gaussian:
    """The Gaussian of features y (m, d), m at least 2."""
    if len(y) < 2:
        raise ValueError(f"a covariance needs at least 2 images: got {len(y)}")
    mean = y.mean(axis=0)
    centred = (y - mean) / np.sqrt(len(y) - 1)
    cov = centred.T @ centred
    values, vectors = np.linalg.eigh(cov)
    root = (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T
    return Gaussian(mean, float(np.trace(cov)), root, len(y))


def frechet(x: np.ndarray, reference: Gaussian) -> float:
    """Fréchet distance of features x (n, d), float64, n at least 2, from a reference."""
    if len(x) < 2:
        raise ValueError(f"a covariance needs at least 2 images: got {len(x)}")
    mean = x.mean(axis=0)
    centred = (x - mean) / np.sqrt(len(x) - 1)
    seen = centred @ reference.root
    # A Σ1 A = seenᵀ seen has the same eigenvalues above 0 as seen seenᵀ: take the smaller one.
    product = seen @ seen.T if len(seen) < seen.shape[1] else seen.T @ seen
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(product), 0.0, None)).sum()
    shift = mean - reference.mean
    distance = shift @ shift + (centred * centred).sum() + reference.trace - 2 * cross
    return float(max(distance, 0.0))
