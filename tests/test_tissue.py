"""The tissue mask: what is kept, what is left out, the same twice, and masks drawn by hand."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from biopsy.core.errors import SlideError
from biopsy.phantom.slides import make_slide as draw_phantom
from biopsy.slide_io.reader import open_slide
from biopsy.slide_io.tissue import find_tissue
from refusals import refuses

REFERENCE = Path(__file__).parent / "reference" / "tissue.json"
GLASS = (243, 242, 243)
PINK = (226, 165, 196)


def draw(glass=GLASS, tissue=PINK, *, size=320, radius=90, seed=0):
    """Draw a disc of tissue on glass at 8 um/px, blurred and noisy, and its exact mask."""
    image = np.full((size, size, 3), glass, np.uint8)
    mask = np.zeros((size, size), np.uint8)
    if radius:
        cv2.circle(image, (size // 2, size // 2), radius, tissue, -1)
        cv2.circle(mask, (size // 2, size // 2), radius, 1, -1)
    return image, mask.astype(bool), np.random.default_rng(seed)


def finish(image, rng):
    blurred = cv2.GaussianBlur(image, (0, 0), 1.2)
    return np.clip(blurred + rng.integers(-3, 4, image.shape), 0, 255).astype(np.uint8)


def overlap(a, b):
    return (a & b).sum() / (a | b).sum()


@pytest.mark.parametrize(
    "tissue",
    [PINK, (150, 110, 170), (235, 205, 220), (120, 40, 80)],
    ids=["pink", "violet", "pale", "folded"],
)
@pytest.mark.parametrize(
    "glass", [GLASS, (255, 255, 255), (236, 232, 236), (240, 238, 228), (222, 221, 223)], ids=str
)
def test_tissue_of_any_stain_on_any_glass(glass, tissue):
    image, mask, rng = draw(glass, tissue)
    assert overlap(find_tissue(finish(image, rng), mpp=8.0), mask) > 0.93


@pytest.mark.parametrize(
    "ink",
    [
        (40, 60, 160),
        (30, 120, 70),
        (20, 20, 25),
        (190, 30, 40),
        (60, 160, 170),
        (120, 170, 230),
        (90, 90, 92),
    ],
    ids=["blue", "green", "black", "red", "teal", "pale blue", "pencil"],
)
def test_pen_marks_vanish(ink):
    image, mask, rng = draw()
    cv2.line(image, (10, 290), (310, 270), ink, 14)
    cv2.line(image, (25, 10), (25, 310), ink, 9)
    found = find_tissue(finish(image, rng), mpp=8.0)
    assert overlap(found, mask) > 0.93
    assert not found[:, :40].any()


@pytest.mark.parametrize("what", ["black border", "scanner bars", "dark corner"])
def test_bars_and_borders_vanish(what):
    image, mask, rng = draw()
    if what == "black border":
        image[:, :40] = 0
        image[290:] = 0
    elif what == "scanner bars":
        image[:18], image[18:22], image[300:] = (150, 152, 149), (60, 62, 60), (110, 112, 108)
    else:
        shade = np.linspace(0.4, 1, 320)[None, :, None]
        image[:60] = (image[:60] * shade).astype(np.uint8)
        image[:60], mask[:60] = np.minimum(image[:60], (243 * shade).astype(np.uint8)), False
    assert overlap(find_tissue(finish(image, rng), mpp=8.0), mask) > 0.92


@pytest.mark.parametrize("width", [6, 20])
def test_a_mark_across_tissue_is_left_out_of_it(width):
    """Also one of 48 um, which closing runs over."""
    image, _, rng = draw()
    cv2.rectangle(image, (160 - width // 2, 0), (160 + width // 2, 319), (30, 120, 70), -1)
    found = find_tissue(finish(image, rng), mpp=8.0)
    assert not found[100:220, 158:163].any() and found[100:220, 100:140].all()


def test_specks_and_wide_tears_are_left_out_and_gaps_closed():
    image, _, rng = draw()
    cv2.circle(image, (20, 20), 4, PINK, -1)  # 0.003 mm2
    cv2.circle(image, (130, 160), 3, GLASS, -1)  # 50 um across, as a fat cell
    cv2.circle(image, (200, 160), 14, GLASS, -1)  # 220 um
    found = find_tissue(finish(image, rng), mpp=8.0)
    assert not found[:40, :40].any()
    assert found[160, 130] and not found[160, 200]


def test_fat_does_not_vanish():
    """A phantom patient rich in fat, drawn at 4 um/px: the share of its tissue that is found."""
    slide = draw_phantom(2, "90002", tissue_mm2=0.6, tumour_frac=0.1)
    density = -np.log10((slide.image.astype(float) + 1) / 256)
    pale = cv2.GaussianBlur(density[..., 1], (0, 0), 3) < 0.12  # more lumen than wall
    fat = pale & (cv2.erode(slide.tissue.astype(np.uint8), np.ones((13, 13))) > 0)
    assert fat.sum() > 0.15 * slide.tissue.sum()
    found = find_tissue(slide.image, mpp=4.0)
    assert found[fat].mean() > 0.95
    assert overlap(found, slide.tissue) > 0.85


def test_same_twice_and_at_other_resolutions():
    image, _, rng = draw()
    fine = cv2.resize(finish(image, rng), None, fx=4, fy=4, interpolation=cv2.INTER_CUBIC)
    first = find_tissue(fine, mpp=2.0)
    assert first.shape == fine.shape[:2] and first.dtype == bool
    np.testing.assert_array_equal(first, find_tissue(fine.copy(), mpp=2.0))
    for by in (2, 4, 8, 16):
        coarse = cv2.resize(fine, None, fx=1 / by, fy=1 / by, interpolation=cv2.INTER_AREA)
        found = find_tissue(coarse, mpp=2.0 * by).astype(np.uint8)
        size = first.shape[::-1]
        again = cv2.resize(found, size, interpolation=cv2.INTER_NEAREST).astype(bool)
        assert overlap(first, again) > 0.9, by


@pytest.mark.parametrize("glass", [GLASS, (255, 255, 255), (0, 0, 0), (40, 60, 160)], ids=str)
def test_a_slide_without_tissue_is_an_error(glass):
    image, _, rng = draw(glass, radius=0)
    with refuses(SlideError, "tissue"):
        find_tissue(finish(image, rng), mpp=8.0)


def test_too_coarse_a_picture_is_refused():
    for mpp in (100, 0, float("nan")):
        with refuses(SlideError, mpp):
            find_tissue(draw()[0], mpp=mpp)


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("CMU-1-Small-Region.svs", 0.88),
        ("tcga-cr-7395-01a-01-ts1.svs", 0.94),
        ("idc_stitched_unlabelled_2001x1551.png", 0.93),
    ],
)
def test_masks_drawn_by_hand(data_dir, name, least):
    drawn = json.loads(REFERENCE.read_text(encoding="utf-8"))[name]
    with open_slide(data_dir / "wsi" / name, mpp=drawn["mpp"]) as slide:
        image = slide.overview(mpp=8.0)
        scale = image.shape[1] / slide.width
    mask = np.zeros(image.shape[:2], np.uint8)
    for outer, *holes in drawn["polygons"]:
        cv2.fillPoly(mask, [np.rint(np.array(outer) * scale).astype(np.int32)], 1)
        cv2.fillPoly(mask, [np.rint(np.array(hole) * scale).astype(np.int32) for hole in holes], 0)
    assert overlap(find_tissue(image, mpp=8.0), mask.astype(bool)) > least
