"""Measurement of abstention: target and observed coverage of conformal sets, and risk against coverage."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from biopsy.evaluation.scored import ScoredPatches
from biopsy.statistics.abstention import (
    COVERAGES,
    abstain,
    estimate_risk,
    estimate_shares,
    optimal_aurc,
    predict_sets,
    risk_coverage_curve,
)
from biopsy.statistics.resampling import Interval

BEFORE = "the classifier was created by a version without conformal sets"


@dataclass(frozen=True)
class SetCounts:
    """Patches by prediction set: the predicted class only, several classes, none, or only another class."""

    kept: int
    several: int
    empty: int
    against_threshold: int


@dataclass(frozen=True)
class Shares:
    """Shares of patches: true class in the set, abstentions, errors without abstention, selective risk."""

    coverage: Interval
    abstained: Interval
    error: Interval
    error_among_kept: Interval


@dataclass(frozen=True)
class SetShares:
    """Shares reached by sets of given quantiles: patients weighted equally, patches equally, by class."""

    quantiles: list[float]
    patient: Shares
    patch: Shares
    by_class: dict[str, Shares]


@dataclass(frozen=True)
class RiskAt:
    """Error rate of the most confident patches, and the lowest confidence among them."""

    coverage: float
    confidence: float
    risk: Interval


@dataclass(frozen=True)
class Risk:
    """Area under the risk-coverage curve, the smallest possible at this error rate, and points on it."""

    area: Interval
    ideal_area: float
    error: float
    at: list[RiskAt]


@dataclass(frozen=True, kw_only=True)
class Abstention:
    """The ``abstention`` entry of ``metrics.json``.

    Attributes:
        alpha, guarantee, reason, n_calibration_patients, n_calibration_patches, unit, method, chosen_on: From
            the classifier.
        target_coverage: ``1 - alpha``.
        quantiles, patient, patch, by_class: Of the classifier's sets, as in `SetShares`; None without sets.
        sets: Their counts.
        verdict: ``met``, ``violated`` or ``inconclusive``: whether the mean coverage over patients reaches
            the target, for each class or for all patches.
        per_patch: Shares of split conformal sets that treat patches as independent.
        risk_coverage: Risk against coverage.
    """

    alpha: float | None
    guarantee: str | None
    target_coverage: float | None
    reason: str | None
    n_calibration_patients: int | None
    n_calibration_patches: int | None
    unit: str
    method: str | None
    chosen_on: str | None
    quantiles: list[float] | None = None
    patient: Shares | None = None
    patch: Shares | None = None
    by_class: dict[str, Shares] | None = None
    sets: SetCounts | None
    verdict: str | None
    per_patch: SetShares | None
    risk_coverage: Risk


def measure_abstention(conformal: Mapping[str, Any], scored: ScoredPatches) -> Abstention:
    """Measure the classifier's prediction sets on patches.

    Args:
        conformal: The entry of ``classifier.json``; empty in classifiers of versions without it.
    """
    alpha, quantiles, per_patch_quantiles = (
        conformal.get(key) for key in ("alpha", "quantiles", "per_patch_quantiles")
    )
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
    patch = measure(everything, False)
    return SetShares(
        quantiles=quantiles,
        patient=patch if scored.unit == "patch" else measure(everything, True),  # each patch its own patient
        patch=patch,
        by_class={
            name: measure(target == k, True)
            for k, name in enumerate(scored.class_names)
            if (target == k).any()
        },
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
