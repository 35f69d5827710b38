"""Calibrators: map scores to scores of calibrated probabilities, fitted on held-out patients.

The softmax of scores is the probabilities. To add a calibrator, write a class with ``scale`` and ``to_dict``
and a function that fits it, and add them to `fit_calibrator` and `calibrator_from_dict`.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Required

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray
from pydantic import ConfigDict, Field, FiniteFloat
from typing_extensions import TypedDict

from biopsy.core.errors import MetricError, suggest
from biopsy.statistics.calibration import fit_recalibration

Floats = NDArray[np.float64]
Method = Literal["platt", "intercept", "temperature", "isotonic", "none"]

METHODS: tuple[Method, ...] = ("platt", "intercept", "temperature", "isotonic", "none")
SLOPES = (1e-6, 1e3)  # limits, of standardised scores; beyond them a slope is in effect zero or infinite
MIN_GROUPS_FOR_SLOPE = 5
"""Number of validation patients below which Platt fits the intercept only: docs/concepts/calibration.md."""
MIN_SPREAD = 0.01
"""Standard deviation of scores below which probabilities are equal to two digits."""
PRIOR_OF_TRAINING = "as in training"
PRIOR_CORRECTED = "corrected from the class frequencies in training to those in validation"
PRIOR_UNCHANGED = "not corrected for class weights or resampling: the correction fits validation worse"
PRIOR_IN_INTERCEPT = "fitted with the intercept"
SEPARATED = "validation is classified without errors: no finite slope fits"
MIN_PROB = 1e-15  # before a logarithm, for finite scores of an isotonic 0


_Probs = list[Annotated[FiniteFloat, Field(ge=0, le=1)]]


class CalibratorRecord(TypedDict, total=False):
    """A fitted calibrator, as ``classifier.json`` holds it."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    method: Required[Method]
    slope: FiniteFloat
    intercepts: list[FiniteFloat]
    positive_index: Annotated[int, Field(ge=0, le=1)]
    prob: _Probs
    calibrated: _Probs
    prior: str | None
    reason: str
    asked: str
    fitted_on: str
    n_patches: int
    n_patients: int
    unit: str
    warning: str | None
    prevalence: Annotated[float, Field(gt=0, lt=1)]
    """Of the positive class, where the classifier is used; absent: that of the patches it was fitted on."""
    fitted_prevalence: float


@dataclass(frozen=True)
class Scaling:
    """Scores times one slope plus an intercept per class: Platt, intercept, temperature, or no calibration.

    Attributes:
        slope: 1 / temperature.
        intercepts: One per class; empty for none.
        prior: Treatment of class weights and resampling in training.
        reason: Reason why another method than the requested one was fitted.
    """

    method: Method = "none"
    slope: float = 1.0
    intercepts: tuple[float, ...] = ()
    prior: str | None = None
    reason: str | None = None

    def scale(self, scores: Floats) -> Floats:
        """Return calibrated scores ``(n, n_classes)``."""
        if self.slope == 1 and not any(self.intercepts):
            return scores
        return self.slope * scores + (np.array(self.intercepts) if self.intercepts else 0.0)

    def to_dict(self) -> CalibratorRecord:
        """Return the entry of ``classifier.json``."""
        record: CalibratorRecord = {"method": self.method}
        if self.method != "none":
            record |= {"slope": self.slope, "intercepts": list(self.intercepts), "prior": self.prior}
        return record if self.reason is None else {**record, "reason": self.reason}


@dataclass(frozen=True)
class Isotonic:
    """Isotonic regression on the probability of the positive class.

    Attributes:
        prob: Probabilities of the knots, ascending, ``(n_knots,)``.
        calibrated: Calibrated probabilities of the knots, interpolated linearly.
        intercepts: Added to their logarithms, one per class; empty for none.
    """

    positive_index: int
    prob: tuple[float, ...]
    calibrated: tuple[float, ...]
    prior: str | None = None
    method: Method = "isotonic"
    reason: str | None = None
    intercepts: tuple[float, ...] = ()

    def scale(self, scores: Floats) -> Floats:
        """Return calibrated scores ``(n, 2)``: logarithms of the probabilities."""
        positive = self.positive_index
        prob = np.interp(
            scipy.special.expit(scores[:, positive] - scores[:, 1 - positive]), self.prob, self.calibrated
        )
        pair = np.stack([1 - prob, prob] if positive else [prob, 1 - prob], axis=1)
        return np.log(np.maximum(pair, MIN_PROB)) + (np.array(self.intercepts) if self.intercepts else 0.0)

    def to_dict(self) -> CalibratorRecord:
        """Return the entry of ``classifier.json``."""
        record: CalibratorRecord = {
            "method": self.method,
            "positive_index": self.positive_index,
            "prob": list(self.prob),
            "calibrated": list(self.calibrated),
            "prior": self.prior,
        }
        return {**record, "intercepts": list(self.intercepts)} if self.intercepts else record


