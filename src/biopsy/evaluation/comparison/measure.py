"""Comparison of models on the same test patches: paired differences, variability over seeds, changed patches.

Differences are from the first model, the reference. If both models have several seeds, intervals are over
patients and seeds, and apply to recipes; otherwise they are over patients and apply to two trained networks.
The p-values of several comparisons are corrected by Holm's procedure, per metric.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from biopsy.data.packs import group_by_unit
from biopsy.evaluation.scored import ScoredPatches
from biopsy.statistics.intervals import estimate_metric
from biopsy.statistics.metrics import METRICS, Metric, measure
from biopsy.statistics.multiclass import MULTICLASS_METRICS, ClassSample
from biopsy.statistics.paired import Difference, Sample, adjust_holm, sample_seeds, subtract
from biopsy.statistics.resampling import Interval, Resampler
from biopsy.statistics.weighted_counts import SortedScores
from biopsy.training.metrics import Spread

FORMAT = "biopsy-comparison/1"
RECIPES, NETWORKS = "recipes", "trained networks"
BY_GROUP = ("auroc", "sensitivity", "specificity", "balanced_accuracy")
BY_GROUP_OF_CLASSES = ("accuracy", "f1_weighted")  # defined where a patient lacks a class


@dataclass(frozen=True)
class Source:
    """Origin of a model: a run or, for ``kind`` study, the runs of a recipe over its folds."""

    kind: str
    path: str
    recipe: str
    split: str
    fold: int | None
    patients_overlap: bool | None
    folds: Sequence[int] = ()


@dataclass(frozen=True)
class ModelPredictions:
    """Predictions of a run, or of the runs of one recipe over folds and seeds.

    Attributes:
        seeds: Training seed of each table.
        frames: The predictions of each seed; all models have the same patches in the same order.
    """

    name: str
    seeds: Sequence[int]
    frames: Sequence[pd.DataFrame]
    source: Source

    def is_paired(self, reference: "ModelPredictions") -> bool:
        """Return whether both models have the same seeds."""
        return set(self.seeds) == set(reference.seeds)


@dataclass(frozen=True)
class EvaluationSet:
    """The common test set of all models.

    Attributes:
        pack: ``path`` and ``content_sha256`` of the pack.
        positive_class: The positive class; None for more than two classes.
        unit: Unit of independent observations: patient, slide or patch.
    """

    pack: Mapping[str, str]
    class_names: Sequence[str]
    positive_class: str | None
    unit: str

    def groups(self, frame: pd.DataFrame) -> np.ndarray:
        return group_by_unit(frame, self.unit).astype(object)

    def sample(self, frame: pd.DataFrame) -> SortedScores | ClassSample:
        """Return the predictions of one seed as input of the metrics."""
        return ScoredPatches.of_predictions(frame, self.class_names, self.positive_class, self.unit).sample()

    @property
    def metrics(self) -> Mapping[str, Metric]:
        return MULTICLASS_METRICS if self.positive_class is None else METRICS

    @property
    def by_group(self) -> tuple[str, ...]:
        """Names of the metrics compared within each group."""
        return BY_GROUP if self.positive_class is not None else BY_GROUP_OF_CLASSES


@dataclass(frozen=True)
class SeedSpread(Spread):
    """Variability of a difference between trainings, over ``n`` seeds or pairs of seeds."""

    n: int = 0
    paired: bool = False


@dataclass(frozen=True, kw_only=True)
class MetricDifference(Interval):
    """Difference of a model from the reference, with p-value before and after Holm's correction."""

    p: float | None
    p_holm: float | None
    over_patients: Interval
    over_seeds: SeedSpread


@dataclass(frozen=True)
class ModelDifference:
    """Differences of one model from the reference.

    ``compares``: whether intervals and p-values apply to recipes (several seeds for both) or to two trained
    networks.
    """

    of: str
    to: str
    compares: str
    metrics: dict[str, MetricDifference]


@dataclass(frozen=True, kw_only=True)
class ModelResult(Source):
    """A model's own metrics."""

    name: str
    seeds: Sequence[int]
    patch: dict[str, Interval]
    over_seeds: dict[str, Spread]


@dataclass(frozen=True)
class GroupResult:
    """Metrics and differences of one patient (slide) by model, without intervals."""

    group: str
    n_patches: int
    per_class: dict[str, int]
    values: dict[str, dict[str, float]]
    differences: dict[str, dict[str, SeedSpread]]


@dataclass(frozen=True)
class Turned:
    """Number of patches whose prediction changed from correct to wrong and from wrong to correct."""

    n_patches: int
    turned_wrong: int
    turned_right: int


