"""Grids of patches over the tissue of a slide."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from biopsy.core.errors import SlideError
from biopsy.slide_io.coverage import share_of_mask
from biopsy.slide_io.tissue import MIN_TISSUE_FRAC

_READ_PX = 6_000_000  # pixels of the file per block: 24 MB in OpenSlide
_CELLS_AT_ONCE = 2**22  # grid positions checked for tissue at once: 0.1 GB
_READ_PATCHES = 4096  # patches per block, a limit for overlapping patches
_READ_ROWS = 512  # rows of the file per block: wide blocks make use of OpenSlide's tile cache

BlockRange = tuple[int, int]
"""The number of the first block of a strip, and that after its last."""


@dataclass(frozen=True)
class PatchGrid:
    """Patches on a grid that starts at the corner of a slide.

    "Patch pixels" are pixels at the resolution of the classifier.

    Attributes:
        column: Column of each patch in strides, int ``(n,)``.
        row: Row of each patch in strides.
        patch_px: Side of a patch in patch pixels.
        stride_px: Stride in patch pixels; divides ``patch_px``.
        scale: Level-0 pixels per patch pixel.
        slide_mpp: Pixel size at level 0 in µm.
        width: Width of the slide at level 0.
        height: Height of the slide at level 0.
        origin_px: Position of column 0 and row 0 in patch pixels.
        corner: Corner of the scanned bounds at level 0, the origin of coordinates in QuPath.
    """

    column: np.ndarray
    row: np.ndarray
    patch_px: int
    stride_px: int
    scale: float
    slide_mpp: float
    width: int
    height: int
    origin_px: tuple[int, int] = (0, 0)
    corner: tuple[int, int] = (0, 0)

    def __len__(self) -> int:
        return len(self.column)

    @property
    def mpp(self) -> float:
        """Pixel size of the patches in µm, within 1 % of the classifier's."""
        return self.scale * self.slide_mpp

    @property
    def x_px(self) -> np.ndarray:
        """Left edge of each patch in patch pixels."""
        return self.origin_px[0] + self.column * self.stride_px

    @property
    def y_px(self) -> np.ndarray:
        """Upper edge of each patch in patch pixels."""
        return self.origin_px[1] + self.row * self.stride_px

    @property
    def x(self) -> np.ndarray:
        """Left edge of each patch at level 0, int64 ``(n,)``."""
        return np.round(self.x_px * self.scale).astype(np.int64)

    @property
    def y(self) -> np.ndarray:
        """Upper edge of each patch at level 0, int64 ``(n,)``."""
        return np.round(self.y_px * self.scale).astype(np.int64)

    @property
    def steps(self) -> int:
        """Number of strides per patch side: 1 without overlap."""
        return self.patch_px // self.stride_px

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of rows and columns of the cells covered by patches; the side of a cell is one stride."""
        return int(self.row.max()) + self.steps, int(self.column.max()) + self.steps

    @property
    def cell_um(self) -> float:
        """Side of a cell in micrometres."""
        return self.stride_px * self.mpp


@dataclass(frozen=True)
class Block:
    """Patches read from the file as one image.

    Attributes:
        index: Indices of the patches in the grid, int ``(n,)``.
        x: Left edge of the block at level 0, with fractions of a pixel.
        y: Upper edge at level 0.
        width_px: Width in patch pixels.
        height_px: Height in patch pixels.
        left: Left edge of each patch in the block, int ``(n,)``.
        top: Upper edge of each patch in the block.
    """

    index: np.ndarray
    x: float
    y: float
    width_px: int
    height_px: int
    left: np.ndarray
    top: np.ndarray

    def cut(self, image: np.ndarray, patch_px: int) -> np.ndarray:
        """Return patches ``(n, patch_px, patch_px, 3)`` of the image of the block."""
        patches = np.empty((len(self.index), patch_px, patch_px, 3), np.uint8)
        for patch, left, top in zip(patches, self.left, self.top, strict=True):
            patch[:] = image[top : top + patch_px, left : left + patch_px]
        return patches


def pick_stride(patch_px: int, mpp: float, stride_um: float | None) -> int:
    """Return the stride in pixels at ``mpp`` (default: ``patch_px``).

    A stride must divide the side of a patch, so that every cell is covered by the same number of patches and
    areas are exact.

    Example:
        >>> pick_stride(50, 4.0, 100.0)
        25
    """
    if stride_um is None:
        return patch_px
    possible = [step for step in range(1, patch_px + 1) if patch_px % step == 0]
    for step in possible:
        if abs(step * mpp - stride_um) < 1e-6 * mpp + 1e-3:
            return step
    near = sorted(possible, key=lambda step: abs(step * mpp - stride_um))[:3]
    raise SlideError(
        f"stride_um={stride_um:g} does not divide a patch of {patch_px * mpp:g} um into equal parts of whole "
        f"pixels; the closest are {', '.join(f'{step * mpp:g}' for step in sorted(near))} um"
    )


def lay_grid(
    tissue: np.ndarray,
    *,
    width: int,
    height: int,
    slide_mpp: float,
    scale: float,
    patch_px: int,
    stride_px: int | None = None,
    corner: tuple[int, int] = (0, 0),
) -> PatchGrid:
    """Return the grid of patches of a slide that are at least half tissue.

    Patches are wholly inside the slide; a margin of less than a patch at the right and lower edge is not
    mapped.

    Args:
        tissue: Tissue mask, bool ``(H, W)`` of the whole slide at any scale.
        scale: Level-0 pixels per patch pixel.
        corner: Corner of the scanned bounds at level 0.

    Raises:
        SlideError: If the slide is smaller than a patch, or no patch is half tissue.
    """
    stride_px = stride_px or patch_px
    n_columns = int((width / scale - patch_px + 1e-6) // stride_px) + 1
    n_rows = int((height / scale - patch_px + 1e-6) // stride_px) + 1
    patch_um = patch_px * scale * slide_mpp
    if n_columns < 1 or n_rows < 1:
        raise SlideError(
            f"the slide is {width * slide_mpp:.0f} x {height * slide_mpp:.0f} um, smaller than one patch of "
            f"{patch_um:.0f} um: check its mpp"
        )
    across, down = scale * tissue.shape[1] / width, scale * tissue.shape[0] / height
    left = np.arange(n_columns) * stride_px * across
    positions, max_fraction = [], 0.0
    n_at_once = max(1, _CELLS_AT_ONCE // n_columns)
    for first in range(0, n_rows, n_at_once):
        top = np.arange(first, min(n_rows, first + n_at_once)) * stride_px * down
        share = share_of_mask(tissue, left, top, patch_px * across, patch_px * down)
        positions.append(np.argwhere(share >= MIN_TISSUE_FRAC) + np.array([first, 0]))
        max_fraction = max(max_fraction, float(share.max()))
    row, column = np.concatenate(positions).T
    if not len(row):
        raise SlideError(
            f"none of {n_rows * n_columns:,} patches of {patch_um:.0f} um is half tissue; the maximum is "
            f"{max_fraction:.0%}"
        )
    return PatchGrid(column, row, patch_px, stride_px, scale, slide_mpp, width, height, corner=corner)


def cut_blocks(grid: PatchGrid, downsample: float) -> Iterator[Block]:
    """Yield the blocks in which the patches of a grid are read, row by row.

    Blocks have neighbouring patches, so that each tile is decoded once, and a few megapixels.

    Args:
        downsample: Side of a patch pixel in pixels of the level that is read.
    """
    rows_px = max(grid.patch_px, int(_READ_ROWS / downsample))
    columns_px = max(grid.patch_px, int(_READ_PX / downsample**2 / rows_px))
    n_rows = (rows_px - grid.patch_px) // grid.stride_px + 1
    n_columns = min((columns_px - grid.patch_px) // grid.stride_px + 1, max(1, _READ_PATCHES // n_rows))
    band, part = grid.row // n_rows, grid.column // n_columns
    order = np.lexsort((grid.column, grid.row, part, band))
    ends = np.flatnonzero(np.diff(band[order]) | np.diff(part[order])) + 1
    x_px, y_px = grid.x_px, grid.y_px
    for index in np.split(order, ends):
        left, top = x_px[index].min(), y_px[index].min()
        yield Block(
            index,
            float(left * grid.scale),
            float(top * grid.scale),
            int(x_px[index].max() - left) + grid.patch_px,
            int(y_px[index].max() - top) + grid.patch_px,
            x_px[index] - left,
            y_px[index] - top,
        )


def cut_strips(grid: PatchGrid, downsample: float, max_patches: int) -> list[BlockRange]:
    """Divide the blocks of a grid into strips of consecutive blocks with similar numbers of patches.

    Args:
        max_patches: Number of patches per strip, exceeded by less than a block.
    """
    n_strips = -(-len(grid) // max_patches)
    ends = np.cumsum([len(block.index) for block in cut_blocks(grid, downsample)])
    last = np.searchsorted(ends, len(grid) * np.arange(1, n_strips + 1) // n_strips)
    return list(pairwise([0, *(np.unique(last) + 1).tolist()]))
