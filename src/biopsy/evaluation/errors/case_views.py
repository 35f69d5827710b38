"""Images of individual errors: the patch, its saliency map, its position and the nearest training patches."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from biopsy.core.arrays import read_arrays, write_arrays
from biopsy.core.errors import DataError
from biopsy.core.files import refuse_inputs, update_directory
from biopsy.core.results import Result, Table, number
from biopsy.core.tables import write_csv
from biopsy.core.text import capitalize, file_name
from biopsy.data.packs import Pack
from biopsy.evaluation.errors.measure import FOLDER, N_SHOWN, ErrorRecord, measure_errors, read_errors
from biopsy.evaluation.explanation.maps import explain_patches
from biopsy.evaluation.explanation.methods import find_method
from biopsy.evaluation.hypotheses.measure import measure_hypotheses
from biopsy.evaluation.neighbours import SlideViews
from biopsy.models.engine import Engine
from biopsy.plotting.patches import is_constant, lay_out_sheet, scale_maps, superimpose
from biopsy.plotting.style import png
from biopsy.reporting.document import interval_of
from biopsy.reporting.pseudonyms import Pseudonymizer
from biopsy.training.runs import Run

TABLE = "errors.csv"
GALLERIES = {"fn": "missed", "fp": "false-alarms", "uncertain": "uncertain"}
"""Folder of the pictures of each kind of patch."""
MAPS, MAPS_FORMAT = "maps.safetensors", "biopsy-error-maps/1"
PICTURE_PX = 288  # height to which the image of a patch is enlarged, about


@dataclass(frozen=True)
class CaseView:
    """Images of one patch, uint8 ``(height, width, 3)``.

    Attributes:
        patch: The patch in its original size.
        overlay: The patch with its saliency map superimposed.
        is_constant: Whether the map has the same value at every pixel.
        overview: Its position on the slide; None without coordinates.
        nearest: The nearest training patches.
    """

    patch: np.ndarray
    overlay: np.ndarray
    is_constant: bool
    overview: np.ndarray | None
    nearest: list[np.ndarray]


@dataclass(frozen=True)
class CaseViews:
    """Images of the patches in the galleries of an `ErrorRecord`.

    Attributes:
        by_patch: The images by ``patch_id``.
        caption: What the saliency map shows and what it does not.
    """

    by_patch: Mapping[str, CaseView]
    caption: str


@dataclass(frozen=True, eq=False, repr=False)
class ErrorAnalysis(Result):
    """Result of an error analysis; ``analysis[key]`` is an entry of ``errors.json``.

    Attributes:
        document: The content of ``errors.json``.
        table: The content of ``errors.csv``: one row per misclassified patch.
        path: Output folder.
    """

    table: pd.DataFrame
    path: Path

    def blocks(self) -> list[str | Table]:
        counts, positive = self["counts"], self["positive_class"]
        lines = [
            f"{self['subset']} subset: {counts['fn']:,} false negatives among "
            f"{counts['fn'] + counts['tp']:,} {positive} patches, {counts['fp']:,} false positives among "
            f"{counts['fp'] + counts['tn']:,} others"
        ]
        for zone, part in self["zones"].items():
            lines.append(f"{zone}: {part['fn'] + part['fp']:,} errors on {part['n_patches']:,} patches")
        rows = [_contrast_row(row) for row in self["contrasts"] if row["n_errors"] and row["n_others"]]
        note = f"95 % intervals are simultaneous over {self['n_comparisons']} comparisons."
        columns = ["errors", "property", "mean, wrong", "mean, right", "P(wrong > right) (AUC)", ""]
        table = Table(columns, rows, note=note if any(row[4].endswith(")") for row in rows) else "")
        return [*lines, *([table] if rows else []), str(self.path / TABLE)]

    def to_frame(self) -> pd.DataFrame:
        """Return one row per misclassified patch, with its measured properties."""
        return self.table


def _contrast_row(contrast: Mapping[str, Any]) -> list[str]:
    estimate = contrast["within"] or contrast["auroc"]
    text = number(estimate["value"])
    if estimate["low"] is not None:
        text += f" ({interval_of(estimate)})"
    means = [f"{contrast[f'mean_{kind}']:.4g}" for kind in ("errors", "others")]
    return [contrast["errors"], contrast["property"], *means, text, estimate["reason"] or contrast["verdict"]]


@dataclass(frozen=True)
class ErrorFacts:
    """Content of the report's section on a run's errors."""

    record: ErrorRecord
    case_views: CaseViews | None


def errors(
    run: Run | Path | str,
    *,
    subset: Literal["test", "validation"] | None = None,
    n: int = N_SHOWN,
    out: Path | str | None = None,
    hypotheses: bool = False,
    device: str = "auto",
) -> ErrorAnalysis:
    """Analyse the misclassified patches of a run; write a table and pictures.

    Writes ``errors.csv`` (every misclassified patch with its measured properties) and a folder of pictures
    each of the most confident false negatives (``missed``), false positives (``false-alarms``) and uncertain
    patches: the patch, its saliency map, its position on the slide, and the nearest training patches. The
    complete record is kept in the run's ``errors/``.

    Args:
        run: Finished run of two classes, already evaluated.
        subset: Subset to analyse (default: the one evaluated last).
        n: Number of patches of each kind to picture.
        out: Output folder (default: ``errors/`` in the run).
        hypotheses: Also test the published hypotheses about errors and saliency; the report shows them.
        device: Device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Returns:
        The content of ``errors.json`` (see the file formats page) and the table.

    Raises:
        RunError: If the run has more than two classes, or the subset has not been evaluated.
    """
    run = Run.open(run)
    folder = run.path / "errors" if out is None else Path(out)
    refuse_inputs(folder, run.path)
    names = (TABLE, *(f"{gallery}/*" for gallery in GALLERIES.values()))
    with update_directory(folder, *names) as partial:
        result = measure_errors(run, subset=subset, n=n, device=device)
        case_views = make_case_views(run, result, device=device)
        pictures: dict[str, str] = {}
        for kind, gallery in GALLERIES.items():
            (partial / gallery).mkdir()
            for index, item in enumerate(result.document["galleries"][kind], start=1):
                name = item["patch_id"]
                file = f"{gallery}/{index:02d}-{file_name(name)}.png"
                (partial / file).write_bytes(png(_lay_out(case_views.by_patch[name])))
                pictures.setdefault(name, file)
        table = _list_errors(result, pictures)
        write_csv(partial / TABLE, table)
    if hypotheses:
        measure_hypotheses(run, device=device)
    return ErrorAnalysis(result.document, table, folder)


def load_errors(run: Run) -> ErrorFacts | None:
    """Return the stored error analysis of the subset evaluated last; None if there is none."""
    result = read_errors(run)
    if result is None:
        return None
    try:
        arrays, metadata = read_arrays(run.path / FOLDER / MAPS, format=MAPS_FORMAT)
    except DataError:
        return None
    names = list(_list_entries(result))
    if (
        metadata["classifier_sha256"] != result.document["classifier_sha256"]
        or metadata["patch_ids"] != names
    ):
        return None
    return ErrorFacts(
        result, _assemble(run.open_pack(verify=False), result, arrays["maps"], metadata["method"])
    )


def hide_errors(analysis: ErrorFacts, pseudonymizer: Pseudonymizer) -> ErrorFacts:
    """Replace the ids of evaluated patches, and remove those of the nearest training patches."""
    galleries = analysis.record.document["galleries"]
    document = pseudonymizer.nested(analysis.record.document)
    for entries, originals in zip(document["galleries"].values(), galleries.values(), strict=True):
        for entry, original in zip(entries, originals, strict=True):
            entry["patch_id"] = pseudonymizer.of("patch", original["patch_id"])
            entry["nearest"] = [
                {**neighbour, "patch_id": None, "patient_id": None, "slide_id": None}
                for neighbour in entry["nearest"]
            ]
    case_views = analysis.case_views
    if case_views is not None:
        views = {pseudonymizer.of("patch", name): view for name, view in case_views.by_patch.items()}
        case_views = CaseViews(views, case_views.caption)
    return ErrorFacts(ErrorRecord(document, pseudonymizer.table(analysis.record.table)), case_views)


def make_case_views(run: Run, record: ErrorRecord, *, device: str = "auto") -> CaseViews:
    """Return images of the patches in the galleries of a record; saliency maps are kept in the run.

    Maps are those of the default method of `explain_patches`, each on its own scale.
    """
    pack, classifier = run.open_pack(verify=False), run.classifier
    names = list(_list_entries(record))
    rows = pack.rows_of(names)
    explained = explain_patches(classifier, pack.patches[rows], pack.sizes[rows], engine=Engine(device))
    maps = np.round(255 * scale_maps(explained.maps[:, 0], axis=(1, 2))).astype(np.uint8)
    metadata = {
        "format": MAPS_FORMAT,
        "classifier_sha256": record.document["classifier_sha256"],
        "patch_ids": names,
        "method": explained.method,
    }
    with contextlib.suppress(OSError):  # read-only run
        write_arrays(run.path / FOLDER / MAPS, {"maps": maps}, metadata)
    return _assemble(pack, record, maps, explained.method)


def _list_entries(record: ErrorRecord) -> dict[str, Any]:
    return {item["patch_id"]: item for part in record.document["galleries"].values() for item in part}


def _assemble(pack: Pack, record: ErrorRecord, maps: np.ndarray, method_name: str) -> CaseViews:
    """Return the images for maps, uint8 ``(n, H, W)``."""
    entries = _list_entries(record)
    row_of = dict(zip(pack.table["patch_id"].astype(str), range(len(pack)), strict=True))
    rows = [row_of[name] for name in entries]
    views = SlideViews(pack)

    case_views = {}
    for (name, entry), row, values in zip(entries.items(), rows, maps, strict=True):
        patch = pack.pixels(row)
        values = values[: patch.shape[0], : patch.shape[1]] / 255
        case_views[name] = CaseView(
            patch,
            superimpose(patch, values),
            is_constant(values),
            views.overview(row),
            [pack.pixels(row_of[neighbour["patch_id"]]) for neighbour in entry["nearest"]],
        )
    method = find_method(method_name)
    caption = f"{capitalize(method.title)}: {method.shows}. {method.caveat}."
    return CaseViews(case_views, caption)


def _list_errors(record: ErrorRecord, pictures: Mapping[str, str]) -> pd.DataFrame:
    """Return every error, false negatives first, most confident first."""
    table = record.table[record.table["kind"].isin(["fn", "fp"])].drop(columns="sampled")
    sure = table["prob"].where(table["kind"] == "fn", -table["prob"])
    table = table.assign(sure=sure).sort_values(["kind", "sure", "patch_id"]).drop(columns="sure")
    entries = {item["patch_id"]: item for kind in ("fn", "fp") for item in record.document["galleries"][kind]}
    nearest = [
        "; ".join(
            f"{neighbour['patch_id']} ({neighbour['class']}, {neighbour['distance']:.2f})"
            for neighbour in entries[name]["nearest"]
        )
        if name in entries
        else None
        for name in table["patch_id"]
    ]
    return table.assign(nearest_training=nearest, picture=[pictures.get(name) for name in table["patch_id"]])


def _lay_out(case_view: CaseView) -> np.ndarray:
    """Return the images of a patch side by side; patches are enlarged without interpolation."""
    times = max(1, PICTURE_PX // max(case_view.patch.shape[:2]))
    images = [
        image.repeat(times, axis=0).repeat(times, axis=1)
        for image in (case_view.patch, case_view.overlay, *case_view.nearest)
    ]
    if case_view.overview is not None:
        images.insert(2, case_view.overview.repeat(2, axis=0).repeat(2, axis=1))
    return lay_out_sheet(images, columns=len(images), gap_px=8)
