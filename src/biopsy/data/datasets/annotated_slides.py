"""Slides with annotations beside them, cut into patches that are labelled by area.

``case.svs`` (or another slide or large image) and ``case.geojson`` or ``case.svs.geojson``, as QuPath exports
it, lie in one folder. The rules are those of `biopsy.data.cutting`. Unlike other layouts this one needs to be
told them, so `biopsy.data.packing` asks it apart from the others.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from biopsy.core.errors import DataError, SlideError
from biopsy.data.archives import Archive, Entry, FolderArchive
from biopsy.data.columns import read_csv
from biopsy.data.cutting import Cutting, cut_slide, name_classes
from biopsy.data.datasets.layouts import Listing, Skipped, find_positive
from biopsy.imaging.annotations import Annotations, read_annotations
from biopsy.imaging.backends import SLIDE_SUFFIXES
from biopsy.imaging.reader import open_slide

_log = logging.getLogger(__name__)

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
    """As the user states it."""


def recognise(archive: Archive) -> bool:
    """Say whether it is a folder in which annotations lie beside slides."""
    return isinstance(archive, FolderArchive) and any(_pair(archive.entries)[0])


def list_patches(archive: Archive, cutting: Cutting) -> tuple[Listing, dict[str, Any]]:
    """Cut every annotated slide of a folder.

    Returns:
        The patches, and for the record: the rules, how many patches were left out by which reason, and what
        is known of each slide (mpp and where it came from, areas, overlaps, repaired and ignored features).

    Raises:
        DataError: If annotations are malformed, another slide's, of a class that is not named, or lack a
            region that is needed.
        SlideError: If a slide cannot be read, or not at this mpp.
    """
    assert isinstance(archive, FolderArchive)
    pairs, alone = _pair(archive.entries)
    stated = _stated_mpp(cutting.slide_mpp, [slide.name for slide, _ in pairs])
    cases = {
        _slide_id(slide): _Case(
            archive.path_of(slide), slide.name, archive.path_of(notes), notes.name, stated[slide.name]
        )
        for slide, notes in pairs
    }
    if len(cases) < len(pairs):
        twice = Counter(_slide_id(slide) for slide, _ in pairs).most_common(1)[0][0]
        raise DataError(f"{archive.path} holds two slides called {twice!r}: rename one")
    read = {slide_id: read_annotations(case.notes_path) for slide_id, case in cases.items()}
    class_names = name_classes(list(read.values()), cutting)
    tables, records, left_out = [], {}, Counter[str]()
    for slide_id, case in cases.items():
        table, record = _cut(slide_id, case, read[slide_id], class_names, cutting)
        tables.append(table)
        records[slide_id] = record
        left_out.update(record["left_out"])
    table = pd.concat(tables, ignore_index=True)
    others = [name for name in class_names if name != cutting.rest]
    listing = Listing(
        table=table,
        pixels=SlidePatches(table, cases, cutting),
        class_names=class_names,
        positive_class=others[0] if cutting.rest and len(others) == 1 else find_positive(class_names),
        mpp=cutting.mpp,
        skipped=alone,
        counts={"duplicates": 0, "left_out": sum(left_out.values())},
    )
    return listing, {**cutting.to_dict(), "left_out": dict(left_out), "slides": records}


def _cut(
    slide_id: str, case: "_Case", notes: Annotations, class_names: Sequence[str], cutting: Cutting
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Give the rows of one slide, and its record."""
    if notes.repaired:
        number, fault = next(iter(notes.repaired.items()))
        _log.warning(
            "%s: %d outlines that cross themselves were repaired, feature %d first: %s",
            *(notes.path, len(notes.repaired), number, fault),
        )
    with open_slide(case.path, mpp=case.mpp) as slide:
        cut = cut_slide(slide, notes, class_names, cutting)
        about = {"annotations": case.notes, "mpp": slide.mpp, "mpp_source": slide.mpp_source}
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
    features = {"features": len(notes.items), "repaired": sorted(notes.repaired), "ignored": notes.ignored}
    return table, about | cut.record | features


class SlidePatches:
    """The pixels of patches, read from their slides at the wanted mpp."""

    def __init__(self, table: pd.DataFrame, cases: dict[str, _Case], cutting: Cutting) -> None:
        self._slide_ids = table["slide_id"].tolist()
        self._places = table[["x", "y"]].to_numpy(np.int64)
        self._cases, self._cutting = cases, cutting

    def read(self, rows: Sequence[int]) -> Iterator[np.ndarray | DataError]:
        """Read one patch after the other; each slide is opened once for those that follow one another."""
        mpp, patch_px = self._cutting.mpp, self._cutting.patch_px
        for slide_id, group in groupby(rows, lambda row: self._slide_ids[row]):
            case = self._cases[slide_id]
            with open_slide(case.path, mpp=case.mpp) as slide:
                scale = slide.level_0_px(mpp)
                for row in group:
                    x, y = self._places[row] * scale
                    try:
                        yield slide.read_at(x, y, patch_px, patch_px, mpp=mpp)
                    except SlideError as error:
                        yield error


def _pair(entries: Sequence[Entry]) -> tuple[list[tuple[Entry, Entry]], list[Skipped]]:
    """Give slides with their annotations, and what has no partner."""
    slides = {entry.name: entry for entry in entries if entry.name.lower().endswith(SLIDE_SUFFIXES)}
    stems = {name.rpartition(".")[0]: name for name in slides}
    pairs: dict[str, tuple[Entry, Entry]] = {}
    alone: list[Skipped] = []
    for entry in entries:
        if not entry.name.lower().endswith(".geojson"):
            continue
        stem = entry.name.rpartition(".")[0]
        slide = stem if stem in slides else stems.get(stem)
        if slide is None:
            alone.append({"source": entry.name, "reason": "has no slide of its name beside it"})
        elif slide in pairs:
            alone.append(
                {"source": entry.name, "reason": f"{pairs[slide][1].name} annotates {slide} already"}
            )
        else:
            pairs[slide] = (slides[slide], entry)
    alone += [
        {"source": name, "reason": "has no annotations: a .geojson of its name is looked for"}
        for name in slides
        if name not in pairs
    ]
    return [pairs[name] for name in sorted(pairs)], alone


def _slide_id(slide: Entry) -> str:
    return slide.name.rpartition("/")[2].rpartition(".")[0]


def _stated_mpp(stated: float | str | Path | None, names: Sequence[str]) -> dict[str, float | None]:
    """Give what the user says of each slide's mpp; a csv names its file, with or without ending."""
    try:
        value = None if stated is None else float(stated)  # type: ignore[arg-type]
        return dict.fromkeys(names, value)
    except (TypeError, ValueError):
        pass
    rows = read_csv(stated, ("slide",))  # type: ignore[arg-type]
    if not {"slide", "mpp"} <= set(rows.columns):
        raise DataError(f"{stated} has the columns {', '.join(rows.columns)}; slide and mpp are needed")
    rows = rows[
        rows["mpp"].notna() & (rows["mpp"].astype(str).str.strip() != "")
    ]  # the others have their own
    known = dict(zip(rows["slide"], pd.to_numeric(rows["mpp"], errors="coerce"), strict=True))
    found: dict[str, float | None] = {}
    for name in names:
        file = name.rpartition("/")[2]
        spelled = next((key for key in (name, file, file.rpartition(".")[0]) if key in known), None)
        if spelled is not None and pd.isna(known[spelled]):
            raise DataError(f"{stated} gives slide {spelled} an mpp that is no number")
        found[name] = None if spelled is None else float(known[spelled])
    return found