Calibrator = Scaling | Isotonic


def calibrator_from_dict(record: CalibratorRecord) -> Calibrator:
    """Return a calibrator from the record of `to_dict`; other keys are ignored."""
    method = check_method(record["method"])
    if method == "isotonic":
        return Isotonic(
            record["positive_index"],
            tuple(record["prob"]),
            tuple(record["calibrated"]),
            record.get("prior"),
            intercepts=tuple(record.get("intercepts", ())),
        )
    return Scaling(
        method,
        record.get("slope", 1.0),
        tuple(record.get("intercepts", ())),
        record.get("prior"),
        record.get("reason"),
    )


def check_method(method: str, n_classes: int = 2, prevalence: float = 0.0) -> Method:
    """Return the name of a method if it exists and supports number of classes and prevalence (0: none)."""
    if method not in METHODS:
        raise MetricError(f"calibration {method!r} does not exist: {suggest(method, METHODS)}", "name")
    if method == "isotonic" and n_classes != 2:
        raise MetricError(
            f"calibration {method!r} is for two classes, found {n_classes}: "
            "use 'platt', which is for any number",
            "classes",
        )
    if prevalence and (n_classes != 2 or method == "none"):
        raise MetricError(
            f"prevalence {prevalence:g} with {n_classes} classes and calibration {method!r}: it is for two "
            "classes and calibrated probabilities",
            "value",
        )
    return method


def fit_calibrator(
    scores: ArrayLike,
    target: ArrayLike,
    method: str = "platt",
    *,
    n_groups: int | None = None,
    positive_index: int = 1,
    trained_prior: ArrayLike | None = None,
    prevalence: float = 0.0,
) -> Calibrator:
    """Fit a calibrator by maximum likelihood on held-out patches.

    ``platt`` fits one slope and an intercept per class (Platt 1999 on the difference of two scores; for more
    classes bias-corrected temperature scaling, Alexandari et al. 2020); ``intercept`` the intercepts only;
    ``temperature`` (Guo et al. 2017, sec. 4.2) the slope only; ``isotonic`` (Zadrozny and Elkan 2002) a
    monotonic step function, limited by Platt's targets ``1 / (n_neg + 2)`` and ``(n_pos + 1) / (n_pos + 2)``
    or the extremes of the classifier. Slopes are fitted on standardised scores.

    Intercepts only are fitted, with a ``reason``, if ``platt`` is requested with fewer than five patients
    (unless scores barely differ), or no slope or steps fit (equal scores, no errors, or a ranking no better
    than chance). For a class without patches, one more patient with the mean predicted classes is assumed.

    Args:
        scores: ``(n, n_classes)``, whose softmax is the probabilities.
        target: Class of each patch, ``(n,)``, at its natural prevalence.
        n_groups: Number of patients (slides, patches; default: of patches).
        positive_index: Column of the positive class, for two classes.
        trained_prior: Effective class frequencies in training, if changed by class weights or resampling,
            ``(n_classes,)``. Before temperature scaling, scores are corrected to the frequencies in these
            patches (prior correction: King and Zeng 2001; Saerens et al. 2002), unless that fits worse, since
            long training may cancel the weights (Byrd and Lipton 2019).
        prevalence: Share of positive patches where the calibrator is used, to which the fitted one is shifted
            (`adjust_prevalence`); 0: that of these patches.

    Raises:
        MetricError: If the method is unknown or for two classes only, or a prevalence does not apply to it,
            shapes differ, or a score is not finite.

    Example:
        >>> round(fit_calibrator([[0, 4], [4, 0], [0, 4], [4, 0]], [1, 0, 1, 1], "temperature").slope, 4)
        0.2747
    """
    scores, target = np.ascontiguousarray(scores, np.float64), np.asarray(target)  # sums depend on the order
    _check_scores(scores, target)
    method = check_method(method, scores.shape[1], prevalence)
    if method == "none":
        return Scaling()
    n_groups, reason = len(target) if n_groups is None else n_groups, None
    share = np.bincount(target, minlength=scores.shape[1]) / len(target)
    if not share.all():
        share = (n_groups * share + scipy.special.softmax(scores, axis=1).mean(axis=0)) / (n_groups + 1)
    fitted: Calibrator | None = None
    if method != "intercept":
        try:
            fitted = _fit(scores, target, method, n_groups, positive_index, trained_prior)
        except _NoFit as why:
            reason = str(why)
    if fitted is None:
        _, offsets = _fit_linear(scores, target, share, with_slope=False)
        fitted = Scaling("intercept", 1.0, tuple(offsets.tolist()), prior=PRIOR_IN_INTERCEPT, reason=reason)
    if not prevalence:
        return fitted
    return adjust_prevalence(fitted, share[positive_index], prevalence, positive_index=positive_index)


