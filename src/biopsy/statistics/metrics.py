"""Registry of metrics, and metrics of two classes; those of more classes are in `multiclass`.

A metric is a function of a weighted sample, registered with ``@metric``: evaluations, comparisons, studies
and reports then include it with its interval. Values equal scikit-learn's with ``sample_weight``. Undefined
values are NaN, with the reason in `Metric.why_undefined`.
"""

import inspect
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from biopsy.core.errors import MetricError, suggest
from biopsy.core.plugins import Registry
from biopsy.statistics.calibration import calibration_error, fit_intercept, fit_recalibration
from biopsy.statistics.resampling import SHARE, UNBOUNDED, Bounds
from biopsy.statistics.weighted_counts import NEEDS, WeightedCounts

Kind = Literal["ranking", "decision", "probability"]


class Counts(Protocol):
    """A weighted sample, input of metrics: `WeightedCounts` or `multiclass.ClassCounts`."""

    @property
    def n(self) -> float:
        """Weight of all patches."""

    @property
    def needs(self) -> Mapping[str, str]:
        """Descriptions of the attributes that may have to be above 0, by name."""


@dataclass(frozen=True)
class Metric:
    """A metric.

    Attributes:
        name: Key in ``metrics.json``.
        label: Name in reports.
        meaning: First sentence of the docstring of its function.
        fn: Function of a weighted sample, evaluated only if the needs are met.
        kind: Whether it measures the ranking of patches, decisions at a threshold, or probabilities.
        needs: Attributes of the sample that must be above 0, else it is undefined.
        bounds: Range of its values; intervals are computed on an unbounded scale.
        better: Direction of improvement; ``"near"``: towards ``ideal`` from either side.
        ideal: Value of a perfect classifier.
        share: Whether it is a proportion of patches that are each correct or not.
        undefined: Reason why it may be undefined although its needs are met.
        no_interval: Reason why it has no interval; "" if it has one.
        pooled_only: Whether it is not computed within single patients.
    """

    name: str
    label: str
    meaning: str
    fn: Callable[[Any], float]
    kind: Kind
    needs: tuple[str, ...]
    bounds: Bounds
    better: Literal["higher", "lower", "near"]
    ideal: float
    share: bool
    undefined: str
    no_interval: str
    pooled_only: bool

    def compute(self, counts: Counts) -> float:
        """Return the metric, NaN if undefined."""
        met = counts.n > 0 and all(getattr(counts, need) > 0 for need in self.needs)
        return float(self.fn(counts)) if met else float("nan")

    def why_undefined(self, counts: Counts) -> str:
        """Return the reason why the metric is NaN on this sample."""
        missing = [counts.needs[need] for need in self.needs if not getattr(counts, need) > 0]
        return f"no {' and no '.join(missing)}" if missing else self.undefined


METRICS: Registry[Metric] = Registry("biopsy.metrics")
"""Metrics of two classes by name."""
_REGISTRIES: defaultdict[type, Registry[Metric]] = defaultdict(
    lambda: Registry[Metric](METRICS.group), {WeightedCounts: METRICS}
)


def registry(kind: type) -> Registry[Metric]:
    """Return the metrics of a type of sample (`WeightedCounts` or `multiclass.ClassCounts`) by name."""
    return _REGISTRIES[kind]


def metric(
    kind: Kind,
    *,
    of: type = WeightedCounts,
    label: str = "",
    needs: Iterable[str] = (),
    bounds: Bounds = SHARE,
    better: Literal["higher", "lower", "near"] = "higher",
    ideal: float = 1.0,
    share: bool = False,
    undefined: str = "no patches",
    no_interval: str = "",
    pooled_only: bool = False,
) -> Callable[[Callable[[Any], float]], Callable[[Any], float]]:
    """Register a function of a weighted sample under its name; arguments as in `Metric`.

    Args:
        of: `WeightedCounts` for two classes, `multiclass.ClassCounts` for more. Both have ``y_true``,
            ``y_pred``, ``y_prob`` and ``sample_weight`` besides their counts.
    """

    def register(fn: Callable[[Any], float]) -> Callable[[Any], float]:
        name = fn.__name__
        shown, needed = label or name.replace("_", " "), tuple(needs)
        meaning = re.sub(r"^Return (the )?|\.(\n.*)?$", "", inspect.getdoc(fn) or "", flags=re.DOTALL)
        registered = Metric(
            *(name, shown, " ".join(meaning.split()), fn, kind, needed, bounds, better, ideal, share),
            *(undefined, no_interval, pooled_only),
        )
        registry(of).add(name, registered, fn)
        return fn

    return register


