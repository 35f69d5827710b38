"""A phantom patient's slide: painted in parts, and as a pyramidal TIFF with the tumour's outline."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from shapely.affinity import affine_transform
from shapely.geometry import MultiPolygon, Polygon, box, mapping
from shapely.ops import unary_union

from biopsy.core.errors import DataError
from biopsy.core.files import write_json
from biopsy.core.seeds import derive, make_rng
from biopsy.phantom.anatomy import Anatomy, plan_slide, section_size_um
from biopsy.phantom.noise import Floats
from biopsy.phantom.patients import Look, draw_look, scan
from biopsy.phantom.region import Weave
from biopsy.phantom.tissue import light_region, nest_region
from biopsy.slide_io.pyramids import Compression, write_pyramid

MPP = 4.0  # IDC's patches: 40x scans (about .25 um/px) reduced 16 times
_FINEST_DRAWN = 2.0  # nuclei need about 4 px; a coarser picture is drawn this fine and averaged
_TILE_PX = 200  # a slide is painted in tiles of this grid, whatever part is asked for
_RIM_PX = 4  # how far the scanner's blur reaches


@dataclass(frozen=True)
class PhantomSlide:
    """A slide at ``mpp``: ``image`` (H, W, 3) uint8 RGB, ``tumour`` and ``tissue`` (H, W) boolean.

    ``tumour`` is the region an annotator would outline: one connected piece that holds stroma, fat and
    lymphocytes between the nests. ``anatomy`` and ``look`` say how the slide came to be.
    """

    patient: str
    mpp: float
    image: NDArray[np.uint8]
    tumour: NDArray[np.bool_]
    tissue: NDArray[np.bool_]
    anatomy: Anatomy
    look: Look


class SlidePainter:
    """Draws any part of a planned slide at any pixel size, without holding the rest."""

    def __init__(self, anatomy: Anatomy, look: Look) -> None:
        self.anatomy = anatomy
        self.look = look

    @cached_property
    def _weave(self) -> Weave:
        return Weave(self.anatomy)

    def size_px(self, mpp: float) -> tuple[int, int]:
        """Return the slide's width and height in pixels of ``mpp`` micrometres."""
        return round(self.anatomy.width_um / mpp), round(self.anatomy.height_um / mpp)

    def paint(self, x_px: int, y_px: int, width_px: int, height_px: int, mpp: float) -> NDArray[np.uint8]:
        """Return a rectangle as RGB, ``(height, width, 3)``; pixels are counted from the slide's corner."""
        image = np.empty((height_px, width_px, 3), np.uint8)
        for top in range(y_px // _TILE_PX * _TILE_PX, y_px + height_px, _TILE_PX):
            for left in range(x_px // _TILE_PX * _TILE_PX, x_px + width_px, _TILE_PX):
                tile = self._tile(left, top, mpp)
                rows = slice(max(y_px - top, 0), min(y_px + height_px - top, _TILE_PX))
                columns = slice(max(x_px - left, 0), min(x_px + width_px - left, _TILE_PX))
                row, column = top + rows.start - y_px, left + columns.start - x_px
                part = tile[rows, columns]
                image[row : row + part.shape[0], column : column + part.shape[1]] = part
        return image

    def mask(
        self, name: str, x_px: int, y_px: int, width_px: int, height_px: int, mpp: float
    ) -> NDArray[np.bool_]:
        """Return where ``"tumour"`` or ``"tissue"`` is, ``(height, width)``."""
        x, y = self._grid(x_px, y_px, width_px, height_px, mpp)
        return self.anatomy.read(name, x, y) > 0

    def nests(self, x_px: int, y_px: int, width_px: int, height_px: int, mpp: float) -> NDArray[np.bool_]:
        """Return which pixels are mostly tumour cells, ``(height, width)``; of the region much is stroma."""
        corner_um, shape = (mpp * x_px, mpp * y_px), (height_px, width_px)
        return nest_region(self.anatomy, self._weave, *corner_um, shape, mpp) >= 0.5

    def _tile(self, left_px: int, top_px: int, mpp: float) -> NDArray[np.uint8]:
        finer = max(1, round(mpp / _FINEST_DRAWN))
        size_px = _TILE_PX + 2 * _RIM_PX
        corner_um = (mpp * (left_px - _RIM_PX), mpp * (top_px - _RIM_PX))
        shape = (finer * size_px, finer * size_px)
        light = light_region(self.anatomy, self._weave, self.look, *corner_um, shape, mpp / finer)
        if finer > 1:
            light = np.asarray(
                cv2.resize(light, (size_px, size_px), interpolation=cv2.INTER_AREA), np.float32
            )
        seed = derive(self.anatomy.seed, "phantom", self.anatomy.patient, "scan", left_px, top_px, mpp)
        return scan(light, self.look, seed)[_RIM_PX:-_RIM_PX, _RIM_PX:-_RIM_PX]

    @staticmethod
    def _grid(x_px: int, y_px: int, width_px: int, height_px: int, mpp: float) -> tuple[Floats, Floats]:
        columns = ((np.arange(x_px, x_px + width_px) + 0.5) * mpp).astype(np.float32)
        rows = ((np.arange(y_px, y_px + height_px) + 0.5) * mpp).astype(np.float32)
        x, y = np.meshgrid(columns, rows)
        return x, y


def plan_painter(
    seed: int, patient: str, *, tissue_mm2: float, tumour_frac: float | None = None, high_grade: bool = False
) -> SlidePainter:
    """Plan a slide without drawing it.

    Args:
        tumour_frac: Share of the tissue inside the tumour (default: drawn from the patient's name).
        high_grade: Large tumour nuclei in crowded tissue, and stains that differ widely between patients:
            colour tells little of the tumour.

    Raises:
        DataError: If a number is out of range.
    """
    if tissue_mm2 <= 0 or not (tumour_frac is None or 0 <= tumour_frac < 1):
        raise DataError(
            f"a phantom slide needs tissue_mm2 above 0 and tumour_frac in [0, 1); got {tissue_mm2!r}, "
            f"{tumour_frac!r}"
        )
    if tumour_frac is None:
        tumour_frac = float(make_rng(seed, "phantom", patient, "share").beta(1.4, 3.2))
    anatomy = plan_slide(seed, patient, tissue_mm2=tissue_mm2, tumour_frac=tumour_frac, high_grade=high_grade)
    return SlidePainter(anatomy, draw_look(seed, patient, stain_spread=0.4 if high_grade else 0.2))


def make_slide(
    seed: int, patient: str, *, mpp: float = MPP, tissue_mm2: float = 20.0, tumour_frac: float | None = None
) -> PhantomSlide:
    """Draw a whole slide.

    Args:
        patient: The patient's name; seed and name decide everything, with the same library versions.
        mpp: Micrometres per pixel. The same tissue is drawn at any ``mpp``.
        tissue_mm2: Area of tissue; 20 mm2 are about 500 patches of 200 um.
        tumour_frac: Share of the tissue inside the tumour region, in [0, 1); None draws one.

    Example:
        >>> slide = make_slide(0, "90001", tissue_mm2=1.0, tumour_frac=0.3)
        >>> slide.image.shape[:2] == slide.tumour.shape
        True
    """
    if mpp <= 0:
        raise DataError(f"a phantom slide needs mpp above 0; got {mpp!r}")
    painter = plan_painter(seed, patient, tissue_mm2=tissue_mm2, tumour_frac=tumour_frac)
    extent = (0, 0, *painter.size_px(mpp), mpp)
    return PhantomSlide(
        patient=patient,
        mpp=mpp,
        image=painter.paint(*extent),
        tumour=painter.mask("tumour", *extent),
        tissue=painter.mask("tissue", *extent),
        anatomy=painter.anatomy,
        look=painter.look,
    )


TUMOUR = "Tumor"  # the names of QuPath's own classes
VALID = "Region*"
COLOURS = {TUMOUR: [200, 0, 0], VALID: [0, 0, 180]}  # QuPath's own

_FILLED = 0.6  # tissue per area of the section's rectangle, as the anatomy plans it
_OUTLINE_UM = 5.0  # steps in which the tumour's edge is followed
_SLACK_UM = 200.0  # by which a section may be larger than its place
_GRID_UM = 8.0  # sections lie on multiples of this: whole pixels at every usual mpp


@dataclass(frozen=True)
class PhantomTruth:
    """What is known of a phantom slide; outlines are in pixels of level 0.

    ``sections`` are the rectangles ``(left, top, right, bottom)`` in which tissue was drawn.
    """

    path: Path
    geojson: Path
    width: int
    height: int
    mpp: float
    tumour: MultiPolygon
    sections: tuple[tuple[int, int, int, int], ...]


def make_phantom_slide(
    path: Path | str,
    *,
    seed: int,
    width: int,
    height: int,
    mpp: float,
    patient: str = "90001",
    tumour_frac: float = 0.3,
    high_grade: bool = False,
    tissue_mm2: float | None = None,
    n_sections: int = 1,
    drawn_mpp: float | None = None,
    tile_px: int = 256,
    compression: Compression = "jpeg",
    workers: int | None = None,
) -> PhantomTruth:
    """Write a phantom slide, and beside it ``<name>.geojson`` with its tumour as QuPath would export it.

    Args:
        path: The TIFF to be; one named ``.svs`` has the metadata of Aperio's files.
        seed: With ``patient``, decides the tissue.
        width: Of the slide, in pixels.
        height: Of the slide, in pixels.
        mpp: Micrometres per pixel.
        tumour_frac: Share of the tissue inside the tumour, in [0, 1).
        high_grade: As `plan_painter` takes it.
        tissue_mm2: Area of tissue of one section; by default what fills the slide.
        drawn_mpp: Resolution at which tissue is drawn, by default ``mpp``; then averaged or enlarged to it.
            About 0.4 megapixels a second are drawn on one core.
        tile_px: Side of the file's tiles.
        compression: ``jpeg`` or ``deflate``.
        workers: Threads; one per core by default.

    Raises:
        DataError: If the sections do not fit on the slide, or a number is out of range.

    Example:
        >>> truth = make_phantom_slide("case.tiff", seed=0, width=300, height=240, mpp=2.0, drawn_mpp=2.8)
        >>> truth.tumour.area > 0, truth.geojson.name
        (True, 'case.geojson')
    """
    path = Path(path)
    if min(width, height, mpp, n_sections) <= 0:
        raise DataError(
            "a phantom slide needs width, height, mpp and n_sections above 0; "
            f"got {width!r}, {height!r}, {mpp!r} and {n_sections!r}"
        )
    workers = workers or os.cpu_count() or 1
    if tissue_mm2 is None:
        tissue_mm2 = _filling_mm2(seed, patient, width * mpp, height * mpp, n_sections)
    painter = plan_painter(
        seed, patient, tissue_mm2=tissue_mm2, tumour_frac=tumour_frac, high_grade=high_grade
    )
    corners = _lay_out(painter, width * mpp, height * mpp, n_sections)
    section = _Section(painter, mpp, drawn_mpp or mpp, [_pixels(corner, mpp) for corner in corners], workers)
    if path.suffix.lower() == ".svs":
        description = f"Aperio Image Library\n{width}x{height}|AppMag = {10 / mpp:g}|MPP = {mpp:.4f}"
    else:
        description = f"phantom slide, seed {seed}, patient {patient}"
    write_pyramid(
        path,
        section.read,
        width=width,
        height=height,
        mpp=mpp,
        tile_px=tile_px,
        compression=compression,
        background=section.glass,
        description=description,
        workers=workers,
    )
    slide = box(0, 0, width, height)
    outline = _outline(painter, "tumour")
    parts = [affine_transform(outline, [1 / mpp, 0, 0, 1 / mpp, *corner]) for corner in section.corners]
    tumour = _polygons(unary_union(parts).intersection(slide))
    boxes = tuple(
        (x, y, min(x + section.width, width), min(y + section.height, height)) for x, y in section.corners
    )
    geojson = path.with_suffix(".geojson")
    write_json(geojson, _collection(tumour, boxes))
    return PhantomTruth(path, geojson, width, height, mpp, tumour, boxes)


class _Section:
    """One piece of tissue, and its positions on the slide."""

    def __init__(
        self,
        painter: SlidePainter,
        mpp: float,
        drawn_mpp: float,
        corners: list[tuple[int, int]],
        workers: int,
    ) -> None:
        self.corners = corners
        self.width, self.height = painter.size_px(mpp)
        red, green, blue = (int(value) for value in np.rint(painter.look.white))
        self.glass = red, green, blue
        self._image = _paint(painter, drawn_mpp, workers)
        self._scale = mpp / drawn_mpp
        if self._scale > 1:
            size = self.width, self.height
            self._image = np.asarray(cv2.resize(self._image, size, interpolation=cv2.INTER_AREA))
            self._scale = 1.0

    def read(self, x: int, y: int, width: int, height: int) -> np.ndarray | None:
        """Return a rectangle of the slide, None where it is only glass."""
        tile: np.ndarray | None = None
        for left, top in self.corners:
            first, upper = max(x, left), max(y, top)
            right, lower = min(x + width, left + self.width), min(y + height, top + self.height)
            if first < right and upper < lower:
                if tile is None:
                    tile = np.full((height, width, 3), self.glass, np.uint8)
                part = self._part(first - left, upper - top, right - first, lower - upper)
                tile[upper - y : lower - y, first - x : right - x] = part
        return tile

    def _part(self, x: int, y: int, width: int, height: int) -> np.ndarray:
        """Return a rectangle of the section at the slide's mpp, enlarged where it was drawn coarser."""
        if self._scale == 1:
            return self._image[y : y + height, x : x + width]
        scale = self._scale
        left, top = max(int(x * scale) - 2, 0), max(int(y * scale) - 2, 0)
        drawn = self._image[top : int((y + height) * scale) + 3, left : int((x + width) * scale) + 3]
        shift = [(corner + 0.5) * scale - 0.5 - start for corner, start in ((x, left), (y, top))]
        enlarge = np.array([[scale, 0, shift[0]], [0, scale, shift[1]]])
        interpolation = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        return np.asarray(
            cv2.warpAffine(
                drawn, enlarge, (width, height), flags=interpolation, borderMode=cv2.BORDER_REPLICATE
            )
        )


def _paint(painter: SlidePainter, mpp: float, workers: int) -> np.ndarray:
    """Draw a whole section, each tile of the painter's grid once."""
    width, height = painter.size_px(mpp)
    image = np.empty((height, width, 3), np.uint8)

    def fill(corner: tuple[int, int]) -> None:
        left, top = corner
        size = min(_TILE_PX, width - left), min(_TILE_PX, height - top)
        image[top : top + size[1], left : left + size[0]] = painter.paint(left, top, *size, mpp)

    corners = [(left, top) for top in range(0, height, _TILE_PX) for left in range(0, width, _TILE_PX)]
    fill(corners[0])  # what the painter makes on first use is made by one thread
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(fill, corners[1:]))
    return image


def _filling_mm2(seed: int, patient: str, width_um: float, height_um: float, n_sections: int) -> float:
    """Return the area of tissue whose section is about as large as its place on the slide."""
    columns, rows = _grid(width_um, height_um, n_sections)
    anatomy = plan_painter(seed, patient, tissue_mm2=4.0, tumour_frac=0.0).anatomy
    aspect = anatomy.width_um / anatomy.height_um
    room = min((width_um / columns) ** 2 / aspect, (height_um / rows) ** 2 * aspect)
    tissue_mm2 = _FILLED * room / 1e6
    while not _fits(section_size_um(seed, patient, tissue_mm2), width_um / columns, height_um / rows):
        tissue_mm2 *= 0.98  # sizes are whole multiples, so that the aspect of a small section is not exact
    return tissue_mm2


def _fits(section_um: tuple[float, float], width_um: float, height_um: float) -> bool:
    return section_um[0] <= width_um + _SLACK_UM and section_um[1] <= height_um + _SLACK_UM


def _grid(width_um: float, height_um: float, n_sections: int) -> tuple[int, int]:
    """Return columns and rows of places that are as square as can be."""
    columns = min(range(1, n_sections + 1), key=lambda n: abs(width_um / n - height_um / -(-n_sections // n)))
    return columns, -(-n_sections // columns)


def _lay_out(
    painter: SlidePainter, width_um: float, height_um: float, n_sections: int
) -> list[tuple[float, float]]:
    """Return the sections' upper left corners in micrometres, each in the middle of its place."""
    columns, rows = _grid(width_um, height_um, n_sections)
    section = painter.anatomy.width_um, painter.anatomy.height_um
    cell_size = width_um / columns, height_um / rows
    if not _fits(section, *cell_size):
        raise DataError(
            f"{n_sections} sections of {section[0]:.0f} x {section[1]:.0f} um do not fit on a slide of "
            f"{width_um:.0f} x {height_um:.0f} um; ask for less tissue_mm2"
        )
    spare = [
        max(room - size, 0) / 2 // _GRID_UM * _GRID_UM for size, room in zip(section, cell_size, strict=True)
    ]
    return [
        (
            n % columns * cell_size[0] // _GRID_UM * _GRID_UM + spare[0],
            n // columns * cell_size[1] // _GRID_UM * _GRID_UM + spare[1],
        )
        for n in range(n_sections)
    ]


def _pixels(corner_um: tuple[float, float], mpp: float) -> tuple[int, int]:
    return round(corner_um[0] / mpp), round(corner_um[1] / mpp)


def _outline(painter: SlidePainter, name: str) -> MultiPolygon:
    """Follow a region's edge, in micrometres from the section's corner."""
    width, height = painter.size_px(_OUTLINE_UM)
    mask = painter.mask(name, 0, 0, width, height, _OUTLINE_UM)
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    starts, ends = np.argwhere(edges == 1), np.argwhere(edges == -1)
    runs = [
        box(left, row, right, row + 1)
        for (row, left), (_, right) in zip(starts.tolist(), ends.tolist(), strict=True)
    ]
    # half a step of simplification turns stairs into slopes and keeps the area
    return _polygons(
        affine_transform(unary_union(runs).simplify(0.5), [_OUTLINE_UM, 0, 0, _OUTLINE_UM, 0, 0])
    )


def _polygons(shape: object) -> MultiPolygon:
    if isinstance(shape, MultiPolygon):
        return shape
    parts = [shape] if isinstance(shape, Polygon) else getattr(shape, "geoms", ())
    return MultiPolygon([part for part in parts if isinstance(part, Polygon) and not part.is_empty])


def _collection(tumour: MultiPolygon, sections: tuple[tuple[int, int, int, int], ...]) -> dict[str, object]:
    """Return the GeoJSON that QuPath exports for annotations of these classes."""
    shapes = [(TUMOUR, part) for part in tumour.geoms] + [(VALID, box(*section)) for section in sections]
    features = [
        {
            "type": "Feature",
            "id": f"{name.strip('*').lower()}-{n}",
            "geometry": mapping(shape),
            "properties": {
                "objectType": "annotation",
                "classification": {"name": name, "color": COLOURS[name]},
            },
        }
        for n, (name, shape) in enumerate(shapes)
    ]
    return {"type": "FeatureCollection", "features": features}
