"""Faithfulness tests: each method against random and edge-detector maps on a run's own patches."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Unpack

import cv2
import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata
from torch import nn

from biopsy.core.errors import RecipeError, RunError
from biopsy.core.files import write_json
from biopsy.core.seeds import derive, make_rng
from biopsy.core.text import capitalize, class_title, count
from biopsy.data.packs import Pack
from biopsy.evaluation.saliency.maps import explain_patches
from biopsy.evaluation.saliency.methods import METHODS, find_method
from biopsy.evaluation.stored_results import affordable_patches, read_result
from biopsy.models.classifier import Classifier
from biopsy.models.engine import Engine
from biopsy.models.inference import open_predictor, predict_classifier
from biopsy.statistics.intervals import IntervalMethod, describe_method
from biopsy.statistics.resampling import Interval, Resampling, clustered_mean
from biopsy.training.runs import Run

CELLS = 12  # per side: in an IDC patch of 200 um, a cell is 17 um, about a nucleus with its surroundings
STEPS = 12  # points of a curve in addition to the original patch
BLUR = 1 / 10  # standard deviation as a share of the patch's side

PredictClass = Callable[[np.ndarray], np.ndarray]


def blur_patches(patches: np.ndarray) -> np.ndarray:
    """Blur patches, uint8 ``(n, H, W, 3)``, until only low-frequency colour is left."""
    spread = BLUR * max(patches.shape[1:3])
    blurred = np.empty_like(patches)
    for patch, out in zip(patches, blurred, strict=True):
        cv2.GaussianBlur(patch, (0, 0), spread, dst=out, borderType=cv2.BORDER_REPLICATE)
    return blurred


def rank_cells(maps: np.ndarray) -> np.ndarray:
    """Return the rank of every pixel's cell, 0 for the most salient cell.

    Args:
        maps: ``(n, H, W)``; cells are ranked by their mean, ties from the upper left to the lower right.

    Returns:
        int ``(n, H, W)``, from 0 to ``CELLS ** 2 - 1``.
    """
    cell = _cell_of_pixels(maps.shape[1:])
    sizes = np.bincount(cell.ravel(), minlength=CELLS**2)
    ranks = np.empty(maps.shape, int)
    for values, out in zip(maps, ranks, strict=True):
        mean = np.bincount(cell.ravel(), values.ravel(), CELLS**2) / np.maximum(sizes, 1)
        rank = np.argsort(np.argsort(-mean, kind="stable"))
        out[...] = rank[cell]
    return ranks


def deletion_insertion_curves(
    predict: PredictClass, patches: np.ndarray, blurred: np.ndarray, ranks: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the probability of the class as cells are deleted, and as they are inserted.

    Args:
        predict: Returns the probability of the explained class for patches ``(n * m, H, W, 3)``, of which
            the first ``m`` are versions of the first patch and so on.
        patches: uint8 ``(n, H, W, 3)``.
        blurred: The blurred patches, which replace deleted cells.
        ranks: From `rank_cells`.

    Returns:
        Two arrays ``(n, STEPS + 1)``: at share 0, 1 / STEPS, ... 1 of the cells deleted; and inserted.
    """
    bounds = np.arange(STEPS + 1) / STEPS * CELLS**2
    replaced = ranks[:, None] < bounds[:, None, None]  # (n, STEPS + 1, H, W)
    original, baseline = patches[:, None], blurred[:, None]
    curves = []
    for start, end in ((original, baseline), (baseline, original)):
        versions = np.where(replaced[..., None], end, start)
        curves.append(predict(versions.reshape(-1, *patches.shape[1:])).reshape(len(patches), -1))
    return curves[0], curves[1]


def area_under(curves: np.ndarray) -> np.ndarray:
    """Return the area under curves ``(n, STEPS + 1)`` by the trapezoidal rule, ``(n,)``."""
    return (curves[:, 1:] + curves[:, :-1]).mean(axis=1) / 2


