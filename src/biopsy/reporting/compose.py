"""The report of a run: its summary, its warnings, and the sections that features register."""

import math
from collections.abc import Sequence

from biopsy.core.text import capitalize, count, count_patches, plural
from biopsy.models.shipped import describe_shipped
from biopsy.models.weights import is_shipped_start, name_weights, title_recipe
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
from biopsy.reporting.registry import list_results, list_sections
from biopsy.training.probe import PROBE


def report_of_run(facts: RunFacts, *, hide_ids: bool = False) -> ReportDocument:
    """Return the report of a run; with ``hide_ids``, ids of patients, slides and patches become numbers."""
    if hide_ids and not facts.ids_hidden:
        facts = hide_run(facts, {name: result.hide for name, result in list_results().items()})
    present = [part for compose in list_sections() if (part := compose(facts)) is not None]
    if facts.missing:
        present.append(_list_missing(facts.missing))
    present.append(describe_checklist(present, has_subgroups=bool(facts.metrics.subgroups)))
    m = facts.metrics
    title, source = "Evaluation of predictions", "Predictions from outside biopsy"
    if facts.run is not None:
        title = title_recipe(facts.recipe) if facts.recipe else facts.run["recipe"]
        data = "synthetic data" if m.synthetic else f"the data set {facts.run['pack']['dataset']}"
        source = f"Run {facts.run['id']} on {data}, evaluated on the {m.subset} subset"
    size = count_patches(m.n_patches, m.n_patients, facts.unit)
    return ReportDocument(
        title=title,
        subtitle=f"{source}: {size}",
        summary=_summarise(facts),
        sections=present,
        warnings=warn_reader(facts),
        footer=written_by(facts.run),
        ids_hidden=facts.ids_hidden,
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
    m = facts.metrics
    warnings = []
    if m.split.patients_overlap:
        is_published = facts.run is not None and facts.run["split"]["as_published"]
        reason = "as published" if is_published else "on purpose"
        warnings.append(
            f"Patient overlap between subsets, {reason}: the results do not generalise to new patients."
        )
    if m.split.test_is_validation:
        warnings.append(
            "As published, the test subset is also the validation subset: results are optimistic."
        )
    if m.subset == "validation":
        warnings.append(
            "These are results on the validation subset, on which epoch and threshold were chosen: they are "
            "optimistic."
        )
    if facts.unit == "patch":
        warnings.append(WITHOUT_IDS)
    warnings += [f"{capitalize(text)}." for text in m.warnings]
    ours, colour = facts.pooled["auroc"].value, facts.baseline
    if colour is not None and colour.value >= ours:
        warnings.append(
            f"A colour-only baseline reaches AUROC {number(colour.value)} (this model: {number(ours)}); the "
            "model may rely on staining rather than morphology."
        )
    return warnings


def _summarise(facts: RunFacts) -> Summary:
    m, colour = facts.metrics, facts.baseline
    comparison = ""
    if colour is not None:
        comparison = f"colour-only baseline: {number(colour.value)}"
        if colour.low is not None:
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
            capitalize(facts.ranking_metric),
            facts.pooled["auroc"],
            comparison,
            mark=None if colour is None else colour.value,
        )
    ]
    headlines += [
        Headline(capitalize(metric_label(name)), facts.pooled[name], meaning)
        for name, meaning in meanings.items()
    ]
    return Summary(
        verdict=state_verdict(facts) + synthetic_warning(m.synthetic),
        headlines=headlines,
        unit=facts.unit,
        findings=[
            *_describe_training(facts),
            _describe_threshold(facts),
            *_list_groups(facts),
            describe_openings(m.ledger)
            if facts.is_run
            else "Whether the model was trained on these patches is not recorded.",
        ],
    )


