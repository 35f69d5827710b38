"""Chapter on the patches that get no answer: what was promised about the others, and what was kept."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from biopsy.evaluation.abstention.figures import draw_promise, draw_risk_coverage
from biopsy.plotting.style import svg
from biopsy.reporting.document import Block, Picture, Pictures, Section, Table, Text, interval_of, number
from biopsy.reporting.elements import Footnotes
from biopsy.reporting.facts import RunFacts
from biopsy.reporting.registry import section

MEASURES = {
    "coverage": "true class in the set",
    "abstained": "no answer",
    "error": "kept and wrong",
    "error_among_kept": "wrong among the kept",
}


@section("abstention", order=50)
def describe_abstention(facts: RunFacts) -> Section | None:
    """The promise, the table that holds it to account, and risk against coverage."""
    found = facts.metrics.get("abstention")
    if not found:
        return None
    blocks: list[Block] = [Text(say_promise(found))]
    if found["quantiles"] is None:
        blocks.append(Text(_say_refusal(found), "note"))
    else:
        blocks.append(Text(say_verdict(found, facts.unit), _tone(found["verdict"])))
    if found["chosen_on"] == facts.metrics.get("side"):
        blocks.append(
            Text("These are the patches that the sets were fitted on: no test of the promise.", "warning")
        )
    if "per_patch" in found:
        blocks.append(_table_of_shares(found, facts.unit))
    blocks += [_table_of_risk(found["risk_coverage"]), Pictures(_draw(facts, found))]
    return Section("abstention", "Where it gives no answer", blocks)


def say_promise(found: Mapping[str, Any]) -> str:
    """Say in words what was promised, on what it rests, and when a patch gets no answer."""
    if found["alpha"] is None:
        return f"Every patch gets an answer: {found['reason']}."
    if found["quantiles"] is None:
        return f"No promise is made, and every patch gets an answer: {found['reason']}."
    unit, each = found["unit"], found["promise"] == "each-class"
    what = "patches of each class" if each else "patches"
    return (
        f"A patch gets no answer where its conformal set is not the called class alone. The sets were fitted "
        f"on {number(found['n_calibration_patches'])} patches of {number(found['n_calibration_patients'])} "
        f"{unit}s ({found['chosen_on']}) with the {unit} as the unit, and promise: of the {what} of a new "
        f"{unit}, on the mean over {unit}s, at least {100 * found['promised_coverage']:g} % have their true "
        f"class in their set. So at most {100 * found['alpha']:g} % of {'each' if each else 'them'} are kept "
        f"and called wrong; the share among the kept alone is not promised. Method: {found['method']}"
        f"{', for each class by itself' if each else ''}."
    )


def say_verdict(found: Mapping[str, Any], unit: str) -> str:
    """Say whether the promise was kept on the judged patients, and by how much it was missed."""
    promised = found["promised_coverage"]
    if found["promise"] == "each-class":
        coverages = {f"of {name} patches ": one["coverage"] for name, one in found["by_class"].items()}
    else:
        coverages = {"": found["patient"]["coverage"]}
    reached = "; ".join(
        f"{name}{number(one['value'])} ({interval_of(one)})" for name, one in coverages.items()
    )
    reached += f", where {number(promised)} was promised"
    gap = number(max(0.0, *(promised - one["value"] for one in coverages.values())))
    return {
        "kept": f"The promise was kept on these {unit}s. Coverage: {reached}.",
        "broken": f"The promise was broken on these {unit}s, by {gap}. Coverage: {reached}. They differ from "
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


def _table_of_shares(found: Mapping[str, Any], unit: str) -> Table:
    """Make the table of what was promised and reached: all patches, then each class."""
    ours, plain, each = found.get("sets"), found["per_patch"], found["promise"] == "each-class"
    promised = {"coverage": f"at least {number(found['promised_coverage'])}"}
    promised["error"] = f"at most {number(found['alpha'])}"
    scopes = {"all": ("patient",)} | {name: ("by_class", name) for name in plain["by_class"]}
    reasons, rows = Footnotes(), []
    for scope, place in scopes.items():
        for name, label in MEASURES.items():
            of_this = promised.get(name, "-") if (scope != "all") == each else "-"
            row = [scope, label, of_this]
            row += [reasons.estimate(_pick(found, place)[name])] if ours else []
            rows.append([*row, reasons.estimate(_pick(plain, place)[name])])
    return Table(
        ["patches", "", "promised", *([f"{unit}s as the unit"] if ours else []), "patches as independent"],
        rows,
        caption="Promised and reached",
        note=f"Every {unit} weighs the same. In brackets: 95 % interval."
        + (_say_sets(found) if ours else "")
        + reasons.text,
        text_columns=2,
    )


def _pick(found: Mapping[str, Any], place: tuple[str, ...]) -> Mapping[str, Any]:
    for key in place:
        found = found[key]
    return found


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
        ours, plain = (
            None if quantiles is None else _cover_groups(scores <= np.array(quantiles)[target], groups)
            for quantiles in (found["quantiles"], found["per_patch"]["quantiles"])
        )
        drawn = draw_promise(ours, plain, found["promised_coverage"], unit=facts.unit)
        caption = f"All classes. A promise is a mean over {facts.unit}s: single ones may lie far below it."
        pictures.append(Picture(caption, svg(drawn, "promise")))
    return pictures


def _cover_groups(held: np.ndarray, groups: pd.Series) -> np.ndarray:
    """Give the share of each group's patches whose set holds the true class."""
    return pd.Series(held).groupby(groups.to_numpy()).mean().to_numpy()


def _probs(facts: RunFacts) -> np.ndarray:
    """Give the probabilities of all classes, shape ``(n, n_classes)``."""
    table, names = facts.predictions, list(facts.class_names)
    if not facts.is_binary:
        return table[[f"prob_{name}" for name in names]].to_numpy(float)
    prob = table["prob"].to_numpy(float)
    positive = names.index(facts.positive)
    return np.stack([prob if k == positive else 1 - prob for k in range(2)], axis=1)
