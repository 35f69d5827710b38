"""Annotated slides, cut into patches labelled by area.

A folder contains ``case.svs`` (or another slide or large image) and ``case.geojson`` or ``case.svs.geojson``,
as exported by QuPath; or annotations, also of ASAP, HALO and ImageScope, are in a separate folder or file.

The rules, recorded in ``pack.json`` with their parameters:

* Patches are on a grid with stride ``stride_px`` from the slide's corner at the requested resolution, wholly
  inside the slide, as for maps.
* If the slide has areas of the class ``Region*``, a patch is wholly inside them. It is wholly outside ignored
  areas: classes that end in ``*``, such as QuPath's ``Ignore*``, or follow an empty name in ``classes``.
* Areas without a class count only if ``classes`` names them, ``Unclassified``; with ``rest`` it must, unless
  they hold areas with a class.
* At least half of a patch is tissue, as for maps.
* The class of a patch is the only one that covers at least ``label_frac`` of it; patches with no such class,
  or several, are excluded. ``rest`` is the class of unannotated tissue in the valid area (default: excluded).

Excluded patches are counted by reason.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations, groupby
from pathlib import Path

import numpy as np
import pandas as pd
import shapely
from shapely.geometry.base import BaseGeometry

from biopsy.core.errors import DataError, SlideError, suggest
from biopsy.core.files import sha256_file
from biopsy.core.loaders import open_regular
from biopsy.core.tables import read_csv_table
from biopsy.core.text import normalize_id
from biopsy.data.archives import Archive, Entry, FolderArchive
from biopsy.data.datasets.base import (
    Dataset,
    Listing,
    Skipped,
    find_positive,
    make_table,
    register_dataset,
)
from biopsy.data.tables import normalize_cells
from biopsy.slide_io.annotations import SUFFIXES, read_annotations
from biopsy.slide_io.backends import SLIDE_SUFFIXES
from biopsy.slide_io.coverage import share_of_mask, share_of_polygon
from biopsy.slide_io.outlines import UNCLASSIFIED, WITHOUT_CLASS, Annotation, Annotations
from biopsy.slide_io.reader import Slide, open_slide
from biopsy.slide_io.resolution import AGREEING_MPP, check_mpp
from biopsy.slide_io.tissue import MIN_TISSUE_FRAC, find_tissue_of

logger = logging.getLogger(__name__)

REGION = "Region*"
NO_TISSUE, NOT_VALID, NO_CLASS, TWO_CLASSES = (
    "less than half tissue",
    "not wholly in the valid area",
    "no class covers enough",
    "more than one class covers enough",
)
_TOLERANCE = 1e-6  # fraction of a patch's area, for rounding errors at borders


@dataclass(frozen=True)
class Cutting:
    """How slides are cut and patches labelled; the fields are arguments of `prepare`."""

    mpp: float
    patch_px: int
    stride_px: int | None
    label_frac: float
    classes: tuple[str, ...] | None
    rest: str | None
    region: str
    slide_mpp: float | str | Path | None
    annotations: str | Path | None
    crop: bool

    def __post_init__(self) -> None:
        if self.patch_px < 1 or self.step_px < 1:
            raise DataError(f"patch_px={self.patch_px} and stride_px={self.stride_px} must be 1 or more")
        if not 0 < self.label_frac <= 1:
            raise DataError(f"label_frac={self.label_frac} must be above 0 and at most 1")

    @property
    def step_px(self) -> int:
        """Stride in pixels."""
        return self.patch_px if self.stride_px is None else self.stride_px

    @property
    def names(self) -> dict[str, str] | None:
        """Class name by annotated name, "" for ignored ones; None for the annotated names."""
        if self.classes is None:
            return None
        pairs = [part.partition("=") for part in self.classes]
        return {(annotated or name).strip(): name.strip() for name, _, annotated in pairs}

    def to_dict(self) -> dict[str, object]:
        """Return the parameters for ``pack.json``."""
        classes = None if self.classes is None else list(self.classes)
        paths = {"slide_mpp": self.slide_mpp, "annotations": self.annotations}
        texts = {name: str(value) if isinstance(value, Path) else value for name, value in paths.items()}
        return asdict(self) | {"classes": classes} | texts


@dataclass(frozen=True)
class Cut:
    """The labelled patches of one slide.

    Attributes:
        x: Left edges in pixels at ``mpp``, int ``(n,)``.
        y: Upper edges.
        target: Class index.
        share: Fraction of the patch covered by its class.
        left_out: Number of excluded patches by reason.
        areas: ``area_mm2`` of each class, and ``overlap_mm2`` of each pair.
    """

    x: np.ndarray
    y: np.ndarray
    target: np.ndarray
    share: np.ndarray
    left_out: dict[str, int]
    areas: dict[str, dict[str, float]]


def name_classes(all_notes: Sequence[Annotations], cutting: Cutting) -> list[str]:
    """Return the class names in order, ``rest_names`` first."""
    names = cutting.names
    if names is None:
        annotated = {name for notes in all_notes for name in notes.class_names()}
        result = sorted(name for name in annotated if not name.endswith("*") and name != cutting.region)
    else:
        result = list(dict.fromkeys(name for name in names.values() if name))
        for notes in all_notes:
            for area in notes.unclassified if UNCLASSIFIED not in names else []:
                if area.class_name and area.class_name in {*names, cutting.region}:
                    raise DataError(
                        f"{notes.path}, feature {area.feature} is called {area.class_name!r} and has no "
                        "class: set its class"
                    )
            for item in notes.items:
                name = item.class_name
                if name not in names and not name.endswith("*") and name != cutting.region:
                    raise DataError(
                        f"{notes.path}, feature {item.feature} is of class {name!r}, which is not in "
                        f"--classes ({suggest(name, names)}): add it, or ={name} to ignore its area"
                    )
    for notes in all_notes if cutting.rest is not None and UNCLASSIFIED not in (names or {}) else []:
        if areas := _list_childless(notes):
            raise DataError(
                f"{notes.path}: {len(areas)} areas have no class, feature {areas[0].feature} first, and "
                f"would be labelled {cutting.rest}: set their class, or --classes NAME={UNCLASSIFIED} "
                f"(={UNCLASSIFIED} to exclude them, {cutting.rest}={UNCLASSIFIED} to ignore their outlines)"
            )
    rest_names = [] if cutting.rest is None else [cutting.rest]
    class_names = [*rest_names, *(name for name in result if name != cutting.rest)]
    if len(class_names) < 2:
        raise DataError(
            f"there is only one class ({', '.join(class_names) or 'none'}): annotate another, or set "
            f"--rest, the class of unannotated tissue in {cutting.region}"
        )
    return class_names


def cut_slide(slide: Slide, notes: Annotations, class_names: Sequence[str], cutting: Cutting) -> Cut:
    """Cut a slide into labelled patches.

    Raises:
        DataError: If the annotations do not match the slide, or ``rest`` is set and there is no region.
        SlideError: If the slide has no tissue, lacks this resolution, or is smaller than a patch.
    """
    check_mpp(slide.path.name, slide.mpp, cutting.mpp, purpose="patches are requested")
    scale = slide.level_0_px(cutting.mpp)
    if notes.mpp is not None and abs(notes.mpp / slide.mpp - 1) > AGREEING_MPP:
        raise DataError(
            f"{notes.path} was drawn at {notes.mpp:.4g} um/px, {slide.path.name} has {slide.mpp:.4g}: check "
            "that it belongs to this slide"
        )
    if notes.from_bounds and cutting.crop:
        notes = notes.shift(*slide.corner)
    areas, valid = _collect_areas(notes, slide, class_names, cutting)
    side, step = cutting.patch_px * scale, cutting.step_px * scale
    left, top = (_edges(size, side, step) for size in (slide.width, slide.height))
    if not len(left) or not len(top):
        raise SlideError(
            f"{slide.path.name} is {slide.width * slide.mpp:.0f} x {slide.height * slide.mpp:.0f} um, "
            f"smaller than a patch of {side * slide.mpp:.0f} um: check its mpp"
        )
    inside = share_of_polygon(valid, left, top, side, side)
    shares = np.zeros((len(class_names), *inside.shape))
    for name, area in areas.items():
        shares[class_names.index(name)] = share_of_polygon(area, left, top, side, side)
    if cutting.rest is not None:
        covered = share_of_polygon(shapely.union_all(list(areas.values())), left, top, side, side)
        shares[class_names.index(cutting.rest)] += np.clip(inside - covered, 0, None)
    n_fitting = (shares >= cutting.label_frac - _TOLERANCE).sum(axis=0)
    has_tissue = _tissue_shares(slide, left, top, side) >= MIN_TISSUE_FRAC
    reasons = np.select(
        [~has_tissue, inside < 1 - _TOLERANCE, n_fitting == 0, n_fitting > 1],
        [NO_TISSUE, NOT_VALID, NO_CLASS, TWO_CLASSES],
        default="",
    )
    row, column = np.nonzero(reasons == "")
    target = shares[:, row, column].argmax(axis=0)
    names, counts = np.unique(reasons[reasons != ""], return_counts=True)
    return Cut(
        x=column * cutting.step_px,
        y=row * cutting.step_px,
        target=target,
        share=shares[target, row, column],
        left_out=dict(zip(names.tolist(), counts.tolist(), strict=True)),
        areas=_measure_areas(areas, (slide.mpp / 1000) ** 2),
    )


def _edges(size: int, side: float, step: float) -> np.ndarray:
    """Return the start positions of patches along one axis, each patch wholly inside the slide."""
    return np.arange(max(0, int((size - side) / step + 1e-6) + 1) if size >= side else 0) * step


def _tissue_shares(slide: Slide, left: np.ndarray, top: np.ndarray, side: float) -> np.ndarray:
    _, tissue = find_tissue_of(slide)
    across, down = tissue.shape[1] / slide.width, tissue.shape[0] / slide.height
    return share_of_mask(tissue, left * across, top * down, side * across, side * down)


def _collect_areas(
    notes: Annotations, slide: Slide, class_names: Sequence[str], cutting: Cutting
) -> tuple[dict[str, BaseGeometry], BaseGeometry]:
    """Return the area of each class and the valid area, within the slide."""
    bounds = shapely.box(0, 0, slide.width, slide.height)
    result: dict[str, list[BaseGeometry]] = {}
    for item in [*notes.items, *_name_unclassified(notes, cutting)]:
        if item.polygon.intersection(bounds).area < 0.5 * item.polygon.area:
            left, upper, right, lower = item.polygon.bounds
            raise DataError(
                f"{notes.path}, feature {item.feature} ({item.class_name}) lies at x {left:.0f} to "
                f"{right:.0f}, y {upper:.0f} to {lower:.0f}, mostly outside the {slide.width} x "
                f"{slide.height} px of {slide.path.name}: check that it belongs to this slide"
            )
        result.setdefault(item.class_name, []).append(item.polygon)
    united = {name: shapely.union_all(parts).intersection(bounds) for name, parts in result.items()}
    valid = united.pop(cutting.region, None)
    if valid is None:
        if cutting.rest is not None:
            raise DataError(
                f"{notes.path} has no annotation of class {cutting.region}, inside which unannotated "
                f"tissue is {cutting.rest!r}: outline the fully annotated area"
            )
        valid = bounds
    names = cutting.names or {name: name for name in class_names}
    areas: dict[str, BaseGeometry] = {}
    for annotated, area in united.items():
        name = names.get(annotated, "")
        if name:
            areas[name] = areas[name].union(area) if name in areas else area
        else:
            valid = valid.difference(area)
    return areas, valid


def _name_unclassified(notes: Annotations, cutting: Cutting) -> list[Annotation]:
    """Return the areas without a class that ``classes`` gives one, other than that of unannotated tissue."""
    name = (cutting.names or {}).get(UNCLASSIFIED)
    if name is None or name == cutting.rest:
        return []
    return [replace(area, class_name=UNCLASSIFIED) for area in notes.unclassified]


def _list_childless(notes: Annotations) -> list[Annotation]:
    """Return the areas without a class that hold none with one, as parents of QuPath's objects do."""
    tree = shapely.STRtree([item.polygon for item in notes.items])
    areas = np.array([area.polygon for area in notes.unclassified], dtype=object)
    parents, _ = tree.query(areas, predicate="contains")
    holding = set(parents.tolist())
    return [area for index, area in enumerate(notes.unclassified) if index not in holding]


