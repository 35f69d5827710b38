"""Measurement of calibration before and after the calibrator, on patches that it was not fitted on."""

from dataclasses import replace

import numpy as np
from scipy.special import softmax

from biopsy.evaluation.scored import ScoredPatches
from biopsy.models.classifier import Classifier, score_classes
from biopsy.statistics.calibration import ece_floor
from biopsy.statistics.intervals import estimate_metrics
from biopsy.statistics.multiclass import ClassSample
from biopsy.statistics.reliability import decompose_brier, estimate_reliability
from biopsy.training.metrics import Calibration, Reliability

MEASURED_OF_CLASSES = ("ece", "brier", "nll")
MEASURED = ("ece", "brier", "nll", "calibration_slope", "calibration_intercept")


def measure_calibration(classifier: Classifier, logits: np.ndarray, scored: ScoredPatches) -> Calibration:
    """Return the ``calibration`` entry of ``metrics.json``.

    Args:
        logits: ``(n, n_classes)``.
        scored: The patches; their probabilities are computed from the logits.

    Returns:
        The calibrator as in ``classifier.json``, and `Reliability` ``before`` and ``after`` calibration.
    """
    scores = score_classes(logits, classifier.info.outputs)
    calibrated = classifier.calibrator.scale(scores)

    def measure(values: np.ndarray) -> Reliability:
        return measure_reliability(replace(scored, probs=softmax(values, axis=1), pred=values.argmax(axis=1)))

    before = measure(scores)
    after = before if calibrated is scores else measure(calibrated)
    return {**classifier.info.calibrator, "before": before, "after": after}


def measure_reliability(scored: ScoredPatches) -> Reliability:
    """Measure the agreement of probabilities with observed frequencies."""
    sample, parts = scored.sample(), None
    names: tuple[str, ...]
    if isinstance(sample, ClassSample):
        names, truth, prob = MEASURED_OF_CLASSES, scored.target == scored.pred, scored.probs.max(axis=1)
    else:
        names, truth, prob = MEASURED, scored.is_positive, scored.prob
        parts = decompose_brier(truth, prob)
    return Reliability(
        **estimate_metrics(sample, names, **scored.resampling),
        ece_floor=ece_floor(prob, seed=scored.seed),
        bins=estimate_reliability(truth, prob, scored.group_ids, **scored.resampling),
        brier_parts=parts,
    )
