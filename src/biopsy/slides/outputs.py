"""The files of one mapped slide, and the slide in numbers."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, NamedTuple, TypedDict, cast

import cv2
import numpy as np

from biopsy.core.errors import DataError
from biopsy.core.files import read_json, write_atomic, write_json
from biopsy.core.plugins import Registry
from biopsy.slide_io.pyramids import write_pyramid
from biopsy.slides.maps import (
    Region,
    SlideMap,
    collect_detections,
    collect_regions,
    find_regions,
    write_geojson,
)

SURE, POSSIBLE = 0.9, 0.1
"""Probabilities between which calibration leaves open whether a cell is positive."""


class ClassArea(TypedDict):
    """Area of the cells of one class, its share of what was mapped, and its regions."""

    area_mm2: float
    share: float
    n_regions: int
    largest_region_mm2: float


class PositiveArea(TypedDict):
    """Area called positive, and what calibrated probabilities say of it (else None, with the reason)."""

    class_name: str | None
    threshold: float | None
    area_mm2: float
    expected_mm2: float | None
    low_mm2: float | None
    high_mm2: float | None
    reason: str | None


class OutOfDistributionShare(TypedDict):
    """Share of the checked patches that are out of distribution, and the quantile of the limit."""

    n_checked: int
    share: float
    quantile: float


class SlideSummary(TypedDict, total=False):
    """What ``summary.json`` holds beside how the map was made."""

    slide: str
    n_patches: int
    n_cells: int
    cell_um: float
    mapped_mm2: float
    classes: dict[str, ClassArea]
    abstained_share: float
    positive: PositiveArea | None
    out_of_distribution: OutOfDistributionShare | None
    mpp: dict[str, float | str | None]
    request: dict[str, object]


class Confusion(TypedDict):
    """A map of two classes compared with the annotated class of its patches."""

    n_positive: int
    auroc: float | None
    tp: int
    fp: int
    fn: int
    tn: int


def summarise(slide_map: SlideMap, regions: Sequence[Region], *, is_calibrated: bool) -> SlideSummary:
    """Return areas in mm2 and shares of what was mapped.

    ``positive`` holds the area called positive at the threshold and, where probabilities are calibrated,
    ``expected_mm2`` (the sum of the probabilities: their expectation) and the range from the area
    that is positive with probability .9 or more (``low_mm2``) to that with .1 or more (``high_mm2``).

    Args:
        regions: Its regions, as `find_regions` gives them.
        is_calibrated: Whether the classifier's probabilities were calibrated on patients of their own.
    """
    pred, cell_mm2 = slide_map.cells_pred(), slide_map.cell_mm2
    n_cells = int((pred != -1).sum())
    classes = {}
    for index, name in enumerate(slide_map.class_names):
        own = [region for region in regions if region.class_name == name]
        classes[name] = ClassArea(
            area_mm2=float((pred == index).sum() * cell_mm2),
            share=float((pred == index).sum() / n_cells),
            n_regions=len(own),
            largest_region_mm2=max((region.area_mm2 for region in own), default=0.0),
        )
    return SlideSummary(
        n_patches=len(slide_map),
        n_cells=n_cells,
        cell_um=slide_map.grid.cell_um,
        mapped_mm2=n_cells * cell_mm2,
        classes=classes,
        abstained_share=float((pred == -2).sum() / n_cells),
        positive=_measure_positive(slide_map, pred, is_calibrated),
    )


def compare_with_target(slide_map: SlideMap, target: np.ndarray) -> Confusion:
    """Compare a map of two classes with the annotated class of its patches, ``(n_patches,)``."""
    from sklearn.metrics import roc_auc_score  # imports for a second

    positive = slide_map.positive_index
    assert positive is not None
    is_positive, prob = target == positive, slide_map.probs[:, positive]
    called = prob >= np.float32(slide_map.threshold if slide_map.threshold is not None else 0.5)
    return Confusion(
        n_positive=int(is_positive.sum()),
        auroc=float(roc_auc_score(is_positive, prob)) if len(set(is_positive.tolist())) == 2 else None,
        tp=int((called & is_positive).sum()),
        fp=int((called & ~is_positive).sum()),
        fn=int((~called & is_positive).sum()),
        tn=int((~called & ~is_positive).sum()),
    )


def _measure_positive(slide_map: SlideMap, pred: np.ndarray, is_calibrated: bool) -> PositiveArea | None:
    positive = slide_map.positive_index
    if positive is None:
        return None
    prob = slide_map.cells()[..., positive]
    prob, cell_mm2 = prob[~np.isnan(prob)], slide_map.cell_mm2
    return PositiveArea(
        class_name=slide_map.positive_class,
        threshold=slide_map.threshold,
        area_mm2=float((pred == positive).sum() * cell_mm2),
        expected_mm2=float(prob.sum(dtype=float) * cell_mm2) if is_calibrated else None,
        low_mm2=float((prob >= SURE).sum() * cell_mm2) if is_calibrated else None,
        high_mm2=float((prob >= POSSIBLE).sum() * cell_mm2) if is_calibrated else None,
        reason=None if is_calibrated else "the classifier's probabilities are not calibrated",
    )


FORMAT: Final = "biopsy-slide/1"
MAP, SUMMARY, OVERLAY, TISSUE = "map.parquet", "summary.json", "overlay.png", "tissue.jpg"
REGIONS, DETECTIONS, HEATMAP = "regions.geojson", "detections.geojson", "heatmap.tiff"
PANELS = "panels.png"
_TISSUE_PX = 1024  # longer side of the picture of the tissue mask
_HEATMAP_PX = 1024  # cells are drawn larger until the heat map's longer side is about this long


@dataclass(frozen=True)
class MappedSlide:
    """The map of one slide, and what else its outputs are made of.

    Attributes:
        slide_map: The map, with its picture.
        tissue: The tissue mask, bool, of the picture's size; None where tissue was not sought.
        target: Annotated class of each patch; None where it is not known.
        detections: Whether each cell is written as a QuPath detection.
    """

    slide_map: SlideMap
    tissue: np.ndarray | None = None
    target: np.ndarray | None = None
    detections: bool = False

    @cached_property
    def regions(self) -> list[Region]:
        """The regions of the map, as `find_regions` gives them."""
        return find_regions(self.slide_map)


Write = Callable[[Path, MappedSlide], Mapping[str, object] | None]


class Output(NamedTuple):
    """A file of a slide's outputs: how it is written, and whether matplotlib draws it."""

    write: Write
    draws: bool


