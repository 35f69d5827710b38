"""Annotated slides, cut into patches labelled by area according to `biopsy.data.cutting`.

A folder contains ``case.svs`` (or another slide or large image) and ``case.geojson`` or ``case.svs.geojson``,
as exported by QuPath; or annotations, also of ASAP, HALO and ImageScope, are in a separate folder or file.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import pandas as pd

from biopsy.core.errors import DataError, SlideError
from biopsy.core.files import sha256_file
from biopsy.core.loaders import open_regular
from biopsy.core.tables import read_csv_table
from biopsy.core.text import normalize_id
from biopsy.data.archives import Archive, Entry, FolderArchive
from biopsy.data.cutting import Cut, Cutting, cut_slide, name_classes
from biopsy.data.datasets.base import Listing, Skipped, find_positive
from biopsy.data.tables import normalize_cells
from biopsy.slide_io.annotations import SUFFIXES, Annotations, read_annotations
from biopsy.slide_io.backends import SLIDE_SUFFIXES
from biopsy.slide_io.reader import open_slide

logger = logging.getLogger(__name__)

_SPELLINGS: tuple[Callable[[str], str], ...] = (
    lambda name: name,
    lambda name: name.rpartition(".")[0],
    lambda name: name.rpartition("/")[2],
    lambda name: name.rpartition("/")[2].rpartition(".")[0],
    lambda name: name.rpartition("/")[2].partition(".")[0],  # TCGA's slides: NAME.UUID.svs
)

NAME = "annotated-slides"
TITLE = "Slides with annotations beside them, as QuPath exports them"
LOOKS_FOR = "slides with a .geojson of their name beside them"


@dataclass(frozen=True)
class _Case:
    """A slide and its annotations."""

    path: Path
    name: str
    notes_path: Path
    notes: str
    mpp: float | None
    """Pixel size given by the user."""


def recognise(archive: Archive) -> bool:
    """Return whether an archive is a folder of slides with annotations."""
    return isinstance(archive, FolderArchive) and any(
        _pair(archive.entries, list(_list_notes(archive, None)))[0]
    )


def open_slides(path: Path | str) -> FolderArchive:
    """Open a folder of slides, or one slide, with annotations elsewhere.

    Raises:
        DataError: If there is no slide.
    """
    path = Path(path)
    folder = FolderArchive(path if path.is_dir() else path.parent)
    if not path.is_dir():
        folder.entries = [entry for entry in folder.entries if folder.path_of(entry) == path]
    if not any(entry.name.lower().endswith(SLIDE_SUFFIXES) for entry in folder.entries):
        raise DataError(f"{path} has no slides: expected files with suffix {' '.join(SLIDE_SUFFIXES)}")
    return folder


def fingerprint_notes(annotations: Path | str) -> str:
    """Hash a file of annotations, or names, sizes and modification times of a folder."""
    path = Path(annotations)
    if path.is_dir():
        return FolderArchive(path).fingerprint()
    open_regular(path).close()
    return sha256_file(path)


def list_patches(archive: Archive, cutting: Cutting) -> tuple[Listing, dict[str, object]]:
    """Cut every annotated slide of a folder.

    Returns:
        The patches, and the record for ``pack.json``: cutting parameters, excluded patches by reason, and per
        slide mpp and its source, areas, overlaps, repaired and ignored features.

    Raises:
        DataError: If annotations are malformed, do not match their slide, or have an unnamed class or no
            required region.
        SlideError: If a slide cannot be read at this resolution.
    """
    assert isinstance(archive, FolderArchive)
    notes = _list_notes(archive, cutting.annotations)
    pairs, unmatched = _pair(archive.entries, list(notes), cutting.annotations)
    if not pairs:
        raise DataError(
            f"{archive.path}: no slide has annotations; {unmatched[0]['source']} {unmatched[0]['reason']}"
        )
    stated = _stated_mpp(cutting.slide_mpp, [slide.name for slide, _ in pairs])
    cases = {
        _slide_id(slide): _Case(archive.path_of(slide), slide.name, notes[name], name, stated[slide.name])
        for slide, name in pairs
    }
    if len(cases) < len(pairs):
        repeated = Counter(_slide_id(slide) for slide, _ in pairs).most_common(1)[0][0]
        raise DataError(f"{archive.path} holds two slides called {repeated!r}: rename one")
    read = {slide_id: read_annotations(case.notes_path) for slide_id, case in cases.items()}
    class_names = name_classes(list(read.values()), cutting)
    tables, records, left_out = [], {}, Counter[str]()
    for slide_id, case in cases.items():
        table, cut, record = _cut(slide_id, case, read[slide_id], class_names, cutting)
        tables.append(table)
        left_out.update(cut.left_out)
        records[slide_id] = record | {"patches": len(table), "left_out": cut.left_out, **cut.areas}
    table = pd.concat(tables, ignore_index=True)
    others = [name for name in class_names if name != cutting.rest]
    listing = Listing(
        table=table,
        pixels=SlidePatches(table, cases, cutting),
        class_names=class_names,
        positive_class=others[0] if cutting.rest and len(others) == 1 else find_positive(class_names),
        mpp=cutting.mpp,
        skipped=unmatched,
        counts={"duplicates": 0, "left_out": sum(left_out.values())},
    )
    return listing, {**cutting.to_dict(), "left_out": dict(left_out), "slides": records}


def _cut(
    slide_id: str, case: "_Case", notes: Annotations, class_names: Sequence[str], cutting: Cutting
) -> tuple[pd.DataFrame, Cut, dict[str, object]]:
    """Return the rows of one slide, its cut, and the record of slide and annotations."""
    if notes.repaired:
        number, fault = next(iter(notes.repaired.items()))
        logger.warning(
            "%s: %d self-intersecting outlines were repaired, feature %d first: %s",
            *(notes.path, len(notes.repaired), number, fault),
        )
    if notes.ignored:
        counts = ", ".join(f"{count:,} {reason}" for reason, count in notes.ignored.items())
        logger.warning("%s: excluded: %s", notes.path, counts)
    with open_slide(case.path, mpp=case.mpp) as slide:
        cut = cut_slide(slide, notes, class_names, cutting)
        record: dict[str, object] = {
            "annotations": case.notes,
            "mpp": slide.mpp,
            "mpp_source": slide.mpp_source,
        }
        record |= {"corner_px": list(slide.corner)} if any(slide.corner) else {}
    table = pd.DataFrame(
        {
            "patch_id": [f"{slide_id}_x{x}_y{y}" for x, y in zip(cut.x, cut.y, strict=True)],
            "patient_id": None,
            "slide_id": slide_id,
            "site_id": None,
            "x": cut.x,
            "y": cut.y,
            "class_name": np.array(class_names, object)[cut.target],
            "source": case.name,
            "label_share": cut.share,
        }
    )
    record |= {"features": len(notes.items), "repaired": sorted(notes.repaired), "ignored": notes.ignored}
    return table, cut, record


class SlidePatches:
    """Pixels of patches, read from slides at the requested resolution."""

    def __init__(self, table: pd.DataFrame, cases: dict[str, _Case], cutting: Cutting) -> None:
        self._slide_ids = table["slide_id"].tolist()
        self._coordinates = table[["x", "y"]].to_numpy(np.int64)
        self._cases, self._cutting = cases, cutting

    def read(self, rows: Sequence[int]) -> Iterator[np.ndarray | DataError]:
        """Yield each patch, or the error; a slide is opened once for consecutive patches."""
        mpp, patch_px = self._cutting.mpp, self._cutting.patch_px
        for slide_id, group in groupby(rows, lambda row: self._slide_ids[row]):
            case = self._cases[slide_id]
            with open_slide(case.path, mpp=case.mpp) as slide:
                scale = slide.level_0_px(mpp)
                for row in group:
                    x, y = self._coordinates[row] * scale
                    try:
                        yield slide.read_at(x, y, patch_px, patch_px, mpp=mpp)
                    except SlideError as error:
                        yield error


def _list_notes(archive: FolderArchive, annotations: Path | str | None) -> dict[str, Path]:
    """Return paths of annotation files by name: beside the slides, in a folder, or one file."""
    if annotations is None:
        return {
            entry.name: archive.path_of(entry)
            for entry in archive.entries
            if entry.name.lower().endswith(".geojson")
        }
    path = Path(annotations)
    if not path.is_dir():
        return {path.name: path}
    folder = FolderArchive(path)
    result = {
        entry.name: folder.path_of(entry) for entry in folder.entries if entry.name.lower().endswith(SUFFIXES)
    }
    if not result:
        raise DataError(f"{path} has no annotations: expected files with suffix {' '.join(SUFFIXES)}")
    return result


def _pair(
    entries: Sequence[Entry], notes: Sequence[str], annotations: Path | str | None = None
) -> tuple[list[tuple[Entry, str]], list[Skipped]]:
    """Return slides with the names of their annotations, and unmatched files.

    An annotation file has the name of its slide, with or without the slide's suffix. In a separate folder,
    parent folders and the part of the slide's name after its first dot are ignored. A single file matches a
    single slide.
    """
    slides = {entry.name: entry for entry in entries if entry.name.lower().endswith(SLIDE_SUFFIXES)}
    spellings = _SPELLINGS[: 2 if annotations is None else None]
    lookups: list[dict[str, list[str]]] = [{} for _ in spellings]
    for spelling, slides_by_name in zip(spellings, lookups, strict=True):
        for name in slides:
            slides_by_name.setdefault(spelling(name), []).append(name)
    pairs: dict[str, tuple[Entry, str]] = {}
    unmatched: list[Skipped] = []
    for name in notes:
        stem = name.rpartition(".")[0]
        stems = [stem] if annotations is None else [stem, stem.rpartition("/")[2]]
        result = next(
            (slides_by_name[stem] for stem in stems for slides_by_name in lookups if stem in slides_by_name),
            [],
        )
        if not result and len(notes) == len(slides) == 1 and annotations is not None:
            result = list(slides)
        taken = [pairs[slide][1] for slide in result if slide in pairs]
        if not result:
            unmatched.append({"source": name, "reason": "has no slide of the same name"})
        elif len(result) > 1:
            unmatched.append({"source": name, "reason": f"matches {' and '.join(result)}: add the suffix"})
        elif taken:
            unmatched.append({"source": name, "reason": f"{result[0]} already has {taken[0]}"})
        else:
            pairs[result[0]] = slides[result[0]], name
    location = "beside it (or set --annotations)" if annotations is None else f"in {annotations}"
    suffixes = ".geojson" if annotations is None else " ".join(SUFFIXES)
    unmatched += [
        {"source": name, "reason": f"has no annotations: expected {suffixes} of the same name {location}"}
        for name in slides
        if name not in pairs
    ]
    return [pairs[name] for name in sorted(pairs)], unmatched


def _slide_id(slide: Entry) -> str:
    return normalize_id(slide.name.rpartition("/")[2].rpartition(".")[0])


def _stated_mpp(stated: float | str | Path | None, names: Sequence[str]) -> dict[str, float | None]:
    """Return the user's mpp of each slide; a csv names its file, with or without suffix."""
    try:
        value = None if stated is None else float(stated)  # type: ignore[arg-type]
        return dict.fromkeys(names, value)
    except (TypeError, ValueError):
        pass
    headings = {name: name for name in ("slide", "mpp")}
    rows = read_csv_table(stated, aliases=headings, required=("slide", "mpp"))  # type: ignore[arg-type]
    rows = rows.assign(slide=normalize_cells(rows["slide"]), mpp=normalize_cells(rows["mpp"]))
    rows = rows[rows["mpp"].notna()]  # others record it themselves
    mpp_by_slide = dict(zip(rows["slide"], pd.to_numeric(rows["mpp"], errors="coerce"), strict=True))
    result: dict[str, float | None] = {}
    for name in names:
        file = name.rpartition("/")[2]
        matching = next((key for key in (name, file, file.rpartition(".")[0]) if key in mpp_by_slide), None)
        if matching is not None and pd.isna(mpp_by_slide[matching]):
            raise DataError(f"{stated} has an mpp for slide {matching} that is not a number")
        result[name] = None if matching is None else float(mpp_by_slide[matching])
    return result
