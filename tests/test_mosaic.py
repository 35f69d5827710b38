"""Patches become a slide again: every pixel where it was cut, whatever the offset, size and scale."""

import numpy as np
import pytest

from biopsy.core.errors import DataError
from biopsy.slide_io.mosaic import paste, stitch, stitch_values
from refusals import refuses


def cut(slide: np.ndarray, patch_px: int, offset: int = 1) -> tuple[list[np.ndarray], list[int], list[int]]:
    """Cut a slide into patches named as IDC does: coordinates start at 1, edge patches are smaller."""
    height, width = slide.shape[:2]
    places = [(x, y) for x in range(0, width, patch_px) for y in range(0, height, patch_px)]
    patches = [slide[y : y + patch_px, x : x + patch_px] for x, y in places]
    return patches, [x + offset for x, _ in places], [y + offset for _, y in places]


def random_slide(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("offset", [0, 1, 37])
def test_a_cut_slide_comes_back_pixel_for_pixel(offset):
    slide = random_slide(150, 200)
    assert np.array_equal(stitch(*cut(slide, 50, offset), patch_px=50), slide)


def test_odd_patches_at_the_edges_lie_where_they_were():
    slide = random_slide(135, 182)
    image = stitch(*cut(slide, 50), patch_px=50)
    assert np.array_equal(image[:135, :182], slide)
    assert (image[135:] == 255).all() and (image[:, 182:] == 255).all()


def test_order_does_not_matter_and_gaps_are_background():
    slide = random_slide(100, 150)
    patches, x, y = cut(slide, 50)
    keep = [4, 0, 5, 2]
    image = stitch([patches[i] for i in keep], [x[i] for i in keep], [y[i] for i in keep], patch_px=50)
    for i in range(6):
        there = image[y[i] - 1 : y[i] + 49, x[i] - 1 : x[i] + 49]
        assert np.array_equal(there, patches[i]) if i in keep else (there == 255).all()


def test_half_scale_averages_without_seams():
    slide = np.full((200, 150, 3), 120, np.uint8)
    image = stitch(*cut(slide, 50), patch_px=50, scale=0.33)
    assert image.shape == (66, 50, 3)
    assert (image == 120).all()
    checks = np.kron(np.indices((50, 50)).sum(axis=0) % 2 * 200, np.ones((2, 2)))[..., None].repeat(3, 2)
    half = stitch(*cut(checks.astype(np.uint8), 50), patch_px=50, scale=0.5)
    assert np.array_equal(half, checks[::2, ::2].astype(np.uint8))


def test_values_stand_in_the_cell_of_their_patch():
    grid = stitch_values([0.1, 0.2, 0.9], [1, 51, 151], [51, 1, 51], patch_px=50)
    expected = np.array([[np.nan, 0.2, np.nan, np.nan], [0.1, np.nan, np.nan, 0.9]])
    np.testing.assert_array_equal(grid, expected)


def test_overlapping_patches_average():
    grid = stitch_values([0.0, 1.0, 0.5], [0, 25, 50], [0, 0, 0], patch_px=50)
    np.testing.assert_allclose(grid, [[0.5, 0.5]])


def test_refusals_name_the_fault():
    patch = np.zeros((50, 50, 3), np.uint8)
    with refuses(DataError, "1 of 2", "coordinates"):
        stitch([patch, patch], [1, np.nan], [1, 51], patch_px=50)
    with refuses(DataError, "1 patches", "2 coordinates"):
        stitch([patch], [1, 51], [1, 1], patch_px=50)
    with refuses(DataError, "1 coordinates"):
        stitch([patch, patch], [1], [1], patch_px=50)
    with refuses(DataError, "20,050 x 20,050 pixels", "scale"):
        stitch([patch, patch], [0, 20_000], [0, 20_000], patch_px=50)
    with refuses(DataError, "scale 2", "(0, 1]"):
        stitch([patch], [1], [1], patch_px=50, scale=2)
    with refuses(DataError, "2 values", "1 coordinates"):
        stitch_values([1.0, 2.0], [1], [1], patch_px=50)
    with refuses(DataError, "0 x and 0 y"):
        stitch_values([], [], [], patch_px=50)


def test_a_far_place_is_refused_and_named_before_memory_is_requested():
    x, y = np.array([0, 50, 5_000_001]), np.array([0, 0, 5_000_001])
    with refuses(DataError, "x=5000001, y=5000001"):
        stitch_values([1, 2, 3], x, y, patch_px=50)
    assert stitch_values([1, 2], [0, 450_000], [0, 0], patch_px=50).shape == (1, 9001)


def test_an_image_is_pasted_cropped_to_the_canvas():
    image = np.arange(1, 13).reshape(3, 4)
    for left, top in ((-2, -1), (0, 0), (3, 2), (5, 0), (-4, 0)):
        canvas, large = np.zeros((4, 5), int), np.zeros((24, 25), int)
        paste(canvas, image, left, top)
        large[10 + top : 13 + top, 10 + left : 14 + left] = image
        assert (canvas == large[10:14, 10:15]).all()
