"""Calibration: bins of equal mass, expected calibration error, recalibration slope and intercept.

Functions used by metrics take the distinct probabilities of a sample in descending order, with the weight of
positive and of negative patches at each.
"""

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

from biopsy.core.seeds import make_rng

Floats = NDArray[np.float64]

N_BINS = 15  # Guo et al. 2017, "On calibration of modern neural networks", sec. 4
IDENTITY = (0.0, 1.0)  # intercept and slope of calibrated probabilities
LOGIT_CLIP = 1e-6  # of probabilities, before the logit


def clipped_logit(prob: ArrayLike) -> Floats:
    """Return ``log(p / (1 - p))`` with probabilities clipped to ``[1e-6, 1 - 1e-6]``."""
    return scipy.special.logit(np.clip(np.asarray(prob, dtype=np.float64), LOGIT_CLIP, 1 - LOGIT_CLIP))


def assign_bins(mass: Floats, n_bins: int) -> NDArray[np.intp]:
    """Divide distinct probabilities, in descending order, into bins of equal mass.

    A probability is assigned to the bin of the middle of its mass, so that ties are in one bin and a weight
    of two equals two patches. With many ties there may be fewer bins than requested.
    """
    middle = np.cumsum(mass) - mass / 2
    return np.minimum(middle * n_bins / mass.sum(), n_bins - 1).astype(np.intp)


def bin_patches(prob: ArrayLike, *, n_bins: int = N_BINS) -> NDArray[np.intp]:
    """Return the bin of each patch, 0 the lowest, see `assign_bins`; some numbers may be unused."""
    _, of_patch, mass = np.unique(-np.asarray(prob, np.float64), return_inverse=True, return_counts=True)
    return n_bins - 1 - assign_bins(mass.astype(np.float64), n_bins)[of_patch]


def calibration_error(prob: Floats, pos: Floats, neg: Floats, n_bins: int = N_BINS) -> float:
    """Return the expected calibration error (Naeini et al. 2015); equal-mass bins (Nixon et al. 2019)."""
    mass = pos + neg
    bins = assign_bins(mass, n_bins)
    gap = np.bincount(bins, prob * mass - pos)
    return float(np.abs(gap).sum() / mass.sum())


def ece_floor(prob: ArrayLike, *, seed: int, draws: int = 200) -> float:
    """Return the expected calibration error of perfectly calibrated probabilities in a finite sample.

    It is the mean over ``draws`` sets of labels drawn from the probabilities. Labels are independent, so that
    the real floor is higher if patients differ.
    """
    prob = np.asarray(prob, dtype=np.float64)
    bins = bin_patches(prob, n_bins=N_BINS)
    rng = make_rng(seed, "ece floor")
    errors = [np.abs(np.bincount(bins, prob - (rng.random(len(prob)) < prob))).sum() for _ in range(draws)]
    return float(np.mean(errors) / len(prob))


def fit_recalibration(
    logits: Floats, pos: Floats, neg: Floats, *, start: tuple[float, float] = IDENTITY
) -> tuple[float, float]:
    """Fit ``P(positive) = expit(intercept + slope * logit)`` by maximum likelihood.

    Newton's method; a step with a largest change ``d`` of any logit above .5 is damped by ``log(1 + d) / d``,
    so that it converges from any start (Sun and Tran-Dinh 2019, generalised self-concordance).

    Returns:
        ``(intercept, slope)``; both NaN if there is no finite maximum, because a threshold separates the
        classes or all logits are equal.
    """
    x_pos, x_neg = logits[pos > 0], logits[neg > 0]
    if x_pos.size == 0 or x_neg.size == 0 or x_pos.min() >= x_neg.max() or x_pos.max() <= x_neg.min():
        return np.nan, np.nan
    low, high, mass, (a, b) = float(logits.min()), float(logits.max()), pos + neg, start
    for _ in range(200):
        p = scipy.special.expit(a + b * logits)
        expected = mass * p
        residual, curvature = pos - expected, expected * (1 - p)
        curved = curvature * logits
        h00, h01, h11 = float(curvature.sum()), float(curved.sum()), float(curved @ logits)
        g0, g1, det = float(residual.sum()), float(residual @ logits), h00 * h11 - h01**2
        if not det > 0:
            break
        step_a, step_b = (h11 * g0 - h01 * g1) / det, (h00 * g1 - h01 * g0) / det
        change = max(abs(step_a + step_b * low), abs(step_a + step_b * high))
        shrink = float(np.log1p(change)) / change if change > 0.5 else 1.0
        a, b = a + shrink * step_a, b + shrink * step_b
        if change < 1e-6:
            return float(a), float(b)
    if start == IDENTITY:
        return np.nan, np.nan
    return fit_recalibration(logits, pos, neg)  # from this start every curvature vanished


def fit_intercept(logits: Floats, pos: Floats, neg: Floats, *, start: float = 0.0) -> float:
    """Fit ``P(positive) = expit(intercept + logit)``, calibration-in-the-large; both classes are needed.

    Source: Van Calster et al. 2019, "Calibration: the Achilles heel of predictive analytics".
    """
    mass, n_pos, a = pos + neg, float(pos.sum()), start
    for _ in range(200):
        p = scipy.special.expit(a + logits)
        expected = float(mass @ p)
        step = (n_pos - expected) / (expected - float(mass @ p**2))
        a += step if abs(step) < 0.5 else float(np.copysign(np.log1p(abs(step)), step))
        if abs(step) < 1e-6:
            break
    return a
