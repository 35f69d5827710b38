"""Sections of the report on data, baseline, training, recipe and reproducibility."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from biopsy.core.text import plural
from biopsy.data.figures import draw_balance, draw_subsets
from biopsy.data.protocols.groups import SUBSETS
from biopsy.models.classifier import StartWeights
from biopsy.plotting.style import svg
from biopsy.reporting.document import (
    Block,
    Bullets,
    Facts,
    Listing,
    Picture,
    Pictures,
    Section,
    Table,
    Text,
    interval_of,
    metric_label,
    number,
)
from biopsy.reporting.elements import describe_openings, make_table, picture
from biopsy.reporting.facts import RunFacts
from biopsy.reporting.registry import section
from biopsy.statistics.metrics import METRICS
from biopsy.training.figures import QUANTITIES, draw_network, draw_training
from biopsy.training.runs import PatchCounts, RunInfo
from biopsy.training.study import StudyInfo

MAX_CLASS_COLUMNS = 4
NOT_SHOWN = ("format", "pack_sha256", "dataset", "unit", "counts")  # of the audit


@section("baseline", order=130)
def describe_baseline(facts: RunFacts) -> Section | None:
    """Return the comparison with the colour-only baseline."""
    theirs, ours = facts.baseline, facts.pooled["auroc"]
    if theirs is None or math.isnan(ours.value):
        return None
    rows = [
        [name, number(m.value), interval_of(m)]
        for name, m in (("this model", ours), ("colour-only baseline", theirs))
    ]
    gain = ours.value - theirs.value
    if facts.gain is not None and facts.gain.low is not None:
        rows.append(["difference, paired", number(gain), interval_of(facts.gain)])
    verdict = (
        f"The AUROC of the model is {number(gain)} higher than that of the baseline"
        + (
            "."
            if facts.gain is not None and facts.gain.compare(0) == "higher"
            else "; that it is higher on others is not established."
        )
        if gain > 0
        else f"The AUROC of the model is not higher than that of the baseline ({number(gain)}); the model "
        "may rely on staining rather than morphology."
    )
    note = "Baseline: logistic regression on colour and stain statistics of the same training subset."
    table = Table(
        ["model", "AUROC", "95 % interval"], rows, caption="Model and colour-only baseline", note=note
    )
    return Section("baseline", "Colour-only baseline", [table, Text(verdict)])


@section("data", order=140)
def describe_data(facts: RunFacts) -> Section:
    """Return pack, split, audit, class balance, and the evaluations of the test subset."""
    if facts.run is None:
        return Section("data", "Data", [Pictures(_draw_classes_by_group(facts))])
    pack, split = facts.run["pack"], facts.run["split"]
    blocks: list[Block] = [
        Facts(
            _format_known(
                ("data set", pack["dataset"]),
                ("patches in the pack", pack["n_patches"]),
                ("patients in the pack", pack.get("n_patients")),
                ("resolution", None if facts.mpp is None else f"{facts.mpp:g} µm per pixel"),
                ("content hash (SHA-256)", pack["content_sha256"]),
                ("split", split["name"]),
                ("protocol", split["protocol"]),
                ("fold", split["fold"]),
                (f"{plural(facts.unit)} in several subsets", split["patients_overlap"]),
                ("test subset used for validation", split.get("test_is_validation") or None),
            )
        )
    ]
    blocks.append(_table_of_subsets(split["subsets"], facts))
    pictures = [*_draw_subsets(split["subsets"], facts), *_draw_classes_by_group(facts)]
    blocks += [Pictures(pictures)] if pictures else []
    if facts.audit is not None:
        shown = {key: value for key, value in facts.audit.items() if key not in NOT_SHOWN}
        blocks.append(Facts(flatten(shown), fold="Data audit"))
    blocks.append(Text(describe_openings(facts.metrics.ledger)))
    return Section("data", "Data", blocks)


def _table_of_subsets(subsets: Mapping[str, PatchCounts], facts: RunFacts) -> Table:
    rows: list[list[object]] = [
        [subset, counts["patches"], counts["groups"], *map(counts["per_class"].get, facts.class_names)]
        for subset, counts in subsets.items()
    ]
    columns = ["subset", "patches", plural(facts.unit), *facts.class_titles]
    if len(facts.class_names) > MAX_CLASS_COLUMNS:  # transposed, to fit the page
        columns, *rows = map(list, zip(columns, *rows, strict=True))
    return make_table(columns, rows, caption="Subsets of the split")


def _draw_subsets(subsets: Mapping[str, PatchCounts], facts: RunFacts) -> list[Picture]:
    per_subset = {
        subset: counts["per_class"]
        for subset, counts in subsets.items()
        if subset in SUBSETS and counts["patches"]
    }
    if not per_subset:
        return []
    counts = np.array(
        [[per_class.get(name, 0) for name in facts.class_names] for per_class in per_subset.values()]
    )
    figure = draw_subsets([subset for subset in per_subset], counts, facts.class_titles)
    caption = "Patches of each subset of the split, by class."
    return [Picture(caption, svg(figure, "subsets"))]


def _draw_classes_by_group(facts: RunFacts) -> list[Picture]:
    groups = facts.group_ids
    has_group = groups.notna().to_numpy()
    if not has_group.any():
        return []
    names, codes = np.unique(groups[has_group].astype(str).to_numpy(), return_inverse=True)
    counts = np.zeros((len(names), len(facts.class_names)), dtype=int)
    np.add.at(counts, (codes, facts.predictions["target"].to_numpy(int)[has_group]), 1)
    figure = draw_balance(names.tolist(), counts, facts.class_titles)
    caption = f"Patches of each {facts.unit}{facts.on_subset}, by class."
    return [Picture(caption, svg(figure, "balance"))]


@section("training", order=150)
def describe_training(facts: RunFacts) -> Section | None:
    """Return training curves, of two epochs or more, and the network."""
    run = facts.run
    if run is None:
        return None
    blocks: list[Block] = []
    chosen = run.get("chosen_epoch")
    drawn = [
        quantity
        for quantity, (series, _) in QUANTITIES.items()
        if any(record.get(key) is not None for record in facts.log for key, _ in series)
    ]
    if drawn and len(facts.log) > 1:
        pictures = [
            Picture(
                f"{QUANTITIES[name][1].capitalize() if name != 'auroc' else 'AUROC'} against epochs.",
                svg(draw_training(facts.log, chosen_epoch=chosen, quantities=[name]), f"training-{name}"),
            )
            for name in drawn
        ]
        blocks.append(Pictures(pictures))
    speed = [record["images_per_s"] for record in facts.log if record.get("images_per_s")]
    parameters = run.get("parameters", {})
    blocks.append(
        Facts(
            _format_known(
                ("epochs", len(facts.log) or None),
                ("epoch kept", chosen),
                ("parameters", parameters.get("total")),
                ("trainable parameters", parameters.get("trainable")),
                ("initial weights", _describe_initial_weights(run["weights"])),
                ("device", run.get("device")),
                ("precision", run.get("precision")),
                ("images per second, median", round(float(np.median(speed))) if speed else None),
                ("training time", _duration(run["seconds"])),
            )
        )
    )
    if facts.network:
        figure = draw_network([tuple(row) for row in facts.network], input_shape=facts.input_shape)  # type: ignore[misc]
        caption = "Layers from input to output, with output shape (channels, height, width) and parameters."
        blocks.append(picture(svg(figure, "network"), caption, fold="Layers"))
    return Section("training", "Training and architecture", blocks)


def _describe_initial_weights(record: StartWeights) -> str:
    initial = f"{record['weights']} (licence: {record['licence']})" if record["pretrained"] else "random"
    return f"{initial}; {record['note']}" if record.get("note") else initial


@section("recipe", order=160)
def describe_recipe(facts: RunFacts) -> Section | None:
    """Return the published metrics, their known flaws, and all settings."""
    if facts.run is None or facts.recipe is None:
        return None
    blocks: list[Block] = []
    origin = facts.recipe.origin
    published, corrected = origin.claim, origin.corrected
    if published:
        names = [name for name in METRICS if name in published or name in corrected]
        rows = [
            [
                metric_label(name),
                number(published.get(name)),
                number(corrected.get(name)),
                number(facts.pooled[name].value) if name in facts.pooled else "-",
                interval_of(facts.pooled.get(name)),
            ]
            for name in names
        ]
        source = ", ".join(str(part) for part in (origin.authors, origin.title, origin.year) if part)
        blocks.append(
            Table(
                ["metric", "published", f"corrected, {facts.positive} positive", "this run", "95 % interval"],
                rows,
                caption="Published and observed metrics",
                note=f"Source: {source}. Comparable only on the same data and split; this run used the split "
                f"{facts.run['split']['name']!r}.",
            )
        )
    if origin.flaws:
        blocks += [Text("Known flaws of the published result:"), Bullets(origin.flaws)]
    if origin.not_stated:
        blocks.append(
            Text(f"Not stated by the source, chosen for this recipe: {'; '.join(origin.not_stated)}.")
        )
    return Section("recipe", "Recipe", [*blocks, Listing(facts.recipe_toml, fold="All settings (TOML)")])


@section("reproduction", order=170)
def describe_run_reproduction(facts: RunFacts) -> Section | None:
    """Return the section on reproducibility; None for predictions without a run."""
    return None if facts.run is None else describe_reproduction(facts.run)


def describe_reproduction(record: RunInfo | StudyInfo) -> Section:
    """Return command, seed and environment; ``record`` is the content of ``run.json`` or ``study.json``."""
    command = record.get("command")
    blocks: list[Block] = [Listing(str(command))] if command else []
    facts = _format_known(
        ("name", record.get("name") or record.get("id")),
        ("seed", record.get("seed", record.get("seeds"))),
        ("started", record.get("started")),
        ("status", record.get("status")),
        ("transform (not part of the command)", record.get("transform")),
    )
    blocks += [Facts(facts), Facts(flatten(record["environment"]), fold="Environment")]
    return Section("reproduce", "Reproducibility", blocks)


def flatten(document: Mapping[str, object]) -> list[tuple[str, str]]:
    """Return a nested record as names and formatted values; long lists are counted."""
    return [(key.replace("_", " "), _format(value)) for key, value in document.items() if value is not None]


def _format(value: object) -> str:
    if isinstance(value, Mapping):
        inner = {
            key: item for key, item in value.items() if key not in ("items", "method") and item is not None
        }
        if set(inner) == {"count"}:
            return _format(inner["count"])
        return (
            ", ".join(f"{str(key).replace('_', ' ')} {_format(item)}" for key, item in inner.items())
            or "none"
        )
    if isinstance(value, Sequence) and not isinstance(value, str):
        if not len(value):
            return "none"
        plain = all(isinstance(item, str | int | float) for item in value)
        return ", ".join(map(str, value)) if plain and len(value) <= 6 else f"{len(value):,}"
    return value if isinstance(value, str) else number(value)


def _format_known(*items: tuple[str, object]) -> list[tuple[str, str]]:
    return [(name, _format(value)) for name, value in items if value is not None]


def _duration(seconds: object) -> str | None:
    if not isinstance(seconds, int | float):
        return None
    minutes, seconds_left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds_left} s"
