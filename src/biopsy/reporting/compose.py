"""Reports: one HTML file that says what was done, how sure it is, and shows the mistakes.

Everything a page needs is inside it: styles, vector figures, pictures. It asks nothing of a network and runs
no script.
"""

from collections.abc import Sequence

from biopsy.core.subsets import subset_name
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
    about = f"Run {name}, evaluated on the {subset_name(m.get('side', 'test'))} subset"
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
            Text("Not measured for this run. `biopsy report RUN --complete` runs the commands."),
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
            f"Patient overlap between subsets, {why}: the results do not generalise to new patients."
        )
    if split.get("test_is_validation"):
        warnings.append(
            "As published, the test subset is also the validation subset: results are optimistic."
        )
    if m.get("side") == "val":
        warnings.append(
            "These are results on the validation subset, on which epoch and threshold were chosen: they "
            "are optimistic."
        )
    if facts.unit == "patch":
        warnings.append(
            "The data have neither patient nor slide ids: the unit is the patch, and intervals are too "
            "narrow if "
            "patches are correlated."
        )
    warnings += [f"{text[0].upper()}{text[1:]}." for text in m.get("warnings", [])]
    ours, colour = facts.pooled.get("auroc", {}).get("value"), facts.baseline.get("value")
    if ours is not None and colour is not None and colour >= ours:
        warnings.append(
            f"A colour-only baseline reaches AUROC {number(colour)} (this model: {number(ours)}); the "
            "model may rely "
            "on staining rather than morphology."
        )
    return warnings


def _summarise(facts: RunFacts) -> Summary:
    m, colour = facts.metrics, facts.baseline
    beside = ""
    if colour.get("value") is not None:
        beside = f"colour-only baseline: {number(colour['value'])}"
        if colour.get("low") is not None:
            beside += f" ({interval_text(colour['low'], colour['high'], None)})"
    meanings = (
        {
            "sensitivity": f"share of {facts.positive} patches detected",
            "specificity": f"share of {facts.negative} patches predicted negative",
        }
        if facts.is_binary
        else {
            "accuracy": "share of patches classified correctly",
            "balanced_accuracy": "mean recall over classes",
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
            else "Whether these patches were excluded from training is not recorded.",
            *([HIDDEN] if facts.ids_hidden else []),
        ],
        not_for=NOT_FOR,
    )


def _ask(facts: RunFacts) -> str:
    task = (
        f"{facts.positive} from {facts.negative}" if facts.is_binary else f"{len(facts.class_names)} classes"
    )
    new = "patches" if facts.unit == "patch" else f"patches of {facts.unit}s"
    overlap = facts.metrics.get("split", {}).get("patients_overlap")
    if overlap:
        return (
            f"How well does the model distinguish {task} in patches of {facts.unit}s that are also "
            "in the training data?"
        )
    suffix = f" in {new} not seen in training" if facts.is_run else ""
    return f"How well does the model distinguish {task}{suffix}?"


def _say_threshold(facts: RunFacts) -> str:
    threshold = facts.metrics.get("threshold")
    if not threshold:
        return "Each patch is assigned the class of highest probability."
    if threshold.get("chosen_on") is None:
        return (
            f"Patches with a probability of at least {number(facts.threshold)} are predicted "
            f"{facts.positive}."
        )
    return (
        f"Patches with a probability of at least {number(facts.threshold)} are predicted "
        f"{facts.positive}; the "
        f"threshold was chosen on {threshold.get('chosen_on', 'a subset not stated')} by the rule "
        f"{threshold.get('rule', 'not stated')!r}."
    )
