"""The report of a reproduction: published and reproduced metrics, and the effect of patient leakage."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from typing_extensions import TypedDict

from biopsy.core.errors import MetricError
from biopsy.core.text import capitalize, count, plural
from biopsy.evaluation.provenance_sections import describe_reproduction
from biopsy.experiments.reproduction_summary import CONTRASTS, PaperSummary, ReproductionSummary
from biopsy.experiments.sweep_page import mean_sd
from biopsy.plotting.style import (
    BASELINE,
    INK,
    MODEL,
    MUTED,
    RULE,
    SERIES_COLOURS,
    WIDTH_IN,
    name_rows,
    shorten,
    styled,
    svg,
)
from biopsy.reporting.document import (
    Block,
    Bullets,
    Headline,
    ReportDocument,
    Section,
    Summary,
    Table,
    Text,
    interval_of,
    number,
)
from biopsy.reporting.elements import picture, synthetic_warning, written_by
from biopsy.reporting.pseudonyms import Pseudonymizer
from biopsy.statistics.resampling import Interval
from biopsy.training.metrics import Spread
from biopsy.training.study import Paper, StudyInfo

Papers = Mapping[str, PaperSummary]
PANELS = {"accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "auroc": "AUROC"}


def report_of_reproduction(
    study: StudyInfo, summary: ReproductionSummary, pseudonymizer: Pseudonymizer | None = None
) -> ReportDocument:
    """Return the report of a reproduction.

    Args:
        study: The content of ``study.json``, with ``environment``.
        summary: The content of ``metrics.json``.
        pseudonymizer: Pseudonyms that replace the ids of patients, slides and patches.
    """
    papers, unit = summary.papers, summary.unit
    if pseudonymizer is not None:
        study, papers = pseudonymizer.nested(study), pseudonymizer.nested(papers)
    sections = [
        _describe_table(papers),
        _describe_leak(papers, unit),
        _describe_slides(papers, unit),
        Section("lengths", "Training length", [table_of_lengths(papers, study["papers"])]),
        describe_reproduction(study),
    ]
    return ReportDocument(
        title=f"Published recipes on {study['pack']['name']}",
        subtitle=f"Reproduction {study['name']}: {count(len(papers), 'recipe')}, "
        f"{count(sum(entry.n_runs for entry in papers.values()), 'run')}",
        summary=_summarise(papers, unit, is_synthetic=study["pack"].get("synthetic")),
        sections=sections,
        warnings=_warn_reader(papers, unit),
        footer=written_by(study),
        ids_hidden=pseudonymizer is not None,
    )


def _summarise(papers: Papers, unit: str, *, is_synthetic: bool | None) -> Summary:
    """Return the summary, with headlines of the recipe with the largest effect of leakage."""
    means = {name: entry.leak.auroc.mean for name, entry in papers.items()}
    leaks = {name: mean for name, mean in means.items() if mean is not None}
    headlines = []
    if leaks:
        name = max(leaks, key=lambda key: leaks[key])
        headlines = [
            Headline(
                f"AUROC, {condition} the tested {unit} in training",
                Interval(auroc),
                beside=name,
            )
            for condition, auroc in zip(("with", "without"), papers[name].leak.mean_aurocs(), strict=True)
        ]
    return Summary(
        verdict=_state_verdict(papers, leaks, unit) + synthetic_warning(is_synthetic),
        headlines=headlines,
        unit="",
        findings=[
            *(
                f"{name}: training on patches of the tested {unit} changes the AUROC on other patches of it "
                f"by {mean_sd(papers[name].leak.auroc, '+')}{_name_reference(papers[name], unit)} "
                f"(mean over {plural(unit)}, ± standard deviation over seeds)."
                for name in leaks
            ),
            "All trainings that are compared have the same number of patches and of updates.",
        ],
    )


def _name_reference(entry: PaperSummary, unit: str) -> str:
    if entry.leak.reference != CONTRASTS["leak"][1]:
        return ""
    return f", compared with as many patches of another {unit} with both classes"


def _state_verdict(papers: Papers, leaks: Mapping[str, float], unit: str) -> str:
    """Return the result in one sentence: the largest and smallest effect of leakage on the AUROC."""
    recipes = count(len(papers), "published recipe")
    if not leaks:
        return f"{recipes} reproduced; the effect of leakage between training and test was not measured."
    high = max(leaks, key=lambda name: leaks[name])
    text = (
        f"{recipes} reproduced: with patches of the tested {unit} in training, the AUROC on other patches of "
        f"it changes by {leaks[high]:+.3f} ({high})"
    )
    if len(leaks) > 1:
        low = min(leaks, key=lambda name: leaks[name])
        text += f" at most and {leaks[low]:+.3f} ({low}) at least"
    return f"{text}."


def _warn_reader(papers: Papers, unit: str) -> list[str]:
    warnings = []
    smoke = [name for name, entry in papers.items() if "smoke" in entry.label]
    if smoke:
        warnings.append(
            f"Smoke test only, less than a tenth of the published updates: {', '.join(smoke)}. These rows "
            "show that the recipe runs, not its performance."
        )
    without = [name for name, entry in papers.items() if "method only" in entry.label]
    if without:
        warnings.append(
            "Method only, with random initial weights where the publication used pretrained ones: "
            f"{', '.join(without)}."
        )
    tested = [name for name, entry in papers.items() if entry.published.test_is_validation]
    if tested:
        warnings.append(
            f"As published, the test subset is also the validation subset: {', '.join(tested)}. Results are "
            "optimistic."
        )
    if unit == "patch":
        warnings.append("The data have neither patient nor slide ids: leakage cannot be measured.")
    return warnings


def _describe_table(papers: Papers) -> Section:
    caption = (
        "Lines: 95 % interval over patients where available, otherwise range over seeds. Diamonds: published "
        "metric, corrected where the publication allows it."
    )
    figure = picture(svg(draw_reproduction(papers), "reproduction"), caption)
    reasons = [
        f"{name}, {title}: {getattr(entry, condition).reason}"
        for name, entry in papers.items()
        for condition, title in (
            ("published", "as published"),
            ("apart", "split by patient"),
            ("leak", "leakage"),
        )
        if getattr(entry, condition).reason
    ]
    blocks: list[Block] = [figure, table_of_papers(papers)]
    blocks += [Bullets(reasons)] if reasons else []
    return Section("claims", "Published and reproduced metrics", blocks)


def table_of_papers(papers: Papers) -> Table:
    """Return the published and reproduced metrics of each recipe, and the effect of leakage."""
    rows = []
    for name, entry in papers.items():
        for metric, label in PANELS.items():
            interval = getattr(entry.apart.interval, metric, None)
            rows.append(
                [
                    name,
                    label,
                    number(entry.claim.get(metric)),
                    number(entry.corrected.get(metric)),
                    mean_sd(getattr(entry.published, metric)),
                    mean_sd(getattr(entry.apart, metric)),
                    interval_of(interval),
                    number(entry.apart.colour_auroc) if metric == "auroc" else "-",
                    mean_sd(getattr(entry.leak, metric), "+"),
                ]
            )
    columns = (
        "recipe,metric,published,corrected,as published,split by patient,interval,colour-only "
        "baseline,leakage"
    )
    return Table(
        columns.split(","),
        rows,
        note="Mean ± standard deviation over seeds. Corrected: the published result with the positive class "
        "named, on the published split. Leakage: increase from training patches of the tested slide, mean "
        "over slides.",
        text_columns=2,
    )


TITLES = {
    "leak": "leakage, random half",
    "blocked_leak": "leakage, blocked half",
    "placebo": "placebo",
    "leak_and_placebo": "leakage and placebo",
}


def _describe_leak(papers: Papers, unit: str) -> Section | None:
    if all(entry.leak.auroc.mean is None for entry in papers.values()):
        return None
    auroc = ["AUROC, condition", "AUROC, reference", "difference"]
    columns = ["recipe", unit, *auroc, "difference, balanced accuracy", "tested patches", "seeds"]
    tables: list[Block] = []
    for contrast, title in TITLES.items():
        rows = [
            [
                name,
                slide.tested,
                mean_sd(slide.condition.auroc),
                mean_sd(slide.reference.auroc),
                mean_sd(slide.auroc, "+"),
                mean_sd(slide.balanced_accuracy, "+"),
                number(sum(slide.n_patches) / len(slide.n_patches), 0),
                number(len(slide.seeds)),
            ]
            for name, entry in papers.items()
            for slide in getattr(entry, contrast).slides
        ]
        if rows:
            tables.append(Table(columns, rows, caption=capitalize(title), text_columns=2))
    note = (
        "All conditions of a comparison test the same patches and train on equally many of each class. "
        f"Leakage: the other half of the tested {unit} trains, compared with as many patches of another "
        f"{unit} with both classes (placebo). Blocked: no training patch touches a tested one. Placebo: "
        "compared with neither. Paired by seed, which also draws the tested half."
    )
    return Section("leak", "Patient leakage", [Text(note), *tables])


def _describe_slides(papers: Papers, unit: str) -> Section | None:
    rows = [
        [
            name,
            fold.tested,
            *(mean_sd(getattr(fold, metric)) for metric in PANELS),
            number(fold.colour_auroc),
        ]
        for name, entry in papers.items()
        for fold in entry.apart.folds
        if len(entry.apart.folds) > 1
    ]
    if not rows:
        return None
    table = Table(["recipe", unit, *PANELS.values(), "colour-only baseline"], rows, text_columns=2)
    return Section("apart", f"Per-{unit} results, split by {unit}", [table])


def table_of_lengths(papers: Papers, entries: Mapping[str, Paper]) -> Table:
    """Return the length of the runs of each recipe; ``entries`` are those of ``study.json``."""
    rows = []
    for name, entry in papers.items():
        plan = entries[name]["plan"]
        rows.append(
            [
                name,
                f"{number(entry.updates)} of {number(entry.published_updates)}",
                f"{number(plan['epochs'])} x {number(plan['steps_per_epoch'])}",
                number(entry.published.n_train or entry.apart.n_train),
                number(entry.n_runs),
                number(entry.minutes, 1),
                entry.label or "-",
            ]
        )
    columns = [
        "recipe",
        "updates (published)",
        "epochs x updates",
        "training patches",
        "runs",
        "minutes",
        "label",
    ]
    note = (
        "Smoke: less than a tenth of the published updates. Early stopping is disabled, so that both "
        "conditions make the same number of updates; the epoch is selected as the recipe specifies."
    )
    return Table(columns, rows, note=note)


ROW_IN = 0.3


class _Mark(TypedDict, total=False):
    """Keywords of matplotlib's for a marker."""

    marker: str
    color: str
    markerfacecolor: str
    markeredgewidth: float


