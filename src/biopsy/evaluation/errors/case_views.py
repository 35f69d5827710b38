"""Images of individual errors: the patch, its saliency map, its position and the nearest training patches."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from biopsy.core.arrays import read_arrays, write_arrays
from biopsy.core.errors import DataError
from biopsy.core.files import plain, refuse_inputs, update_directory
from biopsy.core.loaders import validate
from biopsy.core.results import Result, Table
from biopsy.core.tables import write_csv
from biopsy.core.text import class_title, file_name
from biopsy.data.packs import Pack
from biopsy.evaluation.errors.hypotheses.measure import measure_hypotheses
from biopsy.evaluation.errors.measure import (
    DOCUMENT,
    FOLDER,
    N_SHOWN,
    CaseView,
    ErrorRecord,
    Errors,
    measure_errors,
    read_errors,
)
from biopsy.evaluation.neighbours import SlideViews
from biopsy.evaluation.saliency.maps import explain_patches
from biopsy.evaluation.saliency.methods import find_method
from biopsy.models.engine import Engine
from biopsy.plotting.patches import enlarge, is_constant, lay_out_sheet, scale_maps, superimpose
from biopsy.plotting.style import png
from biopsy.reporting.elements import make_table
from biopsy.reporting.pseudonyms import Pseudonymizer
from biopsy.training.runs import Run

TABLE = "errors.csv"
GALLERIES = {"fn": "false-negatives", "fp": "false-positives", "uncertain": "uncertain"}
"""Folder of the pictures of each kind of patch."""
MAPS, MAPS_FORMAT = "maps.safetensors", "biopsy-error-maps/1"


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

    @cached_property
    def errors(self) -> Errors:
        """The content of ``errors.json``."""
        return validate(DOCUMENT, Errors, self.document)

    def blocks(self) -> list[str | Table]:
        m = self.errors
        counts, positive = m["counts"], class_title(m["positive_class"])
        lines = [
            f"{m['subset']} subset: {counts['fn']:,} false negatives among "
            f"{counts['fn'] + counts['tp']:,} {positive} patches, {counts['fp']:,} false positives among "
            f"{counts['fp'] + counts['tn']:,} others"
        ]
        for zone, part in m["zones"].items():
            lines.append(f"{zone}: {part.fn + part.fp:,} errors on {part.n_patches:,} patches")
        rows = [
            [
                row.errors,
                row.property,
                f"{row.mean_chosen:.4g}",
                f"{row.mean_others:.4g}",
                row.within or row.auroc,
                row.verdict,
            ]
            for row in m["contrasts"]
            if row.n_chosen and row.n_others
        ]
        columns = ["errors", "property", "mean, wrong", "mean, right", "P(wrong > right) (AUC)", "difference"]
        note = f"95 % intervals are simultaneous over {m['n_comparisons']} comparisons."
        table = make_table(columns, rows, note=note, text_columns=2)
        return [*lines, *([table] if rows else []), str(self.path / TABLE)]

    def to_frame(self) -> pd.DataFrame:
        """Return one row per misclassified patch, with its measured properties."""
        return self.table


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

    Writes ``errors.csv`` (every misclassified patch with its measured properties) and folders of pictures of
    the most confident ``false-negatives`` and ``false-positives`` and of ``uncertain`` patches: the patch,
    its saliency map, its position on the slide, and the nearest training patches. The complete record is kept
    in the run's ``errors/``.

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
        result = draw_views(run, measure_errors(run, subset=subset, n=n, device=device), device=device)
        pictures: dict[str, str] = {}
        for kind, gallery in GALLERIES.items():
            (partial / gallery).mkdir()
            for index, item in enumerate(result.document["galleries"][kind], start=1):
                name = item["patch_id"]
                file = f"{gallery}/{index:02d}-{file_name(name)}.png"
                (partial / file).write_bytes(png(_lay_out(result.views[name])))
                pictures.setdefault(name, file)
        table = _list_errors(result, pictures)
        write_csv(partial / TABLE, table)
    if hypotheses:
        measure_hypotheses(run, device=device)
    return ErrorAnalysis(plain(result.document), table, folder)


def load_errors(run: Run) -> ErrorRecord | None:
    """Return the stored error analysis of the subset evaluated last, with images; None if there is none."""
    record = read_errors(run)
    if record is None:
        return None
    try:
        arrays, metadata = read_arrays(run.path / FOLDER / MAPS, format=MAPS_FORMAT)
    except DataError:
        return None
    drawn = (record.document["classifier_sha256"], list(record.entries))
    if (metadata["classifier_sha256"], metadata["patch_ids"]) != drawn:
        return None
    return _draw_views(run.open_pack(verify=False), record, arrays["maps"], str(metadata["method"]))


def hide_errors(record: ErrorRecord, pseudonymizer: Pseudonymizer) -> ErrorRecord:
    """Replace the ids of evaluated patches, and remove those of the nearest training patches."""
    document: Errors = pseudonymizer.nested(record.document)
    for kind, entries in document["galleries"].items():
        for entry, original in zip(entries, record.document["galleries"][kind], strict=True):
            entry["patch_id"] = pseudonymizer.of("patch", original["patch_id"])
            entry["nearest"] = [
                {**neighbour, "patch_id": "", "patient_id": None, "slide_id": None}
                for neighbour in entry["nearest"]
            ]
    views = {pseudonymizer.of("patch", name): view for name, view in record.views.items()}
    return ErrorRecord(document, pseudonymizer.table(record.table), views, record.caption)


def draw_views(run: Run, record: ErrorRecord, *, device: str = "auto") -> ErrorRecord:
    """Return a record with images of the patches in its galleries; saliency maps are kept in the run.

    Maps are those of the default method of `explain_patches`, each on its own scale.
    """
    pack, names = run.open_pack(verify=False), list(record.entries)
    rows = pack.rows_of(names)
    explained = explain_patches(run.classifier, pack.patches[rows], pack.sizes[rows], engine=Engine(device))
    maps = np.round(255 * scale_maps(explained.maps[:, 0], axis=(1, 2))).astype(np.uint8)
    metadata = {
        "format": MAPS_FORMAT,
        "classifier_sha256": record.document["classifier_sha256"],
        "patch_ids": names,
        "method": explained.method,
    }
    with contextlib.suppress(OSError):  # read-only run
        write_arrays(run.path / FOLDER / MAPS, {"maps": maps}, metadata)
    return _draw_views(pack, record, maps, explained.method)


def _draw_views(pack: Pack, record: ErrorRecord, maps: np.ndarray, method: str) -> ErrorRecord:
    """Return the record with the images for maps, uint8 ``(n, H, W)``."""
    get_patch, slides, views = pack.pixels_by_id(), SlideViews(pack), {}
    rows = pack.rows_of(list(record.entries))
    for (name, entry), row, values in zip(record.entries.items(), rows, maps, strict=True):
        patch = pack.pixels(row)
        values = values[: patch.shape[0], : patch.shape[1]] / 255
        views[name] = CaseView(
            patch,
            superimpose(patch, values),
            is_constant(values),
            slides.overview(row),
            [get_patch(neighbour["patch_id"]) for neighbour in entry["nearest"]],
        )
    return replace(record, views=views, caption=find_method(method).caption)


def _list_errors(record: ErrorRecord, pictures: Mapping[str, str]) -> pd.DataFrame:
    """Return every error, false negatives first, most confident first."""
    table = record.table[record.table["kind"].isin(["fn", "fp"])].drop(columns="sampled")
    order = table["prob"].where(table["kind"] == "fn", -table["prob"])
    table = table.assign(order=order).sort_values(["kind", "order", "patch_id"]).drop(columns="order")
    entries = record.entries
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
    images = enlarge([case_view.patch, case_view.overlay, *case_view.nearest])
    if case_view.overview is not None:
        images.insert(2, case_view.overview.repeat(2, axis=0).repeat(2, axis=1))
    return lay_out_sheet(images, columns=len(images), gap_px=8)
