"""Inspection of a pack: audit and figures of its classes, patients, slides and splits."""

import errno
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from typing_extensions import TypedDict

from biopsy.core.errors import DataError, PackError
from biopsy.core.files import check_outputs, refuse_inputs, update_directory, write_atomic, write_json
from biopsy.core.results import FAILED, Result, Table
from biopsy.core.seeds import make_rng
from biopsy.core.storage import stage
from biopsy.core.text import class_title, file_name, plural
from biopsy.data.audit import Audit, PaddedPatches, SplitAudit, audit_pack, find_blocking_issues
from biopsy.data.figures import draw_balance, draw_subsets
from biopsy.data.packs import Pack
from biopsy.data.protocols.groups import SUBSETS
from biopsy.data.splits import Split, find_split
from biopsy.plotting.patches import draw_class_sheet
from biopsy.plotting.slides import draw_slide
from biopsy.plotting.style import png, svg
from biopsy.slide_io.mosaic import stitch, stitch_values

logger = logging.getLogger(__name__)

N_SHOWN = 32  # patches of each class on the class sheet
MAX_SLIDES = 40  # slides drawn
SLIDE_PX = 1000  # longest side of a slide's picture in pixels


class InspectionPaths(TypedDict):
    """Files of an inspection."""

    audit: Path
    pictures: list[Path]


class InspectionDocument(Audit):
    """Content of ``audit.json``, the problems that would invalidate a result, and the files."""

    blocking_issues: list[str]
    paths: InspectionPaths


@dataclass(frozen=True, eq=False, repr=False)
class Inspection(Result):
    """Result of an inspection: the content of ``audit.json``, ``blocking_issues`` and ``paths``."""

    document: InspectionDocument

    def blocks(self) -> list[str | Table]:
        m, pictures = self.document, self.document["paths"]["pictures"]
        exact, labels, groups = m["exact_duplicates"], m["label_conflicts"], m["groups"]
        lines = [
            f"audit: {m['paths']['audit']}",
            f"  unreadable files: {m['unreadable']['count']:,}",
            f"  padded to a square: {_list_sizes(m['padded'])}",
            f"  blank patches: {m['blank']['count']:,}",
            f"  exact duplicates: {exact['patches']:,} patches in {exact['count']:,} groups",
            f"  near duplicates: {m['near_duplicates']['count']:,} pairs",
            f"  label conflicts: {labels['same_pixels']['count']:,} with equal pixels, "
            f"{labels['same_place']['count']:,} at the same position",
        ]
        if groups["one_class"] is not None:
            n_one_class = groups["one_class"]["count"]
            lines.append(f"  {m['unit']}s: {groups['count']:,}, of one class {n_one_class:,}")
            if groups["unknown"]:
                lines.append(f"  patches without a known {m['unit']}: {groups['unknown']:,}")
        if m["split"] is not None:
            lines += _describe_split(m["split"], m["unit"])
        return [*lines, f"pictures: {len(pictures)} in {pictures[0].parent}"]

    def problems(self) -> list[str]:
        return [f"blocking issue: {issue}" for issue in self.document["blocking_issues"]]

    @property
    def exit_code(self) -> int:
        return FAILED if self.document["blocking_issues"] else 0

    def to_frame(self) -> pd.DataFrame:
        """Return one row per problem that would invalidate a result."""
        return pd.DataFrame({"blocking issue": self.document["blocking_issues"]})


def _describe_split(split: SplitAudit, unit: str) -> list[str]:
    """Return what two subsets of a split share."""
    shared = "" if unit == "patch" else f"{split['overlap']['count']:,} {plural(unit)}, "
    shared += f"{split['duplicates_across_subsets']['count']:,} groups of exact and "
    shared += f"{split['near_duplicates_across_subsets']['count']:,} pairs of near duplicates"
    lines = [f"  in two subsets of split {split['name']}: {shared}"]
    if split["may_overlap"] and split["patients_overlap"]:
        reason = "as published" if split["is_published"] else "on purpose"
        lines.append(f"  PATIENTS OVERLAP in split {split['name']}, {reason}")
    return lines


def _list_sizes(padded: PaddedPatches) -> str:
    sizes = ", ".join(
        f"{size['width']} x {size['height']} px: {size['count']:,}" for size in padded["by_size"]
    )
    return f"{padded['count']:,} patches" + (f" ({sizes})" if sizes else "")


def inspect(
    pack: Pack | Path | str, *, split: str | Split | None = None, out: Path | str | None = None
) -> Inspection:
    """Audit a pack for problems that would invalidate a result, and draw its content.

    Writes ``audit.json`` into the pack and pictures into ``inspection/`` in it: a sheet of each class, the
    class balance per patient, each slide reassembled where coordinates are known, and the classes of each
    subset (or fold) of the split. Label conflicts, and patients or duplicates in two subsets of the split,
    are blocking issues, on which the command exits with 1; a published split, or one made to measure a leak,
    may overlap.

    Args:
        pack: Pack to audit.
        split: Name of a split whose subsets are audited too: patients and duplicates in two subsets.
        out: Output folder of the pictures, and of the audit of a read-only pack (default: ``inspection/``
            in the pack).

    Returns:
        The audit (see the file formats), ``blocking_issues``, what would invalidate a result, one
        sentence each, and ``paths``: ``audit`` and ``pictures``.

    Raises:
        PackError: If the pack was altered, or is read-only and ``out`` is not given.
    """
    pack = Pack.open(stage(pack))
    pack.verify()
    division = find_split(pack, split) if isinstance(split, str) else split
    folder = pack.path / "inspection" if out is None else Path(out)
    refuse_inputs(folder, pack.path)
    names = ["classes.png", f"{plural(pack.unit)}.svg", "slide-*"]
    names += [] if division is None else [f"split-{division.name}.svg"]
    check_outputs(folder, *names)
    audit = audit_pack(pack, division)
    audit_path = _write_audit(pack, audit, out)
    with update_directory(folder, *names) as partial:
        pictures = [_draw_classes(pack, partial), *_draw_groups(pack, partial), *_draw_slides(pack, partial)]
        if division is not None:
            pictures.append(_draw_split(pack, division, partial))
    paths: InspectionPaths = {
        "audit": audit_path,
        "pictures": [folder / picture.name for picture in pictures],
    }
    return Inspection({**audit, "blocking_issues": find_blocking_issues(audit), "paths": paths})


