"""Explained patches on disk: sheets, a picture of each patch, and the table of them."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from biopsy.core.errors import DataError
from biopsy.core.files import read_json, update_directory, write_json
from biopsy.figures.overlays import superimpose
from biopsy.figures.sheets import lay_out_sheet
from biopsy.figures.style import png
from biopsy.judging.examples import Explained, draw_sheet
from biopsy.learning.classifiers import Classifier

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
