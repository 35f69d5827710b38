"""Records of ``metrics.json``: `biopsy.evaluation` writes them, reports, cards and studies read them."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from pydantic import NonNegativeInt

from biopsy.core.loaders import FloatOrNan
from biopsy.data.ledger import OpeningCount
from biopsy.data.predictions import FixedThreshold
from biopsy.statistics.calibrators import CalibratorRecord
from biopsy.statistics.intervals import IntervalMethod, PatientSummary
from biopsy.statistics.multiclass import ClassReport
from biopsy.statistics.reliability import BrierParts, ReliabilityBin
from biopsy.statistics.resampling import Interval

FORMAT = "biopsy-metrics/1"
STUDY_FORMAT = "biopsy-study-metrics/1"


@dataclass(frozen=True)
class Confusion:
    """True and false positives and negatives."""

    tp: NonNegativeInt
    fp: NonNegativeInt
    fn: NonNegativeInt
    tn: NonNegativeInt

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
    confusion_matrix: list[list[int]] | None = None
    one_vs_rest: dict[str, dict[str, Interval]] | None = None


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

    thresholds: list[float]
    model: list[float]
    treat_all: list[float]
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


@dataclass(frozen=True)
class SplitUse:
    """The evaluated split, and limitations of its results."""

    name: str | None = None
    fold: int | None = None
    patients_overlap: bool | None = None
    test_is_validation: bool = False


@dataclass(frozen=True)
class Subgroup:
    """The metrics within one value of a column."""

    n_patches: NonNegativeInt
    n_patients: NonNegativeInt
    patch: dict[str, Interval]


@dataclass(frozen=True, kw_only=True)
class GroupMetrics:
    """Results within one patient (slide).

    Attributes:
        id: The patient (slide).
        per_class: Patches by true class.
        n_correct: Patches predicted correctly.
        values: Metrics of two classes, or the accuracy of more; NaN where undefined.
    """

    id: str
    n_patches: NonNegativeInt
    per_class: dict[str, NonNegativeInt]
    n_correct: NonNegativeInt
    values: dict[str, FloatOrNan]


@dataclass(frozen=True)
class SubgroupIntervals:
    """Number of subgroups; their intervals are not simultaneous."""

    level: float
    n_subgroups: int
    corrected: bool = False


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """Calibration metrics, the ECE of a perfect classifier, and the bins of the reliability diagram.

    With more than two classes the bins and the ECE are those of the predicted class; slope, intercept and
    parts of the Brier score are None.
    """

    ece: Interval
    brier: Interval
    nll: Interval
    calibration_slope: Interval | None = None
    calibration_intercept: Interval | None = None
    ece_floor: float
    bins: list[ReliabilityBin]
    brier_parts: BrierParts | None = None


class Calibration(CalibratorRecord):
    """The calibrator, and the calibration before and after it."""

    before: Reliability
    after: Reliability


@dataclass(frozen=True)
class SetCounts:
    """Patches by prediction set: the predicted class only, several classes, none, or only another class."""

    kept: NonNegativeInt
    several: NonNegativeInt
    empty: NonNegativeInt
    against_threshold: NonNegativeInt


@dataclass(frozen=True)
class Shares:
    """Shares of patches: true class in the set, abstentions, errors without abstention, selective risk."""

    coverage: Interval
    abstained: Interval
    error: Interval
    error_among_kept: Interval


@dataclass(frozen=True)
class SetShares:
    """Shares reached by sets of given quantiles: patients weighted equally, patches equally, by class.

    ``coverage_by_group`` is the coverage of each patient, lowest first; None if the unit is the patch.
    """

    quantiles: list[float]
    patient: Shares
    patch: Shares
    by_class: dict[str, Shares]
    coverage_by_group: list[float] | None = None


@dataclass(frozen=True)
class RiskAt:
    """Error rate of the most confident patches, and the lowest confidence among them."""

    coverage: float
    confidence: float
    risk: Interval


@dataclass(frozen=True)
class Risk:
    """Area under the risk-coverage curve, the smallest possible at this error rate, and points on it."""

    area: Interval
    ideal_area: float
    error: float
    at: list[RiskAt]


@dataclass(frozen=True, kw_only=True)
class Abstention:
    """Prediction sets of the classifier, and their coverage.

    Attributes:
        alpha, guarantee, reason, n_calibration_patients, n_calibration_patches, unit, method, chosen_on: From
            the classifier.
        target_coverage: ``1 - alpha``.
        quantiles, patient, patch, by_class, coverage_by_group: Of the classifier's sets, as in `SetShares`;
            None without sets.
        sets: Their counts.
        verdict: ``met``, ``violated`` or ``inconclusive``: whether the mean coverage over patients reaches
            the target, for each class or for all patches.
        per_patch: Shares of split conformal sets that treat patches as independent.
        risk_coverage: Risk against coverage.
    """

    alpha: float | None
    guarantee: str | None
    target_coverage: float | None
    reason: str | None
    n_calibration_patients: int | None
    n_calibration_patches: int | None
    unit: str
    method: str | None
    chosen_on: str | None
    quantiles: list[float] | None = None
    patient: Shares | None = None
    patch: Shares | None = None
    by_class: dict[str, Shares] | None = None
    coverage_by_group: list[float] | None = None
    sets: SetCounts | None
    verdict: str | None
    per_patch: SetShares | None
    risk_coverage: Risk

    @property
    def per_patient(self) -> SetShares | None:
        """Shares of the classifier's sets; None without sets."""
        if self.quantiles is None or self.patient is None or self.patch is None or self.by_class is None:
            return None
        return SetShares(self.quantiles, self.patient, self.patch, self.by_class, self.coverage_by_group)


