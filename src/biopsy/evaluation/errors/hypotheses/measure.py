"""Tests of the published hypotheses about errors and saliency on the evaluated patches of a run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Unpack

import cv2
import numpy as np
import pandas as pd

from biopsy.core.errors import RunError
from biopsy.core.files import write_json
from biopsy.core.loaders import FloatOrNan
from biopsy.core.text import count
from biopsy.evaluation.patch_properties import measure_properties
from biopsy.evaluation.saliency.maps import explain_patches
from biopsy.evaluation.stored_results import (
    MAX_MEASURED,
    ResultKey,
    affordable_patches,
    draw_rows,
    read_result,
    result_key,
)
from biopsy.models.engine import Engine
from biopsy.models.inference import open_predictor
from biopsy.slide_io.stain import combine_stains, separate_stains
from biopsy.statistics.contrasts import Contrast, contrast_groups
from biopsy.statistics.intervals import IntervalMethod, describe_method, estimate_metrics
from biopsy.statistics.paired import estimate_differences
from biopsy.statistics.resampling import Interval, Resampling, clustered_ratio
from biopsy.statistics.weighted_counts import sort_scores
from biopsy.training.runs import Run

BLUE_YELLOW = 10.0  # CIELAB b*: blue at -10 and below, yellow at 10 and above; grey, pink, red in between
COLOURS = ("blue", "yellow")


def to_grey(patches: np.ndarray) -> np.ndarray:
    """Put luma (Rec. 601) in all three channels of patches ``(n, H, W, 3)``."""
    grey = cv2.cvtColor(patches.reshape(-1, 1, 3), cv2.COLOR_RGB2GRAY).reshape(patches.shape[:3])
    return np.repeat(grey[..., None], 3, axis=3)


def keep_stain(patches: np.ndarray, stain: int) -> np.ndarray:
    """Render patches with a single stain (0 haematoxylin, 1 eosin)."""
    amounts = separate_stains(patches)
    single = np.zeros_like(amounts)
    single[..., stain] = amounts[..., stain]
    return combine_stains(single)


REMOVALS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "grey": to_grey,
    "haematoxylin only": lambda patches: keep_stain(patches, 0),
    "eosin only": lambda patches: keep_stain(patches, 1),
}
"""Functions that remove colour from uint8 RGB patches and return uint8 RGB."""


def share_saliency(patches: np.ndarray, maps: np.ndarray, sizes: np.ndarray | None = None) -> pd.DataFrame:
    """Return the share of blue and of yellow pixels in each patch's area and in its saliency.

    Blue and yellow: a b* of CIELAB beyond `BLUE_YELLOW`; purple counts as blue.

    Args:
        patches: uint8 ``(n, H, W, 3)`` RGB.
        maps: Non-negative saliency, ``(n, H, W)``.
        sizes: True ``(width, height)`` of each patch; padding is not counted.

    Returns:
        One row per patch: ``<colour>_area`` and ``<colour>_saliency`` for each of `COLOURS`, 0-1; the latter
        is NaN for maps of zeros.
    """
    unit = np.ascontiguousarray(patches).reshape(-1, 1, 3).astype(np.float32) / 255
    b = cv2.cvtColor(unit, cv2.COLOR_RGB2LAB)[..., 2].reshape(patches.shape[:3])
    real = np.ones(b.shape, bool)
    if sizes is not None:
        rows, columns = np.arange(patches.shape[1]), np.arange(patches.shape[2])
        widths, heights = sizes.T
        real = (columns < widths[:, None, None]) & (rows[:, None] < heights[:, None, None])
    weight = np.where(real, maps, 0.0)
    total = weight.sum(axis=(1, 2))
    shares = {}
    for colour, chosen in zip(COLOURS, (b <= -BLUE_YELLOW, b >= BLUE_YELLOW), strict=True):
        shares[f"{colour}_area"] = (chosen & real).sum(axis=(1, 2)) / real.sum(axis=(1, 2))
        saliency = np.where(chosen, weight, 0.0).sum(axis=(1, 2))
        shares[f"{colour}_saliency"] = np.divide(
            saliency, total, out=np.full(len(total), np.nan), where=total > 0
        )
    return pd.DataFrame(shares)


FORMAT = "biopsy-hypotheses/2"
PATH = Path("explain", "hypotheses.json")
MIN_AREA = 1e-3  # a colour with a smaller share of the area is treated as absent

_VERDICTS = {
    "higher": "supported",
    "lower": "contradicted",
    "not different": "not supported",
    "inconclusive": "inconclusive",
}
_LEADS = {
    "supported": "Supported by these data",
    "contradicted": "Not supported by these data, which show the opposite",
    "not supported": "Not supported by these data",
}


@dataclass(frozen=True, kw_only=True)
class PropertyContrast(Contrast):
    """A property compared in the direction of a hypothesis: differences above 0, AUROC above 0.5 support it.

    Attributes:
        property: The property, one of `PROPERTIES`.
        direction: ``more`` or ``less``, the expectation for the chosen patches.
        others: The patches that they are compared with.
    """

    property: str
    direction: str
    chosen: str
    others: str


@dataclass(frozen=True)
class ColourShare:
    """A colour's share of the area and of the saliency, their ratio, and both shares by patient."""

    area_share: float | None
    saliency_share: float | None
    ratio: Interval
    by_group: dict[str, dict[str, FloatOrNan]]


