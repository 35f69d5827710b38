"""Nuclei as blobs: drawn discs are counted, whatever the scale; phantom's known nuclei are ranked."""

import cv2
import numpy as np
import pytest
from scipy.stats import spearmanr

from biopsy.phantom import tissue
from biopsy.phantom.slides import plan_painter
from biopsy.slide_io.stain import find_nuclei, separate_stains


def draw_discs(mpp, places_um, *, side_um=100.0, radius_um=3.0, amount=0.6):
    """Haematoxylin of round nuclei, drawn four times finer and averaged."""
    px, fine = round(side_um / mpp), 4
    image = np.zeros((px * fine, px * fine), np.float32)
    for x, y in places_um:
        centre = tuple(round(value / mpp * fine) for value in (x, y))
        cv2.circle(image, centre, round(radius_um / mpp * fine), amount, -1)
    return 0.1 + cv2.resize(image, (px, px), interpolation=cv2.INTER_AREA)


@pytest.mark.parametrize("mpp", [0.25, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("n", [0, 1, 16])
def test_discs_that_stand_apart_are_all_found_where_they_are(mpp, n):
    grid = [(12.5 + 25 * (i % 4), 12.5 + 25 * (i // 4)) for i in range(16)][:n]
    found = find_nuclei(draw_discs(mpp, grid), mpp)
    assert found.shape == (n, 2)
    for x, y in grid:
        assert np.abs((found + 0.5) * mpp - (x, y)).max(axis=1).min() <= 1.5 * mpp


def test_only_blobs_are_counted():
    assert len(find_nuclei(np.full((40, 40), 0.7), 0.5)) == 0, "evenly dark"
    ramp = np.tile(np.linspace(0, 1, 40), (40, 1))
    assert len(find_nuclei(ramp, 0.5)) == 0
    assert len(find_nuclei(draw_discs(0.5, [(50, 50)], radius_um=20), 0.5)) == 0, "a gland is no nucleus"
    assert len(find_nuclei(draw_discs(0.5, [(50, 50)], amount=0.02), 0.5)) == 0, "too faint"


def test_mirrored_patches_have_the_same_nuclei():
    image = draw_discs(1.0, np.random.default_rng(0).uniform(5, 95, (40, 2)))
    n = len(find_nuclei(image, 1.0))
    assert 20 < n <= 40
    assert abs(len(find_nuclei(image[::-1, ::-1], 1.0)) - n) <= 1


@pytest.mark.parametrize(("mpp", "px", "least"), [(1.0, 64, 0.8), (4.0, 40, 0.6)])
def test_phantom_patches_with_more_nuclei_have_higher_counts(monkeypatch, mpp, px, least):
    """Over 120 patches of six patients: .90 at 1 µm/px, .80 at 4; here those of one region of one."""
    stamped = []
    stamp = tissue.stamp_nuclei

    def spy(shape, origin_um, um, nuclei):
        stamped.append(nuclei[:, :2])
        return stamp(shape, origin_um, um, nuclei)

    monkeypatch.setattr(tissue, "stamp_nuclei", spy)
    painter = plan_painter(3, "a", tissue_mm2=2.0, tumour_frac=0.4)
    left, n = round(1000 / mpp) - px, 5
    region = separate_stains(painter.paint(left, left, n * px, n * px, mpp))[..., 0]
    known = np.unique(np.concatenate(stamped).round(2), axis=0) / mpp - left
    cells = [(x, y) for x in range(0, n * px, px) for y in range(0, n * px, px)]
    truth = [((known >= cell) & (known < np.add(cell, px))).all(axis=1).sum() for cell in cells]
    counts = [len(find_nuclei(region[y : y + px, x : x + px], mpp)) for x, y in cells]
    assert sum(counts) < sum(truth), "overlapping nuclei count as one"
    assert spearmanr(truth, counts).statistic > least
