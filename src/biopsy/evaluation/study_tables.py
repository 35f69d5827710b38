"""What a study's runs add up to: pooled predictions, one row a run, and the spread over seeds."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from biopsy.core.files import write_json
from biopsy.data.packs import group_by_unit
from biopsy.data.predictions import write_predictions
from biopsy.evaluation.measure import Confusion
from biopsy.evaluation.scored import ScoredPatches
from biopsy.statistics.intervals import IntervalMethod, average, describe_method, estimate_metric, replicate
from biopsy.statistics.metrics import measure, registry
from biopsy.statistics.multiclass import ClassReport, classification_report
from biopsy.statistics.resampling import Interval, Resampler
from biopsy.training.runs import EpochRecord, Run
from biopsy.training.study import Study

SUMMARY_FORMAT = "biopsy-study-metrics/1"
SHOWN = (
    "auroc",
    "auprc",
    "sensitivity",
    "specificity",
    "balanced_accuracy",
    "f1",
    "accuracy",
    "brier",
    "ece",
    "calibration_slope",
)
SHOWN_OF_CLASSES = ("auroc", "accuracy", "balanced_accuracy", "f1_macro", "kappa", "nll", "brier", "ece")


@dataclass(frozen=True)
class Spread:
    """Mean, standard deviation, least and greatest of some values; None where there are none."""

    mean: float | None = None
    sd: float | None = None
    min: float | None = None
    max: float | None = None

    @classmethod
    def of(cls, values: Iterable[float | None]) -> "Spread":
        """Summarise values; without a mean where there is none, or one is not finite.

        Example:
            >>> Spread.of([0.5, 0.75]).mean
            0.625
        """
        given = np.array([value for value in values if value is not None], dtype=float)
        if not len(given) or not np.isfinite(given).all():
            return cls()
        sd = float(given.std(ddof=1)) if len(given) > 1 else None
        return cls(float(given.mean()), sd, float(given.min()), float(given.max()))


def write_tables(study: Study) -> None:
    """Write ``predictions.parquet``, ``table.csv`` and ``metrics.json`` from the runs judged so far."""
    runs = study.evaluated_runs()
    if not runs:
        return
    frames = [
        run.predictions("test")[0].assign(recipe=run.info["recipe"], seed=run.info["seed"]) for run in runs
    ]
    pooled = pd.concat(frames, ignore_index=True)
    write_predictions(
        study.path / "predictions.parquet",
        pooled,
        {
            "pack_sha256": study.info["pack"]["content_sha256"],
            "split": study.info["split"]["name"],
            "classifier_sha256": None,
            "threshold": {"rule": "each run's own, chosen on its validation subset"},
        },
    )
    table = pd.DataFrame([describe_run(run) for run in runs])
    study.write_table(table)
    write_json(study.path / "metrics.json", summarise(table, pooled, runs[0].metrics()))


def summarise(table: pd.DataFrame, pooled: pd.DataFrame, metrics: dict[str, Any]) -> dict[str, Any]:
    """Return, per recipe, the pooled numbers, their spread over seeds, and what was gained on each fold.

    Intervals are over patients, within one seed; the spread over seeds stands apart from them. A seed that
    has not judged the folds that the others have, or diverged on one, is in neither.

    Args:
        table: One row a run.
        pooled: All test predictions, with ``recipe``, ``fold`` and ``seed``.
        metrics: ``metrics.json`` of any of the runs, for class names and unit.
    """
    document: dict[str, Any] = {
        "format": SUMMARY_FORMAT,
        "positive_class": metrics["positive_class"],
        "recipes": {},
    }
    for recipe, rows in table.groupby("recipe"):
        entry: dict[str, Any] = {"folds": _summarise_folds(rows)}
        seeds = [
            ScoredPatches.of_predictions(
                frame, metrics["class_names"], metrics["positive_class"], metrics["unit"]
            )
            for frame in pool_by_seed(pooled[pooled["recipe"] == recipe])
        ]
        entry["pooled"] = measure_pooled(seeds)
        entry["within_folds"] = _average_folds(rows)
        entry["over_seeds"] = _spread([measure(one.sample().count()) for one in seeds])
        document["recipes"][recipe] = entry
    return document


def describe_run(run: Run) -> dict[str, Any]:
    """Return a run's row of ``table.csv``."""
    metrics, (frame, _) = run.metrics(), run.predictions("test")
    groups = np.unique(group_by_unit(frame, metrics["unit"]))
    values, shown = metrics["patch"], _shown(metrics["positive_class"])
    baseline = metrics["baseline"] or {}
    return {
        "recipe": run.info["recipe"],
        "fold": run.info["split"]["fold"],
        "seed": run.info["seed"],
        "tested": " ".join(sorted(groups)) if len(groups) <= 3 else f"{len(groups)} {metrics['unit']}s",
        "n_patches": metrics["n_patches"],
        "n_positive": metrics["confusion"] and metrics["confusion"]["tp"] + metrics["confusion"]["fn"],
        **{name: _or_nan(values[name]["value"]) for name in shown},
        "baseline_auroc": _or_nan(baseline.get("auroc")),
        **training_columns(run),
    }


