"""The report of a hyperparameter sweep: the settings chosen on validation, and all others."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from biopsy.core.errors import MetricError
from biopsy.core.text import count
from biopsy.data.ledger import OpeningCount
from biopsy.evaluation.provenance_sections import describe_reproduction
from biopsy.plotting.style import (
    INK,
    PROBABILITY_MAP,
    TEST,
    VALIDATION,
    WIDTH_IN,
    legend_above,
    name_rows,
    new_figure,
    shorten,
    styled,
    svg,
)
from biopsy.reporting.document import (
    Block,
    Headline,
    Listing,
    ReportDocument,
    Section,
    Summary,
    Table,
    number,
)
from biopsy.reporting.elements import (
    AS_PUBLISHED_OVERLAP,
    describe_openings,
    picture,
    synthetic_warning,
    written_by,
)
from biopsy.reporting.pseudonyms import Pseudonymizer
from biopsy.statistics.resampling import Interval
from biopsy.training.metrics import Spread
from biopsy.training.study import StudyInfo

SUMMARY_FORMAT = "biopsy-sweep-metrics/2"
METRICS = {
    "auroc": "AUROC",
    "balanced_accuracy": "balanced accuracy",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
}


@dataclass(frozen=True, kw_only=True)
class CombinationSummary:
    """Results of a combination of settings over seeds; metrics of the test subset, if it was evaluated."""

    values: dict[str, object]
    n_seeds: int
    val_auroc: Spread
    val_loss: Spread
    metrics: dict[str, Spread]
    baseline_auroc: float | None


@dataclass(frozen=True, kw_only=True)
class SweepSummary:
    """Content of a sweep's ``metrics.json``: every combination, and the one chosen on validation."""

    format: str = SUMMARY_FORMAT
    positive_class: str | None
    unit: str
    grid: list[str]
    chosen_by: str | None
    best: CombinationSummary | None
    combinations: list[CombinationSummary]
    ledger: OpeningCount | None


def report_of_sweep(
    study: StudyInfo,
    summary: SweepSummary,
    table: pd.DataFrame,
    figure: Figure,
    pseudonymizer: Pseudonymizer | None = None,
) -> ReportDocument:
    """Return the report of a sweep.

    Args:
        study: The content of ``study.json``, with ``environment``.
        summary: The content of ``metrics.json``.
        table: One row per run.
        figure: Every run against the settings.
        pseudonymizer: Pseudonyms that replace the ids of patients, slides and patches.
    """
    recipe_toml = "".join(study["recipes"].values())
    if pseudonymizer is not None:
        study, recipe_toml = pseudonymizer.nested(study), pseudonymizer.text(recipe_toml)
    return ReportDocument(
        title=f"{next(iter(study['recipes']))}: {', '.join(summary.grid)}",
        subtitle=f"Sweep {study['name']}: {count(len(summary.combinations), 'combination')}, "
        f"{count(len(study['seeds']), 'seed')}, split {study['split']['name'] if study['split'] else '-'}",
        summary=_summarise(study, summary),
        sections=[
            _describe_settings(study, summary, figure),
            _describe_runs(summary.grid, table),
            Section("recipe", "Recipe", [Listing(recipe_toml, fold="All other settings (TOML)")]),
            describe_reproduction(study),
        ],
        warnings=_warn_reader(study),
        footer=written_by(study),
        ids_hidden=pseudonymizer is not None,
    )


def _summarise(study: StudyInfo, summary: SweepSummary) -> Summary:
    best, criterion = summary.best, summary.chosen_by
    verdict = "No combination has been evaluated on validation."
    headlines = []
    if best is not None:
        name = "validation AUROC" if criterion == "val_auroc" else "validation loss"
        means = {key: best.metrics[key].mean for key in METRICS if key in best.metrics}
        tested = ", ".join(
            f"{METRICS[key]} {number(mean)}" for key, mean in means.items() if mean is not None
        )
        verdict = f"The {name} chooses {format_values(best.values)}; " + (
            f"its means on the test subset: {tested}."
            if tested
            else "the test subset has not been evaluated."
        )
        reason = "see the spread over seeds"
        note = f"mean of {count(best.n_seeds, 'seed')}"
        headlines = [
            Headline("AUROC on validation", Interval(_or_nan(best.val_auroc.mean)), beside=note),
            *(
                Headline(f"{METRICS[name]} on test", Interval(_or_nan(mean), reason=reason))
                for name, mean in list(means.items())[:2]
            ),
        ]
    return Summary(
        verdict=verdict + synthetic_warning(study["pack"].get("synthetic")),
        headlines=headlines,
        unit=summary.unit,
        findings=["The best of many validation metrics is optimistic: expect less on new patients."]
        if study.get("search")
        else [
            "The choice was made on validation, so the test metrics of the chosen combination are not biased "
            "by it. The best of all test metrics would be.",
            describe_openings(summary.ledger),
        ],
    )


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _warn_reader(study: StudyInfo) -> list[str]:
    warnings = []
    if study["split"] and study["split"].get("patients_overlap"):
        warnings.append(AS_PUBLISHED_OVERLAP)
    if len(study["seeds"]) < 3:
        warnings.append("Fewer than three seeds: differences between settings may be due to the seed.")
    return warnings


