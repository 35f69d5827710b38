"""The report of a run: its summary, its warnings, and the sections that features register."""

from collections.abc import Sequence

from biopsy.core.text import capitalize, count, count_patches, plural
from biopsy.reporting.checklist import describe_checklist
from biopsy.reporting.document import (
    Facts,
    Headline,
    ReportDocument,
    Section,
    Summary,
    Text,
    interval_of,
    metric_label,
    number,
)
from biopsy.reporting.elements import (
    WITHOUT_IDS,
    describe_openings,
    describe_rule,
    synthetic_warning,
    written_by,
)
from biopsy.reporting.facts import RunFacts, hide_run
from biopsy.reporting.html import HIDDEN, NOT_FOR
from biopsy.reporting.registry import list_results, list_sections


def report_of_run(facts: RunFacts, *, hide_ids: bool = False) -> ReportDocument:
    """Return the report of a run; with ``hide_ids``, ids of patients, slides and patches become numbers."""
    if hide_ids and not facts.ids_hidden:
        facts = hide_run(facts, {name: result.hide for name, result in list_results().items()})
    composed = [compose(facts) for compose in list_sections()]
    present = [section for section in composed if section is not None]
    if facts.missing:
        present.append(_list_missing(facts.missing))
    present.append(describe_checklist(present, has_subgroups=bool(facts.metrics.get("subgroups"))))
    m = facts.metrics
    title = str(facts.recipe.get("title") or facts.recipe.get("name") or facts.run.get("recipe") or "A run")
    name = facts.run.get("name") or facts.run.get("id") or "run"
    dataset = facts.run.get("pack", {}).get("dataset")
    data = f" on the data set {dataset}" if dataset else ""
    source = f"Run {name}{data}, evaluated on the {m.get('subset', 'test')} subset"
    if not facts.is_run:
        title, source = "Evaluation of predictions", "Predictions from outside biopsy"
    size = count_patches(m.get("n_patches") or 0, m.get("n_patients") or 0, facts.unit)
    return ReportDocument(
        title=title,
        subtitle=f"{source}: {size}",
        summary=_summarise(facts),
        sections=present,
        warnings=warn_reader(facts),
        footer=written_by(facts.run),
    )


def _list_missing(missing: Sequence[tuple[str, str]]) -> Section:
    """Return the section of missing results, with the commands that compute them."""
    return Section(
        "missing",
        "Not included",
        [
            Text("Not measured for this run. `biopsy report RUN --complete` runs the commands."),
            Facts([(title, command) for title, command in missing]),
        ],
    )


def warn_reader(facts: RunFacts) -> list[str]:
    """Return the warnings of a report."""
    m, split = facts.metrics, {**facts.run.get("split", {}), **facts.metrics.get("split", {})}
    warnings = []
    if split.get("patients_overlap"):
        reason = "as published" if split.get("as_published") else "on purpose"
        warnings.append(
            f"Patient overlap between subsets, {reason}: the results do not generalise to new patients."
        )
    if split.get("test_is_validation"):
        warnings.append(
            "As published, the test subset is also the validation subset: results are optimistic."
        )
    if m.get("subset") == "validation":
        warnings.append(
            "These are results on the validation subset, on which epoch and threshold were chosen: they are "
            "optimistic."
        )
    if facts.unit == "patch":
        warnings.append(WITHOUT_IDS)
    warnings += [f"{capitalize(text)}." for text in m.get("warnings", [])]
    ours, colour = facts.pooled.get("auroc", {}).get("value"), facts.baseline.get("value")
    if ours is not None and colour is not None and colour >= ours:
        warnings.append(
            f"A colour-only baseline reaches AUROC {number(colour)} (this model: {number(ours)}); the model "
            "may rely on staining rather than morphology."
        )
    return warnings


def _summarise(facts: RunFacts) -> Summary:
    m, colour = facts.metrics, facts.baseline
    comparison = ""
    if colour.get("value") is not None:
        comparison = f"colour-only baseline: {number(colour['value'])}"
        if colour.get("low") is not None:
            comparison += f" ({interval_of(colour)})"
    meanings = (
        {
            "sensitivity": f"share of {facts.positive} patches predicted {facts.positive}",
            "specificity": f"share of {facts.negative} patches predicted {facts.negative}",
        }
        if facts.is_binary
        else {
            "accuracy": "share of patches classified correctly",
            "balanced_accuracy": "mean recall over classes",
        }
    )
    headlines = [
        Headline(
            capitalize(_ranking(facts)), facts.pooled.get("auroc", {}), comparison, mark=colour.get("value")
        )
    ]
    headlines += [
        Headline(capitalize(metric_label(name)), facts.pooled.get(name, {}), meaning)
        for name, meaning in meanings.items()
    ]
    return Summary(
        verdict=state_verdict(facts) + synthetic_warning(facts.run.get("pack", {})),
        headlines=headlines,
        unit=facts.unit,
        findings=[
            _describe_threshold(facts),
            *_list_groups(facts),
            describe_openings(facts.ledger or m.get("times_opened"))
            if facts.is_run
            else "Whether the model was trained on these patches is not recorded.",
            *([HIDDEN] if facts.ids_hidden else []),
        ],
        not_for=NOT_FOR,
    )