@dataclass(frozen=True, kw_only=True)
class Hypothesis:
    """A published hypothesis and its test.

    Attributes:
        verdict: ``supported``, ``contradicted``, ``not supported`` or ``inconclusive`` (no interval).
        answer: The verdict as a sentence.
        measures: The compared properties.
        auroc: ``auroc`` with colour and after each of `REMOVALS`, and the ``difference`` of the latter.
        saliency: Shares by colour.
    """

    name: str
    claim: str
    source: str
    among: str
    verdict: str
    answer: str
    note: str
    measures: list[PropertyContrast] = field(default_factory=list)
    auroc: dict[str, dict[str, Interval]] | None = None
    saliency: dict[str, ColourShare] | None = None


@dataclass(frozen=True, kw_only=True)
class Hypotheses:
    """Content of ``hypotheses.json``; see the file formats page."""

    format: str
    subset: str
    n_patches: int
    classifier_sha256: str
    seed: int
    positive_class: str
    unit: str
    n_groups: int
    n_measured: int
    n_predicted: int
    threshold: float
    interval: IntervalMethod
    hypotheses: list[Hypothesis]


def measure_hypotheses(run: Run | Path | str, *, device: str = "auto") -> Hypotheses:
    """Test the published hypotheses on the evaluated subset of a run.

    Writes ``explain/hypotheses.json``, or reads it if it is current. Of a large subset, a random sample is
    measured. The subset is the test subset if it has been evaluated, else validation.

    Args:
        run: A finished run with two classes.

    Returns:
        The content of the file; see the file formats page.

    Raises:
        RunError: If the run has more than two classes, or no subset of it has been predicted.
    """
    run = Run.open(run)
    subset, path = run.evaluated_subset, run.path / PATH
    frame, metadata = run.predictions(subset)
    if "prob" not in frame:
        raise RunError(f"{run.path} has more than two classes: the hypotheses are defined for two")
    key = result_key(run, FORMAT, subset, frame, metadata)
    result = read_result(path, key, Hypotheses)
    if result is None:
        result = _measure(run, frame, key, device)
        write_json(path, result)
    return result


def read_hypotheses(run: Run) -> Hypotheses | None:
    """Return the stored results for the evaluated subset; None if there are none."""
    subset = run.evaluated_subset
    return read_result(run.path / PATH, result_key(run, FORMAT, subset, *run.predictions(subset)), Hypotheses)


def _measure(run: Run, frame: pd.DataFrame, key: ResultKey, device: str) -> Hypotheses:
    pack, classifier, engine = run.open_pack(verify=False), run.classifier.single_patch(), Engine(device)
    rows = pack.rows_of(frame["patch_id"])
    truth, groups = (pack.target[rows] == pack.positive_index).astype(int), pack.group_ids[rows]
    fixed = run.info["threshold"]
    assert fixed is not None and pack.info.positive_class is not None  # of two classes
    seed = run.info["seed"]
    prob, threshold = frame["prob"].to_numpy(float), fixed["value"]
    options: Resampling = {"seed": seed, "unit": pack.unit}

    measured = draw_rows(len(rows), MAX_MEASURED, seed)
    properties = measure_properties(pack.patches, pack.sizes, index=rows[measured])
    outcome = (truth[measured], prob[measured] >= threshold, groups[measured])

    n_predicted = affordable_patches(classifier.network, classifier.info.preprocessing.input_px)
    predicted = draw_rows(len(rows), n_predicted, seed)
    patches, sizes = pack.patches[rows[predicted]], pack.sizes[rows[predicted]]

    def predict(versions: np.ndarray) -> np.ndarray:
        return classifier.probs(predictor.logits(versions, sizes))[:, pack.positive_index]

    with open_predictor(classifier, engine, len(patches) * (1 + len(REMOVALS))) as predictor:
        intact = predict(patches)
        without = {name: predict(remove(patches)) for name, remove in REMOVALS.items()}
    maps = explain_patches(classifier, patches, sizes, "saliency", engine=engine).maps[:, 0]
    shares = share_saliency(patches, maps, sizes)
    return Hypotheses(
        **key,
        positive_class=pack.info.positive_class,
        unit=pack.unit,
        n_groups=len(np.unique(groups)),
        n_measured=len(measured),
        n_predicted=len(predicted),
        threshold=threshold,
        interval=describe_method(len(np.unique(groups)), **options),
        hypotheses=[
            *(check_errors(name, properties, *outcome, **options) for name in ERROR_HYPOTHESES),
            check_blue_yellow(truth[predicted], intact, without, shares, groups[predicted], **options),
        ],
    )


