"""Output files and summary of one mapped slide."""

import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import cv2
import numpy as np
from pydantic import ConfigDict
from typing_extensions import TypedDict

from biopsy.core.errors import DataError
from biopsy.core.files import read_json, write_atomic, write_json
from biopsy.core.loaders import validate
from biopsy.core.plugins import Registry
from biopsy.core.text import class_title
from biopsy.models.out_of_distribution import ood_warning
from biopsy.slide_io.mosaic import paste
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
"""Probabilities of the lower and upper area of positive cells."""


class ClassArea(TypedDict):
    """Area of one class, its fraction of the mapped area, and its regions."""

    area_mm2: float
    share: float
    n_regions: int
    largest_region_mm2: float


class PositiveArea(TypedDict):
    """Area predicted positive, and its expectation and range if calibrated (else None, with the reason)."""

    class_name: str | None
    threshold: float | None
    area_mm2: float
    expected_mm2: float | None
    low_mm2: float | None
    high_mm2: float | None
    reason: str | None


class OutOfDistributionShare(TypedDict):
    """Fraction of the checked patches that are out of distribution, and the quantile of the limit."""

    n_checked: int
    share: float
    quantile: float


class SlideSummary(TypedDict, total=False):
    """Content of ``summary.json``, besides provenance."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    slide: str
    warning: str | None
    source: str
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


UNRELIABLE = " (not to be relied on)"
"""After an area of a slide with such a warning."""


def warn_of_areas(share: float, quantile: float) -> str | None:
    """Return a warning if too many patches are out of distribution for areas to be relied on, else None.

    Args:
        share: Fraction of the checked patches that are out of distribution; nan if none was checked.
        quantile: Validation quantile of the limit.
    """
    warning = ood_warning(share, quantile)
    return f"{warning}, and areas are not to be relied on" if warning else None


class Confusion(TypedDict):
    """A map of two classes compared with the annotated class of its patches."""

    n_positive: int
    auroc: float | None
    tp: int
    fp: int
    fn: int
    tn: int


def summarise(slide_map: SlideMap, regions: Sequence[Region], *, is_calibrated: bool) -> SlideSummary:
    """Return areas in mm² and fractions of the mapped area.

    ``positive`` is the area predicted positive and, if probabilities are calibrated, its expectation
    ``expected_mm2`` (sum of the probabilities) and the areas with probability of at least .9 (``low_mm2``)
    and .1 (``high_mm2``).
    """
    pred, cell_mm2 = slide_map.cells_pred(), slide_map.cell_mm2
    n_cells = int((pred != -1).sum())
    classes = {}
    for index, name in enumerate(slide_map.class_names):
        class_regions = [region for region in regions if region.class_name == name]
        classes[name] = ClassArea(
            area_mm2=float((pred == index).sum() * cell_mm2),
            share=float((pred == index).sum() / n_cells),
            n_regions=len(class_regions),
            largest_region_mm2=max((region.area_mm2 for region in class_regions), default=0.0),
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
    from sklearn.metrics import confusion_matrix, roc_auc_score  # slow import

    positive = slide_map.positive_index
    assert positive is not None
    is_positive, prob = target == positive, slide_map.probs[:, positive]
    y_pred = prob >= np.float32(slide_map.threshold if slide_map.threshold is not None else 0.5)
    tn, fp, fn, tp = confusion_matrix(is_positive, y_pred, labels=[False, True]).ravel().tolist()
    auroc = float(roc_auc_score(is_positive, prob)) if 0 < tp + fn < len(prob) else None
    return Confusion(n_positive=tp + fn, auroc=auroc, tp=tp, fp=fp, fn=fn, tn=tn)


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
_TISSUE_PX = 1024  # longer side of the tissue picture
_HEATMAP_PX = 1024  # approximate longer side of the heat map, reached by enlarging cells


@dataclass(frozen=True)
class MappedSlide:
    """A mapped slide, input of the outputs.

    Attributes:
        slide_map: The map, with its picture.
        tissue: Tissue mask of the picture's size; None if tissue was not detected.
        target: Annotated class of each patch; None if unknown.
        detections: Whether to write each cell as a QuPath detection.
    """

    slide_map: SlideMap
    tissue: np.ndarray | None = None
    target: np.ndarray | None = None
    detections: bool = False

    @functools.cached_property
    def regions(self) -> list[Region]:
        """Regions of the map, see `find_regions`."""
        return find_regions(self.slide_map)


Write = Callable[[Path, MappedSlide], Mapping[str, object] | None]


class Output(NamedTuple):
    """Function that writes an output file, and whether it uses matplotlib."""

    write: Write
    draws: bool


OUTPUTS: Registry[Output] = Registry("biopsy.slide_outputs", "biopsy.slides", ("outputs.py", "*_output.py"))


def slide_output(file: str, *, draws: bool = False) -> Callable[[Write], Write]:
    """Register a function that writes an output file of a slide, if applicable.

    The entries it returns are added to ``summary.json``.

    Args:
        draws: Whether it uses matplotlib; these functions run in one thread.
    """

    def register(write: Write) -> Write:
        OUTPUTS.add(file, Output(write, draws), write)
        return write

    return register


def list_files() -> list[str]:
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
    slide_map = mapped.slide_map
    with ThreadPoolExecutor(1) as painter:
        drawing = [
            painter.submit(output.write, folder / file, mapped)
            for file, output in OUTPUTS.items()
            if output.draws
        ]
        result = [output.write(folder / file, mapped) for file, output in OUTPUTS.items() if not output.draws]
        result += [item.result() for item in drawing]
    checked = cast(OutOfDistributionShare | None, slide_map.about.get("out_of_distribution"))
    document = {
        "format": FORMAT,
        "slide": slide_map.name,
        "warning": checked and warn_of_areas(checked["share"], checked["quantile"]),
        **slide_map.about,
        **summarise(slide_map, mapped.regions, is_calibrated=is_calibrated),
        **{key: value for entries in result if entries for key, value in entries.items()},
        "request": dict(request),
    }
    write_json(folder / SUMMARY, document)  # last, since it marks the outputs as complete
    return cast(SlideSummary, document)


def _shrink(picture: np.ndarray, tissue: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    zoom = min(1.0, _TISSUE_PX / max(tissue.shape))
    size = max(1, round(tissue.shape[1] * zoom)), max(1, round(tissue.shape[0] * zoom))
    mask = cv2.resize(tissue.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA), mask


def read_summary(folder: Path) -> SlideSummary:
    """Return the content of ``summary.json``.

    Raises:
        FileFormatError: If it is missing, invalid or was changed.
    """
    path = folder / SUMMARY
    return validate(path, SlideSummary, read_json(path, format=FORMAT))


def read_finished(folder: Path, request: Mapping[str, object]) -> SlideSummary | None:
    """Return the summary of a slide if its outputs are complete and of this request, else None."""
    try:
        summary = read_summary(folder)
    except (OSError, DataError):
        return None
    return summary if summary.get("request") == dict(request) else None


@functools.cache
def prepare_to_draw() -> None:
    """Import matplotlib and load fonts in advance, which takes most of a second."""
    from biopsy.plotting.slides import draw_overlay
    from biopsy.plotting.style import png

    blank = np.zeros((9, 9), np.uint8)
    corners = (0.0, 9.0, 9.0, 0.0)
    png(draw_overlay(np.stack([blank] * 3, axis=2), None, blank, corners, um_per_px=1, class_names=["none"]))


def draw(slide_map: SlideMap) -> Any:
    """Draw the map over the picture of the slide.

    Raises:
        DataError: If the map has no picture, as maps read from a file.
    """
    from biopsy.plotting.slides import draw_overlay

    if slide_map.picture is None:
        raise DataError(f"the map of {slide_map.name} has no picture of the slide")
    grid, positive = slide_map.grid, slide_map.positive_index
    rows, columns = grid.shape
    to_picture = slide_map.picture.shape[1] / grid.width
    left, top = (offset * grid.scale * to_picture for offset in grid.origin_px)
    cell = slide_map.cell_px * to_picture
    return draw_overlay(
        slide_map.picture,
        None if positive is None else slide_map.cells()[..., positive],
        slide_map.cells_pred(),
        (left, left + columns * cell, top + rows * cell, top),
        um_per_px=grid.slide_mpp / to_picture,
        class_names=[class_title(name) for name in slide_map.class_names],
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
    left, top = (round(offset * grid.scale * zoom) for offset in grid.origin_px)
    bottom, right = (round(n * slide_map.cell_px * zoom) for n in (rows, columns))
    return draw_slide(
        slide_map.picture[top : top + bottom, left : left + right],
        annotated,
        slide_map.cells()[..., positive],
        um_per_cell=grid.cell_um,
        class_names=[class_title(slide_map.class_names[index]) for index in (1 - positive, positive)],
        threshold=slide_map.threshold,
        panels=ALL_PANELS,
    )


@slide_output(HEATMAP)
def _write_heatmap(path: Path, mapped: MappedSlide) -> None:
    """Write the map of the whole slide as a pyramidal TIFF with its mpp."""
    from biopsy.plotting.slides import colour_classes, colour_probs

    slide_map = mapped.slide_map
    grid, positive, pred = slide_map.grid, slide_map.positive_index, slide_map.cells_pred()
    if positive is None:
        colours = colour_classes(pred, len(slide_map.class_names))
    else:
        colours = colour_probs(slide_map.cells()[..., positive], pred)
    zoom = max(1, round(_HEATMAP_PX / (max(grid.width, grid.height) / slide_map.cell_px)))
    step = slide_map.cell_px / zoom  # level-0 pixels per pixel of the heat map
    image = np.full((round(grid.height / step), round(grid.width / step), 3), 255, np.uint8)
    left, top = (round(offset * grid.scale / step) for offset in grid.origin_px)
    cells = cv2.resize(colours, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_NEAREST)
    paste(image, cells, left, top)
    height, width = image.shape[:2]
    write_pyramid(path, image, width=width, height=height, mpp=grid.slide_mpp * step, compression="deflate")