def _ranking(facts: RunFacts) -> str:
    return "AUROC" if facts.is_binary else "macro AUROC"


def state_verdict(facts: RunFacts) -> str:
    """Return the result in one sentence, compared with chance and with the colour-only baseline."""
    m, auroc = facts.metrics, facts.pooled.get("auroc", {})
    task = (
        f"{facts.positive} from {facts.negative} patches"
        if facts.is_binary
        else f"{len(facts.class_names)} classes of patches"
    )
    value, low = auroc.get("value"), auroc.get("low")
    n_groups = m.get("n_patches" if facts.unit == "patch" else "n_patients") or 0
    population = f"On {count(n_groups, facts.unit)}"
    if m.get("split", {}).get("patients_overlap"):
        population = (
            f"This is no result for new {plural(facts.unit)}: on {count(n_groups, facts.unit)} that are also "
            "in the training data"
        )
    elif facts.is_run and m.get("subset") != "validation":
        population += " not seen in training"
    elif facts.is_run:
        population += " of the validation subset"
    if value is None:
        reason = (auroc.get("reason") or "not measured").removeprefix("undefined: ")
        if facts.is_binary:
            return f"{population}, the {_ranking(facts)} is not defined: {reason}."
        share = number(facts.pooled.get("accuracy", {}).get("value"))
        text = f"{population}, the accuracy over {task} is {share}"
        return f"{text}; the {_ranking(facts)} is not defined ({reason})."
    if low is None:
        reason = auroc.get("reason") or "there is no interval"
        return (
            f"{population}, the model distinguishes {task} with {_ranking(facts)} {number(value)}; this "
            f"cannot be generalised to other {plural(facts.unit)} ({reason})."
        )
    level = f"{_ranking(facts)} {number(value)}, 95 % interval {number(low)} to {number(auroc['high'])}"
    if low <= 0.5:
        return f"{population}, the model is not shown to distinguish {task} better than chance ({level})."
    return (
        f"{population}, the model distinguishes {task} better than chance ({level}){_beside_colour(facts)}."
    )


def _beside_colour(facts: RunFacts) -> str:
    """Return the comparison with the colour-only baseline, if there is one."""
    colour, gain = facts.baseline.get("value"), (facts.metrics.get("baseline") or {}).get("gain") or {}
    if colour is None:
        return ""
    if gain.get("low") is not None and gain["low"] > 0:
        return f" and better than a colour-only baseline ({number(colour)})"
    if gain.get("high") is not None and gain["high"] < 0:
        return f", but worse than a colour-only baseline ({number(colour)})"
    return f"; it is not shown to be better than a colour-only baseline ({number(colour)})"


MAX_LISTED = 12  # test patients listed in the summary; the table of patients lists all


def _list_groups(facts: RunFacts) -> list[str]:
    """Return the ids of the evaluated patients or slides, if there are few."""
    names = sorted(facts.group_ids.dropna().astype(str).unique())
    if not names or facts.unit == "patch":
        return []
    kind = plural(facts.unit).capitalize()
    if facts.is_run:
        kind = f"{facts.metrics.get('subset', 'test').capitalize()} {plural(facts.unit)}"
    if len(names) > MAX_LISTED:
        return [f"{kind}: {len(names):,}, listed under Per-{facts.unit} results."]
    return [f"{kind} ({len(names)}): {', '.join(names)}."]


def _describe_threshold(facts: RunFacts) -> str:
    threshold = facts.metrics.get("threshold")
    if not threshold:
        return "Each patch is assigned the class of highest probability."
    if threshold.get("chosen_on") is None:
        return (
            f"Patches with a probability of at least {number(facts.threshold)} are predicted "
            f"{facts.positive}."
        )
    rule = threshold.get("rule")
    return (
        f"Patches with a probability of at least {number(facts.threshold)} are predicted {facts.positive}. "
        f"The threshold was chosen on the {threshold['chosen_on']} subset"
        + (f" ({describe_rule(rule)})." if rule else ".")
    )
