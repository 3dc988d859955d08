"""What is known of a target domain before any output is scored: the features of its training images.

Where the extractor asks for it (`Extractor.standardised`), features are brought to a common scale by these images:

    z = (feature - mean) / max(deviation, 0.05 · median of all deviations)
    score's feature = z / (1 + |z| / 3)                           so within (-3, 3)

The second line bounds what a single feature can say: a narrow domain (one kind of hatching, no colour) otherwise puts
images of another at hundreds of deviations, the kernel raises them to the sixth power, and all outputs that are not of
the old domain score alike, a blank page included.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from pipelines.metrics import frechet, kid
from pipelines.metrics.features import Extractor

FLOOR, BOUND = 0.05, 3.0


@dataclass(frozen=True)
class Reference:
    """Training images of a domain, as features.

    Attributes:
        domain: its name.
        extractor: what made the features.
        features: (m, d) float64, standardised where the extractor asks for it.
        location, scale: (d,) of the standardisation; None where there is none.
    """

    domain: str
    extractor: Extractor
    features: np.ndarray
    location: np.ndarray | None
    scale: np.ndarray | None

    @functools.cached_property
    def sums(self) -> kid.WithinSums:
        """For KID."""
        return kid.within_sums(self.features)

    @functools.cached_property
    def gaussian(self) -> frechet.Gaussian:
        """For the Fréchet distance."""
        return frechet.fit(self.features)

    def features_of(self, images: np.ndarray) -> np.ndarray:
        """uint8 (n, h, w, 3) → features (n, d) on the scale of this reference."""
        return self.scaled(self.extractor(images))

    def scaled(self, raw: np.ndarray) -> np.ndarray:
        """Features as the extractor gives them → as they are compared."""
        if self.location is None or self.scale is None:
            return raw
        z = (raw - self.location) / self.scale
        return z / (1 + np.abs(z) / BOUND)

    def without(self, rows: np.ndarray) -> Reference:
        """The same reference without some of its images; the scale stays."""
        kept = np.delete(self.features, rows, axis=0)
        return Reference(self.domain, self.extractor, kept, self.location, self.scale)


def make_reference(domain: str, extractor: Extractor, raw: np.ndarray) -> Reference:
    """A reference from features as the extractor gives them, (m, d), m at least 6."""
    if not extractor.standardised:
        return Reference(domain, extractor, raw, None, None)
    deviation = raw.std(axis=0)
    # All images alike: any positive scale will do.
    floor = max(FLOOR * float(np.median(deviation)), 1e-6)
    plain = Reference(domain, extractor, raw, raw.mean(axis=0), np.maximum(deviation, floor))
    return Reference(domain, extractor, plain.scaled(raw), plain.location, plain.scale)
