"""What a reproduction adds up to: the claim, what it comes to here, and how much of it is the leak."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from biopsy.core.files import write_json
from biopsy.core.tables import write_csv
from biopsy.data.packs import group_by_unit
from biopsy.evaluation.scored import ScoredPatches
from biopsy.evaluation.study_tables import Spread, describe_run, measure_pooled
from biopsy.experiments.leakage import APART, PUBLISHED
from biopsy.statistics.intervals import IntervalMethod
from biopsy.statistics.resampling import Interval
from biopsy.training.runs import Run
from biopsy.training.study import Study

SUMMARY_FORMAT = "biopsy-reproduction-metrics/2"
COMPARED = ("accuracy", "balanced_accuracy", "auroc")
"""Posts claim accuracy; balanced accuracy and AUROC do not depend on how common the classes are."""
SMOKE_SHARE = 0.1  # of the published updates: below it a row says nothing about the method
MIN_GROUPS = 5  # fewer patients allow no interval
CONTRASTS = {
    "leak": ("leak-with", "leak-placebo"),
    "blocked_leak": ("leak-blocked-with", "leak-blocked-placebo"),
    "placebo": ("leak-placebo", "leak-apart"),
    "leak_and_placebo": ("leak-with", "leak-apart"),
}
"""Differences between arms of the leakage experiment, on the same test patches: arm and its reference."""

Frames = Mapping[str, pd.DataFrame]


def write_tables(study: Study) -> None:
    """Write ``runs.csv``, ``table.csv`` and ``metrics.json`` from the runs judged so far."""
    runs = study.evaluated_runs()
    if not runs:
        return
    table = pd.DataFrame([_describe(run, study.info["runs"][run.path.name]) for run in runs])
    write_csv(study.path / "runs.csv", table)
    frames = {
        run.path.name: run.predictions("test")[0]
        for run in runs
        if study.info["runs"][run.path.name]["arm"] == APART
    }
    write_json(study.path / "metrics.json", summarise(study.info["papers"], table, frames, runs[0].metrics()))
    study.write_table(pd.DataFrame(list_rows(study.summary())))


@dataclass(frozen=True, kw_only=True)
class ComparedMetrics:
    """The spread of each of `COMPARED`."""

    accuracy: Spread
    balanced_accuracy: Spread
    auroc: Spread


@dataclass(frozen=True, kw_only=True)
class FoldSummary(ComparedMetrics):
    """A fold over seeds."""

    tested: str
    n_patches: int
    seeds: list[int]
    colour_auroc: float | None


@dataclass(frozen=True, kw_only=True)
class ArmSummary(ComparedMetrics):
    """Over seeds, means over folds; ``reason`` says why there are none."""

    reason: str | None
    n_train: int | None
    seeds: list[int]
    colour_auroc: float | None
    test_is_validation: bool
    folds: list[FoldSummary]
    interval: Mapping[str, Interval | IntervalMethod] | None = None


@dataclass(frozen=True, kw_only=True)
class PairedSpread(Spread):
    """Differences paired by seed, and their spread."""

    values: list[float]


@dataclass(frozen=True, kw_only=True)
class SlideDifference:
    """What an arm scores above its reference on one slide, seed by seed, and what both score."""

    tested: str
    n_patches: list[int]
    n_train: list[int]
    seeds: list[int]
    accuracy: PairedSpread
    balanced_accuracy: PairedSpread
    auroc: PairedSpread
    arm: ComparedMetrics
    reference: ComparedMetrics


@dataclass(frozen=True, kw_only=True)
class ArmDifference(ComparedMetrics):
    """What an arm scores above its reference on the same test patches, means over slides over seeds."""

    arm: str
    reference: str
    reason: str | None
    seeds: list[int]
    slides: list[SlideDifference]


@dataclass(frozen=True, kw_only=True)
class PaperSummary:
    """A recipe: the claim, what it comes to here, each of `CONTRASTS`, and what the row is worth."""

    claim: Mapping[str, float]
    corrected: Mapping[str, float]
    published: ArmSummary
    apart: ArmSummary
    leak: ArmDifference
    blocked_leak: ArmDifference
    placebo: ArmDifference
    leak_and_placebo: ArmDifference
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
    papers: Mapping[str, Any], table: pd.DataFrame, frames: Frames, metrics: Mapping[str, Any]
) -> ReproductionSummary:
    """Summarise each recipe that has been run.

    Args:
        papers: Recipe to its entry in ``study.json``.
        table: One row a run.
        frames: Run to its test predictions, for the runs with patients apart.
        metrics: ``metrics.json`` of any of the runs, for class names and unit.
    """
    return ReproductionSummary(
        positive_class=metrics["positive_class"],
        unit=metrics["unit"],
        papers={
            name: _summarise_paper(paper, table[table["recipe"] == name], frames, metrics)
            for name, paper in papers.items()
            if (table["recipe"] == name).any()
        },
    )


def _summarise_paper(
    paper: Mapping[str, Any], table: pd.DataFrame, frames: Frames, metrics: Mapping[str, Any]
) -> PaperSummary:
    arms = {kind: table[table["arm"] == kind] for kind in (PUBLISHED, APART)}
    missing, updates = paper["missing"], int(table["updates"].min())
    interval = _estimate(arms[APART], frames, metrics)
    return PaperSummary(
        claim=paper["claim"],
        corrected=paper["corrected"],
        published=_summarise_arm(arms[PUBLISHED], missing.get(PUBLISHED)),
        apart=_summarise_arm(arms[APART], missing.get(APART), interval),
        **_compare_arms(table, missing.get("leak")),
        updates=updates,
        published_updates=paper["published_updates"] or None,
        n_runs=len(table),
        minutes=float(table["seconds"].sum() / 60),
        label=_label(updates, paper["published_updates"], method_only=paper["method_only"]),
    )


def _label(updates: int, published: int, *, method_only: bool) -> str:
    """Say in a few words what a row is worth."""
    length = "smoke" if updates < SMOKE_SHARE * published else "" if published else "published length unknown"
    return ", ".join(part for part in (length, "method only" if method_only else "") if part)


def _spreads(table: pd.DataFrame) -> dict[str, Spread]:
    return {name: Spread.of(table[name]) for name in COMPARED}


def _summarise_arm(
    rows: pd.DataFrame, reason: str | None, interval: Mapping[str, Interval | IntervalMethod] | None = None
) -> ArmSummary:
    """Return an arm's numbers: of each fold over seeds, and of the mean over folds over seeds."""
    folds = [
        FoldSummary(
            tested=of_fold["tested"].iloc[0],
            n_patches=int(of_fold["n_patches"].iloc[0]),
            seeds=sorted(of_fold["seed"].tolist()),
            **_spreads(of_fold),
            colour_auroc=_plain(of_fold["baseline_auroc"].iloc[0]),
        )
        for _, of_fold in rows.groupby("place", dropna=False, sort=True)
    ]
    whole = _keep_whole(rows, len(folds))
    by_seed = whole.groupby("seed")[[*COMPARED, "baseline_auroc"]].mean() if len(whole) else whole
    return ArmSummary(
        reason=None if folds else reason or "no run has been judged",
        n_train=int(rows["n_train"].iloc[0]) if folds else None,
        seeds=sorted(set(whole["seed"].tolist())),
        **_spreads(by_seed),
        colour_auroc=_plain(by_seed["baseline_auroc"].mean()) if len(whole) else None,
        test_is_validation=bool(rows["test_is_validation"].any()),
        folds=folds,
        interval=interval,
    )


