"""Examples of what a run gets wrong and right, with maps of what it looks at: chosen, explained, written."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd

from biopsy.core.errors import RecipeError, RunError
from biopsy.core.files import refuse_inputs
from biopsy.figures.overlays import scale_maps
from biopsy.judging.examples import Explained, Illustration
from biopsy.judging.explanation import Explanation, explain_patches
from biopsy.judging.faithfulness import FOLDER, measure_faithfulness
from biopsy.judging.methods import find_last_maps, find_method, has_convolution
from biopsy.judging.picking import find_named, pick_examples, read_calls
from biopsy.judging.sheets import write_explained
from biopsy.judging.sources import Patches, gather_patches
from biopsy.learning.classifiers import Classifier
from biopsy.learning.engine import Engine
from biopsy.learning.inference import predict_logits
from biopsy.learning.opening import open_classifier
from biopsy.learning.runs import Run

N_EXAMPLES = 5
N_CHANNELS = 3  # of a layer that are shown


def explain(
    model: Run | Classifier | Path | str,
    *,
    data: Path | str | None = None,
    patch: Sequence[str] = (),
    errors: int = N_EXAMPLES,
    method: Sequence[str] | str = (),
    layer: str | None = None,
    faithfulness: bool = False,
    out: Path | str | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Show what a model looks at, on patches that are named or on some it got wrong and some it got right.

    Writes a sheet ``<method>.png``, a folder ``<method>/`` with a picture of each patch, and
    ``explain.json``. What other methods wrote there before stays.

    Args:
        model: A finished run, which is explained on its own pack; or a classifier, which needs ``data``.
        data: For a classifier: a pack, a folder or zip of images, or an image. Of images, which say not what
            they are, the first are shown.
        patch: Ids of patches. Those of a test side that has not been opened are refused.
        errors: Where none is named: how many errors, the surest first and of both kinds in turn, and how many
            patches that were called right, drawn with the run's seed. They are of the test side once it has
            been opened, until then of validation.
        method: One or more of ``biopsy.judging.methods.METHODS``; by default saliency, Grad-CAM (integrated
            gradients where the network allows none) and activations.
        layer: For methods that look at one; by default the first convolution, for Grad-CAM the last maps.
        faithfulness: Also test, about a minute long, whether the maps mean anything: each method that was
            named, or all, against random and edge-detector maps. Writes ``explain/faithfulness.json`` in the
            run.
        out: Where to write; by default ``explain/`` in the run, for a classifier in the current folder.
        device: Where the network is asked.

    Returns:
        What ``explain.json`` holds, and with ``faithfulness`` what that file holds under this name; see the
        file formats page.

    Raises:
        RunError: If a patch may not be looked at, there is nothing to show, or a classifier is to be tested.
        DataError: If a patch is unknown or an image cannot be read.
        RecipeError: If there is no such method or layer, or the network does not allow it.
    """
    methods, run = (method,) if isinstance(method, str) else tuple(method), _open_run(model)
    place = Path(out or (run.path / FOLDER if run is not None else FOLDER))
    refuse_inputs(place, data, model.path if isinstance(model, Run | Classifier) else model)
    options: dict[str, Any] = {"patch": patch, "errors": errors, "method": methods, "layer": layer}
    if run is not None:
        if data is not None:
            raise RunError(
                f"{run.path} is a run and is explained on its own pack: for data={str(data)!r} name its "
                f"classifier, {run.path / 'classifier'}"
            )
        explained, classifier = explain_examples(run, **options, device=device), run.classifier
    else:
        classifier = open_classifier(cast(Classifier | Path | str, model))
        if data is None or faithfulness:
            raise RunError(
                "a classifier has no patches of its own: name a pack or images with data=..."
                if data is None
                else "faithfulness is measured on the patches a run was judged on: name the run"
            )
        explained = explain_others(classifier, data, **options, device=device)
    document = write_explained(classifier, explained, place, named_layer=layer)
    if run is not None and faithfulness:
        document["faithfulness"] = measure_faithfulness(run, methods=methods, layer=layer, device=device)
    return document


def explain_examples(
    run: Run,
    *,
    patch: Sequence[str] = (),
    errors: int = N_EXAMPLES,
    method: Sequence[str] = (),
    layer: str | None = None,
    device: str = "auto",
) -> Explained:
    """Choose examples of a run and explain them without writing anything; see `explain`."""
    pack, classifier = run.open_pack(verify=False), run.classifier
    sides = run.sides(pack)
    _check_errors(errors)
    if patch:
        ids = find_named(run, pack, sides, patch)
    else:
        frame, _ = run.predictions(run.judged_side)
        ids = pick_examples(frame.assign(patch_id=frame["patch_id"].astype(str)), errors, run.info["seed"])
    rows = pack.rows_of(ids)
    chosen = Patches(ids, pack.patches[rows], pack.sizes[rows], pack.target[rows])
    return _explain_chosen(classifier, chosen, sides[rows], method, layer, Engine(device))


