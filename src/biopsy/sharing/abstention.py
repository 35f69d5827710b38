"""Chapter on the patches that get no answer: what was promised about the others, and what was kept."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from biopsy.figures.abstention import draw_promise, draw_risk_coverage
from biopsy.figures.style import svg
from biopsy.sharing.document import Block, Picture, Pictures, Section, Table, Text, interval_of, number
from biopsy.sharing.facts import RunFacts
from biopsy.sharing.numbers import Footnotes

MEASURES = {
    "coverage": "sets that hold the true class",
    "abstained": "patches that get no answer",
    "error": "patches kept and called wrong",
    "error_among_kept": "wrong among the kept",
}


def describe_abstention(facts: RunFacts) -> Section | None:
    """The promise, the table that holds it to account, and risk against coverage."""
    found = facts.metrics.get("abstention")
    if not found:
        return None
    blocks: list[Block] = [Text(say_promise(found))]
    if found["quantile"] is None:
        blocks.append(Text(_say_refusal(found), "note"))
    else:
        blocks.append(Text(say_verdict(found, facts.unit), _tone(found["verdict"])))
    if found["chosen_on"] == facts.metrics.get("side"):
        blocks.append(
            Text("These are the patches that the sets were fitted on: no test of the promise.", "warning")
        )
    if "per_patch" in found:
        blocks += _tables_of_shares(found, facts.unit)
    blocks += [_table_of_risk(found["risk_coverage"]), Pictures(_draw(facts, found))]
    return Section("abstention", "Where it gives no answer", blocks)


def say_promise(found: Mapping[str, Any]) -> str:
    """Say in words what was promised, on what it rests, and when a patch gets no answer."""
    if found["alpha"] is None:
        return f"Every patch gets an answer: {found['reason']}."
    unit = found["unit"]
    if found["quantile"] is None:
        return f"No promise is made, and every patch gets an answer: {found['reason']}."
    return (
        f"A patch gets no answer where its conformal set is not the called class alone. The sets were fitted "
        f"on {number(found['n_calibration_patches'])} patches of {number(found['n_calibration_patients'])} "
        f"{unit}s ({found['chosen_on']}) with the {unit} as the unit, and promise: of the patches of a new "
        f"{unit}, on the mean over {unit}s, at least {100 * found['promised_coverage']:g} % have their true "
        f"class in their set. So at most {100 * found['alpha']:g} % of all patches are kept and called "
        f"wrong; the share among the kept alone is not promised. Method: {found['method']}."
    )


def say_verdict(found: Mapping[str, Any], unit: str) -> str:
    """Say whether the promise was kept on the judged patients, and by how much it was missed."""
    coverage, promised = found["patient"]["coverage"], found["promised_coverage"]
    reached = f"{number(coverage['value'])} ({interval_of(coverage)}) where {number(promised)} was promised"
    gap = number(abs(coverage["value"] - promised))
    return {
        "kept": f"The promise was kept on these {unit}s: coverage {reached}.",
        "broken": f"The promise was broken on these {unit}s, by {gap}: coverage {reached}. They differ from "
        "those it was fitted on, or epoch and threshold were fitted to those too closely.",
        "open": f"Coverage fell short by {gap}, no more than so few {unit}s can differ by chance: {reached}.",
    }[found["verdict"]]


def _say_refusal(found: Mapping[str, Any]) -> str:
    if "per_patch" not in found:
        return "Risk against coverage below needs no promise: it orders these patches by confidence."
    return (
        "The plain per-patch version would promise all the same, as if patches were independent. It is shown "
        "below as what it is, beside what it reached here."
    )


def _tone(verdict: str) -> str:
    return "warning" if verdict == "broken" else "note"


def _tables_of_shares(found: Mapping[str, Any], unit: str) -> list[Block]:
    promised = {"coverage": f"at least {number(found['promised_coverage'])}"}
    promised["error"] = f"at most {number(found['alpha'])}"
    ours = f"{unit}s as the unit" if "patient" in found else ""
    weights = [("patient", f"every {unit} weighs the same"), ("patch", "every patch weighs the same")]
    tables: list[Block] = []
    for weight, title in weights[: 1 if unit == "patch" else 2]:
        reasons, rows = Footnotes(), []
        for name, label in MEASURES.items():
            row = [label, promised.get(name, "-") if weight == "patient" else "-"]
            row += [reasons.estimate(found[weight][name])] if ours else []
            rows.append([*row, reasons.estimate(found["per_patch"][weight][name])])
            if name == "coverage" and weight == "patient" and ours:
                rows += [
                    [f"the same of {name} patches", "-", reasons.estimate(share), "-"]
                    for name, share in found["by_class"].items()
                ]
        note = "In brackets: 95 % interval." + (_say_sets(found) if weight == "patient" and ours else "")
        tables.append(
            Table(
                ["", "promised", *([ours] if ours else []), "patches taken as independent"],
                rows,
                caption=f"Promised and reached, {title}",
                note=note + reasons.text,
                fold="" if weight == "patient" else f"The same where {title}",
            )
        )
    return tables


def _say_sets(found: Mapping[str, Any]) -> str:
    sets = found["sets"]
    said = f" No answer: {number(sets['several'])} sets of several classes, {number(sets['empty'])} empty"
    against = sets["against_threshold"]
    return said + (f", {number(against)} of the class the threshold does not call." if against else ".")


def _table_of_risk(risk: Mapping[str, Any]) -> Table:
    reasons = Footnotes()
    rows = [
        [f"{100 * at['coverage']:g} %", number(at["confidence"]), reasons.estimate(at["risk"])]
        for at in risk["at"]
    ]
    return Table(
        ["patches kept, surest first", "confidence of the last", "wrong among the kept"],
        rows,
        caption="Risk against coverage",
        note=f"Area under the curve {reasons.estimate(risk['area'])}; the best order possible of these "
        f"errors has {number(risk['ideal_area'])}, a random one {number(risk['error'])}. Confidence is the "
        "probability of the called class." + reasons.text,
    )


def _draw(facts: RunFacts, found: Mapping[str, Any]) -> list[Picture]:
    table = facts.predictions
    target, pred = (table[name].to_numpy(int) for name in ("target", "pred"))
    probs = _probs(facts)
    kept = None
    if "patch" in found and found["patch"]["error_among_kept"]["value"] is not None:
        kept = (1 - found["patch"]["abstained"]["value"], found["patch"]["error_among_kept"]["value"])
    bars = [{"coverage": at["coverage"], **at["risk"]} for at in found["risk_coverage"]["at"]]
    confidence = probs[np.arange(len(pred)), pred]
    figure = draw_risk_coverage(pred != target, confidence, intervals=bars, kept=kept)
    pictures = [
        Picture("The fewer patches are kept, the fewer are wrong. Bars: 95 % intervals.", svg(figure, "risk"))
    ]
    groups = facts.group_ids
    if "per_patch" in found and facts.unit != "patch" and groups.notna().all():
        scores = 1 - probs[np.arange(len(target)), target]
        held = groups.to_frame("group").assign(score=scores)
        ours, plain = (
            None if quantile is None else _cover_groups(held, quantile)
            for quantile in (found["quantile"], found["per_patch"]["quantile"])
        )
        drawn = draw_promise(ours, plain, found["promised_coverage"], unit=facts.unit)
        caption = f"The promise is a mean over {facts.unit}s: single ones may lie far below it."
        pictures.append(Picture(caption, svg(drawn, "promise")))
    return pictures


def _cover_groups(table: pd.DataFrame, quantile: float) -> np.ndarray:
    """Give the share of each group's patches that score at most ``quantile``."""
    return table["score"].le(quantile).groupby(table["group"]).mean().to_numpy()


def _probs(facts: RunFacts) -> np.ndarray:
    """Give the probabilities of all classes, shape ``(n, n_classes)``."""
    table, names = facts.predictions, list(facts.class_names)
    if not facts.is_binary:
        return table[[f"prob_{name}" for name in names]].to_numpy(float)
    prob = table["prob"].to_numpy(float)
    positive = names.index(facts.positive)
    return np.stack([prob if k == positive else 1 - prob for k in range(2)], axis=1)
