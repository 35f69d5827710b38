"""Classifiers compared on the same test patches: paired differences, the spread over seeds, what changed.

The first is the reference: a difference is another's number less its own. With several seeds on both sides
intervals are over patients and seeds, and speak of recipes; with one seed they are over patients and speak of
two trained networks. The p-values of several comparisons are corrected by Holm's procedure, metric by metric.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from biopsy.data.packs import group_by_unit
from biopsy.evaluation.scored import ScoredPatches
from biopsy.evaluation.study_tables import Spread
from biopsy.statistics.intervals import estimate_metric
from biopsy.statistics.metrics import METRICS, Metric, measure
from biopsy.statistics.multiclass import MULTICLASS_METRICS, ClassSample
from biopsy.statistics.paired import Difference, Sample, adjust_holm, sample_seeds, subtract
from biopsy.statistics.resampling import Resampler
from biopsy.statistics.weighted_counts import SortedScores

FORMAT = "biopsy-comparison/1"
RECIPES, NETWORKS = "recipes", "trained networks"
BY_GROUP = ("auroc", "sensitivity", "specificity", "balanced_accuracy")
BY_GROUP_OF_CLASSES = ("accuracy", "f1_weighted")  # defined where a patient lacks a class


@dataclass(frozen=True)
class ModelPredictions:
    """One of those compared: a run, or the runs of one recipe over folds and seeds.

    Attributes:
        name: Told apart from the others' names.
        seeds: Training seeds, one a table.
        frames: The predictions of each seed; all models have the same patches in the same order.
        about: Where it comes from: ``kind``, ``path``, ``recipe``, ``split``, ``fold``.
    """

    name: str
    seeds: Sequence[int]
    frames: Sequence[pd.DataFrame]
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluationSet:
    """What all models were tested on.

    Attributes:
        pack: Path and hash of the pack.
        class_names: Names by class index.
        positive_class: One of them; None with more than two.
        unit: What counts as one independent observation: patient, slide or patch.
    """

    pack: Mapping[str, Any]
    class_names: Sequence[str]
    positive_class: str | None
    unit: str

    def groups(self, frame: pd.DataFrame) -> np.ndarray:
        """Return the id of each patch's unit."""
        return group_by_unit(frame, self.unit).astype(object)

    def sample(self, frame: pd.DataFrame) -> SortedScores | ClassSample:
        """Return what one seed says, ready for metrics."""
        return ScoredPatches.of_predictions(frame, self.class_names, self.positive_class, self.unit).sample()

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """What is compared, by name."""
        return MULTICLASS_METRICS if self.positive_class is None else METRICS

    @property
    def by_group(self) -> tuple[str, ...]:
        """What is compared within each patient."""
        return BY_GROUP if self.positive_class is not None else BY_GROUP_OF_CLASSES


def compare_models(
    models: Sequence[ModelPredictions], test_set: EvaluationSet, *, metric: str = "auroc"
) -> dict[str, Any]:
    """Return what ``comparison.json`` holds, but for what changed from patch to patch.

    Args:
        models: Two or more, the reference first.
        metric: The one that was to answer, chosen before looking.
    """
    samples = [sample_model(model, test_set) for model in models]
    result, frame = samples[0].result, models[0].frames[0]
    return {
        "format": FORMAT,
        "reference": models[0].name,
        "metric": metric,
        "pack": test_set.pack,
        "class_names": list(test_set.class_names),
        "positive_class": test_set.positive_class,
        "unit": test_set.unit,
        "n_patches": len(frame),
        "n_patients": result.resampler.n_groups,
        "interval": {
            "level": result.resampler.level,
            "method": f"paired {result.resampler.method}, Student's t",
            "seed": 0,
        },
        "correction": "Holm over the comparisons, metric by metric",
        "models": [
            {
                "name": model.name,
                "seeds": list(model.seeds),
                **model.about,
                **_describe(sample, test_set),
            }
            for model, sample in zip(models, samples, strict=True)
        ],
        "differences": _subtract_all(models, samples, test_set),
        "by_group": [] if test_set.unit == "patch" else _compare_groups(models, test_set),
    }


