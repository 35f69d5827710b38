"""Reports: one HTML file that says what was done, how sure it is, and shows the mistakes.

Everything a page needs is inside it: styles, vector figures, pictures. It asks nothing of a network and runs
no script.
"""

from collections.abc import Sequence

from biopsy.reporting.checklist import describe_checklist
from biopsy.reporting.document import (
    Facts,
    ReportDocument,
    Section,
    Summary,
    Text,
    headline,
    interval_text,
    metric_label,
    number,
)
from biopsy.reporting.elements import say_openings
from biopsy.reporting.facts import RunFacts, hide_run
from biopsy.reporting.html import HIDDEN, NOT_FOR
from biopsy.reporting.registry import list_results, list_sections


def report_of_run(facts: RunFacts, *, hide_ids: bool = False) -> ReportDocument:
    """Compose the report of a run.

    Args:
        facts: The run's records.
        hide_ids: Replace patient, slide and patch ids by numbers everywhere, and say so.
    """
    if hide_ids and not facts.ids_hidden:
        facts = hide_run(facts, {name: result.hide for name, result in list_results().items()})
    composed = [compose(facts) for compose in list_sections()]
    present = [section for section in composed if section is not None]
    if facts.missing:
        present.append(_name_missing(facts.missing))
    present.append(describe_checklist(present, has_subgroups=bool(facts.metrics.get("subgroups"))))
    m = facts.metrics
    title = str(facts.recipe.get("title") or facts.recipe.get("name") or facts.run.get("recipe") or "A run")
    name = facts.run.get("name") or facts.run.get("id") or "run"
    about = f"Run {name}, judged on the {m.get('side', 'test')} side"
    if not facts.is_run:
        title, about = "Evaluation of predictions", "Predictions from outside biopsy"
    size = f"{number(m.get('n_patches'))} patches"
    if facts.unit != "patch":
        size += f" of {number(m.get('n_patients'))} {facts.unit}s"
    return ReportDocument(
        title=title,
        subtitle=f"{about}: {size}",
        summary=_summarise(facts),
        sections=present,
        warnings=warn_reader(facts),
        footer=f"Written by biopsy {facts.run.get('environment', {}).get('biopsy', '')}".strip() + ".",
    )


def _name_missing(missing: Sequence[tuple[str, str]]) -> Section:
    """List what has not been measured of this run, with the commands that do."""
    return Section(
        "missing",
        "Not included",
        [
            Text(
                "These have not been measured for this run. `biopsy report RUN --complete` runs the commands."
            ),
            Facts([(title, command) for title, command in missing]),
        ],
    )


def warn_reader(facts: RunFacts) -> list[str]:
    """List what a reader must know before any number."""
    m, split = facts.metrics, {**facts.run.get("split", {}), **facts.metrics.get("split", {})}
    warnings = []
    if split.get("patients_overlap"):
        why = "as published" if split.get("as_published") else "on purpose"
        warnings.append(
            f"Patients stand on more than one side of this split, {why}: "
            "these numbers say nothing about a new patient."
        )
    if split.get("test_is_validation"):
        warnings.append(
            "The test side is the validation side, as published: everything was chosen on what is tested."
        )
    if m.get("side") == "val":
        warnings.append(
            "This is the validation side, on which epoch and threshold were chosen: expect worse elsewhere."
        )
    if facts.unit == "patch":
        warnings.append(
            "The data name neither patients nor slides: the unit is the patch, and intervals are too narrow "
            "wherever patches belong together."
        )
    ours, colour = facts.pooled.get("auroc", {}).get("value"), facts.baseline.get("value")
    if ours is not None and colour is not None and colour >= ours:
        warnings.append(
            f"Colour alone reaches AUROC {number(colour)}, this model {number(ours)}: it may know stain."
        )
    return warnings


def _summarise(facts: RunFacts) -> Summary:
    m, colour = facts.metrics, facts.baseline
    beside = ""
    if colour.get("value") is not None:
        beside = f"colour alone: {number(colour['value'])}"
        if colour.get("low") is not None:
            beside += f" ({interval_text(colour['low'], colour['high'], None)})"
    meanings = (
        {
            "sensitivity": f"share of {facts.positive} that is found",
            "specificity": f"share of {facts.negative} that is left alone",
        }
        if facts.is_binary
        else {
            "accuracy": "share of patches that are right",
            "balanced_accuracy": "mean recall of the classes",
        }
    )
    label = "AUROC" if facts.is_binary else "Macro AUROC"
    headlines = [headline(label, facts.pooled.get("auroc", {}), beside=beside, mark=colour.get("value"))]
    headlines += [
        headline(metric_label(name).capitalize(), facts.pooled.get(name, {}), beside=meaning)
        for name, meaning in meanings.items()
    ]
    return Summary(
        question=_ask(facts),
        headlines=headlines,
        unit=facts.unit,
        findings=[
            _say_threshold(facts),
            say_openings(facts.ledger or m.get("times_opened"))
            if facts.is_run
            else "Whether these patches were kept apart from training, the predictions do not say.",
            *([HIDDEN] if facts.ids_hidden else []),
        ],
        not_for=NOT_FOR,
    )


def _ask(facts: RunFacts) -> str:
    task = (
        f"{facts.positive} from {facts.negative}"
        if facts.is_binary
        else f"{len(facts.class_names)} classes apart"
    )
    new = "patches" if facts.unit == "patch" else f"patches of {facts.unit}s"
    overlap = facts.metrics.get("split", {}).get("patients_overlap")
    if overlap:
        return f"Can it tell {task}, on patches of {facts.unit}s it was trained on as well?"
    return f"Can it tell {task}, on {new} it has never seen?" if facts.is_run else f"Can it tell {task}?"


def _say_threshold(facts: RunFacts) -> str:
    threshold = facts.metrics.get("threshold")
    if not threshold:
        return "A patch is given the class of the highest probability."
    if threshold.get("chosen_on") is None:
        return f"A patch is predicted {facts.positive} from a probability of {number(facts.threshold)}."
    return (
        f"A patch is called {facts.positive} from a probability of {number(facts.threshold)}; that threshold "
        f"was chosen on {threshold.get('chosen_on', 'a side not stated')} by the rule "
        f"{threshold.get('rule', 'not stated')!r} and frozen."
    )
