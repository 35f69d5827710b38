"""Abstention judged: what the conformal sets promised, what they kept, and risk against coverage."""

from typing import Any

import numpy as np

from biopsy.data.packs import Pack
from biopsy.statistics.abstention import COVERAGES, estimate_risk, estimate_shares, ideal_area, trace_risk
from biopsy.statistics.conformal import abstain, predict_sets

WEIGHTS = {"patient": True, "patch": False}
"""How shares are averaged -> whether every patient weighs the same, or every patch."""


def measure_abstention(
    conformal: dict[str, Any],
    pack: Pack,
    rows: np.ndarray,
    probs: np.ndarray,
    pred: np.ndarray,
    *,
    seed: int,
    level: float = 0.95,
) -> dict[str, Any]:
    """Give the ``abstention`` entry of ``metrics.json``.

    A promise is a mean over patients, so ``patient`` (every patient weighs the same) is what it is held
    against; ``patch`` (every patch weighs the same) stands beside it.

    Args:
        conformal: As the classifier has it; empty in classifiers made before there was one.
        pack: Targets, patients and class names.
        rows: The judged patches, ``(n,)``.
        probs: Their calibrated probabilities, ``(n, n_classes)``.
        pred: The class each was called.
        seed: Of bootstrap draws.
        level: Nominal coverage of the intervals.

    Returns:
        ``alpha``, ``promised_coverage``, ``quantile``, ``reason``, ``n_calibration_patients``,
        ``n_calibration_patches``, ``unit``, ``chosen_on``; ``sets`` (counts), ``patient``, ``patch`` (each:
        ``coverage``, ``abstained``, ``error``, ``error_among_kept``), ``by_class`` and ``verdict`` where
        there is a promise; ``per_patch`` with the same of the plain version; ``risk_coverage``.
    """
    target, groups = pack.target[rows], pack.group_ids[rows]
    how = {"seed": seed, "level": level, "unit": pack.unit}
    known = conformal or {"reason": "the classifier was made before there were conformal sets"}
    alpha, quantile = known.get("alpha"), known.get("quantile")
    entry: dict[str, Any] = {
        "alpha": alpha,
        "promised_coverage": None if alpha is None else 1 - alpha,
        "quantile": quantile,
        "reason": known.get("reason"),
        "n_calibration_patients": known.get("n_patients"),
        "n_calibration_patches": known.get("n_patches"),
        "unit": known.get("unit", pack.unit),
        "method": known.get("method"),
        "chosen_on": known.get("chosen_on"),
    }
    if quantile is not None:
        sets = predict_sets(probs, quantile)
        entry |= {"sets": count_sets(sets, pred), **_measure_sets(sets, target, pred, groups, **how)}
        entry["by_class"] = _cover_classes(sets, target, pack.class_names, groups, **how)
        entry["verdict"] = judge_promise(1 - known["alpha"], entry["patient"]["coverage"])
    plain = known.get("per_patch_quantile")
    if plain is not None:
        sets = predict_sets(probs, plain)
        entry["per_patch"] = {"quantile": plain, **_measure_sets(sets, target, pred, groups, **how)}
    return entry | {"risk_coverage": _measure_risk(target, probs, pred, groups, **how)}


def count_sets(sets: np.ndarray, pred: np.ndarray) -> dict[str, int]:
    """Count patches by what their set holds: the called class alone, another alone, several, none."""
    size, has_called = sets.sum(axis=1), sets[np.arange(len(sets)), np.asarray(pred, int)]
    return {
        "kept": int((~abstain(sets, pred)).sum()),
        "several": int((size > 1).sum()),
        "empty": int((size == 0).sum()),
        "against_threshold": int(((size == 1) & ~has_called).sum()),
    }


def judge_promise(promised: float, coverage: dict[str, Any]) -> str:
    """Say whether a promise was ``kept``, ``broken``, or missed by no more than chance allows (``open``)."""
    value, high = coverage["value"], coverage["high"]
    if value >= promised:
        return "kept"
    return "broken" if high is not None and high < promised else "open"


def _measure_sets(
    sets: np.ndarray, target: np.ndarray, pred: np.ndarray, groups: np.ndarray, **how: Any
) -> dict[str, dict[str, Any]]:
    covered = sets[np.arange(len(target)), target]
    unanswered, wrong = abstain(sets, pred), pred != target
    parts = {
        "coverage": covered,
        "abstained": unanswered,
        "error": wrong & ~unanswered,
        "error_among_kept": wrong,
    }
    measured: dict[str, dict[str, Any]] = {}
    for name, equal_groups in WEIGHTS.items():
        if how["unit"] == "patch" and measured:
            return measured | {name: measured["patient"]}  # every patch is its own patient
        shares = estimate_shares(
            parts, groups, of={"error_among_kept": ~unanswered}, equal_groups=equal_groups, **how
        )
        measured[name] = {part: share.to_dict() for part, share in shares.items()}
    return measured


def _cover_classes(
    sets: np.ndarray, target: np.ndarray, class_names: list[str], groups: np.ndarray, **how: Any
) -> dict[str, dict[str, Any]]:
    """Give the coverage of each class apart, every patient weighing the same: nothing was promised of it."""
    covered = sets[np.arange(len(target)), target]
    shares = estimate_shares(
        dict.fromkeys(class_names, covered),
        groups,
        of={name: target == k for k, name in enumerate(class_names)},
        equal_groups=True,
        **how,
    )
    return {name: share.to_dict() for name, share in shares.items()}


def _measure_risk(
    target: np.ndarray, probs: np.ndarray, pred: np.ndarray, groups: np.ndarray, **how: Any
) -> dict[str, Any]:
    wrong = pred != target
    confidence = probs[np.arange(len(pred)), pred]
    curve, found = trace_risk(wrong, confidence), estimate_risk(wrong, confidence, groups, **how)
    error = float(wrong.mean())
    return {
        "area": found.area.to_dict(),
        "ideal_area": ideal_area(error),
        "error": error,
        "at": [
            {
                "coverage": share,
                "confidence": float(curve.confidence[np.searchsorted(curve.coverage, share - 1e-12)]),
                "risk": found.at[share].to_dict(),
            }
            for share in COVERAGES
        ],
    }
