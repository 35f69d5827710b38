"""Where patches lie on an annotated slide, and which class each is of.

The rules, which ``pack.json`` records with their numbers:

* Patches lie side by side, or at ``stride_px``, on a grid from the slide's corner at the wanted mpp and
  wholly inside the slide: the grid on which slides are mapped.
* A label is valid only where somebody looked. Where the slide has areas of the class ``Region*``, a patch
  lies wholly inside them; it lies wholly outside areas that are to be ignored: classes that end in ``*``, as
  QuPath's ``Ignore*``, or that stand after an empty name in ``classes``.
* At least half of a patch is tissue, as for maps.
* A patch is of the one class that covers at least ``label_frac`` of it. None does: it is left out. More than
  one does, because annotations overlap or each covers half: it is left out. ``rest`` is the class of what is
  valid and in no annotation; without it that has no label.

What is left out is counted by these reasons.
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
_TOUCHING = 1e-6  # of a patch's area: what lies this close to a border lies on it


@dataclass(frozen=True)
class Cutting:
    """How slides are cut and patches labelled.

    Attributes:
        mpp: Micrometres per pixel of the patches.
        patch_px: Their side in such pixels.
        stride_px: Step of the grid; None for ``patch_px``.
        label_frac: Share of a patch that its class must cover, in (0, 1].
        classes: ``NAME=ANNOTATED`` for each class, or a name alone; ``=ANNOTATED`` is to be ignored. Several
            may go to one name. None takes the names as they were annotated.
        rest: Class of what is in the valid area and was not annotated; None leaves it out.
        region: Annotated class that limits where labels are valid.
        slide_mpp: Micrometres per pixel of slides that do not say: a number, or a csv with ``slide, mpp``.
        annotations: A folder of annotation files, or one file; None for those beside the slides.
        crop: Whether QuPath cropped slides to what was scanned, as it does unless it is told ``--no-crop``.

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
            raise DataError(f"label_frac={self.label_frac} is no share of a patch: above 0, at most 1")

    @property
    def step_px(self) -> int:
        """Step of the grid in pixels of the patches."""
        return self.patch_px if self.stride_px is None else self.stride_px

    @property
    def names(self) -> dict[str, str] | None:
        """Annotated name -> class name; an empty one is to be ignored. None takes all as they are."""
        if self.classes is None:
            return None
        pairs = [part.partition("=") for part in self.classes]
        return {(annotated or name).strip(): name.strip() for name, _, annotated in pairs}

    def to_dict(self) -> dict[str, object]:
        """Return what ``pack.json`` records."""
        classes = None if self.classes is None else list(self.classes)
        paths = {"slide_mpp": self.slide_mpp, "annotations": self.annotations}
        texts = {name: str(value) if isinstance(value, Path) else value for name, value in paths.items()}
        return asdict(self) | {"classes": classes} | texts


@dataclass(frozen=True)
class Cut:
    """The patches of one slide that have a label.

    Attributes:
        x: Left edges in pixels of the patches, int ``(n,)``.
        y: Upper edges.
        target: Index of the class.
        share: Share of the patch that its class covers.
        left_out: Patches without a label, by reason.
        areas: ``area_mm2`` of each class, and ``overlap_mm2`` of each two.
    """

    x: np.ndarray
    y: np.ndarray
    target: np.ndarray
    share: np.ndarray
    left_out: dict[str, int]
    areas: dict[str, dict[str, float]]


def name_classes(all_notes: Sequence[Annotations], cutting: Cutting) -> list[str]:
    """Return the classes in order, ``rest`` first.

    Raises:
        DataError: If an annotation is of a class that ``classes`` does not name, or there is only one.
    """
    names = cutting.names
    if names is None:
        every = {name for notes in all_notes for name in notes.class_names()}
        result = sorted(name for name in every if not name.endswith("*") and name != cutting.region)
    else:
        result = list(dict.fromkeys(name for name in names.values() if name))
        for notes in all_notes:
            for item in notes.items:
                name = item.class_name
                if name not in names and not name.endswith("*") and name != cutting.region:
                    raise DataError(
                        f"{notes.path}, feature {item.feature} is of class {name!r}, which --classes does "
                        f"not name ({suggest(name, names)}): name it, or ={name} to leave its area out"
                    )
    rest = [] if cutting.rest is None else [cutting.rest]
    class_names = [*rest, *(name for name in result if name != cutting.rest)]
    if len(class_names) < 2:
        raise DataError(
            f"there is only one class ({', '.join(class_names) or 'none'}): annotate another, or name with "
            f"--rest what lies in {cutting.region} and in no annotation"
        )
    return class_names


