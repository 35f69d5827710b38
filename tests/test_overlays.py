"""Overlays: alpha compositing by hand, an order that survives a grey print, and what stands on a sheet."""

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

from biopsy.core.errors import DataError
from biopsy.plotting.patches import ALPHA, COLOURS, Overlay, draw_overlays, scale_maps, superimpose
from biopsy.plotting.style import svg
from refusals import refuses

LUMA = np.array([0.299, 0.587, 0.114])
PATCH = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)


def test_alpha_is_the_share_of_the_map():
    values = np.random.default_rng(1).random((9, 7))
    grey = np.repeat(np.rint(PATCH @ LUMA)[..., None], 3, axis=2)
    np.testing.assert_allclose(superimpose(PATCH, values, alpha=0.0), grey, atol=1)
    only_map = 255 * matplotlib.colormaps[COLOURS](values)[..., :3]
    np.testing.assert_allclose(superimpose(PATCH, values, alpha=1.0), only_map, atol=1)
    mixed = superimpose(PATCH, values)
    assert mixed.dtype == np.uint8
    np.testing.assert_allclose(mixed, ALPHA * only_map + (1 - ALPHA) * (PATCH @ LUMA)[..., None], atol=1)


@pytest.mark.parametrize("tissue", [0, 90, 255])
def test_more_is_lighter_also_in_grey_print(tissue):
    values = np.linspace(0, 1, 64)[None]
    patch = np.full((1, 64, 3), tissue, np.uint8)
    lightness = superimpose(patch, values)[0] @ LUMA
    assert (np.diff(lightness) > -0.6).all() and np.ptp(lightness) > 120
    tissue_alone = superimpose(np.array([[[0] * 3, [255] * 3]], np.uint8), np.zeros((1, 2)))[0] @ LUMA
    assert np.ptp(lightness) > np.ptp(tissue_alone), "the map is louder than the tissue"


@pytest.mark.parametrize("tissue", [0, 90, 255])
def test_for_is_lighter_than_against_also_in_grey_print(tissue):
    values = np.linspace(-1, 1, 129)[None]
    shown = superimpose(np.full((1, 129, 3), tissue, np.uint8), values, signed=True)[0]
    assert (np.diff(shown @ LUMA) > -0.6).all() and np.ptp(shown @ LUMA) > 100
    against, nothing, for_it = (shown[place].astype(float) for place in (0, 64, 128))
    assert np.ptp(nothing) < 0.1 * 255, "nothing is grey"
    assert against[2] - against[0] > 30 and for_it[0] - for_it[2] > 60, "blue and yellow, not red and green"


def test_maps_with_a_sign_keep_it_and_their_zero():
    maps = np.random.default_rng(0).normal(0, 3, (2, 1, 40, 40))
    scaled = scale_maps(maps, axis=(2, 3), signed=True)
    assert scaled.min() == -1 and scaled.max() == 1 and (np.sign(scaled) == np.sign(maps)).all()
    np.testing.assert_allclose(scale_maps(-maps, axis=(2, 3), signed=True), -scaled)
    assert scale_maps(np.zeros((3, 3)), signed=True).max() == 0
    rows = [Overlay("right", PATCH, np.stack([np.full((9, 7), 0.5), np.full((9, 7), -0.5)]))]
    figure = draw_overlays(rows, ["saliency", "occlusion"], [False, True])
    pictures = [image.get_array() for axes in figure.axes for image in axes.images]
    np.testing.assert_array_equal(pictures[2], superimpose(PATCH, np.full((9, 7), -0.5), signed=True))
    drawn = svg(figure)
    assert "most" in drawn and "against" in drawn
    assert "against" not in svg(draw_overlays(rows, ["saliency", "occlusion"]))


def test_scaling_keeps_nothing_at_nothing_and_reaches_one():
    maps = np.random.default_rng(0).random((3, 1, 40, 40)) * np.array([1, 10, 0])[:, None, None, None] - 0.1
    each = scale_maps(maps, axis=(2, 3))
    assert each.min() == 0 and each[0].max() == each[1].max() == 1 and each[2].max() == 0
    assert ((maps < 0) <= (each == 0)).all()
    together = scale_maps(maps, axis=(0, 2, 3))
    assert together[1].max() == 1 and together[0].max() < 0.2
    few = np.zeros((1, 1, 40, 40))
    few[..., 3, 4] = 7.0
    assert scale_maps(few, axis=(2, 3))[0, 0, 3, 4] == 1, "a single pixel is not lost"
    outlier = np.ones((20, 20))
    outlier[0, 0] = 1000
    assert scale_maps(outlier)[5, 5] == 1, "one pixel does not darken all others"


def test_a_sheet_shows_each_patch_and_its_maps():
    rows = [Overlay(f"missed: idc, p 0.1{i}", PATCH, np.full((2, 9, 7), 0.5)) for i in range(3)]
    figure = draw_overlays(rows, ["saliency", "activation 3"])
    assert isinstance(figure, Figure)
    pictures = [image.get_array() for axes in figure.axes for image in axes.images]
    assert len(pictures) == 9
    np.testing.assert_array_equal(pictures[0], PATCH)
    np.testing.assert_array_equal(pictures[1], superimpose(PATCH, np.full((9, 7), 0.5)))
    said = [text.get_text() for text in figure.texts]
    assert {"patch", "saliency", "activation 3", "missed: idc, p 0.12"} <= set(said)
    drawn = svg(figure)
    assert drawn == svg(draw_overlays(rows, ["saliency", "activation 3"])) and "most" in drawn


def test_maps_and_pictures_that_do_not_fit_are_refused():
    with refuses(DataError, "(7, 9)", "(9, 7)"):
        superimpose(PATCH, np.zeros((7, 9)))
    with refuses(DataError, "1 rows", "2 maps"):
        draw_overlays([Overlay("a", PATCH, np.zeros((1, 9, 7)))], ["one", "two"])
    with refuses(DataError, "0 rows"):
        draw_overlays([], ["one"])
