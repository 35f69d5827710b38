"""Measurements of scored patches: metrics, operating points, net benefit, subgroups."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from biopsy.data.packs import COLUMNS
from biopsy.evaluation.scored import ScoredPatches, confusion_matrix
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
    PatientSummary,
    estimate_metrics,
    estimate_one_vs_rest,
    estimate_patient_metrics,
)
from biopsy.statistics.multiclass import ClassReport, ClassSample, classification_report
from biopsy.statistics.resampling import Interval

CURVE = np.arange(1, 100) / 100  # threshold probabilities of the decision curve
MARKED = np.arange(1, 20) / 20  # threshold probabilities with an interval

SHOWN = ("auroc", "sensitivity", "specificity", "balanced_accuracy")
SHOWN_OF_CLASSES = ("accuracy", "balanced_accuracy", "f1_macro", "auroc")
MAX_VALUES = 12  # distinct values of a column
RELABELLED = ("label_before", "label_by", "label_at")
PCAM = ("coord_x", "coord_y", "tumor_patch", "center_tumor_patch")  # duplicate position and label
OWN_COLUMNS = {*COLUMNS, "official_subset", "row", "label_share", *RELABELLED, *PCAM}


@dataclass(frozen=True)
class Confusion:
    """True and false positives and negatives."""

    tp: int
    fp: int
    fn: int
    tn: int

    @classmethod
    def of(cls, matrix: np.ndarray, positive: int) -> "Confusion":
        """Return the counts of a confusion matrix ``(2, 2)``, true class by row."""
        (tp, fn), (fp, tn) = np.roll(matrix, -positive, axis=(0, 1)).tolist()
        return cls(tp, fp, fn, tn)


@dataclass(frozen=True, kw_only=True)
class Performance:
    """Metrics of performance; None where undefined for the number of classes."""

    patch: dict[str, Interval]
    classification_report: list[ClassReport]
    confusion: Confusion | None = None
    at_half: Confusion | None = None
    prevalence: float | None = None
    ece_floor: float | None = None
    patient: dict[str, PatientSummary] | None = None
    confusion_matrix: np.ndarray | None = None
    one_vs_rest: dict[str, dict[str, Interval]] | None = None


def measure_performance(scored: ScoredPatches, threshold: float | None) -> Performance:
    """Return the metrics over patches and over patients, at a threshold (0.5 if None) and at 0.5."""
    sample, matrix = scored.sample(), scored.confusion()
    report = classification_report(matrix, scored.class_names)
    pooled = estimate_metrics(sample, **scored.resampling)
    if isinstance(sample, ClassSample):
        return Performance(
            patch=pooled,
            classification_report=report,
            confusion_matrix=matrix,
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


@dataclass(frozen=True)
class OperatingPoint:
    """A threshold: the target of its rule, and the rates where it was chosen and on these patches."""

    rule: str
    threshold: float
    chosen_on: str | None
    target: dict[str, float] | None
    where_chosen: dict[str, float | None]
    achieved: dict[str, Interval]
    drift: dict[str, float | None]


@dataclass(frozen=True, kw_only=True)
class NetBenefit(Interval):
    """Net benefit at a threshold probability, and its gain over acting on all or on no patches."""

    threshold: float
    gain: Interval


@dataclass(frozen=True)
class DecisionCurve:
    """Net benefit per patch of the model and of treating all; that of treating none is 0."""

    thresholds: np.ndarray
    model: np.ndarray
    treat_all: np.ndarray
    marked: list[NetBenefit]


@dataclass(frozen=True)
class PredictiveValues:
    """PPV and NPV at a threshold and a given prevalence."""

    rule: str
    threshold: float
    ppv: Interval
    npv: Interval


@dataclass(frozen=True)
class AtPrevalence:
    """Predictive values of each threshold at a given prevalence."""

    prevalence: float
    points: list[PredictiveValues]


@dataclass(frozen=True, kw_only=True)
class Decisions:
    """Operating points and net benefit of the classifier's thresholds, for two classes."""

    operating_points: list[OperatingPoint] | None = None
    decision_curve: DecisionCurve | None = None
    at_prevalence: AtPrevalence | None = None


def measure_decisions(
    scored: ScoredPatches, thresholds: Sequence[Mapping[str, Any]], *, prevalence: float | None = None
) -> Decisions:
    """Return operating points, decision curve and, with a prevalence, predictive values, for two classes.

    Args:
        thresholds: As in ``classifier.json``: ``value``, ``rule``, ``chosen_on`` and the rates there.
        prevalence: Prevalence for PPV and NPV.

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
    treat_all = net_benefit(truth, np.ones(len(truth)), CURVE)
    return Decisions(
        operating_points=[_operating_point(calls, k, threshold) for k, threshold in enumerate(thresholds)],
        decision_curve=DecisionCurve(CURVE, net_benefit(truth, prob, CURVE), treat_all, marked),
        at_prevalence=values,
    )


def _operating_point(calls: DecisionCounts, k: int, threshold: Mapping[str, Any]) -> OperatingPoint:
    rates, rule = estimate_rates(calls, k), threshold["rule"]
    name = rule.partition("=")[0]
    chosen = {name: threshold.get(name) for name in ("sensitivity", "specificity")}
    return OperatingPoint(
        rule=rule,
        threshold=threshold["value"],
        chosen_on=threshold["chosen_on"],
        target={name: parse_rule(rule)[1]} if name in chosen else None,
        where_chosen=chosen,
        achieved=rates,
        drift={name: None if value is None else rates[name].value - value for name, value in chosen.items()},
    )


@dataclass(frozen=True)
class Subgroup:
    """The metrics within one value of a column."""

    n_patches: int
    n_patients: int
    patch: dict[str, Interval]


@dataclass(frozen=True)
class SubgroupIntervals:
    """Number of subgroups; their intervals are not simultaneous."""

    level: float
    n_subgroups: int
    corrected: bool = False


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
