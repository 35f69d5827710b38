"""Measurement of abstention: target and observed coverage of conformal sets, and risk against coverage."""

from collections.abc import Iterable

import numpy as np

from biopsy.evaluation.scored import ScoredPatches
from biopsy.statistics.abstention import (
    COVERAGES,
    ConformalRecord,
    abstain,
    estimate_risk,
    estimate_shares,
    optimal_aurc,
    predict_sets,
    risk_coverage_curve,
)
from biopsy.statistics.resampling import Interval
from biopsy.training.metrics import Abstention, Risk, RiskAt, SetCounts, SetShares, Shares

BEFORE = "the classifier was created by a version without conformal sets"


def measure_abstention(conformal: ConformalRecord, scored: ScoredPatches) -> Abstention:
    """Measure the classifier's prediction sets on patches.

    Args:
        conformal: The entry of ``classifier.json``; empty in classifiers of versions without it.
    """
    alpha, quantiles = conformal.get("alpha"), conformal.get("quantiles")
    per_patch_quantiles = conformal.get("per_patch_quantiles")
    shares, sets, verdict = None, None, None
    if quantiles is not None:
        shares = _measure_sets(quantiles, scored)
        sets = count_sets(predict_sets(scored.probs, quantiles), scored.pred)
        groups = (
            shares.by_class.values() if conformal["guarantee"] == "class-conditional" else [shares.patient]
        )
        verdict = check_coverage(1 - conformal["alpha"], [group.coverage for group in groups])
    return Abstention(
        alpha=alpha,
        guarantee=conformal.get("guarantee"),
        target_coverage=None if alpha is None else 1 - alpha,
        reason=conformal["reason"] if "quantiles" in conformal else BEFORE,
        n_calibration_patients=conformal.get("n_patients"),
        n_calibration_patches=conformal.get("n_patches"),
        unit=conformal.get("unit", scored.unit),
        method=conformal.get("method"),
        chosen_on=conformal.get("chosen_on"),
        sets=sets,
        verdict=verdict,
        per_patch=None if per_patch_quantiles is None else _measure_sets(per_patch_quantiles, scored),
        risk_coverage=_measure_risk(scored),
        **({} if shares is None else vars(shares)),
    )


def count_sets(sets: np.ndarray, pred: np.ndarray) -> SetCounts:
    """Count patches by the classes in their prediction set ``(n, n_classes)``."""
    size, has_pred = sets.sum(axis=1), sets[np.arange(len(sets)), np.asarray(pred, int)]
    return SetCounts(
        kept=int((~abstain(sets, pred)).sum()),
        several=int((size > 1).sum()),
        empty=int((size == 0).sum()),
        against_threshold=int(((size == 1) & ~has_pred).sum()),
    )


def check_coverage(target: float, coverages: Iterable[Interval]) -> str:
    """Return ``met``, ``inconclusive`` (below the target within sampling error) or ``violated``."""
    coverages = list(coverages)
    if any(coverage.high is not None and coverage.high < target for coverage in coverages):
        return "violated"
    return "met" if all(coverage.value >= target for coverage in coverages) else "inconclusive"


def _measure_sets(quantiles: list[float], scored: ScoredPatches) -> SetShares:
    sets, target = predict_sets(scored.probs, quantiles), scored.target
    abstained, wrong = abstain(sets, scored.pred), scored.pred != target
    parts = {
        "coverage": sets[np.arange(len(target)), target],
        "abstained": abstained,
        "error": wrong & ~abstained,
        "error_among_kept": wrong,
    }

    def measure(chosen: np.ndarray, equal_groups: bool) -> Shares:
        shares = estimate_shares(
            {name: part[chosen] for name, part in parts.items()},
            scored.group_ids[chosen],
            among={"error_among_kept": ~abstained[chosen]},
            equal_groups=equal_groups,
            **scored.resampling,
        )
        return Shares(**shares)

    everything = np.ones(len(target), bool)
    patch, coverage_by_group = measure(everything, False), None
    if scored.unit != "patch":
        groups = np.unique(scored.group_ids.astype(str), return_inverse=True)[1]
        coverage_by_group = np.sort(np.bincount(groups, parts["coverage"]) / np.bincount(groups)).tolist()
    return SetShares(
        quantiles=quantiles,
        patient=patch if scored.unit == "patch" else measure(everything, True),  # each patch its own patient
        patch=patch,
        by_class={
            name: measure(target == k, True)
            for k, name in enumerate(scored.class_names)
            if (target == k).any()
        },
        coverage_by_group=coverage_by_group,
    )


def _measure_risk(scored: ScoredPatches) -> Risk:
    wrong = scored.pred != scored.target
    confidence = scored.probs[np.arange(len(wrong)), scored.pred]
    curve = risk_coverage_curve(wrong, confidence)
    estimate = estimate_risk(wrong, confidence, scored.group_ids, **scored.resampling)
    error = float(wrong.mean())
    at = [
        RiskAt(
            share,
            float(curve.confidence[np.searchsorted(curve.coverage, share - 1e-12)]),
            estimate.at[share],
        )
        for share in COVERAGES
    ]
    return Risk(estimate.area, optimal_aurc(error), error, at)