def state_verdict(facts: RunFacts) -> str:
    """Return the result in one sentence, compared with chance and with the colour-only baseline."""
    m, auroc = facts.metrics, facts.pooled["auroc"]
    task = (
        f"{facts.positive} from {facts.negative} patches"
        if facts.is_binary
        else f"{len(facts.class_names)} classes of patches"
    )
    value, low = auroc.value, auroc.low
    groups = count(facts.n_groups, facts.unit)
    population = f"On {groups}"
    if m.split.patients_overlap:
        population = (
            f"This is no result for new {plural(facts.unit)}: on {groups} that are also in the training data"
        )
    elif facts.is_run and m.subset != "validation":
        population += " not seen in training"
    elif facts.is_run:
        population += " of the validation subset"
    if math.isnan(value):
        reason = (auroc.reason or "not measured").removeprefix("undefined: ")
        if facts.is_binary:
            return f"{population}, the {facts.ranking_metric} is not defined: {reason}."
        share = number(facts.pooled["accuracy"].value)
        text = f"{population}, the accuracy over {task} is {share}"
        return f"{text}; the {facts.ranking_metric} is not defined ({reason})."
    if low is None:
        reason = auroc.reason or "there is no interval"
        return (
            f"{population}, the model distinguishes {task} with {facts.ranking_metric} {number(value)}; this "
            f"cannot be generalised to other {plural(facts.unit)} ({reason})."
        )
    level = f"{facts.ranking_metric} {number(value)}, 95 % interval {number(low)} to {number(auroc.high)}"
    if low <= 0.5:
        return f"{population}, the model is not shown to distinguish {task} better than chance ({level})."
    return (
        f"{population}, the model distinguishes {task} better than chance ({level}){_beside_colour(facts)}."
    )


def _beside_colour(facts: RunFacts) -> str:
    """Return the comparison with the colour-only baseline, if there is one."""
    if facts.baseline is None:
        return ""
    colour, verdict = number(facts.baseline.value), facts.gain and facts.gain.compare(0)
    if verdict == "higher":
        return f" and better than a colour-only baseline ({colour})"
    if verdict == "lower":
        return f", but worse than a colour-only baseline ({colour})"
    return f"; it is not shown to be better than a colour-only baseline ({colour})"


MAX_LISTED = 12  # test patients listed in the summary; the table of patients lists all


def _list_groups(facts: RunFacts) -> list[str]:
    """Return the ids of the evaluated patients or slides, if there are few."""
    names = sorted(facts.group_ids.dropna().astype(str).unique())
    if not names or facts.unit == "patch":
        return []
    kind = plural(facts.unit).capitalize()
    if facts.metrics.subset:
        kind = f"{facts.metrics.subset.capitalize()} {plural(facts.unit)}"
    if len(names) > MAX_LISTED:
        return [f"{kind}: {len(names):,}, listed under Per-{facts.unit} results."]
    return [f"{kind} ({len(names)}): {', '.join(names)}."]


def _describe_training(facts: RunFacts) -> list[str]:
    """Return what was trained, on which patches, and where training began."""
    run, recipe = facts.run, facts.recipe
    if run is None or recipe is None:
        return []
    used = run["split"].get("used") or run["split"]["subsets"]["train"]
    patches = count_patches(used["patches"], used["groups"] or 0, facts.unit)
    trainable, start = recipe.model.trainable, name_weights(run["weights"])
    part = {
        "all": "all layers of the network",
        "head": "only the last layer of the network",
    }.get(trainable, f"the layers of the network from {trainable} on")
    if recipe.model.lora_rank:
        part = "the last layer of the network and adapters (LoRA) of the others"
    elif recipe.train.optimiser == PROBE:
        part += " (a logistic regression on its features)"
    if is_shipped_start(run["weights"]):
        start += f", which ships with biopsy and was {describe_shipped(str(run['weights']['weights']))}"
    others = f"Training began with {start}."
    if trainable != "all" and not recipe.model.lora_rank:
        others = f"The other layers were not changed: {start}."
    return [f"Trained: {part}, on {patches}. {others}"]


def _describe_threshold(facts: RunFacts) -> str:
    threshold = facts.metrics.threshold
    if not threshold:
        return "Each patch is assigned the class of highest probability."
    if threshold["chosen_on"] is None:
        return (
            f"Patches with a probability of at least {number(facts.threshold)} are predicted "
            f"{facts.positive}."
        )
    return (
        f"Patches with a probability of at least {number(facts.threshold)} are predicted {facts.positive}. "
        f"The threshold was chosen on the {threshold['chosen_on']} subset "
        f"({describe_rule(threshold['rule'])})."
    )