def adjust_prevalence(
    calibrator: Calibrator, fitted_prevalence: float, prevalence: float, *, positive_index: int = 1
) -> Calibrator:
    """Return a calibrator of two classes for another prevalence, where the patches of each class look alike.

    The logarithm of the odds is shifted by the difference of those of the two prevalences (Saerens et al.
    2002).

    Args:
        calibrator: One that was fitted; not ``none``.
        fitted_prevalence: Share of the positive class in the patches it was fitted on.
        prevalence: Share of the positive class where the classifier is used.

    Example:
        >>> round(adjust_prevalence(Scaling("intercept", 1.0, (0.0, 0.5)), 0.5, 0.1).intercepts[1], 3)
        -1.697
    """
    intercepts = [*(calibrator.intercepts or (0.0, 0.0))]
    log_odds = scipy.special.logit([prevalence, fitted_prevalence])
    intercepts[positive_index] += float(log_odds[0] - log_odds[1])
    return replace(calibrator, intercepts=tuple(intercepts))


def mean_nll(scores: Floats, target: ArrayLike) -> float:
    """Return the mean negative log-likelihood of classes, in nats."""
    return -float(scipy.special.log_softmax(scores, axis=1)[np.arange(len(scores)), target].mean())


def spread_of(scores: Floats) -> float:
    """Return the largest standard deviation of the scores of a class, centred within each patch."""
    return float((scores - scores.mean(axis=1, keepdims=True)).std(axis=0).max())


def _check_scores(scores: Floats, target: NDArray[Any]) -> None:
    if scores.ndim != 2 or scores.shape[1] < 2 or target.shape != scores.shape[:1] or not len(target):
        raise MetricError(
            f"scores have shape {scores.shape} and target {target.shape}: give each patch a score per class",
            "shape",
        )
    wrong = ~np.isfinite(scores).all(axis=1)
    if wrong.any():
        raise MetricError(
            f"{wrong.sum()} patches have scores that are not finite, the first at row {np.argmax(wrong)}: "
            "check the outputs of the classifier",
            "missing",
        )
    if not np.isin(target, np.arange(scores.shape[1])).all():
        raise MetricError(f"targets are not all an index into the {scores.shape[1]} classes", "target")


class _NoFit(Exception):
    """Raised with the reason if a calibrator cannot be fitted."""


def _fit(
    scores: Floats,
    target: NDArray[Any],
    method: Method,
    n_groups: int,
    positive_index: int,
    trained_prior: ArrayLike | None,
) -> Calibrator:
    share = np.bincount(target, minlength=scores.shape[1]) / len(target)
    if np.count_nonzero(share) < (2 if method == "temperature" else len(share)):
        raise _NoFit(f"a class has none of the {len(target)} patches: no slope can be fitted")
    if not np.ptp(scores - scores[:, :1], axis=0).any():
        raise _NoFit("all predictions are equal: no slope can be fitted")
    if method == "temperature":
        return _fit_temperature(scores, target, share, trained_prior)
    if method == "platt" and n_groups < MIN_GROUPS_FOR_SLOPE and spread_of(scores) >= MIN_SPREAD:
        raise _NoFit(f"a slope is fitted from {MIN_GROUPS_FOR_SLOPE} validation patients on")
    if len(share) > 2:
        return _fit_classes(scores, target, share)
    logits, truth = scores[:, positive_index] - scores[:, 1 - positive_index], target == positive_index
    fit = _fit_platt if method == "platt" else _fit_isotonic
    return fit(logits, truth.astype(np.float64), positive_index)


def _fit_temperature(
    scores: Floats, target: NDArray[Any], share: Floats, trained_prior: ArrayLike | None
) -> Scaling:
    shifts = {PRIOR_OF_TRAINING: np.zeros(len(share))}
    prior_seen = None if trained_prior is None else np.asarray(trained_prior, np.float64)
    if prior_seen is not None and share.all() and prior_seen.all():
        shift = np.log(share) - np.log(prior_seen)
        shifts = {PRIOR_CORRECTED: shift - shift[0], PRIOR_UNCHANGED: np.zeros(len(share))}
    fits = []
    for prior, shift in shifts.items():
        try:
            slope = _fit_slope(scores + shift, target)
        except _NoFit as why:
            reason = why
        else:
            intercepts = tuple((slope * shift).tolist()) if shift.any() else ()
            fits.append(Scaling("temperature", slope, intercepts, prior=prior))
    if not fits:
        raise reason
    return min(fits, key=lambda fit: mean_nll(fit.scale(scores), target))


