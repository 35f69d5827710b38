"""`explain`: selects patches, explains them and writes sheets of saliency maps."""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd

from biopsy.core.errors import DataError, RecipeError, RunError
from biopsy.core.files import refuse_inputs
from biopsy.core.results import Result, Table, number
from biopsy.core.seeds import make_rng
from biopsy.core.text import capitalize, count
from biopsy.data.archives import open_archive
from biopsy.data.packs import Pack, is_pack, pad
from biopsy.evaluation.explanation.examples import (
    Explained,
    Illustration,
    keep_explained,
    write_explained,
)
from biopsy.evaluation.explanation.faithfulness import FOLDER, measure_faithfulness
from biopsy.evaluation.explanation.maps import Explanation, explain_patches
from biopsy.evaluation.explanation.methods import find_method
from biopsy.evaluation.explanation.methods.layers import find_last_maps, has_convolution
from biopsy.models.classifier import Classifier
from biopsy.models.engine import Engine
from biopsy.models.inference import predict_classifier
from biopsy.plotting.patches import scale_maps
from biopsy.slide_io.images import IMAGE_SUFFIXES, decode, read_header
from biopsy.training.open_model import open_classifier
from biopsy.training.runs import Run


def check_requested(run: Run, pack: Pack, subsets: np.ndarray, patch: Sequence[str]) -> list[str]:
    """Check that the requested patches exist and are not in a test subset that has not been evaluated."""
    subset_of = dict(zip(pack.table["patch_id"].astype(str), subsets, strict=True))
    for name in patch:
        if name not in subset_of:
            raise RunError(
                f"{pack.path.name} has no patch {name!r}; its ids are such as {next(iter(subset_of))!r}"
            )
        if subset_of[name] == "test" and run.evaluated_subset != "test":
            raise RunError(
                f"patch {name!r} is in the test subset, which has not been evaluated: run `biopsy evaluate "
                f"{run.path}` first"
            )
    return list(dict.fromkeys(patch))


def pick_examples(frame: pd.DataFrame, errors: int, seed: int) -> list[str]:
    """Return the most confident errors of each kind in turn, then random correct patches of each class."""
    probs = frame[[name for name in frame if name.startswith("prob_")]].to_numpy(float)
    sure = frame.assign(sure=probs[np.arange(len(frame)), frame["target"]]).sort_values(["sure", "patch_id"])
    wrong = sure[sure["pred"] != sure["target"]]
    kinds = [part["patch_id"] for _, part in wrong.groupby("target", sort=False)]
    shuffled = frame.sort_values("patch_id").sample(
        frac=1, random_state=make_rng(seed, "examples called right")
    )
    right = [
        part["patch_id"] for _, part in shuffled[shuffled["pred"] == shuffled["target"]].groupby("target")
    ]
    return _interleave(kinds)[:errors] + _interleave(right)[:errors]


def draw_patches(patch_ids: Iterable[str], n: int, seed: int) -> list[str]:
    """Return up to ``n`` random patches, independent of the order of ``patch_ids``."""
    ids = sorted(patch_ids)
    if n < 1 or not ids:
        raise RunError(f"random={n!r} of {len(ids):,} patches: expected at least 1 of 1 or more patches")
    return [str(name) for name in make_rng(seed, "random examples").permutation(ids)[:n]]


def _interleave(lists: Sequence[Sequence[str]]) -> list[str]:
    return [name for name in chain.from_iterable(zip_longest(*lists)) if name is not None]


def tabulate_predicted_classes(
    classifier: Classifier, target: np.ndarray | None, probs: np.ndarray
) -> pd.DataFrame:
    names, positive, threshold = classifier.info.class_names, classifier.positive_index, classifier.threshold
    pred, prob = probs.argmax(axis=1), probs.max(axis=1)
    if positive is not None:
        prob = probs[:, positive]
        pred = np.where(prob >= (0.5 if threshold is None else threshold), positive, 1 - positive)
    columns = {"called": [names[i] for i in pred], "prob": prob}
    if target is None:
        return pd.DataFrame({"class": "", **columns, "kind": "unlabelled"})
    kinds = np.where(pred == target, "right", "wrong").astype(object)
    if positive is not None:
        kinds[(kinds == "wrong")] = np.where(target == positive, "missed", "false alarm")[kinds == "wrong"]
    return pd.DataFrame({"class": [names[i] for i in target], **columns, "kind": kinds})