_MARKS: dict[str, _Mark] = {
    "published": {"marker": "D", "color": INK, "markerfacecolor": "white", "markeredgewidth": 1.4},
    "as published": {"marker": "o", "color": SERIES_COLOURS[0]},
    "patients apart": {"marker": "o", "color": MODEL},
    "colour alone": {"marker": "s", "color": BASELINE, "markerfacecolor": "white", "markeredgewidth": 1.4},
}


@styled
def draw_reproduction(papers: Papers) -> Figure:
    """Draw published and reproduced values of three metrics per recipe, and the leakage of each slide.

    Args:
        papers: Recipe to its entry in ``metrics.json`` of a reproduction.

    Raises:
        MetricError: If there is no recipe.
    """
    if not papers:
        raise MetricError("a reproduction without a recipe cannot be drawn", "empty")
    leaks = {
        (name, slide.tested): slide.auroc.values
        for name, entry in papers.items()
        for slide in entry.leak.slides
    }
    heights = [0.55 + ROW_IN * len(papers)] * len(PANELS)
    heights += [0.55 + ROW_IN * 0.8 * len(leaks)] if leaks else []
    figure = Figure(figsize=(WIDTH_IN, 0.5 + sum(heights)), layout="constrained")
    panels: list[Axes] = list(figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
    for axes, metric in zip(panels, PANELS, strict=False):
        _draw_conditions(axes, papers, metric)
    if leaks:
        _draw_leaks(panels[-1], leaks)
    handles = {
        label: handle
        for axes in panels
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    order = [label for label in _MARKS if label in handles]
    figure.legend([handles[label] for label in order], order, loc="outside upper center", ncols=2)
    return figure


def _draw_conditions(axes: Axes, papers: Papers, metric: str) -> None:
    """Draw one row per recipe: published values as diamonds, reproduced ones as dots with intervals."""
    for row, entry in enumerate(papers.values()):
        if row:
            axes.axhline(row - 0.5, color=RULE, linewidth=0.8)
        apart, published = getattr(entry.apart, metric), getattr(entry.published, metric)
        interval = getattr(entry.apart.interval, metric, None)
        claimed = entry.corrected.get(metric, entry.claim.get(metric))
        _mark(axes, "published", claimed, row - 0.22)
        _mark(axes, "as published", published.mean, row - 0.07, _reach(published))
        _mark(axes, "patients apart", apart.mean, row + 0.1, _reach(apart, interval))
        if metric == "auroc":
            _mark(axes, "colour alone", entry.apart.colour_auroc, row + 0.26)
    name_rows(axes, [shorten(name, 22) for name in papers])
    axes.set_xlabel(PANELS[metric])
    axes.set_xlim(right=1.0)


def _mark(
    axes: Axes, kind: str, value: float | None, row: float, reach: tuple[float, float] | None = None
) -> None:
    if value is None:
        return
    if reach is not None:
        axes.plot(reach, [row, row], color=_MARKS[kind]["color"], linewidth=2, alpha=0.45)
    axes.plot([value], [row], linestyle="none", markersize=5.5, label=kind, **_MARKS[kind])


def _reach(spread: Spread, interval: Interval | None = None) -> tuple[float, float] | None:
    """Return the interval over patients or, without one, the range over seeds."""
    if interval is not None and interval.low is not None and interval.high is not None:
        return interval.low, interval.high
    return None if spread.min is None or spread.max is None else (spread.min, spread.max)


def _draw_leaks(axes: Axes, leaks: Mapping[tuple[str, str], Sequence[float]]) -> None:
    """Draw one row per recipe and slide: the effect of leakage for each seed, and the mean."""
    names, last = [], None
    for row, ((recipe, tested), values) in enumerate(leaks.items()):
        rows, colour = [row] * len(values), SERIES_COLOURS[0]
        axes.plot(values, rows, "o", color=colour, markersize=5, alpha=0.6, markeredgewidth=0)
        axes.plot([np.mean(values)] * 2, [row - 0.3, row + 0.3], color=INK, linewidth=1.8)
        names.append(
            f"{shorten(recipe, 22)}  {shorten(tested, 10)}" if recipe != last else shorten(tested, 10)
        )
        if last not in (None, recipe):
            axes.axhline(row - 0.5, color=RULE, linewidth=0.8)
        last = recipe
    axes.axvline(0, color=MUTED, linewidth=0.9)
    name_rows(axes, names)
    axes.set_xlabel("AUROC gained by the leak; a dot is a seed")