OUTPUTS: Registry[Output] = Registry("biopsy.slide_outputs", "biopsy.slides", ("outputs.py", "*_output.py"))


def slide_output(file: str, *, draws: bool = False) -> Callable[[Write], Write]:
    """Register a function that writes a file of a slide's outputs, or nothing where it does not apply.

    What it returns, by name, is added to ``summary.json``.

    Args:
        draws: Whether matplotlib draws it: such files are written by a thread of their own.
    """

    def register(write: Write) -> Write:
        OUTPUTS.add(file, Output(write, draws), write)
        return write

    return register


def list_files() -> list[str]:
    """Return the names of all files that may be written for a slide."""
    return [SUMMARY, *OUTPUTS]


@slide_output(MAP)
def _write_map(path: Path, mapped: MappedSlide) -> None:
    mapped.slide_map.to_parquet(path)


@slide_output(OVERLAY, draws=True)
def _write_overlay(path: Path, mapped: MappedSlide) -> None:
    from biopsy.plotting.style import png

    write_atomic(path, png(draw(mapped.slide_map), dpi=160))


@slide_output(REGIONS)
def _write_regions(path: Path, mapped: MappedSlide) -> None:
    write_geojson(path, collect_regions(mapped.slide_map, mapped.regions))


@slide_output(DETECTIONS)
def _write_detections(path: Path, mapped: MappedSlide) -> None:
    if mapped.detections:
        write_geojson(path, collect_detections(mapped.slide_map))


@slide_output(TISSUE)
def _write_tissue(path: Path, mapped: MappedSlide) -> dict[str, float] | None:
    from biopsy.plotting.slides import outline_tissue
    from biopsy.plotting.style import jpeg

    picture, tissue, grid = mapped.slide_map.picture, mapped.tissue, mapped.slide_map.grid
    if tissue is None or picture is None:
        return None
    write_atomic(path, jpeg(outline_tissue(*_shrink(picture, tissue))))
    share = float(tissue.mean())
    area_mm2 = grid.width * grid.height * (grid.slide_mpp / 1000) ** 2
    return {"tissue_mm2": share * area_mm2, "tissue_share": share}


@slide_output(PANELS, draws=True)
def _write_panels(path: Path, mapped: MappedSlide) -> dict[str, Confusion] | None:
    from biopsy.plotting.style import png

    if mapped.target is None or mapped.slide_map.positive_index is None:
        return None
    write_atomic(path, png(draw_panels(mapped.slide_map, mapped.target), dpi=200))
    return {"annotated": compare_with_target(mapped.slide_map, mapped.target)}


def write_outputs(
    folder: Path, mapped: MappedSlide, *, is_calibrated: bool, request: Mapping[str, object]
) -> SlideSummary:
    """Write everything that is known of one slide into an empty folder.

    Args:
        folder: An existing folder.
        request: What defines the outputs: for an equal request they are not made again.
    """
    slide_map = mapped.slide_map
    with ThreadPoolExecutor(1) as painter:
        drawing = [
            painter.submit(output.write, folder / file, mapped)
            for file, output in OUTPUTS.items()
            if output.draws
        ]
        result = [output.write(folder / file, mapped) for file, output in OUTPUTS.items() if not output.draws]
        result += [item.result() for item in drawing]
    document = {
        "format": FORMAT,
        "slide": slide_map.name,
        **slide_map.about,
        **summarise(slide_map, mapped.regions, is_calibrated=is_calibrated),
        **{key: value for entries in result if entries for key, value in entries.items()},
        "request": dict(request),
    }
    write_json(folder / SUMMARY, document)  # the last of all
    return cast(SlideSummary, document)


