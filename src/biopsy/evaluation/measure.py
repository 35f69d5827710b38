"""Measurements of scored patches: metrics, operating points, net benefit, subgroups."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from biopsy.data.pack_files import COLUMNS
from biopsy.evaluation.scored import ScoredPatches, confusion_matrix
from biopsy.models.classifier import Threshold
from biopsy.statistics.calibration import ece_floor
from biopsy.statistics.decisions import (
    DecisionCounts,
    count_decisions,
    estimate_benefit_gain,
    estimate_net_benefit,
    estimate_predictive_values,
    estimate_rates,
    net_benefit,
    parse_rule,
)
from biopsy.statistics.intervals import (
    estimate_metrics,
    estimate_one_vs_rest,
    estimate_patient_metrics,
    measure_groups,
)
from biopsy.statistics.multiclass import ClassSample, classification_report
from biopsy.training.metrics import (
    AtPrevalence,
    Confusion,
    DecisionCurve,
    Decisions,
    GroupMetrics,
    NetBenefit,
    OperatingPoint,
    Performance,
    PredictiveValues,
    Subgroup,
)

CURVE = np.arange(1, 100) / 100  # threshold probabilities of the decision curve
MARKED = np.arange(1, 20) / 20  # threshold probabilities with an interval

SHOWN = ("auroc", "sensitivity", "specificity", "balanced_accuracy")
SHOWN_OF_CLASSES = ("accuracy", "balanced_accuracy", "f1_macro", "auroc")
MAX_VALUES = 12  # distinct values of a column
RELABELLED = ("label_before", "label_by", "label_at")
PCAM = ("coord_x", "coord_y", "tumor_patch", "center_tumor_patch")  # duplicate position and label
OWN_COLUMNS = {*COLUMNS, "official_subset", "row", "label_share", *RELABELLED, *PCAM}


def measure_performance(scored: ScoredPatches, threshold: float | None) -> Performance:
    """Return the metrics over patches and over patients, at a threshold (0.5 if None) and at 0.5."""
    sample, matrix = scored.sample(), scored.confusion()
    report = classification_report(matrix, scored.class_names)
    pooled = estimate_metrics(sample, **scored.resampling)
    if isinstance(sample, ClassSample):
        return Performance(
            patch=pooled,
            classification_report=report,
            confusion_matrix=matrix.tolist(),
            one_vs_rest=estimate_one_vs_rest(sample, **scored.resampling),
        )
    truth, prob, value = scored.is_positive, scored.prob, 0.5 if threshold is None else threshold
    patients = None
    if scored.unit != "patch":
        patients = estimate_patient_metrics(truth, prob, scored.group_ids, value, unit=scored.unit)
    return Performance(
        patch=pooled,
        classification_report=report,
        confusion=Confusion.of(confusion_matrix(truth, prob >= value, 2), 1),
        at_half=Confusion.of(confusion_matrix(truth, prob >= 0.5, 2), 1),
        prevalence=float(truth.mean()),
        ece_floor=ece_floor(prob, seed=scored.seed),
        patient=patients,
    )


def measure_decisions(
    scored: ScoredPatches, thresholds: Sequence[Threshold], *, prevalence: float | None = None
) -> Decisions:
    """Return operating points, decision curve and, with a prevalence, predictive values, for two classes.

    Args:
        thresholds: As in ``classifier.json``: ``value``, ``rule``, ``chosen_on`` and the rates there.

    Raises:
        MetricError: If the prevalence is not between 0 and 1.
    """
    if scored.positive_class is None:
        return Decisions()
    truth, prob = scored.is_positive, scored.prob
    at = [*(threshold["value"] for threshold in thresholds), *MARKED]
    calls = count_decisions(truth, prob, scored.group_ids, at, **scored.resampling)
    values = None
    if prevalence is not None:
        points = [
            PredictiveValues(
                threshold["rule"], threshold["value"], **estimate_predictive_values(calls, k, prevalence)
            )
            for k, threshold in enumerate(thresholds)
        ]
        values = AtPrevalence(prevalence, points)
    marked = [
        NetBenefit(
            **vars(estimate_net_benefit(calls, k)),
            threshold=float(value),
            gain=estimate_benefit_gain(calls, k),
        )
        for k, value in enumerate(MARKED, start=len(thresholds))
    ]
    model, treat_all = (net_benefit(truth, values, CURVE).tolist() for values in (prob, np.ones(len(truth))))
    return Decisions(
        operating_points=[_operating_point(calls, k, threshold) for k, threshold in enumerate(thresholds)],
        decision_curve=DecisionCurve(CURVE.tolist(), model, treat_all, marked),
        at_prevalence=values,
    )


def _operating_point(calls: DecisionCounts, k: int, threshold: Threshold) -> OperatingPoint:
    rates, rule = estimate_rates(calls, k), threshold["rule"]
    name = rule.partition("=")[0]
    chosen = {"sensitivity": threshold.get("sensitivity"), "specificity": threshold.get("specificity")}
    return OperatingPoint(
        rule=rule,
        threshold=threshold["value"],
        chosen_on=threshold["chosen_on"],
        target={name: parse_rule(rule)[1]} if name in chosen else None,
        where_chosen=chosen,
        achieved=rates,
        drift={name: None if value is None else rates[name].value - value for name, value in chosen.items()},
    )


def measure_each_group(
    scored: ScoredPatches, groups: pd.Series, threshold: float | None
) -> list[GroupMetrics]:
    """Return the results within each patient (slide), in the order of their ids.

    Args:
        groups: From `known_groups`: the patient of each patch; patches without one are left out.
        threshold: Threshold of two classes (0.5 if None).
    """
    known = groups.notna().to_numpy()
    part, ids = scored.take(known), groups[known].astype(str).to_numpy()
    if not len(part):
        return []
    names, index = np.unique(ids, return_inverse=True)
    shape = (len(names), len(part.class_names))
    counts = np.bincount(index * shape[1] + part.target, minlength=shape[0] * shape[1]).reshape(shape)
    correct = np.bincount(index, part.pred == part.target).astype(int)
    if part.positive_class is None:
        values = {"accuracy": correct / counts.sum(axis=1)}
    else:
        value = 0.5 if threshold is None else threshold
        measured = measure_groups(part.is_positive, part.prob, ids, value)[1]
        values = {name: measured[name] for name in SHOWN}
    return [
        GroupMetrics(
            id=str(name),
            n_patches=int(counts[k].sum()),
            per_class=dict(zip(part.class_names, counts[k].tolist(), strict=True)),
            n_correct=int(correct[k]),
            values={metric: float(column[k]) for metric, column in values.items()},
        )
        for k, name in enumerate(names)
    ]


def pick_columns(table: pd.DataFrame) -> pd.DataFrame:
    """Return the columns added to a pack's table by the user, and ``site_id``."""
    return table[[name for name in table.columns if name == "site_id" or name not in OWN_COLUMNS]]


