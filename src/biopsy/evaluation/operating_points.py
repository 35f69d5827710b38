"""What frozen thresholds turn out to do on the judged side, at another prevalence, whether acting pays."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from biopsy.statistics.decisions import (
    Calls,
    count_calls,
    estimate_benefit_gain,
    estimate_net_benefit,
    estimate_predictive_values,
    estimate_rates,
    net_benefit,
)
from biopsy.statistics.thresholds import parse_rule

CURVE = np.arange(1, 100) / 100  # threshold probabilities of the decision curve
MARKED = np.arange(1, 20) / 20  # those with an interval


def measure_decisions(
    truth: np.ndarray,
    prob: np.ndarray,
    group_ids: np.ndarray,
    thresholds: Sequence[Mapping[str, Any]],
    *,
    prevalence: float | None,
    seed: int,
    unit: str,
    level: float = 0.95,
) -> dict[str, Any]:
    """Return ``operating_points``, ``decision_curve`` and, where asked for, ``at_prevalence``.

    Args:
        truth: 1 where a patch is positive, ``(n,)``.
        prob: Calibrated probability of the positive class.
        group_ids: The patient (slide, patch) of each.
        thresholds: Of ``classifier.json``, frozen on validation.
        prevalence: At which ppv and npv are worked out; None for none.
        seed: Of bootstrap draws.
        unit: What a group is.
        level: Nominal coverage.

    Raises:
        MetricError: If the prevalence is not between 0 and 1.
    """
    at = [*(frozen["value"] for frozen in thresholds), *MARKED]
    calls = count_calls(truth, prob, group_ids, at, seed=seed, unit=unit, level=level)
    result: dict[str, Any] = {
        "operating_points": [_describe_point(calls, k, frozen) for k, frozen in enumerate(thresholds)],
        "decision_curve": _describe_curve(truth, prob, calls, len(thresholds)),
    }
    if prevalence is not None:
        points = [
            {"rule": frozen["rule"], "threshold": frozen["value"]}
            | {
                name: interval.to_dict()
                for name, interval in estimate_predictive_values(calls, k, prevalence).items()
            }
            for k, frozen in enumerate(thresholds)
        ]
        result["at_prevalence"] = {"prevalence": prevalence, "points": points}
    return result


def _describe_point(calls: Calls, k: int, frozen: Mapping[str, Any]) -> dict[str, Any]:
    """Return what one threshold targets, reached where it was chosen, and reaches here."""
    rates = estimate_rates(calls, k)
    chosen = {name: frozen.get(name) for name in ("sensitivity", "specificity")}
    return {
        "rule": frozen["rule"],
        "threshold": frozen["value"],
        "chosen_on": frozen["chosen_on"],
        "promised": _promise(frozen["rule"]),
        "where_chosen": chosen,
        "achieved": {name: interval.to_dict() for name, interval in rates.items()},
        "drift": {
            name: None if value is None or np.isnan(rates[name].value) else rates[name].value - value
            for name, value in chosen.items()
        },
    }


def _promise(rule: str) -> dict[str, float] | None:
    """Return the sensitivity or specificity a rule asks for; None where it asks for neither."""
    name = rule.partition("=")[0]
    return {name: parse_rule(rule)[1]} if name in ("sensitivity", "specificity") else None


def _describe_curve(truth: np.ndarray, prob: np.ndarray, calls: Calls, start: int) -> dict[str, Any]:
    """Return the net benefit of the model, of treating all and (always 0) none, per patch."""
    return {
        "thresholds": CURVE,
        "model": net_benefit(truth, prob, CURVE),
        "treat_all": net_benefit(truth, np.ones(len(truth)), CURVE),
        "marked": [
            {
                "threshold": float(value),
                **estimate_net_benefit(calls, start + k).to_dict(),
                "gain": estimate_benefit_gain(calls, start + k).to_dict(),
            }
            for k, value in enumerate(MARKED)
        ],
    }
