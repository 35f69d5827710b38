"""The published hypotheses about errors and saliency, measured on the patches a run was evaluated on."""

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

BLUE_YELLOW = 10.0  # of CIELAB's b*: blue from -10 down, yellow from 10 up; between them grey, pink and red
COLOURS = ("blue", "yellow")


def to_grey(patches: np.ndarray) -> np.ndarray:
    """Put luma (Rec. 601) in all three channels of patches ``(n, H, W, 3)``."""
    grey = cv2.cvtColor(patches.reshape(-1, 1, 3), cv2.COLOR_RGB2GRAY).reshape(patches.shape[:3])
    return np.repeat(grey[..., None], 3, axis=3)


def keep_stain(patches: np.ndarray, stain: int) -> np.ndarray:
    """Render patches as if one stain (0 haematoxylin, 1 eosin) had been all there was."""
    amounts = separate_stains(patches)
    kept = np.zeros_like(amounts)
    kept[..., stain] = amounts[..., stain]
    return combine_stains(kept)


REMOVALS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "grey": to_grey,
    "haematoxylin only": lambda patches: keep_stain(patches, 0),
    "eosin only": lambda patches: keep_stain(patches, 1),
}
"""Ways to take colour out of uint8 RGB patches; each gives uint8 RGB again."""


def share_saliency(patches: np.ndarray, maps: np.ndarray, sizes: np.ndarray | None = None) -> pd.DataFrame:
    """Return the share of blue and of yellow pixels in each patch's area and in its saliency.

    Blue and yellow are those of CIELAB's b* axis beyond `BLUE_YELLOW`; what is purple counts as blue.

    Args:
        patches: uint8 ``(n, H, W, 3)`` RGB.
        maps: Saliency, not below 0, ``(n, H, W)``.
        sizes: True ``(width, height)`` of each patch; padding is not counted.

    Returns:
        One row a patch: ``<colour>_area`` and ``<colour>_saliency`` for each of `COLOURS`, 0-1; NaN in the
        latter where a map is 0 everywhere.
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
        held = np.where(chosen, weight, 0.0).sum(axis=(1, 2))
        shares[f"{colour}_saliency"] = np.divide(
            held, total, out=np.full(len(total), np.nan), where=total > 0
        )
    return pd.DataFrame(shares)


FORMAT = "biopsy-hypotheses/1"
PATH = Path("explain", "hypotheses.json")
MOST_MEASURED = 5_000  # patches whose stain and spread are measured
MOST_ASKED, FEWEST_ASKED = 1_000, 100  # patches that the network is asked about again
MOST_MULTIPLICATIONS = 5e11  # of one pass over these: some seconds on two cores
LEAST_AREA = 1e-3  # a colour with a smaller share of the area is as good as not there

_WRONG_GALLERY = (
    "The publication shows the two hypotheses beside the wrong kind of error; each is tested here on the "
    "kind that it can be true of."
)
FOUND = ("false negatives", "true positives")
_LEADS = {
    "held": "Supported by these data",
    "opposite": "Not supported by these data, which show the opposite",
    "not seen": "Not supported by these data",
}


def measure_hypotheses(run: Run | Path | str, *, device: str = "auto") -> dict[str, Any]:
    """Measure the posts' hypotheses on the evaluated subset of a run, and keep them in the run.

    Writes ``explain/hypotheses.json``; where that is there already, for the same classifier and subset, it is
    read. Of a large subset a sample is measured, drawn with the run's seed. The subset is the test subset
    once it has been opened, else validation: nothing is opened by this.

    Args:
        run: A finished run that tells two classes apart.

    Returns:
        What the file holds; see the file formats page.

    Raises:
        RunError: If the run has more than two classes, or no subset of it has been predicted.
    """
    run = Run.open(run)
    subset, seed = run.evaluated_subset, run.info["seed"]
    frame, about = run.predictions(subset)
    if "prob" not in frame:
        raise RunError(f"{run.path} tells more than two classes apart: the hypotheses are about two")
    requested = key_of_subset(run, FORMAT, subset, frame, about)
    path = run.path / PATH
    known = _read_known(path, requested)
    if known is None:
        write_json(path, {**requested, **_measure(run, frame, seed, device)})
        known = read_json(path, format=FORMAT)
    return known


def key_of_subset(
    run: Run, format: str, subset: str, frame: pd.DataFrame, about: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what a record measured on a subset must say to be of these predictions."""
    return {
        "format": format,
        "subset": subset,
        "n_patches": len(frame),
        "classifier_sha256": about["classifier_sha256"],
        "seed": run.info["seed"],
    }


