from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from biopsy.slide_io.stain import FEATURE_NAMES, colour_features, combine_stains, separate_stains

# scikit-image's `rgb_from_hed` (skimage.color.colorconv), which cites Ruifrok's own matrix; its third stain
# is DAB, of which H&E slides hold none.
RGB_FROM_HED = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])

MakePatches = Callable[..., tuple[np.ndarray, object]]


def test_amounts_agree_with_an_independent_matrix() -> None:
    amounts = np.random.default_rng(0).uniform(0, 0.6, (500, 2))
    rgb = 256 * 10 ** -(amounts @ RGB_FROM_HED[:2]) - 1
    by_inverse = (-np.log10((np.rint(rgb) + 1) / 256)) @ np.linalg.inv(RGB_FROM_HED)
    found = separate_stains(np.rint(rgb).astype(np.uint8))
    np.testing.assert_allclose(found[:, :2], amounts, atol=0.02)
    np.testing.assert_allclose(found[:, :2], by_inverse[:, :2], atol=0.02)
    assert np.abs(found[:, 2]).max() < 0.02


def test_clear_glass_holds_no_stain_and_nuclei_hold_haematoxylin() -> None:
    assert separate_stains(np.full((1, 3), 255, np.uint8)).tolist() == [[0, 0, 0]]
    nucleus, stroma = separate_stains(np.array([[96, 62, 138], [226, 165, 196]], np.uint8))
    assert nucleus[0] > 3 * stroma[0]
    assert stroma[1] > stroma[0]


@given(st.tuples(*[st.integers(0, 255)] * 3))
def test_combining_undoes_separating(colour: tuple[int, int, int]) -> None:
    rgb = np.array([[colour]], np.uint8)
    assert (combine_stains(separate_stains(rgb)) == rgb).all()


def test_shape_is_kept(make_patches: MakePatches) -> None:
    images, _ = make_patches(n_patients=1)
    assert separate_stains(images).shape == images.shape
    np.testing.assert_allclose(separate_stains(images)[3], separate_stains(images[3]), atol=1e-6)


def test_features_are_means_spreads_and_percentiles(make_patches: MakePatches) -> None:
    images, _ = make_patches(n_patients=2)
    features = colour_features(images, chunk=5)
    assert features.shape == (24, len(FEATURE_NAMES)) == (24, 35)
    named = dict(zip(FEATURE_NAMES, features.T, strict=True))
    stains = separate_stains(images)
    for channel, values in (
        ("red", images[..., 0]),
        ("blue", images[..., 2]),
        ("haematoxylin", stains[..., 0]),
        ("eosin", stains[..., 1]),
    ):
        flat = values.reshape(24, -1).astype(float)
        np.testing.assert_allclose(named[f"{channel}_mean"], flat.mean(axis=1), rtol=1e-5)
        np.testing.assert_allclose(named[f"{channel}_sd"], flat.std(axis=1), rtol=1e-4)
        for percentile in (5, 25, 50, 75, 95):
            expected = np.percentile(flat, percentile, axis=1)
            np.testing.assert_allclose(named[f"{channel}_p{percentile}"], expected, rtol=1e-5, atol=1e-5)


def test_padding_is_not_counted(make_patches: MakePatches) -> None:
    images, _ = make_patches(n_patients=1)
    sizes = np.full((12, 2), 16)
    sizes[4] = (10, 7)
    padded = images.copy()
    padded[4, 7:] = 0
    padded[4, :, 10:] = 0
    features = colour_features(padded, sizes)
    np.testing.assert_allclose(features[4], colour_features(images[4:5, :7, :10])[0], rtol=1e-6)
    whole = colour_features(images)
    np.testing.assert_allclose(np.delete(features, 4, axis=0), np.delete(whole, 4, axis=0), rtol=1e-5)


def test_features_of_chosen_patches(make_patches: MakePatches) -> None:
    images, _ = make_patches(n_patients=2)
    index = np.array([20, 3, 11])
    np.testing.assert_allclose(
        colour_features(images, index=index, chunk=2), colour_features(images)[index], rtol=1e-5
    )


def test_order_of_pixels_changes_nothing(make_patches: MakePatches) -> None:
    images, _ = make_patches(n_patients=1)
    shuffled = np.random.default_rng(0).permutation(images.reshape(12, -1, 3), axis=1).reshape(images.shape)
    np.testing.assert_allclose(colour_features(images), colour_features(shuffled), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [0, 1])
def test_few_patches(count: int) -> None:
    assert colour_features(np.zeros((count, 4, 4, 3), np.uint8)).shape == (count, 35)
