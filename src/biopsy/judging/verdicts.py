"""What a test of maps says: gains over the baselines with their intervals, a verdict, and a sentence.

A method's gain is by how much more probability it costs to take away what it marks first than what a baseline
marks first: half of (area under its insertion curve less area under its deletion curve), less the same of the
baseline, patch by patch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from biopsy.judging.methods import find_method
from biopsy.judging.pointing import point_at
from biopsy.judging.removal import area_under
from biopsy.statistics.means import estimate_mean

Traced = Mapping[str, tuple[np.ndarray, np.ndarray]]

BASELINES = {"random": "random maps", "edges": "edges"}
ALIKE_FROM = 0.5  # rank correlation with the trained maps from which maps of random weights are called alike
MIXED = (0.05, 0.95)  # share of tumour in patches where pointing at it can be right or wrong
_VERBS = {"beats": "beats {}", "worse": "is worse than {}", "no better": "does not beat {}"}


def judge_method(
    name: str,
    traced: Traced,
    randomised: Sequence[Mapping[str, Any]],
    pointing: Mapping[str, Any] | None,
    group_ids: np.ndarray,
    *,
    seed: int,
    unit: str,
) -> dict[str, Any]:
    """Give the record of a method.

    Args:
        name: Of the method.
        traced: Curves of deletion and insertion, by method and baseline.
        randomised: One record a step of weight randomisation.
        pointing: As `judge_pointing` gives it; None where the tumour's pixels are not known.
        group_ids: Patient (slide, patch) of each patch.
        seed: Of bootstrap draws.
        unit: What a group is.
    """
    score, gains, n_better = _score(traced[name]), {}, {}
    for baseline in BASELINES:
        gain = score - _score(traced[baseline])
        gains[baseline] = estimate_mean(gain, group_ids, seed=seed, unit=unit).to_dict()
        n_better[baseline] = int((gain > 0).sum())
    record = {
        "name": name,
        "title": find_method(name).title,
        **describe_curves(traced[name], group_ids, seed=seed, unit=unit),
        "gain": gains,
        "n_better": n_better,
        "verdict": {baseline: judge_gain(gain) for baseline, gain in gains.items()},
        "randomised": list(randomised),
        "pointing": pointing,
    }
    return record | {"answer": say_answer(record, len(np.unique(group_ids)), unit)}


def describe_curves(
    curves: tuple[np.ndarray, np.ndarray], group_ids: np.ndarray, *, seed: int, unit: str
) -> dict[str, Any]:
    """Give the mean curves of deletion and insertion, and the areas under them with their intervals."""
    found: dict[str, Any] = {}
    for name, curve in zip(("deletion", "insertion"), curves, strict=True):
        area = estimate_mean(area_under(curve), group_ids, seed=seed, unit=unit, bounds=(0.0, 1.0))
        found[name] = area.to_dict() | {"curve": curve.mean(axis=0).tolist()}
    return found


def judge_pointing(
    maps: np.ndarray, truth: np.ndarray, group_ids: np.ndarray, *, seed: int, unit: str
) -> dict[str, Any]:
    """Say how often the highest point of a map lies in tumour, and how much of the map.

    Only patches of which some but not all is tumour are asked.

    Args:
        maps: ``(n, H, W)``.
        truth: Where tumour is, bool ``(n, H, W)``.
        group_ids: Patient (slide, patch) of each patch.
        seed: Of bootstrap draws.
        unit: What a group is.
    """
    share = truth.mean(axis=(1, 2))
    mixed = (share > MIXED[0]) & (share < MIXED[1])
    if not mixed.any():
        return {"n_patches": 0}
    found, groups = point_at(maps[mixed], truth[mixed]), group_ids[mixed]
    shares = {
        name: estimate_mean(values, groups, seed=seed, unit=unit, bounds=(0.0, 1.0)).to_dict()
        for name, values in found.items()
    }
    gains = {
        f"{name}_gain": estimate_mean(found[name] - found["area"], groups, seed=seed, unit=unit).to_dict()
        for name in ("hit", "mass")
    }
    return {"n_patches": int(mixed.sum()), "n_groups": len(np.unique(groups)), **shares, **gains}


def judge_gain(gain: Mapping[str, Any]) -> str:
    """Give ``beats``, ``worse``, ``no better``, or ``unsaid`` where there is no interval."""
    if gain["low"] is None:
        return "unsaid"
    if gain["low"] > 0:
        return "beats"
    return "worse" if gain["high"] < 0 else "no better"


def say_answer(record: Mapping[str, Any], n_groups: int, unit: str) -> str:
    """Say in plain sentences what was found of a method."""
    title, parts = record["title"], []
    if "unsaid" in record["verdict"].values():
        found = [
            f"{abs(gain['value']):.2f} {'above' if gain['value'] >= 0 else 'below'} {BASELINES[baseline]}"
            for baseline, gain in record["gain"].items()
        ]
        units = unit if n_groups == 1 else "patches" if unit == "patch" else f"{unit}s"
        reason = record["gain"]["random"]["reason"]
        parts.append(f"{title}: cannot be said from {n_groups} {units} ({reason}); taken as it is, ")
        parts[-1] += " and ".join(found)
    else:
        found = [
            f"{_VERBS[record['verdict'][baseline]].format(BASELINES[baseline])} {_spell_gain(gain)}"
            for baseline, gain in record["gain"].items()
        ]
        parts.append(f"{title} {' and '.join(found)}")
    if record["randomised"]:
        alike = record["randomised"][-1]["rank_correlation"]
        said = "hardly changes" if alike >= ALIKE_FROM else "changes"
        parts.append(f"with all weights random its map {said} (rank correlation {alike:.2f})")
    if record["pointing"] and record["pointing"]["n_patches"]:
        hit, area = record["pointing"]["hit"], record["pointing"]["area"]
        parts.append(
            f"its highest point lies in tumour in {hit['value']:.0%} of patches, where {area['value']:.0%} "
            "of the area is tumour"
        )
    said = "; ".join(parts) + "."
    return said[0].upper() + said[1:]


def _score(curves: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    deleted, inserted = curves
    return (area_under(inserted) - area_under(deleted)) / 2


def _spell_gain(gain: Mapping[str, Any]) -> str:
    by = f"by {gain['value']:.2f}" if gain["low"] > 0 else f"({gain['value']:.2f}"
    interval = f"{gain['low']:.2f} to {gain['high']:.2f}"
    if gain["low"] > 0:
        return f"{by} ({interval})"
    return (
        f"by {-gain['value']:.2f} ({-gain['high']:.2f} to {-gain['low']:.2f})"
        if gain["high"] < 0
        else (f"{by}, {interval})")
    )