def read_hypotheses(run: Run) -> dict[str, Any] | None:
    """Return what was measured on the subset evaluated last; None where nothing was."""
    subset = run.evaluated_subset
    return _read_known(run.path / PATH, key_of_subset(run, FORMAT, subset, *run.predictions(subset)))


def _measure(run: Run, frame: pd.DataFrame, seed: int, device: str) -> dict[str, Any]:
    """Return the document less what was asked."""
    pack, classifier, engine = run.open_pack(verify=False), run.classifier.single_patch(), Engine(device)
    rows = pack.rows_of(frame["patch_id"])
    truth, groups = (pack.target[rows] == pack.positive_index).astype(int), pack.group_ids[rows]
    prob, threshold = frame["prob"].to_numpy(float), run.info["threshold"]["value"]
    options: Resampling = {"seed": seed, "unit": pack.unit}

    measured = draw_rows(len(rows), MOST_MEASURED, seed)
    properties = measure_properties(pack.patches, pack.sizes, index=rows[measured])
    calls = (truth[measured], prob[measured] >= threshold, groups[measured])

    n_asked = count_asked(classifier.network, classifier.info.preprocessing.input_px)
    again = draw_rows(len(rows), n_asked, seed)
    patches, sizes = pack.patches[rows[again]], pack.sizes[rows[again]]

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
        "n_asked": len(again),
        "threshold": threshold,
        "interval": describe_method(len(np.unique(groups)), **options),
        "hypotheses": [
            judge_less_stained(properties, *calls, **options),
            judge_heterogeneous(properties, *calls, **options),
            judge_blue_yellow(truth[again], intact, without, shares, groups[again], **options),
        ],
    }


@dataclass(frozen=True, kw_only=True)
class PropertyContrast:
    """A property compared in the direction of a hypothesis: above 0 and 0.5 support it.

    Attributes:
        direction: ``more`` or ``less``: what the chosen patches are to have of it.
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
    """A published hypothesis and what the data say.

    Attributes:
        verdict: ``held``, ``opposite``, ``not seen`` or ``unsaid`` (without an interval).
        answer: The same in a sentence.
        measures: The properties that were compared.
        auroc: With colour and with each of `REMOVALS`: ``auroc``, and ``difference`` from the former.
        saliency: By colour.
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


def judge_less_stained(
    properties: pd.DataFrame,
    truth: np.ndarray,
    called: np.ndarray,
    group_ids: np.ndarray,
    **resampling: Unpack[Resampling],
) -> Hypothesis:
    """Ask whether missed positives hold less stain than found ones.

    Args:
        properties: As `measure_properties` gives them, one row a patch.
        truth: 1 where a patch is positive, ``(n,)``.
        called: Whether it was called positive.
        **resampling: As of `Resampler`, ``unit`` among them.
    """
    of = truth == 1
    measures = [
        _contrast(name, -1, properties[name][of], ~called[of], group_ids[of], FOUND, **resampling)
        for name in ("stain", "haematoxylin", "eosin")
    ]
    words = ("false negatives are {} stained than true positives", "less", "more")
    verdict, answer = _judge_contrast(measures[0], words, group_ids, resampling["unit"])
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


def judge_heterogeneous(
    properties: pd.DataFrame,
    truth: np.ndarray,
    called: np.ndarray,
    group_ids: np.ndarray,
    **resampling: Unpack[Resampling],
) -> Hypothesis:
    """Ask whether false alarms vary more within themselves than true negatives; see `judge_less_stained`."""
    of = truth == 0
    names = ("false positives", "true negatives")
    measures = [
        _contrast(
            "heterogeneity",
            1,
            properties["heterogeneity"][of],
            called[of],
            group_ids[of],
            names,
            **resampling,
        )
    ]
    words = ("false positives are {} heterogeneous than true negatives", "more", "less")
    verdict, answer = _judge_contrast(measures[0], words, group_ids, resampling["unit"])
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


