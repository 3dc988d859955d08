from __future__ import annotations

import numpy as np
import pytest
import torch

from pipelines.metrics.paired import as_floats, l1, psnr, retrieval_top1, ssim
from pipelines.metrics.resize import resize_area, resize_matrix


def _images(seed: int, n: int = 5, side: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


def test_l1__black_and_white_differ_by_one():
    black = np.zeros((2, 32, 32, 3), np.uint8)
    assert l1(black, black + 255).tolist() == [1.0, 1.0]
    assert l1(black, black + 51).tolist() == pytest.approx([0.2, 0.2])


def test_psnr__closed_form_and_cap():
    black = np.zeros((1, 32, 32, 3), np.uint8)
    assert psnr(black, black + 51)[0] == pytest.approx(-20 * np.log10(0.2))
    assert psnr(black, black)[0] == pytest.approx(100)


def test_psnr__agrees_with_torchmetrics():
    from torchmetrics.functional.image import peak_signal_noise_ratio

    x, y = _images(0), _images(1)
    other = peak_signal_noise_ratio(as_floats(x), as_floats(y), data_range=1.0, dim=(1, 2, 3), reduction="none")
    assert psnr(x, y) == pytest.approx(other.numpy(), rel=1e-6)


def test_ssim__agrees_with_torchmetrics():
    from torchmetrics.functional.image import structural_similarity_index_measure

    x = _images(0, side=40)
    y = (0.7 * x + 0.3 * _images(1, side=40)).astype(np.uint8)
    other = structural_similarity_index_measure(as_floats(x), as_floats(y), data_range=1.0, reduction="none")
    assert ssim(x, y) == pytest.approx(other.numpy(), rel=1e-4)
    assert ssim(x, x) == pytest.approx(np.ones(5))


def test_paired__shapes_that_differ():
    with pytest.raises(ValueError, match="differ in shape"):
        l1(_images(0, side=32), _images(0, side=33))


def test_retrieval_top1__own_image_found_under_change_of_tone():
    x = _images(0, n=20)
    assert retrieval_top1((x * 0.5 + 20).astype(np.uint8), x).tolist() == [1.0] * 20


def test_retrieval_top1__another_image_and_a_blank_one_fail():
    x = _images(0, n=4)
    outputs = x.copy()
    outputs[1], outputs[2] = x[3], 255
    assert retrieval_top1(outputs, x).tolist() == [1.0, 0.0, 0.0, 1.0]


def test_retrieval_top1__twins_are_a_tie_and_no_success():
    x = _images(0, n=3)
    x[1] = x[0]
    assert retrieval_top1(x, x).tolist() == [0.0, 0.0, 1.0]


@pytest.mark.parametrize(("old", "new"), [(64, 16), (100, 64), (64, 64), (32, 64), (1, 4)])
def test_resize_matrix__weights_sum_to_one_and_keep_the_mean_position(old, new):
    weights = resize_matrix(old, new)
    assert weights.sum(1) == pytest.approx(torch.ones(new))
    assert (weights.double() @ (torch.arange(old).double() + 0.5)).mean() == pytest.approx(old / 2)


def test_resize_area__whole_blocks_are_averaged():
    x = torch.arange(64.0).reshape(1, 1, 8, 8)
    assert torch.equal(resize_area(x, 4), torch.nn.functional.avg_pool2d(x, 2))


def test_resize_area__enlarging_is_linear_between_pixel_centres():
    x = torch.rand(1, 3, 20, 32)
    other = torch.nn.functional.interpolate(x, size=(64, 64), mode="bilinear", align_corners=False)
    assert torch.allclose(resize_area(x, 64), other, atol=1e-6)
