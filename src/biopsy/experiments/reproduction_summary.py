"""Results of a reproduction: published and reproduced metrics, and the effect of leakage."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from biopsy.core.files import write_json
from biopsy.core.loaders import FloatOrNan
from biopsy.core.tables import write_csv
from biopsy.data.packs import group_by_unit
from biopsy.evaluation.scored import ScoredPatches
from biopsy.evaluation.study_tables import describe_run, measure_pooled
from biopsy.experiments.leakage import APART, PUBLISHED
from biopsy.statistics.intervals import IntervalMethod
from biopsy.statistics.resampling import Interval
from biopsy.training.metrics import Metrics, Spread
from biopsy.training.runs import Run
from biopsy.training.study import Paper, Study

SUMMARY_FORMAT = "biopsy-reproduction-metrics/3"
COMPARED = ("accuracy", "balanced_accuracy", "auroc")
"""Publications report accuracy; balanced accuracy and AUROC do not depend on class frequencies."""
SMOKE_SHARE = 0.1  # of the published updates; shorter runs do not test the method
MIN_GROUPS = 5  # patients needed for an interval
CONTRASTS = {
    "leak": ("leak-with", "leak-placebo"),
    "blocked_leak": ("leak-blocked-with", "leak-blocked-placebo"),
    "placebo": ("leak-placebo", "leak-apart"),
    "leak_and_placebo": ("leak-with", "leak-apart"),
}
"""Pairs of conditions compared on the same test patches: a condition and its reference."""

Frames = Mapping[str, pd.DataFrame]


def write_tables(study: Study) -> None:
    """Write ``runs.csv``, ``table.csv`` and ``metrics.json`` from the runs evaluated so far."""
    runs = study.evaluated_runs()
    if not runs:
        return
    table = pd.DataFrame([_describe(run, study.info["runs"][run.path.name]) for run in runs])
    write_csv(study.path / "runs.csv", table)
    frames = {
        run.path.name: run.predictions("test")[0]
        for run in runs
        if study.info["runs"][run.path.name]["condition"] == APART
    }
    summary = summarise(study.info["papers"], table, frames, runs[0].metrics())
    write_json(study.path / "metrics.json", summary)
    study.write_table(tabulate(summary))


@dataclass(frozen=True, kw_only=True)
class ComparedMetrics:
    """Variability of each of `COMPARED`."""

    accuracy: Spread
    balanced_accuracy: Spread
    auroc: Spread


@dataclass(frozen=True, kw_only=True)
class FoldSummary(ComparedMetrics):
    """Results of a fold over seeds."""

    tested: str
    n_patches: int
    seeds: list[int]
    colour_auroc: float | None


@dataclass(frozen=True)
class ConditionIntervals:
    """Intervals over patients of the means over seeds."""

    accuracy: Interval
    balanced_accuracy: Interval
    auroc: Interval
    about: IntervalMethod


@dataclass(frozen=True, kw_only=True)
class ConditionSummary(ComparedMetrics):
    """Results over seeds, means over folds; ``reason`` if there are none."""

    reason: str | None
    n_train: int | None
    seeds: list[int]
    colour_auroc: float | None
    test_is_validation: bool
    folds: list[FoldSummary]
    interval: ConditionIntervals | None = None


@dataclass(frozen=True, kw_only=True)
class PairedSpread(Spread):
    """Differences paired by seed, and their variability."""

    values: list[FloatOrNan]


@dataclass(frozen=True, kw_only=True)
class SlideDifference:
    """Differences of a condition from its reference on one slide by seed, and the metrics of both."""

    tested: str
    n_patches: list[int]
    n_train: list[int]
    seeds: list[int]
    accuracy: PairedSpread
    balanced_accuracy: PairedSpread
    auroc: PairedSpread
    condition: ComparedMetrics
    reference: ComparedMetrics


@dataclass(frozen=True, kw_only=True)
class ConditionDifference(ComparedMetrics):
    """Differences of a condition from its reference on the same test patches, means over slides, by seed."""

    condition: str
    reference: str
    reason: str | None
    seeds: list[int]
    slides: list[SlideDifference]

    def mean_aurocs(self) -> tuple[float, float]:
        """Return the AUROC of condition and reference, means over slides; NaN if undefined on a slide."""
        both = [(slide.condition.auroc.mean, slide.reference.auroc.mean) for slide in self.slides]
        condition, reference = np.mean(np.array(both, dtype=float), axis=0).tolist()
        return condition, reference


@dataclass(frozen=True, kw_only=True)
class PaperSummary:
    """Results of a recipe: published and reproduced metrics, each of `CONTRASTS`, and a label."""

    claim: Mapping[str, float]
    corrected: Mapping[str, float]
    published: ConditionSummary
    apart: ConditionSummary
    leak: ConditionDifference
    blocked_leak: ConditionDifference
    placebo: ConditionDifference
    leak_and_placebo: ConditionDifference
    updates: int
    published_updates: int | None
    n_runs: int
    minutes: float
    label: str


@dataclass(frozen=True, kw_only=True)
class ReproductionSummary:
    """Content of a reproduction's ``metrics.json``."""

    format: str = SUMMARY_FORMAT
    positive_class: str | None
    unit: str
    papers: dict[str, PaperSummary]