def _measure_areas(areas: dict[str, BaseGeometry], mm2: float) -> dict[str, dict[str, float]]:
    """Return the area of each class and the overlap of each pair of classes in mm²."""
    overlaps = {
        f"{first} and {second}": areas[first].intersection(areas[second]).area * mm2
        for first, second in combinations(sorted(areas), 2)
    }
    return {
        "area_mm2": {name: area.area * mm2 for name, area in areas.items()},
        "overlap_mm2": {pair: area for pair, area in overlaps.items() if area > 1e-9},
    }


_SPELLINGS: tuple[Callable[[str], str], ...] = (
    lambda name: name,
    lambda name: name.rpartition(".")[0],
    lambda name: name.rpartition("/")[2],
    lambda name: name.rpartition("/")[2].rpartition(".")[0],
    lambda name: name.rpartition("/")[2].partition(".")[0],  # TCGA's slides: NAME.UUID.svs
)

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


def is_slide(path: Path) -> bool:
    """Return whether a path is a file that may be a slide, by its name."""
    return path.is_file() and path.suffix.lower() in SLIDE_SUFFIXES


def open_slides(path: Path | str) -> FolderArchive:
    """Open a folder of slides, or one slide, with annotations elsewhere."""
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


def list_patches(archive: Archive, cutting: Cutting) -> Listing:
    """Cut every annotated slide of a folder.

    Returns:
        The patches; ``origin["annotations"]`` has the cutting parameters, excluded patches by reason, and per
        slide mpp and its source, areas, overlaps, repaired and ignored features.

    Raises:
        DataError: If annotations are malformed, do not match their slide, or have an unnamed class or no
            required region.
        SlideError: If a slide cannot be read at this resolution.
    """
    if not isinstance(archive, FolderArchive):
        raise DataError(f"{archive.path} is not a folder of {LOOKS_FOR}")
    notes = _list_notes(archive, cutting.annotations)
    pairs, unmatched = _pair(archive.entries, list(notes), cutting.annotations)
    slides_of = Counter(_slide_id(slide) for slide, _ in pairs)
    twins = [slide.name for slide, _ in pairs if slides_of[_slide_id(slide)] > 1]
    pairs = [(slide, name) for slide, name in pairs if slide.name not in twins]
    unmatched += [{"source": name, "reason": "has the name of another slide: rename one"} for name in twins]
    if not pairs:
        first = "".join(f": {item['source']} {item['reason']}" for item in unmatched[:1])
        raise DataError(f"{archive.path} has no slides with annotations{first}")
    stated = _stated_mpp(cutting.slide_mpp, [slide.name for slide, _ in pairs])
    cases = {
        _slide_id(slide): _Case(archive.path_of(slide), slide.name, notes[name], name, stated[slide.name])
        for slide, name in pairs
    }
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
    return Listing(
        table=table,
        pixels=SlidePatches(table, cases, cutting),
        class_names=class_names,
        positive_class=others[0] if cutting.rest and len(others) == 1 else find_positive(class_names),
        mpp=cutting.mpp,
        skipped=unmatched,
        counts={"duplicates": 0, "left_out": sum(left_out.values())},
        origin={"annotations": {**cutting.to_dict(), "left_out": dict(left_out), "slides": records}},
    )


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
    ignored = {
        reason: count
        for reason, count in notes.ignored.items()
        if reason != WITHOUT_CLASS or not _name_unclassified(notes, cutting)
    }
    if ignored:
        counts = ", ".join(f"{count:,} {reason}" for reason, count in ignored.items())
        logger.warning("%s: excluded: %s", notes.path, counts)
    with open_slide(case.path, mpp=case.mpp) as slide:
        cut = cut_slide(slide, notes, class_names, cutting)
        record: dict[str, object] = {
            "annotations": case.notes,
            "mpp": slide.mpp,
            "mpp_source": slide.mpp_source,
        }
        record |= {"corner_px": list(slide.corner)} if any(slide.corner) else {}
    table = make_table(
        patch_id=[f"{slide_id}_x{x}_y{y}" for x, y in zip(cut.x, cut.y, strict=True)],
        slide_id=slide_id,
        x=cut.x,
        y=cut.y,
        class_name=np.array(class_names, object)[cut.target],
        source=case.name,
        label_share=cut.share,
    )
    record |= {"features": len(notes.items), "repaired": sorted(notes.repaired), "ignored": ignored}
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


SLIDES = register_dataset(
    Dataset(
        name="annotated-slides",
        title="Slides with annotations beside them, as QuPath exports them",
        looks_for=LOOKS_FOR,
        recognise=recognise,
        list_patches=list_patches,
        expected={},
        mpp=None,
        citation="",
        licence="that of your data",
        cuts_slides=True,
    )
)
