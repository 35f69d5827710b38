"""Where the patches of a slide lie: a grid in the classifier's own pixels, kept where there is tissue."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from biopsy.core.errors import SlideError
from biopsy.slide_io.coverage import share_of_mask
from biopsy.slide_io.tissue import MIN_TISSUE_FRAC

_READ_PX = 6_000_000  # pixels of the file read at once: 24 MB as OpenSlide gives them
_CELLS_AT_ONCE = 2**22  # of the grid, while patches with tissue are sought: 0.1 GB
_READ_PATCHES = 4096  # with overlap a piece holds many more patches than fit side by side
_READ_ROWS = 512  # rows of the file in one reading: low and wide, so that a row of tiles stays in its cache


@dataclass(frozen=True)
class PatchGrid:
    """Patches on a grid that starts at a slide's corner.

    Attributes:
        column: Place of each patch in steps from the left, int ``(n,)``.
        row: Place of each patch in steps from the top.
        patch_px: Side of a patch, in the pixels that the classifier sees.
        stride_px: Step of the grid; divides ``patch_px``.
        scale: Level-0 pixels in such a pixel.
        slide_mpp: Micrometres per pixel of the slide's level 0.
        width: Of the slide at level 0.
        height: Of the slide at level 0.
        origin_px: Where column 0 and row 0 lie, in pixels that the classifier sees.
        corner: Where what was scanned begins at level 0: QuPath counts from there.
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
        """Micrometres per pixel of a patch: the classifier's, or within 1 % of it."""
        return self.scale * self.slide_mpp

    @property
    def x_px(self) -> np.ndarray:
        """Left edge of each patch in pixels that the classifier sees."""
        return self.origin_px[0] + self.column * self.stride_px

    @property
    def y_px(self) -> np.ndarray:
        """Upper edge of each patch in pixels that the classifier sees."""
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
        """How many steps of the grid a patch's side spans: 1 without overlap."""
        return self.patch_px // self.stride_px

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the cells that the patches cover, a cell being one step a side."""
        return int(self.row.max()) + self.steps, int(self.column.max()) + self.steps

    @property
    def cell_um(self) -> float:
        """Side of a cell in micrometres."""
        return self.stride_px * self.mpp


@dataclass(frozen=True)
class Block:
    """Patches read from the file in one piece.

    Attributes:
        index: Which patches of the grid, int ``(n,)``.
        x: Left edge of the piece at level 0, with its fraction of a pixel.
        y: Upper edge at level 0.
        width_px: Width in pixels that the classifier sees.
        height_px: Height.
        left: Left edge of each patch within the piece, int ``(n,)``.
        top: Upper edge of each patch within the piece.
    """

    index: np.ndarray
    x: float
    y: float
    width_px: int
    height_px: int
    left: np.ndarray
    top: np.ndarray

    def cut(self, image: np.ndarray, patch_px: int, part: slice = slice(None)) -> np.ndarray:
        """Cut patches ``(n, patch_px, patch_px, 3)`` out of the piece ``(height_px, width_px, 3)``."""
        patches = np.empty((len(self.index[part]), patch_px, patch_px, 3), np.uint8)
        for patch, left, top in zip(patches, self.left[part], self.top[part], strict=True):
            patch[:] = image[top : top + patch_px, left : left + patch_px]
        return patches


def pick_stride(patch_px: int, mpp: float, stride_um: float | None) -> int:
    """Return the step of a grid in pixels of ``mpp``; None steps by whole patches.

    A step cuts the side of a patch into equal parts of whole pixels, so that every cell of the map is
    covered by the same number of patches and areas are exact.

    Raises:
        SlideError: If it does not, naming the steps on both sides that do.

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
        f"stride_um={stride_um:g} does not cut a patch of {patch_px * mpp:g} um into equal parts of whole "
        f"pixels; near it are {', '.join(f'{step * mpp:g}' for step in sorted(near))} um"
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
    """Lay a grid over a slide and keep the patches of which at least half is tissue.

    Patches lie wholly inside the slide: what is left at its right and lower edge, less than a patch, is not
    mapped.

    Args:
        tissue: Where tissue is, bool ``(H, W)`` over the whole slide at any scale.
        width: Of the slide at level 0.
        height: Of the slide at level 0.
        slide_mpp: Micrometres per pixel of level 0.
        scale: Level-0 pixels in a pixel that the classifier sees.
        patch_px: Side of a patch in pixels that the classifier sees.
        stride_px: Step in the same pixels; by default a whole patch.
        corner: Where what was scanned begins at level 0.

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
    kept, fullest = [], 0.0
    n_at_once = max(1, _CELLS_AT_ONCE // n_columns)
    for first in range(0, n_rows, n_at_once):
        top = np.arange(first, min(n_rows, first + n_at_once)) * stride_px * down
        share = share_of_mask(tissue, left, top, patch_px * across, patch_px * down)
        kept.append(np.argwhere(share >= MIN_TISSUE_FRAC) + np.array([first, 0]))
        fullest = max(fullest, float(share.max()))
    row, column = np.concatenate(kept).T
    if not len(row):
        raise SlideError(
            f"none of {n_rows * n_columns:,} patches of {patch_um:.0f} um is half tissue; the fullest holds "
            f"{fullest:.0%}"
        )
    return PatchGrid(column, row, patch_px, stride_px, scale, slide_mpp, width, height, corner=corner)


def cut_blocks(grid: PatchGrid, downsample: float) -> Iterator[Block]:
    """Return the pieces in which a grid's patches are read, row by row.

    Patches of a piece lie close together, so that each tile of the file is decoded once and then cut; a piece
    is read no larger than a few megapixels, whatever the slide's size.

    Args:
        downsample: Side of a pixel that the classifier sees, in pixels of the level that is read.
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