def measure_subgroups(scored: ScoredPatches, columns: pd.DataFrame) -> dict[str, dict[str, Subgroup]]:
    """Return the metrics of every subgroup, by column and value.

    Numeric columns with more than `MAX_VALUES` distinct values are binned at their quartiles; text columns
    with more are left out.

    Args:
        columns: One row per patch in the same order.
    """
    metric_names = SHOWN_OF_CLASSES if scored.positive_class is None else SHOWN
    result: dict[str, dict[str, Subgroup]] = {}
    for column in columns:
        labels = _label(columns[column])
        if labels is None:
            continue
        result[str(column)] = {}
        for value in sorted(labels.dropna().unique()):
            part = scored.take(labels.eq(value).fillna(False).to_numpy(bool))
            metrics = estimate_metrics(part.sample(), metric_names, **scored.resampling)
            result[str(column)][str(value)] = Subgroup(len(part), part.n_groups, metrics)
    return result


def _label(column: pd.Series) -> pd.Series | None:
    """Return the subgroup of each patch, or None for a column that defines none."""
    n_values = column.nunique()
    if n_values < 2:
        return None
    if n_values <= MAX_VALUES:
        return column.astype("string")
    if pd.api.types.is_numeric_dtype(column):
        return pd.qcut(column.astype(float), 4, duplicates="drop").astype("string")
    return None
