"""Chapters on how good a run is over all patches: numbers, confusion, ranking, calibration."""

from collections.abc import Mapping, Sequence
from string import ascii_lowercase
from typing import Any

import numpy as np

from biopsy.figures.confusion import draw_confusion, draw_confusion_matrix
from biopsy.figures.curves import draw_precision_recall, draw_reliability, draw_roc
from biopsy.figures.style import svg
from biopsy.sharing.document import (
    Block,
    Picture,
    Pictures,
    Section,
    Table,
    estimate_text,
    interval_of,
    metric_label,
    number,
)
from biopsy.sharing.facts import RunFacts


def describe_numbers(facts: RunFacts) -> Section:
    """Return every metric with its interval, the classification report, and the confusion."""
    blocks: list[Block] = [table_of_metrics(facts.metrics, facts.unit, facts.on_side)]
    if facts.metrics.get("classification_report"):
        blocks.append(table_of_classes(facts.metrics["classification_report"], _say_calls(facts)))
    if facts.is_binary:
        blocks.append(Pictures(_confusion_pictures(facts)))
    else:
        blocks += [
            _table_of_one_against_rest(facts.metrics.get("one_vs_rest", {})),
            picture_of_confusion(facts.metrics["confusion_matrix"], facts.class_names),
        ]
    return Section("numbers", "The numbers", blocks)


def picture_of_confusion(matrix: Sequence[Sequence[int]], class_names: Sequence[str]) -> Pictures:
    """Return the confusion matrix of more than two classes as a figure."""
    figure = draw_confusion_matrix(np.asarray(matrix), class_names)
    return Pictures([Picture("Patches by true and predicted class.", svg(figure, "confusion"))], across=1)


def table_of_metrics(metrics: Mapping[str, Any], unit: str, on_side: str = " on the test side") -> Table:
    """Make the table of all metrics, pooled over patches and as means over patients."""
    pooled, n_classes = metrics.get("patch") or {}, len(metrics.get("class_names", ("", "")))
    each = metrics.get("patient") or {}
    rows, reasons = [], Footnotes()
    for name, estimate in pooled.items():
        row = [metric_label(name, n_classes), number(estimate.get("value")), reasons.interval(estimate)]
        if each:
            within = each.get(name) or {}
            defined = within.get("n_defined")
            row += [
                number(within.get("value")),
                reasons.interval(within),
                number(within.get("median")),
                number(within.get("worst")),
                number(defined),
            ]
        rows.append(row)
    columns = ["", "all patches", "95 % interval"]
    if each:
        columns += [f"mean of {unit}s", "95 % interval", "median", "worst", f"{unit}s"]
    method = metrics.get("interval", {})
    note = f"Intervals: {method.get('method', 'not stated')}, unit {unit}."
    if metrics.get("ece_floor") is not None:
        floor = number(metrics["ece_floor"])
        note += f" A perfect model on these probabilities would show a calibration error of {floor}."
    note += reasons.text
    return Table(columns, rows, caption=f"Metrics{on_side}", note=note)


def table_of_classes(report: Sequence[Mapping[str, Any]], note: str = "") -> Table:
    """Return the classification report: precision, recall and F1 of each class, and their averages."""
    rows = [
        [
            row["class"] if "class" in row else f"{row['average']} average",
            *(number(row[key]) for key in ("precision", "recall", "f1", "n")),
        ]
        for row in report
    ]
    return Table(
        ["class", "precision", "recall", "F1", "patches"], rows, caption="Classification report", note=note
    )


def _say_calls(facts: RunFacts) -> str:
    if not facts.is_binary:
        return "Each patch is assigned the class of highest probability."
    threshold = "frozen threshold" if facts.is_run else "threshold"
    return (
        f"At the {threshold} {number(facts.threshold)}. The recall of {facts.positive} is the sensitivity, "
        f"that of {facts.negative} the specificity."
    )