BOTH = ("n_pos", "n_neg")
NO_ECE_INTERVAL = (
    "the calibration error is biased upwards in small samples, and intervals around it "
    "did not reach their nominal coverage in simulation; see ece_floor and the calibration slope"
)


@metric("ranking", label="AUROC", needs=BOTH)
def auroc(counts: WeightedCounts) -> float:
    """Return the probability that a positive patch scores above a negative one, ties counting one half."""
    neg_below = counts.n_neg - counts.neg_above + counts.neg / 2
    return float(counts.pos @ neg_below) / (counts.n_pos * counts.n_neg)


@metric("ranking", label="AUPRC", needs=BOTH)
def auprc(counts: WeightedCounts) -> float:
    """Return the average precision over all thresholds; a model without skill has the prevalence.

    Without interpolation.
    """
    above = counts.pos_above + counts.neg_above
    precision = np.divide(counts.pos_above, above, out=np.zeros_like(above), where=above > 0)
    return float(counts.pos @ precision) / counts.n_pos


@metric("decision", needs=("n_pos",), share=True)
def sensitivity(counts: WeightedCounts) -> float:
    """Return the share of positive patches that are predicted positive."""
    return counts.tp / counts.n_pos


@metric("decision", needs=("n_neg",), share=True)
def specificity(counts: WeightedCounts) -> float:
    """Return the share of negative patches that are predicted negative."""
    return counts.tn / counts.n_neg


@metric("decision", label="positive predictive value", needs=("n_pred_pos",), share=True)
def ppv(counts: WeightedCounts) -> float:
    """Return the share of patches predicted positive that are positive."""
    return counts.tp / counts.n_pred_pos


@metric("decision", label="negative predictive value", needs=("n_pred_neg",), share=True)
def npv(counts: WeightedCounts) -> float:
    """Return the share of patches predicted negative that are negative."""
    return counts.tn / counts.n_pred_neg


@metric("decision", needs=BOTH)
def balanced_accuracy(counts: WeightedCounts) -> float:
    """Return the mean of sensitivity and specificity."""
    return (counts.tp / counts.n_pos + counts.tn / counts.n_neg) / 2


@metric("decision", label="F1 of the positive class", needs=("n_pos",))
def f1(counts: WeightedCounts) -> float:
    """Return the harmonic mean of sensitivity and positive predictive value.

    Undefined without positive patches, where it would be 0 for any predictions.
    """
    return 2 * counts.tp / (counts.n_pos + counts.n_pred_pos)


@metric("decision", label="Matthews correlation", needs=tuple(NEEDS), bounds=(-1.0, 1.0))
def mcc(counts: WeightedCounts) -> float:
    """Return the correlation between predicted and true class, from -1 to 1; 0 is chance.

    Undefined (scikit-learn: 0) if a class is missing or never predicted.
    """
    product = counts.n_pos * counts.n_neg * counts.n_pred_pos * counts.n_pred_neg
    return (counts.tp * counts.tn - counts.fp * counts.fn) / float(np.sqrt(product))


@metric("decision", share=True)
def accuracy(counts: WeightedCounts) -> float:
    """Return the share of patches whose predicted class is right."""
    return (counts.tp + counts.tn) / counts.n


