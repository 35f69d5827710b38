"""Report section on calibration, before and after the calibrator."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from biopsy.core.errors import MetricError
from biopsy.core.text import capitalize, count_patches, plural
from biopsy.plotting.style import DASHED, MODEL, MUTED, legend_above, new_figure, styled, svg
from biopsy.reporting.document import Block, Picture, Pictures, Section, Table, Text, interval_of, number
from biopsy.reporting.elements import make_table
from biopsy.reporting.facts import RunFacts
from biopsy.reporting.registry import section
from biopsy.statistics.calibrators import PRIOR_CORRECTED, PRIOR_UNCHANGED, CalibratorRecord
from biopsy.statistics.reliability import ReliabilityBin
from biopsy.training.metrics import Reliability

METHODS = {
    "platt": "Platt scaling",
    "intercept": "Intercept correction",
    "temperature": "Temperature scaling",
    "isotonic": "Isotonic regression",
}
ROWS = {
    "ece": "expected calibration error (ECE)",
    "ece_floor": "ECE expected of a perfectly calibrated model",
    "brier": "Brier score",
    "reliability": "  reliability term (lower is better)",
    "resolution": "  resolution term (higher is better)",
    "uncertainty": "  uncertainty term (of the data)",
    "nll": "negative log-likelihood",
    "calibration_slope": "calibration slope (ideal: 1)",
    "calibration_intercept": "calibration intercept (ideal: 0)",
}


@section("calibration", order=30)
def describe_calibration(facts: RunFacts) -> Section:
    """Return the calibrator, the calibration metrics and reliability diagrams, and the calibration slope."""
    result = facts.metrics.calibration
    blocks: list[Block] = [Text(describe_calibrator(result))]
    blocks += [Text(f"{capitalize(text)}.", "warning") for text in [result.get("warning")] if text]
    subsets = {"after": result["after"]}
    if result["method"] != "none":
        subsets = {"before": result["before"], **subsets}
    blocks.append(_table(subsets, facts.on_subset))
    positive = facts.positive if facts.is_binary else None
    measured = "observed frequency against predicted probability"
    measured = measured if positive else "accuracy against the probability of the predicted class"
    titles = {
        "before": "Before calibration",
        "after": "After calibration" if len(subsets) > 1 else "Not calibrated",
    }
    pictures = [
        Picture(
            f"{titles[name]}: {measured}, in bins of as many patches each. A bin with patches of too few "
            f"{plural(facts.unit)} has no interval.",
            svg(draw_calibration(subset.bins, positive=positive), f"calibration-{name}"),
        )
        for name, subset in subsets.items()
    ]
    caption = f"Reliability diagrams (vertical lines: 95 % intervals over {plural(facts.unit)})"
    blocks.append(Pictures(pictures, caption=caption))
    if facts.is_binary:
        blocks.append(Text(describe_slope(result["after"], facts.positive)))
    return Section("calibration", "Calibration", blocks)


def describe_calibrator(entry: CalibratorRecord) -> str:
    """Describe the calibrator and the patches that it was fitted on."""
    if entry["method"] == "none":
        reason = entry.get("reason")
        reason_text = f": {reason.removeprefix('not calibrated: ')}" if reason else ""
        return f"Not calibrated{reason_text}. The probabilities are those of the network."
    fitted_on = count_patches(entry["n_patches"], entry["n_patients"], entry["unit"])
    text = f"{METHODS[entry['method']]}, fitted on {fitted_on} of the {entry['fitted_on']} subset."
    if entry.get("reason"):
        text += f" {METHODS[entry['asked']]} was requested, but {entry['reason']}."
    if entry["method"] == "intercept":
        text += " An intercept is added to the scores of each class."
    elif "slope" in entry:
        text += f" Scores are multiplied by {number(entry['slope'])}"
        text += " (a temperature of " + number(1 / entry["slope"]) + ")"
        text += " and shifted." if any(entry["intercepts"]) else "."
    if "prevalence" in entry:
        text += (
            f" Probabilities are for patches of which {100 * entry['prevalence']:.3g} % are positive; of the "
            f"{entry['fitted_on']} subset {100 * entry['fitted_prevalence']:.3g} % are."
        )
    prior_notes = {
        PRIOR_CORRECTED: " Class weights or resampling changed the training prevalence; before temperature "
        "scaling, scores were corrected to the validation prevalence.",
        PRIOR_UNCHANGED: " Class weights or resampling changed the training prevalence; this was not "
        "corrected, because the correction fits the validation subset worse.",
    }
    return text + prior_notes.get(entry.get("prior") or "", "")


def describe_slope(after: Reliability, positive: str) -> str:
    """Interpret calibration slope and intercept, given their intervals."""
    slope, intercept = after.calibration_slope, after.calibration_intercept
    assert slope is not None and intercept is not None
    if math.isnan(slope.value):
        return f"The calibration slope is undefined: {slope.reason}."
    if slope.low is None:
        side = "overconfident" if slope.value < 1 else "underconfident"
        return (
            f"A slope of {number(slope.value)} suggests {side} probabilities, but has no interval: "
            f"{slope.reason}."
        )
    verdict = {
        "lower": "The probabilities are overconfident",
        "higher": "The probabilities are underconfident",
        "not different": "No over- or underconfidence was detected",
    }[slope.compare(1)]
    if intercept.compare(0) in ("higher", "lower"):
        direction = "underestimate" if intercept.value > 0 else "overestimate"
        verdict += f"; on average they {direction} the frequency of {positive}"
    return f"{verdict} (slope {number(slope.value)}, {interval_of(slope)})."


def _table(subsets: Mapping[str, Reliability], subset_label: str) -> Table:
    rows = [[label, *(_value(subset, key) for subset in subsets.values())] for key, label in ROWS.items()]
    heads = [f"{name} calibration" for name in subsets] if len(subsets) > 1 else ["not calibrated"]
    return make_table(
        ["measure", *heads],
        [row for row in rows if any(value is not None for value in row[1:])],
        caption=f"Calibration{subset_label}",
        note="95 % intervals in brackets; the expected ECE and the terms of the Brier score have none.",
    )


def _value(subset: Reliability, key: str) -> object:
    return getattr(subset, key, None) or getattr(subset.brier_parts, key, None)


@styled
def draw_calibration(bins: Sequence[ReliabilityBin], *, positive: str | None = "positive") -> Figure:
    """Draw observed frequency against predicted probability, with the interval of each bin.

    Args:
        bins: The reliability table.
        positive: Name of the positive class; None for bins of the predicted class.

    Raises:
        MetricError: If there is no bin.
    """
    if not bins:
        raise MetricError("no bins to draw: evaluate at least one patch", "empty")
    figure, axes = new_figure(height_in=4.1)
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.9, linestyle=DASHED, label="perfect calibration")
    bounded = [row for row in bins if row.observed.low is not None]
    if bounded:
        ends = np.array([(row.observed.low, row.observed.high) for row in bounded], float)
        axes.vlines(
            [row.mean_prob for row in bounded],
            *ends.T,
            color=MODEL,
            alpha=0.45,
            linewidth=1.6,
            label="95 % interval",
        )
    predicted, observed = [row.mean_prob for row in bins], [row.observed.value for row in bins]
    axes.plot(predicted, observed, "-o", color=MODEL, markersize=4.5, linewidth=1.1, label="this model")
    axes.set(
        xlim=(-0.02, 1.02),
        ylim=(-0.02, 1.02),
        xlabel=f"Predicted probability of {positive}" if positive else "Probability of the predicted class",
        ylabel=f"Observed frequency of {positive}" if positive else "Accuracy",
    )
    legend_above(axes)
    return figure