def _fit_slope(scores: Floats, target: NDArray[Any]) -> float:
    """Return the slope with minimum NLL, whose derivative increases with the slope."""
    margins = scores - scores[np.arange(len(scores)), target][:, None]
    low, high = np.array(SLOPES) / spread_of(scores)

    def derivative(slope: float) -> float:
        return float((scipy.special.softmax(slope * margins, axis=1) * margins).sum(axis=1).mean())

    if derivative(low) >= 0:
        raise _NoFit(
            "no positive slope fits: validation is ranked no better than chance, or scores have an offset, "
            "which platt corrects"
        )
    if derivative(high) <= 0:
        raise _NoFit(SEPARATED)
    return float(scipy.optimize.brentq(derivative, low, high, xtol=1e-12 * high, rtol=1e-12))


def _fit_platt(logits: Floats, truth: Floats, positive_index: int) -> Scaling:
    mean, spread = float(logits.mean()), float(logits.std())
    intercept, slope = fit_recalibration((logits - mean) / spread, truth, 1 - truth)
    if np.isnan(slope):
        raise _NoFit(SEPARATED)
    slope = _check_slope(slope) / spread
    intercept -= slope * mean
    intercepts = (0.0, intercept) if positive_index else (intercept, 0.0)
    return Scaling("platt", slope, intercepts, prior=PRIOR_IN_INTERCEPT)


def _fit_classes(scores: Floats, target: NDArray[Any], share: Floats) -> Scaling:
    spread = spread_of(scores)
    centre = scores.mean(axis=0)
    slope, intercepts = _fit_linear((scores - centre) / spread, target, share, with_slope=True)
    fitted = Scaling(
        "platt",
        _check_slope(slope) / spread,
        tuple((intercepts - slope / spread * (centre - centre[0])).tolist()),
        prior=PRIOR_IN_INTERCEPT,
    )
    if (fitted.scale(scores).argmax(axis=1) == target).all():
        raise _NoFit(SEPARATED)
    return fitted


def _fit_linear(
    scores: Floats, target: NDArray[Any], share: Floats, *, with_slope: bool
) -> tuple[float, Floats]:
    """Return slope (1 unless fitted) and intercepts (the first is 0) with minimum NLL."""
    n_classes, of_target = scores.shape[1], scores[np.arange(len(scores)), target].mean()

    def loss(parameters: Floats) -> tuple[float, Floats]:
        slope, intercepts = (parameters[0] if with_slope else 1.0), parameters[-n_classes:]
        logits = slope * scores + intercepts
        prob = scipy.special.softmax(logits, axis=1)
        value = scipy.special.logsumexp(logits, axis=1).mean() - slope * of_target - intercepts @ share
        gradient = prob.mean(axis=0) - share
        if with_slope:
            gradient = np.append((prob * scores).sum(axis=1).mean() - of_target, gradient)
        return float(value), gradient

    start = np.append([1.0] if with_slope else [], np.zeros(n_classes))
    result = scipy.optimize.minimize(loss, start, jac=True, method="BFGS", options={"gtol": 1e-9}).x
    return float(result[0]) if with_slope else 1.0, result[-n_classes:] - result[-n_classes]


def _check_slope(slope: float) -> float:
    if not SLOPES[0] <= slope <= SLOPES[1]:
        raise _NoFit(f"the best slope of standardised scores is {slope:.3g}, not {SLOPES[0]:g}-{SLOPES[1]:g}")
    return slope


def _fit_isotonic(logits: Floats, truth: Floats, positive_index: int) -> Isotonic:
    level, of_patch, mass = np.unique(scipy.special.expit(logits), return_inverse=True, return_counts=True)
    share = np.bincount(of_patch, truth) / mass
    n_pos = truth.sum()
    least = min(float(level[0]), 1 / (len(truth) - n_pos + 2))
    most = max(float(level[-1]), (n_pos + 1) / (n_pos + 2))
    fitted = np.clip(scipy.optimize.isotonic_regression(share, weights=mass).x, least, most)
    rises = np.flatnonzero(np.diff(fitted))
    ends = np.union1d(np.concatenate([rises, rises + 1]), [0, len(level) - 1]).astype(int)
    return Isotonic(
        positive_index,
        tuple(level[ends].tolist()),
        tuple(fitted[ends].tolist()),
        prior="fitted with the steps",
    )