@metric("probability", label="Brier score", better="lower", ideal=0.0)
def brier(counts: WeightedCounts) -> float:
    """Return the mean squared difference between predicted probability and outcome; 0 is perfect."""
    square_pos, square_neg = counts.scores.squares
    return float(counts.pos @ square_pos + counts.neg @ square_neg) / counts.n


@metric("probability", label="log loss", better="lower", ideal=0.0, bounds=(0.0, np.inf))
def nll(counts: WeightedCounts) -> float:
    """Return the mean negative log-likelihood of the true class; 0 is perfect.

    In nats, with probabilities held 2.2e-16 away from 0 and 1.
    """
    loss_pos, loss_neg = counts.scores.log_losses
    return float(counts.pos @ loss_pos + counts.neg @ loss_neg) / counts.n


@metric(
    "probability",
    label="expected calibration error",
    better="lower",
    ideal=0.0,
    no_interval=NO_ECE_INTERVAL,
    pooled_only=True,
)
def ece(counts: WeightedCounts) -> float:
    """Return the mean difference between predicted probability and observed frequency over bins of
    probability; 0 is perfect.
    """
    return calibration_error(counts.scores.prob, counts.pos, counts.neg)


@metric(
    "probability",
    needs=BOTH,
    bounds=UNBOUNDED,
    better="near",
    pooled_only=True,
    undefined="a threshold separates the classes, or all probabilities are equal: no finite slope fits",
)
def calibration_slope(counts: WeightedCounts) -> float:
    """Return the slope of the outcome on the predicted log-odds; below 1: probabilities too extreme."""
    scores = counts.scores
    return fit_recalibration(scores.logits, counts.pos, counts.neg, start=scores.recalibration)[1]


@metric("probability", needs=BOTH, bounds=UNBOUNDED, better="near", ideal=0.0, pooled_only=True)
def calibration_intercept(counts: WeightedCounts) -> float:
    """Return the shift of the predicted log-odds that corrects their mean; above 0: predictions too low."""
    return fit_intercept(counts.scores.logits, counts.pos, counts.neg, start=counts.scores.shift)


def specificity_at(counts: WeightedCounts, sensitivity: float) -> float:
    """Return the highest specificity of all thresholds with at least a sensitivity, on this sample."""
    reached = counts.pos_above >= sensitivity * counts.n_pos * (1 - 1e-12)
    return float(1 - counts.neg_above[np.argmax(reached)] / counts.n_neg)


@metric("ranking", label="specificity at sensitivity .95", needs=BOTH)
def specificity_at_sensitivity_95(counts: WeightedCounts) -> float:
    """Return the highest specificity of any threshold with a sensitivity of at least 0.95."""
    return specificity_at(counts, 0.95)


@metric("ranking", label="specificity at sensitivity .98", needs=BOTH)
def specificity_at_sensitivity_98(counts: WeightedCounts) -> float:
    """Return the highest specificity of any threshold with a sensitivity of at least 0.98."""
    return specificity_at(counts, 0.98)


def measure(counts: Counts, names: Iterable[str] | None = None) -> dict[str, float]:
    """Return metrics (all, or the given names) of a weighted sample, NaN if undefined.

    Example:
        >>> from biopsy.statistics.weighted_counts import sort_scores
        >>> measure(sort_scores([0, 0, 1, 1], [0.1, 0.6, 0.4, 0.9]).count(), ["auroc", "sensitivity"])
        {'auroc': 0.75, 'sensitivity': 0.5}
    """
    kind = type(counts)
    metrics = registry(kind).values() if names is None else [find_metric(name, kind) for name in names]
    return {metric.name: metric.compute(counts) for metric in metrics}


def find_metric(name: str, kind: type) -> Metric:
    """Return a metric of a type of sample (see `registry`) by name.

    Raises:
        MetricError: If there is none, with the nearest names.
    """
    metrics = registry(kind)
    if name not in metrics:
        raise MetricError(f"metric {name!r} does not exist: {suggest(name, metrics)}", "name")
    return metrics[name]