@dataclass(frozen=True)
class ErrorHypothesis:
    """A hypothesis about misclassified patches of one class.

    Attributes:
        claim: The claim as published.
        positive: Whether it is about false negatives, rather than false positives.
        properties: The properties compared, the primary one first.
        direction: 1 if misclassified patches should have more of it, else -1.
        adjective: What they should be more, or less.
    """

    claim: str
    positive: bool
    properties: tuple[str, ...]
    direction: int
    adjective: str


ERROR_HYPOTHESES = {
    "less stained": ErrorHypothesis(
        "Less stained patches are taken for negative.",
        True,
        ("stain", "haematoxylin", "eosin"),
        -1,
        "stained",
    ),
    "heterogeneous": ErrorHypothesis(
        "Patches of high internal heterogeneity are taken for cancer.",
        False,
        ("heterogeneity",),
        1,
        "heterogeneous",
    ),
}


def check_errors(
    name: str,
    properties: pd.DataFrame,
    truth: np.ndarray,
    predicted_positive: np.ndarray,
    group_ids: np.ndarray,
    **resampling: Unpack[Resampling],
) -> Hypothesis:
    """Test a hypothesis about misclassified patches against correct patches of the same class.

    Args:
        name: One of `ERROR_HYPOTHESES`.
        properties: From `measure_properties`, one row per patch.
        truth: 1 for positive patches, else 0, ``(n,)``.
        predicted_positive: Whether each patch is predicted positive, ``(n,)``.
        **resampling: As of `Resampler`, including ``unit``.
    """
    hypothesis = ERROR_HYPOTHESES[name]
    of_class = truth == int(hypothesis.positive)
    wrong, groups = predicted_positive[of_class] != hypothesis.positive, group_ids[of_class]
    if hypothesis.positive:
        chosen, others, among = "false negatives", "true positives", "positive patches"
    else:
        chosen, others, among = "false positives", "true negatives", "negative patches"
    measures = []
    for column in hypothesis.properties:
        values = hypothesis.direction * properties[column][of_class].to_numpy()
        result = contrast_groups(values, wrong, groups, names=(chosen, others), **resampling)
        means = {key: hypothesis.direction * vars(result)[key] for key in ("mean_chosen", "mean_others")}
        measures.append(
            PropertyContrast(
                **{**vars(result), **means},
                property=column,
                direction="more" if hypothesis.direction > 0 else "less",
                chosen=chosen,
                others=others,
            )
        )
    auroc, difference = measures[0].auroc, measures[0].difference_sd
    verdict = _VERDICTS[auroc.compare(0.5)]
    if np.isnan(auroc.value):
        answer = f"Not tested: {auroc.reason}."
    else:
        comparative = "less" if hypothesis.direction * difference.value < 0 else "more"
        size = "" if np.isnan(difference.value) else f", by {abs(difference.value):.2f} standard deviations"
        answer = (
            f"{_lead(verdict, group_ids, resampling['unit'], auroc.reason)} {chosen} are {comparative} "
            f"{hypothesis.adjective} than {others}{size}; AUROC {_estimate(auroc, '.3f')}."
        )
    return Hypothesis(
        name=name,
        claim=hypothesis.claim,
        source="the VGG16 post",
        among=among,
        verdict=verdict,
        answer=answer,
        note="The publication illustrates both hypotheses with the wrong kind of error; each is tested here "
        "on the kind of error to which it can apply.",
        measures=measures,
    )


