"""The report of a reproduction: published and reproduced metrics, and the effect of patient leakage."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from biopsy.core.text import capitalize, count, plural
from biopsy.evaluation.provenance_sections import describe_reproduction
from biopsy.experiments.figures import PANELS, draw_reproduction
from biopsy.experiments.reproduction_summary import CONTRASTS
from biopsy.experiments.sweep_page import mean_sd
from biopsy.plotting.style import svg
from biopsy.reporting.document import (
    Block,
    Bullets,
    Headline,
    Picture,
    Pictures,
    ReportDocument,
    Section,
    Summary,
    Table,
    Text,
    interval_text,
    number,
)
from biopsy.reporting.elements import synthetic_warning
from biopsy.reporting.html import HIDDEN, NOT_FOR
from biopsy.reporting.pseudonyms import Pseudonymizer


@dataclass(frozen=True)
class ReproductionFacts:
    """Input of the report of a reproduction.

    Attributes:
        study: The content of ``study.json``, with ``environment``.
        summary: The content of ``metrics.json``.
        pseudonymizer: Pseudonyms of the tested patients, slides and patches.
    """

    study: Mapping[str, Any]
    summary: Mapping[str, Any]
    pseudonymizer: Pseudonymizer


def report_of_reproduction(facts: ReproductionFacts, *, hide_ids: bool = False) -> ReportDocument:
    """Return the report of a reproduction.

    Args:
        hide_ids: Replace patient, slide and patch ids by numbers.
    """
    study: Mapping[str, Any] = facts.pseudonymizer.nested(facts.study) if hide_ids else facts.study
    papers: Mapping[str, Any] = facts.summary["papers"]
    if hide_ids:
        papers = facts.pseudonymizer.nested(papers)
    sections = [
        _describe_table(papers),
        *([_describe_leak(papers, facts.summary["unit"])] if _leaks(papers) else []),
        _describe_slides(papers, facts.summary["unit"]),
        _describe_lengths(papers, study["papers"]),
        describe_reproduction(study),
    ]
    return ReportDocument(
        title=f"Published recipes on {study['pack']['name']}",
        subtitle=f"Reproduction {study.get('name', '')}: {count(len(papers), 'recipe')}, "
        f"{count(sum(entry['n_runs'] for entry in papers.values()), 'run')}",
        summary=_summarise(papers, study["pack"], facts.summary["unit"], hide_ids=hide_ids),
        sections=[section for section in sections if section is not None],
        warnings=_warn_reader(papers, facts.summary["unit"]),
        footer=f"Written by biopsy {(study.get('environment') or {}).get('biopsy', '')}".strip() + ".",
    )


def _summarise(papers: Mapping[str, Any], pack: Mapping[str, Any], unit: str, *, hide_ids: bool) -> Summary:
    """Return the summary, with headlines of the recipe with the largest effect of leakage."""
    leaks = {name: entry["leak"]["auroc"]["mean"] for name, entry in papers.items() if _leaks({name: entry})}
    headlines = []
    if leaks:
        name = max(leaks, key=lambda key: leaks[key])
        headlines = [
            Headline(
                f"AUROC, {arm} the tested {unit} in training", _mean_of_slides(papers[name], key), beside=name
            )
            for arm, key in (("with", "arm"), ("without", "reference"))
        ]
    return Summary(
        verdict=_state_verdict(papers, leaks, unit) + synthetic_warning(pack),
        headlines=headlines,
        unit="",
        findings=[
            *(
                f"{name}: training on patches of the tested {unit} changes the AUROC on other patches of it "
                f"by {mean_sd(papers[name]['leak']['auroc'], '+')}{_name_reference(papers[name], unit)} "
                f"(mean over {plural(unit)}, ± standard deviation over seeds)."
                for name in leaks
            ),
            "All trainings that are compared have the same number of patches and of updates.",
            *([HIDDEN] if hide_ids else []),
        ],
        not_for=NOT_FOR,
    )


def _name_reference(entry: Mapping[str, Any], unit: str) -> str:
    if entry["leak"]["reference"] != CONTRASTS["leak"][1]:
        return ""
    return f", compared with as many patches of another {unit} with both classes"


def _state_verdict(papers: Mapping[str, Any], leaks: Mapping[str, float], unit: str) -> str:
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


def _mean_of_slides(entry: Mapping[str, Any], arm: str) -> float | None:
    means = [slide[arm]["auroc"]["mean"] for slide in entry["leak"]["slides"]]
    return None if None in means else sum(means) / len(means)


def _leaks(papers: Mapping[str, Any]) -> bool:
    return any(entry["leak"]["auroc"]["mean"] is not None for entry in papers.values())


def _warn_reader(papers: Mapping[str, Any], unit: str) -> list[str]:
    warnings = []
    smoke = [name for name, entry in papers.items() if "smoke" in entry["label"]]
    if smoke:
        warnings.append(
            f"Smoke test only, less than a tenth of the published updates: {', '.join(smoke)}. These rows "
            "show that the recipe runs, not its performance."
        )
    without = [name for name, entry in papers.items() if "method only" in entry["label"]]
    if without:
        warnings.append(
            "Method only, with random initial weights where the publication used pretrained ones: "
            f"{', '.join(without)}."
        )
    tested = [name for name, entry in papers.items() if entry["published"]["test_is_validation"]]
    if tested:
        warnings.append(
            f"As published, the test subset is also the validation subset: {', '.join(tested)}. Results are "
            "optimistic."
        )
    if unit == "patch":
        warnings.append("The data have neither patient nor slide ids: leakage cannot be measured.")
    return warnings


def _describe_table(papers: Mapping[str, Any]) -> Section:
    figure = draw_reproduction(papers)
    caption = (
        "Lines: 95 % interval over patients where available, otherwise range over seeds. Diamonds: published "
        "metric, corrected where the publication allows it."
    )
    rows = []
    for name, entry in papers.items():
        for metric, label in PANELS.items():
            interval = (entry["apart"]["interval"] or {}).get(metric)
            rows.append(
                [
                    name,
                    label,
                    number(entry["claim"].get(metric)),
                    number(entry["corrected"].get(metric)),
                    mean_sd(entry["published"][metric]),
                    mean_sd(entry["apart"][metric]),
                    "-"
                    if interval is None
                    else interval_text(interval["low"], interval["high"], interval["reason"]),
                    number(entry["apart"]["colour_auroc"]) if metric == "auroc" else "-",
                    mean_sd(entry["leak"][metric], "+"),
                ]
            )
    columns = (
        "recipe,metric,published,corrected,as published,split by patient,interval,colour-only "
        "baseline,leakage"
    )
    blocks: list[Block] = [
        Pictures([Picture(caption, svg(figure, "reproduction"))], across=1),
        Table(
            columns.split(","),
            rows,
            note="Mean ± standard deviation over seeds. Corrected: the published result with the positive "
            "class named, on the published split. Leakage: increase from training patches of the tested "
            "slide, mean over slides.",
            text_columns=2,
        ),
    ]
    reasons = [
        f"{name}, {title}: {entry[arm]['reason']}"
        for name, entry in papers.items()
        for arm, title in (("published", "as published"), ("apart", "split by patient"), ("leak", "leakage"))
        if entry[arm]["reason"]
    ]
    return Section(
        "claims", "Published and reproduced metrics", [*blocks, *([Bullets(reasons)] if reasons else [])]
    )


TITLES = {
    "leak": "leakage, random half",
    "blocked_leak": "leakage, blocked half",
    "placebo": "placebo",
    "leak_and_placebo": "leakage and placebo",
}


def _describe_leak(papers: Mapping[str, Any], unit: str) -> Section:
    tables: list[Block] = []
    for contrast, title in TITLES.items():
        rows = [
            [
                name,
                str(slide["tested"]),
                mean_sd(slide["arm"]["auroc"]),
                mean_sd(slide["reference"]["auroc"]),
                mean_sd(slide["auroc"], "+"),
                mean_sd(slide["balanced_accuracy"], "+"),
                number(sum(slide["n_patches"]) / len(slide["n_patches"]), 0),
                number(len(slide["seeds"])),
            ]
            for name, entry in papers.items()
            for slide in entry[contrast]["slides"]
        ]
        if rows:
            tables.append(Table(_leak_columns(unit), rows, caption=capitalize(title), text_columns=2))
    note = (
        "All arms of a comparison test the same patches and train on equally many of each class. Leakage: "
        f"the other half of the tested {unit} trains, compared with as many patches of another {unit} with "
        "both classes (placebo). Blocked: no training patch touches a tested one. Placebo: compared with "
        "neither. Paired by seed, which also draws the tested half."
    )
    return Section("leak", "Patient leakage", [Text(note), *tables])


def _leak_columns(unit: str) -> list[str]:
    auroc = ["AUROC, arm", "AUROC, reference", "difference"]
    return ["recipe", unit, *auroc, "difference, balanced accuracy", "tested patches", "seeds"]


def _describe_slides(papers: Mapping[str, Any], unit: str) -> Section | None:
    rows = [
        [
            name,
            str(fold["tested"]),
            *(mean_sd(fold[metric]) for metric in PANELS),
            number(fold["colour_auroc"]),
        ]
        for name, entry in papers.items()
        for fold in entry["apart"]["folds"]
        if len(entry["apart"]["folds"]) > 1
    ]
    if not rows:
        return None
    table = Table(["recipe", unit, *PANELS.values(), "colour-only baseline"], rows, text_columns=2)
    return Section("apart", f"Per-{unit} results, split by {unit}", [table])


def _describe_lengths(papers: Mapping[str, Any], entries: Mapping[str, Any]) -> Section:
    rows = []
    for name, entry in papers.items():
        plan = entries[name]["plan"]
        rows.append(
            [
                name,
                f"{number(entry['updates'])} of {number(entry['published_updates'])}",
                f"{number(plan['epochs'])} x {number(plan['steps_per_epoch'])}",
                number(entry["published"]["n_train"] or entry["apart"]["n_train"]),
                number(entry["n_runs"]),
                number(entry["minutes"], 1),
                entry["label"] or "-",
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
        "Smoke: less than a tenth of the published updates. Early stopping is disabled, so that both arms "
        "make the same number of updates; the epoch is selected as the recipe specifies."
    )
    return Section("lengths", "Training length", [Table(columns, rows, note=note)])
