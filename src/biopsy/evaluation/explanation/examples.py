"""Explained patches as records, as sheets and as files."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from biopsy.core.errors import DataError
from biopsy.core.files import read_json, update_directory, write_json
from biopsy.models.classifier import Classifier
from biopsy.plotting.overlays import Overlay, draw_overlays, superimpose
from biopsy.plotting.sheets import lay_out_sheet
from biopsy.plotting.style import png, shorten


@dataclass(frozen=True)
class Illustration:
    """The maps of one method, ready to be drawn.

    Attributes:
        method: Name of the method.
        layer: The layer it looked at, or None.
        titles: Of each map of a patch.
        maps: For each example values ``(n_maps, height, width)`` in 0-1, with a sign in -1 to 1.
        caption: What a map shows and what it does not, for a reader.
        signed: Whether values below 0 speak against the class.
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
        examples: One row each: ``patch_id``, ``side`` (empty outside a run), ``class`` (empty where it is
            not known), ``called``, ``prob`` (of the positive class; of more than two classes that of the
            called one) and ``kind``: missed, false alarm, wrong, right, or unlabelled.
        patches: uint8 ``(height, width, 3)`` at their true sizes.
        illustrations: One a method.
    """

    examples: pd.DataFrame
    patches: list[np.ndarray]
    illustrations: list[Illustration]


def draw_sheet(explained: Explained, chosen: Sequence[int], parts: Sequence[Illustration]) -> Figure:
    """Draw some of the examples, by their places, with the maps of one or more methods beside each."""
    rows = []
    for place in chosen:
        example = explained.examples.iloc[place]
        name = shorten(example["patch_id"], 32)
        true = f": {example['class']}" if example["class"] else ""
        label = f"{example['kind']}{true}, p {example['prob']:.2f}, patch {name}"
        maps = np.concatenate([part.maps[place] for part in parts])
        rows.append(Overlay(label, explained.patches[place], maps))
    titles = [title for part in parts for title in part.titles]
    return draw_overlays(rows, titles, [part.signed for part in parts for _ in part.titles])


FORMAT = "biopsy-explain/1"
DOCUMENT = "explain.json"
PICTURE_PX = 288  # a patch's own picture is enlarged to about this height


def write_explained(
    classifier: Classifier, explained: Explained, place: Path, *, named_layer: str | None = None
) -> dict[str, Any]:
    """Write sheets, pictures and ``explain.json`` into a folder; gives what the latter holds."""
    examples = explained.examples
    stems = {
        _file_name(
            f"{part.method}-{named_layer}" if part.layer and part.layer == named_layer else part.method
        ): part
        for part in explained.illustrations
    }
    names = [
        f"{index:02d}-{_file_name(each)}.png" for index, each in enumerate(examples["patch_id"], start=1)
    ]
    outputs = [name for stem in stems for name in (f"{stem}.png", f"{stem}/*")]
    with update_directory(place, DOCUMENT, *outputs, last=DOCUMENT) as partial:
        document = _read_before(place / DOCUMENT, classifier.sha256)
        for stem, part in stems.items():
            sheet = draw_sheet(explained, range(len(examples)), [part])
            (partial / f"{stem}.png").write_bytes(png(sheet))
            (partial / stem).mkdir()
            for name, patch, maps in zip(names, explained.patches, part.maps, strict=True):
                (partial / stem / name).write_bytes(png(_lay_out(patch, maps, signed=part.signed)))
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
        write_json(partial / DOCUMENT, document)
    return read_json(place / DOCUMENT, format=FORMAT)


def _lay_out(patch: np.ndarray, maps: np.ndarray, *, signed: bool) -> np.ndarray:
    """Put a patch and its maps superimposed side by side, enlarged pixel by pixel."""
    times = max(1, PICTURE_PX // max(patch.shape[:2]))
    images = [patch, *(superimpose(patch, values, signed=signed) for values in maps)]
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
