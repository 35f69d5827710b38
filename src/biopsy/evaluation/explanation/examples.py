"""Explained patches as records, as sheets and as files."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NotRequired

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from typing_extensions import TypedDict

from biopsy.core.arrays import read_arrays, write_arrays
from biopsy.core.errors import DataError
from biopsy.core.files import update_directory, write_json
from biopsy.core.loaders import validate
from biopsy.core.text import capitalize, class_title, file_name
from biopsy.evaluation.stored_results import read_result
from biopsy.models.classifier import Classifier
from biopsy.plotting.patches import Overlay, draw_overlays, enlarge, is_constant, lay_out_sheet, superimpose
from biopsy.plotting.style import png, shorten
from biopsy.reporting.pseudonyms import Pseudonymizer
from biopsy.training.runs import Run


@dataclass(frozen=True)
class Illustration:
    """The maps of one method, ready to be drawn.

    Attributes:
        layer: The layer used, or None.
        titles: Title of each map of a patch.
        maps: For each example values ``(n_maps, height, width)`` in 0-1, or in -1 to 1 if ``signed``.
        caption: What a map shows and what it does not.
        signed: Whether negative values oppose the class.
    """

    method: str
    layer: str | None
    titles: list[str]
    maps: list[np.ndarray]
    caption: str
    signed: bool = False


@dataclass(frozen=True)
class Explained:
    """Examples with their illustrations.

    Attributes:
        examples: One row per example: ``patch_id``, ``subset`` (empty outside a run), ``class`` (empty if
            unknown), ``predicted`` (class), ``prob`` (of the positive class; for more than two classes, of
            the predicted one) and ``kind``: false negative, false positive, misclassified, correct, no label.
        patches: uint8 ``(height, width, 3)`` without padding.
        illustrations: One per method.
    """

    examples: pd.DataFrame
    patches: list[np.ndarray]
    illustrations: list[Illustration]


LABEL_CHARACTERS = 74  # that fit above a row of maps


def count_constant(explained: Explained) -> dict[str, tuple[int, int]]:
    """Return the number of constant maps and of all maps, by title, where any is constant."""
    counts = {
        title: (sum(is_constant(maps[index]) for maps in part.maps), len(part.maps))
        for part in explained.illustrations
        for index, title in enumerate(part.titles)
    }
    return {title: (n, total) for title, (n, total) in counts.items() if n}


def draw_sheet(explained: Explained, chosen: Sequence[int], parts: Sequence[Illustration]) -> Figure:
    """Draw examples, by index, with the maps of one or more methods."""
    rows = []
    for index in chosen:
        example = explained.examples.iloc[index]
        true = f", annotated {class_title(example['class'])}" if example["class"] else ""
        label = f"{capitalize(example['kind'])}{true}, p {example['prob']:.2f}, patch "
        label += shorten(example["patch_id"], min(32, max(10, LABEL_CHARACTERS - len(label))))
        maps = np.concatenate([part.maps[index] for part in parts])
        rows.append(Overlay(label, explained.patches[index], maps))
    titles = [title for part in parts for title in part.titles]
    return draw_overlays(rows, titles, [part.signed for part in parts for _ in part.titles])


STORED, STORED_FORMAT = "examples.safetensors", "biopsy-explained/1"


class _StoredIllustration(TypedDict):
    method: str
    layer: str | None
    titles: list[str]
    caption: str
    signed: bool


class _Stored(TypedDict):
    classifier_sha256: str
    examples: dict[str, list[object]]
    illustrations: list[_StoredIllustration]


def keep_explained(run: Run, explained: Explained) -> None:
    """Write the examples to the run, for the report."""
    parts, side = explained.illustrations, run.open_pack(verify=False).info.patch_px
    maps = {}
    for index, part in enumerate(parts):
        maps[f"maps-{index}"] = np.zeros((len(part.maps), len(part.titles), side, side), np.float16)
        for row, values in enumerate(part.maps):
            maps[f"maps-{index}"][row, :, : values.shape[1], : values.shape[2]] = values
    metadata = {
        "format": STORED_FORMAT,
        "classifier_sha256": run.classifier.sha256,
        "examples": explained.examples.to_dict(orient="list"),
        "illustrations": [
            {key: getattr(part, key) for key in ("method", "layer", "titles", "caption", "signed")}
            for part in parts
        ],
    }
    write_arrays(run.path / FOLDER / STORED, maps, metadata)


def load_explained(run: Run) -> Explained | None:
    """Return the stored examples of the subset evaluated last; None if there are none."""
    path = run.path / FOLDER / STORED
    try:
        arrays, metadata = read_arrays(path, format=STORED_FORMAT)
        stored = validate(path, _Stored, metadata)
    except DataError:
        return None
    examples = pd.DataFrame(stored["examples"])
    if stored["classifier_sha256"] != run.classifier.sha256 or set(examples["subset"]) != {
        run.evaluated_subset
    }:
        return None
    pack = run.open_pack(verify=False)
    patches = [pack.pixels(row) for row in pack.rows_of(examples["patch_id"])]
    parts = [
        Illustration(
            maps=[
                maps[:, : patch.shape[0], : patch.shape[1]].astype(float)
                for maps, patch in zip(arrays[f"maps-{index}"], patches, strict=True)
            ],
            **part,
        )
        for index, part in enumerate(stored["illustrations"])
    ]
    return Explained(examples, patches, parts)


def hide_explained(explained: Explained, pseudonymizer: Pseudonymizer) -> Explained:
    """Replace the patch ids."""
    names = [pseudonymizer.of("patch", name) for name in explained.examples["patch_id"]]
    return replace(explained, examples=explained.examples.assign(patch_id=names))


FORMAT = "biopsy-explain/2"
FOLDER = "explain"
DOCUMENT = "explain.json"


class ExplanationSheet(TypedDict):
    """The picture of all examples with the maps of a method, and the titles of its maps."""

    method: str
    layer: str | None
    picture: str
    maps: list[str]
    caption: str


Example = TypedDict(
    "Example",
    {"patch_id": str, "subset": str, "class": str, "predicted": str, "prob": float, "kind": str},
)
"""A row of `Explained.examples`."""


class ExplainedPatch(Example):
    """An example, and its picture by a method."""

    method: str
    layer: str | None
    picture: str


class ExplanationKey(TypedDict):
    """The explained classifier."""

    format: str
    classifier_sha256: str


class ExplanationDocument(ExplanationKey):
    """Content of ``explain.json``; see the file formats page."""

    sheets: list[ExplanationSheet]
    patches: list[ExplainedPatch]
    faithfulness: NotRequired[dict[str, object]]


def write_explained(
    classifier: Classifier, explained: Explained, folder: Path, *, named_layers: Sequence[str] = ()
) -> ExplanationDocument:
    """Write sheets, pictures and ``explain.json`` into a folder; return the content of the latter."""
    examples: list[Example] = explained.examples.to_dict(orient="records")
    stems = {
        file_name(f"{part.method}-{part.layer}" if part.layer in named_layers else part.method): part
        for part in explained.illustrations
    }
    names = [f"{index:02d}-{file_name(item['patch_id'])}.png" for index, item in enumerate(examples, start=1)]
    outputs = [name for stem in stems for name in (f"{stem}.png", f"{stem}/*")]

    def is_kept(picture: str) -> bool:
        return Path(picture).parts[0].removesuffix(".png") not in stems

    with update_directory(folder, DOCUMENT, *outputs, last=DOCUMENT) as partial:
        key: ExplanationKey = {"format": FORMAT, "classifier_sha256": classifier.sha256}
        document = read_result(folder / DOCUMENT, key, ExplanationDocument)
        document = document or {**key, "sheets": [], "patches": []}
        document["sheets"] = [sheet for sheet in document["sheets"] if is_kept(sheet["picture"])]
        document["patches"] = [patch for patch in document["patches"] if is_kept(patch["picture"])]
        for stem, part in stems.items():
            sheet = draw_sheet(explained, range(len(examples)), [part])
            (partial / f"{stem}.png").write_bytes(png(sheet))
            (partial / stem).mkdir()
            for name, patch, maps in zip(names, explained.patches, part.maps, strict=True):
                (partial / stem / name).write_bytes(png(_lay_out(patch, maps, signed=part.signed)))
            document["sheets"].append(
                {
                    "method": part.method,
                    "layer": part.layer,
                    "picture": f"{stem}.png",
                    "maps": part.titles,
                    "caption": part.caption,
                }
            )
            document["patches"] += [
                {**example, "method": part.method, "layer": part.layer, "picture": f"{stem}/{name}"}
                for example, name in zip(examples, names, strict=True)
            ]
        write_json(partial / DOCUMENT, document)
    return document


def _lay_out(patch: np.ndarray, maps: np.ndarray, *, signed: bool) -> np.ndarray:
    """Return a patch and its superimposed maps side by side, enlarged without interpolation."""
    images = enlarge([patch, *(superimpose(patch, values, signed=signed) for values in maps)])
    return lay_out_sheet(images, columns=len(images), gap_px=8)
