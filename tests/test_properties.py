"""Properties of patches: values known by construction, true sizes, the same in any order."""

import cv2
import numpy as np
import pandas as pd
import pytest

from biopsy.evaluation.patch_properties import PROPERTIES, measure_properties
from biopsy.slide_io.stain import combine_stains


def stain_patch(haematoxylin, eosin, px=20):
    """A patch that holds the given amounts: numbers, or arrays ``(px, px)``."""
    amounts = np.zeros((1, px, px, 3))
    amounts[..., 0], amounts[..., 1] = haematoxylin, eosin
    return combine_stains(amounts)


def test_amounts_are_those_that_were_put_in():
    patches = np.concatenate(
        [stain_patch(0, 0), stain_patch(0.4, 0), stain_patch(0, 0.3), stain_patch(0.2, 0.5)]
    )
    found = measure_properties(patches)
    assert list(found.columns) == list(PROPERTIES)
    np.testing.assert_allclose(found["haematoxylin"], [0, 0.4, 0, 0.2], atol=0.01)
    np.testing.assert_allclose(found["eosin"], [0, 0, 0.3, 0.5], atol=0.01)
    np.testing.assert_allclose(found["stain"], [0, 0.4, 0.3, 0.7], atol=0.01)
    assert found["heterogeneity"].max() < 1e-4 and found["sharpness"].max() == 0
    assert found["tissue_frac"].tolist() == [0, 1, 1, 1]
    assert found["brightness"][0] == pytest.approx(255, abs=0.01)
    assert found["brightness"].idxmin() == 3


def test_heterogeneity_is_the_spread_of_haematoxylin_within_a_patch():
    half = np.zeros((20, 20))
    half[:, 10:] = 0.6
    found = measure_properties(np.concatenate([stain_patch(half, 0.1), stain_patch(0.3, half)]))
    assert found["heterogeneity"][0] == pytest.approx(0.3, abs=0.01)
    assert found["heterogeneity"][1] == pytest.approx(0, abs=0.01), "eosin's spread is not counted"
    assert measure_properties(stain_patch(half, 0))["tissue_frac"][0] == 0.5


def test_brightness_is_luma():
    patch = np.zeros((3, 5, 5, 3), np.uint8)
    patch[0], patch[1], patch[2] = (100, 0, 0), (0, 100, 0), (0, 0, 100)
    np.testing.assert_allclose(measure_properties(patch)["brightness"], [29.9, 58.7, 11.4], atol=1e-3)


def test_blurring_takes_sharpness_and_little_else():
    sharp = np.random.default_rng(0).integers(120, 255, (1, 50, 50, 3), dtype=np.uint8)
    blurred = cv2.GaussianBlur(sharp[0], (0, 0), 2)[None]
    found = measure_properties(np.concatenate([sharp, blurred]))
    assert found["sharpness"][1] < found["sharpness"][0] / 10
    assert found["brightness"][1] == pytest.approx(found["brightness"][0], abs=1)
    grey = cv2.cvtColor(sharp[0], cv2.COLOR_RGB2GRAY)
    assert found["sharpness"][0] == pytest.approx(cv2.Laplacian(grey, cv2.CV_64F).std(), rel=0.01)


def test_padding_is_not_looked_at(make_patches):
    images, _ = make_patches(n_patients=2, patches_per_patient=6)
    sizes = np.tile([[16, 16], [12, 9]], (6, 1))
    padded = images.copy()
    padded[1::2, 9:] = 0
    padded[1::2, :, 12:] = 0
    found = measure_properties(padded, sizes)
    np.testing.assert_allclose(found.iloc[::2], measure_properties(images[::2]), rtol=1e-5)
    np.testing.assert_allclose(found.iloc[1::2], measure_properties(images[1::2, :9, :12]), rtol=1e-5)


def test_order_chunks_and_rows_change_nothing(make_patches):
    images, _ = make_patches(n_patients=2, patches_per_patient=10)
    whole = measure_properties(images)
    index = np.random.default_rng(0).permutation(len(images))
    pd.testing.assert_frame_equal(
        measure_properties(images, index=index, chunk=3), whole.iloc[index].reset_index(drop=True)
    )
    assert len(measure_properties(images, index=np.array([], int))) == 0


def test_nuclear_density_is_a_count_by_area_and_needs_a_scale():
    amount = np.zeros((100, 100))
    for x, y in ((25, 25), (75, 25), (25, 75), (75, 75)):
        cv2.circle(amount, (x, y), 6, 0.6, -1)
    patch = stain_patch(amount, 0.1, px=100)
    found = measure_properties(np.concatenate([patch, stain_patch(0.3, 0.1, px=100)]), mpp=0.5)
    assert found["nuclear_density"].tolist() == [pytest.approx(4 / 0.05**2), 0]
    assert measure_properties(patch)["nuclear_density"].isna().all()