def _write_audit(pack: Pack, audit: Audit, out: Path | str | None) -> Path:
    path = pack.path / "audit.json"
    try:
        write_json(path, audit)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        if out is None:
            raise PackError(
                f"{pack.path} is read-only: set --out, the output folder of the audit", "read-only"
            ) from None
        path = Path(out) / "audit.json"
        with update_directory(out, path.name) as partial:
            write_json(partial / path.name, audit)
    return path


def _titles(pack: Pack) -> list[str]:
    return [class_title(name) for name in pack.class_names]


def _draw_classes(pack: Pack, folder: Path) -> Path:
    """Draw random patches of every class, spread over the patients."""
    sheets = []
    for index, name in enumerate(pack.class_names):
        rows = make_rng(0, "inspect", name).permutation(np.flatnonzero(pack.target == index))
        groups = pd.Series(pack.group_ids[rows])
        turn = groups.groupby(groups).cumcount()  # one patch of every patient before a second
        shown = rows[np.argsort(turn, kind="stable")][:N_SHOWN]
        sheets.append((f"{class_title(name)}: {len(rows):,} patches", [pack.pixels(row) for row in shown]))
    path = folder / "classes.png"
    write_atomic(path, png(draw_class_sheet(sheets)))
    return path


def _draw_groups(pack: Pack, folder: Path) -> list[Path]:
    """Draw the class balance per patient (or slide), if known."""
    if pack.unit == "patch":
        return []
    has_group = pack.table[f"{pack.unit}_id"].notna().to_numpy()
    names, codes = np.unique(pack.group_ids[has_group], return_inverse=True)
    counts = np.zeros((len(names), len(pack.class_names)), dtype=int)
    np.add.at(counts, (codes, pack.target[has_group]), 1)
    path = folder / f"{plural(pack.unit)}.svg"
    write_atomic(path, svg(draw_balance(names.tolist(), counts, _titles(pack)), plural(pack.unit)))
    return [path]


def _draw_split(pack: Pack, split: Split, folder: Path) -> Path:
    """Draw the classes of each subset, or of each fold and of the patches in no fold."""
    if split.n_folds:
        of_fold = [(f"fold {fold}", split.assign(pack, fold) == "test") for fold in range(split.n_folds)]
        tested = np.any([member for _, member in of_fold], axis=0)
        parts = [*of_fold, ("in no fold", ~tested)]
    else:
        subsets = split.assign(pack)
        parts = [(subset or "left out", subsets == subset) for subset in (*SUBSETS, "")]
    parts = [(name, member) for name, member in parts if member.any()]
    counts = [np.bincount(pack.target[member], minlength=len(pack.class_names)) for _, member in parts]
    path = folder / f"split-{split.name}.svg"
    figure = draw_subsets([name for name, _ in parts], np.array(counts), _titles(pack))
    write_atomic(path, svg(figure, "split"))
    return path


def _draw_slides(pack: Pack, folder: Path) -> list[Path]:
    """Draw reassembled slides, those with most patches first."""
    placed = pack.table[["x", "y", "slide_id"]].notna().all(axis=1)
    slides = pack.table.loc[placed, "slide_id"].value_counts()
    if len(slides) > MAX_SLIDES:
        logger.info("drawing the %d largest of %d slides", MAX_SLIDES, len(slides))
    paths = []
    for number, slide_id in enumerate(slides.index[:MAX_SLIDES], start=1):
        rows = np.flatnonzero(placed & (pack.table["slide_id"] == slide_id))
        path = folder / f"slide-{number:02d}-{file_name(str(slide_id))}.png"
        try:
            write_atomic(path, _render_slide(pack, rows))
        except DataError as error:
            logger.warning("slide %s is not drawn: %s", slide_id, error)
        else:
            paths.append(path)
    return paths


def _render_slide(pack: Pack, rows: np.ndarray) -> bytes:
    patch_px, mpp = pack.info.patch_px, pack.info.mpp
    x, y = (pack.table[column].to_numpy(float, na_value=np.nan)[rows] for column in ("x", "y"))
    target = stitch_values(pack.target[rows], x, y, patch_px=patch_px)
    longest = max(np.ptp(x), np.ptp(y)) + patch_px
    tissue = stitch(
        (pack.pixels(row) for row in rows), x, y, patch_px=patch_px, scale=min(1.0, SLIDE_PX / longest)
    )
    figure = draw_slide(
        tissue,
        target,
        np.full(target.shape, np.nan),
        um_per_cell=None if mpp is None else patch_px * mpp,
        class_names=_titles(pack),
        panels=("tissue", "target"),
    )
    return png(figure)
