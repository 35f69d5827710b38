"""Regions: polygons that hold exactly the cells they were made of."""

import dataclasses

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from biopsy.data.packs import Pack
from biopsy.slides import sources
from biopsy.slides.grids import PatchGrid
from biopsy.slides.maps import ABSTAINED, SlideMap, find_regions, outline
from biopsy.slides.sources import list_slides, stitch_slide
from slide_maps import make_map

RING = np.pad(np.full((3, 3), 0.9), 1, constant_values=0.1)
RING[2, 2] = 0.2


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_every_cell_lies_in_one_region_of_its_class_and_areas_agree(n_rows, n_columns, seed):
    rng = np.random.default_rng(seed)
    cells = rng.random((n_rows, n_columns))
    cells[rng.random(cells.shape) < 0.2] = np.nan
    cells[0, 0] = 0.7
    slide_map = make_map(cells, abstained=rng.random(cells.shape) < 0.1)
    regions, pred = find_regions(slide_map), slide_map.cells_pred()
    side, mm2 = slide_map.cell_px, slide_map.cell_mm2
    names = {0: "normal", 1: "tumour", -2: ABSTAINED}
    for index, name in names.items():
        own = [region for region in regions if region.class_name == name]
        assert len(own) == ndimage.label(pred == index)[1]
        whole = shapely.union_all([region.polygon for region in own])
        assert whole.area == pytest.approx((pred == index).sum() * side**2)
        assert sum(region.area_mm2 for region in own) == pytest.approx((pred == index).sum() * mm2)
        for row, column in np.ndindex(pred.shape):
            middle = shapely.Point((column + 0.5) * side, (row + 0.5) * side)
            assert whole.contains(middle) == (pred[row, column] == index)
    for region in regions:
        assert region.polygon.is_valid and region.polygon.area == pytest.approx(region.n_cells * side**2)


def test_a_ring_has_a_hole_and_its_numbers():
    ring, core = (region for region in find_regions(make_map(RING)) if region.n_cells in (8, 1))
    assert (ring.class_name, core.class_name) == ("tumour", "normal") or ring.n_cells == 1
    ring = next(region for region in find_regions(make_map(RING)) if region.class_name == "tumour")
    assert len(ring.polygon.interiors) == 1 and ring.n_cells == 8
    assert ring.polygon.bounds == (20, 20, 80, 80)
    assert ring.area_mm2 == pytest.approx(8 * 0.01**2)
    assert (ring.mean_prob, ring.max_prob) == (pytest.approx(0.9), pytest.approx(0.9))


def test_the_probability_of_a_region_is_that_of_its_class_and_of_abstention_that_of_the_positive_class():
    slide_map = make_map(np.array([[0.9, 0.1, 0.4]]))
    slide_map = dataclasses.replace(slide_map, abstained=np.array([False, False, True]))
    found = {region.class_name: region.mean_prob for region in find_regions(slide_map)}
    assert found == {
        name: pytest.approx(p) for name, p in (("tumour", 0.9), ("normal", 0.9), (ABSTAINED, 0.4))
    }


def test_cells_that_touch_at_a_corner_are_two_regions():
    found = find_regions(make_map(np.array([[0.9, 0.1], [0.1, 0.8]])))
    assert [(region.class_name, region.n_cells) for region in found] == [
        ("normal", 1),
        ("normal", 1),
        ("tumour", 1),
        ("tumour", 1),
    ]


def test_straight_edges_have_no_corners_between():
    assert len(outline(np.ones((5, 9), bool), 3, 2).exterior.coords) == 5


def test_a_slide_stitched_from_a_pack_has_its_pixels_and_places(make_pack):
    pack = make_pack(n_patients=2, patches_per_patient=9, patch_px=50)
    for name, index in list_slides(pack).items():
        grid, picture = stitch_slide(pack, name, index)
        table = pack.table.iloc[index]
        assert (grid.scale, grid.slide_mpp, grid.patch_px) == (1.0, 4.0, 50)
        np.testing.assert_array_equal(grid.x, table["x"])
        np.testing.assert_array_equal(grid.y, table["y"])
        assert picture.shape == (grid.height, grid.width, 3)
        for row, x, y in zip(index, table["x"], table["y"], strict=True):
            np.testing.assert_array_equal(picture[y : y + 50, x : x + 50], pack.patches[row])


def test_patches_that_begin_away_from_the_corner_of_the_slide_keep_their_places(tmp_path, monkeypatch):
    patches = np.random.default_rng(0).integers(0, 256, (3, 50, 50, 3), dtype=np.uint8)
    x, y = np.array([101, 151, 101]), np.array([301, 301, 351])
    places = {"slide_id": ["a"] * 3, "x": x, "y": y}
    pack = Pack.from_arrays(patches, [0, 1, 1], ["p"] * 3, mpp=4.0, columns=places, out=tmp_path / "a.pack")
    grid, picture = stitch_slide(pack, "a", np.arange(3))
    assert (grid.column.tolist(), grid.row.tolist()) == ([0, 1, 0], [0, 0, 1])
    assert (grid.x.tolist(), grid.y.tolist()) == (x.tolist(), y.tolist())
    assert picture.shape == (401, 201, 3) and (picture[:301] == 255).all() and (picture[:, :101] == 255).all()
    np.testing.assert_array_equal(picture[351:401, 101:151], patches[2])
    monkeypatch.setattr(sources, "THUMBNAIL_PX", 100)
    _, small = stitch_slide(pack, "a", np.arange(3))
    assert small.shape == (100, 50, 3)
    is_white = (small == 255).all(2)
    assert is_white[:75].all() and is_white[:, :25].all() and not is_white[76:87, 26:].any()


def test_regions_of_a_stitched_slide_lie_where_its_patches_lie():
    grid = PatchGrid(np.array([0, 1]), np.array([0, 0]), 50, 50, 1.0, 4.0, 400, 300, (101, 201))
    probs = np.array([[0.1, 0.9], [0.2, 0.8]], np.float32)
    slide_map = SlideMap("a", grid, probs, np.zeros(2, bool), ["no", "yes"], "yes", 0.5)
    (region,) = find_regions(slide_map)
    assert region.polygon.bounds == (101, 201, 201, 251)
