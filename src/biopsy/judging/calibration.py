"""Did the calibrator help where it was not fitted? The same probabilities before and after, side by side."""

from typing import Any

import numpy as np
from scipy.special import log_softmax, softmax

from biopsy.learning.classifiers import Classifier, score_classes
from biopsy.statistics.calibration import ece_floor
from biopsy.statistics.intervals import estimate_metric
from biopsy.statistics.metrics import METRICS
from biopsy.statistics.reliability import decompose_brier, estimate_reliability
from biopsy.statistics.replicates import replicate
from biopsy.statistics.tallies import rank

MEASURED = ("ece", "brier", "nll", "calibration_slope", "calibration_intercept")


def measure_calibration(
    classifier: Classifier,
    logits: np.ndarray,
    target: np.ndarray,
    group_ids: np.ndarray,
    *,
    seed: int,
    unit: str,
    level: float = 0.95,
) -> dict[str, Any]:
    """Give the ``calibration`` entry of ``metrics.json``.

    Args:
        classifier: Its calibrator is judged.
        logits: Of the judged patches, ``(n, n_classes)``.
        target: Their classes, ``(n,)``.
        group_ids: The patient (slide, patch) of each.
        seed: Of bootstrap draws and of the simulated floor.
        unit: What a group is.
        level: Nominal coverage.

    Returns:
        What ``classifier.json`` says of the calibrator, ``before`` and ``after``: for two classes the metrics
        of `MEASURED` with intervals, ``ece_floor``, ``brier_parts`` and the ``bins`` of the reliability plot;
        for more, ``nll`` and ``brier`` over all classes.
    """
    scores = score_classes(logits, classifier.info.outputs)
    calibrated, positive = classifier.calibrator.scale(scores), classifier.positive_index

    def measure(of: np.ndarray) -> dict[str, Any]:
        if positive is None:
            return _measure_classes(of, target)
        truth, prob = (target == positive).astype(int), softmax(of, axis=1)[:, positive]
        return _measure_binary(truth, prob, group_ids, seed=seed, unit=unit, level=level)

    before = measure(scores)
    after = before if calibrated is scores else measure(calibrated)
    return {**classifier.info.calibrator, "before": before, "after": after}


def _measure_binary(
    truth: np.ndarray, prob: np.ndarray, group_ids: np.ndarray, *, seed: int, unit: str, level: float
) -> dict[str, Any]:
    ranked = rank(truth, prob, group_ids=group_ids)
    result = replicate(ranked, seed=seed, names=MEASURED)
    bins = estimate_reliability(truth, prob, group_ids, seed=seed, unit=unit, level=level)
    return {
        **{
            name: estimate_metric(METRICS[name], ranked, result, level=level, unit=unit).to_dict()
            for name in MEASURED
        },
        "ece_floor": ece_floor(prob, seed=seed),
        "brier_parts": decompose_brier(truth, prob).to_dict(),
        "bins": [one.to_dict() for one in bins],
    }


def _measure_classes(scores: np.ndarray, target: np.ndarray) -> dict[str, Any]:
    rows, wanted = np.arange(len(target)), np.eye(scores.shape[1])[target]
    reason = "no interval is made for more than two classes"
    values = {
        "nll": -float(log_softmax(scores, axis=1)[rows, target].mean()),
        "brier": float(((softmax(scores, axis=1) - wanted) ** 2).sum(axis=1).mean()),
    }
    return {
        name: {"value": value, "low": None, "high": None, "reason": reason} for name, value in values.items()
    }
