"""Tiles of a slide: squares of `TILE_PX` pixels at level 0's resolution divided by powers of two."""

import contextlib
import threading
import weakref
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
import simplejpeg

from biopsy.core.errors import SlideError
from biopsy.data.packs import Pack
from biopsy.slide_io.mosaic import paste
from biopsy.slide_io.reader import Slide, open_slide
from biopsy.slide_io.tissue import THUMBNAIL_PX
from biopsy.slides.grids import PatchGrid

TILE_PX = 512
_MAX_READ_PX = 2**24  # pixels of the file that are read for one tile; coarser tiles come from the overview
_QUALITY = 85


class Picture(Protocol):
    """The pixels of one slide."""

    width: int
    height: int

    @property
    def overview(self) -> np.ndarray:
        """The whole slide at low resolution, uint8 ``(H, W, 3)``."""

    def read(self, x: int, y: int, width: int, height: int, downsample: int) -> np.ndarray | None:
        """Return a rectangle, or None where reading it would take too long.

        Args:
            x: Left edge at level 0.
            y: Upper edge at level 0.
            width: Of the result, in pixels.
            downsample: Level-0 pixels in a pixel of the result, along a side.
        """


class SlidePicture:
    """A slide that is read from its file, which is closed with the last reference to the picture."""

    def __init__(self, slide: Slide) -> None:
        self.width, self.height, self.mpp = slide.width, slide.height, slide.mpp
        self._slide, self._lock = slide, threading.Lock()
        weakref.finalize(self, slide.close)

    @cached_property
    def _thumbnail(self) -> np.ndarray:
        return self._slide.thumbnail(THUMBNAIL_PX)

    @property
    def overview(self) -> np.ndarray:
        """The whole slide, its longer side at most `THUMBNAIL_PX` pixels."""
        with self._lock, self._name_vanished():
            return self._thumbnail

    def read(self, x: int, y: int, width: int, height: int, downsample: int) -> np.ndarray | None:
        """Read from the level that is nearest."""
        mpp = self._slide.mpp * downsample
        scale = self._slide.level_for(mpp)[1]
        if width * height * scale**2 > _MAX_READ_PX:
            return None
        with self._name_vanished():
            return self._slide.read_at(x, y, width, height, mpp=mpp)

    @contextlib.contextmanager
    def _name_vanished(self) -> Iterator[None]:
        try:
            yield
        except (SlideError, OSError):
            if self._slide.path.exists():
                raise
            raise SlideError(
                f"slide {self._slide.path} was moved or removed while it was viewed: put it back and reload"
            ) from None


def open_picture(path: Path, mpp: float | None) -> SlidePicture:
    """Open a slide to be read in tiles."""
    return SlidePicture(open_slide(path, mpp=mpp))


class StitchedPicture:
    """A slide assembled from the patches of a pack."""

    def __init__(self, pack: Pack, index: np.ndarray, grid: PatchGrid, overview: np.ndarray) -> None:
        self.width, self.height = grid.width, grid.height
        self.overview = overview
        self._pack, self._index = pack, index
        rows = pack.table.iloc[index]
        self._x, self._y = rows["x"].to_numpy(np.int64), rows["y"].to_numpy(np.int64)

    def read(self, x: int, y: int, width: int, height: int, downsample: int) -> np.ndarray | None:
        """Lay out the patches that touch the rectangle."""
        right, bottom, patch_px = x + width * downsample, y + height * downsample, self._pack.info.patch_px
        if (right - x) * (bottom - y) > _MAX_READ_PX:
            return None
        near = (self._x < right) & (self._x + patch_px > x) & (self._y < bottom) & (self._y + patch_px > y)
        image = np.full((bottom - y, right - x, 3), 255, np.uint8)
        for index in np.flatnonzero(near):
            row = self._index[index]
            left, top = int(self._x[index]) - x, int(self._y[index]) - y
            paste(image, self._pack.pixels(row), left, top)
        if downsample == 1:
            return image
        return np.asarray(cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA))


class BlankPicture:
    """White, for a slide whose file is missing."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        zoom = min(1.0, 64 / max(width, height))
        self.overview = np.full((max(1, round(height * zoom)), max(1, round(width * zoom)), 3), 255, np.uint8)

    def read(self, x: int, y: int, width: int, height: int, downsample: int) -> np.ndarray | None:
        """Return white."""
        return np.full((height, width, 3), 255, np.uint8)


def count_levels(picture: Picture) -> int:
    """Return the number of levels: how often a picture is halved until it fits in one tile, plus one."""
    longer, levels = max(picture.width, picture.height), 1
    while longer > TILE_PX:
        longer, levels = -(-longer // 2), levels + 1
    return levels


def read_tile(picture: Picture, level: int, column: int, row: int) -> np.ndarray:
    """Return one tile, uint8 ``(h, w, 3)``; at the right and lower edge it is smaller than `TILE_PX`.

    Args:
        level: 0 is full resolution; each further one has half the pixels a side.

    Raises:
        SlideError: If there is no such tile.
    """
    downsample = 2**level if 0 <= level < count_levels(picture) else 0
    step = TILE_PX * downsample
    if (
        not downsample
        or column < 0
        or row < 0
        or column * step >= picture.width
        or row * step >= picture.height
    ):
        raise SlideError(f"there is no tile {column}, {row} at level {level}")
    x, y = column * step, row * step
    width = min(TILE_PX, -(-(picture.width - x) // downsample))
    height = min(TILE_PX, -(-(picture.height - y) // downsample))
    tile = picture.read(x, y, width, height, downsample)
    return _cut_overview(picture, x, y, width, height, downsample) if tile is None else tile


def _cut_overview(picture: Picture, x: int, y: int, width: int, height: int, downsample: int) -> np.ndarray:
    overview = picture.overview
    zoom_x, zoom_y = (
        overview.shape[1] / picture.width * downsample,
        overview.shape[0] / picture.height * downsample,
    )
    matrix = np.array([[zoom_x, 0, x / downsample * zoom_x], [0, zoom_y, y / downsample * zoom_y]])
    return np.asarray(
        cv2.warpAffine(
            overview,
            matrix,
            (width, height),
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REPLICATE,
        )
    )


def encode_jpeg(image: np.ndarray) -> bytes:
    """Return an image as JPEG."""
    return bytes(
        simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=_QUALITY, colorsubsampling="420")
    )
