"""Cutting of annotated slides into labelled patches.

The rules, recorded in ``pack.json`` with their parameters:

* Patches are on a grid with stride ``stride_px`` from the slide's corner at the requested resolution, wholly
  inside the slide, as for maps.
* If the slide has areas of the class ``Region*``, a patch is wholly inside them. It is wholly outside ignored
  areas: classes that end in ``*``, such as QuPath's ``Ignore*``, or follow an empty name in ``classes``.
* At least half of a patch is tissue, as for maps.
* The class of a patch is the only one that covers at least ``label_frac`` of it; patches with no such class,
  or several, are excluded. ``rest`` is the class of unannotated tissue in the valid area (default: excluded).

Excluded patches are counted by reason.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import shapely
from shapely.geometry.base import BaseGeometry

from biopsy.core.errors import DataError, SlideError, suggest
from biopsy.slide_io.annotations import Annotations
from biopsy.slide_io.coverage import share_of_mask, share_of_polygon
from biopsy.slide_io.reader import Slide
from biopsy.slide_io.resolution import AGREEING_MPP, check_mpp
from biopsy.slide_io.tissue import MIN_TISSUE_FRAC, find_tissue_of

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
    """How slides are cut and patches labelled.

    Attributes:
        mpp: Pixel size of the patches in µm.
        patch_px: Side of the patches in pixels.
        stride_px: Stride in pixels (default: ``patch_px``).
        label_frac: Minimum fraction of a patch covered by its class, in (0, 1].
        classes: ``NAME=ANNOTATED`` for each class, or a name alone; ``=ANNOTATED`` is ignored. Several
            annotated classes may have one name (default: the annotated names).
        rest: Class of unannotated tissue in the valid area (default: excluded).
        region: Annotation class that outlines the fully annotated area.
        slide_mpp: Pixel size in µm of slides that do not record it: a number, or a csv with ``slide, mpp``.
        annotations: Folder of annotation files, or one file (default: beside the slides).
        crop: Whether QuPath cropped slides to their scanned bounds on export.

    Raises:
        DataError: If a number is out of range.
    """

    mpp: float
    patch_px: int
    stride_px: int | None = None
    label_frac: float = 0.5
    classes: tuple[str, ...] | None = None
    rest: str | None = None
    region: str = REGION
    slide_mpp: float | str | Path | None = None
    annotations: str | Path | None = None
    crop: bool = True

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
    """Return the class names in order, ``rest_names`` first.

    Raises:
        DataError: If an annotated class is not in ``classes``, or there is only one class.
    """
    names = cutting.names
    if names is None:
        annotated = {name for notes in all_notes for name in notes.class_names()}
        result = sorted(name for name in annotated if not name.endswith("*") and name != cutting.region)
    else:
        result = list(dict.fromkeys(name for name in names.values() if name))
        for notes in all_notes:
            for number, name in notes.unclassified.items():
                if name and name in {*names, cutting.region}:
                    raise DataError(
                        f"{notes.path}, feature {number} is called {name!r} and has no class: set its class"
                    )
            for item in notes.items:
                name = item.class_name
                if name not in names and not name.endswith("*") and name != cutting.region:
                    raise DataError(
                        f"{notes.path}, feature {item.feature} is of class {name!r}, which is not in "
                        f"--classes ({suggest(name, names)}): add it, or ={name} to ignore its area"
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

    Args:
        class_names: Classes of all slides, see `name_classes`.

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
    for item in notes.items:
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