def _keep_whole(rows: pd.DataFrame, n_folds: int) -> pd.DataFrame:
    """Keep the seeds that have judged every fold."""
    counts = rows.groupby("seed")["place"].size()
    return rows[rows["seed"].isin(counts.index[counts == n_folds])]


def _estimate(
    rows: pd.DataFrame, frames: Frames, metrics: Mapping[str, Any]
) -> Mapping[str, Interval | IntervalMethod] | None:
    """Return intervals over patients of the means over seeds, where one subset of five or more was tested."""
    tested = [frames[run] for run in rows["run"]]
    if not tested or rows["place"].notna().any() or metrics["positive_class"] is None:
        return None
    if len(np.unique(group_by_unit(tested[0], metrics["unit"]))) < MIN_GROUPS:
        return None
    about = metrics["class_names"], metrics["positive_class"], metrics["unit"]
    pooled = measure_pooled([ScoredPatches.of_predictions(frame, *about) for frame in tested])
    return {**{name: pooled.patch[name] for name in COMPARED}, "about": pooled.interval}


def _compare_arms(table: pd.DataFrame, reason: str | None) -> dict[str, ArmDifference]:
    """Return each of `CONTRASTS`; without a placebo the leak is compared with the arm that has neither."""
    pairs = dict(CONTRASTS)
    if CONTRASTS["leak"][1] not in set(table["arm"]):
        pairs["leak"] = pairs["leak_and_placebo"]
    return {name: _compare_pair(table, *pair, reason) for name, pair in pairs.items()}