def _describe_settings(study: StudyInfo, summary: SweepSummary, figure: Figure) -> Section:
    keys, best = summary.grid, summary.best
    metrics = {name: label for name, label in METRICS.items() if name in summary.combinations[0].metrics}
    rows = []
    for entry in summary.combinations:
        chosen = best is not None and entry.values == best.values
        rows.append(
            [
                *(format_value(entry.values[key]) for key in keys),
                "chosen" if chosen else "",
                mean_sd(entry.val_auroc),
                *(mean_sd(entry.metrics[name]) for name in metrics),
                number(entry.n_seeds),
            ]
        )
    columns = [*keys, "", "validation AUROC", *metrics.values(), "seeds"]
    where = "validation" if study.get("search") else "validation and test"
    blocks: list[Block] = [
        picture(svg(figure, "sweep"), f"AUROC of every run on {where}, by setting."),
        Table(
            columns,
            rows,
            caption="All combinations",
            note="Mean ± standard deviation over seeds."
            + (
                " Right of the validation AUROC: test subset, each run at the threshold chosen on its "
                "validation subset."
                if metrics
                else ""
            ),
            text_columns=len(keys) + 1,
        ),
    ]
    return Section("settings", "Settings", blocks)


def _describe_runs(keys: Sequence[str], table: pd.DataFrame) -> Section:
    metrics = {name: label for name, label in METRICS.items() if name in table}
    columns_shown = [*keys, "seed", "val_auroc", *metrics, "threshold", "chosen_epoch"]
    rows = [
        [
            format_value(record[name]) if name in (*keys, "seed") else number(record[name])
            for name in columns_shown
        ]
        for record in table[columns_shown].to_dict("records")
    ]
    columns = [*keys, "seed", "validation AUROC", *metrics.values(), "threshold", "selected epoch"]
    fold = f"{len(rows)} runs" if len(rows) > 16 else ""
    return Section("runs", "All runs", [Table(columns, rows, text_columns=len(keys), fold=fold)])


def mean_sd(spread: Spread, sign: str = "") -> str:
    """Format a mean and its standard deviation; a dash if undefined."""
    if spread.mean is None:
        return "-"
    return f"{spread.mean:{sign}.3f}" + ("" if spread.sd is None else f" ± {spread.sd:.3f}")


def format_values(values: Mapping[str, object]) -> str:
    """Format settings with their values in one line."""
    return ", ".join(f"{key} = {format_value(value)}" for key, value in values.items())


def format_value(value: object) -> str:
    """Return the value of a setting as text: strings unchanged, others as JSON."""
    return value if isinstance(value, str) else json.dumps(value)


WIDE_RANGE = 8  # from this ratio of largest to smallest value on, an axis of numbers is logarithmic


@styled
def draw_sweep(
    values: Mapping[str, Sequence[object]],
    validation: np.ndarray,
    test: np.ndarray | None = None,
    *,
    metric: str = "AUROC",
    best: Mapping[str, object] | None = None,
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
        raise MetricError(
            f"{len(validation)} runs have {len(values)} settings; expected one value per run", "shape"
        )
    keys = list(values)
    points = [tuple(format_value(values[key][run]) for key in keys) for run in range(len(validation))]
    marked = None if best is None else tuple(format_value(best[key]) for key in keys)
    subsets = {"validation": validation, **({} if test is None else {"test": np.asarray(test, dtype=float)})}
    if len(keys) == 1:
        return _draw_line(keys[0], values[keys[0]], points, subsets, metric, marked)
    if len(keys) == 2:
        return _draw_map(keys, points, subsets, metric, marked)
    return _draw_ranks(keys, points, subsets, metric, marked)


@styled
def draw_search(
    values: Mapping[str, Sequence[object]],
    validation: np.ndarray,
    *,
    metric: str = "AUROC",
    best: Mapping[str, object] | None = None,
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
            x = [shorten(format_value(value)) for value in x]
        elif min(numbers) > 0 and max(numbers) / min(numbers) >= WIDE_RANGE:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.plot(x, validation, "o", color=_colour("validation"), markersize=5.5, alpha=0.7)
        if best is not None:
            mark = best[key] if len(numbers) == len(x) else shorten(format_value(best[key]))
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
    """A row per combination, the highest mean on validation first (the lowest, for a loss)."""
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
    names = [f"{label} ◂" if point == best else label for label, point in zip(labels, order, strict=True)]
    name_rows(axes, names, margin=0.4)
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
