"""Figures of studies: folds and seeds, reproductions, sweeps."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from biopsy.core.errors import MetricError
from biopsy.plotting.style import (
    BASELINE,
    INK,
    MODEL,
    MUTED,
    PROBABILITY_MAP,
    RULE,
    SERIES_COLOURS,
    TEST,
    VALIDATION,
    WIDTH_IN,
    legend_above,
    new_figure,
    shorten,
    styled,
)


@styled
def draw_folds(
    folds: Sequence[object],
    values: np.ndarray,
    *,
    metric: str = "AUROC",
    baseline: Mapping[object, float] | None = None,
) -> Figure:
    """Draw a metric of every run: one row per fold, one dot per seed, a bar for the mean.

    Args:
        folds: The fold of each run, shape ``(n_runs,)``; rows keep the order of first appearance.
        values: The metric of each run, shape ``(n_runs,)``; NaN is left out.
        baseline: Value of the colour-only baseline by fold, drawn as a grey diamond.

    Raises:
        MetricError: If the numbers of folds and values differ.
    """
    values = np.asarray(values, dtype=float)
    if len(folds) != len(values) or not len(values):
        raise MetricError(f"{len(folds)} folds have {len(values)} values; expected one per run")
    names = list(dict.fromkeys(folds))
    figure, axes = new_figure(WIDTH_IN, 1.2 + 0.36 * max(len(names), 2))
    seen = values[np.isfinite(values)].tolist()
    for row, name in enumerate(names):
        part = np.array([value for fold, value in zip(folds, values, strict=True) if fold == name])
        part = np.sort(part[np.isfinite(part)])
        spread = 0.09 * (np.arange(len(part)) % 3 - 1) if len(part) > 1 else np.zeros(len(part))
        axes.plot(
            part,
            row + spread,
            "o",
            color=MODEL,
            markersize=6,
            alpha=0.75,
            markeredgewidth=0,
            label="one seed" if row == 0 else None,
        )
        if len(part):
            axes.plot(
                [part.mean()] * 2,
                [row - 0.26, row + 0.26],
                color=INK,
                linewidth=1.8,
                label="mean of seeds" if row == 0 else None,
            )
    if baseline:
        baselines = [
            (baseline[name], row) for row, name in enumerate(names) if np.isfinite(baseline.get(name, np.nan))
        ]
        seen += [value for value, _ in baselines]
        axes.plot(
            *zip(*baselines, strict=True) if baselines else ([], []),
            "D",
            color=BASELINE,
            markersize=6,
            markerfacecolor="white",
            markeredgewidth=1.4,
            label="colour-only baseline",
        )
    axes.axvline(0.5, color=BASELINE, linewidth=0.8, linestyle=(0, (2, 2)))
    axes.set_xlim(min([0.48, *seen]) - 0.02, 1.01)
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.set_yticks(range(len(names)), [shorten(name) for name in names])
    axes.set_xlabel(metric)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    legend_above(axes)
    return figure


PANELS = {"accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "auroc": "AUROC"}
ROW_IN = 0.3
MARKS: Mapping[str, dict[str, Any]] = {
    "published": {"marker": "D", "color": INK, "markerfacecolor": "white", "markeredgewidth": 1.4},
    "as published": {"marker": "o", "color": SERIES_COLOURS[0]},
    "patients apart": {"marker": "o", "color": MODEL},
    "colour alone": {"marker": "s", "color": BASELINE, "markerfacecolor": "white", "markeredgewidth": 1.4},
}


@styled
def draw_reproduction(papers: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw published and reproduced values of three metrics per recipe, and the leakage of each slide.

    Args:
        papers: Recipe to its entry in ``metrics.json`` of a reproduction.

    Raises:
        MetricError: If there is no recipe.
    """
    if not papers:
        raise MetricError("a reproduction without a recipe cannot be drawn")
    leaks = {
        (name, str(slide["tested"])): slide["auroc"]["values"]
        for name, entry in papers.items()
        for slide in entry["leak"]["slides"]
    }
    heights = [0.55 + ROW_IN * len(papers)] * len(PANELS)
    heights += [0.55 + ROW_IN * 0.8 * len(leaks)] if leaks else []
    figure = Figure(figsize=(WIDTH_IN, 0.5 + sum(heights)), layout="constrained")
    panels: list[Axes] = list(figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
    for axes, metric in zip(panels, PANELS, strict=False):
        _draw_arms(axes, papers, metric)
    if leaks:
        _draw_leaks(panels[-1], leaks)
    handles = {
        label: handle
        for axes in panels
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    order = [label for label in MARKS if label in handles]
    figure.legend([handles[label] for label in order], order, loc="outside upper center", ncols=2)
    return figure


def _draw_arms(axes: Axes, papers: Mapping[str, Mapping[str, Any]], metric: str) -> None:
    """Draw one row per recipe: published values as diamonds, reproduced ones as dots with intervals."""
    for row, entry in enumerate(papers.values()):
        if row:
            axes.axhline(row - 0.5, color=RULE, linewidth=0.8)
        apart, published = entry["apart"], entry["published"]
        interval = (apart["interval"] or {}).get(metric) or {}
        claimed = entry["corrected"].get(metric, entry["claim"].get(metric))
        _mark(axes, "published", claimed, row - 0.22)
        _mark(axes, "as published", published[metric]["mean"], row - 0.07, _reach(published[metric]))
        _mark(axes, "patients apart", apart[metric]["mean"], row + 0.1, _reach(apart[metric], interval))
        if metric == "auroc":
            _mark(axes, "colour alone", apart["colour_auroc"], row + 0.26)
    _frame(axes, [shorten(name, 22) for name in papers], PANELS[metric])
    axes.set_xlim(right=1.0)


def _mark(
    axes: Axes, kind: str, value: float | None, row: float, reach: tuple[float, float] | None = None
) -> None:
    if value is None:
        return
    if reach is not None:
        axes.plot(reach, [row, row], color=MARKS[kind]["color"], linewidth=2, alpha=0.45)
    axes.plot([value], [row], linestyle="none", markersize=5.5, label=kind, **MARKS[kind])


def _reach(
    spread: Mapping[str, float | None], interval: Mapping[str, float | None] | None = None
) -> tuple[float, float] | None:
    """Return the interval over patients or, without one, the range over seeds."""
    for result, low, high in ((interval or {}, "low", "high"), (spread, "min", "max")):
        ends = result.get(low), result.get(high)
        if ends[0] is not None and ends[1] is not None:
            return ends[0], ends[1]
    return None


def _draw_leaks(axes: Axes, leaks: Mapping[tuple[str, str], Sequence[float]]) -> None:
    """Draw one row per recipe and slide: the effect of leakage for each seed, and the mean."""
    names, last = [], None
    for row, ((recipe, tested), values) in enumerate(leaks.items()):
        dots: dict[str, Any] = {"markersize": 5, "alpha": 0.6, "markeredgewidth": 0}
        axes.plot(values, [row] * len(values), "o", color=SERIES_COLOURS[0], **dots)
        axes.plot([np.mean(values)] * 2, [row - 0.3, row + 0.3], color=INK, linewidth=1.8)
        names.append(
            f"{shorten(recipe, 22)}  {shorten(tested, 10)}" if recipe != last else shorten(tested, 10)
        )
        if last not in (None, recipe):
            axes.axhline(row - 0.5, color=RULE, linewidth=0.8)
        last = recipe
    axes.axvline(0, color=MUTED, linewidth=0.9)
    _frame(axes, names, "AUROC gained by the leak; a dot is a seed")


def _frame(axes: Axes, names: Sequence[str], label: str) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(label)


WIDE_RANGE = 8  # from this ratio of largest to smallest value on, an axis of numbers is logarithmic


@styled
def draw_sweep(
    values: Mapping[str, Sequence[Any]],
    validation: np.ndarray,
    test: np.ndarray | None = None,
    *,
    metric: str = "AUROC",
    best: Mapping[str, Any] | None = None,
) -> Figure:
    """Draw a metric of every run of a sweep against its settings.

    One setting: the metric against its value, one dot per seed. Two: a heat map of the mean over seeds. More:
    combinations ranked by their mean on validation, one dot per seed.

    Args:
        values: Setting to its values, one per run.
        validation: The metric on validation, ``(n_runs,)``; NaN is left out.
        test: The metric on the test subset; None shows validation only.
        best: Setting to value of the combination chosen on validation, which is marked.

    Raises:
        MetricError: If there is no setting, or the numbers of values differ.
    """
    validation = np.asarray(validation, dtype=float)
    counts = {len(result) for result in values.values()} | {len(validation)}
    if not values or len(counts) > 1 or not len(validation):
        raise MetricError(f"{len(validation)} runs have {len(values)} settings; expected one value per run")
    keys = list(values)
    points = [tuple(_format_value(values[key][run]) for key in keys) for run in range(len(validation))]
    marked = None if best is None else tuple(_format_value(best[key]) for key in keys)
    subsets = {"validation": validation, **({} if test is None else {"test": np.asarray(test, dtype=float)})}
    if len(keys) == 1:
        return _draw_line(keys[0], values[keys[0]], points, subsets, metric, marked)
    if len(keys) == 2:
        return _draw_map(keys, points, subsets, metric, marked)
    return _draw_ranks(keys, points, subsets, metric, marked)


@styled
def draw_search(
    values: Mapping[str, Sequence[Any]],
    validation: np.ndarray,
    *,
    metric: str = "AUROC",
    best: Mapping[str, Any] | None = None,
) -> Figure:
    """Draw the validation metric of every trial of a search against each setting.

    Args:
        values: Setting to its values, one per run.
        validation: The metric on validation, ``(n_runs,)``.
        best: Setting to value of the trial chosen on validation, which is marked.
    """
    figure = Figure(figsize=(WIDTH_IN, 3.0), layout="constrained")
    panels = figure.subplots(1, len(values), sharey=True, squeeze=False)[0]
    for key, axes in zip(values, panels, strict=True):
        numbers = [value for value in values[key] if isinstance(value, int | float)]
        x: list[Any] = list(values[key])
        if len(numbers) < len(x):
            x = [shorten(_format_value(value)) for value in x]
        elif min(numbers) > 0 and max(numbers) / min(numbers) >= WIDE_RANGE:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.plot(x, validation, "o", color=_colour("validation"), markersize=5.5, alpha=0.7)
        if best is not None:
            mark = best[key] if len(numbers) == len(x) else shorten(_format_value(best[key]))
            axes.axvline(mark, color=INK, linewidth=0.9, linestyle=(0, (3, 3)), zorder=0)
        axes.set_xlabel(key)
    panels[0].set_ylabel(f"validation {metric} (dashed: chosen)")
    return figure


def _draw_line(
    key: str,
    values: Sequence[Any],
    points: Sequence[tuple[str, ...]],
    subsets: Mapping[str, np.ndarray],
    metric: str,
    best: tuple[str, ...] | None,
) -> Figure:
    """Draw the metric against the values of one setting, on a numeric axis if they are numbers."""
    figure, axes = new_figure()
    names = list(dict.fromkeys(point[0] for point in points))
    numbers = {
        name: float(value)
        for (name,), value in zip(points, values, strict=True)
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    if len(numbers) == len(names):
        x_of = numbers
        if min(numbers.values()) > 0 and max(numbers.values()) / min(numbers.values()) >= WIDE_RANGE:
            axes.set_xscale("log")
        axes.set_xticks([numbers[name] for name in names], names)
        axes.minorticks_off()
    else:
        x_of = {name: float(index) for index, name in enumerate(names)}
        axes.set_xticks(range(len(names)), [shorten(name) for name in names])
        axes.set_xlim(-0.5, len(names) - 0.5)
    order = sorted(names, key=x_of.__getitem__)
    for subset, result in subsets.items():
        colour = _colour(subset)
        x = [x_of[name] for (name,) in points]
        axes.plot(x, result, "o", color=colour, markersize=5.5, alpha=0.7, markeredgewidth=0)
        means = _means(points, result)
        mean = [means[(name,)] for name in order]
        if x_of is numbers:
            axes.plot([x_of[name] for name in order], mean, color=colour, label=subset)
        else:
            axes.hlines(mean, np.arange(len(order)) - 0.2, np.arange(len(order)) + 0.2, colour, label=subset)
    if best is not None:
        dashes = (0, (3, 3))
        axes.axvline(x_of[best[0]], color=INK, linewidth=0.9, linestyle=dashes, zorder=0, label="chosen")
    axes.set(xlabel=key, ylabel=f"{metric} (dots: seeds)")
    legend_above(axes)
    return figure


def _draw_map(
    keys: Sequence[str],
    points: Sequence[tuple[str, ...]],
    subsets: Mapping[str, np.ndarray],
    metric: str,
    best: tuple[str, ...] | None,
) -> Figure:
    """A cell a combination: its colour is validation, the numbers in it validation and test."""
    rows, columns = (list(dict.fromkeys(point[axis] for point in points)) for axis in (0, 1))
    means = {subset: _means(points, result) for subset, result in subsets.items()}
    grid = np.array([[means["validation"].get((row, column), np.nan) for column in columns] for row in rows])
    figure, axes = new_figure(WIDTH_IN, 1.5 + 0.52 * len(rows))
    image = axes.imshow(np.ma.masked_invalid(grid), cmap=PROBABILITY_MAP, aspect="auto")
    finite = grid[np.isfinite(grid)]
    middle = float(finite.min() + finite.max()) / 2 if len(finite) else 0.0
    for row, column in np.ndindex(grid.shape):
        point = (rows[row], columns[column])
        written = [
            f"{result[point]:.3f}" for result in means.values() if np.isfinite(result.get(point, np.nan))
        ]
        colour = "white" if grid[row, column] <= middle else "black"
        axes.text(column, row, "\n".join(written), ha="center", va="center", color=colour, fontsize=8)
        if point == best:
            axes.plot(
                [column - 0.5, column + 0.5, column + 0.5, column - 0.5, column - 0.5],
                [row - 0.5, row - 0.5, row + 0.5, row + 0.5, row - 0.5],
                color=INK,
                linewidth=2.6,
                clip_on=False,
                solid_joinstyle="miter",
            )
    axes.set_xticks(range(len(columns)), [shorten(name, 14) for name in columns])
    axes.set_yticks(range(len(rows)), [shorten(name, 14) for name in rows])
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.set(xlabel=keys[1], ylabel=keys[0])
    figure.colorbar(image, ax=axes, label=f"{metric}, validation", pad=0.02).outline.set_visible(False)
    shown = "validation, below it test" if "test" in subsets else "validation"
    axes.set_title(shown + ("; framed: chosen" if best else ""))
    return figure


def _draw_ranks(
    keys: Sequence[str],
    points: Sequence[tuple[str, ...]],
    subsets: Mapping[str, np.ndarray],
    metric: str,
    best: tuple[str, ...] | None,
) -> Figure:
    """A row a combination, the highest mean on validation first (the lowest, for a loss)."""
    means = _means(points, subsets["validation"])
    sign = 1 if metric == "loss" else -1
    order = sorted(means, key=lambda point: (not np.isfinite(means[point]), sign * means[point]))
    figure, axes = new_figure(WIDTH_IN, 1.3 + 0.3 * max(len(order), 2))
    for offset, (subset, result) in zip((-0.13, 0.13), subsets.items(), strict=False):
        rows = np.array([order.index(point) for point in points])
        axes.plot(
            result,
            rows + offset,
            "o",
            color=_colour(subset),
            markersize=5,
            alpha=0.75,
            markeredgewidth=0,
            label=subset,
        )
    labels = [" · ".join(shorten(value, 12) for value in point) for point in order]
    axes.set_yticks(
        range(len(order)),
        [f"{label} ◂" if point == best else label for label, point in zip(labels, order, strict=True)],
    )
    axes.set_ylim(len(order) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(metric)
    axes.set_title(" · ".join(key.rpartition(".")[2] for key in keys), fontsize=8.5)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=2)
    return figure


def _means(points: Sequence[tuple[str, ...]], values: np.ndarray) -> dict[tuple[str, ...], float]:
    """Return the mean over the runs of each combination, NaN without finite values."""
    groups: dict[tuple[str, ...], list[float]] = {}
    for point, value in zip(points, values, strict=True):
        groups.setdefault(point, []).append(float(value))
    finite = {point: [value for value in result if np.isfinite(value)] for point, result in groups.items()}
    return {point: float(np.mean(result)) if result else float("nan") for point, result in finite.items()}


def _colour(subset: str) -> str:
    return VALIDATION if subset == "validation" else TEST


def _format_value(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
