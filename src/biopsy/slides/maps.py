"""The SlideMap: probabilities on a slide's grid, with geometry, and as a table."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from biopsy.core.errors import DataError, SlideError
from biopsy.core.files import replace_atomic
from biopsy.slides.grids import PatchGrid

FORMAT: Final = "biopsy-map/1"
_KEY = b"biopsy"
_GRID = ("patch_px", "stride_px", "scale", "slide_mpp", "width", "height", "origin_px", "corner")
_CLASSES = ("class_names", "positive_class", "threshold")


@dataclass(frozen=True)
class SlideMap:
    """What a classifier says of one slide, patch by patch.

    Attributes:
        name: The slide's name.
        grid: Where the patches lie.
        probs: Probability of each class, float32 ``(n_patches, n_classes)``.
        abstained: Where no decision is given, bool ``(n_patches,)``.
        class_names: The classes, in the order of ``probs``.
        positive_class: The class that is sought; None for more than two.
        threshold: The probability of the positive class from which a cell is called positive; None takes
            the likeliest class.
        about: How it was made: classifier, where the mpp came from, versions.
        picture: The slide at low resolution, uint8 ``(H, W, 3)``; None where it was not kept.
    """

    name: str
    grid: PatchGrid
    probs: np.ndarray
    abstained: np.ndarray
    class_names: list[str]
    positive_class: str | None
    threshold: float | None
    about: dict[str, Any] = field(default_factory=dict)
    picture: np.ndarray | None = field(default=None, repr=False)

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
        """Give the probabilities by cell, ``(rows, columns, n_classes)``, NaN where no patch lies.

        A cell is one step of the grid a side; with overlap it has the mean of all patches that cover it.
        """
        return _average(self.probs, self.grid)

    def cells_abstained(self) -> np.ndarray:
        """Give the cells of which at least half of the patches abstained, bool ``(rows, columns)``."""
        share = _average(self.abstained[:, None].astype(np.float32), self.grid)[..., 0]
        return np.nan_to_num(share) >= 0.5

    def cells_pred(self) -> np.ndarray:
        """Give each cell's class, int ``(rows, columns)``: -1 where no patch lies, -2 where abstained."""
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
        """Give one row a patch: ``x, y`` at level 0, ``prob`` and ``prob_<class>``, ``abstained``."""
        frame = pd.DataFrame({"x": self.grid.x, "y": self.grid.y})
        if self.positive_index is not None:
            frame["prob"] = self.probs[:, self.positive_index]
        for index, name in enumerate(self.class_names):
            frame[f"prob_{name}"] = self.probs[:, index]
        return frame.assign(abstained=self.abstained)

    def to_parquet(self, path: Path | str) -> Path:
        """Write the map as a table, its grid and how it was made in the file's metadata."""
        grid = {name: getattr(self.grid, name) for name in _GRID}
        classes = {name: getattr(self, name) for name in _CLASSES}
        metadata = {"format": FORMAT, "name": self.name, **classes, "grid": grid, "about": self.about}
        table = pa.Table.from_pandas(self.to_frame(), preserve_index=False)
        table = table.replace_schema_metadata({_KEY: json.dumps(metadata, ensure_ascii=False).encode()})
        with replace_atomic(path) as partial:
            pq.write_table(table, partial)
        return Path(path)

    @classmethod
    def from_parquet(cls, path: Path | str) -> "SlideMap":
        """Read a map that was written by `to_parquet`.

        Raises:
            DataError: If the file is missing, no map, or of a newer format.
        """
        path = Path(path)
        try:
            table = pq.read_table(path)
            known = json.loads((table.schema.metadata or {}).get(_KEY, b"{}"))
        except FileNotFoundError:
            raise DataError(f"{path} does not exist") from None
        except (OSError, ValueError, pa.ArrowException) as error:
            raise DataError(f"{path} cannot be read as a map: {error}") from None
        if known.get("format") != FORMAT:
            raise DataError(f"{path} has format {known.get('format')!r} where {FORMAT!r} was expected")
        frame, place = table.to_pandas(), known["grid"]
        place |= {name: tuple(place.get(name, (0, 0))) for name in ("origin_px", "corner")}
        column, row = (
            np.rint((frame[axis] / place["scale"] - origin) / place["stride_px"]).to_numpy(np.int64)
            for axis, origin in zip("xy", place["origin_px"], strict=True)
        )
        probs = frame[[f"prob_{name}" for name in known["class_names"]]].to_numpy(np.float32)
        return cls(
            known["name"],
            PatchGrid(column, row, **place),
            probs,
            frame["abstained"].to_numpy(bool),
            *(known[name] for name in (*_CLASSES, "about")),
        )

    def to_geojson(self, path: Path | str, *, detections: bool = False) -> Path:
        """Write what QuPath opens: regions of each class as annotations, or every patch as a detection.

        Args:
            path: The ``.geojson`` file.
            detections: Write the cells with their probabilities instead of the regions.
        """
        from biopsy.slides.geojson import collect_detections, collect_regions, write_geojson
        from biopsy.slides.regions import find_regions

        features = collect_detections(self) if detections else collect_regions(self, find_regions(self))
        return write_geojson(path, features)


def check_probs(probs: np.ndarray, name: str) -> np.ndarray:
    """Give probabilities as float32, refused where one is not a number.

    Raises:
        SlideError: If a probability is not in 0 to 1.
    """
    if not ((probs >= 0) & (probs <= 1)).all():
        raise SlideError(f"{name}: the classifier gave probabilities that are no numbers in 0 to 1")
    return probs.astype(np.float32)


def _average(values: np.ndarray, grid: PatchGrid) -> np.ndarray:
    """Spread values ``(n, k)`` over the cells their patches cover and average, ``(rows, columns, k)``."""
    rows, columns = grid.shape
    total = np.zeros((rows, columns, values.shape[1]))
    count = np.zeros((rows, columns, 1))
    for down in range(grid.steps):
        for across in range(grid.steps):  # within one shift no two patches share a cell
            total[grid.row + down, grid.column + across] += values
            count[grid.row + down, grid.column + across] += 1
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0).astype(np.float32)
