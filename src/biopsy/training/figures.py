"""Figures of a training: learning curves and a diagram of the network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from biopsy.core.errors import MetricError, RecipeError
from biopsy.plotting.style import (
    BASELINE,
    INK,
    MUTED,
    RULE,
    TRAIN,
    VALIDATION,
    WASH,
    WIDTH_IN,
    legend_above,
    shorten,
    styled,
)

QUANTITIES: dict[str, tuple[tuple[tuple[str, str], ...], str]] = {
    "loss": ((("loss", "training"), ("val_loss", "validation")), "loss"),
    "accuracy": ((("accuracy", "training"), ("val_accuracy", "validation")), "accuracy"),
    "auroc": ((("auroc", "training"), ("val_auroc", "validation")), "AUROC"),
    "lr": ((("lr", "learning rate"),), "learning rate"),
}


@styled
def draw_training(
    records: Sequence[Mapping[str, object]],
    *,
    chosen_epoch: int | None = None,
    quantities: Sequence[str] = ("loss", "accuracy"),
) -> Figure:
    """Draw learning curves from the training log.

    Args:
        records: One mapping an epoch, with ``epoch`` and any of ``loss val_loss accuracy val_accuracy auroc
            val_auroc lr``.
        chosen_epoch: The epoch whose weights were kept, marked with a line.
        quantities: Panels, from ``loss accuracy auroc lr``, side by side.

    Raises:
        MetricError: If there is no record, or a quantity is unknown.
    """
    if not records:
        raise MetricError("no epoch is in the training log: train for one epoch at least", "empty")
    unknown = [name for name in quantities if name not in QUANTITIES]
    if unknown:
        raise MetricError(f"unknown quantity {unknown[0]!r}; known: {', '.join(QUANTITIES)}", "name")
    figure = Figure(figsize=(WIDTH_IN * len(quantities), 3.1), layout="constrained")
    panels = figure.subplots(1, len(quantities), squeeze=False)[0]
    for axes, quantity in zip(panels, quantities, strict=True):
        _draw_quantity(axes, records, quantity, chosen_epoch)
    return figure


def _draw_quantity(
    axes: Axes, records: Sequence[Mapping[str, object]], quantity: str, chosen_epoch: int | None
) -> None:
    series, ylabel = QUANTITIES[quantity]
    n_epochs = len({record["epoch"] for record in records})
    marker = "o" if n_epochs < 8 else None
    for (key, label), colour in zip(series, (TRAIN, VALIDATION), strict=False):
        points = [(record["epoch"], record[key]) for record in records if record.get(key) is not None]
        if points:
            epochs, values = np.array(points, dtype=float).T
            axes.plot(epochs, values, color=colour, label=label, marker=marker, markersize=4)
    if chosen_epoch is not None:
        axes.axvline(
            chosen_epoch,
            color=BASELINE,
            linewidth=1,
            linestyle=(0, (2, 2)),
            label=f"selected epoch {chosen_epoch}",
        )
    if quantity == "lr" and any(record.get("lr") for record in records):  # a logistic regression has none
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5), numticks=8))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="epoch", ylabel=ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    legend_above(axes)


Row = tuple[str, str, tuple[int, ...], int]
LINE_IN = 0.185
MAX_LINES = 60  # a longer network is drawn by blocks, without its layers


@dataclass(frozen=True)
class Block:
    """A block of layers with a title."""

    title: str
    rows: tuple[Row, ...]

    @property
    def output_shape(self) -> tuple[int, ...]:
        return self.rows[-1][2]

    @property
    def parameters(self) -> int:
        return sum(row[3] for row in self.rows)


def group_layers(rows: Sequence[Row]) -> list[Block]:
    """Group layers into blocks.

    The part of a layer's name before its first dot names the block (with the number after it, as in
    ``blocks.2.conv``); where all names begin alike, a block ends at a pooling and where the shape goes flat.

    Args:
        rows: ``(name, type, output_shape, parameters)`` a layer, in order; shapes without the batch.
    """
    if len({name.partition(".")[0] for name, *_ in rows if "." in name}) > 1:
        return [
            Block(title, tuple(part)) for title, part in groupby(rows, key=lambda row: _name_block(row[0]))
        ]
    parts: list[list[Row]] = [[]]
    for row in rows:
        flat_before = bool(parts[-1]) and len(parts[-1][-1][2]) == 1
        opens_head = len(row[2]) == 1 and bool(parts[-1]) and not flat_before
        pooled = any("pool" in kind.lower() for _, kind, *_ in parts[-1])
        if opens_head or (pooled and not flat_before and "drop" not in row[1].lower()):
            parts.append([])
        parts[-1].append(row)
    n_stages = sum(len(part[-1][2]) > 1 for part in parts)
    titles = [f"stage {index + 1}" if index < n_stages else "head" for index in range(len(parts))]
    return [Block(title, tuple(part)) for title, part in zip(titles, parts, strict=True)]


def _name_block(name: str) -> str:
    first, second, *others = [*name.split("."), ""]
    return f"{first}.{second}" if second.isdigit() and any(others) else first


@styled
def draw_network(rows: Sequence[Row], *, input_shape: tuple[int, ...]) -> Figure:
    """Draw the layers of a network from top to bottom, with output shapes and parameters.

    Args:
        rows: ``(name, type, output_shape, parameters)`` a layer, in order; shapes without the batch.
        input_shape: What goes in, such as ``(3, 48, 48)``.

    Raises:
        RecipeError: If there is no layer.
    """
    if not rows:
        raise RecipeError("the network has no layer to draw", "network")
    blocks = group_layers(rows)
    in_full = len(rows) <= MAX_LINES
    lines = [[_describe(row) for row in block.rows] if in_full else [] for block in blocks]
    height = 0.45 + sum(0.62 + LINE_IN * len(part) for part in lines)
    figure = Figure(figsize=(WIDTH_IN, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH_IN), ylim=(height, 0))
    axes.set_axis_off()
    y = 0.16
    axes.text(
        WIDTH_IN / 2, y, f"input  {_shape(input_shape)}", ha="center", va="center", color=INK, fontsize=8.5
    )
    for block, part in zip(blocks, lines, strict=True):
        y = _draw_block(axes, block, part, y + 0.1)
    return figure


def _draw_block(axes: Axes, block: Block, lines: list[tuple[str, str, str]], top: float) -> float:
    """Draw one block whose arrow starts at ``top``; return the position of its output text."""
    box_top = top + 0.12
    box_height = 0.28 + LINE_IN * len(lines)
    axes.annotate(
        "",
        (WIDTH_IN / 2, box_top),
        (WIDTH_IN / 2, top),
        arrowprops={
            "arrowstyle": "-|>",
            "color": MUTED,
            "linewidth": 0.9,
            "shrinkA": 0,
            "shrinkB": 0,
            "mutation_scale": 7,
        },
    )
    axes.add_patch(
        FancyBboxPatch(
            (0.15, box_top),
            WIDTH_IN - 0.3,
            box_height,
            boxstyle="round,pad=0,rounding_size=0.06",
            fc=WASH,
            ec=RULE,
            linewidth=0.8,
        )
    )
    axes.text(0.27, box_top + 0.15, shorten(block.title, 30), va="center", fontsize=9, color=INK)
    axes.text(WIDTH_IN - 0.27, box_top + 0.15, f"{block.parameters:,}", va="center", ha="right", fontsize=9)
    for index, (kind, shape, count) in enumerate(lines):
        y = box_top + 0.15 + LINE_IN * (index + 1)
        axes.text(0.27, y, kind, va="center", fontsize=8.2)
        axes.text(2.55, y, shape, va="center", fontsize=8.2, color=MUTED)
        axes.text(WIDTH_IN - 0.27, y, count, va="center", ha="right", fontsize=8.2, color=MUTED)
    bottom = box_top + box_height
    axes.text(WIDTH_IN / 2, bottom + 0.12, _shape(block.output_shape), ha="center", va="center", fontsize=8.5)
    return bottom + 0.12


def _describe(row: Row) -> tuple[str, str, str]:
    _, kind, output_shape, parameters = row
    return shorten(kind, 28), _shape(output_shape), f"{parameters:,}" if parameters else "-"


def _shape(shape: tuple[int, ...]) -> str:
    return " \u00d7 ".join(str(size) for size in shape)
