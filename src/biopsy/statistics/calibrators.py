"""Calibrators: from scores to probabilities that mean what they say, fitted on patients held out.

Scores are what the softmax of gives a classifier's own probabilities; a calibrator gives scores again, whose
softmax are the calibrated ones. To add one, write a record with ``scale`` and ``to_dict``, a fit, and name
both in `fit_calibrator` and `calibrator_from_dict`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

from biopsy.core.errors import MetricError, suggest
from biopsy.statistics.calibration import fit_recalibration

Floats = NDArray[np.float64]
Method = Literal["temperature", "platt", "isotonic", "none"]

METHODS: tuple[Method, ...] = ("temperature", "platt", "isotonic", "none")
SLOPES = (1e-6, 1e3)  # a best slope beyond these is as good as zero or infinite
AS_TRAINED = "as trained"
MOVED = "moved from the shares that training saw to those of validation"
LEFT = "left as trained, though class weights or resampling bent it: validation fits better so"
LEAST_PROB = 1e-15  # before a logarithm, so that scores of an isotonic 0 stay finite


@dataclass(frozen=True)
class Scaling:
    """Scores times one slope plus an intercept for each class: temperature, Platt, or nothing at all.

    Attributes:
        method: Which of them.
        slope: 1 / temperature.
        intercepts: One a class; empty for none.
        prior: What was done about class weights and resampling in training.
        reason: Why nothing was fitted although it was asked for.
    """

    method: Method = "none"
    slope: float = 1.0
    intercepts: tuple[float, ...] = ()
    prior: str | None = None
    reason: str | None = None

    def scale(self, scores: Floats) -> Floats:
        """Give calibrated scores ``(n, n_classes)``."""
        if self.slope == 1 and not any(self.intercepts):
            return scores
        return self.slope * scores + (np.array(self.intercepts) if self.intercepts else 0.0)

    def to_dict(self) -> dict[str, Any]:
        """Give what ``classifier.json`` holds."""
        known: dict[str, Any] = {"method": self.method}
        if self.method != "none":
            known |= {"slope": self.slope, "intercepts": list(self.intercepts), "prior": self.prior}
        return known if self.reason is None else {**known, "reason": self.reason}


@dataclass(frozen=True)
class Isotonic:
    """The rising step function that fits best, on the positive class's probability.

    Attributes:
        positive_index: Column of the positive class.
        prob: Probabilities at which it is known, rising, ``(n_knots,)``.
        calibrated: What they become; between two, on the line between them.
    """

    positive_index: int
    prob: tuple[float, ...]
    calibrated: tuple[float, ...]
    prior: str | None = None
    method: Method = "isotonic"
    reason: str | None = None

    def scale(self, scores: Floats) -> Floats:
        """Give calibrated scores ``(n, 2)``: logarithms of the probabilities."""
        positive = self.positive_index
        prob = np.interp(
            scipy.special.expit(scores[:, positive] - scores[:, 1 - positive]), self.prob, self.calibrated
        )
        pair = np.stack([1 - prob, prob] if positive else [prob, 1 - prob], axis=1)
        return np.log(np.maximum(pair, LEAST_PROB))

    def to_dict(self) -> dict[str, Any]:
        """Give what ``classifier.json`` holds."""
        return {
            "method": self.method,
            "positive_index": self.positive_index,
            "prob": list(self.prob),
            "calibrated": list(self.calibrated),
            "prior": self.prior,
        }


Calibrator = Scaling | Isotonic


def calibrator_from_dict(record: Mapping[str, Any]) -> Calibrator:
    """Read a calibrator as `to_dict` gives it; other keys are passed over.

    Raises:
        MetricError: For a method that this version does not know.
    """
    method = check_method(record["method"])
    if method == "isotonic":
        return Isotonic(
            record["positive_index"],
            tuple(record["prob"]),
            tuple(record["calibrated"]),
            record.get("prior"),
        )
    return Scaling(
        method,
        record.get("slope", 1.0),
        tuple(record.get("intercepts", ())),
        record.get("prior"),
        record.get("reason"),
    )


def check_method(method: str, n_classes: int = 2) -> Method:
    """Give a method back if it exists and can serve that many classes.

    Raises:
        MetricError: If not.
    """
    if method not in METHODS:
        raise MetricError(f"calibration {method!r} does not exist: {suggest(method, METHODS)}")
    if method in ("platt", "isotonic") and n_classes != 2:
        raise MetricError(
            f"calibration {method!r} is for two classes, found {n_classes}: "
            "use 'temperature', which serves any number"
        )
    return method


def fit_calibrator(
    scores: ArrayLike,
    target: ArrayLike,
    method: str = "temperature",
    *,
    positive_index: int = 1,
    trained_prior: ArrayLike | None = None,
) -> Calibrator:
    """Fit a calibrator by maximum likelihood on patches that the classifier did not learn from.

    ``temperature`` (Guo et al. 2017, sec. 4.2) finds one slope for all scores and keeps every order;
    ``platt`` (Platt 1999, on the difference of two scores) finds slope and intercept; ``isotonic`` (Zadrozny
    and Elkan 2002) finds the best rising step function, and promises no more certainty than Platt's targets
    ``1 / (n_neg + 2)`` and ``(n_pos + 1) / (n_pos + 2)`` or the classifier itself do.

    Where a fit does not exist (one class, equal scores, a best slope that is infinite or not above zero) the
    scores stay as they are, and ``reason`` says why.

    Args:
        scores: ``(n, n_classes)``, whose softmax are the probabilities.
        target: Class of each patch, ``(n,)``.
        method: One of `METHODS`.
        positive_index: Column of the positive class, for two classes.
        trained_prior: Share of each class as training saw it, where class weights or resampling bent it,
            ``(n_classes,)``. Before the temperature, scores are moved from it to the shares in these patches
            (King and Zeng 2001, prior correction; Saerens et al. 2002), unless that fits them worse: a
            network that was trained long may have ignored its weights (Byrd and Lipton 2019). Platt and
            isotonic move the prior themselves.

    Raises:
        MetricError: If the method does not exist or is for two classes only, shapes do not agree, or a score
            is not finite.

    Example:
        >>> round(fit_calibrator([[0, 4], [4, 0], [0, 4], [4, 0]], [1, 0, 1, 1]).slope, 4)
        0.2747
    """
    scores, target = np.asarray(scores, np.float64), np.asarray(target)
    _check_scores(scores, target)
    method = check_method(method, scores.shape[1])
    if method == "none":
        return Scaling()
    present = np.unique(target)
    if len(present) < 2:
        return Scaling(reason=f"not calibrated: all {len(target)} patches are of class {present[0]}")
    if not np.ptp(scores - scores[:, :1], axis=0).any():
        return Scaling(reason="not calibrated: all predictions are equal")
    if method == "temperature":
        return _fit_temperature(scores, target, positive_index, trained_prior)
    logits, truth = scores[:, positive_index] - scores[:, 1 - positive_index], target == positive_index
    fit = _fit_platt if method == "platt" else _fit_isotonic
    return fit(logits, truth.astype(np.float64), positive_index)


def mean_nll(scores: Floats, target: ArrayLike) -> float:
    """Give the mean negative log-likelihood of classes, in nats."""
    return -float(scipy.special.log_softmax(scores, axis=1)[np.arange(len(scores)), target].mean())


def _check_scores(scores: Floats, target: NDArray[Any]) -> None:
    if scores.ndim != 2 or scores.shape[1] < 2 or target.shape != scores.shape[:1] or not len(target):
        raise MetricError(
            f"scores have shape {scores.shape} and target {target.shape}: give each patch one score a class"
        )
    wrong = ~np.isfinite(scores).all(axis=1)
    if wrong.any():
        raise MetricError(
            f"{wrong.sum()} patches have scores that are not finite, the first at row {np.argmax(wrong)}: "
            "nothing can be calibrated on them; look at the classifier's outputs"
        )
    if not np.isin(target, np.arange(scores.shape[1])).all():
        raise MetricError(f"targets are not all an index into the {scores.shape[1]} classes")


def _fit_temperature(
    scores: Floats, target: NDArray[Any], positive_index: int, trained_prior: ArrayLike | None
) -> Scaling:
    slope, reason = _fit_slope(scores, target)
    plain = Scaling(reason=reason) if slope is None else Scaling("temperature", slope, prior=AS_TRAINED)
    here = np.bincount(target, minlength=scores.shape[1]) / len(target)
    if trained_prior is None or not here.all():
        return plain
    shift = np.log(here) - np.log(np.asarray(trained_prior, np.float64))
    shift -= shift[1 - positive_index if len(shift) == 2 else 0]
    slope, _ = _fit_slope(scores + shift, target)
    if slope is not None:
        moved = Scaling("temperature", slope, tuple((slope * shift).tolist()), prior=MOVED)
        if mean_nll(moved.scale(scores), target) <= mean_nll(plain.scale(scores), target):
            return moved
    return plain if plain.method == "none" else replace(plain, prior=LEFT)


def _fit_slope(scores: Floats, target: NDArray[Any]) -> tuple[float | None, str | None]:
    """Find the slope of least NLL, whose derivative rises with the slope; or say why there is none."""
    margins = scores - scores[np.arange(len(scores)), target][:, None]

    def derivative(slope: float) -> float:
        return float((scipy.special.softmax(slope * margins, axis=1) * margins).sum(axis=1).mean())

    if derivative(SLOPES[0]) >= 0:
        return None, (
            "not calibrated: no positive slope fits, because validation is ranked no better than chance or "
            "all its scores are shifted to one side (platt takes off a shift)"
        )
    if derivative(SLOPES[1]) <= 0:
        return None, "not calibrated: validation is told apart without a mistake, no finite slope fits"
    return float(scipy.optimize.brentq(derivative, *SLOPES, xtol=1e-12, rtol=1e-12)), None


def _fit_platt(logits: Floats, truth: Floats, positive_index: int) -> Scaling:
    intercept, slope = fit_recalibration(logits, truth, 1 - truth)
    if np.isnan(slope):
        return Scaling(reason="not calibrated: one cut tells validation apart, no finite slope fits")
    if not SLOPES[0] <= slope <= SLOPES[1]:
        return Scaling(
            reason=f"not calibrated: the best slope, {slope:.3g}, is not within {SLOPES[0]:g}-{SLOPES[1]:g}"
        )
    intercepts = (0.0, intercept) if positive_index else (intercept, 0.0)
    return Scaling("platt", slope, intercepts, prior="fitted with the intercept")


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