def explain_others(
    classifier: Classifier,
    data: Path | str,
    *,
    patch: Sequence[str] = (),
    errors: int = N_EXAMPLES,
    method: Sequence[str] = (),
    layer: str | None = None,
    device: str = "auto",
) -> Explained:
    """Choose examples of a pack or of images and explain them; see `explain`."""
    _check_errors(errors)
    found, engine = gather_patches(classifier, data, patch, 2 * errors), Engine(device)
    classifier = classifier.single_patch()
    if not patch and found.target is not None:
        network = engine.place(classifier.network)
        logits = predict_logits(
            network, classifier.info.preprocessing, found.pixels, found.sizes, engine=engine
        )
        calls = read_calls(classifier, found.target, classifier.probs(logits))
        names = classifier.info.class_names
        frame = pd.DataFrame(classifier.probs(logits), columns=[f"prob_{name}" for name in names]).assign(
            patch_id=found.patch_ids, target=found.target, pred=calls["called"].map(names.index)
        )
        picked = pd.Index(found.patch_ids).get_indexer(pick_examples(frame, errors, 0))
        found = Patches(
            [found.patch_ids[row] for row in picked],
            found.pixels[picked],
            found.sizes[picked],
            found.target[picked],
        )
    return _explain_chosen(classifier, found, np.full(len(found.patch_ids), ""), method, layer, engine)


def _explain_chosen(
    classifier: Classifier,
    chosen: Patches,
    sides: np.ndarray,
    method: Sequence[str],
    layer: str | None,
    engine: Engine,
) -> Explained:
    methods = list(dict.fromkeys(method)) or _pick_methods(classifier, layer)
    if layer is not None and not any(find_method(name).takes_layer for name in methods):
        raise RecipeError(f"layer={layer!r} cannot be chosen: {methods[0]} looks at the whole network")
    found = [
        explain_patches(
            classifier,
            chosen.pixels,
            chosen.sizes,
            name,
            layer=layer if find_method(name).takes_layer else None,
            engine=engine,
        )
        for name in methods
    ]
    examples = pd.DataFrame({"patch_id": chosen.patch_ids, "side": sides})
    examples = examples.join(read_calls(classifier, chosen.target, found[0].probs))
    patches = [
        pixels[:height, :width] for pixels, (width, height) in zip(chosen.pixels, chosen.sizes, strict=True)
    ]
    return Explained(examples, patches, [_illustrate(each, chosen.sizes, classifier) for each in found])


def _pick_methods(classifier: Classifier, layer: str | None) -> list[str]:
    """Give the methods that are shown where none is named."""
    if layer is not None:
        return ["activations"]
    try:
        find_last_maps(classifier.base_network, classifier.info.preprocessing.input_px)
    except RecipeError:
        where = "integrated_gradients"
    else:
        where = "grad_cam"
    return ["saliency", where, *(["activations"] if has_convolution(classifier.base_network) else [])]


def _check_errors(errors: int) -> None:
    if errors < 1:
        raise RunError(f"errors={errors!r} shows nothing: ask for 1 or more, or name patches")


def _illustrate(found: Explanation, sizes: np.ndarray, classifier: Classifier) -> Illustration:
    """Scale maps for the eye: a single map patch by patch, channels over all patches together."""
    method, n_maps = find_method(found.method), found.maps.shape[1]
    maps, titles = found.maps, [method.title]
    if n_maps > 1:
        channels = _pick_channels(maps)
        maps, titles = maps[:, channels], [f"activation {channel + 1}" for channel in channels]
    scaled = scale_maps(maps, axis=(2, 3) if n_maps == 1 else (0, 2, 3), signed=method.signed)
    caption = f"{method.title[0].upper()}{method.title[1:]}: {method.shows}. It is not {method.shows_not}."
    if method.takes_layer:
        caption += f" Layer {found.layer}" + (
            f", {len(titles)} of its {n_maps} channels: some that vary and differ." if n_maps > 1 else "."
        )
    if method.per_class and len(set(found.class_index)) == 1:
        caption += f" The class is {classifier.info.class_names[found.class_index[0]]}."
    cut = [each[:, :height, :width] for each, (width, height) in zip(scaled, sizes, strict=True)]
    return Illustration(found.method, found.layer, titles, cut, caption, method.signed)


def _pick_channels(maps: np.ndarray) -> np.ndarray:
    """Give the channel that varies most, then those that vary and are least like the ones before."""
    values = maps.transpose(1, 0, 2, 3).reshape(maps.shape[1], -1)
    spread = values.std(axis=1)
    centred = (values - values.mean(axis=1, keepdims=True)) / np.where(spread > 0, spread, 1)[:, None]
    alike = np.abs(centred @ centred.T) / values.shape[1]
    chosen = [int(spread.argmax())]
    while len(chosen) < min(N_CHANNELS, len(values)):
        worth = spread * (1 - alike[chosen].max(axis=0))
        worth[chosen] = -1
        chosen.append(int(worth.argmax()))
    return np.sort(chosen)


def _open_run(model: Run | Classifier | Path | str) -> Run | None:
    """Open a run, where it is one."""
    if isinstance(model, Classifier):
        return None
    is_run = isinstance(model, Run) or (Path(model) / "run.json").is_file()
    return Run.open(model) if is_run else None