def sample_model(model: ModelPredictions, test_set: EvaluationSet) -> Sample:
    """Measure a model, the mean of its seeds, on the sample and on every reweighting of the patients."""
    samples = [test_set.sample(frame) for frame in model.frames]
    return sample_seeds(samples, Resampler(len(samples[0].groups), unit=test_set.unit))


def measure_seeds(
    frames: Sequence[pd.DataFrame], test_set: EvaluationSet, names: Sequence[str] | None = None
) -> dict[str, list[float]]:
    """Return each metric of each seed."""
    rows = [measure(test_set.sample(frame).count(), names) for frame in frames]
    return {name: [row[name] for row in rows] for name in rows[0]}


def _describe(sample: Sample, test_set: EvaluationSet) -> dict[str, Any]:
    """Return a model's own numbers."""
    spreads = {name: Spread.of(values) for name, values in sample.by_seed.items()}
    over_seeds = {name: spread for name, spread in spreads.items() if spread.mean is not None}
    values = {
        name: estimate_metric(metric, sample.samples[0], sample.result)
        for name, metric in test_set.metrics.items()
    }
    return {"patch": values, "over_seeds": over_seeds}


def _subtract_all(
    models: Sequence[ModelPredictions], samples: Sequence[Sample], test_set: EvaluationSet
) -> list[dict[str, Any]]:
    """Return each model's differences from the reference, with corrected p-values and the spread over seeds.

    ``compares`` says whether interval and p-value speak of recipes (several seeds on both sides) or of two
    trained networks.
    """
    result: list[dict[str, Difference]] = [subtract(sample, samples[0]) for sample in samples[1:]]
    holm = {name: adjust_holm([one[name].p for one in result]) for name in test_set.metrics}
    paired = [set(model.seeds) == set(models[0].seeds) for model in models]
    return [
        {
            "of": models[place].name,
            "to": models[0].name,
            "compares": RECIPES if min(len(models[0].frames), len(models[place].frames)) > 1 else NETWORKS,
            "metrics": {
                name: {
                    **vars(difference.interval),
                    "p": difference.p,
                    "p_holm": holm[name][place - 1],
                    "over_patients": difference.over_patients,
                    "over_seeds": spread_seeds(
                        samples[place].by_seed[name], samples[0].by_seed[name], paired[place]
                    ),
                }
                for name, difference in one.items()
            },
        }
        for place, one in enumerate(result, start=1)
    ]


def spread_seeds(
    first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray, paired: bool
) -> dict[str, Any]:
    """Return how far a difference moves from training to training.

    Args:
        first: A number of each seed of the one.
        second: The same of the other.
        paired: Whether both have the same seeds: then each seed gives a difference. Otherwise every seed of
            the one is set against every seed of the other, and ``sd`` adds the two variances.
    """
    if np.isnan([*first, *second]).any():
        return {"mean": None, "sd": None, "min": None, "max": None, "n": 0, "paired": paired}
    differences = np.subtract(first, second) if paired else np.subtract.outer(first, second).ravel()
    if paired:
        sd = _sd(differences)
    else:
        of_each = _sd(first), _sd(second)
        sd = None if None in of_each else float(np.hypot(*of_each))  # type: ignore[arg-type]
    return {
        "mean": float(np.mean(first) - np.mean(second)),
        "sd": sd,
        "min": float(differences.min()),
        "max": float(differences.max()),
        "n": len(differences),
        "paired": paired,
    }


