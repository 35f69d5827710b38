"""`explain`: selects patches, explains them and writes sheets of saliency maps."""

import contextlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd

from biopsy.core.errors import DataError, RecipeError, RunError
from biopsy.core.files import plain, refuse_inputs
from biopsy.core.results import Result, Table, number
from biopsy.core.seeds import make_rng
from biopsy.core.text import class_title, count
from biopsy.data.packs import Pack
from biopsy.data.predictions import decide
from biopsy.evaluation.explanation.examples import (
    Explained,
    ExplanationDocument,
    Illustration,
    keep_explained,
    write_explained,
)
from biopsy.evaluation.explanation.faithfulness import FOLDER, Faithfulness, measure_faithfulness
from biopsy.evaluation.predict import Image, PackSource, check_packs, decode_patch, open_sources, pad_patches
from biopsy.evaluation.saliency.maps import Explanation, explain_patches
from biopsy.evaluation.saliency.methods import find_method
from biopsy.evaluation.saliency.methods.layers import find_last_maps, has_convolution
from biopsy.models.classifier import Classifier
from biopsy.models.engine import Engine
from biopsy.models.inference import predict_classifier
from biopsy.plotting.patches import scale_maps
from biopsy.training.open_model import open_classifier, open_run
from biopsy.training.runs import Run

N_EXAMPLES = 5
N_CHANNELS = 3  # shown per layer
MAX_LABELLED = 2_000  # patches of a pack from which examples are selected