def cut_slide(slide: Slide, notes: Annotations, class_names: Sequence[str], cutting: Cutting) -> Cut:
    """Lay the grid over a slide and label its patches.

    Args:
        class_names: Of all slides, see `name_classes`.

    Raises:
        DataError: If the annotations are another slide's, or there is no region where ``rest`` needs one.
        SlideError: If the slide has no tissue, or not this resolution, or is smaller than a patch.
    """
    check_mpp(slide.path.name, slide.mpp, cutting.mpp, purpose="patches are wanted")
    scale = slide.level_0_px(cutting.mpp)
    if notes.mpp is not None and abs(notes.mpp / slide.mpp - 1) > AGREEING_MPP:
        raise DataError(
            f"{notes.path} was drawn at {notes.mpp:.4g} um/px, {slide.path.name} has {slide.mpp:.4g}: is it "
            "another slide's?"
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
    n_fitting = (shares >= cutting.label_frac - _TOUCHING).sum(axis=0)
    has_tissue = _tissue_shares(slide, left, top, side) >= MIN_TISSUE_FRAC
    reasons = np.select(
        [~has_tissue, inside < 1 - _TOUCHING, n_fitting == 0, n_fitting > 1],
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
    """Return where patches begin along one side of the slide, so that each ends inside it."""
    return np.arange(max(0, int((size - side) / step + 1e-6) + 1) if size >= side else 0) * step


def _tissue_shares(slide: Slide, left: np.ndarray, top: np.ndarray, side: float) -> np.ndarray:
    _, tissue = find_tissue_of(slide)
    across, down = tissue.shape[1] / slide.width, tissue.shape[0] / slide.height
    return share_of_mask(tissue, left * across, top * down, side * across, side * down)


def _collect_areas(
    notes: Annotations, slide: Slide, class_names: Sequence[str], cutting: Cutting
) -> tuple[dict[str, BaseGeometry], BaseGeometry]:
    """Return the area of each class, and where labels are valid, within the slide."""
    whole = shapely.box(0, 0, slide.width, slide.height)
    result: dict[str, list[BaseGeometry]] = {}
    for item in notes.items:
        if item.polygon.intersection(whole).area < 0.5 * item.polygon.area:
            left, upper, right, lower = item.polygon.bounds
            raise DataError(
                f"{notes.path}, feature {item.feature} ({item.class_name}) lies at x {left:.0f} to "
                f"{right:.0f}, y {upper:.0f} to {lower:.0f}, mostly outside the {slide.width} x "
                f"{slide.height} px of {slide.path.name}: is it another slide's?"
            )
        result.setdefault(item.class_name, []).append(item.polygon)
    united = {name: shapely.union_all(parts).intersection(whole) for name, parts in result.items()}
    valid = united.pop(cutting.region, None)
    if valid is None:
        if cutting.rest is not None:
            raise DataError(
                f"{notes.path} has no annotation of class {cutting.region}: what is not annotated is "
                f"{cutting.rest!r} only inside one; draw a box around what was looked at"
            )
        valid = whole
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
    """Return the area of each class, and by how much two overlap, where they do."""
    overlaps = {
        f"{one} and {other}": areas[one].intersection(areas[other]).area * mm2
        for one, other in combinations(sorted(areas), 2)
    }
    return {
        "area_mm2": {name: area.area * mm2 for name, area in areas.items()},
        "overlap_mm2": {pair: area for pair, area in overlaps.items() if area > 1e-9},
    }