def training_columns(run: Run) -> dict[str, Any]:
    """Return what a run's row of ``table.csv`` says of its training."""
    log = run.log()
    return {
        "threshold": (run.info["threshold"] or {}).get("value"),
        "chosen_epoch": run.info["chosen_epoch"],
        "epochs": run.info["epochs_done"],
        "last_epochs_val_auroc": _mean_of_last(log),
        "last_train_accuracy": log[-1]["accuracy"],
        "last_val_accuracy": log[-1]["val_accuracy"],
        "accuracy_gap": log[-1]["accuracy"] - log[-1]["val_accuracy"],
        "seconds": round(run.info["seconds"], 1),
        "run": run.path.name,
    }


def _shown(positive_class: str | None) -> tuple[str, ...]:
    return SHOWN_OF_CLASSES if positive_class is None else SHOWN


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value


def _mean_of_last(log: list[EpochRecord], n_epochs: int = 5) -> float | None:
    """Return the mean validation AUROC of the last epochs: single epochs swing."""
    values = [record["val_auroc"] for record in log[-n_epochs:] if record["val_auroc"] is not None]
    return float(np.mean(values)) if values else None


def _summarise_folds(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """Return mean and spread over seeds on every fold, and the gain over colour alone on the same patches."""
    result = []
    for fold, of_fold in rows.groupby("fold", dropna=False):
        gain = of_fold["auroc"] - of_fold["baseline_auroc"]
        shown = [name for name in dict.fromkeys((*SHOWN, *SHOWN_OF_CLASSES)) if name in of_fold]
        result.append(
            {
                "fold": None if pd.isna(fold) else int(fold),
                "tested": of_fold["tested"].iloc[0],
                "n_patches": int(of_fold["n_patches"].iloc[0]),
                "n_seeds": len(of_fold),
                **{name: {"mean": of_fold[name].mean(), "sd": of_fold[name].std(ddof=1)} for name in shown},
                "baseline_auroc": of_fold["baseline_auroc"].iloc[0],
                "gain": {"mean": gain.mean(), "sd": gain.std(ddof=1), "min": gain.min(), "max": gain.max()},
            }
        )
    return result


def _average_folds(rows: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Return the mean over folds of each fold's own metrics (means over its seeds), least and greatest.

    Pooled, predictions of different folds' models are ranked together; here each model is judged by itself.
    """
    shown = [name for name in dict.fromkeys((*SHOWN, *SHOWN_OF_CLASSES)) if name in rows]
    by_fold = rows.groupby("fold", dropna=False)[shown].mean()
    return {
        name: {"mean": values.mean(), "min": values.min(), "max": values.max(), "n_folds": len(values)}
        for name, values in by_fold.items()
        if values.notna().all()
    }


def pool_by_seed(pooled: pd.DataFrame) -> list[pd.DataFrame]:
    """Return predictions per seed, of the seeds that have finished the folds that most have finished."""
    folds = pooled.fillna({"fold": -1}).groupby("seed")["fold"].agg(lambda values: tuple(sorted(set(values))))
    counts = folds.value_counts().to_dict()
    widest = max(counts, key=lambda found: (counts[found], len(found)))
    return [pooled[pooled["seed"] == seed] for seed in folds.index[[found == widest for found in folds]]]


@dataclass(frozen=True, kw_only=True)
class PooledMetrics:
    """Metrics of out-of-fold predictions, means over seeds with intervals over patients; counts are sums."""

    n_patches: int
    n_patients: int
    n_seeds: int
    class_names: list[str]
    patch: dict[str, Interval]
    classification_report: list[ClassReport]
    interval: IntervalMethod
    confusion: Confusion | None
    confusion_matrix: np.ndarray | None


def measure_pooled(seeds: Sequence[ScoredPatches]) -> PooledMetrics:
    """Measure the predictions of each seed.

    The mean over seeds is taken in the sample and in each of its reweightings, so the interval is that of the
    mean and says nothing of the spread between seeds.
    """
    first, samples = seeds[0], [scored.sample() for scored in seeds]
    resampler = Resampler(first.n_groups, unit=first.unit)
    mean = average([replicate(sample, resampler) for sample in samples])
    matrix, confusion = np.sum([scored.confusion() for scored in seeds], axis=0), None
    if first.positive_index is not None:
        positive, negative = first.positive_index, 1 - first.positive_index
        cells = (positive, positive), (negative, positive), (positive, negative), (negative, negative)
        confusion = Confusion(*(int(matrix[cell]) for cell in cells))
    return PooledMetrics(
        n_patches=len(first),
        n_patients=resampler.n_groups,
        n_seeds=len(seeds),
        class_names=list(first.class_names),
        patch={
            name: estimate_metric(metric, samples[0], mean)
            for name, metric in registry(type(samples[0].count())).items()
        },
        classification_report=classification_report(matrix, first.class_names),
        interval=describe_method(resampler.n_groups, seed=0, unit=first.unit),
        confusion=confusion,
        confusion_matrix=None if confusion else matrix,
    )


def _spread(seeds: Sequence[dict[str, float]]) -> dict[str, Spread]:
    """Return the spread over seeds of the pooled metrics that are defined for all."""
    shown = [name for name in dict.fromkeys((*SHOWN, *SHOWN_OF_CLASSES)) if name in seeds[0]]
    spreads = {name: Spread.of(seed[name] for seed in seeds) for name in shown}
    return {name: spread for name, spread in spreads.items() if spread.mean is not None}