MAX_LABELLED = 2_000  # patches of a pack from which examples are selected


@dataclass(frozen=True)
class Patches:
    """Patches in memory.

    Attributes:
        patch_ids: Patch ids; for images, their path inside the folder or zip.
        pixels: uint8 ``(n, H, W, 3)``, padded at the right and bottom.
        sizes: True ``(width, height)``, ``(n, 2)``.
        target: Index of the true class, ``(n,)``; None if unknown.
    """

    patch_ids: list[str]
    pixels: np.ndarray
    sizes: np.ndarray
    target: np.ndarray | None


def gather_patches(
    classifier: Classifier, data: Path | str, requested: Sequence[str], n_unlabelled: int
) -> Patches:
    """Read the requested patches, or those from which examples are selected.

    Args:
        classifier: The classifier, for patch size and resolution.
        data: A pack, a folder or zip of images, or an image.
        named: Ids of the requested patches; if empty, patches are selected.
        n_unlabelled: Number of images to read, in order, if none is requested: they have no labels.

    Raises:
        DataError: If a requested patch does not exist, or an image cannot be read or is too large.
    """
    path = Path(data)
    if is_pack(path):
        return _read_pack(classifier, Pack.open(path), requested)
    readers = _list_images(path)
    names = _check_named(path, requested, list(readers)) or list(readers)[:n_unlabelled]
    if not names:
        raise DataError(f"{path} contains no image to explain")
    load = partial(_load, patch_px=classifier.info.patch_px)
    with ThreadPoolExecutor() as pool:
        images = list(pool.map(lambda name: load(name, readers[name]), names))
    sizes = np.array([(image.shape[1], image.shape[0]) for image in images])
    pixels = np.stack([pad(image, classifier.info.patch_px) for image in images])
    return Patches(names, pixels, sizes, None)


def _read_pack(classifier: Classifier, pack: Pack, requested: Sequence[str]) -> Patches:
    classifier.check_pack(pack)
    ids = pack.table["patch_id"].astype(str).tolist()
    row_of = {name: row for row, name in enumerate(ids)}
    rows = np.array([row_of[name] for name in _check_named(pack.path, requested, ids)], dtype=int)
    if not requested:
        n = min(len(pack), MAX_LABELLED)
        rows = np.sort(make_rng(0, "examples of a pack").choice(len(pack), n, replace=False))
    has_labels = pack.class_names == classifier.info.class_names
    target = pack.target[rows] if has_labels else None
    return Patches([ids[row] for row in rows], pack.patches[rows], pack.sizes[rows], target)


def _list_ids(path: Path) -> list[str]:
    return Pack.open(path).table["patch_id"].astype(str).tolist() if is_pack(path) else [*_list_images(path)]


def _check_named(path: Path, requested: Sequence[str], patch_ids: Sequence[str]) -> list[str]:
    for name in requested:
        if name not in patch_ids:
            raise DataError(
                f"{path} has no patch {name!r}; its ids are such as {next(iter(patch_ids), '')!r}"
            )
    return list(dict.fromkeys(requested))


def _list_images(path: Path) -> dict[str, Callable[[], bytes | memoryview]]:
    if path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES:
        return {path.name: path.read_bytes}
    if not path.exists():
        raise DataError(f"{path} does not exist: give a pack, a folder or zip of images, or an image")
    archive = open_archive(path)
    entries = [entry for entry in archive.entries if entry.name.lower().endswith(IMAGE_SUFFIXES)]
    return {entry.name: partial(archive.read, entry) for entry in entries}