@dataclass(frozen=True, eq=False, repr=False)
class Explanations(Result):
    """Result of an explanation; ``explanations[key]`` is an entry of ``explain.json``.

    Attributes:
        document: The content of ``explain.json``.
        examples: One row per explained patch: class, predicted class, probability.
        path: Output folder.
        faithfulness: The faithfulness tests; None if they were not requested.
    """

    document: ExplanationDocument
    examples: pd.DataFrame
    path: Path
    faithfulness: Faithfulness | None = None

    def blocks(self) -> list[str | Table]:
        patches = {entry["patch_id"]: entry for entry in self.document["patches"]}.values()  # one per method
        rows = [
            [entry["kind"], entry["class"], entry["predicted"], number(entry["prob"]), entry["patch_id"]]
            for entry in patches
        ]
        table = Table(["kind", "class", "predicted", "prob", "patch_id"], rows)
        sheets = [str(self.path / sheet["picture"]) for sheet in self.document["sheets"]]
        tests = self.faithfulness
        if tests is None:
            return [table, *sheets]
        return [
            table,
            *sheets,
            f"\nfaithfulness, {count(tests.n_patches, 'patch')} of {count(tests.n_groups, tests.unit)}:",
            *(method.answer for method in tests.methods),
            *(f"{method['name']}: {method['reason']}" for method in tests.refused),
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
            activations (default: saliency, activations, and grad_cam or, if the network does not allow it,
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
    methods, run = (method,) if isinstance(method, str) else tuple(method), open_run(model)
    folder = Path(out or (run.path / FOLDER if run is not None else FOLDER))
    refuse_inputs(folder, data, model.path if isinstance(model, Run | Classifier) else model)
    layers = (layer,) if isinstance(layer, str) else tuple(dict.fromkeys(layer or ()))
    if random and patch:
        raise RunError("patch and random cannot be combined")
    if faithfulness and len(layers) > 1:
        raise RecipeError(
            f"faithfulness is tested on one layer at a time, not {', '.join(layers)}", "conflict"
        )
    if errors < 1:
        raise RunError(f"errors={errors!r}: expected at least 1, or patch ids")
    selection = Selection(patch=patch, errors=errors, random=random, seed=seed)
    if run is not None:
        if data is not None:
            raise RunError(
                f"{run.path} is a run and is explained on its own pack: for data={str(data)!r} give its "
                f"classifier, {run.path / 'classifier'}"
            )
        classifier, chosen = run.classifier, choose_from_run(run, selection)
    else:
        classifier = open_classifier(cast(Classifier | Path | str, model))
        if data is None or faithfulness:
            raise RunError(
                "a classifier has no patches of its own: give a pack or images with data="
                if data is None
                else "faithfulness tests need the evaluated patches of a run: give the run"
            )
        chosen = choose_from_data(classifier, Path(data), selection, Engine(device))
    explained = explain_chosen(classifier, chosen, methods, layers, device=device)
    document = write_explained(classifier, explained, folder, named_layers=layers)
    if run is not None and not patch and not random:
        with contextlib.suppress(OSError):  # read-only run
            keep_explained(run, explained)
    if run is None or not faithfulness:
        return Explanations(document, explained.examples, folder)
    layer = layers[0] if layers else None
    tests = measure_faithfulness(run, methods=methods, layer=layer, device=device)
    return Explanations({**document, "faithfulness": plain(tests)}, explained.examples, folder, tests)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which patches are explained; the arguments of `explain`."""

    patch: Sequence[str] = ()
    errors: int = N_EXAMPLES
    random: int = 0
    seed: int = 0

    def named(self, path: Path, patch_ids: Sequence[str]) -> list[str]:
        """Return the ids of the requested or randomly drawn patches; empty if examples are to be picked.

        Raises:
            DataError: If a requested patch does not exist.
        """
        if self.random:
            return draw_patches(patch_ids, self.random, self.seed)
        existing = set(patch_ids)
        for name in self.patch:
            if name not in existing:
                example = next(iter(patch_ids), "")
                raise DataError(f"{path} has no patch {name!r}; its ids are such as {example!r}")
        return list(dict.fromkeys(self.patch))


@dataclass(frozen=True)
class Patches:
    """Patches in memory.

    Attributes:
        patch_ids: Patch ids; for images, their path inside the folder or zip.
        pixels: uint8 ``(n, H, W, 3)``, padded at the right and bottom.
        sizes: True ``(width, height)``, ``(n, 2)``.
        target: Index of the true class, ``(n,)``; None if unknown.
        subsets: Subset of the run's split, ``(n,)``; None outside a run.
    """

    patch_ids: Sequence[str]
    pixels: np.ndarray
    sizes: np.ndarray
    target: np.ndarray | None = None
    subsets: np.ndarray | None = None

    @classmethod
    def of_pack(cls, pack: Pack, rows: np.ndarray) -> "Patches":
        ids = pack.table["patch_id"].iloc[rows].astype(str).tolist()
        return cls(ids, pack.patches[rows], pack.sizes[rows], pack.target[rows])

    def take(self, rows: np.ndarray) -> "Patches":
        target = None if self.target is None else self.target[rows]
        return Patches([self.patch_ids[row] for row in rows], self.pixels[rows], self.sizes[rows], target)


def choose_from_run(run: Run, selection: Selection) -> Patches:
    """Return the requested patches of a run's pack, or examples from the subset evaluated last.

    Raises:
        RunError: If a requested patch is in a test subset that has not been evaluated.
        DataError: If a requested patch does not exist.
    """
    pack = run.open_pack(verify=False)
    subsets = run.subsets(pack)
    if selection.patch:
        ids = selection.named(pack.path, pack.table["patch_id"].astype(str).tolist())
        unseen = [name for name in ids if subsets[pack.rows_of([name])[0]] == "test"]
        if unseen and run.evaluated_subset != "test":
            raise RunError(
                f"patch {unseen[0]!r} is in the test subset, which has not been evaluated: run "
                f"`biopsy evaluate {run.path}` first"
            )
    else:
        frame, _ = run.predictions(run.evaluated_subset)
        frame = frame.assign(patch_id=frame["patch_id"].astype(str))
        ids = selection.named(pack.path, frame["patch_id"].tolist())
        ids = ids or pick_examples(frame, selection.errors, run.info["seed"])
    rows = pack.rows_of(ids)
    return replace(Patches.of_pack(pack, rows), subsets=subsets[rows])


def choose_from_data(classifier: Classifier, path: Path, selection: Selection, engine: Engine) -> Patches:
    """Return the requested patches of a pack or of images, or examples.

    Examples are errors and correct patches picked from up to `MAX_LABELLED` patches of a pack; of a pack with
    other classes random patches, of images the first ones.

    Raises:
        DataError: If a requested patch does not exist, or an image cannot be read or is too large.
    """
    classifier = classifier.single_patch()
    [source] = open_sources([path], [])
    check_packs(classifier, [source])
    ids = selection.named(path, source.names)
    n_unlabelled = 2 * selection.errors
    if not isinstance(source, PackSource):
        images = {image.name: image for image in source.images}
        names = ids or source.names[:n_unlabelled]
        return _read_images([images[name] for name in names], classifier.info.patch_px)
    pack = source.pack
    has_labels = pack.class_names == classifier.info.class_names
    n = min(len(pack), MAX_LABELLED if has_labels else n_unlabelled)
    drawn = np.sort(make_rng(0, "examples of a pack").choice(len(pack), n, replace=False))
    patches = Patches.of_pack(pack, pack.rows_of(ids) if ids else drawn)
    if not has_labels:
        return replace(patches, target=None)
    if ids:
        return patches
    probs = classifier.probs(predict_classifier(classifier, patches.pixels, patches.sizes, engine=engine))
    frame = pd.DataFrame(probs, columns=[f"prob_{name}" for name in classifier.info.class_names])
    frame = frame.assign(patch_id=patches.patch_ids, target=patches.target, pred=_decide(classifier, probs))
    return patches.take(pd.Index(patches.patch_ids).get_indexer(pick_examples(frame, selection.errors, 0)))


def _read_images(images: Sequence[Image], patch_px: int) -> Patches:
    def read(image: Image) -> np.ndarray:
        try:
            return decode_patch(image.read(), patch_px)
        except DataError as error:
            raise DataError(f"{image.name} {error}") from None

    if not images:
        raise DataError("there is no image to explain: give a pack, images, or a folder or zip of images")
    with ThreadPoolExecutor() as pool:
        pixels, sizes = pad_patches(list(pool.map(read, images)), patch_px)
    return Patches([image.name for image in images], pixels, sizes)


def pick_examples(frame: pd.DataFrame, errors: int, seed: int) -> list[str]:
    """Return the most confident errors of each kind in turn, then random correct patches of each class."""
    probs = frame[[name for name in frame if name.startswith("prob_")]].to_numpy(float)
    prob_true = probs[np.arange(len(frame)), frame["target"]]
    ordered = frame.assign(prob_true=prob_true).sort_values(["prob_true", "patch_id"])
    shuffled = frame.sort_values("patch_id").sample(
        frac=1, random_state=make_rng(seed, "examples called right")
    )
    wrong = ordered[ordered["pred"] != ordered["target"]].groupby("target", sort=False)["patch_id"]
    right = shuffled[shuffled["pred"] == shuffled["target"]].groupby("target")["patch_id"]
    in_turn = (chain.from_iterable(zip_longest(*(ids for _, ids in kinds))) for kinds in (wrong, right))
    return [name for names in in_turn for name in list(filter(None, names))[:errors]]


def draw_patches(patch_ids: Iterable[str], n: int, seed: int) -> list[str]:
    """Return up to ``n`` random patches, independent of the order of ``patch_ids``."""
    ids = sorted(patch_ids)
    if n < 1 or not ids:
        raise RunError(f"random={n!r} of {len(ids):,} patches: expected at least 1 of 1 or more patches")
    return [str(name) for name in make_rng(seed, "random examples").permutation(ids)[:n]]


def _decide(classifier: Classifier, probs: np.ndarray) -> np.ndarray:
    threshold = 0.5 if classifier.threshold is None else classifier.threshold
    return decide(probs, classifier.positive_index, threshold)


def tabulate_predicted_classes(
    classifier: Classifier, target: np.ndarray | None, probs: np.ndarray
) -> pd.DataFrame:
    """Return true and predicted class, probability and kind of each patch, as in `Explained.examples`."""
    names, positive, pred = classifier.info.class_names, classifier.positive_index, _decide(classifier, probs)
    columns = {
        "predicted": [names[i] for i in pred],
        "prob": probs.max(axis=1) if positive is None else probs[:, positive],
    }
    if target is None:
        return pd.DataFrame({"class": "", **columns, "kind": "no label"})
    wrong = np.full(len(target), "misclassified", object)
    if positive is not None:
        wrong = np.where(target == positive, "false negative", "false positive")
    kinds = np.where(pred == target, "correct", wrong)
    return pd.DataFrame({"class": [names[i] for i in target], **columns, "kind": kinds})


def explain_chosen(
    classifier: Classifier,
    chosen: Patches,
    methods: Sequence[str] = (),
    layers: Sequence[str] = (),
    *,
    device: str = "auto",
) -> Explained:
    """Return the explanations of patches, without context, by each method and layer; see `explain`."""
    classifier, engine = classifier.single_patch(), Engine(device)
    methods = list(dict.fromkeys(methods)) or _pick_methods(classifier, layers)
    if layers and not any(find_method(name).takes_layer for name in methods):
        raise RecipeError(
            f"layer={layers[0]!r} cannot be chosen: {methods[0]} uses the whole network", "conflict"
        )
    result = [
        explain_patches(classifier, chosen.pixels, chosen.sizes, name, layer=layer, engine=engine)
        for name in methods
        for layer in _choose_layers(name, layers)
    ]
    subsets = "" if chosen.subsets is None else chosen.subsets
    examples = pd.DataFrame({"patch_id": chosen.patch_ids, "subset": subsets})
    examples = examples.join(tabulate_predicted_classes(classifier, chosen.target, result[0].probs))
    patches = [
        pixels[:height, :width] for pixels, (width, height) in zip(chosen.pixels, chosen.sizes, strict=True)
    ]
    return Explained(examples, patches, [_illustrate(item, chosen.sizes, classifier) for item in result])


def _choose_layers(method: str, layers: Sequence[str]) -> Sequence[str | None]:
    return layers if layers and find_method(method).takes_layer else (None,)


def _pick_methods(classifier: Classifier, layers: Sequence[str]) -> list[str]:
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
    caption = method.caption
    if method.takes_layer:
        caption += f" Layer {explanation.layer}" + (
            f", {len(titles)} of its {n_maps} channels: some that vary and differ." if n_maps > 1 else "."
        )
    if method.per_class and len(set(explanation.class_index)) == 1:
        caption += f" The class is {class_title(classifier.info.class_names[explanation.class_index[0]])}."
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
