"""Phantom slides as files: known mpp and outlines, one tissue at any resolution, cheap when mostly glass."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest
import shapely
from shapely.geometry import box, shape

from biopsy.core.errors import DataError
from biopsy.phantom.slides import make_phantom_slide, plan_painter
from biopsy.slide_io.reader import open_slide
from refusals import refuses

SIZE = {"width": 400, "height": 320, "mpp": 2.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("phantom")


@pytest.fixture(scope="module")
def truth(folder):
    return make_phantom_slide(folder / "case.tiff", seed=0, **SIZE, drawn_mpp=4.0, compression="deflate")


def test_slide_has_its_size_mpp_and_tissue(truth):
    with open_slide(truth.path) as slide:
        assert (slide.width, slide.height, slide.mpp, slide.mpp_source) == (400, 320, 2.0, "slide")
        image = slide.thumbnail(400)
    assert 0.2 < (image[..., 1] < 215).mean() < 0.8


def test_tumour_is_that_of_the_plan(truth):
    left, top, right, bottom = truth.sections[0]
    um = (right - left) * truth.mpp * (bottom - top) * truth.mpp
    assert 0.05 * um < truth.tumour.area * truth.mpp**2 < 0.4 * um
    assert truth.tumour.is_valid and truth.tumour.within(box(0, 0, 400, 320))


def test_outlines_agree_with_the_painters_mask(folder):
    slide = make_phantom_slide(
        folder / "b.tiff",
        seed=3,
        width=700,
        height=600,
        mpp=2.0,
        drawn_mpp=2.8,
        tissue_mm2=0.5,
        tumour_frac=0.4,
    )
    painter = plan_painter(3, "90001", tissue_mm2=0.5, tumour_frac=0.4)
    mask = painter.mask("tumour", 0, 0, *painter.size_px(2.0), 2.0)
    left, top, _, _ = slide.sections[0]
    assert slide.tumour.area == pytest.approx(mask.sum(), rel=0.01)
    rows, columns = np.nonzero(mask)
    rng = np.random.default_rng(0).integers(0, len(rows), 300)
    points = shapely.points(columns[rng] + left + 0.5, rows[rng] + top + 0.5)
    assert shapely.contains(slide.tumour.buffer(3), points).all()


def test_geojson_is_what_qupath_exports(truth):
    document = json.loads(truth.geojson.read_text(encoding="utf-8"))
    assert document["type"] == "FeatureCollection" and truth.geojson.name == "case.geojson"
    names = [feature["properties"]["classification"]["name"] for feature in document["features"]]
    assert set(names) == {"Tumor", "Region*"}
    for feature in document["features"]:
        assert feature["type"] == "Feature" and feature["properties"]["objectType"] == "annotation"
        ring = feature["geometry"]["coordinates"][0]
        assert ring[0] == ring[-1]
    tumour = [
        shape(f["geometry"]) for f, name in zip(document["features"], names, strict=True) if name == "Tumor"
    ]
    assert sum(part.area for part in tumour) == pytest.approx(truth.tumour.area)


def test_same_seed_same_bytes_and_another_differs(folder, truth):
    again = make_phantom_slide(
        folder / "again.tiff", seed=0, **SIZE, drawn_mpp=4.0, compression="deflate", workers=1
    )
    other = make_phantom_slide(folder / "other.tiff", seed=1, **SIZE, drawn_mpp=2.8)
    assert again.path.read_bytes() == truth.path.read_bytes()
    assert again.tumour.equals(truth.tumour) and not other.tumour.equals(truth.tumour)


def test_same_tissue_at_other_resolutions(folder, truth):
    with open_slide(truth.path) as slide:
        coarse = slide.read_at(0, 0, 200, 160, mpp=4.0).astype(int)
    for mpp in (1.0, 4.0):
        size = {"width": round(800 / mpp), "height": round(640 / mpp)}
        other = make_phantom_slide(
            folder / f"{mpp}.tiff", seed=0, **size, mpp=mpp, drawn_mpp=4.0, compression="deflate"
        )
        with open_slide(other.path) as slide:
            same = slide.read_at(0, 0, 200, 160, mpp=4.0).astype(int)
        assert np.abs(same - coarse).mean() < 4  # enlarging and averaging blur a little
        assert other.tumour.area * mpp**2 == pytest.approx(truth.tumour.area * 4, rel=0.01)
        again = shapely.affinity.scale(other.tumour, mpp / 2, mpp / 2, origin=(0, 0))
        assert again.symmetric_difference(truth.tumour).area < 0.02 * truth.tumour.area


def test_sections_repeat_and_the_rest_is_glass(folder):
    slide = make_phantom_slide(
        folder / "many.tiff",
        seed=0,
        width=2400,
        height=1600,
        mpp=2.0,
        tissue_mm2=0.3,
        n_sections=5,
        drawn_mpp=4.0,
        compression="deflate",
    )
    assert len(slide.sections) == 5
    assert all(
        not box(*a).intersects(box(*b)) for n, a in enumerate(slide.sections) for b in slide.sections[:n]
    )
    with open_slide(slide.path) as opened:
        parts = [
            opened.read(left, top, right - left, bottom - top) for left, top, right, bottom in slide.sections
        ]
        for part in parts[1:]:
            np.testing.assert_array_equal(part, parts[0])
        whole = opened.read(0, 0, 2400, 1600)
    for left, top, right, bottom in slide.sections:
        whole[top:bottom, left:right] = whole[0, 0]
    assert (whole == whole[0, 0]).all()
    areas = [slide.tumour.intersection(box(*section)).area for section in slide.sections]
    assert areas == pytest.approx([slide.tumour.area / 5] * 5)


def test_an_svs_has_the_metadata_of_aperio_files(folder):
    truth = make_phantom_slide(folder / "case.svs", seed=0, width=200, height=200, mpp=0.5, drawn_mpp=2.8)
    with open_slide(truth.path) as slide:
        assert (slide.format, slide.mpp, slide.objective) == ("aperio", 0.5, 20.0)


def test_refusals(folder):
    with refuses(DataError, "width", "height", "mpp", "n_sections"):
        make_phantom_slide(folder / "a.tiff", seed=0, width=0, height=10, mpp=1.0)
    with refuses(DataError, "2 sections", "800 x 640 um"):
        make_phantom_slide(folder / "a.tiff", seed=0, **SIZE, tissue_mm2=5.0, n_sections=2)


@pytest.mark.slow
def test_a_huge_slide_takes_little_memory_and_time(folder):
    path = folder / "huge.tiff"
    script = f"""
from pathlib import Path
from biopsy.phantom.slides import make_phantom_slide
truth = make_phantom_slide({str(path)!r}, seed=0, width=100_000, height=80_000, mpp=0.25, tissue_mm2=2.0,
                           n_sections=6, drawn_mpp=2.0, tile_px=512)
print(*truth.sections[-1])
print(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
"""
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert time.monotonic() - start < 180
    section, peak_kb = done.stdout.splitlines()
    assert int(peak_kb) < 2_000_000
    with open_slide(path) as slide:
        assert (slide.width, slide.height) == (100_000, 80_000)
        left, top, right, bottom = map(float, section.split())
        assert slide.read(int((left + right) / 2), int((top + bottom) / 2), 100, 100).std() > 5
