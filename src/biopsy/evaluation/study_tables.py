"""Results of a study: pooled predictions, one row per run, and the variability over seeds."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from biopsy.core.files import write_json
from biopsy.core.text import plural
from biopsy.data.packs import group_by_unit, known_groups
from biopsy.data.predictions import write_predictions
from biopsy.evaluation.scored import ScoredPatches
from biopsy.statistics.intervals import average, describe_method, estimate_metric, measure_groups, replicate
from biopsy.statistics.metrics import measure, registry
from biopsy.statistics.multiclass import classification_report
from biopsy.statistics.resampling import Resampler
from biopsy.training.metrics import (
    Confusion,
    FoldMean,
    FoldResults,
    GroupSpread,
    Metrics,
    PooledMetrics,
    RecipeSummary,
    Spread,
    StudySummary,
)
from biopsy.training.runs import EpochRecord, Run
from biopsy.training.study import Study

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
LAST_EPOCHS = 5  # whose validation AUROC is averaged
SUMMARISED = tuple(dict.fromkeys((*SHOWN, *SHOWN_OF_CLASSES)))


def write_tables(study: Study) -> None:
    """Write ``predictions.parquet``, ``table.csv`` and ``metrics.json`` from the runs evaluated so far."""
    runs = study.evaluated_runs()
    if not runs:
        return
    frames = [
        run.predictions("test")[0].assign(recipe=run.info["recipe"], seed=run.info["seed"]) for run in runs
    ]
    pooled, split = pd.concat(frames, ignore_index=True), study.info["split"]
    write_predictions(
        study.path / "predictions.parquet",
        pooled,
        {
            "pack_sha256": study.info["pack"]["content_sha256"],
            "split": split and split["name"],
            "classifier_sha256": None,
            "threshold": {"rule": "each run's own, chosen on its validation subset"},
        },
    )
    table = pd.DataFrame([describe_run(run) for run in runs])
    study.write_table(table)
    write_json(study.path / "metrics.json", summarise(table, pooled, runs[0].metrics()))


def summarise(table: pd.DataFrame, pooled: pd.DataFrame, metrics: Metrics) -> StudySummary:
    """Return, per recipe, the pooled metrics, their variability over seeds, and the results of each fold.

    Intervals are over patients and do not include the variability over seeds. Seeds without all folds of the
    others are left out of both.

    Args:
        table: One row per run.
        pooled: All test predictions, with ``recipe``, ``fold`` and ``seed``.
        metrics: ``metrics.json`` of any run, for class names and unit.
    """
    recipes = {}
    for recipe, rows in table.groupby("recipe"):
        seeds = [
            ScoredPatches.of_predictions(frame, metrics.class_names, metrics.positive_class, metrics.unit)
            for frame in pool_by_seed(pooled[pooled["recipe"] == recipe])
        ]
        recipes[str(recipe)] = RecipeSummary(
            folds=_summarise_folds(rows),
            groups=summarise_groups(pooled[pooled["recipe"] == recipe], rows, metrics),
            pooled=measure_pooled(seeds),
            within_folds=_average_folds(rows),
            over_seeds=_spread([measure(scored.sample().count()) for scored in seeds]),
        )
    return StudySummary(positive_class=metrics.positive_class, recipes=recipes)


def describe_run(run: Run) -> dict[str, object]:
    """Return the row of a run in ``table.csv``."""
    metrics, (frame, _) = run.metrics(), run.predictions("test")
    baseline = metrics.baseline and metrics.baseline.auroc
    groups = np.unique(group_by_unit(frame, metrics.unit))
    metric_names = SHOWN_OF_CLASSES if metrics.positive_class is None else SHOWN
    return {
        "recipe": run.info["recipe"],
        "fold": run.info["split"]["fold"],
        "seed": run.info["seed"],
        "tested": " ".join(sorted(groups)) if len(groups) <= 3 else f"{len(groups)} {plural(metrics.unit)}",
        "n_patches": metrics.n_patches,
        "n_positive": metrics.confusion and metrics.confusion.tp + metrics.confusion.fn,
        **{name: metrics.patch[name].value for name in metric_names},
        "baseline_auroc": float("nan") if baseline is None else baseline,
        **training_columns(run),
    }


def training_columns(run: Run) -> dict[str, object]:
    """Return the columns of ``table.csv`` on the training of a run."""
    log, threshold = run.log(), run.info["threshold"]
    return {
        "threshold": threshold and threshold["value"],
        "chosen_epoch": run.info["chosen_epoch"],
        "epochs": run.info["epochs_done"],
        "last_epochs_val_auroc": _mean_val_auroc(log[-LAST_EPOCHS:]),
        "last_train_accuracy": log[-1]["accuracy"],
        "last_val_accuracy": log[-1]["val_accuracy"],
        "accuracy_gap": log[-1]["accuracy"] - log[-1]["val_accuracy"],
        "seconds": round(run.info["seconds"], 1),
        "run": run.path.name,
    }


def _mean_val_auroc(log: list[EpochRecord]) -> float | None:
    """Return the mean validation AUROC of epochs, of which single ones estimate it poorly."""
    values = [record["val_auroc"] for record in log if record["val_auroc"] is not None]
    return float(np.mean(values)) if values else None


def _summarise_folds(rows: pd.DataFrame) -> list[dict[str, object]]:
    """Return mean and SD over seeds for every fold, and the gain over the colour-only baseline."""
    result = []
    for fold, fold_rows in rows.groupby("fold", dropna=False):
        gain = fold_rows["auroc"] - fold_rows["baseline_auroc"]
        result.append(
            {
                "fold": None if pd.isna(fold) else int(fold),
                "tested": fold_rows["tested"].iloc[0],
                "n_patches": int(fold_rows["n_patches"].iloc[0]),
                "n_seeds": len(fold_rows),
                **{
                    name: {"mean": fold_rows[name].mean(), "sd": fold_rows[name].std(ddof=1)}
                    for name in SUMMARISED
                    if name in fold_rows
                },
                "baseline_auroc": fold_rows["baseline_auroc"].iloc[0],
                "gain": {"mean": gain.mean(), "sd": gain.std(ddof=1), "min": gain.min(), "max": gain.max()},
            }
        )
    return result


def summarise_groups(pooled: pd.DataFrame, rows: pd.DataFrame, metrics: Metrics) -> list[GroupSpread]:
    """Return the AUROC (for more than two classes, the accuracy) of each patient (slide) over seeds."""
    groups = known_groups(pooled, metrics.unit)
    part = pooled[groups.notna()].assign(group=groups.dropna().astype(str))
    by_seed: dict[str, list[float]] = {}
    for _, frame in part.groupby("seed"):
        for name, value in _measure_groups(frame, metrics).items():
            by_seed.setdefault(name, []).append(value)
    n_patches = part.groupby(["group", "seed"]).size().groupby("group").last()
    baselines = _baseline_by_group(rows)
    return [
        GroupSpread(
            **vars(Spread.of(value for value in values if np.isfinite(value))),
            id=name,
            n_patches=int(n_patches[name]),
            baseline_auroc=baselines.get(name),
        )
        for name, values in by_seed.items()
    ]


def _measure_groups(frame: pd.DataFrame, metrics: Metrics) -> dict[str, float]:
    if metrics.positive_class is None:
        return (frame["target"] == frame["pred"]).groupby(frame["group"]).mean().astype(float).to_dict()
    is_positive = (frame["target"] == metrics.class_names.index(metrics.positive_class)).astype(int)
    names, values = measure_groups(is_positive, frame["prob"], frame["group"].to_numpy())
    return dict(zip(names.tolist(), values["auroc"].tolist(), strict=True))


def _baseline_by_group(rows: pd.DataFrame) -> dict[str, float]:
    """Return the colour-only AUROC of each patient that is the only one tested in a fold."""
    alone = rows[~rows["tested"].astype(str).str.contains(" ")].dropna(subset=["baseline_auroc"])
    return dict(zip(alone["tested"].astype(str), alone["baseline_auroc"].astype(float), strict=True))


def _average_folds(rows: pd.DataFrame) -> dict[str, FoldMean]:
    """Return the metrics within folds, of those that are defined in every fold."""
    metric_names = [name for name in SUMMARISED if name in rows]
    by_fold = rows.groupby("fold", dropna=False)[metric_names].mean()
    return {
        str(name): FoldMean(values.mean(), values.min(), values.max(), len(values))
        for name, values in by_fold.items()
        if values.notna().all()
    }


def measure_folds(rows: pd.DataFrame) -> FoldResults:
    """Return AUROC (accuracy, if no fold tests every class) by fold and its mean over folds.

    Args:
        rows: One row per run of a recipe, as in ``table.csv``.
    """
    metric = "auroc" if rows["auroc"].notna().any() else "accuracy"
    folds = rows.groupby("fold", sort=False)
    by_fold = folds[metric].agg(["mean", "min", "max", "count"]).rename(columns={"count": "n_seeds"})
    if "tested" in rows:
        by_fold.insert(0, "tested", folds["tested"].first())
    baseline = None
    if metric == "auroc" and "baseline_auroc" in rows:
        by_fold["baseline_auroc"] = folds["baseline_auroc"].first().astype(float)
        by_fold["gain"] = by_fold["mean"] - by_fold["baseline_auroc"]
        if by_fold["baseline_auroc"].notna().any():
            baseline = float(by_fold["baseline_auroc"].mean())
    seeds = rows.groupby("seed")[metric].mean()
    return FoldResults(
        metric=metric,
        by_fold=by_fold.reset_index(),
        over_seeds=Spread.of(seeds.dropna()),
        n_seeds=len(seeds),
        baseline_auroc=baseline,
    )


def pool_by_seed(pooled: pd.DataFrame) -> list[pd.DataFrame]:
    """Return predictions per seed, for the seeds with the most common set of finished folds."""
    folds = pooled.fillna({"fold": -1}).groupby("seed")["fold"].agg(lambda values: tuple(sorted(set(values))))
    counts = folds.value_counts().to_dict()
    common = max(counts, key=lambda finished: (counts[finished], len(finished)))
    seeds = [seed for seed, finished in folds.items() if finished == common]
    return [pooled[pooled["seed"] == seed] for seed in seeds]


def measure_pooled(seeds: Sequence[ScoredPatches]) -> PooledMetrics:
    """Return the metrics of the predictions of all seeds.

    The mean over seeds is taken in the sample and in each resample, so the interval is that of the mean and
    does not include the variability over seeds.
    """
    first, samples = seeds[0], [scored.sample() for scored in seeds]
    resampler = Resampler(first.n_groups, unit=first.unit)
    mean = average([replicate(sample, resampler) for sample in samples])
    matrix, confusion = np.sum([scored.confusion() for scored in seeds], axis=0), None
    if first.positive_index is not None:
        confusion = Confusion.of(matrix, first.positive_index)
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
        confusion_matrix=None if confusion else matrix.tolist(),
    )


def _spread(seeds: Sequence[dict[str, float]]) -> dict[str, Spread]:
    """Return the variability over seeds of the pooled metrics that are defined for all seeds."""
    spreads = {name: Spread.of(seed[name] for seed in seeds) for name in SUMMARISED if name in seeds[0]}
    return {name: spread for name, spread in spreads.items() if spread.mean is not None}
