"""A classifier's answer drawn on a slide: probability or class over the tissue, with scale bar and legend."""

from collections.abc import Sequence

import cv2
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from biopsy.figures.slides import draw_colour_bar, draw_scale_bar
from biopsy.figures.style import (
    BASELINE,
    CLASS_COLOURS,
    INK,
    POSITIVE,
    PROBABILITY_MAP,
    RULE,
    shorten,
    styled,
)

WIDTH_IN, BOTTOM_IN, TOP_IN = 6.4, 0.78, 0.3
OPACITY = 0.55
HIGHEST_IN = 12.0
Extent = tuple[float, float, float, float]


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
    """Draw what a classifier says over the picture of a slide.

    Args:
        picture: The slide at low resolution, uint8 ``(H, W, 3)``.
        prob: Probability of the positive class by cell, ``(rows, columns)``, NaN where none was asked for;
            None, for more than two classes, draws the class instead.
        pred: Class by cell, ``(rows, columns)``; -1 where there is none, -2 where the classifier abstained.
        extent: Left, right, bottom and top of the cells in pixels of the picture.
        um_per_px: Micrometres in a pixel of the picture.
        class_names: Names by class index.
        positive: Index of the positive class, whose regions are outlined.
        threshold: Marked on the colour bar.
        title: Written above.
    """
    height_px, width_px = picture.shape[:2]
    width_in = min(WIDTH_IN, HIGHEST_IN * width_px / height_px)
    map_in = width_in * height_px / width_px
    height_in = map_in + BOTTOM_IN + TOP_IN
    figure = Figure(figsize=(width_in, height_in))
    axes = figure.add_axes((0.01, BOTTOM_IN / height_in, 0.98, map_in / height_in))
    grey = cv2.cvtColor(np.ascontiguousarray(picture), cv2.COLOR_RGB2GRAY)  # colour is the map's alone
    axes.imshow(
        cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB),
        extent=(0, width_px, height_px, 0),
        interpolation="antialiased",
    )
    image = _colour(prob, pred, class_names)
    axes.imshow(image, extent=extent, interpolation="none")
    if positive is not None:
        _draw_outlines(axes, pred == positive, extent)
    axes.set(xlim=(0, width_px), ylim=(height_px, 0), xticks=[], yticks=[], aspect="equal")
    axes.grid(False)
    axes.spines[:].set(visible=True, color=RULE)
    axes.set_title(shorten(title, 60))
    draw_scale_bar(axes, width_px, height_px, um_per_px)
    marks = _list_marks(class_names, pred, prob is not None, positive)
    if prob is not None:
        bar = figure.add_axes((0.36, 0.38 / height_in, 0.3, 0.09 / height_in))
        draw_colour_bar(bar, threshold)
        bar.set_xlabel(f"probability of {shorten(class_names[positive or 0])}", fontsize=8, labelpad=1)
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
    """Draw the outline of the tissue mask ``(H, W)`` on a slide's picture ``(H, W, 3)``, pixel for pixel."""
    contours, _ = cv2.findContours(tissue.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    colour = [round(255 * value) for value in to_rgb(CLASS_COLOURS[2])]
    width = max(1, round(max(picture.shape[:2]) / 800))
    return cv2.drawContours(np.ascontiguousarray(picture).copy(), contours, -1, colour, width)


def colour_probs(prob: np.ndarray, pred: np.ndarray) -> np.ndarray:
    """Give a probability map's colours, uint8 ``(rows, columns, 3)``; grey abstained, white has no patch."""
    image = matplotlib.colormaps[PROBABILITY_MAP](np.nan_to_num(prob))[..., :3]
    image[pred == -2] = to_rgb(BASELINE)
    image[pred == -1] = 1.0
    return (255 * image).round().astype(np.uint8)


def colour_classes(pred: np.ndarray, n_classes: int) -> np.ndarray:
    """Give the classes' colours, uint8 ``(rows, columns, 3)``; grey abstained, white has no patch."""
    colours = [to_rgb(CLASS_COLOURS[index % len(CLASS_COLOURS)]) for index in range(n_classes)]
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
            Line2D([], [], color=POSITIVE, linewidth=1.4, label=f"called {shorten(class_names[positive])}")
        )
    elif not has_bar:
        marks += [
            _square(CLASS_COLOURS[index % len(CLASS_COLOURS)], shorten(name))
            for index, name in enumerate(class_names)
        ]
    if (pred == -2).any():
        marks.append(_square(BASELINE, "abstained"))
    return marks


def _square(colour: str, label: str) -> Line2D:
    return Line2D(
        [], [], marker="s", linestyle="", markersize=6, color=colour, label=label, markeredgecolor=INK
    )
