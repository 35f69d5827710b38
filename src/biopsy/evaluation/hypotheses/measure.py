"""Tests of the published hypotheses about errors and saliency on the evaluated patches of a run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack

import cv2
import numpy as np
import pandas as pd
from torch import nn

from biopsy.core.errors import DataError, RunError
from biopsy.core.files import read_json, write_json
from biopsy.core.seeds import make_rng
from biopsy.core.text import count
from biopsy.evaluation.explanation.maps import explain_patches
from biopsy.evaluation.patch_properties import measure_properties
from biopsy.models.engine import Engine
from biopsy.models.inference import open_predictor
from biopsy.models.networks import describe
from biopsy.slide_io.stain import combine_stains, separate_stains
from biopsy.statistics.contrasts import contrast_groups
from biopsy.statistics.intervals import PatientSummary, describe_method, estimate_metrics
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


FORMAT = "biopsy-hypotheses/1"
PATH = Path("explain", "hypotheses.json")
MAX_MEASURED = 5_000  # patches whose stain and heterogeneity are measured
MAX_PREDICTED, MIN_PREDICTED = 1_000, 100  # patches that are predicted again
MAX_MULTIPLICATIONS = 5e11  # of one pass over these: some seconds on two cores
MIN_AREA = 1e-3  # a colour with a smaller share of the area is treated as absent

_WRONG_GALLERY = (
    "The publication illustrates both hypotheses with the wrong kind of error; each is tested here on the "
    "kind of error to which it can apply."
)
_LEADS = {
    "held": "Supported by these data",
    "opposite": "Not supported by these data, which show the opposite",
    "not seen": "Not supported by these data",
}


def measure_hypotheses(run: Run | Path | str, *, device: str = "auto") -> dict[str, Any]:
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
    subset, seed = run.evaluated_subset, run.info["seed"]
    frame, metadata = run.predictions(subset)
    if "prob" not in frame:
        raise RunError(f"{run.path} has more than two classes: the hypotheses are defined for two")
    requested = subset_key(run, FORMAT, subset, frame, metadata)
    path = run.path / PATH
    result = _read_cached(path, requested)
    if result is None:
        write_json(path, {**requested, **_measure(run, frame, seed, device)})
        result = read_json(path, format=FORMAT)
    return result


def subset_key(
    run: Run, format: str, subset: str, frame: pd.DataFrame, metadata: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the entries that identify the predictions from which a record was computed."""
    return {
        "format": format,
        "subset": subset,
        "n_patches": len(frame),
        "classifier_sha256": metadata["classifier_sha256"],
        "seed": run.info["seed"],
    }


def read_hypotheses(run: Run) -> dict[str, Any] | None:
    """Return the stored results for the evaluated subset; None if there are none."""
    subset = run.evaluated_subset
    return _read_cached(run.path / PATH, subset_key(run, FORMAT, subset, *run.predictions(subset)))


def _measure(run: Run, frame: pd.DataFrame, seed: int, device: str) -> dict[str, Any]:
    """Return the results, without the entries that identify the predictions."""
    pack, classifier, engine = run.open_pack(verify=False), run.classifier.single_patch(), Engine(device)
    rows = pack.rows_of(frame["patch_id"])
    truth, groups = (pack.target[rows] == pack.positive_index).astype(int), pack.group_ids[rows]
    frozen = run.info["threshold"]
    assert frozen is not None  # of two classes
    prob, threshold = frame["prob"].to_numpy(float), frozen["value"]
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
    return {
        "positive_class": pack.info.positive_class,
        "unit": pack.unit,
        "n_groups": len(np.unique(groups)),
        "n_measured": len(measured),
        "n_asked": len(predicted),
        "threshold": threshold,
        "interval": describe_method(len(np.unique(groups)), **options),
        "hypotheses": [
            check_less_stained(properties, *outcome, **options),
            check_heterogeneous(properties, *outcome, **options),
            check_blue_yellow(truth[predicted], intact, without, shares, groups[predicted], **options),
        ],
    }


@dataclass(frozen=True, kw_only=True)
class PropertyContrast:
    """A property compared in the direction of a hypothesis: differences above 0, AUROC above 0.5 support it.

    Attributes:
        direction: ``more`` or ``less``, the expectation for the chosen patches.
        by_group: Patient to ``n_chosen``, ``n_others`` and ``auroc``.
    """

    property: str
    direction: str
    chosen: str
    others: str
    n_chosen: int
    n_others: int
    mean_chosen: float
    mean_others: float
    difference_sd: Interval
    auroc: Interval
    within: PatientSummary | None
    by_group: dict[str, dict[str, float]]


