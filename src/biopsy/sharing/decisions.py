"""Chapter on decisions: what frozen thresholds promised and reach, and whether acting on the model pays."""

from collections.abc import Mapping, Sequence
from typing import Any

from biopsy.figures.calibration import draw_decision_curve
from biopsy.figures.style import svg
from biopsy.sharing.document import Block, Picture, Pictures, Section, Table, Text, metric_label, number
from biopsy.sharing.facts import RunFacts
from biopsy.sharing.numbers import Footnotes

RULES = {
    "youden": "highest sensitivity + specificity",
    "argmax": "probability .5",
    "cost": "a miss costs {} false alarms",
    "sensitivity": "sensitivity of {}",
    "specificity": "specificity of {}",
}


def describe_decisions(facts: RunFacts) -> Section | None:
    """Operating points and their drift, predictive values at a stated prevalence, the decision curve."""
    points, curve = facts.metrics.get("operating_points"), facts.metrics.get("decision_curve")
    if not points or not curve:
        return None
    blocks: list[Block] = [_table_of_points(points, facts.metrics.get("side"))]
    if "at_prevalence" in facts.metrics:
        blocks.append(_table_at_prevalence(facts.metrics["at_prevalence"]))
    caption = (
        f"Net benefit of acting on what the model calls {facts.positive}, at the prevalence of these "
        "patches: true positives less false ones, these weighed by the odds of the probability from which "
        "one would act. Above both other lines the model is worth using."
    )
    picture = Picture(caption, svg(draw_decision_curve(curve), "decision-curve"))
    blocks += [Pictures([picture], across=1), Text(say_benefit(curve))]
    return Section("decisions", "Thresholds, and what acting on them is worth", blocks)


def say_rule(rule: str) -> str:
    """Write a threshold's rule in words."""
    name, _, asked = rule.partition("=")
    return RULES[name].format(asked) if name in RULES else rule


def _table_of_points(points: Sequence[Mapping[str, Any]], side: str | None) -> Table:
    reasons, rows = Footnotes(), []
    if side is None:
        names = ("sensitivity", "specificity", "ppv", "npv")
        rows = [
            [
                say_rule(point["rule"]),
                number(point["threshold"]),
                *(reasons.estimate(point["achieved"][name]) for name in names),
            ]
            for point in points
        ]
        columns = ["threshold", "from", *(metric_label(name) for name in names)]
        note = f"The threshold was given with the predictions, or is 0.5.{reasons.text}"
        return Table(columns, rows, caption="Operating point", note=note)
    for point in points:
        row = [say_rule(point["rule"]), number(point["threshold"])]
        for name in ("sensitivity", "specificity"):
            row += [
                number(point["where_chosen"][name]),
                reasons.estimate(point["achieved"][name]),
                _signed(point["drift"][name]),
            ]
        rows.append(row)
    chosen_on = points[0]["chosen_on"]
    heads = [f"{name} {part}" for name in ("sensitivity", "specificity") for part in (chosen_on, side)]
    return Table(
        ["rule", "from", heads[0], heads[1], "drift", heads[2], heads[3], "drift"],
        rows,
        caption="Operating points: what was chosen, and what came of it",
        note=f"Every threshold was frozen on {chosen_on}; the first one decides. "
        f"Drift: {side} less {chosen_on}.{reasons.text}",
    )


def _table_at_prevalence(asked: Mapping[str, Any]) -> Table:
    reasons = Footnotes()
    rows = [
        [say_rule(point["rule"]), *(reasons.estimate(point[name]) for name in ("ppv", "npv"))]
        for point in asked["points"]
    ]
    return Table(
        ["rule", "positive predictive value", "negative predictive value"],
        rows,
        caption=f"Where {100 * asked['prevalence']:g} % of patches are positive",
        note="By Bayes' rule, with the sensitivity and the specificity found here." + reasons.text,
    )


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.3f}"


def say_benefit(curve: Mapping[str, Any]) -> str:
    """Say between which threshold probabilities the model is worth more than acting on all or on none."""
    better = [
        model > max(everyone, 0.0) for model, everyone in zip(curve["model"], curve["treat_all"], strict=True)
    ]
    spans: list[list[float]] = []
    for at, is_better, follows in zip(curve["thresholds"], better, [False, *better], strict=False):
        if is_better and follows:
            spans[-1][1] = at
        elif is_better:
            spans.append([at, at])
    if not spans:
        return "Here the model is at no probability worth more than acting on all or on none."
    named = ", ".join(f"{low:.2f}" if low == high else f"{low:.2f} to {high:.2f}" for low, high in spans)
    return f"Here the model is worth more than acting on all or on none at probabilities of {named}."