def _load(name: str, read: Callable[[], bytes | memoryview], *, patch_px: int) -> np.ndarray:
    try:
        data = read()
        header = read_header(data)
        if max(header.width, header.height) <= patch_px:
            return decode(data)
    except DataError as error:
        raise DataError(f"{name} {error}") from None
    raise DataError(
        f"{name} is {header.width}x{header.height} px, the classifier takes patches of "
        f"{patch_px}x{patch_px}: cut it into patches of that size"
    )


N_EXAMPLES = 5
N_CHANNELS = 3  # shown per layer


@dataclass(frozen=True, eq=False, repr=False)
class Explanations(Result):
    """Result of an explanation; ``explanations[key]`` is an entry of ``explain.json``.

    Attributes:
        document: The content of ``explain.json``.
        examples: One row per explained patch: class, predicted class, probability.
        path: Output folder.
    """

    examples: pd.DataFrame
    path: Path

    def blocks(self) -> list[str | Table]:
        columns = ("kind", "class", "called", "prob", "patch_id")
        patches = {str(entry["patch_id"]): entry for entry in self["patches"]}.values()  # one per method
        table = Table(columns, [[number(entry[key]) for key in columns] for entry in patches])
        sheets = [str(self.path / sheet["picture"]) for sheet in self["sheets"]]
        if "faithfulness" not in self:
            return [table, *sheets]
        tests = self["faithfulness"]
        groups = count(tests["n_groups"], tests["unit"])
        return [
            table,
            *sheets,
            f"\nfaithfulness, {count(tests['n_patches'], 'patch')} of {groups}:",
            *(method["answer"] for method in tests["methods"]),
            *(f"{method['name']}: {method['reason']}" for method in tests["refused"]),
        ]

    def to_frame(self) -> pd.DataFrame:
        """Return one row per explained patch."""
        return self.examples


