"""What a comparison found, as its page, its table and the command line say it, with or without ids."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from biopsy.figures.comparisons import draw_differences
from biopsy.figures.style import svg
from biopsy.sharing.document import metric_label, plural
from biopsy.sharing.identities import KINDS, Aliases

ALPHA = 0.05


@dataclass(frozen=True)
class ComparisonFacts:
    """Everything the page of a comparison may say.

    Attributes:
        document: What ``comparison.json`` holds.
        changed: The patches whose call turned, of two; None of more.
        get_patch: Gives a patch ``(H, W, 3)`` uint8 by its ``patch_id``; None shows none.
        predictions: Any of the tables of predictions: who was tested.
        ids_hidden: Whether ids have been replaced by numbers.
    """

    document: Mapping[str, Any]
    changed: pd.DataFrame | None
    get_patch: Callable[[str], np.ndarray] | None
    predictions: pd.DataFrame
    ids_hidden: bool = False

    @property
    def unit(self) -> str:
        return str(self.document["unit"])

    @property
    def units(self) -> str:
        return plural(self.unit)

    @cached_property
    def figure(self) -> str:
        """The differences drawn, as SVG."""
        return svg(draw_differences(self.document["differences"]), "differences")


def hide_comparison(facts: ComparisonFacts) -> ComparisonFacts:
    """Replace every id in a comparison by a number."""
    table = facts.predictions
    aliases = Aliases({kind: table[f"{kind}_id"] for kind in KINDS}, facts.document["pack"]["content_sha256"])
    show, changed = facts.get_patch, facts.changed
    if changed is not None:
        order = changed["change"].abs()
        changed = aliases.table(changed.assign(_order=range(len(order)))).sort_values("_order")
        changed = changed.drop(columns="_order").reset_index(drop=True)
    return replace(
        facts,
        document=aliases.nested(facts.document),
        changed=changed,
        get_patch=None if show is None else lambda alias: show(aliases.original("patch", alias)),
        predictions=aliases.table(table),
        ids_hidden=True,
    )


def list_differences(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Give one row a classifier and metric: both values, difference, interval, p, spread over seeds."""
    values = {rival["name"]: rival["patch"] for rival in document["rivals"]}
    rows = []
    for one in document["differences"]:
        for name, found in one["metrics"].items():
            seeds = found["over_seeds"]
            rows.append(
                {
                    "classifier": one["of"],
                    "reference": one["to"],
                    "metric": name,
                    "reference_value": values[one["to"]][name]["value"],
                    "value": values[one["of"]][name]["value"],
                    "difference": found["value"],
                    **{key: found[key] for key in ("low", "high", "p", "p_holm")},
                    **{f"seeds_{key}": seeds[key] for key in ("n", "sd", "min", "max")},
                    "reason": found["reason"],
                }
            )
    return rows


def say_verdict(document: Mapping[str, Any], one: Mapping[str, Any]) -> str:
    """Say in a sentence what a comparison found in the metric that was to answer."""
    name = document["metric"]
    found, label = one["metrics"][name], metric_label(name, len(document["class_names"]))
    of, to, units = one["of"], one["to"], plural(document["unit"])
    if found["value"] is None or np.isnan(found["value"]):
        return f"{label} of {of} and {to} cannot be compared: {found['reason']}."
    if found["p"] == 1 and found["value"] == 0:
        return f"{of} and {to} have the same {label} to the last digit, whoever is left out."
    side = "above" if found["value"] > 0 else "below"
    amount = f"{label} of {of} is {abs(found['value']):.3f} {side} that of {to}"
    if found["low"] is None:
        return f"{amount}; {found['reason']}, so nothing can be said of other {units}."
    level = document["interval"]["level"]
    interval = f"{level:.0%} interval {found['low']:+.3f} to {found['high']:+.3f}, p {say_p(found['p_holm'])}"
    several = " after Holm's correction" if len(document["differences"]) > 1 else ""
    if found["p_holm"] < ALPHA:
        return f"{amount} ({interval}{several}): more than chance among {units} explains."
    return f"{amount} ({interval}{several}): a difference is not shown, nor is it shown that there is none."


def say_p(p: float | None) -> str:
    """Write a p-value.

    Example:
        >>> say_p(0.0304), say_p(0.00002), say_p(None)
        ('0.030', '< 0.001', '-')
    """
    return "-" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"
