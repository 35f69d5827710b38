"""The files of one mapped slide, each with nothing in it that would differ if the slide were mapped again."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np

from biopsy.core.errors import DataError
from biopsy.core.files import read_json, write_atomic, write_json
from biopsy.imaging.pyramids import write_pyramid
from biopsy.slides.maps import SlideMap
from biopsy.slides.regions import find_regions
from biopsy.slides.summaries import compare_with_target, summarise

FORMAT: Final = "biopsy-slide/1"
MAP, SUMMARY, OVERLAY, TISSUE = "map.parquet", "summary.json", "overlay.png", "tissue.jpg"
REGIONS, DETECTIONS, HEATMAP = "regions.geojson", "detections.geojson", "heatmap.tiff"
PANELS = "panels.png"
FILES: Final = (MAP, SUMMARY, OVERLAY, TISSUE, REGIONS, DETECTIONS, HEATMAP, PANELS)
_TISSUE_PX = 1024  # longer side of the picture of the tissue mask
_HEATMAP_PX = 1024  # cells are drawn larger until the heat map's longer side is about this long


def write_outputs(
    folder: Path,
    slide_map: SlideMap,
    *,
    tissue: np.ndarray | None = None,
    target: np.ndarray | None = None,
    is_calibrated: bool,
    detections: bool = False,
    question: Mapping[str, Any],
) -> dict[str, Any]:
    """Write everything that is known of one slide into an empty folder.

    Args:
        folder: An existing folder.
        slide_map: The map, with its picture.
        tissue: The tissue mask, bool, of the picture's size; None where tissue was not sought.
        target: Annotated class of each patch; None where it is not known.
        is_calibrated: Whether the classifier's probabilities were calibrated.
        detections: Also write one QuPath detection a cell.
        question: What the outputs answer: equal questions need not be asked again.

    Returns:
        What ``summary.json`` holds.
    """
    from biopsy.figures.maps import outline_tissue
    from biopsy.figures.style import jpeg, png
    from biopsy.slides.geojson import collect_detections, collect_regions, write_geojson

    assert slide_map.picture is not None
    with ThreadPoolExecutor(1) as painter:
        painting = painter.submit(lambda: write_atomic(folder / OVERLAY, png(draw(slide_map), dpi=160)))
        regions = find_regions(slide_map)
        slide_map.to_parquet(folder / MAP)
        write_geojson(folder / REGIONS, collect_regions(slide_map, regions))
        if detections:
            write_geojson(folder / DETECTIONS, collect_detections(slide_map))
        write_heatmap(folder / HEATMAP, slide_map)
        painting.result()
    summary = summarise(slide_map, regions, is_calibrated=is_calibrated)
    if tissue is not None:
        write_atomic(folder / TISSUE, jpeg(outline_tissue(*_shrink(slide_map.picture, tissue))))
        grid = slide_map.grid
        area_mm2 = grid.width * grid.height * (grid.slide_mpp / 1000) ** 2
        share = float(tissue.mean())
        summary |= {"tissue_mm2": share * area_mm2, "tissue_share": share}
    if target is not None and slide_map.positive_index is not None:
        write_atomic(folder / PANELS, png(draw_panels(slide_map, target), dpi=200))
        summary |= {"annotated": compare_with_target(slide_map, target)}
    document = {
        "format": FORMAT,
        "slide": slide_map.name,
        **slide_map.about,
        **summary,
        "question": dict(question),
    }
    write_json(folder / SUMMARY, document)  # the last of all
    return document


def _shrink(picture: np.ndarray, tissue: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    zoom = min(1.0, _TISSUE_PX / max(tissue.shape))
    size = max(1, round(tissue.shape[1] * zoom)), max(1, round(tissue.shape[0] * zoom))
    mask = cv2.resize(tissue.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA), mask


def read_finished(folder: Path, question: Mapping[str, Any]) -> dict[str, Any] | None:
    """Give a slide's summary if its outputs are there and answer this question, else None."""
    try:
        document = read_json(folder / SUMMARY, format=FORMAT)
    except (OSError, DataError):
        return None
    return document if document.get("question") == dict(question) else None


def prepare_to_draw() -> None:
    """Load what draws, with its fonts: most of a second that a thread can spend while slides are read."""
    from biopsy.figures.maps import draw_overlay
    from biopsy.figures.style import png

    blank = np.zeros((9, 9), np.uint8)
    corners = (0.0, 9.0, 9.0, 0.0)
    png(draw_overlay(np.stack([blank] * 3, axis=2), None, blank, corners, um_per_px=1, class_names=["none"]))


def draw(slide_map: SlideMap) -> Any:
    """Draw the map over the slide's picture, as a matplotlib figure.

    Raises:
        DataError: If the map has no picture (one that was read from a file has none).
    """
    from biopsy.figures.maps import draw_overlay

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
    from biopsy.figures.slides import ALL_PANELS, draw_slide

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


def write_heatmap(path: Path, slide_map: SlideMap) -> None:
    """Write the map as a pyramidal TIFF over the whole slide, its mpp in it."""
    from biopsy.figures.maps import colour_classes, colour_probs

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