@dataclass(frozen=True, kw_only=True)
class ColourBaseline:
    """The colour-only baseline.

    Attributes:
        auroc: AUROC of the positive class; for more than two classes, the macro average of one-vs-rest,
            which needs every class; None with a ``reason``.
        interval: The AUROC with its interval, for two classes.
        gain: AUROC of the evaluated model minus that of the baseline, paired, for two classes.
    """

    name: str
    features: list[str]
    C: float
    n_train: int
    auroc: float | None = None
    reason: str | None = None
    interval: Interval | None = None
    gain: Interval | None = None


@dataclass(frozen=True, kw_only=True)
class Metrics(Performance, Decisions):
    """Content of ``metrics.json``; see the file formats page."""

    format: str = FORMAT
    title: str | None = None
    subset: str | None = None
    synthetic: bool = False
    positive_class: str | None
    class_names: list[str]
    n_patches: NonNegativeInt
    n_patients: NonNegativeInt
    unit: str
    split: SplitUse = SplitUse()
    threshold: FixedThreshold | None
    classifier_sha256: str | None = None
    calibration: Calibration
    abstention: Abstention | None = None
    interval: IntervalMethod
    baseline: ColourBaseline | None = None
    groups: list[GroupMetrics] | None = None
    subgroups: dict[str, dict[str, Subgroup]]
    subgroup_intervals: SubgroupIntervals | None
    warnings: list[str]
    times_opened: int | None = None
    ledger: OpeningCount | None = None
    evaluated: str


@dataclass(frozen=True, kw_only=True)
class PooledMetrics:
    """Metrics of out-of-fold predictions: means over seeds, with intervals over patients; counts are sums."""

    n_patches: NonNegativeInt
    n_patients: NonNegativeInt
    n_seeds: int
    class_names: list[str]
    patch: dict[str, Interval]
    classification_report: list[ClassReport]
    interval: IntervalMethod
    confusion: Confusion | None
    confusion_matrix: list[list[int]] | None


@dataclass(frozen=True)
class FoldMean:
    """Mean, minimum and maximum over folds of a metric within each fold (mean over seeds)."""

    mean: float
    min: float
    max: float
    n_folds: int


@dataclass(frozen=True)
class Spread:
    """Mean, standard deviation, minimum and maximum of values; None without values."""

    mean: float | None = None
    sd: float | None = None
    min: float | None = None
    max: float | None = None

    @classmethod
    def of(cls, values: Iterable[float | None]) -> "Spread":
        """Summarise values, ignoring None; all fields are None if a value is not finite.

        Example:
            >>> Spread.of([0.5, 0.75]).mean
            0.625
        """
        finite = np.array([value for value in values if value is not None], dtype=float)
        if not len(finite) or not np.isfinite(finite).all():
            return cls()
        sd = float(finite.std(ddof=1)) if len(finite) > 1 else None
        return cls(float(finite.mean()), sd, float(finite.min()), float(finite.max()))


@dataclass(frozen=True, kw_only=True)
class GroupSpread(Spread):
    """AUROC (for more than two classes, accuracy) within one patient (slide) over seeds.

    Attributes:
        id: The patient (slide).
        n_patches: Its patches per seed.
        baseline_auroc: AUROC of the colour-only baseline, if it is the only one tested in a fold.
    """

    id: str
    n_patches: int
    baseline_auroc: float | None


@dataclass(frozen=True, kw_only=True)
class FoldResults:
    """One metric of the runs of a recipe by fold, and its mean over folds.

    Attributes:
        metric: ``auroc``, or ``accuracy`` if no fold tests every class.
        by_fold: One row per fold: ``fold``, ``tested`` (tested ids, if known), ``mean``, ``min`` and ``max``
            over seeds, ``n_seeds``, and of AUROC, if measured, ``baseline_auroc`` of the colour-only baseline
            and the ``gain`` over it.
        over_seeds: Each seed's mean over folds.
        n_seeds: Number of seeds.
        baseline_auroc: AUROC of the colour-only baseline, mean over folds; None if not measured.
    """

    metric: str
    by_fold: pd.DataFrame
    over_seeds: Spread
    n_seeds: int
    baseline_auroc: float | None


@dataclass(frozen=True, kw_only=True)
class RecipeSummary:
    """Results of a recipe of a study.

    Attributes:
        groups: Results of each patient (slide); empty without ids.
        folds: Mean and SD over seeds of each metric, and gain over the colour-only baseline, by fold.
        within_folds: Metrics within folds; pooled ones rank predictions of different models together.
        over_seeds: Variability of the pooled metrics.
    """

    folds: list[dict[str, object]]
    groups: list[GroupSpread] = field(default_factory=list)
    pooled: PooledMetrics
    within_folds: dict[str, FoldMean]
    over_seeds: dict[str, Spread]


@dataclass(frozen=True, kw_only=True)
class StudySummary:
    """Content of a study's ``metrics.json``."""

    format: str = STUDY_FORMAT
    positive_class: str | None
    recipes: dict[str, RecipeSummary]
