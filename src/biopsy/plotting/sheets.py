"""Sheets of patches: a look at each class."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from biopsy.core.errors import DataError
from biopsy.plotting.style import WIDTH_IN, styled


def lay_out_sheet(
    patches: Sequence[np.ndarray], *, columns: int = 8, gap_px: int = 3, background: int = 255
) -> np.ndarray:
    """Put patches side by side, row by row, at their own size.

    Args:
        patches: Images ``(h, w, 3)`` uint8; a smaller one stands at the upper left of its cell.
        columns: Patches in a row.
        gap_px: Space between cells.
        background: Grey level of gaps and empty cells.

    Returns:
        One image ``(H, W, 3)`` uint8.

    Raises:
        DataError: If there is no patch.
    """
    if not len(patches):
        raise DataError("a sheet of patches needs one patch at least")
    height = max(patch.shape[0] for patch in patches)
    width = max(patch.shape[1] for patch in patches)
    columns = min(columns, len(patches))
    rows = -(-len(patches) // columns)
    shape = (rows * (height + gap_px) - gap_px, columns * (width + gap_px) - gap_px, 3)
    sheet = np.full(shape, background, np.uint8)
    for index, patch in enumerate(patches):
        row, column = divmod(index, columns)
        y, x = row * (height + gap_px), column * (width + gap_px)
        sheet[y : y + patch.shape[0], x : x + patch.shape[1]] = patch
    return sheet


@styled
def draw_class_sheet(sheets: Sequence[tuple[str, Sequence[np.ndarray]]], *, columns: int = 8) -> Figure:
    """Draw some patches of every class under the class's name.

    Args:
        sheets: ``(title, patches)`` a class; a class without patches is named and left empty.
        columns: Patches in a row.

    Raises:
        DataError: If no class has a patch.
    """
    if not any(len(patches) for _, patches in sheets):
        raise DataError("no class has a patch to show")
    images = [lay_out_sheet(patches, columns=columns) if len(patches) else None for _, patches in sheets]
    widest = max(image.shape[1] for image in images if image is not None)
    heights = [0.1 if image is None else WIDTH_IN * image.shape[0] / widest for image in images]
    figure = Figure(figsize=(WIDTH_IN, sum(heights) + 0.32 * len(sheets)), layout="constrained")
    panels = figure.subplots(len(sheets), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (title, _), image in zip(panels, sheets, images, strict=True):
        axes.set_title(title)
        axes.set_axis_off()
        if image is not None:
            axes.imshow(image, interpolation="none")
            axes.set_xlim(-0.5, widest - 0.5)
    return figure
