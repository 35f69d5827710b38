"""Chapter on whether probabilities mean what they say, before and after calibration."""

from collections.abc import Mapping
from typing import Any

from biopsy.evaluation.calibration.figures import draw_calibration
from biopsy.plotting.style import svg
from biopsy.reporting.document import Block, Picture, Pictures, Section, Table, Text, number, plural
from biopsy.reporting.elements import Footnotes
from biopsy.reporting.facts import RunFacts
from biopsy.reporting.registry import section
from biopsy.statistics.calibrators import LEFT, MOVED

ROWS = {
    "ece": "expected calibration error",
    "ece_floor": "the same of a perfect model on these probabilities",
    "brier": "Brier score",
    "reliability": "  its reliability part, lower is better",
    "resolution": "  its resolution part, higher is better",
    "uncertainty": "  its uncertainty part, of the data",
    "nll": "negative log likelihood",
    "calibration_slope": "calibration slope, 1 is right",
    "calibration_intercept": "calibration intercept, 0 is right",
}


@section("calibration", order=30)
def describe_calibration(facts: RunFacts) -> Section | None:
    """What was fitted and on how many, the numbers and the plot before and after, and what the slope says."""
    found = facts.metrics.get("calibration")
    if not found:
        return None
    blocks: list[Block] = [Text(say_calibration(found))]
    blocks += [Text(f"{text[0].upper()}{text[1:]}.", "warning") for text in [found.get("warning")] if text]
    sides = {"after": found["after"]}
    if found["method"] != "none":
        sides = {"before": found["before"], **sides}
    blocks.append(_table(sides, facts.on_side))
    if "bins" in found["after"]:
        positive = facts.positive if facts.is_binary else "the predicted class"
        titles = {"before": "Before calibration", "after": "After" if len(sides) > 1 else "Not calibrated"}
        pictures = [
            Picture(
                f"{titles[name]}. Each dot holds as many patches.",
                svg(draw_calibration(side["bins"], positive=positive), f"calibration-{name}"),
            )
            for name, side in sides.items()
        ]
        note = f"Lines through dots: intervals over {plural(facts.unit)}, where enough have patches there."
        blocks.append(Pictures(pictures, caption=note))
    if "calibration_slope" in found["after"]:
        blocks.append(Text(say_slope(found["after"], facts.positive)))
    return Section("calibration", "Do probabilities mean what they say?", blocks)


def say_calibration(found: Mapping[str, Any]) -> str:
    """Say in words which calibrator stands behind the probabilities, and what it was fitted on."""
    if found["method"] == "none":
        reason = found.get("reason")
        why = f": {reason.removeprefix('not calibrated: ')}" if reason else ""
        return f"Nothing was calibrated{why}. Probabilities are the network's own."
    where = f"{number(found['n_patches'])} patches"
    if found["unit"] != "patch":
        where += f" of {number(found['n_patients'])} {found['unit']}{'s' * (found['n_patients'] != 1)}"
    text = f"{found['method'].capitalize()}, fitted on {where} of the {found['fitted_on']} side and frozen."
    if "slope" in found:
        text += f" Scores are multiplied by {number(found['slope'])}"
        text += " (a temperature of " + number(1 / found["slope"]) + ")"
        text += " and shifted." if any(found["intercepts"]) else "."
    about = {
        MOVED: " Class weights or resampling had bent the prevalence that training saw; before the "
        "temperature, scores were moved to the prevalence of validation.",
        LEFT: " Class weights or resampling had bent the prevalence that training saw, but validation is "
        "fitted better without correcting it.",
    }
    return text + about.get(found.get("prior") or "", "")


def say_slope(after: Mapping[str, Any], positive: str) -> str:
    """Say what slope and intercept mean for a reader, as far as their intervals tell."""
    slope, intercept = after["calibration_slope"], after["calibration_intercept"]
    if slope["value"] is None:
        return f"No slope can be fitted: {slope['reason']}."
    if slope["low"] is None:
        side = "too extreme" if slope["value"] < 1 else "too timid"
        return (
            f"The slope of {number(slope['value'])} would say that probabilities are {side}, "
            f"but it has no interval: {slope['reason']}."
        )
    verdict = (
        "Probabilities are too extreme"
        if slope["high"] < 1
        else "Probabilities are too timid"
        if slope["low"] > 1
        else "Probabilities are neither too extreme nor too timid, as far as these patients can tell"
    )
    if intercept["low"] is not None and not intercept["low"] <= 0 <= intercept["high"]:
        few = "fewer" if intercept["value"] > 0 else "more"
        verdict += f"; on the whole they promise {few} {positive} patches than there are"
    return f"{verdict} (slope {number(slope['value'])}, {number(slope['low'])} to {number(slope['high'])})."


def _table(sides: Mapping[str, Mapping[str, Any]], judged: str) -> Table:
    reasons, rows = Footnotes(), []
    for key, label in ROWS.items():
        cells = [_cell(side, key, reasons) for side in sides.values()]
        if any(cells):
            rows.append([label, *cells])
    heads = ["", *(f"{name} calibration" for name in sides)] if len(sides) > 1 else ["", "not calibrated"]
    note = "Numbers with their intervals. The floor and the parts of the Brier score are without."
    return Table(heads, rows, caption=f"Calibration{judged}", note=note + reasons.text)


def _cell(side: Mapping[str, Any], key: str, reasons: Footnotes) -> str:
    if key in side:
        return number(side[key]) if key == "ece_floor" else reasons.estimate(side[key])
    return number(side.get("brier_parts", {})[key]) if key in side.get("brier_parts", {}) else ""
