"""The model card: intended use, training data, performance and limitations of a classifier.

Headings after Mitchell et al. 2019, "Model Cards for Model Reporting". All content is read from the records
of the run and the classifier; missing information is stated as unknown.
"""

import contextlib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Required

from typing_extensions import TypedDict

from biopsy.core.errors import RunError
from biopsy.core.text import class_title, count, count_patches, plural
from biopsy.models.classifier import Classifier, ClassifierInfo
from biopsy.reporting.document import interval_of, metric_label, number
from biopsy.statistics.calibrators import CalibratorRecord
from biopsy.training.metrics import Metrics
from biopsy.training.runs import Run

NOT_A_DEVICE = "Research use only: not a medical device, not for diagnosis."
SHOWN = (
    *("auroc", "auprc", "accuracy", "balanced_accuracy", "sensitivity", "specificity", "ppv", "npv"),
    *("f1_macro", "kappa", "brier", "ece", "calibration_slope"),
)
HUB_METRICS = {"auroc": "roc_auc", "sensitivity": "recall", "ppv": "precision"}
"""Names of metrics on the Hugging Face hub; other metrics keep their name."""


class Int8Difference(TypedDict):
    """Differences of the quantised network from float32, in probabilities and predicted classes."""

    n_patches: int
    largest: float
    median: float
    changed_predictions: float
    nncf: str


class Parity(TypedDict, total=False):
    """Content of ``parity.json``: the largest difference of a probability for each pair of programs."""

    format: Required[str]
    n_patches: Required[int]
    tolerance: Required[float]
    largest_difference: Required[dict[str, dict[str, float]]]
    versions: Required[dict[str, str]]
    pack: dict[str, str | None]
    int8: Int8Difference


@dataclass(frozen=True)
class CardFacts:
    """Input of a model card.

    Attributes:
        run: The run; None if unavailable.
        metrics: Metrics of the run; None if not evaluated.
        parity: Parity report; None outside a bundle.
    """

    info: ClassifierInfo
    run: Run | None = None
    metrics: Metrics | None = None
    parity: Parity | None = None


def gather_card(classifier: Classifier, run: Run | None, parity: Parity | None = None) -> CardFacts:
    """Return the input of a card, without metrics if the run was not evaluated."""
    metrics = None
    if run is not None:
        with contextlib.suppress(RunError):
            metrics = run.metrics()
    return CardFacts(classifier.info, run, metrics, parity)


def card_of_run(facts: CardFacts) -> str:
    info = facts.info
    parts = [
        f"# {info.recipe or info.network}: {' / '.join(map(class_title, info.class_names))}",
        f"**{NOT_A_DEVICE}**",
        *_describe_model(info),
        *_describe_use(info),
        *_describe_data(facts),
        *_describe_metrics(facts.metrics),
        *_describe_subgroups(facts.metrics),
        *_describe_limits(facts),
    ]
    if facts.parity is not None:
        parts += _describe_parity(facts.parity)
    return "\n\n".join(parts) + "\n"