def _compare_pair(table: pd.DataFrame, arm: str, reference: str, reason: str | None) -> ArmDifference:
    first, second = (table[table["arm"] == kind] for kind in (arm, reference))
    pairs = first.merge(second, on=["place", "seed"], suffixes=("", "_reference"))
    of_reference = pairs[[f"{name}_reference" for name in COMPARED]].set_axis(COMPARED, axis=1)
    differences = pairs[list(COMPARED)] - of_reference
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
                arm=ComparedMetrics(**_spreads(rows)),
                reference=ComparedMetrics(**_spreads(of_reference.loc[rows.index])),
            )
        )
    whole = _keep_whole(pairs, len(slides))
    by_seed = differences.loc[whole.index].groupby(whole["seed"]).mean()
    return ArmDifference(
        arm=arm,
        reference=reference,
        reason=None if slides else reason or "no pair of runs has been judged",
        seeds=sorted(set(whole["seed"].tolist())),
        **_spreads(by_seed),
        slides=slides,
    )


def list_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of ``table.csv``: one a recipe and metric."""
    rows = []
    for recipe, entry in summary["papers"].items():
        for metric in COMPARED:
            interval = (entry[APART]["interval"] or {}).get(metric, {})
            arms = {"as_published": entry[PUBLISHED], "patients_apart": entry[APART]}
            arms |= {name: entry[name] for name in CONTRASTS}
            rows.append(
                {
                    "recipe": recipe,
                    "metric": metric,
                    "published": entry["claim"].get(metric),
                    "corrected": entry["corrected"].get(metric),
                    **{
                        f"{arm}{'' if key == 'mean' else f'_{key}'}": result[metric][key]
                        for arm, result in arms.items()
                        for key in ("mean", "sd")
                    },
                    "patients_apart_low": interval.get("low"),
                    "patients_apart_high": interval.get("high"),
                    "colour_alone": entry[APART]["colour_auroc"] if metric == "auroc" else None,
                    "updates": entry["updates"],
                    "published_updates": entry["published_updates"],
                    "seeds": len(entry[APART]["seeds"] or entry[PUBLISHED]["seeds"]),
                    "leak_seeds": len(entry["leak"]["seeds"]),
                    "minutes": round(entry["minutes"], 1),
                    "label": entry["label"],
                }
            )
    return rows


def _describe(run: Run, about: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's row of ``runs.csv``."""
    row, log = describe_run(run), run.log()
    kept = ("n_patches", *COMPARED, "baseline_auroc", "threshold", "chosen_epoch", "seconds", "run")
    return {
        **{key: about[key] for key in ("recipe", "arm", "tested", "place", "seed")},
        "n_train": run.info["split"]["subsets"]["train"]["patches"],
        "test_is_validation": bool(run.info["split"].get("test_is_validation", False)),
        "updates": log[-1]["step"],
        **{key: row[key] for key in kept},
    }


def _plain(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def write_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write the rows of ``table.csv`` as a table in Markdown, for readers."""
    columns = (
        "recipe | metric | published | corrected | as published | patients apart | colour alone | leak | "
        "updates | seeds | minutes | label"
    ).split(" | ")
    lines = [columns, ["---"] * len(columns)]
    last = None
    for row in rows:
        first, last = row["recipe"] != last, row["recipe"]
        of_recipe = [
            f"{row['updates']:,} of {_count(row['published_updates'])}",
            f"{row['seeds']}, leak {row['leak_seeds']}" if row["leak_seeds"] else str(row["seeds"]),
            f"{row['minutes']:.1f}",
            row["label"] or "-",
        ]
        lines.append(
            [
                row["recipe"] if first else "",
                row["metric"].replace("_", " ").replace("auroc", "AUROC"),
                _share(row["published"]),
                _share(row["corrected"]),
                _mean_sd(row, "as_published"),
                _mean_sd(row, "patients_apart") + _interval(row),
                _share(row["colour_alone"]),
                _mean_sd(row, "leak", sign="+"),
                *(of_recipe if first else [""] * len(of_recipe)),
            ]
        )
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _share(value: float | None, sign: str = "") -> str:
    return "-" if value is None or np.isnan(value) else f"{value:{sign}.3f}"


def _mean_sd(row: Mapping[str, Any], name: str, sign: str = "") -> str:
    text, sd = _share(row[name], sign), row[f"{name}_sd"]
    return text if sd is None or np.isnan(sd) else f"{text} ± {sd:.3f}"


def _interval(row: Mapping[str, Any]) -> str:
    low, high = row["patients_apart_low"], row["patients_apart_high"]
    return "" if low is None or np.isnan(low) else f" ({low:.3f} to {high:.3f})"


def _count(value: float | None) -> str:
    return "?" if value is None or np.isnan(value) else f"{int(value):,}"
