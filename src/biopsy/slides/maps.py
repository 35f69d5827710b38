"""The SlideMap: probabilities on a slide's grid, its regions as polygons, GeoJSON for QuPath."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import cv2
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import shapely
from matplotlib.colors import to_rgb
from pydantic import BaseModel, Field, PositiveFloat, PositiveInt, model_validator
from shapely import Polygon

from biopsy.core.errors import DataError, FileFormatError, SlideError
from biopsy.core.files import plain, replace_atomic, warn_unsealed
from biopsy.core.loaders import parse_json, refusing, validate
from biopsy.core.tables import read_parquet_table
from biopsy.plotting.style import BASELINE, class_colour
from biopsy.slide_io.mosaic import check_extent
from biopsy.slides.grids import PatchGrid

FORMAT: Final = "biopsy-map/1"
_KEY = b"biopsy"
_GRID = ("patch_px", "stride_px", "scale", "slide_mpp", "width", "height", "origin_px", "corner")
_CONTENT = "content_sha256"
_CLASSES = ("class_names", "positive_class", "threshold")


class _Grid(BaseModel):
    """Grid in the metadata of a map; see `PatchGrid`."""

    patch_px: PositiveInt
    stride_px: PositiveInt
    scale: PositiveFloat
    slide_mpp: PositiveFloat
    width: PositiveInt
    height: PositiveInt
    origin_px: tuple[int, int] = (0, 0)
    corner: tuple[int, int] = (0, 0)


class _Document(BaseModel):
    """Metadata of a map; see `SlideMap`."""

    name: str
    class_names: list[str] = Field(min_length=2)
    positive_class: str | None
    threshold: float | None = Field(ge=0, le=1)
    grid: _Grid
    about: dict[str, object]

    @model_validator(mode="after")
    def _require_classes(self) -> "_Document":
        if len(set(self.class_names)) < len(self.class_names):
            raise ValueError("a class is repeated")
        if self.positive_class not in (None, *self.class_names):
            raise ValueError(f"the positive class {self.positive_class!r} is no class")
        return self


@dataclass(frozen=True)
class SlideMap:
    """Predictions of a classifier on one slide.

    Attributes:
        name: Name of the slide.
        grid: Grid of the patches.
        probs: Probability of each class, float32 ``(n_patches, n_classes)``.
        abstained: Mask of abstentions, bool ``(n_patches,)``.
        class_names: Class names, in the order of ``probs``.
        positive_class: The positive class; None for more than two classes.
        threshold: Decision threshold on the positive probability; None for the most probable class.
        about: Provenance: classifier, resolution, versions.
        picture: Thumbnail of the slide, uint8 ``(H, W, 3)``; None if not available.
        ood: 1 if a patch is out of distribution, 0 if not, NaN if not checked, float ``(n_patches,)``; None
            if no patch was checked.
    """

    name: str
    grid: PatchGrid
    probs: np.ndarray
    abstained: np.ndarray
    class_names: list[str]
    positive_class: str | None
    threshold: float | None
    about: dict[str, object] = field(default_factory=dict)
    picture: np.ndarray | None = field(default=None, repr=False)
    ood: np.ndarray | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.grid)

    def __repr__(self) -> str:
        rows, columns = self.grid.shape
        return f"<SlideMap {self.name}: {len(self):,} patches on {columns} x {rows} cells>"

    @property
    def positive_index(self) -> int | None:
        """Index of the positive class, None for more than two classes."""
        return None if self.positive_class is None else self.class_names.index(self.positive_class)

    @property
    def cell_px(self) -> float:
        """Side of a cell in pixels of level 0."""
        return self.grid.stride_px * self.grid.scale

    @property
    def cell_mm2(self) -> float:
        """Area of a cell in square millimetres."""
        return (self.grid.cell_um / 1000) ** 2

    def cells(self) -> np.ndarray:
        """Return probabilities per cell, ``(rows, columns, n_classes)``, NaN without a patch.

        The side of a cell is one stride; with overlap, a cell has the mean of the patches that cover it.
        """
        return _average(self.probs, self.grid)

    def cells_abstained(self) -> np.ndarray:
        """Return a mask of cells where at least half of the patches abstained, bool ``(rows, columns)``."""
        share = _average(self.abstained[:, None].astype(np.float32), self.grid)[..., 0]
        return np.nan_to_num(share) >= 0.5

    def cells_pred(self) -> np.ndarray:
        """Return class indices per cell, int ``(rows, columns)``: -1 without a patch, -2 abstained."""
        probs, positive = self.cells(), self.positive_index
        empty = np.isnan(probs[..., 0])
        if positive is None or self.threshold is None:
            pred = np.nan_to_num(probs).argmax(axis=2)
        else:
            pred = np.where(probs[..., positive] >= np.float32(self.threshold), positive, 1 - positive)
        pred[self.cells_abstained()] = -2
        pred[empty] = -1
        return pred

    def to_frame(self) -> pd.DataFrame:
        """Return a row per patch: ``x, y`` at level 0, ``prob``, ``prob_<class>``, ``abstained``, ``ood``."""
        frame = pd.DataFrame({"x": self.grid.x, "y": self.grid.y})
        if self.positive_index is not None:
            frame["prob"] = self.probs[:, self.positive_index]
        for index, name in enumerate(self.class_names):
            frame[f"prob_{name}"] = self.probs[:, index]
        frame["abstained"] = self.abstained
        return frame if self.ood is None else frame.assign(ood=self.ood.astype(np.float32))

    def to_parquet(self, path: Path | str) -> Path:
        """Write the map as a Parquet table, with grid and provenance in its metadata."""
        grid = {name: getattr(self.grid, name) for name in _GRID}
        classes = {name: getattr(self, name) for name in _CLASSES}
        metadata = {"format": FORMAT, "name": self.name, **classes, "grid": grid, "about": self.about}
        metadata[_CONTENT] = self._hash()
        table = pa.Table.from_pandas(self.to_frame(), preserve_index=False)
        table = table.replace_schema_metadata({_KEY: json.dumps(metadata).encode()})
        with replace_atomic(path) as partial:
            pq.write_table(table, partial)
        return Path(path)

    @classmethod
    def from_parquet(cls, path: Path | str) -> "SlideMap":
        """Read a map written by `to_parquet`.

        Raises:
            DataError: If the file is missing, not a map, or of a newer format.
        """
        path = Path(path)
        frame, metadata = read_parquet_table(path, {"x": "number", "y": "number", "abstained": "bool"})
        document = parse_json(metadata.get(_KEY, b"{}"), path)
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise FileFormatError(path, "format", f"is not a map of format {FORMAT!r}")
        with refusing(path, "a map"):
            slide_map = cls._from_frame(frame, validate(path, _Document, document))
        if _CONTENT not in document:
            warn_unsealed(path, _CONTENT)
        elif document[_CONTENT] != slide_map._hash():
            raise FileFormatError(path, "altered", "was changed since it was written: map the slide again")
        return slide_map

    @classmethod
    def _from_frame(cls, frame: pd.DataFrame, known: "_Document") -> "SlideMap":
        place = known.grid
        names = [f"prob_{name}" for name in known.class_names]
        if frame[["x", "y", "abstained", *names]].isna().any(axis=None):
            raise DataError(f"{known.name}: a patch has no place, probability or decision")
        check_extent(frame["x"].to_numpy(), frame["y"].to_numpy(), place.stride_px * place.scale)
        column, row = (
            np.rint((frame[axis] / place.scale - origin) / place.stride_px).to_numpy(np.int64)
            for axis, origin in zip("xy", place.origin_px, strict=True)
        )
        return cls(
            known.name,
            PatchGrid(column, row, **dict(place)),
            check_probs(frame[names].to_numpy(np.float32), known.name),
            frame["abstained"].to_numpy(bool),
            known.class_names,
            known.positive_class,
            known.threshold,
            known.about,
            ood=frame["ood"].to_numpy(np.float32) if "ood" in frame else None,
        )

    def _hash(self) -> str:
        """Hash everything that drawings and areas follow from."""
        about = [self.name, self.class_names, self.positive_class, self.threshold]
        grid = [
            list(value) if isinstance(value := getattr(self.grid, key), tuple) else value for key in _GRID
        ]
        digest = hashlib.sha256(json.dumps(plain([about, grid, self.about]), sort_keys=True).encode())
        places = (values.astype("<i8") for values in (self.grid.column, self.grid.row))
        ood = np.zeros(0) if self.ood is None else np.nan_to_num(self.ood, nan=-1)
        for values in (*places, self.probs.astype("<f4"), self.abstained, ood.astype("<f4")):
            digest.update(np.ascontiguousarray(values).tobytes())
        return digest.hexdigest()

    def to_geojson(self, path: Path | str, *, detections: bool = False) -> Path:
        """Write a GeoJSON file for QuPath: regions of each class as annotations, or cells as detections.

        Args:
            path: The ``.geojson`` file.
            detections: Write cells with their probabilities instead of regions.
        """

        features = collect_detections(self) if detections else collect_regions(self, find_regions(self))
        return write_geojson(path, features)


def check_probs(probs: np.ndarray, name: str) -> np.ndarray:
    """Return valid probabilities as float32."""
    if not ((probs >= 0) & (probs <= 1)).all():
        raise SlideError(f"{name}: the probabilities of the classifier are not numbers in [0, 1]")
    return probs.astype(np.float32)


def _average(values: np.ndarray, grid: PatchGrid) -> np.ndarray:
    """Return the mean of values ``(n, k)`` of the patches that cover each cell, ``(rows, columns, k)``."""
    rows, columns = grid.shape
    total = np.zeros((rows, columns, values.shape[1]))
    count = np.zeros((rows, columns, 1))
    for down in range(grid.steps):
        for across in range(grid.steps):  # for one shift, cells of patches are distinct
            total[grid.row + down, grid.column + across] += values
            count[grid.row + down, grid.column + across] += 1
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0).astype(np.float32)


ABSTAINED = "abstained*"  # classes that end in * are ignored by QuPath and `prepare`


@dataclass(frozen=True)
class Region:
    """A connected region of cells of one class.

    Attributes:
        class_name: The class, or `ABSTAINED`.
        polygon: Outline at level 0, with holes, along the edges of cells.
        mean_prob: Mean probability of the class (abstained: of the positive class), NaN if there is none.
    """

    class_name: str
    polygon: Polygon
    n_cells: int
    area_mm2: float
    mean_prob: float
    max_prob: float


def find_regions(slide_map: SlideMap) -> list[Region]:
    """Return the regions of every class and of abstention, largest first.

    Regions are 4-connected.
    """
    probs, pred = slide_map.cells(), slide_map.cells_pred()
    positive = slide_map.positive_index
    regions = []
    for index, name in [*enumerate(slide_map.class_names), (-2, ABSTAINED)]:
        prob = probs[..., index if index >= 0 else positive or 0]
        result = _join_cells(slide_map, pred == index, prob, name)
        regions += sorted(result, key=lambda region: -region.n_cells)
    return regions


def _join_cells(slide_map: SlideMap, mask: np.ndarray, prob: np.ndarray, name: str) -> list[Region]:
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)
    regions = []
    for number, (left, top, width, height, _) in enumerate(stats[1:].tolist(), start=1):
        window = slice(top, top + height), slice(left, left + width)
        inside = labels[window] == number
        values = prob[window][inside]
        polygon = outline(inside, left, top)
        regions.append(
            Region(
                name,
                shapely.transform(polygon, lambda points: _to_level_0(points, slide_map)),
                len(values),
                len(values) * slide_map.cell_mm2,
                float(values.mean()),
                float(values.max()),
            )
        )
    return regions


def outline(mask: np.ndarray, left: int = 0, top: int = 0) -> Polygon:
    """Return the outline of a mask in cells, without redundant vertices.

    Example:
        >>> outline(np.array([[True, True], [True, False]])).area
        3.0
    """
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    row, start = np.nonzero(edges == 1)
    _, end = np.nonzero(edges == -1)
    runs = shapely.box(start + left, row + top, end + left, row + top + 1)
    return shapely.union_all(runs).simplify(0)


def _to_level_0(points: np.ndarray, slide_map: SlideMap) -> np.ndarray:
    grid = slide_map.grid
    return (points * grid.stride_px + grid.origin_px) * grid.scale


Feature = dict[str, object]


def collect_regions(slide_map: SlideMap, regions: Iterable[Region]) -> Iterator[Feature]:
    """Yield one annotation per region, with area, cells and probability as measurements."""
    for region in regions:
        measurements = {
            "Area mm^2": region.area_mm2,
            "Cells": region.n_cells,
            "Mean probability": region.mean_prob,
            "Max probability": region.max_prob,
        }
        name = region.class_name
        yield _feature(
            "annotation",
            _from_corner(slide_map, region.polygon),
            name,
            _colour(slide_map, name),
            measurements,
        )


def collect_detections(slide_map: SlideMap) -> Iterator[Feature]:
    """Yield one detection per cell, with the probability of each class as measurements."""
    probs, pred = slide_map.cells(), slide_map.cells_pred()
    grid, side = slide_map.grid, slide_map.cell_px
    names = {**dict(enumerate(slide_map.class_names)), -2: ABSTAINED}
    for row, column in zip(*np.nonzero(pred != -1), strict=True):
        x = (grid.origin_px[0] + column * grid.stride_px) * grid.scale
        y = (grid.origin_px[1] + row * grid.stride_px) * grid.scale
        name = names[int(pred[row, column])]
        measurements = {
            f"Probability {class_name}": float(prob)
            for class_name, prob in zip(slide_map.class_names, probs[row, column], strict=True)
        }
        cell = shapely.box(x, y, x + side, y + side)
        yield _feature(
            "detection", _from_corner(slide_map, cell), name, _colour(slide_map, name), measurements
        )


def write_geojson(path: Path | str, features: Iterable[Feature]) -> Path:
    """Write features as a GeoJSON collection, one per line, atomically."""
    with replace_atomic(path) as partial, open(partial, "w", encoding="utf-8") as file:
        file.write('{"type": "FeatureCollection", "features": [')
        for number, feature in enumerate(features):
            file.write(",\n" if number else "\n")
            file.write(json.dumps(feature, ensure_ascii=False, allow_nan=False))
        file.write("\n]}\n")
    return Path(path)


def _feature(
    object_type: str, polygon: Polygon, name: str, colour: list[int], measurements: dict[str, float]
) -> Feature:
    return {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": _rings(polygon)},
        "properties": {
            "objectType": object_type,
            "classification": {"name": name, "color": colour},
            "isLocked": False,
            "measurements": {key: _short(value) for key, value in measurements.items()},
        },
    }


def _from_corner(slide_map: SlideMap, polygon: Polygon) -> Polygon:
    """Return a polygon at level 0 in QuPath's coordinates."""
    return shapely.transform(polygon, lambda points: points - slide_map.grid.corner)


def _rings(polygon: Polygon) -> list[list[list[float]]]:
    """Return closed rings, the exterior first; integers where possible."""
    polygon = shapely.geometry.polygon.orient(polygon)
    return [
        [[_short(x), _short(y)] for x, y in ring.coords] for ring in (polygon.exterior, *polygon.interiors)
    ]


def _short(value: float) -> float:
    rounded = round(float(value), 6)
    return int(rounded) if rounded.is_integer() else rounded


def _colour(slide_map: SlideMap, name: str) -> list[int]:
    colour = BASELINE if name == ABSTAINED else class_colour(slide_map.class_names.index(name))
    return [round(255 * value) for value in to_rgb(colour)]
