"""Examples of what a run gets wrong and right, with maps of what it looks at: chosen, explained, written."""

import re
from collections.abc import Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from biopsy.data.packs import Pack
from biopsy.errors import DataError, RunError
from biopsy.figures.overlays import scale_maps, superimpose
from biopsy.figures.sheets import lay_out_sheet
from biopsy.figures.style import png
from biopsy.files import read_json, replace_directory, write_atomic, write_json
from biopsy.judging.examples import Explained, Illustration, draw_sheet
from biopsy.judging.explanation import Explanation, explain_patches
from biopsy.judging.methods import find_method, has_convolution
from biopsy.learning.classifiers import Classifier
from biopsy.learning.engine import Engine
from biopsy.learning.runs import Run
from biopsy.seeds import make_rng

FORMAT = "biopsy-explain/1"
DOCUMENT = "explain.json"
N_EXAMPLES = 5
N_CHANNELS = 3  # of a layer that are shown
PICTURE_PX = 288  # a patch's own picture is enlarged to about this height


def explain(
    run: Run | Path | str,
    *,
    patch: Sequence[str] = (),
    errors: int = N_EXAMPLES,
    method: str | None = None,
    layer: str | None = None,
    out: Path | str | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Show what a run looks at, on patches that are named or on some it got wrong and some it got right.

    Writes a sheet ``<method>.png``, a folder ``<method>/`` with a picture of each patch, and
    ``explain.json``. What other methods wrote there before stays.

    Args:
        run: A finished run.
        patch: Ids of patches. Those of a test side that has not been opened are refused.
        errors: Where none is named: how many errors, the surest first and of both kinds in turn, and how many
            patches that were called right, drawn with the run's seed. They are of the test side once it has
            been opened, until then of validation.
        method: One of ``biopsy.judging.methods.METHODS``; by default saliency and activations.
        layer: For methods that look at one; by default the first convolution.
        out: Where to write; ``explain/`` in the run by default.
        device: Where the network is asked.

    Returns:
        What ``explain.json`` holds; see the file formats page.

    Raises:
        RunError: If a patch is unknown or may not be looked at, or there is nothing to show.
        RecipeError: If there is no such method or layer.
    """
    run = Run.open(run)
    explained = explain_examples(run, patch=patch, errors=errors, method=method, layer=layer, device=device)
    return write_explained(run, explained, out, named_layer=layer)


def explain_examples(
    run: Run,
    *,
    patch: Sequence[str] = (),
    errors: int = N_EXAMPLES,
    method: str | None = None,
    layer: str | None = None,
    device: str = "auto",
) -> Explained:
    """Choose examples and explain them without writing anything; see `explain`."""
    pack, classifier, engine = run.open_pack(verify=False), run.classifier, Engine(device)
    methods = [method] if method else ["activations"] if layer else ["saliency", "activations"]
    if method is None and layer is None and not has_convolution(classifier.network):
        methods.remove("activations")
    for name in methods:
        find_method(name)
    sides = run.sides(pack)
    ids = _find_named(run, pack, sides, patch) if patch else _pick_examples(run, errors)
    rows = pd.Index(pack.table["patch_id"].astype(str)).get_indexer(ids)
    sizes = pack.sizes[rows]
    found = [
        explain_patches(classifier, pack.patches[rows], sizes, name, layer=layer, engine=engine)
        for name in methods
    ]
    examples = pd.DataFrame({"patch_id": ids, "side": sides[rows]})
    examples = examples.join(_read_calls(classifier, pack.target[rows], found[0].probs))
    patches = [pack.patches[row, :height, :width] for row, (width, height) in zip(rows, sizes, strict=True)]
    return Explained(examples, patches, [_illustrate(each, sizes, classifier) for each in found])


def write_explained(
    run: Run, explained: Explained, out: Path | str | None = None, *, named_layer: str | None = None
) -> dict[str, Any]:
    """Write sheets, pictures and ``explain.json``; gives what the latter holds."""
    place = run.path / "explain" if out is None else Path(out)
    sha256, examples = run.classifier.sha256, explained.examples
    document = _read_before(place / DOCUMENT, sha256)
    for part in explained.illustrations:
        stem = _file_name(part.method if named_layer is None else f"{part.method}-{named_layer}")
        sheet = draw_sheet(explained, range(len(examples)), [part])
        write_atomic(place / f"{stem}.png", png(sheet))
        names = [
            f"{index:02d}-{_file_name(each)}.png" for index, each in enumerate(examples["patch_id"], start=1)
        ]
        with replace_directory(place / stem) as partial:
            for name, patch, maps in zip(names, explained.patches, part.maps, strict=True):
                (partial / name).write_bytes(png(_lay_out(patch, maps)))
        about = {"method": part.method, "layer": part.layer}
        for key in ("sheets", "patches"):
            document[key] = [
                entry
                for entry in document[key]
                if Path(entry["picture"]).parts[0].removesuffix(".png") != stem
            ]
        document["sheets"].append(
            {**about, "picture": f"{stem}.png", "maps": part.titles, "caption": part.caption}
        )
        document["patches"] += [
            {**example, **about, "picture": f"{stem}/{name}"}
            for example, name in zip(examples.to_dict(orient="records"), names, strict=True)
        ]
    write_json(place / DOCUMENT, document)
    return read_json(place / DOCUMENT, format=FORMAT)


def _find_named(run: Run, pack: Pack, sides: np.ndarray, patch: Sequence[str]) -> list[str]:
    """Check patches that were named: they exist, and are of no side that is still closed."""
    side_of = dict(zip(pack.table["patch_id"].astype(str), sides, strict=True))
    for name in patch:
        if name not in side_of:
            raise RunError(
                f"{pack.path.name} has no patch {name!r}; its ids are such as {next(iter(side_of))!r}"
            )
        if side_of[name] == "test" and run.judged_side != "test":
            raise RunError(
                f"patch {name!r} is of the test side, which has not been opened: "
                f"`biopsy evaluate {run.path}` opens it"
            )
    return list(dict.fromkeys(patch))


def _pick_examples(run: Run, errors: int) -> list[str]:
    """Give the surest errors, of both kinds in turn, then right ones of each class, drawn by the seed."""
    if errors < 1:
        raise RunError(f"errors={errors!r} shows nothing: ask for 1 or more, or name patches")
    frame, _ = run.predictions(run.judged_side)
    frame = frame.assign(patch_id=frame["patch_id"].astype(str))
    probs = frame[[name for name in frame if name.startswith("prob_")]].to_numpy(float)
    sure = frame.assign(sure=probs[np.arange(len(frame)), frame["target"]]).sort_values(["sure", "patch_id"])
    wrong = sure[sure["pred"] != sure["target"]]
    kinds = [part["patch_id"] for _, part in wrong.groupby("target", sort=False)]
    shuffled = frame.sort_values("patch_id").sample(
        frac=1, random_state=make_rng(run.info["seed"], "examples called right")
    )
    right = [
        part["patch_id"] for _, part in shuffled[shuffled["pred"] == shuffled["target"]].groupby("target")
    ]
    return _in_turn(kinds)[:errors] + _in_turn(right)[:errors]


def _in_turn(lists: Sequence[Sequence[str]]) -> list[str]:
    return [name for name in chain.from_iterable(zip_longest(*lists)) if name is not None]


def _read_calls(classifier: Classifier, target: np.ndarray, probs: np.ndarray) -> pd.DataFrame:
    names, positive, threshold = classifier.info.class_names, classifier.positive_index, classifier.threshold
    called, prob = probs.argmax(axis=1), probs.max(axis=1)
    if positive is not None:
        prob = probs[:, positive]
        called = np.where(prob >= (0.5 if threshold is None else threshold), positive, 1 - positive)
    kinds = np.where(called == target, "right", "wrong").astype(object)
    if positive is not None:
        kinds[(kinds == "wrong")] = np.where(target == positive, "missed", "false alarm")[kinds == "wrong"]
    return pd.DataFrame(
        {
            "class": [names[i] for i in target],
            "called": [names[i] for i in called],
            "prob": prob,
            "kind": kinds,
        }
    )


def _illustrate(found: Explanation, sizes: np.ndarray, classifier: Classifier) -> Illustration:
    """Scale maps for the eye: a single map patch by patch, channels over all patches together."""
    method, n_maps = find_method(found.method), found.maps.shape[1]
    maps, titles = found.maps, [found.method]
    if n_maps > 1:
        channels = _pick_channels(maps)
        maps, titles = maps[:, channels], [f"activation {channel + 1}" for channel in channels]
    scaled = scale_maps(maps, axis=(2, 3) if n_maps == 1 else (0, 2, 3))
    caption = f"{found.method.capitalize()}: {method.shows}. It is not {method.shows_not}."
    if method.takes_layer:
        caption += f" Layer {found.layer}" + (
            f", {len(titles)} of its {n_maps} channels: some that vary and differ." if n_maps > 1 else "."
        )
    if method.per_class and len(set(found.class_index)) == 1:
        caption += f" The class is {classifier.info.class_names[found.class_index[0]]}."
    cut = [each[:, :height, :width] for each, (width, height) in zip(scaled, sizes, strict=True)]
    return Illustration(found.method, found.layer, titles, cut, caption)


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


def _lay_out(patch: np.ndarray, maps: np.ndarray) -> np.ndarray:
    """Put a patch and its maps superimposed side by side, enlarged pixel by pixel."""
    times = max(1, PICTURE_PX // max(patch.shape[:2]))
    images = [patch, *(superimpose(patch, values) for values in maps)]
    large = [image.repeat(times, axis=0).repeat(times, axis=1) for image in images]
    return lay_out_sheet(large, columns=len(large), gap_px=8)


def _file_name(text: str) -> str:
    """Make a file name of an id or a layer, whatever stands in it."""
    return re.sub(r"[^\w.-]", "_", text)[:120]


def _read_before(path: Path, classifier_sha256: str) -> dict[str, Any]:
    """Read what was written before about the same classifier, or begin anew."""
    try:
        known = read_json(path, format=FORMAT)
        if known["classifier_sha256"] == classifier_sha256:
            return known
    except DataError:
        pass
    return {"format": FORMAT, "classifier_sha256": classifier_sha256, "sheets": [], "patches": []}