@dataclass(frozen=True, kw_only=True)
class ChangedPredictions:
    """Changed predictions between two models; McNemar's p assumes independent patches."""

    before: str
    after: str
    both_right: int
    both_wrong: int
    turned_wrong: int
    turned_right: int
    mcnemar_p_if_patches_were_independent: float
    by_class: dict[str, Turned]
    by_group: dict[str, Turned]


@dataclass(frozen=True)
class PairedIntervals:
    """How the intervals of differences are made."""

    level: float
    method: str
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class ComparisonDocument:
    """Content of ``comparison.json``; see the file formats page."""

    format: str = FORMAT
    reference: str
    metric: str
    pack: Mapping[str, str]
    class_names: list[str]
    positive_class: str | None
    unit: str
    n_patches: int
    n_patients: int
    interval: PairedIntervals
    correction: str = "Holm over the comparisons, metric by metric"
    models: list[ModelResult]
    differences: list[ModelDifference]
    by_group: list[GroupResult]
    changed: ChangedPredictions | None = None


def compare_models(
    models: Sequence[ModelPredictions], test_set: EvaluationSet, *, metric: str = "auroc"
) -> ComparisonDocument:
    """Compare models, without the entry ``changed``.

    Args:
        models: Two or more, the reference first.
        metric: Primary metric, chosen in advance.
    """
    samples = [sample_model(model, test_set) for model in models]
    resampler = samples[0].result.resampler
    return ComparisonDocument(
        reference=models[0].name,
        metric=metric,
        pack=test_set.pack,
        class_names=list(test_set.class_names),
        positive_class=test_set.positive_class,
        unit=test_set.unit,
        n_patches=len(models[0].frames[0]),
        n_patients=resampler.n_groups,
        interval=PairedIntervals(resampler.level, f"paired {resampler.method}, Student's t"),
        models=[_describe(model, sample, test_set) for model, sample in zip(models, samples, strict=True)],
        differences=_subtract_all(models, samples, test_set),
        by_group=[] if test_set.unit == "patch" else _compare_groups(models, test_set),
    )


def sample_model(model: ModelPredictions, test_set: EvaluationSet) -> Sample:
    """Return the metrics of a model, mean over its seeds, on the sample and on every resample of groups."""
    samples = [test_set.sample(frame) for frame in model.frames]
    return sample_seeds(samples, Resampler(len(samples[0].groups), unit=test_set.unit))


def measure_seeds(
    frames: Sequence[pd.DataFrame], test_set: EvaluationSet, names: Sequence[str] | None = None
) -> dict[str, list[float]]:
    """Return the values of each metric by seed."""
    rows = [measure(test_set.sample(frame).count(), names) for frame in frames]
    return {name: [row[name] for row in rows] for name in rows[0]}


def _describe(model: ModelPredictions, sample: Sample, test_set: EvaluationSet) -> ModelResult:
    spreads = {name: Spread.of(values) for name, values in sample.by_seed.items()}
    return ModelResult(
        **vars(model.source),
        name=model.name,
        seeds=model.seeds,
        patch={
            name: estimate_metric(metric, sample.samples[0], sample.result)
            for name, metric in test_set.metrics.items()
        },
        over_seeds={name: spread for name, spread in spreads.items() if spread.mean is not None},
    )


def _subtract_all(
    models: Sequence[ModelPredictions], samples: Sequence[Sample], test_set: EvaluationSet
) -> list[ModelDifference]:
    """Return the differences of each model from the reference, with p-values corrected over the models."""
    reference, base = models[0], samples[0]
    results: list[dict[str, Difference]] = [subtract(sample, base) for sample in samples[1:]]
    holm = {name: adjust_holm([result[name].p for result in results]) for name in test_set.metrics}
    differences = []
    for index, (model, sample, result) in enumerate(zip(models[1:], samples[1:], results, strict=True)):
        metrics = {
            name: MetricDifference(
                **vars(difference.interval),
                p=difference.p,
                p_holm=holm[name][index],
                over_patients=difference.over_patients,
                over_seeds=spread_seeds(sample.by_seed[name], base.by_seed[name], model.is_paired(reference)),
            )
            for name, difference in result.items()
        }
        compares = RECIPES if min(len(reference.frames), len(model.frames)) > 1 else NETWORKS
        differences.append(ModelDifference(model.name, reference.name, compares, metrics))
    return differences


