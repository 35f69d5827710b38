"""The content of ``metrics.json`` as it is read and validated; `biopsy.evaluation` computes and writes it."""

from typing import Required

from pydantic import NonNegativeInt
from typing_extensions import TypedDict

from biopsy.data.ledger import OpeningCount
from biopsy.data.predictions import FrozenThreshold
from biopsy.models.classifier import CalibratorRecord

FORMAT = "biopsy-metrics/1"


class Estimate(TypedDict, total=False):
    """A value with its interval; None and a reason where one is undefined."""

    value: Required[float | None]
    low: float | None
    high: float | None
    reason: str | None


class PatientEstimate(Estimate, total=False):
    """A metric within patients: its mean, the number of patients, median and worst."""

    n_defined: int
    median: float | None
    worst: float | None


class ConfusionCounts(TypedDict):
    """True and false positives and negatives."""

    tp: NonNegativeInt
    fp: NonNegativeInt
    fn: NonNegativeInt
    tn: NonNegativeInt


class ClassRow(TypedDict):
    """A row of the classification report."""

    name: str
    precision: float | None
    recall: float | None
    f1: float | None
    n: NonNegativeInt


class MetricsSplit(TypedDict, total=False):
    """The evaluated split, and limitations of its results."""

    name: str | None
    fold: int | None
    patients_overlap: bool | None
    test_is_validation: bool


class IntervalRecord(TypedDict, total=False):
    """Method of the intervals."""

    unit: Required[str]
    level: float
    n_groups: int
    method: Required[str]
    draws: int | None
    seed: int | None


class Point(TypedDict):
    """An operating point."""

    rule: str
    threshold: float
    chosen_on: str | None
    target: dict[str, float] | None
    where_chosen: dict[str, float | None]
    achieved: dict[str, Estimate]
    drift: dict[str, float | None]


class Benefit(Estimate):
    """Net benefit at a threshold probability, and its gain over acting on all or on no patches."""

    threshold: float
    gain: Estimate


class Curve(TypedDict):
    """Decision curve."""

    thresholds: list[float]
    model: list[float]
    treat_all: list[float]
    marked: list[Benefit]


class PointAtPrevalence(TypedDict):
    """Predictive values of a threshold."""

    rule: str
    threshold: float
    ppv: Estimate
    npv: Estimate


class Prevalence(TypedDict):
    """Predictive values at a prevalence."""

    prevalence: float
    points: list[PointAtPrevalence]


class SubgroupMetrics(TypedDict):
    """The metrics within one value of a column."""

    n_patches: NonNegativeInt
    n_patients: NonNegativeInt
    patch: dict[str, Estimate]


class Bin(TypedDict):
    """A bin of the reliability diagram."""

    low: float
    high: float
    n: NonNegativeInt
    n_groups: NonNegativeInt
    mean_prob: float
    observed: Estimate


class ReliabilityRecord(TypedDict, total=False):
    """Calibration of probabilities."""

    ece: Required[Estimate]
    brier: Required[Estimate]
    nll: Required[Estimate]
    calibration_slope: Estimate | None
    calibration_intercept: Estimate | None
    ece_floor: float | None
    bins: Required[list[Bin]]
    brier_parts: dict[str, float] | None


class CalibrationRecord(CalibratorRecord):
    """The calibrator, and the calibration before and after it."""

    before: ReliabilityRecord
    after: ReliabilityRecord


class SharesRecord(TypedDict):
    """Shares of patches: true class in the set, abstentions, errors, errors among those kept."""

    coverage: Estimate
    abstained: Estimate
    error: Estimate
    error_among_kept: Estimate


class SetRecord(TypedDict):
    """Shares reached by prediction sets of given quantiles."""

    quantiles: list[float] | None
    patient: SharesRecord | None
    patch: SharesRecord | None
    by_class: dict[str, SharesRecord] | None


class RiskPoint(TypedDict):
    """Error rate of the most confident patches."""

    coverage: float
    confidence: float
    risk: Estimate


class RiskRecord(TypedDict):
    """Risk against coverage."""

    area: Estimate
    ideal_area: float
    error: float
    at: list[RiskPoint]


class AbstentionRecord(SetRecord):
    """Prediction sets of the classifier, and their coverage."""

    alpha: float | None
    guarantee: str | None
    target_coverage: float | None
    reason: str | None
    n_calibration_patients: int | None
    n_calibration_patches: int | None
    unit: str
    method: str | None
    chosen_on: str | None
    sets: dict[str, NonNegativeInt] | None
    verdict: str | None
    per_patch: SetRecord | None
    risk_coverage: RiskRecord


class BaselineRecord(TypedDict, total=False):
    """The colour-only baseline."""

    name: str
    features: list[str]
    C: float
    n_train: int
    auroc: float | None
    reason: str | None
    interval: Estimate | None
    gain: Estimate | None


class MetricsDocument(TypedDict, total=False):
    """Content of ``metrics.json``; see the file formats page. A study's pooled results have part of it."""

    format: str
    title: str | None
    subset: str | None
    synthetic: bool
    positive_class: Required[str | None]
    class_names: Required[list[str]]
    n_patches: Required[NonNegativeInt]
    n_patients: Required[NonNegativeInt]
    unit: Required[str]
    split: MetricsSplit
    threshold: FrozenThreshold | None
    classifier_sha256: str | None
    patch: Required[dict[str, Estimate]]
    patient: dict[str, PatientEstimate] | None
    classification_report: list[ClassRow]
    confusion: ConfusionCounts | None
    at_half: ConfusionCounts | None
    prevalence: float | None
    ece_floor: float | None
    confusion_matrix: list[list[int]] | None
    one_vs_rest: dict[str, dict[str, Estimate]] | None
    operating_points: list[Point] | None
    decision_curve: Curve | None
    at_prevalence: Prevalence | None
    calibration: CalibrationRecord
    abstention: AbstentionRecord | None
    interval: Required[IntervalRecord]
    baseline: BaselineRecord | None
    subgroups: dict[str, dict[str, SubgroupMetrics]]
    subgroup_intervals: dict[str, float | int | bool] | None
    warnings: list[str]
    times_opened: int | None
    ledger: OpeningCount | None
    evaluated: str
