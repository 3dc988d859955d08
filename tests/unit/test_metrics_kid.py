from __future__ import annotations

import numpy as np
import pytest

from pipelines.metrics.kid import KidResult, covariance, kernel, kid, kid_ratio, ratio, within_sums


def _features(seed: int, n: int, d: int = 8, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 1.0, (n, d))


def _by_definition(x: np.ndarray, y: np.ndarray) -> float:
    def k(a, b):
        return (a @ b / len(a) + 1) ** 3

    within_x = np.mean([k(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j])
    within_y = np.mean([k(y[i], y[j]) for i in range(len(y)) for j in range(len(y)) if i != j])
    return float(within_x + within_y - 2 * np.mean([k(a, b) for a in x for b in y]))


def test_kernel__orthogonal_rows_give_one():
    assert kernel(np.array([[1.0, 0.0]]), np.array([[0.0, 1.0], [2.0, 0.0]])).tolist() == [[1.0, 8.0]]


def test_kid__definition():
    x, y = _features(0, 7), _features(1, 5, shift=0.3)
    assert kid(x, y).value == pytest.approx(_by_definition(x, y), rel=1e-12)


def test_kid__leave_one_out_values_are_those_of_smaller_sets():
    x, y = _features(0, 6), _features(1, 5)
    result = kid(x, y)
    assert result.without_x[2] == pytest.approx(_by_definition(np.delete(x, 2, 0), y), rel=1e-10)
    assert result.without_y[4] == pytest.approx(_by_definition(x, y[:4]), rel=1e-10)


def test_kid__known_reference_sums_change_nothing():
    x, y = _features(0, 9), _features(1, 8)
    assert kid(x, y, y_sums=within_sums(y)).value == kid(x, y).value


def test_kid__unbiased_and_its_error_is_the_spread_over_samples():
    results = [kid(_features(2 * i, 40), _features(2 * i + 1, 60)) for i in range(300)]
    values = np.array([r.value for r in results])
    assert abs(values.mean()) < 4 * values.std() / np.sqrt(len(values))
    shifted = [kid(_features(2 * i, 40, shift=0.5), _features(2 * i + 1, 60)) for i in range(300)]
    spread = np.std([r.value for r in shifted])
    assert np.mean([r.stderr for r in shifted]) == pytest.approx(spread, rel=0.15)


def test_kid__too_few_images():
    with pytest.raises(ValueError, match="at least 3"):
        kid(_features(0, 2), _features(1, 9))


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save")
def test_kid__agrees_with_torchmetrics():
    import torch
    from torchmetrics.image.kid import KernelInceptionDistance

    x, y = _features(0, 50, 32), _features(1, 50, 32, shift=0.2)
    other = KernelInceptionDistance(feature=_Identity(32), subsets=1, subset_size=50)
    other.update(torch.from_numpy(y), real=True)
    other.update(torch.from_numpy(x), real=False)
    assert kid(x, y).value == pytest.approx(float(other.compute()[0]), rel=1e-3)


def test_kid_ratio__covariance_shrinks_the_error_of_alike_sets():
    x, y = _features(0, 40, shift=1.0), _features(1, 60)
    a, b = kid(x, y), kid(x + 0.01, y)
    found = kid_ratio(a, b)
    assert found is not None
    assert found.value == pytest.approx(a.value / b.value)
    independent = ratio(a.value, b.value, a.stderr**2, b.stderr**2, 0.0)
    assert independent is not None
    assert found.stderr < 0.1 * independent.stderr
    assert covariance(a, a) == pytest.approx(a.stderr**2)


def test_ratio__delta_method():
    found = ratio(1.0, 4.0, 0.04, 0.16, 0.0)
    assert found is not None
    assert found.value == 0.25
    assert found.stderr == pytest.approx(np.sqrt(0.04 + 0.25**2 * 0.16) / 4)


def test_ratio__negative_numerator_counts_as_zero_and_keeps_its_error():
    found = ratio(-0.1, 2.0, 0.04, 1.0, 0.5)
    assert found is not None
    assert (found.value, found.stderr) == (0.0, pytest.approx(0.1))


def test_ratio__none_where_there_is_nothing_to_improve():
    assert ratio(0.1, 0.0, 1.0, 1.0, 0.0) is None
    assert kid_ratio(KidResult(1.0, np.ones(3), np.ones(3)), KidResult(-1.0, np.ones(3), np.ones(3))) is None


def _Identity(width: int):
    """Passes features through: torchmetrics probes it with an image, to learn their number."""
    import torch

    class Identity(torch.nn.Module):
        num_features = width

        def forward(self, x):
            return x if x.ndim == 2 else torch.zeros(len(x), width)

    return Identity()