def metadata_of_run(facts: CardFacts) -> str:
    """Return the YAML header of a card on the hub: licence, task, tags and test metrics."""
    from huggingface_hub import EvalResult, ModelCardData

    info = facts.info
    name, dataset = info.recipe or info.network, info.pack.get("name", "unknown")
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split=facts.metrics.subset,
            metric_type=HUB_METRICS.get(metric, metric),
            metric_name=metric,
            metric_value=facts.metrics.patch[metric].value,
        )
        for metric in SHOWN
        if facts.metrics
        and metric in facts.metrics.patch
        and not math.isnan(facts.metrics.patch[metric].value)
    ]
    licence, _, _ = info.licence.lower().partition(";")  # followed by the licence of the data
    is_identifier = re.fullmatch(r"[a-z0-9.-]+", licence)
    data = ModelCardData(
        license=licence if is_identifier else "other",
        license_name=None if is_identifier else re.sub(r"[^a-z0-9.]+", "-", licence).strip("-"),
        library_name="biopsy",
        pipeline_tag="image-classification",
        tags=["histopathology", "breast-cancer", "h-and-e", "safetensors"],
        model_name=name if results else None,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _describe_model(info: ClassifierInfo) -> list[str]:
    input_px = info.preprocessing.input_px
    resized = "" if input_px == info.patch_px else f", resized to {input_px} px"
    rows = {
        "network": info.network,
        "classes": ", ".join(map(_name_class, info.class_names)),
        "positive class": _positive(info) or "none, more than two classes",
        "patch": f"{info.patch_px} x {info.patch_px} px at {_mpp(info)}" + resized,
        "calibration": _describe_calibrator(info.calibrator),
        "threshold": _describe_threshold(info),
        "licence of the weights": info.licence,
        "made with": f"biopsy {info.version or 'of unknown version'}",
        "SHA-256 of the weights": info.weights_sha256 or "not saved yet",
    }
    return ["## Model", _table(["", ""], rows.items())]


def _describe_use(info: ClassifierInfo) -> list[str]:
    return [
        "## Intended use",
        f"Research on H&E-stained slides: maps of the probability of {_positive(info) or 'each class'} "
        f"for patches of {info.patch_px} px at {_mpp(info)}, and comparison of methods. Not for decisions on "
        "patients; not for other stains, organs or magnifications than those below.",
    ]


def _describe_data(facts: CardFacts) -> list[str]:
    info = facts.info
    basis = [text for text in (info.description, info.citation) if text]
    if facts.run is None:
        return [
            "## Data",
            *basis,
            f"Trained on {info.pack.get('name', 'data that are not recorded')}; the run is not available.",
        ]
    pack, split = facts.run.info["pack"], facts.run.info["split"]
    unit = split["unit"]
    units = [] if unit == "patch" else [plural(unit)]
    rows = [
        [
            subset,
            number(counts["patches"]),
            *(number(counts["groups"]) for _ in units),
            *map(number, counts["per_class"].values()),
        ]
        for subset, counts in split["subsets"].items()
        if counts["patches"]
    ]
    lines = [
        "## Data",
        *basis,
        f"Pack {pack['name']} ({pack['dataset']}, content {pack['content_sha256'][:12]}), split "
        f"{split['name']!r} ({split['protocol']}) by {unit}, seed {facts.run.info['seed']}.",
        _table(["subset", "patches", *units, *map(class_title, info.class_names)], rows),
    ]
    if split["patients_overlap"]:
        lines.append("**Patients overlap between subsets: the metrics below do not hold for new patients.**")
    return lines


def _describe_metrics(metrics: Metrics | None) -> list[str]:
    if metrics is None:
        return ["## Metrics", "Not evaluated."]
    unit, pooled = metrics.unit, metrics.patch
    rows = [
        [metric_label(name, len(metrics.class_names)), number(pooled[name].value), interval_of(pooled[name])]
        for name in SHOWN
        if name in pooled
    ]
    threshold, c = metrics.threshold, metrics.confusion
    lines = [
        "## Metrics",
        f"On the {metrics.subset} subset: {count_patches(metrics.n_patches, metrics.n_patients, unit)}; "
        f"95 % intervals over {plural(unit)}, method {metrics.interval.method}.",
        _table(["", "all patches", "95 % interval"], rows),
    ]
    if threshold and c:
        lines.append(
            f"At the threshold {number(threshold['value'])} ({threshold['rule']}, chosen on "
            f"{threshold['chosen_on']}): {number(c.tp)} true and {number(c.fp)} false positives, "
            f"{number(c.tn)} true and {number(c.fn)} false negatives."
        )
    if metrics.baseline and metrics.baseline.auroc is not None:
        lines.append(f"Colour-only baseline: AUROC {number(metrics.baseline.auroc)} on the same patches.")
    return lines


def _describe_subgroups(metrics: Metrics | None) -> list[str]:
    if metrics is None or not metrics.subgroups:
        return ["## Subgroups", "Not compared: the data have no column with subgroups."]
    groups = [
        (column, value, group)
        for column, values in metrics.subgroups.items()
        for value, group in values.items()
    ]
    shown = list(groups[0][2].patch)[:2]
    rows = [
        [
            *(column, value, number(group.n_patches), number(group.n_patients)),
            *(
                text
                for name in shown
                for text in (number(group.patch[name].value), interval_of(group.patch[name]))
            ),
        ]
        for column, value, group in groups
    ]
    header = ["", "", "patches", "patients"]
    for name in shown:
        header += [metric_label(name, len(metrics.class_names)), "95 % interval"]
    return ["## Subgroups", _table(header, rows)]


def _describe_limits(facts: CardFacts) -> list[str]:
    lines = [NOT_A_DEVICE]
    if facts.metrics and facts.metrics.n_patients < 10:
        tested = count(facts.metrics.n_patients, "patient")
        lines.append(f"Tested on {tested}: too few for conclusions on new patients.")
    lines += [
        "Not tested with other scanners, stains, laboratories and magnifications than those above.",
        f"Probabilities are for {_describe_prevalence(facts.info.calibrator)}.",
        "Out-of-distribution patches are flagged by `biopsy predict` and `biopsy slide` (if the classifier "
        "has reference statistics), not by other programs that run the exported model.",
        "The exported model is for full-size patches; the treatment of smaller ones is not exported.",
    ]
    return ["## Limits", "\n".join(f"* {line}" for line in lines)]


def _describe_parity(parity: Parity) -> list[str]:
    rows = [[pair, f"{values['probs']:.1e}"] for pair, values in parity["largest_difference"].items()]
    text = [
        "## Parity",
        f"Largest difference of a probability on {number(parity['n_patches'])} patches of "
        f"{parity['pack']['name']} (tolerance {parity['tolerance']:g}):",
        _table(["formats", "largest difference"], rows),
    ]
    if "int8" in parity:
        int8 = parity["int8"]
        text.append(
            f"Quantised network (int8) compared with float32 on {number(int8['n_patches'])} other patches: "
            f"probabilities differ by at most {int8['largest']:.3f} (median {int8['median']:.4f}), and "
            f"{100 * int8['changed_predictions']:.1f} % of the predictions change."
        )
    return text


def _describe_prevalence(calibrator: CalibratorRecord) -> str:
    if "prevalence" not in calibrator:
        return "the prevalence of positive patches in validation"
    declared, fitted = (f"{100 * calibrator[key]:.3g} %" for key in ("prevalence", "fitted_prevalence"))
    return f"a prevalence of positive patches of {declared} (in validation it is {fitted})"


def _describe_calibrator(calibrator: CalibratorRecord) -> str:
    if calibrator["method"] == "none":
        return f"none ({calibrator['reason']})" if calibrator.get("reason") else "none"
    return f"{calibrator['method']}, inside the exported model"


def _describe_threshold(info: ClassifierInfo) -> str:
    if not info.thresholds:
        return "none; the most probable class is predicted"
    first = info.thresholds[0]
    return f"{number(first['value'])} on the probability of {_positive(info)} ({first['rule']})"


def _positive(info: ClassifierInfo) -> str:
    return class_title(info.positive_class or "")


def _name_class(name: str) -> str:
    """Return a class as readers see it, and its name in files where that differs."""
    title = class_title(name)
    return title if title == name else f"{title} (`{name}`)"


def _mpp(info: ClassifierInfo) -> str:
    return "an unknown pixel size" if info.mpp is None else f"{info.mpp:g} um/px"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines
    )
