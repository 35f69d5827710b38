"""Sheets of patches, and saliency maps superimposed on them.

Maps are composited over grey tissue. The colour maps are perceptually uniform with monotonic lightness
(inferno, Smith and van der Walt 2015; for signed maps cividis, Nunez et al. 2018, with grey at 0), so that
they can be read with colour vision deficiencies and in grey print.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from biopsy.core.errors import DataError
from biopsy.plotting.style import INK, MUTED, WIDTH_IN, shorten, styled

COLOURS, SIGNED_COLOURS = "inferno", "cividis"
ALPHA = 0.65  # of the map over the tissue
HEAD_IN, LABEL_IN, FOOT_IN, GAP = 0.22, 0.2, 0.42, 0.06  # of a sheet; the gap is a fraction of a cell
CONSTANT = 1 / 255  # smallest visible difference of a scaled map
FULL_SCALE = 99.0  # percentile of a map with the last colour, robust to outliers
PICTURE_PX = 288  # height to which the image of a patch is enlarged, about
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


@dataclass(frozen=True)
class Overlay:
    """One row of a sheet.

    Attributes:
        label: Text above the row: true class, probability, id.
        patch: uint8 ``(H, W, 3)``.
        maps: float ``(n_maps, H, W)`` in 0-1, those with a sign from -1.
    """

    label: str
    patch: np.ndarray
    maps: np.ndarray


def scale_maps(maps: np.ndarray, *, axis: tuple[int, ...] | None = None, signed: bool = False) -> np.ndarray:
    """Scale maps to 0-1: negative values become 0, the 99th percentile becomes 1.

    Args:
        maps: Array of any shape.
        axis: Axes that share a scale (default: all).
        signed: Whether to keep negative values: the result is in [-1, 1].
    """
    values = np.asarray(maps if signed else np.clip(maps, 0, None), float)
    size = np.abs(values)
    upper = np.percentile(size, FULL_SCALE, axis=axis, keepdims=True)
    upper = np.where(upper > 0, upper, size.max(axis=axis, keepdims=True))  # sparse map
    return np.clip(np.divide(values, upper, out=np.zeros_like(values), where=upper > 0), -1, 1)


def is_constant(values: np.ndarray) -> bool:
    """Return whether a scaled map is constant."""
    return float(np.ptp(values)) < CONSTANT


def superimpose(
    patch: np.ndarray, values: np.ndarray, *, alpha: float = ALPHA, signed: bool = False
) -> np.ndarray:
    """Composite a map over a grey patch.

    Args:
        patch: uint8 ``(H, W, 3)`` RGB.
        values: The map, 0-1, ``(H, W)``; one with a sign from -1.
        alpha: 0 shows only the tissue, 1 only the map.

    Returns:
        uint8 ``(H, W, 3)``.

    Raises:
        DataError: If the map is not of the patch's size.
    """
    if values.shape != patch.shape[:2]:
        raise DataError(f"a map of {values.shape} does not fit a patch of {patch.shape[:2]} px")
    grey = (patch @ np.array(_LUMA))[..., None] / 255
    shares = (np.clip(values, -1, 1) + 1) / 2 if signed else np.clip(values, 0, 1)
    colours = matplotlib.colormaps[SIGNED_COLOURS if signed else COLOURS](shares)[..., :3]
    return np.rint(255 * (alpha * colours + (1 - alpha) * grey)).astype(np.uint8)


@styled
def draw_overlays(
    rows: Sequence[Overlay], titles: Sequence[str], signed: Sequence[bool] | None = None
) -> Figure:
    """Draw a sheet of patches with their maps superimposed.

    Args:
        rows: Rows, each with one map per title.
        signed: Whether each map is signed (default: none).

    Raises:
        DataError: If there are no rows, or titles and maps do not match.
    """
    if not rows or any(len(row.maps) != len(titles) for row in rows):
        raise DataError(f"{len(rows)} rows do not have {len(titles)} maps each")
    signed = [False] * len(titles) if signed is None else list(signed)
    n_columns = 1 + len(titles)
    cell = WIDTH_IN / max(n_columns, 4)
    height = HEAD_IN + (cell + LABEL_IN) * len(rows) + FOOT_IN
    figure = Figure(figsize=(cell * n_columns, height))
    figure.suppressComposite = True  # separate images in SVG
    # a single pair of axes in inches, much faster than one per image
    sheet = figure.add_axes((0, 0, 1, 1), xlim=(0, cell * n_columns), ylim=(0, height))
    sheet.set_axis_off()

    for index, row in enumerate(rows):
        bottom = height - HEAD_IN - (index + 1) * (cell + LABEL_IN)
        shown = [row.patch]
        shown += [
            superimpose(row.patch, item, signed=is_signed)
            for item, is_signed in zip(row.maps, signed, strict=True)
        ]
        for column, (image, title) in enumerate(zip(shown, ["patch", *titles], strict=True)):
            left, top = column * cell, bottom + cell * (1 - GAP)
            inch = cell * (1 - GAP) / max(image.shape[:2])
            extent = (left, left + image.shape[1] * inch, top - image.shape[0] * inch, top)
            sheet.imshow(image, interpolation="none", extent=extent, aspect="auto")
            if column and is_constant(row.maps[column - 1]):
                middle = (extent[0] + extent[1]) / 2, (extent[2] + extent[3]) / 2
                box = {"fc": INK, "ec": "none", "pad": 1.5}
                sheet.text(
                    *middle, "constant", ha="center", va="center", fontsize=7.5, color="white", bbox=box
                )
            if index == 0:
                y = (height - 0.6 * HEAD_IN) / height
                title = shorten(title, 20)
                size_pt = 8 * min(1.0, 14 / len(title))
                figure.text(column / n_columns, y, title, fontsize=size_pt, color=MUTED)
        figure.text(0, (bottom + cell + 0.03) / height, row.label, fontsize=8, color=INK)
    kinds = sorted(set(signed))
    for index, has_sign in enumerate(kinds):
        width = min(2.0, n_columns / len(kinds) - (0.3 if len(kinds) > 1 else 0))
        bar = figure.add_axes((index / len(kinds), 0.27 / height, width / n_columns, 0.07 / height))
        _draw_bar(figure, bar, signed=has_sign)
    return figure


def _draw_bar(figure: Figure, axes: Axes, *, signed: bool) -> None:
    """Draw the colour bar below a sheet."""
    lowest, colours = (-1, SIGNED_COLOURS) if signed else (0, COLOURS)
    scale = ScalarMappable(Normalize(lowest, 1), matplotlib.colormaps[colours])
    bar = figure.colorbar(scale, cax=axes, orientation="horizontal")
    bar.set_ticks([lowest, 1], labels=["against", "for the class"] if signed else ["none", "most"])
    first, last = bar.ax.get_xticklabels()
    first.set_horizontalalignment("left")
    last.set_horizontalalignment("right")
    bar.outline.set_visible(False)


def enlarge(images: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return images enlarged alike without interpolation, the first to about `PICTURE_PX`."""
    times = max(1, PICTURE_PX // max(images[0].shape[:2]))
    return [image.repeat(times, axis=0).repeat(times, axis=1) for image in images]


def lay_out_sheet(patches: Sequence[np.ndarray], *, columns: int = 8, gap_px: int = 3) -> np.ndarray:
    """Return an image of patches in a grid, without resizing.

    Args:
        patches: Images ``(h, w, 3)`` uint8; smaller ones are at the upper left of their cell.

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
    sheet = np.full(shape, 255, np.uint8)
    for index, patch in enumerate(patches):
        row, column = divmod(index, columns)
        y, x = row * (height + gap_px), column * (width + gap_px)
        sheet[y : y + patch.shape[0], x : x + patch.shape[1]] = patch
    return sheet


@styled
def draw_class_sheet(sheets: Sequence[tuple[str, Sequence[np.ndarray]]]) -> Figure:
    """Draw patches of every class.

    Args:
        sheets: ``(title, patches)`` of each class; patches may be empty.

    Raises:
        DataError: If no class has a patch.
    """
    if not any(len(patches) for _, patches in sheets):
        raise DataError("no class has a patch to show")
    images = [lay_out_sheet(patches) if len(patches) else None for _, patches in sheets]
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
