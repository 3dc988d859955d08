"""Kernel inception distance: squared maximum mean discrepancy of two sets of features, unbiased, with its error.

    KID(X, Y) = mean over i != j of k(x_i, x_j) + mean over i != j of k(y_i, y_j) - 2 · mean over i, j of k(x_i, y_j)
    k(x, y)   = (x·y / d + 1)³                                                  d: number of features

Source: Binkowski et al. 2018, "Demystifying MMD GANs", §4. They average this over 100 random subsets of the images; the
mean over *all* subsets is the same expression on all images, which is what is computed here. So nothing is drawn at
random, and no subset size belongs to the protocol. The standard error is the jackknife's: leave out one image of either
set. (The spread over subsets that papers print is not an error of the mean.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

KERNEL = "(x·y/d + 1)^3"


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error."""

    value: float
    stderr: float


@dataclass(frozen=True)
class KidResult:
    """KID of two sets of features, and what it would be without each single image.

    Attributes:
        value: unbiased, hence slightly negative at times where the sets are alike.
        without_x: (n,) value without image i of the first set.
        without_y: (m,) value without image j of the second set.
    """

    value: float
    without_x: np.ndarray
    without_y: np.ndarray

    @property
    def stderr(self) -> float:
        """Jackknife standard error."""
        return float(np.sqrt(max(covariance(self, self), 0.0)))


def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(x·y / d + 1)³ for every pair of rows: (n, d), (m, d) → (n, m)."""
    products = x @ y.T
    products /= x.shape[1]
    products += 1.0
    # Not `**`, which takes a logarithm for every entry.
    return products * products * products


@dataclass(frozen=True)
class WithinSums:
    """Sums of the kernel within one set without its diagonal: by row, and in all. Computed once for a reference."""

    rows: np.ndarray
    total: float


def within_sums(x: np.ndarray) -> WithinSums:
    """Kernel sums within a set of features (n, d)."""
    pairs = kernel(x, x)
    np.fill_diagonal(pairs, 0.0)
    rows = pairs.sum(axis=1)
    return WithinSums(rows, float(rows.sum()))


def kid(x: np.ndarray, y: np.ndarray, *, y_sums: WithinSums | None = None) -> KidResult:
    """KID of features x (n, d) against features y (m, d), both float64, n and m at least 3.

    Args:
        y_sums: `within_sums(y)` where it is known already.
    """
    n, m = len(x), len(y)
    if min(n, m) < 3:
        raise ValueError(f"KID needs at least 3 images in each set: got {n} and {m}")
    xs, ys = within_sums(x), y_sums or within_sums(y)
    cross = kernel(x, y)
    by_x, by_y = cross.sum(axis=1), cross.sum(axis=0)
    total = float(by_x.sum())
    x_term, y_term = xs.total / (n * (n - 1)), ys.total / (m * (m - 1))
    without_x = (xs.total - 2 * xs.rows) / ((n - 1) * (n - 2)) + y_term - 2 * (total - by_x) / ((n - 1) * m)
    without_y = x_term + (ys.total - 2 * ys.rows) / ((m - 1) * (m - 2)) - 2 * (total - by_y) / (n * (m - 1))
    return KidResult(x_term + y_term - 2 * total / (n * m), without_x, without_y)


def covariance(a: KidResult, b: KidResult) -> float:
    """Jackknife covariance of two KIDs whose images belong together: image i of one first set was made from the same
    source as image i of the other, and the second set is the same."""
    return _jackknife(a.without_x, b.without_x) + _jackknife(a.without_y, b.without_y)


def _jackknife(a: np.ndarray, b: np.ndarray) -> float:
    count = len(a)
    return (count - 1) / count * float((a - a.mean()) @ (b - b.mean()))


def kid_ratio(a: KidResult, b: KidResult) -> Estimate | None:
    """max(KID a, 0) / max(KID b, 0) with its standard error by the delta method; None where b is not above 0.

    Meant for outputs (a) against doing nothing (b), made of the same source images: what the two have in common by
    chance cancels out in the error.
    """
    return ratio(a.value, b.value, covariance(a, a), covariance(b, b), covariance(a, b))


def ratio(a: float, b: float, var_a: float, var_b: float, cov: float) -> Estimate | None:
    """max(a, 0) / max(b, 0); standard error to first order: Var(a/b) ~ (Var a - 2r Cov + r² Var b) / b²."""
    if b <= 0:
        return None
    value = max(a, 0.0) / b
    variance = (var_a - 2 * value * cov + value * value * var_b) / (b * b)
    return Estimate(value, float(np.sqrt(max(variance, 0.0))))
