"""Report section on abstention: the coverage guarantee, the coverage reached, and risk against coverage."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from biopsy.core.errors import MetricError
from biopsy.core.text import class_title, count, plural
from biopsy.plotting.style import BASELINE, DASHED, INK, MODEL, MUTED, legend_above, new_figure, styled, svg
from biopsy.reporting.document import Block, Picture, Pictures, Section, Table, Text, interval_of, number
from biopsy.reporting.elements import make_table
from biopsy.reporting.facts import RunFacts
from biopsy.reporting.registry import section
from biopsy.statistics.abstention import risk_coverage_curve
from biopsy.training.metrics import Abstention, Risk, RiskAt, SetCounts, SetShares

MEASURES = {
    "coverage": "coverage (true class in the prediction set)",
    "abstained": "abstention rate",
    "error": "error rate, abstentions counted as correct",
    "error_among_kept": "error rate without abstentions",
}


@section("abstention", order=50)
def describe_abstention(facts: RunFacts) -> Section | None:
    """Return the coverage guarantee, target and observed coverage, and risk against coverage."""
    result = facts.metrics.abstention
    if not result:
        return None
    blocks: list[Block] = [Text(describe_coverage(result))]
    if result.per_patient is None:
        blocks.append(Text(_describe_fallback(result), "note"))
    else:
        tone = "warning" if result.verdict == "violated" else "note"
        blocks.append(Text(describe_verdict(result, facts.unit), tone))
    if result.chosen_on == facts.metrics.subset:
        blocks.append(
            Text(
                "The prediction sets were fitted on these patches: coverage here does not test the "
                "guarantee.",
                "warning",
            )
        )
    if result.per_patch:
        blocks.append(_table_of_shares(result, result.per_patch, facts.unit))
    blocks += [_table_of_risk(result.risk_coverage), Pictures(_draw(facts, result))]
    return Section("abstention", "Abstention", blocks)


def describe_coverage(entry: Abstention) -> str:
    """Describe the coverage guarantee, what it is based on, and when the model abstains."""
    if entry.alpha is None:
        return f"No abstention: {entry.reason}."
    if entry.quantiles is None or entry.n_calibration_patches is None or entry.n_calibration_patients is None:
        return f"No coverage guarantee and no abstention: {entry.reason}."
    unit, per_class = entry.unit, entry.guarantee == "class-conditional"
    patches = "patches of each class" if per_class else "patches"
    return (
        "The model abstains on a patch unless its conformal prediction set contains the predicted class "
        f"only. The sets were fitted on {count(entry.n_calibration_patches, 'patch')} of "
        f"{count(entry.n_calibration_patients, unit)} ({entry.chosen_on} subset), with "
        f"the {unit} as the exchangeable unit. {'Class-conditional' if per_class else 'Marginal'} coverage "
        f"guarantee: of the {patches} of a new {unit}, at least {100 * (1 - entry.alpha):g} % have "
        f"their true class in the set, on average over {plural(unit)}. Hence at most "
        f"{100 * entry.alpha:g} % of {'each class' if per_class else 'patches'} are misclassified without "
        "abstention; the error rate among the remaining patches has no guarantee. Method: "
        f"{entry.method}{', per class (Mondrian)' if per_class else ''}."
    )


def describe_verdict(entry: Abstention, unit: str) -> str:
    """Return whether the coverage guarantee was met on the evaluated patients, and the shortfall."""
    shares, target = entry.per_patient, entry.target_coverage
    assert shares is not None and target is not None and entry.verdict is not None
    if entry.guarantee == "class-conditional":
        coverages = {f"{class_title(name)} ": part.coverage for name, part in shares.by_class.items()}
    else:
        coverages = {"": shares.patient.coverage}
    reached = "; ".join(
        f"{name}{number(estimate.value)} ({interval_of(estimate)})" for name, estimate in coverages.items()
    )
    reached += f"; target {number(target)}"
    gap = number(max(0.0, *(target - estimate.value for estimate in coverages.values())))
    return {
        "met": f"The coverage guarantee was met on these {plural(unit)}. Coverage: {reached}.",
        "violated": f"The coverage guarantee was violated on these {plural(unit)}, by {gap}. Coverage: "
        f"{reached}. Either these {plural(unit)} differ from those used for calibration, or the model was "
        "overfitted to the latter.",
        "inconclusive": f"Inconclusive: coverage is {gap} below target, within sampling error for so few "
        f"{plural(unit)}. Coverage: {reached}.",
    }[entry.verdict]


def _describe_fallback(entry: Abstention) -> str:
    if not entry.per_patch:
        return "The risk-coverage curve below needs no guarantee: patches are ordered by confidence."
    return (
        "Split conformal prediction that treats patches as independent would state a guarantee nevertheless; "
        "below, its target and the coverage that it reached."
    )


def _table_of_shares(entry: Abstention, plain: SetShares, unit: str) -> Table:
    """Return the table of target and observed coverage: all patches, then each class."""
    ours, per_class = entry.per_patient, entry.guarantee == "class-conditional"
    target = {"coverage": f"at least {number(entry.target_coverage)}"}
    target["error"] = f"at most {number(entry.alpha)}"
    rows = []
    for scope in ("all", *plain.by_class):
        shares = [part.patient if scope == "all" else part.by_class[scope] for part in (ours, plain) if part]
        for name, label in MEASURES.items():
            target_text = target.get(name, "-") if (scope != "all") == per_class else "-"
            rows.append([class_title(scope), label, target_text, *(getattr(part, name) for part in shares)])
    return make_table(
        ["patches", "measure", "target", *([f"unit: {unit}"] if ours else []), "unit: patch (naive)"],
        rows,
        caption="Target and observed coverage",
        note=f"Mean over {plural(unit)} with equal weights. 95 % intervals in brackets."
        + (_describe_sets(entry.sets) if entry.sets else ""),
        text_columns=2,
    )


def _describe_sets(sets: SetCounts) -> str:
    text = f" Abstentions: {number(sets.several)} sets of several classes, {number(sets.empty)} empty"
    against = sets.against_threshold
    return text + (f", {number(against)} of the class not predicted at the threshold." if against else ".")


def _table_of_risk(risk: Risk) -> Table:
    area = risk.area
    return make_table(
        ["coverage", "lowest confidence", "selective risk (error rate)"],
        [[f"{100 * at.coverage:g} %", at.confidence, at.risk] for at in risk.at],
        caption="Risk-coverage",
        note=f"Area under the risk-coverage curve (AURC): {number(area.value)} ({interval_of(area)}); "
        f"with errors last (optimal) {number(risk.ideal_area)}, in random order {number(risk.error)}. "
        "Coverage: share of patches kept, most confident first. Confidence: probability of the predicted "
        "class.",
    )


def _draw(facts: RunFacts, entry: Abstention) -> list[Picture]:
    table = facts.predictions
    target, pred = (table[name].to_numpy(int) for name in ("target", "pred"))
    probs = table[[f"prob_{name}" for name in facts.class_names]].to_numpy(float)
    confidence, kept = probs[np.arange(len(pred)), pred], None
    if entry.patch is not None:
        kept = (1 - entry.patch.abstained.value, entry.patch.error_among_kept.value)
    figure = draw_risk_coverage(pred != target, confidence, points=entry.risk_coverage.at, kept=kept)
    pictures = [
        Picture(
            "Risk-coverage curve: error rate among the most confident patches, against their share. Bars: 95 "
            "% intervals.",
            svg(figure, "risk"),
        )
    ]
    plain = entry.per_patch and entry.per_patch.coverage_by_group
    if plain:
        drawn = draw_coverage(entry.coverage_by_group, plain, entry.target_coverage or 0, unit=facts.unit)
        caption = (
            f"Coverage of each {facts.unit}, all classes. The guarantee is about the mean over "
            f"{plural(facts.unit)}."
        )
        pictures.append(Picture(caption, svg(drawn, "guarantee")))
    return pictures


MIN_COVERAGE = 0.02  # the curve of fewer patches is too noisy to draw


@styled
def draw_risk_coverage(
    wrong: np.ndarray,
    confidence: np.ndarray,
    *,
    points: Sequence[RiskAt] = (),
    kept: tuple[float, float] | None = None,
) -> Figure:
    """Draw the risk-coverage curve: error rate among the most confident patches against their share.

    Args:
        wrong: Whether each patch is misclassified, shape ``(n,)``.
        confidence: Confidence of each prediction, shape ``(n,)``.
        points: Error rates with intervals at some coverages, drawn as bars.
        kept: ``(coverage, risk)`` of the conformal sets, marked.

    Raises:
        MetricError: If there are no patches, or a confidence is not a number.
    """
    curve = risk_coverage_curve(wrong, confidence)
    figure, axes = new_figure(height_in=3.9)
    drawn, error = curve.coverage >= MIN_COVERAGE, curve.risk[-1]
    axes.plot(100 * curve.coverage[drawn], 100 * curve.risk[drawn], color=MODEL, label="this model")
    share = np.linspace(MIN_COVERAGE, 1, 200)
    optimal = np.maximum(0, share - (1 - error)) / share
    axes.plot(100 * share, 100 * optimal, color=MUTED, linewidth=1, linestyle=DASHED, label="optimal order")
    axes.axhline(100 * error, color=BASELINE, linewidth=1, linestyle=(0, (1, 2)), label="random order")
    for point in points:
        if point.risk.low is not None and point.risk.high is not None:
            low, high = 100 * point.risk.low, 100 * point.risk.high
            axes.vlines(100 * point.coverage, low, high, color=MODEL, linewidth=3.5, alpha=0.3)
    if kept is not None and np.isfinite(kept).all():
        axes.plot(100 * kept[0], 100 * kept[1], "o", color=INK, markersize=6, label="conformal sets")
    axes.set(xlim=(0, 101.5), xlabel="Coverage (%)", ylabel="Selective risk: error rate (%)")
    axes.set_ylim(bottom=0)
    legend_above(axes, 2)
    return figure


@styled
def draw_coverage(
    ours: Sequence[float] | None, plain: Sequence[float] | None, target: float, *, unit: str = "patient"
) -> Figure:
    """Draw the coverage of each patient, lowest first.

    Args:
        ours: Coverage per patient of sets with the patient as the unit; None without such sets.
        plain: The same for sets that treat patches as independent.
        target: Target of the mean coverage over patients.
        unit: ``patient`` or ``slide``.

    Raises:
        MetricError: If there is nothing to draw.
    """
    series = {f"{unit} as the unit": (ours, MODEL), "patch as the unit (naive)": (plain, BASELINE)}
    if all(values is None or not len(values) for values, _ in series.values()):
        raise MetricError(f"no {unit} to draw", "empty")
    figure, axes = new_figure(height_in=3.9)
    for name, (values, colour) in series.items():
        if values is not None:
            x, y = 100 * (np.arange(len(values)) + 0.5) / len(values), 100 * np.sort(values)
            label, marker = f"{name}: mean {y.mean():.1f} %", "o" if len(y) <= 60 else None
            axes.plot(x, y, color=colour, linewidth=1.1, markersize=3.5, label=label, marker=marker)
    axes.axhline(100 * target, color=INK, linewidth=1, linestyle=DASHED, label=f"target: {100 * target:g} %")
    axes.set(
        xlim=(0, 101.5),
        xlabel=f"{unit.capitalize()}s, lowest coverage first (%)",
        ylabel="Coverage: true class in set (%)",
    )
    axes.set_ylim(top=101.5)
    legend_above(axes, 2)
    return figure