def _shrink(picture: np.ndarray, tissue: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    zoom = min(1.0, _TISSUE_PX / max(tissue.shape))
    size = max(1, round(tissue.shape[1] * zoom)), max(1, round(tissue.shape[0] * zoom))
    mask = cv2.resize(tissue.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA), mask


def read_finished(folder: Path, request: Mapping[str, object]) -> SlideSummary | None:
    """Return a slide's summary if its outputs are there and are those of this request, else None."""
    try:
        document = read_json(folder / SUMMARY, format=FORMAT)
    except (OSError, DataError):
        return None
    return cast(SlideSummary, document) if document.get("request") == dict(request) else None


def prepare_to_draw() -> None:
    """Load what draws, with its fonts: most of a second that a thread can spend while slides are read."""
    from biopsy.plotting.slides import draw_overlay
    from biopsy.plotting.style import png

    blank = np.zeros((9, 9), np.uint8)
    corners = (0.0, 9.0, 9.0, 0.0)
    png(draw_overlay(np.stack([blank] * 3, axis=2), None, blank, corners, um_per_px=1, class_names=["none"]))


def draw(slide_map: SlideMap) -> Any:
    """Draw the map over the slide's picture, as a matplotlib figure.

    Raises:
        DataError: If the map has no picture (one that was read from a file has none).
    """
    from biopsy.plotting.slides import draw_overlay

    if slide_map.picture is None:
        raise DataError(f"the map of {slide_map.name} holds no picture of the slide to draw on")
    grid, positive = slide_map.grid, slide_map.positive_index
    rows, columns = grid.shape
    to_picture = slide_map.picture.shape[1] / grid.width
    left, top = (place * grid.scale * to_picture for place in grid.origin_px)
    cell = slide_map.cell_px * to_picture
    return draw_overlay(
        slide_map.picture,
        None if positive is None else slide_map.cells()[..., positive],
        slide_map.cells_pred(),
        (left, left + columns * cell, top + rows * cell, top),
        um_per_px=grid.slide_mpp / to_picture,
        class_names=slide_map.class_names,
        positive=positive,
        threshold=slide_map.threshold,
        title=slide_map.name,
    )


def draw_panels(slide_map: SlideMap, target: np.ndarray) -> Any:
    """Draw tissue, annotated class, probability and errors side by side."""
    from biopsy.plotting.slides import ALL_PANELS, draw_slide

    grid, positive = slide_map.grid, slide_map.positive_index
    assert positive is not None and slide_map.picture is not None
    rows, columns = grid.shape
    annotated = np.full((rows, columns), np.nan)
    annotated[grid.row, grid.column] = target == positive
    zoom = slide_map.picture.shape[1] / grid.width
    left, top = (round(place * grid.scale * zoom) for place in grid.origin_px)
    bottom, right = (round(n * slide_map.cell_px * zoom) for n in (rows, columns))
    return draw_slide(
        slide_map.picture[top : top + bottom, left : left + right],
        annotated,
        slide_map.cells()[..., positive],
        um_per_cell=grid.cell_um,
        class_names=(slide_map.class_names[1 - positive], slide_map.class_names[positive]),
        threshold=slide_map.threshold,
        panels=ALL_PANELS,
    )


@slide_output(HEATMAP)
def _write_heatmap(path: Path, mapped: MappedSlide) -> None:
    """Write the map as a pyramidal TIFF over the whole slide, its mpp in it."""
    from biopsy.plotting.slides import colour_classes, colour_probs

    slide_map = mapped.slide_map
    grid, positive, pred = slide_map.grid, slide_map.positive_index, slide_map.cells_pred()
    if positive is None:
        colours = colour_classes(pred, len(slide_map.class_names))
    else:
        colours = colour_probs(slide_map.cells()[..., positive], pred)
    zoom = max(1, round(_HEATMAP_PX / (max(grid.width, grid.height) / slide_map.cell_px)))
    step = slide_map.cell_px / zoom  # level-0 pixels in a pixel of the heat map
    image = np.full((round(grid.height / step), round(grid.width / step), 3), 255, np.uint8)
    left, top = (round(place * grid.scale / step) for place in grid.origin_px)
    cells = cv2.resize(colours, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_NEAREST)
    room = image[top : top + cells.shape[0], left : left + cells.shape[1]]
    room[:] = cells[: room.shape[0], : room.shape[1]]
    height, width = image.shape[:2]
    write_pyramid(path, image, width=width, height=height, mpp=grid.slide_mpp * step, compression="deflate")