def check_blue_yellow(
    truth: np.ndarray,
    prob: np.ndarray,
    without: Mapping[str, np.ndarray],
    shares: pd.DataFrame,
    group_ids: np.ndarray,
    **resampling: Unpack[Resampling],
) -> Hypothesis:
    """Test whether blue and yellow pixels get more saliency than their share of the area.

    Args:
        truth: 1 for positive patches, else 0, ``(n,)``.
        prob: Probability of the positive class for the original patches.
        without: The same for patches without colour, by name of the removal.
        shares: From `share_saliency`.
        **resampling: As of `Resampler`, including ``unit``.
    """
    saliency = {colour: _measure_share(shares, colour, group_ids, **resampling) for colour in COLOURS}
    auroc: dict[str, dict[str, Interval]] = {
        "as it is": {"auroc": _auroc(truth, prob, group_ids, **resampling)}
    }
    for name, other in without.items():
        differences = estimate_differences(truth, other, prob, group_ids, names=["auroc"], **resampling)
        auroc[name] = {
            "auroc": _auroc(truth, other, group_ids, **resampling),
            "difference": differences["auroc"],
        }
    verdicts = {colour: _VERDICTS[share.ratio.compare(1.0)] for colour, share in saliency.items()}
    verdict = min(verdicts.values(), key=list(_VERDICTS.values()).index)
    parts = [_describe_share(colour, result) for colour, result in saliency.items()]
    before = auroc["as it is"]["auroc"].value
    if not np.isnan(before) and "grey" in auroc:
        grey = auroc["grey"]
        parts.append(
            f"on patches converted to grey the AUROC is {grey['auroc'].value:.3f} instead of {before:.3f} "
            f"(difference {_estimate(grey['difference'], '+.3f')})"
        )
    colours = [colour for colour, result in verdicts.items() if result == verdict]
    suffix = "" if verdict == "inconclusive" else f" for {' and '.join(colours)}"
    lead = _lead(verdict, group_ids, resampling["unit"], saliency[colours[0]].ratio.reason, suffix)
    return Hypothesis(
        name="blue and yellow",
        claim="The network attends to blue and yellow pixels.",
        source="the saliency post",
        among="all patches",
        verdict=verdict,
        answer=f"{lead} {'; '.join(parts)}.",
        note="In H&E nuclei are blue, so a network that uses nuclei uses blue pixels. Patches without "
        "colour lie outside the training distribution, which explains a part of the loss.",
        auroc=auroc,
        saliency=saliency,
    )


def _measure_share(
    shares: pd.DataFrame, colour: str, group_ids: np.ndarray, **resampling: Unpack[Resampling]
) -> ColourShare:
    has_saliency = shares[f"{colour}_saliency"].notna().to_numpy()
    area, saliency = (shares[f"{colour}_{kind}"].to_numpy()[has_saliency] for kind in ("area", "saliency"))
    if not has_saliency.any() or area.mean() < MIN_AREA:
        ratio = Interval(float("nan"), reason=f"almost no pixel is {colour}")
    else:
        ratio = clustered_ratio(saliency, area, group_ids[has_saliency], **resampling)
    by_group = pd.DataFrame({"area": area, "saliency": saliency}).groupby(group_ids[has_saliency]).mean()
    return ColourShare(
        area_share=area.mean() if has_saliency.any() else None,
        saliency_share=saliency.mean() if has_saliency.any() else None,
        ratio=ratio,
        by_group=by_group.to_dict(orient="index") if resampling["unit"] != "patch" else {},
    )


def _auroc(
    truth: np.ndarray, prob: np.ndarray, group_ids: np.ndarray, **resampling: Unpack[Resampling]
) -> Interval:
    scores = sort_scores(truth, prob, group_ids=group_ids)
    return estimate_metrics(scores, ["auroc"], **resampling)["auroc"]


def _lead(verdict: str, group_ids: np.ndarray, unit: str, reason: str | None, suffix: str = "") -> str:
    if verdict != "inconclusive":
        return f"{_LEADS[verdict]}{suffix}:"
    return f"Inconclusive with {count(len(np.unique(group_ids)), unit)} ({reason}). Point estimate:"


def _describe_share(colour: str, share: ColourShare) -> str:
    if np.isnan(share.ratio.value):
        return str(share.ratio.reason)
    return (
        f"{colour} pixels make up {share.area_share:.1%} of the area and {share.saliency_share:.1%} of "
        f"the saliency (ratio {_estimate(share.ratio, '.2f')})"
    )


def _estimate(estimate: Interval, style: str) -> str:
    """Format a number, with its interval in brackets if there is one."""
    if estimate.low is None:
        return f"{estimate.value:{style}}"
    return f"{estimate.value:{style}} ({estimate.low:{style}} to {estimate.high:{style}})"
