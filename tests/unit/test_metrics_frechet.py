from __future__ import annotations

import numpy as np
import pytest
import torch

from pipelines.metrics.frechet import fit, frechet


def _features(seed: int, n: int, d: int = 16) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(0, 1, (n, d)) @ rng.normal(0, 1, (d, d)) + rng.normal(0, 1, d)


def test_frechet__same_set_is_zero():
    x = _features(0, 100)
    assert frechet(x, fit(x)) == pytest.approx(0, abs=1e-8 * fit(x).trace)


def test_frechet__shift_and_scale_in_closed_form():
    x = _features(0, 200)
    x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T  # covariance exactly 1
    assert frechet(2 * x + 3, fit(x)) == pytest.approx(16 * (9 + 1), rel=1e-9)


@pytest.mark.parametrize("n", [10, 300])
def test_frechet__general_matrix_square_root(n):
    scipy_linalg = pytest.importorskip("scipy.linalg")
    x, y = _features(0, n), _features(1, 500)
    root = scipy_linalg.sqrtm(np.cov(x.T) @ np.cov(y.T))
    shift = ((x.mean(0) - y.mean(0)) ** 2).sum()
    expected = shift + np.trace(np.cov(x.T)) + np.trace(np.cov(y.T)) - 2 * np.trace(root).real
    assert frechet(x, fit(y)) == pytest.approx(expected, rel=1e-6)


def test_frechet__agrees_with_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Identity(torch.nn.Module):
        num_features = 16

        def forward(self, x):
            return x

    other = FrechetInceptionDistance(feature=Identity(), input_img_size=(3, 8, 8)).set_dtype(torch.float64)
    x, y = _features(0, 150), _features(1, 200)
    other.update(torch.from_numpy(y), real=True)
    other.update(torch.from_numpy(x), real=False)
    assert frechet(x, fit(y)) == pytest.approx(float(other.compute()), rel=1e-3)


def test_frechet__singular_reference():
    y = _features(1, 5)
    assert frechet(y, fit(y)) == pytest.approx(0, abs=1e-6 * fit(y).trace)


def test_fit__one_image():
    with pytest.raises(ValueError, match="at least 2"):
        fit(np.zeros((1, 4)))