def _table_of_one_against_rest(per_class: Mapping[str, Mapping[str, Any]]) -> Table:
    names = ("auroc", "sensitivity", "specificity", "ppv", "f1")
    rows = [[name, *(estimate_text(m.get(key, {})) for key in names)] for name, m in per_class.items()]
    return Table(
        ["class", *(metric_label(key) for key in names)],
        rows,
        caption="Each class against the rest",
        note="One-vs-rest: the class is positive, all others together are negative.",
    )


def _confusion_pictures(facts: RunFacts) -> list[Picture]:
    chosen = facts.metrics.get("threshold") or {}
    rule, side = chosen.get("rule", "rule not stated"), chosen.get("chosen_on", "a side not stated")
    named = {
        "confusion": f"At the frozen threshold {number(facts.threshold)} ({rule}, chosen on {side}).",
        "at_half": "The same at probability .5.",
    }
    if not facts.is_run:
        named["confusion"] = f"At the threshold {number(facts.threshold)}."
    return [
        Picture(caption, svg(_draw_quadrants(facts, counts), key))
        for key, caption in named.items()
        if (counts := facts.metrics.get(key, {}).get("confusion", facts.metrics.get(key)))
    ]


def _draw_quadrants(facts: RunFacts, counts: Mapping[str, int]) -> Any:
    four = {key: int(counts[key]) for key in ("tp", "fp", "fn", "tn")}
    return draw_confusion(**four, negative=facts.negative, positive=facts.positive)


def describe_curves(facts: RunFacts) -> Section | None:
    """Ranking and calibration, for two classes of which both occur."""
    target = facts.is_positive
    if not facts.is_binary:
        return None
    prob = facts.predictions["prob"].to_numpy(float)
    pictures = []
    if 0 < target.sum() < len(target):
        reached = [facts.pooled.get(name, {}).get("value") for name in ("sensitivity", "specificity", "ppv")]
        roc_point = None if None in reached[:2] else (reached[0], reached[1])
        pr_point = None if None in (reached[0], reached[2]) else (reached[0], reached[2])
        pictures = [
            Picture(
                "How well patches are ranked. The dot is the threshold that was frozen before.",
                svg(draw_roc(target, prob, operating_point=roc_point), "roc"),
            ),
            Picture(
                f"Of the patches called {facts.positive}, how many are. Without skill it stays on the floor.",
                svg(draw_precision_recall(target, prob, operating_point=pr_point), "pr"),
            ),
        ]
    if "calibration" in facts.metrics:  # which has a chapter of its own
        return Section("curves", "Ranking", [Pictures(pictures)]) if pictures else None
    names = (facts.negative, facts.positive)
    pictures.append(
        Picture(
            "Do probabilities mean what they say? Each dot holds as many patches; below, how often each "
            "probability was given.",
            svg(draw_reliability(target, prob, class_names=names), "reliability"),
        )
    )
    return Section("curves", "Ranking and calibration", [Pictures(pictures)])


class Footnotes:
    """Reasons for missing intervals, each said once under the table and pointed to by a letter."""

    def __init__(self) -> None:
        self._reasons: list[str] = []

    def interval(self, estimate: Mapping[str, Any]) -> str:
        """Write an interval, or ``none (a)``, keeping the reason for the note."""
        reason = estimate.get("reason")
        if estimate.get("low") is not None or not reason:
            return interval_of(estimate)
        if reason not in self._reasons:
            self._reasons.append(reason)
        return f"none ({ascii_lowercase[self._reasons.index(reason)]})"

    def estimate(self, estimate: Mapping[str, Any]) -> str:
        """Write a number and its interval in one cell."""
        interval = self.interval(estimate)
        return (
            f"{number(estimate.get('value'))} {interval if interval.startswith('none') else f'({interval})'}"
        )

    @property
    def text(self) -> str:
        return "".join(
            f" ({letter}) {why}." for letter, why in zip(ascii_lowercase, self._reasons, strict=False)
        )