def _cell_of_pixels(shape: tuple[int, ...]) -> np.ndarray:
    """Return the cell that each pixel belongs to, ``(H, W)``."""
    rows, columns = (np.arange(side) * CELLS // side for side in shape)
    return rows[:, None] * CELLS + columns


MAX_STEPS = 6
_WINDOW_PX, _SPREAD_PX = 11, 1.5  # Wang et al. 2004, sec. III.B
_K1, _K2 = 0.01, 0.03


def randomise_cascading(network: nn.Module, *, seed: int) -> Iterator[tuple[str, nn.Module]]:
    """Yield a copy of a network with randomised weights, from the last layer to the first.

    Weight matrices and kernels are drawn from a normal distribution with their root mean square; vectors are
    shuffled. Layers, each with its own stream of random numbers, are grouped into at most `MAX_STEPS` steps.

    Yields:
        Name of the first randomised layer, and the network, the same object every time.
    """
    network = copy.deepcopy(network)
    layers = [
        (name, module)
        for name, module in network.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    ][::-1]
    for part in np.array_split(np.arange(len(layers)), min(MAX_STEPS, len(layers))):
        for index in part:
            name, module = layers[index]
            generator = torch.Generator().manual_seed(derive(seed, "random weights", name))
            for weight in module.parameters(recurse=False):
                _randomise(weight, generator)
        yield layers[part[-1]][0], network


def _randomise(weight: torch.Tensor, generator: torch.Generator) -> None:
    with torch.no_grad():
        if weight.dim() > 1:
            drawn = torch.randn(weight.shape, generator=generator) * weight.square().mean().sqrt().cpu()
        else:
            drawn = weight.cpu()[torch.randperm(len(weight), generator=generator)]
        weight.copy_(drawn)


def rank_correlation(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return Spearman's correlation of each pair of maps ``(n, H, W)``; 0 where one of them is constant."""
    a, b = (rankdata(maps.reshape(len(maps), -1), axis=1) for maps in (first, second))
    a, b = (ranks - ranks.mean(axis=1, keepdims=True) for ranks in (a, b))
    norm = np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
    return np.divide((a * b).sum(axis=1), norm, out=np.zeros(len(a)), where=norm > 0)


def structural_similarity(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the SSIM of each pair of maps ``(n, H, W)``, each divided by its highest absolute value.

    Wang et al. 2004, Image quality assessment, eq. 13, with Gaussian windows; 1 for identical maps.
    """
    return np.array([_similarity(_scale(a), _scale(b)) for a, b in zip(first, second, strict=True)])


def _scale(values: np.ndarray) -> np.ndarray:
    highest = np.abs(values).max()
    return values.astype(np.float64) / (highest if highest > 0 else 1)


def _similarity(a: np.ndarray, b: np.ndarray) -> float:
    def mean(values: np.ndarray) -> np.ndarray:
        return np.asarray(cv2.GaussianBlur(values, (_WINDOW_PX, _WINDOW_PX), _SPREAD_PX))

    mean_a, mean_b = mean(a), mean(b)
    spread_a, spread_b, common = (
        mean(a * a) - mean_a**2,
        mean(b * b) - mean_b**2,
        mean(a * b) - mean_a * mean_b,
    )
    c1, c2 = _K1**2, _K2**2
    numerator = (2 * mean_a * mean_b + c1) * (2 * common + c2)
    return float((numerator / ((mean_a**2 + mean_b**2 + c1) * (spread_a + spread_b + c2))).mean())


Traced = Mapping[str, tuple[np.ndarray, np.ndarray]]

BASELINES = {"random": "random maps", "edges": "edges"}
MIN_CORRELATION = (
    0.5  # rank correlation from which maps of random weights count as similar to the trained ones
)
_VERBS = {
    "higher": "is better than {}",
    "lower": "is worse than {}",
    "not different": "is not better than {}",
}


@dataclass(frozen=True, kw_only=True)
class AreaUnderCurve(Interval):
    """Area under a mean curve."""

    curve: list[float]


@dataclass(frozen=True, kw_only=True)
class CurveResult:
    """Mean deletion and insertion curves of a method or baseline."""

    name: str
    deletion: AreaUnderCurve
    insertion: AreaUnderCurve


@dataclass(frozen=True)
class RandomisedStep:
    """Mean similarity of absolute maps to those of a network with random layers from ``from_layer`` on."""

    from_layer: str
    rank_correlation: float
    ssim: float


@dataclass(frozen=True, kw_only=True)
class MethodResult(CurveResult):
    """Results of a method: gain over each baseline, number of patches where it is better, randomisation."""

    title: str
    gain: dict[str, Interval]
    n_better: dict[str, int]
    verdict: dict[str, str]
    randomised: list[RandomisedStep]
    answer: str = ""
    layer: str | None = None


@dataclass(frozen=True)
class Settings:
    """Settings of the tests."""

    cells: int
    steps: int
    blur: float
    n_random: int
    n_randomised: int


@dataclass(frozen=True, kw_only=True)
class Faithfulness:
    """Content of ``faithfulness.json``; see the file formats page."""

    format: str
    subset: str
    classifier_sha256: str
    seed: int
    positive_class: str | None
    unit: str
    n_patches: int
    n_groups: int
    interval: IntervalMethod
    settings: Settings
    prob: dict[str, float]
    methods: list[MethodResult]
    baselines: list[CurveResult]
    refused: list[dict[str, str]]


def describe_method_result(
    name: str,
    traced: Traced,
    randomised: Sequence[RandomisedStep],
    group_ids: np.ndarray,
    *,
    layer: str | None = None,
    **resampling: Unpack[Resampling],
) -> MethodResult:
    """Return the record of a method.

    Args:
        traced: Curves of deletion and insertion, by method and baseline.
        randomised: Steps of weight randomisation.
    """
    by_patch = {baseline: _score(traced[name]) - _score(traced[baseline]) for baseline in BASELINES}
    gains = {baseline: clustered_mean(gain, group_ids, **resampling) for baseline, gain in by_patch.items()}
    record = MethodResult(
        **vars(describe_curves(name, traced, group_ids, **resampling)),
        title=find_method(name).title,
        gain=gains,
        n_better={baseline: int((gain > 0).sum()) for baseline, gain in by_patch.items()},
        verdict={baseline: gain.compare(0.0) for baseline, gain in gains.items()},
        randomised=list(randomised),
        layer=layer,
    )
    return replace(record, answer=describe_gain(record, len(np.unique(group_ids)), resampling["unit"]))


def describe_curves(
    name: str, traced: Traced, group_ids: np.ndarray, **resampling: Unpack[Resampling]
) -> CurveResult:
    """Return the mean deletion and insertion curves, and the areas under them with intervals."""
    deletion, insertion = (
        AreaUnderCurve(
            **vars(clustered_mean(area_under(curve), group_ids, bounds=(0.0, 1.0), **resampling)),
            curve=curve.mean(axis=0).tolist(),
        )
        for curve in traced[name]
    )
    return CurveResult(name=name, deletion=deletion, insertion=insertion)


def describe_gain(record: MethodResult, n_groups: int, unit: str) -> str:
    """Return the results of a method in one sentence."""
    title, gains = record.title, record.gain
    if "inconclusive" in record.verdict.values():
        points = [
            f"{abs(gain.value):.2f} {'above' if gain.value >= 0 else 'below'} {BASELINES[baseline]}"
            for baseline, gain in gains.items()
        ]
        answer = (
            f"{title}: inconclusive with {count(n_groups, unit)} ({gains['random'].reason}); point estimate: "
            + " and ".join(points)
        )
    else:
        verdicts = [
            f"{_VERBS[record.verdict[baseline]].format(BASELINES[baseline])} {_format_gain(gain)}"
            for baseline, gain in gains.items()
        ]
        answer = f"{title} {' and '.join(verdicts)}"
    if record.randomised:
        correlation = record.randomised[-1].rank_correlation
        change = "hardly changes" if correlation >= MIN_CORRELATION else "changes"
        answer += f"; its map {change} when all weights are random (rank correlation {correlation:.2f})"
    return capitalize(f"{answer}.")


def _score(curves: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    deleted, inserted = curves
    return (area_under(inserted) - area_under(deleted)) / 2


def _format_gain(gain: Interval) -> str:
    assert gain.low is not None and gain.high is not None
    if gain.low > 0:
        return f"by {gain.value:.2f} ({gain.low:.2f} to {gain.high:.2f})"
    if gain.high < 0:
        return f"by {-gain.value:.2f} ({-gain.high:.2f} to {-gain.low:.2f})"
    return f"({gain.value:.2f}, {gain.low:.2f} to {gain.high:.2f})"


FORMAT = "biopsy-faithfulness/2"
FOLDER, DOCUMENT = "explain", "faithfulness.json"
MAX_PATCHES, MIN_PATCHES = 40, 16
MAX_MULTIPLICATIONS = 5e12  # in total: about a minute on two cores
PASSES = 1000  # forward passes per patch, all methods together
N_RANDOMISED = 6  # patches whose maps are computed again with random weights
N_RANDOM = 4  # random orders, averaged


def measure_faithfulness(
    run: Run | Path | str,
    *,
    methods: Sequence[str] = (),
    layer: str | None = None,
    n_patches: int | None = None,
    device: str = "auto",
) -> Faithfulness:
    """Test the faithfulness of saliency maps on the evaluated subset of a run.

    Writes ``explain/faithfulness.json``. Patches are drawn with the run's seed from those predicted positive
    (for more than two classes: from all), one patient after the other, and the predicted class is explained.
    The subset is the test subset if it has been evaluated, else validation.

    Args:
        run: A finished run with predictions of that subset.
        methods: Methods to test (default: all class-specific methods that the network supports).
        layer: Layer of Grad-CAM.
        n_patches: Number of patches (default: 16 to 40, fewer for expensive networks).

    Returns:
        The content of the file; see the file formats page.

    Raises:
        RunError: If no patch of that subset is predicted positive.
        RecipeError: If a method does not exist, is not class-specific, or the network does not support it.
    """
    run = Run.open(run)
    pack, classifier, engine = run.open_pack(verify=False), run.classifier.single_patch(), Engine(device)
    subset, seed = run.evaluated_subset, run.info["seed"]
    network = engine.place(classifier.network).eval()
    input_px = classifier.info.preprocessing.input_px
    affordable = affordable_patches(
        network, input_px, MAX_MULTIPLICATIONS / PASSES, (MIN_PATCHES, MAX_PATCHES)
    )
    rows = draw_patches(run, pack, n_patches or affordable, seed=seed)
    patches, groups = pack.patches[rows], pack.group_ids[rows]

    def predict(versions: np.ndarray) -> np.ndarray:
        probs = classifier.probs(predictor.logits(versions))
        return probs[np.arange(len(versions)), np.repeat(class_index, len(versions) // len(patches))]

    class_index = np.full(len(rows), classifier.positive_index or 0)
    if classifier.positive_index is None:
        class_index = predict_classifier(classifier, patches, engine=engine).argmax(axis=1)
    maps, layers, refused = explain_all(classifier, patches, class_index, methods, layer, engine)
    n_versions = 2 * (STEPS + 1) * len(patches) * (len(maps) + 1 + N_RANDOM)
    with open_predictor(classifier, engine, n_versions) as predictor:
        traced = all_deletion_insertion_curves(predict, patches, maps, seed=seed)
    randomised = compare_randomised(
        classifier, patches[:N_RANDOMISED], class_index[:N_RANDOMISED], maps, layers, engine, seed=seed
    )
    options: Resampling = {"seed": seed, "unit": pack.unit}
    untouched, blurred = (float(traced["edges"][0][:, step].mean()) for step in (0, -1))
    result = Faithfulness(
        format=FORMAT,
        subset=subset,
        classifier_sha256=classifier.sha256,
        seed=seed,
        positive_class=pack.info.positive_class,
        unit=pack.unit,
        n_patches=len(rows),
        n_groups=len(np.unique(groups)),
        interval=describe_method(len(np.unique(groups)), **options),
        settings=Settings(CELLS, STEPS, BLUR, N_RANDOM, min(N_RANDOMISED, len(rows))),
        prob={"untouched": untouched, "blurred": blurred},
        methods=[
            describe_method_result(name, traced, randomised[name], groups, layer=layers[name], **options)
            for name in maps
        ],
        baselines=[describe_curves(name, traced, groups, **options) for name in BASELINES],
        refused=refused,
    )
    write_json(run.path / FOLDER / DOCUMENT, result)
    return result


def read_faithfulness(run: Run) -> Faithfulness | None:
    """Return the stored results of this classifier on the evaluated subset; None if there are none."""
    key = {
        "format": FORMAT,
        "classifier_sha256": run.classifier.sha256,
        "subset": run.evaluated_subset,
    }
    return read_result(run.path / FOLDER / DOCUMENT, key, Faithfulness)


def draw_patches(run: Run, pack: Pack, n_patches: int, *, seed: int) -> np.ndarray:
    """Return rows of random full-size patches that are predicted positive, one patient after the other.

    Raises:
        RunError: If there are none.
    """
    frame, _ = run.predictions(run.evaluated_subset)
    rows = pack.rows_of(frame["patch_id"])
    full_size = (pack.sizes[rows] == pack.info.patch_px).all(axis=1)
    is_positive = (
        np.ones(len(rows), bool) if pack.positive_index is None else frame["pred"] == pack.positive_index
    )
    rows = rows[np.asarray(full_size & is_positive, bool)]
    if not len(rows):
        raise RunError(
            f"no full-size patch of the {run.evaluated_subset} subset is predicted "
            f"{class_title(pack.info.positive_class or '')}: faithfulness tests need at least one"
        )
    rows = make_rng(seed, "faithfulness").permutation(rows)
    turn = pd.Series(pack.group_ids[rows]).groupby(pack.group_ids[rows]).cumcount().to_numpy()
    return rows[np.argsort(turn, kind="stable")][:n_patches]


def explain_all(
    classifier: Classifier,
    patches: np.ndarray,
    class_index: np.ndarray,
    methods: Sequence[str],
    layer: str | None,
    engine: Engine,
) -> tuple[dict[str, np.ndarray], dict[str, str | None], list[dict[str, str]]]:
    """Return the maps ``(n, H, W)`` of each method, its layer, and the methods that cannot be tested.

    Raises:
        RecipeError: If a requested method cannot be tested.
    """
    maps: dict[str, np.ndarray] = {}
    layers: dict[str, str | None] = {}
    refused = []
    for name in methods or [item.name for item in METHODS.values() if item.per_class]:
        method = find_method(name)
        if not method.per_class:
            raise RecipeError(
                f"{name} is not class-specific: faithfulness tests need a map of one class", "conflict"
            )
        try:
            chosen = layer if method.takes_layer else None
            result = explain_patches(
                classifier, patches, None, name, class_index, chosen, channels="mean", engine=engine
            )
        except RecipeError as error:
            if methods or layer:
                raise
            refused.append({"name": name, "reason": str(error)})
        else:
            maps[name], layers[name] = result.maps[:, 0], result.layer
    return maps, layers, refused


def all_deletion_insertion_curves(
    predict: PredictClass, patches: np.ndarray, maps: Mapping[str, np.ndarray], *, seed: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return deletion and insertion curves, ``(n, STEPS + 1)`` each, of methods and baselines."""
    blurred = blur_patches(patches)
    traced = {
        name: deletion_insertion_curves(predict, patches, blurred, rank_cells(values))
        for name, values in {**maps, "edges": find_edges(patches)}.items()
    }
    rng = make_rng(seed, "random maps")
    random = [
        deletion_insertion_curves(predict, patches, blurred, rank_cells(_draw_maps(rng, patches.shape[:3])))
        for _ in range(N_RANDOM)
    ]
    deleted, inserted = zip(*random, strict=True)
    return traced | {"random": (np.mean(deleted, axis=0), np.mean(inserted, axis=0))}


def find_edges(patches: np.ndarray) -> np.ndarray:
    """Return the Sobel gradient magnitude of the grey image, ``(n, H, W)``, independent of any network."""
    grey = patches.mean(axis=3).astype(np.float32)
    return np.stack([np.hypot(cv2.Sobel(g, cv2.CV_32F, 1, 0), cv2.Sobel(g, cv2.CV_32F, 0, 1)) for g in grey])


def compare_randomised(
    classifier: Classifier,
    patches: np.ndarray,
    class_index: np.ndarray,
    maps: Mapping[str, np.ndarray],
    layers: Mapping[str, str | None],
    engine: Engine,
    *,
    seed: int,
) -> dict[str, list[RandomisedStep]]:
    """Compare the maps of each method with those of increasingly randomised networks.

    Returns:
        The steps of each method.
    """
    result: dict[str, list[RandomisedStep]] = {name: [] for name in maps}
    for from_layer, network in randomise_cascading(classifier.base_network, seed=seed):
        other = Classifier(classifier.info, network)
        for name in maps:
            trained = np.abs(maps[name][: len(patches)])
            explained = explain_patches(
                other, patches, None, name, class_index, layers[name], channels="mean", engine=engine
            )
            random = np.abs(explained.maps[:, 0])
            result[name].append(
                RandomisedStep(
                    from_layer,
                    float(rank_correlation(trained, random).mean()),
                    float(structural_similarity(trained, random).mean()),
                )
            )
    return result


def _draw_maps(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Return maps with random values per cell."""
    return rng.random((shape[0], CELLS**2))[:, _cell_of_pixels(shape[1:])]
