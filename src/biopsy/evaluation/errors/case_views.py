"""Mistakes looked at one by one: the patch, what the network looks at, where it lies, what it is like."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from biopsy.core.files import refuse_inputs, update_directory
from biopsy.core.tables import write_csv
from biopsy.evaluation.errors.measure import SHOWN_EACH, Mistakes, measure_mistakes
from biopsy.evaluation.explanation.maps import explain_patches
from biopsy.evaluation.explanation.methods import find_method
from biopsy.evaluation.slide_context import SlideViews
from biopsy.models.engine import Engine
from biopsy.plotting.overlays import scale_maps, superimpose
from biopsy.plotting.sheets import lay_out_sheet
from biopsy.plotting.style import png
from biopsy.training.runs import Run

TABLE = "errors.csv"
GALLERIES = {"fn": "missed", "fp": "false-alarms", "uncertain": "uncertain"}
"""Folder of the pictures of each kind of patch."""
PICTURE_PX = 288  # a patch's own picture is enlarged to about this height


@dataclass(frozen=True)
class Closeup:
    """Pictures of one patch, uint8 ``(height, width, 3)``.

    Attributes:
        patch: At its true size.
        overlay: What the network looks at, superimposed.
        overview: Its place on the slide; None without coordinates.
        nearest: The training patches nearest to it.
    """

    patch: np.ndarray
    overlay: np.ndarray
    overview: np.ndarray | None
    nearest: list[np.ndarray]


@dataclass(frozen=True)
class Closeups:
    """Pictures of the patches of `Mistakes` that are looked at closely.

    Attributes:
        of: By ``patch_id``.
        caption: What the superimposed map shows and what it does not.
    """

    of: Mapping[str, Closeup]
    caption: str


def mistakes(
    run: Run | Path | str,
    *,
    side: Literal["test", "val"] | None = None,
    n: int = SHOWN_EACH,
    out: Path | str | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Find a run's mistakes, measure what goes with them, and write a table and pictures.

    Writes ``errors.csv`` (every mistake with what was measured of it) and a folder of pictures each for
    ``missed``, ``false-alarms`` and ``uncertain`` patches: the patch, what the network looks at, its place on
    the slide, and the training patches most like it. The record itself stands in the run's ``errors/``.

    Args:
        run: A finished run that tells two classes apart.
        side: ``test`` or ``val``; the side last judged by default. Nothing is opened by this.
        n: How many of each kind are pictured.
        out: Where to write; ``errors/`` in the run by default.
        device: Where the network is asked.

    Returns:
        What ``errors.json`` holds; see the file formats page.

    Raises:
        RunError: If the run has more than two classes, or the side has not been predicted.
    """
    run = Run.open(run)
    place = run.path / "errors" if out is None else Path(out)
    refuse_inputs(place, run.path)
    names = (TABLE, *(f"{folder}/*" for folder in GALLERIES.values()))
    with update_directory(place, *names) as partial:
        found = measure_mistakes(run, side=side, n=n, device=device)
        closeups = look_closer(run, found, device=device)
        pictures: dict[str, str] = {}
        for kind, folder in GALLERIES.items():
            (partial / folder).mkdir()
            for index, each in enumerate(found.about["galleries"][kind], start=1):
                name = each["patch_id"]
                file = f"{folder}/{index:02d}-{_file_name(name)}.png"
                (partial / file).write_bytes(png(_lay_out(closeups.of[name])))
                pictures.setdefault(name, file)
        write_csv(partial / TABLE, _list_errors(found, pictures))
    return found.about


def look_closer(run: Run, found: Mistakes, *, device: str = "auto") -> Closeups:
    """Make the pictures of the patches in a record's galleries.

    Maps are those that `explain_patches` gives by default, each on its own scale.
    """
    pack, classifier = run.open_pack(verify=False), run.classifier
    entries = {each["patch_id"]: each for part in found.about["galleries"].values() for each in part}
    row_of = dict(zip(pack.table["patch_id"].astype(str), range(len(pack)), strict=True))
    rows = np.array([row_of[name] for name in entries])
    explained = explain_patches(classifier, pack.patches[rows], pack.sizes[rows], engine=Engine(device))
    maps = scale_maps(explained.maps[:, 0], axis=(1, 2))
    views = SlideViews(pack)

    def true_patch(row: int) -> np.ndarray:
        width, height = pack.sizes[row]
        return np.asarray(pack.patches[row, :height, :width])

    closeups = {}
    for (name, entry), row, values in zip(entries.items(), rows, maps, strict=True):
        patch = true_patch(row)
        closeups[name] = Closeup(
            patch,
            superimpose(patch, values[: patch.shape[0], : patch.shape[1]]),
            views.overview(row),
            [true_patch(row_of[near["patch_id"]]) for near in entry["nearest"]],
        )
    method = find_method(explained.method)
    caption = f"{explained.method.capitalize()} shows {method.shows}; it is not {method.shows_not}."
    return Closeups(closeups, caption)


def _list_errors(found: Mistakes, pictures: Mapping[str, str]) -> pd.DataFrame:
    """Give every mistake, missed ones first, the surest first."""
    table = found.table[found.table["kind"].isin(["fn", "fp"])].drop(columns="sampled")
    sure = table["prob"].where(table["kind"] == "fn", -table["prob"])
    table = table.assign(sure=sure).sort_values(["kind", "sure", "patch_id"]).drop(columns="sure")
    entries = {each["patch_id"]: each for kind in ("fn", "fp") for each in found.about["galleries"][kind]}
    nearest = [
        "; ".join(
            f"{near['patch_id']} ({near['class']}, {near['distance']:.2f})"
            for near in entries[name]["nearest"]
        )
        if name in entries
        else None
        for name in table["patch_id"]
    ]
    return table.assign(nearest_training=nearest, picture=[pictures.get(name) for name in table["patch_id"]])


def _lay_out(closeup: Closeup) -> np.ndarray:
    """Put the pictures of a patch side by side, those of patches enlarged pixel by pixel."""
    times = max(1, PICTURE_PX // max(closeup.patch.shape[:2]))
    images = [
        image.repeat(times, axis=0).repeat(times, axis=1)
        for image in (closeup.patch, closeup.overlay, *closeup.nearest)
    ]
    if closeup.overview is not None:
        images.insert(2, closeup.overview.repeat(2, axis=0).repeat(2, axis=1))
    return lay_out_sheet(images, columns=len(images), gap_px=8)


def _file_name(text: str) -> str:
    """Make a file name of an id, whatever stands in it."""
    return re.sub(r"[^\w.-]", "_", text)[:120]
