"""Figures of slides: annotations, predictions and errors, and overlays of maps on tissue."""

import math
from collections.abc import Sequence

import cv2
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from biopsy.core.errors import DataError
from biopsy.plotting.style import (
    BASELINE,
    FALSE_NEGATIVE,
    FALSE_POSITIVE,
    INK,
    MUTED,
    POSITIVE,
    PROBABILITY_MAP,
    RULE,
    TISSUE,
    annotate,
    class_colour,
    shorten,
    styled,
)

PANELS = ("tissue", "target", "prob")
ALL_PANELS = (*PANELS, "error")
PANEL_IN, TOP_IN, BOTTOM_IN, GAP_IN = 3.1, 0.26, 0.46, 0.14
Extent = tuple[float, float, float, float]


@styled
def draw_slide(
    tissue: np.ndarray,
    target: np.ndarray,
    prob: np.ndarray,
    *,
    um_per_cell: float | None = None,
    class_names: Sequence[str] = ("negative", "positive"),
    threshold: float | None = None,
    panels: Sequence[str] = PANELS,
) -> Figure:
    """Draw tissue, annotated class, probability and errors of one slide in panels.

    Args:
        tissue: The reassembled image ``(H, W, 3)`` uint8, any scale.
        target: Annotated class by cell, shape ``(rows, columns)``, NaN without a patch.
        prob: Probability by cell, same shape, NaN without a patch.
        um_per_cell: Side of a cell in µm, for the scale bar; None for no scale bar.
        threshold: Decision threshold, marked on the colour bar.
        panels: Any of ``tissue target prob error``; errors need a threshold (.5 if None).

    Raises:
        DataError: If the two grids differ in shape, or a panel is unknown.
    """
    target, prob = np.asarray(target, dtype=float), np.asarray(prob, dtype=float)
    if target.shape != prob.shape:
        raise DataError(
            f"the grid of targets is {target.shape}, that of probabilities {prob.shape}: they must be equal"
        )
    unknown = [panel for panel in panels if panel not in ALL_PANELS]
    if unknown:
        raise DataError(f"unknown panel {unknown[0]!r}; known: {', '.join(ALL_PANELS)}")
    rows, columns = target.shape
    map_in = PANEL_IN * rows / columns
    height, width = map_in + TOP_IN + BOTTOM_IN, (PANEL_IN + GAP_IN) * len(panels) - GAP_IN
    figure = Figure(figsize=(width, height))
    extent = (0.0, float(columns), float(rows), 0.0)
    for index, panel in enumerate(panels):  # explicit positions, so that separate figures align
        left = index * (PANEL_IN + GAP_IN)
        axes = figure.add_axes((left / width, BOTTOM_IN / height, PANEL_IN / width, map_in / height))
        _frame(axes)
        if panel == "tissue":
            axes.set_title("tissue")
            axes.imshow(tissue, extent=extent, interpolation="none")
            if um_per_cell is not None:
                draw_scale_bar(axes, columns, rows, um_per_cell)
        elif panel == "target":
            axes.set_title("annotated")
            _draw_classes(axes, target, class_names, extent)
        elif panel == "error":
            axes.set_title("errors")
            _draw_errors(axes, target, prob, 0.5 if threshold is None else threshold, extent)
        else:
            axes.set_title(f"probability of {shorten(class_names[-1])}")
            axes.imshow(
                matplotlib.colormaps[PROBABILITY_MAP](np.ma.masked_invalid(prob)),
                extent=extent,
                interpolation="none",
            )
            bar = ((left + 0.1) / width, 0.22 / height, (PANEL_IN - 0.2) / width, 0.09 / height)
            draw_colour_bar(figure.add_axes(bar), threshold)
    return figure


def _frame(axes: Axes) -> None:
    axes.set(xticks=[], yticks=[], aspect="equal")
    axes.grid(False)
    axes.spines[:].set(visible=True, color=RULE)


def round_length_um(span_um: float) -> float:
    """Return the largest of 1, 2, 5 times a power of ten that is at most a quarter of ``span_um``.

    Example:
        >>> round_length_um(9000.0)
        2000.0
    """
    power = 10.0 ** math.floor(math.log10(span_um / 4))
    return max(step * power for step in (1.0, 2.0, 5.0) if step * power <= span_um / 4)


def draw_scale_bar(axes: Axes, columns: int, rows: int, um_per_cell: float) -> None:
    """Draw a scale bar of round length below the lower left corner of a picture of width ``columns``."""
    length_um = round_length_um(columns * um_per_cell)
    cells = length_um / um_per_cell
    text = f"{length_um / 1000:g} mm" if length_um >= 1000 else f"{length_um:g} µm"
    axes.plot([0, cells], [rows, rows], color=INK, linewidth=3, solid_capstyle="butt", clip_on=False)
    annotate(axes, text, (cells / 2, rows), (0, -4), color=INK, fontsize=8.5, ha="center", va="top")