def explain(
    model: Run | Classifier | Path | str,
    *,
    data: Path | str | None = None,
    patch: Sequence[str] = (),
    errors: int = N_EXAMPLES,
    random: int = 0,
    seed: int = 0,
    method: Sequence[str] | str = (),
    layer: Sequence[str] | str | None = None,
    faithfulness: bool = False,
    out: Path | str | None = None,
    device: str = "auto",
) -> Explanations:
    """Draw saliency maps of patches: sheets, one picture per patch, and ``explain.json``.

    Writes a sheet ``<method>.png`` and a folder ``<method>/`` for each method; sheets of other methods are
    kept. Without named patches, the most confident errors of both kinds and as many correct patches are drawn
    with the run's seed: of the test subset once it has been evaluated, until then of validation.

    Args:
        model: Finished run, explained on its own pack; or a classifier, which needs ``data``.
        data: For a classifier: a pack, a folder or zip of images, or an image.
        patch: Id of a patch; may be repeated. Test patches are refused until the test subset has been
            evaluated.
        errors: Number of misclassified patches without named ones, plus as many correct ones.
        random: Number of patches drawn at random instead, of that subset or of ``data``.
        seed: Random seed of that draw.
        method: Explanation methods: saliency, smoothgrad, grad_cam, integrated_gradients, occlusion or
            activations (default: saliency, activations, and grad_cam or, where the network allows none,
            integrated_gradients).
        layer: Layers of activations (default: the first convolution) or grad_cam (default: the last
            feature maps).
        faithfulness: Also run faithfulness tests (deletion/insertion, weight randomisation; about one
            minute); written to ``explain/faithfulness.json`` in the run.
        out: Output folder (default: ``explain/`` in the run; for a classifier, in the current folder).
        device: Device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Returns:
        The content of ``explain.json`` and, with ``faithfulness``, of that file under this name; see the file
        formats page.

    Raises:
        RunError: If a test patch has not been evaluated, no patch is selected, or ``faithfulness`` is given
            for a classifier.
        DataError: If a patch is unknown or an image cannot be read.
        RecipeError: If the method or layer does not exist, or the network does not support it.
    """
    methods, run = (method,) if isinstance(method, str) else tuple(method), _open_run(model)
    folder = Path(out or (run.path / FOLDER if run is not None else FOLDER))
    refuse_inputs(folder, data, model.path if isinstance(model, Run | Classifier) else model)
    layers = (layer,) if isinstance(layer, str) else tuple(dict.fromkeys(layer or ()))
    if random and patch:
        raise RunError("patch and random cannot be combined")
    if faithfulness and len(layers) > 1:
        raise RecipeError(f"faithfulness is tested on one layer at a time, not {', '.join(layers)}")
    if errors < 1:
        raise RunError(f"errors={errors!r}: expected at least 1, or patch ids")
    selection = Selection(patch=patch, errors=errors, random=random, seed=seed)
    if run is not None:
        if data is not None:
            raise RunError(
                f"{run.path} is a run and is explained on its own pack: for data={str(data)!r} give its "
                f"classifier, {run.path / 'classifier'}"
            )
        explained = explain_examples(run, selection, methods, layers, device=device)
        classifier = run.classifier
    else:
        classifier = open_classifier(cast(Classifier | Path | str, model))
        if data is None or faithfulness:
            raise RunError(
                "a classifier has no patches of its own: give a pack or images with data=..."
                if data is None
                else "faithfulness tests need the evaluated patches of a run: give the run"
            )
        explained = explain_others(classifier, data, selection, methods, layers, device=device)
    document = write_explained(classifier, explained, folder, named_layers=layers)
    if run is not None and not patch and not random:
        with contextlib.suppress(OSError):  # read-only run
            keep_explained(run, explained)
    if run is not None and faithfulness:
        document["faithfulness"] = measure_faithfulness(
            run, methods=methods, layer=layers[0] if layers else None, device=device
        )
    return Explanations(document, explained.examples, folder)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which patches are explained; the arguments of `explain`."""

    patch: Sequence[str] = ()
    errors: int = N_EXAMPLES
    random: int = 0
    seed: int = 0


def explain_examples(
    run: Run,
    selection: Selection,
    methods: Sequence[str] = (),
    layers: Sequence[str] = (),
    *,
    device: str = "auto",
) -> Explained:
    """Select examples of a run and return their explanations; see `explain`."""
    pack, classifier = run.open_pack(verify=False), run.classifier
    subsets = run.subsets(pack)
    if selection.patch:
        ids = check_requested(run, pack, subsets, selection.patch)
    else:
        frame, _ = run.predictions(run.evaluated_subset)
        frame = frame.assign(patch_id=frame["patch_id"].astype(str))
        ids = (
            draw_patches(frame["patch_id"], selection.random, selection.seed)
            if selection.random
            else pick_examples(frame, selection.errors, run.info["seed"])
        )
    rows = pack.rows_of(ids)
    chosen = Patches(ids, pack.patches[rows], pack.sizes[rows], pack.target[rows])
    return _explain_chosen(classifier, chosen, subsets[rows], methods, layers, Engine(device))


def explain_others(
    classifier: Classifier,
    data: Path | str,
    selection: Selection,
    methods: Sequence[str] = (),
    layers: Sequence[str] = (),
    *,
    device: str = "auto",
) -> Explained:
    """Select examples of a pack or of images and return their explanations; see `explain`."""
    patch, errors = selection.patch, selection.errors
    if selection.random:
        patch = draw_patches(_list_ids(Path(data)), selection.random, selection.seed)
    result, engine = gather_patches(classifier, data, patch, 2 * errors), Engine(device)
    classifier = classifier.single_patch()
    if not patch and result.target is not None:
        logits = predict_classifier(classifier, result.pixels, result.sizes, engine=engine)
        calls = tabulate_predicted_classes(classifier, result.target, classifier.probs(logits))
        names = classifier.info.class_names
        frame = pd.DataFrame(classifier.probs(logits), columns=[f"prob_{name}" for name in names]).assign(
            patch_id=result.patch_ids, target=result.target, pred=calls["called"].map(names.index)
        )
        picked = pd.Index(result.patch_ids).get_indexer(pick_examples(frame, errors, 0))
        result = Patches(
            [result.patch_ids[row] for row in picked],
            result.pixels[picked],
            result.sizes[picked],
            result.target[picked],
        )
    return _explain_chosen(classifier, result, np.full(len(result.patch_ids), ""), methods, layers, engine)


def _explain_chosen(
    classifier: Classifier,
    chosen: Patches,
    subsets: np.ndarray,
    methods: Sequence[str],
    layers: Sequence[str],
    engine: Engine,
) -> Explained:
    methods = list(dict.fromkeys(methods)) or _pick_methods(classifier, layers)
    if layers and not any(find_method(name).takes_layer for name in methods):
        raise RecipeError(f"layer={layers[0]!r} cannot be chosen: {methods[0]} uses the whole network")
    result = [
        explain_patches(classifier, chosen.pixels, chosen.sizes, name, layer=layer, engine=engine)
        for name in methods
        for layer in _choose_layers(name, layers)
    ]
    examples = pd.DataFrame({"patch_id": chosen.patch_ids, "subset": subsets})
    examples = examples.join(tabulate_predicted_classes(classifier, chosen.target, result[0].probs))
    patches = [
        pixels[:height, :width] for pixels, (width, height) in zip(chosen.pixels, chosen.sizes, strict=True)
    ]
    return Explained(examples, patches, [_illustrate(item, chosen.sizes, classifier) for item in result])


def _choose_layers(method: str, layers: Sequence[str]) -> Sequence[str | None]:
    return layers if layers and find_method(method).takes_layer else (None,)


def _pick_methods(classifier: Classifier, layers: Sequence[str]) -> list[str]:
    """Return the default methods."""
    if layers:
        return ["activations"]
    try:
        find_last_maps(classifier.base_network, classifier.info.preprocessing.input_px)
    except RecipeError:
        localisation = "integrated_gradients"
    else:
        localisation = "grad_cam"
    return ["saliency", localisation, *(["activations"] if has_convolution(classifier.base_network) else [])]


def _illustrate(explanation: Explanation, sizes: np.ndarray, classifier: Classifier) -> Illustration:
    """Scale maps for display: single maps per patch, channels over all patches together."""
    method, n_maps = find_method(explanation.method), explanation.maps.shape[1]
    maps, titles = explanation.maps, [method.title]
    if n_maps > 1:
        channels = _pick_channels(maps)
        maps, titles = maps[:, channels], [f"activation {channel + 1}" for channel in channels]
    scaled = scale_maps(maps, axis=(2, 3) if n_maps == 1 else (0, 2, 3), signed=method.signed)
    caption = f"{capitalize(method.title)}: {method.shows}. {method.caveat}."
    if method.takes_layer:
        caption += f" Layer {explanation.layer}" + (
            f", {len(titles)} of its {n_maps} channels: some that vary and differ." if n_maps > 1 else "."
        )
    if method.per_class and len(set(explanation.class_index)) == 1:
        caption += f" The class is {classifier.info.class_names[explanation.class_index[0]]}."
    cropped = [item[:, :height, :width] for item, (width, height) in zip(scaled, sizes, strict=True)]
    return Illustration(explanation.method, explanation.layer, titles, cropped, caption, method.signed)


def _pick_channels(maps: np.ndarray) -> np.ndarray:
    """Return channels with high variance and low correlation with those already chosen."""
    values = maps.transpose(1, 0, 2, 3).reshape(maps.shape[1], -1)
    spread = values.std(axis=1)
    centred = (values - values.mean(axis=1, keepdims=True)) / np.where(spread > 0, spread, 1)[:, None]
    correlation = np.abs(centred @ centred.T) / values.shape[1]
    chosen = [int(spread.argmax())]
    while len(chosen) < min(N_CHANNELS, len(values)):
        score = spread * (1 - correlation[chosen].max(axis=0))
        score[chosen] = -1
        chosen.append(int(score.argmax()))
    return np.sort(chosen)


def _open_run(model: Run | Classifier | Path | str) -> Run | None:
    """Return the run, or None if the model is a classifier."""
    if isinstance(model, Classifier):
        return None
    is_run = isinstance(model, Run) or (Path(model) / "run.json").is_file()
    return Run.open(model) if is_run else None
