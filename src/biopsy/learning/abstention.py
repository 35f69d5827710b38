"""The promise a classifier makes about the patches it does answer, fitted on validation patients."""

from typing import Any

import numpy as np

from biopsy.statistics.conformal import Promise, fit_conformal, fit_plain


def fit_abstention(
    probs: np.ndarray,
    target: np.ndarray,
    group_ids: np.ndarray,
    alpha: float,
    *,
    promise: Promise,
    class_names: list[str],
    unit: str,
    chosen_on: str,
    patients_overlap: bool,
) -> dict[str, Any]:
    """Give the ``conformal`` entry of ``classifier.json``.

    Args:
        probs: Calibrated probabilities of the calibration patches, ``(n, n_classes)``.
        target: Their classes, ``(n,)``.
        group_ids: The patient (slide, patch) of each.
        alpha: Error rate promised.
        promise: Of the patches of each class, or of all together.
        class_names: In the order of the columns of ``probs``.
        unit: What a group is.
        chosen_on: The side these patches are of.
        patients_overlap: Whether patients stand on several sides, so that errors here promise nothing.

    Returns:
        ``method``, ``alpha``, ``promise``, ``quantiles`` (one a class), ``n_patients``, ``n_patches``,
        ``unit``, ``reason`` (why there are no quantiles), ``chosen_on``, and ``per_patch_quantiles``: the
        plain version's.
    """
    how: dict[str, Any] = {"promise": promise, "unit": unit, "class_names": class_names}
    fitted = fit_conformal(probs, target, group_ids, alpha, **how).to_dict()
    if patients_overlap:
        fitted["quantiles"] = None
        fitted["reason"] = (
            f"{unit}s stand on several sides of this split, so errors on {chosen_on} promise nothing about a "
            f"new {unit}"
        )
    plain = fit_plain(probs, target, alpha, promise=promise).to_dict()
    return fitted | {"chosen_on": chosen_on, "per_patch_quantiles": plain["quantiles"]}