def spread_seeds(
    first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray, paired: bool
) -> SeedSpread:
    """Return the variability of a difference between trainings.

    Args:
        first: Metric of the first model by seed.
        second: Metric of the second model by seed.
        paired: Whether both have the same seeds, with one difference per seed. Otherwise all pairs of seeds
            are compared, and ``sd`` is the root of the sum of both variances.
    """
    if np.isnan([*first, *second]).any():
        return SeedSpread(paired=paired)
    differences = np.subtract(first, second) if paired else np.subtract.outer(first, second).ravel()
    spread = Spread.of(differences)
    if not paired:
        has_sd = min(len(first), len(second)) > 1
        sd = float(np.hypot(np.std(first, ddof=1), np.std(second, ddof=1))) if has_sd else None
        spread = replace(spread, sd=sd)
    return SeedSpread(**vars(spread), n=len(differences), paired=paired)


def _compare_groups(models: Sequence[ModelPredictions], test_set: EvaluationSet) -> list[GroupResult]:
    groups, results = test_set.groups(models[0].frames[0]), []
    target = models[0].frames[0]["target"].to_numpy(int)
    for group in sorted(set(groups.tolist())):
        rows = np.flatnonzero(groups == group)
        measured = {
            model.name: measure_seeds([f.iloc[rows] for f in model.frames], test_set, test_set.by_group)
            for model in models
        }
        base = measured[models[0].name]
        results.append(
            GroupResult(
                group=group,
                n_patches=len(rows),
                per_class={
                    name: int((target[rows] == index).sum())
                    for index, name in enumerate(test_set.class_names)
                },
                values={
                    model: {name: float(np.mean(seeds)) for name, seeds in values.items()}
                    for model, values in measured.items()
                },
                differences={
                    model.name: {
                        name: spread_seeds(values, base[name], model.is_paired(models[0]))
                        for name, values in measured[model.name].items()
                    }
                    for model in models[1:]
                },
            )
        )
    return results


def find_changed(
    before: ModelPredictions, after: ModelPredictions, test_set: EvaluationSet
) -> tuple[pd.DataFrame, ChangedPredictions]:
    """Find the patches whose prediction changed from correct to wrong or from wrong to correct.

    With several seeds, the prediction of a patch is the majority vote.

    Returns:
        One row per changed patch, largest change of the true class's probability first; and the counts, by
        class and by patient.
    """
    frame = before.frames[0]
    target, index = frame["target"].to_numpy(int), np.arange(len(frame))
    pred_before, prob_before = _vote(before, test_set)
    pred_after, prob_after = _vote(after, test_set)
    right_before, right_after = pred_before == target, pred_after == target
    names = np.array(test_set.class_names, dtype=object)
    table = frame[["patch_id", "patient_id", "slide_id", "x", "y"]].assign(
        target=names[target],
        pred_before=names[pred_before],
        pred_after=names[pred_after],
        prob_true_before=prob_before[index, target],
        prob_true_after=prob_after[index, target],
    )
    table["change"] = table["prob_true_after"] - table["prob_true_before"]
    table["turned"] = np.select(
        [right_before & ~right_after, ~right_before & right_after], ["wrong", "right"], ""
    )
    changed = table[table["turned"] != ""]
    order = changed["change"].abs().sort_values(ascending=False, kind="stable").index
    lost, gained = (int((table["turned"] == to).sum()) for to in ("wrong", "right"))
    p = float(binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0
    summary = ChangedPredictions(
        before=before.name,
        after=after.name,
        both_right=int((right_before & right_after).sum()),
        both_wrong=int((~right_before & ~right_after).sum()),
        turned_wrong=lost,
        turned_right=gained,
        mcnemar_p_if_patches_were_independent=p,
        by_class=_count_changed(table, table["target"].to_numpy()),
        by_group={} if test_set.unit == "patch" else _count_changed(table, test_set.groups(frame)),
    )
    return changed.loc[order].reset_index(drop=True), summary


def _vote(model: ModelPredictions, test_set: EvaluationSet) -> tuple[np.ndarray, np.ndarray]:
    """Return the majority vote of the seeds, ties to the more probable class, and the mean probabilities."""
    probs = np.mean(
        [frame[[f"prob_{name}" for name in test_set.class_names]].to_numpy() for frame in model.frames],
        axis=0,
    )
    votes = sum(np.eye(len(test_set.class_names))[frame["pred"].to_numpy(int)] for frame in model.frames)
    return (votes + probs / 2).argmax(axis=1), probs


def _count_changed(table: pd.DataFrame, by: np.ndarray) -> dict[str, Turned]:
    return {
        str(name): Turned(len(rows), int((rows == "wrong").sum()), int((rows == "right").sum()))
        for name, rows in table["turned"].groupby(by)
    }