def _draw_classes(axes: Axes, target: np.ndarray, class_names: Sequence[str], extent: Extent) -> None:
    colours = [class_colour(index) for index in range(len(class_names))]
    cells = [np.round(target) == index for index in range(len(class_names))]
    _draw_cells(axes, cells, colours, [shorten(name, 14) for name in class_names], extent)


def _draw_errors(axes: Axes, target: np.ndarray, prob: np.ndarray, threshold: float, extent: Extent) -> None:
    """Draw false negatives, false positives and, in grey, true positives and negatives."""
    y_pred, is_known = prob >= threshold, np.isfinite(prob) & np.isfinite(target)
    kinds = [(1, ~y_pred), (0, y_pred), (1, y_pred), (0, ~y_pred)]
    cells = [is_known & (target == truth) & chosen for truth, chosen in kinds]
    names = ["false negative", "false positive", "true positive", "true negative"]
    _draw_cells(axes, cells, [FALSE_NEGATIVE, FALSE_POSITIVE, MUTED, RULE], names, extent)


def _draw_cells(
    axes: Axes, cells: Sequence[np.ndarray], colours: Sequence[str], names: Sequence[str], extent: Extent
) -> None:
    """Draw each mask of cells in its colour, with a legend."""
    image = np.full((*cells[0].shape, 4), (1.0, 1.0, 1.0, 0.0))
    for mask, colour in zip(cells, colours, strict=True):
        image[mask] = (*to_rgb(colour), 1.0)
    axes.imshow(image, extent=extent, interpolation="none")
    axes.legend(
        handles=[_square(colour, name, edge=colour) for colour, name in zip(colours, names, strict=True)],
        loc="upper center",
        bbox_to_anchor=(0.5, -0.01),
        ncols=2 if len(names) == 4 else min(len(names), 3),
        columnspacing=1.0,
        handletextpad=0.2,
    )


def draw_colour_bar(axes: Axes, threshold: float | None) -> None:
    """Draw the colour bar of probabilities with the threshold."""
    axes.imshow(
        np.linspace(0, 1, 256)[None],
        cmap=PROBABILITY_MAP,
        extent=(0, 1, 0, 1),
        aspect="auto",
        interpolation="none",
    )
    axes.set(xlim=(0, 1), ylim=(0, 1), yticks=[], xticks=[0, 0.5, 1], xticklabels=["0", "0.5", "1"])
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, pad=2, labelsize=8)
    if threshold is not None and 0 <= threshold <= 1:
        axes.axvline(threshold, color="white", linewidth=1.4)
        annotate(axes, "threshold", (threshold, 1), (0, 2), color=INK, fontsize=7.5, ha="center")


WIDTH_IN, BOTTOM_IN_MAPS, TOP_IN_MAPS = 6.4, 0.78, 0.3
OPACITY = 0.55
MAX_HEIGHT_IN = 12.0


@styled
def draw_overlay(
    picture: np.ndarray,
    prob: np.ndarray | None,
    pred: np.ndarray,
    extent: Extent,
    *,
    um_per_px: float,
    class_names: Sequence[str],
    positive: int | None = None,
    threshold: float | None = None,
    title: str = "",
) -> Figure:
    """Draw predictions over the picture of a slide.

    Args:
        picture: Thumbnail of the slide, uint8 ``(H, W, 3)``.
        prob: Probability of the positive class by cell, ``(rows, columns)``, NaN without a patch; None to
            draw the predicted class instead (more than two classes).
        pred: Class by cell, ``(rows, columns)``; -1 without a patch, -2 abstained.
        extent: Left, right, bottom and top of the cells in pixels of the picture.
        um_per_px: Pixel size of the picture in µm.
        positive: Index of the positive class, whose regions are outlined.
    """
    height_px, width_px = picture.shape[:2]
    width_in = min(WIDTH_IN, MAX_HEIGHT_IN * width_px / height_px)
    map_in = width_in * height_px / width_px
    height_in = map_in + BOTTOM_IN_MAPS + TOP_IN_MAPS
    figure = Figure(figsize=(width_in, height_in))
    axes = figure.add_axes((0.01, BOTTOM_IN_MAPS / height_in, 0.98, map_in / height_in))
    grey = cv2.cvtColor(np.ascontiguousarray(picture), cv2.COLOR_RGB2GRAY)  # colours are of the map only
    axes.imshow(
        cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB),
        extent=(0, width_px, height_px, 0),
        interpolation="antialiased",
    )
    image = _colour(prob, pred, class_names)
    axes.imshow(image, extent=extent, interpolation="none")
    if positive is not None:
        _draw_outlines(axes, pred == positive, extent)
    axes.set(xlim=(0, width_px), ylim=(height_px, 0))
    _frame(axes)
    axes.set_title(shorten(title, 60))
    draw_scale_bar(axes, width_px, height_px, um_per_px)
    marks = _list_marks(class_names, pred, prob is not None, positive)
    if prob is not None:
        bar = figure.add_axes((0.36, 0.38 / height_in, 0.3, 0.09 / height_in))
        draw_colour_bar(bar, threshold)
        bar.set_xlabel(f"Probability of {shorten(class_names[positive or 0])}", fontsize=8, labelpad=1)
    if marks:
        figure.legend(
            handles=marks,
            loc="lower right",
            bbox_to_anchor=(0.995, 0.16 / height_in),
            ncols=1 if prob is not None else min(len(marks), 4),
            fontsize=8,
        )
    return figure