def summarise(
    papers: Mapping[str, Paper], table: pd.DataFrame, frames: Frames, metrics: Metrics
) -> ReproductionSummary:
    """Return the results of each recipe that has been run.

    Args:
        papers: Recipe to its entry in ``study.json``.
        table: One row per run.
        frames: Run to its test predictions, for the runs split by patient.
        metrics: ``metrics.json`` of any run, for class names and unit.
    """
    return ReproductionSummary(
        positive_class=metrics.positive_class,
        unit=metrics.unit,
        papers={
            name: _summarise_paper(paper, table[table["recipe"] == name], frames, metrics)
            for name, paper in papers.items()
            if (table["recipe"] == name).any()
        },
    )


def _summarise_paper(paper: Paper, table: pd.DataFrame, frames: Frames, metrics: Metrics) -> PaperSummary:
    conditions = {kind: table[table["condition"] == kind] for kind in (PUBLISHED, APART)}
    missing, updates = paper["missing"], int(table["updates"].min())
    interval = _estimate(conditions[APART], frames, metrics)
    return PaperSummary(
        claim=paper["claim"],
        corrected=paper["corrected"],
        published=_summarise_condition(conditions[PUBLISHED], missing.get(PUBLISHED)),
        apart=_summarise_condition(conditions[APART], missing.get(APART), interval),
        **_compare_conditions(table, missing.get("leak")),
        updates=updates,
        published_updates=paper["published_updates"] or None,
        n_runs=len(table),
        minutes=float(table["seconds"].sum() / 60),
        label=_label(updates, paper["published_updates"], method_only=paper["method_only"]),
    )


def _label(updates: int, published: int, *, method_only: bool) -> str:
    """Return the limitations of a row in a few words."""
    length = "smoke" if updates < SMOKE_SHARE * published else "" if published else "published length unknown"
    return ", ".join(part for part in (length, "method only" if method_only else "") if part)


def _spreads(table: pd.DataFrame) -> dict[str, Spread]:
    return {name: Spread.of(table[name]) for name in COMPARED}


def _summarise_condition(
    rows: pd.DataFrame, reason: str | None, interval: ConditionIntervals | None = None
) -> ConditionSummary:
    """Return the results of a condition: per fold over seeds, and the mean over folds over seeds."""
    folds = [
        FoldSummary(
            tested=fold_rows["tested"].iloc[0],
            n_patches=int(fold_rows["n_patches"].iloc[0]),
            seeds=sorted(fold_rows["seed"].tolist()),
            **_spreads(fold_rows),
            colour_auroc=_plain(fold_rows["baseline_auroc"].iloc[0]),
        )
        for _, fold_rows in rows.groupby("place", dropna=False, sort=True)
    ]
    complete = _select_complete(rows, len(folds))
    by_seed = complete.groupby("seed")[[*COMPARED, "baseline_auroc"]].mean() if len(complete) else complete
    return ConditionSummary(
        reason=None if folds else reason or "no run has been evaluated",
        n_train=int(rows["n_train"].iloc[0]) if folds else None,
        seeds=sorted(set(complete["seed"].tolist())),
        **_spreads(by_seed),
        colour_auroc=_plain(by_seed["baseline_auroc"].mean()) if len(complete) else None,
        test_is_validation=bool(rows["test_is_validation"].any()),
        folds=folds,
        interval=interval,
    )


def _select_complete(rows: pd.DataFrame, n_folds: int) -> pd.DataFrame:
    """Return the rows of the seeds for which every fold has been evaluated."""
    counts = rows.groupby("seed")["place"].size()
    return rows[rows["seed"].isin(counts.index[counts == n_folds])]


