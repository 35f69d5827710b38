"""Abstention judged: what the conformal sets promised, what they kept, and risk against coverage."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from biopsy.data.packs import Pack
from biopsy.statistics.conformal import abstain, predict_sets
from biopsy.statistics.risk_coverage import (
    COVERAGES,
    estimate_risk,
    estimate_shares,
    optimal_aurc,
    risk_coverage_curve,
)


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
    """Return the ``abstention`` entry of ``metrics.json``.

    A promise is a mean over patients, so it is held against ``by_class`` (promised of each class) or
    ``patient`` (of all patches), where every patient weighs the same; ``patch``, where every patch weighs the
    same, stands beside them.

    Args:
        conformal: As the classifier has it; empty in classifiers made before there was one.
        pack: Targets, patients and class names.
        rows: The judged patches, ``(n,)``.
        probs: Their calibrated probabilities, ``(n, n_classes)``.
        pred: The class each was called.
        seed: Of bootstrap draws.
        level: Nominal coverage of the intervals.

    Returns:
        ``alpha``, ``promise``, ``promised_coverage``, ``quantiles``, ``reason``, ``n_calibration_patients``,
        ``n_calibration_patches``, ``unit``, ``method``, ``chosen_on``; ``sets`` (counts), ``patient``,
        ``patch`` and each class of ``by_class`` (each: ``coverage``, ``abstained``, ``error``,
        ``error_among_kept``) and ``verdict`` where there is a promise; ``per_patch`` with the same of the
        plain version; ``risk_coverage``.
    """
    target, groups = pack.target[rows], pack.group_ids[rows]
    how = {"seed": seed, "level": level, "unit": pack.unit}
    before = {"reason": "the classifier was made before there were conformal sets"}
    known: dict[str, Any] = conformal if "quantiles" in conformal else before
    alpha, quantiles = known.get("alpha"), known.get("quantiles")
    entry: dict[str, Any] = {
        "alpha": alpha,
        "promise": known.get("promise"),
        "promised_coverage": None if alpha is None else 1 - alpha,
        "quantiles": quantiles,
        "reason": known.get("reason"),
        "n_calibration_patients": known.get("n_patients"),
        "n_calibration_patches": known.get("n_patches"),
        "unit": known.get("unit", pack.unit),
        "method": known.get("method"),
        "chosen_on": known.get("chosen_on"),
    }

    def measure(quantiles: list[float]) -> dict[str, Any]:
        return _measure_sets(predict_sets(probs, quantiles), target, pred, groups, pack.class_names, **how)

    if quantiles is not None:
        entry |= {"sets": count_sets(predict_sets(probs, quantiles), pred), **measure(quantiles)}
        held = entry["by_class"].values() if known["promise"] == "each-class" else [entry["patient"]]
        entry["verdict"] = judge_coverage(1 - known["alpha"], [shares["coverage"] for shares in held])
    if (plain := known.get("per_patch_quantiles")) is not None:
        entry["per_patch"] = {"quantiles": plain, **measure(plain)}
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


def judge_coverage(promised: float, coverages: Sequence[dict[str, Any]]) -> str:
    """Return whether a promise was ``kept``, ``broken``, or missed by no more than chance allows (``open``).

    Args:
        promised: Coverage.
        coverages: Estimates of what it was promised of, all of which must reach it.
    """
    result = [(one["value"], one["high"]) for one in coverages]
    if any(high is not None and high < promised for _, high in result):
        return "broken"
    return "kept" if all(value >= promised for value, _ in result) else "open"


def _measure_sets(
    sets: np.ndarray,
    target: np.ndarray,
    pred: np.ndarray,
    groups: np.ndarray,
    class_names: list[str],
    **how: Any,
) -> dict[str, Any]:
    """Return coverage, abstention and error where patients weigh the same, where patches do, and by class."""
    unanswered, wrong = abstain(sets, pred), pred != target
    parts = {
        "coverage": sets[np.arange(len(target)), target],
        "abstained": unanswered,
        "error": wrong & ~unanswered,
        "error_among_kept": wrong,
    }

    def measure(chosen: np.ndarray, equal_groups: bool) -> dict[str, Any]:
        shares = estimate_shares(
            {name: part[chosen] for name, part in parts.items()},
            groups[chosen],
            of={"error_among_kept": ~unanswered[chosen]},
            equal_groups=equal_groups,
            **how,
        )
        return {name: share.to_dict() for name, share in shares.items()}

    every = np.ones(len(target), bool)
    patch = measure(every, False)
    return {
        "patient": patch if how["unit"] == "patch" else measure(every, True),  # each patch its own patient
        "patch": patch,
        "by_class": {
            name: measure(target == k, True) for k, name in enumerate(class_names) if (target == k).any()
        },
    }


def _measure_risk(
    target: np.ndarray, probs: np.ndarray, pred: np.ndarray, groups: np.ndarray, **how: Any
) -> dict[str, Any]:
    wrong = pred != target
    confidence = probs[np.arange(len(pred)), pred]
    curve, result = risk_coverage_curve(wrong, confidence), estimate_risk(wrong, confidence, groups, **how)
    error = float(wrong.mean())
    return {
        "area": result.area.to_dict(),
        "ideal_area": optimal_aurc(error),
        "error": error,
        "at": [
            {
                "coverage": share,
                "confidence": float(curve.confidence[np.searchsorted(curve.coverage, share - 1e-12)]),
                "risk": result.at[share].to_dict(),
            }
            for share in COVERAGES
        ],
    }
