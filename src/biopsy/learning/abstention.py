"""The promise a classifier makes about the patches it does answer, fitted on validation patients."""

from typing import Any

import numpy as np

from biopsy.statistics.conformal import Conformal, fit_conformal, fit_plain


def fit_abstention(
    probs: np.ndarray,
    target: np.ndarray,
    group_ids: np.ndarray,
    alpha: float,
    *,
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
        unit: What a group is.
        chosen_on: The side these patches are of.
        patients_overlap: Whether patients stand on several sides, so that errors here promise nothing.

    Returns:
        ``method``, ``alpha``, ``quantile``, ``n_patients``, ``n_patches``, ``unit``, ``reason`` (why there is
        no quantile), ``chosen_on``, and ``per_patch_quantile``, that of the plain version.
    """
    fitted = fit_conformal(probs, target, group_ids, alpha, unit=unit)
    if patients_overlap:
        reason = (
            f"{unit}s stand on several sides of this split, so errors on {chosen_on} promise nothing about a "
            f"new {unit}"
        )
        fitted = Conformal(alpha, None, fitted.n_patients, fitted.n_patches, unit, reason)
    plain = fit_plain(probs, target, alpha)
    return fitted.to_dict() | {"chosen_on": chosen_on, "per_patch_quantile": plain.quantile}