def outline_tissue(picture: np.ndarray, tissue: np.ndarray) -> np.ndarray:
    """Return the picture ``(H, W, 3)`` of a slide with the outline of the tissue mask ``(H, W)``."""
    contours, _ = cv2.findContours(tissue.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    colour = [round(255 * value) for value in to_rgb(TISSUE)]
    width = max(1, round(max(picture.shape[:2]) / 800))
    return cv2.drawContours(np.ascontiguousarray(picture).copy(), contours, -1, colour, width)


def colour_probs(prob: np.ndarray, pred: np.ndarray) -> np.ndarray:
    """Return colours of probabilities, uint8 ``(rows, columns, 3)``; grey: abstained, white: no patch."""
    image = matplotlib.colormaps[PROBABILITY_MAP](np.nan_to_num(prob))[..., :3]
    image[pred == -2] = to_rgb(BASELINE)
    image[pred == -1] = 1.0
    return (255 * image).round().astype(np.uint8)


def colour_classes(pred: np.ndarray, n_classes: int) -> np.ndarray:
    """Return colours of classes, uint8 ``(rows, columns, 3)``; grey: abstained, white: no patch."""
    colours = [to_rgb(class_colour(index)) for index in range(n_classes)]
    palette = np.array([*colours, to_rgb(BASELINE), (1.0, 1.0, 1.0)])  # the last two are -2 and -1
    return (255 * palette[pred]).round().astype(np.uint8)


def _colour(prob: np.ndarray | None, pred: np.ndarray, class_names: Sequence[str]) -> np.ndarray:
    rgb = colour_classes(pred, len(class_names)) if prob is None else colour_probs(prob, pred)
    opacity = np.where(pred == -1, 0.0, OPACITY)[..., None]
    return np.concatenate([rgb / 255, opacity], axis=2)


def _draw_outlines(axes: Axes, mask: np.ndarray, extent: Extent) -> None:
    """Draw the edges between cells inside and outside a mask."""
    left, right, bottom, top = extent
    across, down = (right - left) / mask.shape[1], (bottom - top) / mask.shape[0]
    padded = np.pad(mask, 1).astype(np.int8)
    row, column = np.nonzero(np.diff(padded, axis=1)[1:-1])
    upright = np.stack([[column, row], [column, row + 1]])
    row, column = np.nonzero(np.diff(padded, axis=0)[:, 1:-1])
    level = np.stack([[column, row], [column + 1, row]])
    edges = np.concatenate([upright, level], axis=2).astype(float)
    x, y = np.concatenate([edges, np.full_like(edges[:1], np.nan)]).transpose(1, 2, 0).reshape(2, -1)
    axes.add_line(Line2D(left + x * across, top + y * down, color=POSITIVE, linewidth=0.9))


def _list_marks(
    class_names: Sequence[str], pred: np.ndarray, has_bar: bool, positive: int | None
) -> list[Line2D]:
    marks = []
    if has_bar and positive is not None:
        marks.append(
            Line2D([], [], color=POSITIVE, linewidth=1.4, label=f"predicted {shorten(class_names[positive])}")
        )
    elif not has_bar:
        marks += [_square(class_colour(index), shorten(name)) for index, name in enumerate(class_names)]
    if (pred == -2).any():
        marks.append(_square(BASELINE, "abstained"))
    return marks


def _square(colour: str, label: str, edge: str = INK) -> Line2D:
    return Line2D(
        [], [], color=colour, label=label, marker="s", linestyle="", markersize=6, markeredgecolor=edge
    )