def _sd(values: Sequence[float] | np.ndarray) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _compare_groups(models: Sequence[ModelPredictions], test_set: EvaluationSet) -> list[dict[str, Any]]:
    """Return every patient's (slide's) own numbers and differences, without intervals: it is one patient."""
    groups, result = test_set.groups(models[0].frames[0]), []
    target = models[0].frames[0]["target"].to_numpy(int)
    for group in sorted(set(groups.tolist())):
        rows = np.flatnonzero(groups == group)
        item = [
            measure_seeds([f.iloc[rows] for f in model.frames], test_set, test_set.by_group)
            for model in models
        ]
        result.append(
            {
                "group": group,
                "n_patches": len(rows),
                "per_class": {
                    name: int((target[rows] == place).sum())
                    for place, name in enumerate(test_set.class_names)
                },
                "values": {
                    model.name: {name: float(np.mean(seeds)) for name, seeds in values.items()}
                    for model, values in zip(models, item, strict=True)
                },
                "differences": {
                    model.name: {
                        name: spread_seeds(
                            values[name], item[0][name], set(model.seeds) == set(models[0].seeds)
                        )
                        for name in test_set.by_group
                    }
                    for model, values in zip(models[1:], item[1:], strict=True)
                },
            }
        )
    return result


def find_changed(
    before: ModelPredictions, after: ModelPredictions, test_set: EvaluationSet
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Find the patches whose call turned from right to wrong or back.

    With several seeds a patch is called what most of them call it.

    Returns:
        A row a patch that turned, the greatest change of the true class's probability first; and counts, by
        class and by patient. McNemar's exact p-value takes patches for independent, which they are not.
    """
    frame = before.frames[0]
    target, index = frame["target"].to_numpy(int), np.arange(len(frame))
    (calls_before, prob_before), (calls_after, prob_after) = (_vote(one, test_set) for one in (before, after))
    right_before, right_after = calls_before == target, calls_after == target
    names = np.array(test_set.class_names, dtype=object)
    table = frame[["patch_id", "patient_id", "slide_id", "x", "y"]].assign(
        target=names[target],
        pred_before=names[calls_before],
        pred_after=names[calls_after],
        prob_true_before=prob_before[index, target],
        prob_true_after=prob_after[index, target],
    )
    table["change"] = table["prob_true_after"] - table["prob_true_before"]
    table["turned"] = np.select(
        [right_before & ~right_after, ~right_before & right_after], ["wrong", "right"], ""
    )
    turned = table[table["turned"] != ""]
    order = turned["change"].abs().sort_values(ascending=False, kind="stable").index
    lost, gained = (int((table["turned"] == to).sum()) for to in ("wrong", "right"))
    p = float(binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0
    summary: dict[str, Any] = {
        "before": before.name,
        "after": after.name,
        "both_right": int((right_before & right_after).sum()),
        "both_wrong": int((~right_before & ~right_after).sum()),
        "turned_wrong": lost,
        "turned_right": gained,
        "mcnemar_p_if_patches_were_independent": p,
        "by_class": _count_turned(table, table["target"].to_numpy()),
        "by_group": {} if test_set.unit == "patch" else _count_turned(table, test_set.groups(frame)),
    }
    return turned.loc[order].reset_index(drop=True), summary


def _vote(model: ModelPredictions, test_set: EvaluationSet) -> tuple[np.ndarray, np.ndarray]:
    """Return the class most seeds call, ties to the likelier, and mean probabilities ``(n, n_classes)``."""
    probs = np.mean(
        [frame[[f"prob_{name}" for name in test_set.class_names]].to_numpy() for frame in model.frames],
        axis=0,
    )
    votes = sum(np.eye(len(test_set.class_names))[frame["pred"].to_numpy(int)] for frame in model.frames)
    return (votes + probs / 2).argmax(axis=1), probs


def _count_turned(table: pd.DataFrame, by: np.ndarray) -> dict[str, dict[str, int]]:
    return {
        str(name): {
            "n_patches": len(rows),
            "turned_wrong": int((rows == "wrong").sum()),
            "turned_right": int((rows == "right").sum()),
        }
        for name, rows in table["turned"].groupby(by)
    }