def _estimate(rows: pd.DataFrame, frames: Frames, metrics: Metrics) -> ConditionIntervals | None:
    """Return intervals over patients of the means over seeds, if one subset of at least five was tested."""
    tested = [frames[run] for run in rows["run"]]
    if not tested or rows["place"].notna().any() or metrics.positive_class is None:
        return None
    if len(np.unique(group_by_unit(tested[0], metrics.unit))) < MIN_GROUPS:
        return None
    classes_and_unit = metrics.class_names, metrics.positive_class, metrics.unit
    pooled = measure_pooled([ScoredPatches.of_predictions(frame, *classes_and_unit) for frame in tested])
    return ConditionIntervals(**{name: pooled.patch[name] for name in COMPARED}, about=pooled.interval)


def _compare_conditions(table: pd.DataFrame, reason: str | None) -> dict[str, ConditionDifference]:
    """Return each of `CONTRASTS`; without a placebo, leakage is compared with ``leak-apart``."""
    pairs = dict(CONTRASTS)
    if CONTRASTS["leak"][1] not in set(table["condition"]):
        pairs["leak"] = pairs["leak_and_placebo"]
    return {name: _compare_pair(table, *pair, reason) for name, pair in pairs.items()}


def _compare_pair(
    table: pd.DataFrame, condition: str, reference: str, reason: str | None
) -> ConditionDifference:
    first, second = (table[table["condition"] == kind] for kind in (condition, reference))
    pairs = first.merge(second, on=["place", "seed"], suffixes=("", "_reference"))
    reference_values = pairs[[f"{name}_reference" for name in COMPARED]].set_axis(COMPARED, axis=1)
    differences = pairs[list(COMPARED)] - reference_values
    slides = []
    for _, rows in pairs.sort_values(["place", "seed"]).groupby("place"):
        gains = differences.loc[rows.index]
        paired = {
            name: PairedSpread(**vars(spread), values=gains[name].tolist())
            for name, spread in _spreads(gains).items()
        }
        slides.append(
            SlideDifference(
                tested=rows["tested"].iloc[0],
                n_patches=rows["n_patches"].tolist(),
                n_train=rows["n_train"].tolist(),
                seeds=rows["seed"].tolist(),
                **paired,
                condition=ComparedMetrics(**_spreads(rows)),
                reference=ComparedMetrics(**_spreads(reference_values.loc[rows.index])),
            )
        )
    complete = _select_complete(pairs, len(slides))
    by_seed = differences.loc[complete.index].groupby(complete["seed"]).mean()
    return ConditionDifference(
        condition=condition,
        reference=reference,
        reason=None if slides else reason or "no pair of runs has been evaluated",
        seeds=sorted(set(complete["seed"].tolist())),
        **_spreads(by_seed),
        slides=slides,
    )


def tabulate(summary: ReproductionSummary) -> pd.DataFrame:
    """Return ``table.csv``: one row per recipe and metric."""
    rows = []
    for recipe, entry in summary.papers.items():
        conditions: dict[str, ComparedMetrics] = {
            "as_published": entry.published,
            "patients_apart": entry.apart,
        }
        conditions |= {name: getattr(entry, name) for name in CONTRASTS}
        for metric in COMPARED:
            interval = getattr(entry.apart.interval, metric, None)
            rows.append(
                {
                    "recipe": recipe,
                    "metric": metric,
                    "published": entry.claim.get(metric),
                    "corrected": entry.corrected.get(metric),
                    **{
                        f"{condition}{'' if key == 'mean' else f'_{key}'}": getattr(
                            getattr(result, metric), key
                        )
                        for condition, result in conditions.items()
                        for key in ("mean", "sd")
                    },
                    "patients_apart_low": interval and interval.low,
                    "patients_apart_high": interval and interval.high,
                    "colour_alone": entry.apart.colour_auroc if metric == "auroc" else None,
                    "updates": entry.updates,
                    "published_updates": entry.published_updates,
                    "seeds": len(entry.apart.seeds or entry.published.seeds),
                    "leak_seeds": len(entry.leak.seeds),
                    "minutes": round(entry.minutes, 1),
                    "label": entry.label,
                }
            )
    return pd.DataFrame(rows)


def _describe(run: Run, record: Mapping[str, object]) -> dict[str, object]:
    """Return the row of a run in ``runs.csv``."""
    row, log = describe_run(run), run.log()
    columns = ("n_patches", *COMPARED, "baseline_auroc", "threshold", "chosen_epoch", "seconds", "run")
    return {
        **{key: record[key] for key in ("recipe", "condition", "tested", "place", "seed")},
        "n_train": run.info["split"]["subsets"]["train"]["patches"],
        "test_is_validation": bool(run.info["split"].get("test_is_validation", False)),
        "updates": log[-1]["step"],
        **{key: row[key] for key in columns},
    }


def _plain(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
