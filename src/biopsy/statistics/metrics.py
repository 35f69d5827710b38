"""The registry of metrics, and those of two classes; those of more are in `multiclass`.

A metric is a function of a weighted sample, registered with ``@metric``. Registered, it is computed with its
interval wherever metrics are: in evaluations, comparisons, studies and reports. The numbers equal
scikit-learn's, with ``sample_weight`` where patients are weighted. What cannot be computed is NaN, and
`Metric.why_undefined` says why; nothing here warns.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from biopsy.core.errors import MetricError, suggest
from biopsy.core.plugins import Registry
from biopsy.statistics.calibration import calibration_error, fit_intercept, fit_recalibration
from biopsy.statistics.weighted_counts import NEEDS, Tally

Kind = Literal["ranking", "decision", "probability"]


class Counts(Protocol):
    """A weighted sample, as metrics take it: `tallies.Tally`, or `multiclass.ClassTally`."""

    @property
    def n(self) -> float:
        """Weight of all patches."""

    @property
    def needs(self) -> Mapping[str, str]:
        """What a metric may need (names of attributes that must be above 0), in words."""


@dataclass(frozen=True)
class Metric:
    """One metric: how to compute it, and what an interval and a table must know about it.

    Attributes:
        name: As it stands in `metrics.json`.
        label: As a reader sees it.
        fn: Weighted sample in, number out; called only when the needs are met.
        kind: Judges the order of patches, the calls at a threshold, or the probabilities themselves.
        needs: Attributes of the sample that must be above 0, else it is undefined.
        bounds: Between which values it lives; its interval is made on a scale without them.
        better: Which way is better; ``"near"`` means near ``ideal``, from either side.
        ideal: The value of a perfect classifier.
        share: Whether it is a share of patches that are each right or wrong.
        undefined: Why it may be undefined although its needs are met.
    """

    name: str
    label: str
    fn: Callable[[Any], float]
    kind: Kind
    needs: tuple[str, ...]
    bounds: tuple[float, float]
    better: Literal["higher", "lower", "near"]
    ideal: float
    share: bool
    undefined: str

    def compute(self, tally: Counts) -> float:
        """Return the metric, or NaN where it is undefined."""
        met = tally.n > 0 and all(getattr(tally, need) > 0 for need in self.needs)
        return float(self.fn(tally)) if met else float("nan")

    def why_undefined(self, tally: Counts) -> str:
        """Return why the metric is NaN on this sample."""
        missing = [tally.needs[need] for need in self.needs if not getattr(tally, need) > 0]
        return f"no {' and no '.join(missing)}" if missing else self.undefined


METRICS: Registry[Metric] = Registry("biopsy.metrics")
"""Metrics of two classes by name."""
_REGISTRIES: defaultdict[type, Registry[Metric]] = defaultdict(
    lambda: Registry[Metric](METRICS.group), {Tally: METRICS}
)


def registry(kind: type) -> Registry[Metric]:
    """Return the metrics of a kind of sample, by name: `Tally`, or `multiclass.ClassTally`."""
    return _REGISTRIES[kind]


def metric(
    kind: Kind,
    *,
    of: type = Tally,
    label: str = "",
    needs: Iterable[str] = (),
    bounds: tuple[float, float] = (0.0, 1.0),
    better: Literal["higher", "lower", "near"] = "higher",
    ideal: float = 1.0,
    share: bool = False,
    undefined: str = "no patches",
) -> Callable[[Callable[[Any], float]], Callable[[Any], float]]:
    """Register a function of a weighted sample under its own name.

    Args:
        of: `Tally` for two classes, `multiclass.ClassTally` for more. Both have ``y_true``, ``y_pred``,
            ``y_prob`` and ``sample_weight`` beside their counts.
        kind, needs, bounds, better, ideal, share, undefined: As in `Metric`.
        label: By default the name with spaces.
    """

    def register(fn: Callable[[Any], float]) -> Callable[[Any], float]:
        name = fn.__name__
        shown = label or name.replace("_", " ")
        made = Metric(name, shown, fn, kind, tuple(needs), bounds, better, ideal, share, undefined)
        registry(of).add(name, made, fn)
        return fn

    return register


BOTH = ("n_pos", "n_neg")
UNBOUNDED = (-np.inf, np.inf)


@metric("ranking", label="AUROC", needs=BOTH)
def auroc(tally: Tally) -> float:
    """Give the chance that a positive patch scores above a negative one, ties counting one half."""
    neg_below = tally.n_neg - tally.neg_above + tally.neg / 2
    return float(tally.pos @ neg_below) / (tally.n_pos * tally.n_neg)


@metric("ranking", label="AUPRC", needs=BOTH)
def auprc(tally: Tally) -> float:
    """Give average precision (no interpolation); a classifier that knows nothing gets the prevalence."""
    above = tally.pos_above + tally.neg_above
    precision = np.divide(tally.pos_above, above, out=np.zeros_like(above), where=above > 0)
    return float(tally.pos @ precision) / tally.n_pos


@metric("decision", needs=("n_pos",), share=True)
def sensitivity(tally: Tally) -> float:
    return tally.tp / tally.n_pos


@metric("decision", needs=("n_neg",), share=True)
def specificity(tally: Tally) -> float:
    return tally.tn / tally.n_neg


@metric("decision", label="positive predictive value", needs=("n_called_pos",), share=True)
def ppv(tally: Tally) -> float:
    return tally.tp / tally.n_called_pos


@metric("decision", label="negative predictive value", needs=("n_called_neg",), share=True)
def npv(tally: Tally) -> float:
    return tally.tn / tally.n_called_neg


@metric("decision", needs=BOTH)
def balanced_accuracy(tally: Tally) -> float:
    return (tally.tp / tally.n_pos + tally.tn / tally.n_neg) / 2


@metric("decision", label="F1 of the positive class", needs=("n_pos",))
def f1(tally: Tally) -> float:
    """Give the F1 of the positive class; without positive patches it would be 0 whatever was called."""
    return 2 * tally.tp / (tally.n_pos + tally.n_called_pos)


@metric("decision", label="Matthews correlation", needs=tuple(NEEDS), bounds=(-1.0, 1.0))
def mcc(tally: Tally) -> float:
    """Give Matthews' correlation; undefined (scikit-learn: 0) where one class is missing or never called."""
    product = tally.n_pos * tally.n_neg * tally.n_called_pos * tally.n_called_neg
    return (tally.tp * tally.tn - tally.fp * tally.fn) / float(np.sqrt(product))