def judge_blue_yellow(
    truth: np.ndarray,
    prob: np.ndarray,
    without: Mapping[str, np.ndarray],
    shares: pd.DataFrame,
    group_ids: np.ndarray,
    **resampling: Unpack[Resampling],
) -> Hypothesis:
    """Ask whether blue and yellow pixels get more saliency than their share, and what colour is worth.

    Args:
        truth: 1 where a patch is positive, ``(n,)``.
        prob: Probability of the positive class, of the patches as they are.
        without: The same of the patches with colour taken out, by name.
        shares: As `share_saliency` gives them.
        **resampling: As of `Resampler`, ``unit`` among them.
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
    verdicts = {colour: _judge(share.ratio, 1.0) for colour, share in saliency.items()}
    order = ("held", "opposite", "not seen", "unsaid")
    verdict = min(verdicts.values(), key=order.index)
    parts = [_say_share(colour, result) for colour, result in saliency.items()]
    before = auroc["as it is"]["auroc"].value
    if not np.isnan(before) and "grey" in auroc:
        grey = auroc["grey"]
        parts.append(
            f"on patches converted to grey the AUROC is {grey['auroc'].value:.3f} instead of {before:.3f} "
            f"(difference {_estimate(grey['difference'], '+.3f')})"
        )
    which = [colour for colour, result in verdicts.items() if result == verdict]
    of = "" if verdict == "unsaid" else f" for {' and '.join(which)}"
    lead = _lead(verdict, group_ids, resampling["unit"], saliency[which[0]].ratio.reason, of)
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


def count_asked(network: nn.Module, input_px: int) -> int:
    """Return how many patches the network can predict in some seconds: fewer, the more it computes."""
    multiplications = sum(
        row.parameters * np.prod(row.output_shape[1:], dtype=float) for row in describe(network, input_px)
    )
    return int(np.clip(MOST_MULTIPLICATIONS / max(multiplications, 1), FEWEST_ASKED, MOST_ASKED))


def draw_rows(n: int, most: int, seed: int) -> np.ndarray:
    """Draw rows of a judged subset without replacement, in order; all where there are not too many."""
    return (
        np.arange(n)
        if n <= most
        else np.sort(make_rng(seed, "hypotheses", most).choice(n, most, replace=False))
    )


def _read_known(path: Path, asked: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read what was measured before, if it answers the same question."""
    try:
        known = read_json(path, format=FORMAT)
    except DataError:
        return None
    return known if all(known.get(key) == value for key, value in asked.items()) else None


def _contrast(
    name: str,
    direction: int,
    values: pd.Series,
    chosen: np.ndarray,
    group_ids: np.ndarray,
    names: tuple[str, str],
    **resampling: Unpack[Resampling],
) -> PropertyContrast:
    """Compare a property in the direction of the conjecture: -1 where the chosen are to have less of it."""
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


def _judge_contrast(
    measure: PropertyContrast, words: tuple[str, str, str], group_ids: np.ndarray, unit: str
) -> tuple[str, str]:
    """Return verdict and answer: does the AUROC's interval lie above .5?"""
    auroc, difference = measure.auroc, measure.difference_sd
    verdict = _judge(auroc, 0.5)
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
    known = shares[f"{colour}_saliency"].notna().to_numpy()
    area, saliency = (shares[f"{colour}_{what}"].to_numpy()[known] for what in ("area", "saliency"))
    if not known.any() or area.mean() < LEAST_AREA:
        ratio = Interval(float("nan"), reason=f"hardly any pixel is {colour}")
    else:
        ratio = clustered_ratio(saliency, area, group_ids[known], **resampling)
    item = pd.DataFrame({"area": area, "saliency": saliency}).groupby(group_ids[known]).mean()
    return ColourShare(
        area_share=area.mean() if known.any() else None,
        saliency_share=saliency.mean() if known.any() else None,
        ratio=ratio,
        by_group=item.to_dict(orient="index") if resampling["unit"] != "patch" else {},
    )


def _auroc(
    truth: np.ndarray, prob: np.ndarray, group_ids: np.ndarray, **resampling: Unpack[Resampling]
) -> Interval:
    scores = sort_scores(truth, prob, group_ids=group_ids)
    return estimate_metrics(scores, ["auroc"], **resampling)["auroc"]


def _judge(estimate: Interval, neutral: float) -> str:
    if estimate.low is None or estimate.high is None:
        return "unsaid"
    if estimate.low > neutral:
        return "held"
    return "opposite" if estimate.high < neutral else "not seen"


def _lead(verdict: str, group_ids: np.ndarray, unit: str, reason: str | None, of: str = "") -> str:
    if verdict != "unsaid":
        return f"{_LEADS[verdict]}{of}:"
    return f"Inconclusive with {count(len(np.unique(group_ids)), unit)} ({reason}). Point estimate:"


def _say_share(colour: str, share: ColourShare) -> str:
    if np.isnan(share.ratio.value):
        return str(share.ratio.reason)
    return (
        f"{colour} pixels make up {share.area_share:.1%} of the area and {share.saliency_share:.1%} of "
        f"the saliency (ratio {_estimate(share.ratio, '.2f')})"
    )


def _estimate(estimate: Interval, style: str) -> str:
    """Write a number, with its interval in brackets where it has one."""
    if estimate.low is None:
        return f"{estimate.value:{style}}"
    return f"{estimate.value:{style}} ({estimate.low:{style}} to {estimate.high:{style}})"
