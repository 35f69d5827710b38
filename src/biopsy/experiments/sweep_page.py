"""The report of a hyperparameter sweep: the settings chosen on validation, and all others."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from biopsy.core.text import count
from biopsy.evaluation.provenance_sections import describe_reproduction
from biopsy.plotting.style import svg
from biopsy.reporting.document import (
    Block,
    Headline,
    Listing,
    Picture,
    Pictures,
    ReportDocument,
    Section,
    Summary,
    Table,
    number,
)
from biopsy.reporting.elements import describe_openings, synthetic_warning
from biopsy.reporting.html import HIDDEN, NOT_FOR
from biopsy.reporting.pseudonyms import Pseudonymizer

METRICS = {
    "auroc": "AUROC",
    "balanced_accuracy": "balanced accuracy",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
}


@dataclass(frozen=True)
class SweepFacts:
    """Input of the report of a sweep.

    Attributes:
        study: The content of ``study.json``, with ``environment``.
        summary: The content of ``metrics.json``.
        table: One row per run.
        figure: Every run against the settings.
        recipe_toml: The recipe before the settings of the grid.
        pseudonymizer: Pseudonyms of the tested patients, slides and patches.
    """

    study: Mapping[str, Any]
    summary: Mapping[str, Any]
    table: pd.DataFrame
    figure: Figure
    recipe_toml: str
    pseudonymizer: Pseudonymizer


def report_of_sweep(facts: SweepFacts, *, hide_ids: bool = False) -> ReportDocument:
    """Return the report of a sweep.

    Args:
        hide_ids: Replace patient, slide and patch ids by numbers.
    """
    study = facts.pseudonymizer.nested(facts.study) if hide_ids else facts.study
    recipe_toml = facts.pseudonymizer.text(facts.recipe_toml) if hide_ids else facts.recipe_toml
    combinations, seeds = facts.summary["combinations"], facts.study["seeds"]
    split = study["split"]["name"]
    sections = [
        _describe_settings(facts),
        _describe_runs(facts),
        Section("recipe", "Recipe", [Listing(recipe_toml, fold="All other settings (TOML)")]),
        describe_reproduction(study),
    ]
    return ReportDocument(
        title=f"{next(iter(study['recipes']))}: {', '.join(facts.summary['grid'])}",
        subtitle=f"Sweep {study.get('name', '')}: {count(len(combinations), 'combination')}, "
        f"{count(len(seeds), 'seed')}, split {split}",
        summary=_summarise(facts, hide_ids=hide_ids),
        sections=sections,
        warnings=_warn_reader(facts),
        footer=f"Written by biopsy {(study.get('environment') or {}).get('biopsy', '')}".strip() + ".",
    )


def _summarise(facts: SweepFacts, *, hide_ids: bool) -> Summary:
    best, criterion = facts.summary["best"], facts.summary["chosen_by"]
    verdict = "No combination has been evaluated on validation."
    headlines = []
    if best is not None:
        name = "validation AUROC" if criterion == "val_auroc" else "validation loss"
        tested = ", ".join(
            f"{label} {number(best[key]['mean'])}"
            for key, label in METRICS.items()
            if key in best and best[key]["mean"] is not None
        )
        verdict = f"The {name} chooses {format_values(best['values'])}; " + (
            f"its means on the test subset: {tested}."
            if tested
            else "the test subset has not been evaluated."
        )
        note = f"mean of {count(best['n_seeds'], 'seed')}"
        headlines = [
            Headline("AUROC on validation", best["val_auroc"]["mean"], beside=note),
            *(
                Headline(f"{label} on test", best[name]["mean"], reason="see the spread over seeds")
                for name, label in list(METRICS.items())[:2]
                if name in best
            ),
        ]
    return Summary(
        verdict=verdict + synthetic_warning(facts.study["pack"]),
        headlines=headlines,
        unit=facts.summary["unit"],
        findings=[
            *(
                ["The best of many validation metrics is optimistic: expect less on new patients."]
                if facts.study.get("search")
                else [
                    "The choice was made on validation, so the test metrics of the chosen combination are "
                    "not biased by it. The best of all test metrics would be.",
                    describe_openings(facts.summary["ledger"]),
                ]
            ),
            *([HIDDEN] if hide_ids else []),
        ],
        not_for=NOT_FOR,
    )


def _warn_reader(facts: SweepFacts) -> list[str]:
    warnings = []
    if facts.study["split"]["patients_overlap"]:
        warnings.append(
            "Patient overlap between subsets, as published: the results do not generalise to new patients."
        )
    if len(facts.study["seeds"]) < 3:
        warnings.append("Fewer than three seeds: differences between settings may be due to the seed.")
    return warnings


def _describe_settings(facts: SweepFacts) -> Section:
    keys, best = facts.summary["grid"], facts.summary["best"]
    metrics = {name: label for name, label in METRICS.items() if name in facts.summary["combinations"][0]}
    rows = []
    for entry in facts.summary["combinations"]:
        chosen = best is not None and entry["values"] == best["values"]
        rows.append(
            [
                *(_format_value(entry["values"][key]) for key in keys),
                "chosen" if chosen else "",
                mean_sd(entry["val_auroc"]),
                *(mean_sd(entry[name]) for name in metrics),
                number(entry["n_seeds"]),
            ]
        )
    columns = [*keys, "", "validation AUROC", *metrics.values(), "seeds"]
    picture = Picture(
        "AUROC of every run on validation, by setting."
        if facts.study.get("search")
        else "AUROC of every run on validation and test, by setting.",
        svg(facts.figure, "sweep"),
    )
    blocks: list[Block] = [
        Pictures([picture], across=1),
        Table(
            columns,
            rows,
            caption="All combinations",
            note="Mean ± standard deviation over seeds."
            + (
                " Right of the validation AUROC: test subset, each run at the threshold chosen on its "
                "validation subset."
                if metrics
                else ""
            ),
            text_columns=len(keys) + 1,
        ),
    ]
    return Section("settings", "Settings", blocks)


def _describe_runs(facts: SweepFacts) -> Section:
    keys = facts.summary["grid"]
    metrics = {name: label for name, label in METRICS.items() if name in facts.table}
    columns_shown = [*keys, "seed", "val_auroc", *metrics, "threshold", "chosen_epoch"]
    rows = [
        [
            _format_value(record[name]) if name in (*keys, "seed") else number(record[name])
            for name in columns_shown
        ]
        for record in facts.table[columns_shown].to_dict("records")
    ]
    columns = [*keys, "seed", "validation AUROC", *metrics.values(), "threshold", "selected epoch"]
    fold = f"{len(rows)} runs" if len(rows) > 16 else ""
    return Section("runs", "All runs", [Table(columns, rows, text_columns=len(keys), fold=fold)])


def mean_sd(spread: Mapping[str, float | None], sign: str = "") -> str:
    """Format a mean and its standard deviation; a dash if undefined."""
    mean, sd = spread["mean"], spread["sd"]
    if mean is None or not np.isfinite(mean):
        return "-"
    return f"{mean:{sign}.3f}" if sd is None else f"{mean:{sign}.3f} ± {sd:.3f}"


def format_values(values: Mapping[str, Any]) -> str:
    """Format settings with their values in one line."""
    return ", ".join(f"{key} = {_format_value(value)}" for key, value in values.items())


def _format_value(value: object) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(str, value))
    return str(value)