@metric("decision", share=True)
def accuracy(tally: Tally) -> float:
    return (tally.tp + tally.tn) / tally.n


@metric("probability", label="Brier score", better="lower", ideal=0.0)
def brier(tally: Tally) -> float:
    square_pos, square_neg = tally.ranked.squares
    return float(tally.pos @ square_pos + tally.neg @ square_neg) / tally.n


@metric("probability", label="log loss", better="lower", ideal=0.0, bounds=(0.0, np.inf))
def nll(tally: Tally) -> float:
    """Give the mean negative log-likelihood in nats, probabilities held 2.2e-16 away from 0 and 1."""
    loss_pos, loss_neg = tally.ranked.log_losses
    return float(tally.pos @ loss_pos + tally.neg @ loss_neg) / tally.n


@metric("probability", label="expected calibration error", better="lower", ideal=0.0)
def ece(tally: Tally) -> float:
    return calibration_error(tally.ranked.prob, tally.pos, tally.neg)


@metric(
    "probability",
    needs=BOTH,
    bounds=UNBOUNDED,
    better="near",
    undefined="one cut separates the classes or all probabilities are equal: no finite slope fits",
)
def calibration_slope(tally: Tally) -> float:
    """Give the slope of target on logit; below 1 the probabilities are too extreme."""
    ranked = tally.ranked
    return fit_recalibration(ranked.logits, tally.pos, tally.neg, start=ranked.recalibration)[1]


@metric("probability", needs=BOTH, bounds=UNBOUNDED, better="near", ideal=0.0)
def calibration_intercept(tally: Tally) -> float:
    """Give the shift of the logit that makes the mean right; above 0 too few positives are promised."""
    return fit_intercept(tally.ranked.logits, tally.pos, tally.neg, start=tally.ranked.shift)


def specificity_at(tally: Tally, sensitivity: float) -> float:
    """Give the highest specificity of any threshold that reaches a sensitivity on this same sample."""
    reached = tally.pos_above >= sensitivity * tally.n_pos * (1 - 1e-12)
    return float(1 - tally.neg_above[np.argmax(reached)] / tally.n_neg)


@metric("ranking", label="specificity at sensitivity .95", needs=BOTH)
def specificity_at_sensitivity_95(tally: Tally) -> float:
    return specificity_at(tally, 0.95)


@metric("ranking", label="specificity at sensitivity .98", needs=BOTH)
def specificity_at_sensitivity_98(tally: Tally) -> float:
    return specificity_at(tally, 0.98)


def measure(tally: Counts, names: Iterable[str] | None = None) -> dict[str, float]:
    """Return every metric (or those named) of one weighted sample, NaN where undefined.

    Raises:
        MetricError: For a name that is not on the list.

    Example:
        >>> from biopsy.statistics.weighted_counts import rank
        >>> measure(rank([0, 0, 1, 1], [0.1, 0.6, 0.4, 0.9]).tally(), ["auroc", "sensitivity"])
        {'auroc': 0.75, 'sensitivity': 0.5}
    """
    known = registry(type(tally))
    names = list(known if names is None else names)
    for name in names:
        if name not in known:
            raise MetricError(f"metric {name!r} does not exist: {suggest(name, known)}")
    return {name: known[name].compute(tally) for name in names}