@dataclass(frozen=True)
class ColourShare:
    """A colour's share of the area and of the saliency, their ratio, and both shares by patient."""

    area_share: float | None
    saliency_share: float | None
    ratio: Interval
    by_group: dict[str, dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Hypothesis:
    """A published hypothesis and its test.

    Attributes:
        verdict: ``held`` (supported), ``opposite``, ``not seen`` (not supported) or ``unsaid`` (no interval).
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


def check_less_stained(
    properties: pd.DataFrame,
    truth: np.ndarray,
    predicted_positive: np.ndarray,
    group_ids: np.ndarray,
    **resampling: Unpack[Resampling],
) -> Hypothesis:
    """Test whether false negatives are less stained than true positives.

    Args:
        properties: From `measure_properties`, one row per patch.
        truth: 1 for positive patches, else 0, ``(n,)``.
        called: Whether each patch is predicted positive, ``(n,)``.
        **resampling: As of `Resampler`, including ``unit``.
    """
    positive = truth == 1
    names = ("false negatives", "true positives")
    measures = [
        _contrast(
            name,
            -1,
            properties[name][positive],
            ~predicted_positive[positive],
            group_ids[positive],
            names,
            **resampling,
        )
        for name in ("stain", "haematoxylin", "eosin")
    ]
    words = ("false negatives are {} stained than true positives", "less", "more")
    verdict, answer = _decide_contrast(measures[0], words, group_ids, resampling["unit"])
    return Hypothesis(
        name="less stained",
        claim="Less stained patches are taken for negative.",
        source="the VGG16 post",
        among="positive patches",
        verdict=verdict,
        answer=answer,
        note=_WRONG_GALLERY,
        measures=measures,
    )


def check_heterogeneous(
    properties: pd.DataFrame,
    truth: np.ndarray,
    predicted_positive: np.ndarray,
    group_ids: np.ndarray,
    **resampling: Unpack[Resampling],
) -> Hypothesis:
    """Test whether false positives are more heterogeneous than true negatives; see `check_less_stained`."""
    negative = truth == 0
    names = ("false positives", "true negatives")
    measures = [
        _contrast(
            "heterogeneity",
            1,
            properties["heterogeneity"][negative],
            predicted_positive[negative],
            group_ids[negative],
            names,
            **resampling,
        )
    ]
    words = ("false positives are {} heterogeneous than true negatives", "more", "less")
    verdict, answer = _decide_contrast(measures[0], words, group_ids, resampling["unit"])
    return Hypothesis(
        name="heterogeneous",
        claim="Patches of high internal heterogeneity are taken for cancer.",
        source="the VGG16 post",
        among="negative patches",
        verdict=verdict,
        answer=answer,
        note=_WRONG_GALLERY,
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
        difference = estimate_differences(truth, other, prob, group_ids, names=["auroc"], **resampling)[
            "auroc"
        ]
        auroc[name] = {
            "auroc": _auroc(truth, other, group_ids, **resampling),
            "difference": difference,
        }
    verdicts = {colour: _decide(share.ratio, 1.0) for colour, share in saliency.items()}
    order = ("held", "opposite", "not seen", "unsaid")
    verdict = min(verdicts.values(), key=order.index)
    parts = [_describe_share(colour, result) for colour, result in saliency.items()]
    before = auroc["as it is"]["auroc"].value
    if not np.isnan(before) and "grey" in auroc:
        grey = auroc["grey"]
        parts.append(
            f"on patches converted to grey the AUROC is {grey['auroc'].value:.3f} instead of {before:.3f} "
            f"(difference {_estimate(grey['difference'], '+.3f')})"
        )
    colours = [colour for colour, result in verdicts.items() if result == verdict]
    suffix = "" if verdict == "unsaid" else f" for {' and '.join(colours)}"
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


def affordable_patches(network: nn.Module, input_px: int) -> int:
    """Return the number of patches that the network can predict within some seconds."""
    multiplications = sum(
        row.parameters * np.prod(row.output_shape[1:], dtype=float) for row in describe(network, input_px)
    )
    return int(np.clip(MAX_MULTIPLICATIONS / max(multiplications, 1), MIN_PREDICTED, MAX_PREDICTED))


def draw_rows(n: int, most: int, seed: int) -> np.ndarray:
    """Return at most ``most`` of ``n`` rows, drawn without replacement, in order."""
    if n <= most:
        return np.arange(n)
    return np.sort(make_rng(seed, "hypotheses", most).choice(n, most, replace=False))


def _read_cached(path: Path, requested: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the stored results if they belong to the requested predictions, else None."""
    try:
        cached = read_json(path, format=FORMAT)
    except DataError:
        return None
    return cached if all(cached.get(key) == value for key, value in requested.items()) else None


def _contrast(
    name: str,
    direction: int,
    values: pd.Series,
    chosen: np.ndarray,
    group_ids: np.ndarray,
    names: tuple[str, str],
    **resampling: Unpack[Resampling],
) -> PropertyContrast:
    """Compare a property in the direction of the hypothesis: -1 if the chosen patches should have less."""
    result = contrast_groups(direction * values.to_numpy(), chosen, group_ids, names=names, **resampling)
    return PropertyContrast(
        property=name,
        direction="more" if direction > 0 else "less",
        chosen=names[0],
        others=names[1],
        n_chosen=result.n_chosen,
        n_others=result.n_others,
        mean_chosen=direction * result.mean_chosen,
        mean_others=direction * result.mean_others,
        difference_sd=result.difference_sd,
        auroc=result.auroc,
        within=result.within,
        by_group=result.by_group.to_dict(orient="index"),
    )


def _decide_contrast(
    measure: PropertyContrast, words: tuple[str, str, str], group_ids: np.ndarray, unit: str
) -> tuple[str, str]:
    """Return verdict and answer: whether the interval of the AUROC lies above 0.5."""
    auroc, difference = measure.auroc, measure.difference_sd
    verdict = _decide(auroc, 0.5)
    if np.isnan(auroc.value):
        return verdict, f"Not tested: {auroc.reason}."
    sentence, more, less = words
    statement = sentence.format(less if difference.value < 0 else more)
    size = "" if np.isnan(difference.value) else f", by {abs(difference.value):.2f} standard deviations"
    lead = _lead(verdict, group_ids, unit, auroc.reason)
    return verdict, f"{lead} {statement}{size}; AUROC {_estimate(auroc, '.3f')}."


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


def _decide(estimate: Interval, neutral: float) -> str:
    if estimate.low is None or estimate.high is None:
        return "unsaid"
    if estimate.low > neutral:
        return "held"
    return "opposite" if estimate.high < neutral else "not seen"


def _lead(verdict: str, group_ids: np.ndarray, unit: str, reason: str | None, suffix: str = "") -> str:
    if verdict != "unsaid":
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
