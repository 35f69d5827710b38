"""Grids: where patches lie, and that reading them in pieces is the same as reading them one by one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from biopsy.core.errors import SlideError
from biopsy.slides.grids import PatchGrid, cut_blocks, cut_strips, lay_grid, pick_stride
from refusals import refuses


def lay(tissue, *, patch_px=10, stride_px=None, scale=2.0, size=(300, 200)):
    return lay_grid(
        tissue,
        width=size[0],
        height=size[1],
        slide_mpp=0.5,
        scale=scale,
        patch_px=patch_px,
        stride_px=stride_px,
    )


def test_a_slide_full_of_tissue_is_covered():
    grid = lay(np.ones((20, 30), bool))
    assert len(grid) == 15 * 10 and grid.shape == (10, 15)
    assert grid.x.tolist()[:3] == [0, 20, 40] and grid.y.max() + 20 == 200
    assert (grid.mpp, grid.cell_um, grid.steps) == (1.0, 10.0, 1)


def test_patches_lie_inside_the_slide():
    grid = lay(np.ones((20, 30), bool), size=(319, 219))
    assert grid.x.max() + 20 == 300 and grid.y.max() + 20 == 200


def test_a_grid_laid_by_rows_is_that_laid_at_once(monkeypatch):
    tissue = np.random.default_rng(0).random((20, 30)) < 0.5
    whole = lay(tissue, patch_px=10, stride_px=5)
    monkeypatch.setattr("biopsy.slides.grids._CELLS_AT_ONCE", 70)
    parts = lay(tissue, patch_px=10, stride_px=5)
    assert parts.row.tolist() == whole.row.tolist() and parts.column.tolist() == whole.column.tolist()


@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(0, 2**31),
    st.sampled_from([(10, 10), (10, 5), (7, 1)]),
    st.floats(0.7, 3.3),
)
@settings(max_examples=30, deadline=None)
def test_a_patch_stays_when_half_of_it_is_tissue(n_rows, n_columns, seed, sides, scale):
    tissue = np.random.default_rng(seed).random((n_rows, n_columns)) < 0.6
    width, height = 8 * n_columns, 8 * n_rows
    fine = np.kron(tissue, np.ones((80, 80)))  # ten samples a level-0 pixel
    kept = set()
    try:
        grid = lay(tissue, patch_px=sides[0], stride_px=sides[1], scale=scale, size=(width, height))
        kept = set(zip(grid.row.tolist(), grid.column.tolist(), strict=True))
    except SlideError as error:
        too_small = min(width, height) / scale < sides[0] - 1e-6
        assert ("smaller than one patch" if too_small else "half tissue") in str(error)
    side, step = sides[0] * scale, sides[1] * scale
    for row in range(int((height - side) // step) + 1 if height >= side else 0):
        for column in range(int((width - side) // step) + 1 if width >= side else 0):
            top, left = round(10 * row * step), round(10 * column * step)
            share = fine[top : top + round(10 * side), left : left + round(10 * side)].mean()
            if abs(share - 0.5) > 0.06:  # the samples round
                assert ((row, column) in kept) == (share > 0.5)


@given(
    st.sampled_from([(16, 16), (16, 8), (16, 4)]),
    st.sampled_from([1.0, 2.0, 8.0, 1.37]),
    st.integers(0, 2**31),
)
@settings(max_examples=20, deadline=None)
def test_every_patch_is_in_one_block_and_cut_as_if_read_alone(sides, downsample, seed):
    rng = np.random.default_rng(seed)
    row, column = np.nonzero(rng.random((30, 40)) < 0.3)
    grid = PatchGrid(column, row, *sides, 1.0, 1.0, 10_000, 10_000)
    image = rng.integers(0, 256, (30 * sides[1] + 16, 40 * sides[1] + 16, 3), dtype=np.uint8)
    seen = []
    for block in cut_blocks(grid, downsample):
        left, top = int(block.x), int(block.y)
        piece = image[top : top + block.height_px, left : left + block.width_px]
        patches = block.cut(piece, grid.patch_px)
        for patch, index in zip(patches, block.index, strict=True):
            x, y = grid.x[index], grid.y[index]
            assert np.array_equal(patch, image[y : y + sides[0], x : x + sides[0]])
        seen += block.index.tolist()
    assert sorted(seen) == list(range(len(grid)))


@pytest.mark.parametrize("downsample", [1.0, 4.0, 16.0])
@pytest.mark.parametrize("sides", [(50, 50), (50, 5)])
def test_a_block_is_bounded_whatever_the_slide(downsample, sides):
    row, column = np.divmod(np.arange(60_000), 600)
    grid = PatchGrid(column, row, *sides, downsample, 0.25, 10**6, 10**6)
    for block in cut_blocks(grid, downsample):
        assert block.width_px * block.height_px * downsample**2 <= 8_000_000
        assert len(block.index) <= 4096


@pytest.mark.parametrize("downsample", [1.0, 4.0, 16.0])
def test_a_slide_is_read_once_in_blocks_of_half_the_bound_or_more(downsample):
    row, column = np.divmod(np.arange(60_000), 600)
    grid = PatchGrid(column, row, 50, 50, downsample, 0.25, 10**6, 10**6)
    areas = [block.width_px * block.height_px * downsample**2 for block in cut_blocks(grid, downsample)]
    assert sum(areas) == 60_000 * 50**2 * downsample**2
    assert np.mean(areas) > 4_000_000


@given(st.integers(0, 2**31), st.sampled_from([1, 50, 700, 10**6]), st.sampled_from([8.0, 32.0]))
@settings(max_examples=20, deadline=None)
def test_every_block_is_in_one_strip_and_strips_are_similar(seed, max_patches, downsample):
    row, column = np.nonzero(np.random.default_rng(seed).random((60, 80)) < 0.5)
    grid = PatchGrid(column, row, 16, 16, 1.0, 1.0, 10_000, 10_000)
    n_patches = [len(block.index) for block in cut_blocks(grid, downsample)]
    strips = cut_strips(grid, downsample, max_patches)
    assert [number for strip in strips for number in range(*strip)] == list(range(len(n_patches)))
    sizes = [sum(n_patches[first:stop]) for first, stop in strips]
    n_strips = -(-len(grid) // max_patches)
    assert min(sizes) > 0 and max(sizes) < len(grid) / n_strips + max(n_patches) + 1
    assert len(strips) == n_strips or max(n_patches) > len(grid) / n_strips


def test_strides_cut_a_patch_into_equal_parts():
    assert pick_stride(50, 4.0, None) == 50
    assert [pick_stride(50, 4.0, um) for um in (200.0, 100, 40, 4)] == [50, 25, 10, 1]
    with refuses(SlideError, "stride_um=150", "200 um", "40, 100, 200 um"):
        pick_stride(50, 4.0, 150.0)


@pytest.mark.parametrize(
    ("tissue", "size", "facts"),
    [
        (np.zeros((20, 30), bool), (300, 200), ["150 patches", "10 um", "0%"]),
        (np.ones((2, 2), bool), (19, 200), ["10 x 100 um", "10 um", "mpp"]),
    ],
)
def test_what_has_no_patch_is_refused(tissue, size, facts):
    with refuses(SlideError, *facts):
        lay(tissue, size=size)
