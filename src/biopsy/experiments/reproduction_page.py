"""The report of a reproduction: claims beside what they come to here, and what the leak adds."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from biopsy.evaluation.provenance_sections import describe_reproduction
from biopsy.experiments.figures import PANELS, draw_reproduction
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
    interval_text,
    number,
)
from biopsy.reporting.html import HIDDEN, NOT_FOR
from biopsy.reporting.pseudonyms import Aliases


@dataclass(frozen=True)
class ReproductionFacts:
    """Everything the report of a reproduction may say.

    Attributes:
        study: What ``study.json`` holds, with ``environment``.
        summary: What ``metrics.json`` holds.
        aliases: Numbers for everybody who is tested.
    """

    study: Mapping[str, Any]
    summary: Mapping[str, Any]
    aliases: Aliases


def report_of_reproduction(facts: ReproductionFacts, *, hide_ids: bool = False) -> ReportDocument:
    """Compose the report of a reproduction.

    Args:
        facts: The study's records.
        hide_ids: Replace patient, slide and patch ids by numbers everywhere, and say so.
    """
    study: Mapping[str, Any] = facts.aliases.nested(facts.study) if hide_ids else facts.study
    papers: Mapping[str, Any] = facts.summary["papers"]
    if hide_ids:
        papers = facts.aliases.nested(papers)
    sections = [
        _describe_table(papers),
        *([_describe_leak(papers, facts.summary["unit"])] if _leaks(papers) else []),
        _describe_slides(papers, facts.summary["unit"]),
        _describe_lengths(papers, study["papers"]),
        describe_reproduction(study),
    ]
    return ReportDocument(
        title=f"Published recipes on {study['pack']['name']}",
        subtitle=f"Reproduction {study.get('name', '')}: {len(papers)} "
        f"recipe{'s' if len(papers) > 1 else ''}, {sum(entry['n_runs'] for entry in papers.values())} runs",
        summary=_summarise(papers, facts.summary["unit"], hide_ids=hide_ids),
        sections=[section for section in sections if section is not None],
        warnings=_warn_reader(papers, facts.summary["unit"]),
        footer=f"Written by biopsy {(study.get('environment') or {}).get('biopsy', '')}".strip() + ".",
    )


def _summarise(papers: Mapping[str, Any], unit: str, *, hide_ids: bool) -> Summary:
    """Answer for the recipe with the largest leak; the table holds the others."""
    leaks = {name: entry["leak"]["auroc"]["mean"] for name, entry in papers.items() if _leaks({name: entry})}
    headlines = []
    if leaks:
        name = max(leaks, key=lambda key: leaks[key])
        headlines = [
            Headline(
                f"AUROC, {arm} the tested {unit} in training", _mean_of_slides(papers[name], key), beside=name
            )
            for arm, key in (("with", "with"), ("without", "apart"))
        ]
    return Summary(
        question="What were the claims, what do they come to as published, and what with "
        f"{unit if unit != 'patch' else 'patient'}s kept apart?",
        headlines=headlines,
        unit="",
        findings=[
            f"{name}: training on patches of the tested {unit} adds "
            f"{mean_sd(papers[name]['leak']['auroc'], '+')} to the AUROC on other patches of it (mean of "
            f"{unit}s, over seeds)."
            for name in leaks
        ]
        + [
            "Both arms of a comparison train on as many patches and make as many updates.",
            *([HIDDEN] if hide_ids else []),
        ],
        not_for=NOT_FOR,
    )


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
            f"Smoke only, less than a tenth of the published updates: {', '.join(smoke)}. "
            "These rows show that the recipe runs, not how good it is."
        )
    without = [name for name, entry in papers.items() if "method only" in entry["label"]]
    if without:
        warnings.append(
            f"Method only, begun from random weights where the publication had pretrained ones: "
            f"{', '.join(without)}."
        )
    tested = [name for name, entry in papers.items() if entry["published"]["test_is_validation"]]
    if tested:
        warnings.append(
            f"As published, the test side is the validation side: {', '.join(tested)}. "
            "Everything was chosen on what is tested."
        )
    if unit == "patch":
        warnings.append(
            "The data name neither patients nor slides: the leak between patches is not measurable."
        )
    return warnings


def _describe_table(papers: Mapping[str, Any]) -> Section:
    figure = draw_reproduction(papers)
    caption = (
        "Lines: the interval over patients where there is one, else least and greatest over seeds. A diamond "
        "is the corrected number where the publication allows one, else its claim."
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
                    entry["label"] or "-",
                ]
            )
    columns = "recipe,metric,published,corrected,as published,patients apart,interval,colour alone,leak,label"
    blocks: list[Block] = [
        Pictures([Picture(caption, svg(figure, "reproduction"))], across=1),
        Table(
            columns.split(","),
            rows,
            note="Mean ± standard deviation over seeds. Corrected: the published result with the positive "
            "class named, on the published split. Leak: what training patches of the tested slide add, mean "
            "of slides.",
            text_columns=2,
        ),
    ]
    reasons = [
        f"{name}, {what}: {entry[arm]['reason']}"
        for name, entry in papers.items()
        for arm, what in (("published", "as published"), ("apart", "patients apart"), ("leak", "leak"))
        if entry[arm]["reason"]
    ]
    return Section("claims", "Claims and results", [*blocks, *([Bullets(reasons)] if reasons else [])])


def _describe_leak(papers: Mapping[str, Any], unit: str) -> Section:
    rows = []
    for name, entry in papers.items():
        for slide in entry["leak"]["slides"]:
            gap = slide["auroc"]
            rows.append(
                [
                    name,
                    str(slide["tested"]),
                    mean_sd(slide["with"]["auroc"]),
                    mean_sd(slide["apart"]["auroc"]),
                    mean_sd(gap, "+"),
                    f"{number(gap['min'])} to {number(gap['max'])}",
                    mean_sd(slide["balanced_accuracy"], "+"),
                    number(slide["n_patches"]),
                    number(len(slide["seeds"])),
                ]
            )
    columns = [
        "recipe",
        unit,
        "AUROC with",
        "AUROC without",
        "gap",
        "over seeds",
        "gap, balanced accuracy",
        "tested patches",
        "seeds",
    ]
    note = (
        f"Same test patches, same number of training patches; with: the other half of the tested {unit} is "
        "among them. Paired by seed."
    )
    return Section("leak", "The leak", [Table(columns, rows, note=note, text_columns=2)])


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
    table = Table(["recipe", unit, *PANELS.values(), "colour alone"], rows, text_columns=2)
    return Section("apart", f"{unit.capitalize()} by {unit}, kept apart", [table])


def _describe_lengths(papers: Mapping[str, Any], asked: Mapping[str, Any]) -> Section:
    rows = []
    for name, entry in papers.items():
        plan = asked[name]["plan"]
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
        "updates of published",
        "epochs x updates",
        "training patches",
        "runs",
        "minutes",
        "label",
    ]
    note = (
        "Smoke: less than a tenth of the published updates. Early stopping is off, so that both arms make "
        "the same updates; which epoch is kept is as the recipe says."
    )
    return Section("lengths", "Length of the runs", [Table(columns, rows, note=note)])
