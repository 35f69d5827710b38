"""Colour spaces against OpenCV and published values."""

import cv2
import numpy as np
import torch

from biopsy.training.colour_spaces import hsv_to_rgb, lab_to_rgb, rgb_to_hsv, rgb_to_lab


def as_batch(colours):
    return torch.as_tensor(colours, dtype=torch.float32).T[None, :, :, None]


def as_colours(batch):
    return batch[0, :, :, 0].T


def test_lab_of_primaries_is_the_published_one():
    colours = [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1], [0, 0, 0]]
    published = [[53.24, 80.09, 67.20], [87.74, -86.18, 83.18], [32.30, 79.20, -107.86], [100, 0, 0], [0] * 3]
    assert torch.allclose(as_colours(rgb_to_lab(as_batch(colours))), torch.tensor(published), atol=0.02)


def test_lab_agrees_with_opencv_and_comes_back():
    rgb = torch.rand(4, 3, 30, 20, generator=torch.Generator().manual_seed(0))
    rgb[0] *= 0.02  # the linear part near black
    lab = rgb_to_lab(rgb)
    for patch, ours in zip(rgb, lab, strict=True):
        theirs = cv2.cvtColor(np.ascontiguousarray(patch.permute(1, 2, 0)), cv2.COLOR_RGB2LAB)
        assert np.abs(theirs - ours.permute(1, 2, 0).numpy()).max() < 0.6  # OpenCV interpolates a table
        assert np.abs(theirs - ours.permute(1, 2, 0).numpy()).mean() < 0.1
    assert torch.allclose(lab_to_rgb(lab), rgb, atol=1e-4)


def test_colours_that_srgb_lacks_are_clipped():
    rgb = lab_to_rgb(as_batch([[120, 0, 0], [-20, 0, 0], [50, 200, -200], [50, -200, 200]]))
    assert rgb.isfinite().all() and rgb.min() == 0 and 0.999 < rgb.max() <= 1


def test_hsv_agrees_with_opencv_and_comes_back():
    rgb = torch.rand(4, 3, 30, 20, generator=torch.Generator().manual_seed(0))
    rgb[0, :, :5], rgb[0, :, 5:10], rgb[0, :, 10:15] = 0, 1, 0.5  # without a hue
    hsv = rgb_to_hsv(rgb)
    for patch, ours in zip(rgb, hsv, strict=True):
        theirs = cv2.cvtColor(np.ascontiguousarray(patch.permute(1, 2, 0)), cv2.COLOR_RGB2HSV)
        assert np.abs(theirs / [360, 1, 1] - ours.permute(1, 2, 0).numpy()).max() < 1e-4
    assert torch.allclose(hsv_to_rgb(hsv), rgb, atol=1e-5)
