"""Did the calibrator help where it was not fitted? The same probabilities before and after, side by side."""

from typing import Any

import numpy as np
from scipy.special import softmax

from biopsy.evaluation.scored import ScoredPatches
from biopsy.models.classifier import Classifier, score_classes
from biopsy.statistics.calibration import ece_floor
from biopsy.statistics.intervals import estimate_metrics
from biopsy.statistics.multiclass import ClassSample
from biopsy.statistics.reliability import decompose_brier, estimate_reliability

MEASURED_OF_CLASSES = ("ece", "brier", "nll")
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
    """Return the ``calibration`` entry of ``metrics.json``.

    Args:
        classifier: Its calibrator is judged.
        logits: Of the judged patches, ``(n, n_classes)``.
        target: Their classes, ``(n,)``.
        group_ids: The patient (slide, patch) of each.
        seed: Of bootstrap draws and of the simulated floor.
        unit: What a group is.
        level: Nominal coverage.

    Returns:
        What ``classifier.json`` says of the calibrator, ``before`` and ``after``: the metrics of `MEASURED`
        (for more than two classes `MEASURED_OF_CLASSES`) with intervals, ``ece_floor``, the ``bins`` of the
        reliability plot and, for two classes, ``brier_parts``.
    """
    scores = score_classes(logits, classifier.info.outputs)
    calibrated = classifier.calibrator.scale(scores)

    def measure(of: np.ndarray) -> dict[str, Any]:
        scored = ScoredPatches(
            target=target,
            probs=softmax(of, axis=1),
            pred=of.argmax(axis=1),
            group_ids=group_ids,
            class_names=classifier.info.class_names,
            positive_class=classifier.info.positive_class,
            unit=unit,
        )
        return measure_reliability(scored, seed=seed, level=level)

    before = measure(scores)
    after = before if calibrated is scores else measure(calibrated)
    return {**classifier.info.calibrator, "before": before, "after": after}


def measure_reliability(scored: ScoredPatches, *, seed: int, level: float = 0.95) -> dict[str, Any]:
    """Return what ``before`` and ``after`` of `measure_calibration` hold.

    With more than two classes the bins, the floor and the calibration error are those of the called class.
    """
    sample = scored.sample()
    options: dict[str, Any] = {"seed": seed, "unit": scored.unit, "level": level}
    names: tuple[str, ...]
    if isinstance(sample, ClassSample):
        names, truth, prob = MEASURED_OF_CLASSES, scored.target == scored.pred, scored.probs.max(axis=1)
    else:
        names, truth, prob = MEASURED, scored.is_positive, scored.prob
    bins = estimate_reliability(truth, prob, scored.group_ids, **options)
    result = {
        **{name: value.to_dict() for name, value in estimate_metrics(sample, names=names, **options).items()},
        "ece_floor": ece_floor(prob, seed=seed),
        "bins": [one.to_dict() for one in bins],
    }
    if scored.positive_class is not None:
        result["brier_parts"] = decompose_brier(truth, prob).to_dict()
    return result
