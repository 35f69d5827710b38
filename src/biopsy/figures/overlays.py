"""Maps superimposed on tissue: what a classifier looks at, over the patch in grey, beside the patch itself.

The map is put over the tissue by alpha compositing. Its colours are perceptually uniform and grow steadily
lighter (inferno, by Smith and van der Walt 2015), so that their order is seen by readers of every common
colour vision and survives a grey print; the tissue beneath is grey and has a third of the contrast.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from biopsy.errors import DataError
from biopsy.figures.style import INK, MUTED, WIDTH_IN, shorten, styled

COLOURS = "inferno"
ALPHA = 0.65  # of the map over the tissue
HEAD_IN, LABEL_IN, FOOT_IN, GAP = 0.22, 0.2, 0.42, 0.06  # of a sheet; the gap is a share of a cell
FULL_SCALE = 99.0  # percentile of a map that gets the last colour: a few pixels must not darken all others
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


@dataclass(frozen=True)
class Overlay:
    """One row of a sheet.

    Attributes:
        label: Lines above it: true class, probability, id.
        patch: uint8 ``(H, W, 3)``.
        maps: float ``(n_maps, H, W)`` in 0-1.
    """

    label: str
    patch: np.ndarray
    maps: np.ndarray


def scale_maps(maps: np.ndarray, *, axis: tuple[int, ...] | None = None) -> np.ndarray:
    """Bring maps to 0-1: 0 stays 0, what is below becomes 0, the 99th percentile becomes 1.

    Args:
        maps: Any shape.
        axis: Over which axes maps share a scale; None scales all alike.
    """
    raised = np.clip(maps, 0, None)
    full = np.percentile(raised, FULL_SCALE, axis=axis, keepdims=True)
    highest = raised.max(axis=axis, keepdims=True)
    full = np.where(full > 0, full, highest)  # a map that is 0 nearly everywhere
    return np.clip(np.divide(raised, full, out=np.zeros_like(raised, float), where=full > 0), 0, 1)


def superimpose(patch: np.ndarray, values: np.ndarray, *, alpha: float = ALPHA) -> np.ndarray:
    """Put a map over a patch in grey.

    Args:
        patch: uint8 ``(H, W, 3)`` RGB.
        values: The map, 0-1, ``(H, W)``.
        alpha: 0 shows only the tissue, 1 only the map.

    Returns:
        uint8 ``(H, W, 3)``.

    Raises:
        DataError: If the map is not of the patch's size.
    """
    if values.shape != patch.shape[:2]:
        raise DataError(f"a map of {values.shape} cannot lie on a patch of {patch.shape[:2]} px")
    grey = (patch @ np.array(_LUMA))[..., None] / 255
    colours = matplotlib.colormaps[COLOURS](np.clip(values, 0, 1))[..., :3]
    return np.rint(255 * (alpha * colours + (1 - alpha) * grey)).astype(np.uint8)


@styled
def draw_overlays(rows: Sequence[Overlay], titles: Sequence[str]) -> Figure:
    """Draw a sheet: each patch, and beside it its maps superimposed.

    Args:
        rows: What is shown, all with as many maps as there are titles.
        titles: One a map, above its column.

    Raises:
        DataError: If there is no row, or not a title for each map.
    """
    if not rows or any(len(row.maps) != len(titles) for row in rows):
        raise DataError(f"{len(rows)} rows do not have {len(titles)} maps each")
    n_columns = 1 + len(titles)
    cell = WIDTH_IN / max(n_columns, 4)
    height = HEAD_IN + (cell + LABEL_IN) * len(rows) + FOOT_IN
    figure = Figure(figsize=(cell * n_columns, height))

    def place(column: float, y_in: float, width: float, height_in: float) -> Axes:
        return figure.add_axes((column / n_columns, y_in / height, width / n_columns, height_in / height))

    for index, row in enumerate(rows):
        bottom = height - HEAD_IN - (index + 1) * (cell + LABEL_IN)
        shown = [row.patch, *(superimpose(row.patch, values) for values in row.maps)]
        for column, (image, title) in enumerate(zip(shown, ["patch", *titles], strict=True)):
            axes = place(column, bottom, 1 - GAP, cell * (1 - GAP))
            axes.imshow(image, interpolation="none")
            axes.set_anchor("NW")
            axes.set_axis_off()
            if index == 0:
                y = (height - 0.6 * HEAD_IN) / height
                figure.text(column / n_columns, y, shorten(title, 14), fontsize=8, color=MUTED)
        figure.text(0, (bottom + cell + 0.03) / height, row.label, fontsize=8, color=INK)
    bar = figure.colorbar(
        ScalarMappable(Normalize(0, 1), matplotlib.colormaps[COLOURS]),
        cax=place(0, 0.27, min(2, n_columns), 0.07),
        orientation="horizontal",
    )
    bar.set_ticks([0, 1], labels=["none", "most"])
    none, most = bar.ax.get_xticklabels()
    none.set_horizontalalignment("left")
    most.set_horizontalalignment("right")
    bar.outline.set_visible(False)
    return figure
