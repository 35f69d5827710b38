"""Reading of slides and large images at a requested resolution, as RGB in level-0 coordinates.

`open_slide` returns a `Slide`, read at a level of its pyramid or at a requested mpp. Pixels outside the slide
or the scanned area are white. Reading is thread-safe. Colour profiles are not applied.
"""

from pathlib import Path
from types import TracebackType

import cv2
import numpy as np

from biopsy.core.errors import FileFormatError, SlideError
from biopsy.core.loaders import open_regular
from biopsy.slide_io.backends import PLAIN_TIFF, Backend, ImageBackend, Level, OpenSlideBackend, TiffBackend
from biopsy.slide_io.resolution import SAME_MPP, check_mpp, resolve_mpp

__all__ = ["Level", "Slide", "open_slide"]

MAX_OVERVIEW_PX = 2**31
"""Largest number of pixels of a level for an overview: 46,340 x 46,340."""

_BLOCK_PX = 2**24  # level pixels per block of an overview
_EARLIER_PX = 32  # largest margin before the corner of a resampled read
_NEAR_PX = 1 / 64
_WHITE = 255


def open_slide(path: Path | str, *, mpp: float | None = None) -> "Slide":
    """Open a slide: what OpenSlide reads (SVS, NDPI, MRXS, DICOM, tiled TIFF), or a large plain image.

    Args:
        path: The file; for DICOM any file of the series.
        mpp: Pixel size at level 0 in µm, for slides that record none or an implausible one.

    Raises:
        SlideError: If the file cannot be read, or its mpp is missing, implausible or contradicted.
    """
    path = Path(path)
    backend = _open_backend(path)
    try:
        return Slide(path, backend, *resolve_mpp(path.name, backend.recorded, mpp))
    except SlideError:
        backend.close()
        raise


class Slide:
    """An open slide; close it, or use it as a context manager.

    ``width, height`` are the size at level 0, ``mpp`` its pixel size in µm and ``mpp_source`` the source of
    that value; ``objective`` is the recorded magnification, None if there is none; ``format`` is the vendor
    in OpenSlide, or ``png``, ``jpeg``, ``tiff``, ``bmp``, ``webp``; ``corner`` is the corner of the scanned
    bounds at level 0, the origin of coordinates in QuPath.
    """

    def __init__(self, path: Path, backend: Backend, mpp: float, mpp_source: str) -> None:
        self.path = path
        self.mpp = mpp
        self.mpp_source = mpp_source
        self.levels = backend.levels
        self.width, self.height = backend.levels[0][:2]
        self.objective = backend.recorded.objective
        self.format = backend.format
        self.corner = backend.corner
        self._backend = backend

    def __enter__(self) -> "Slide":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._backend.close()

    def tile_px(self, level: int = 0) -> tuple[int, int] | None:
        """Return width and height of the native tiles of a level, None without tiles."""
        return self._backend.tile_px(level)

    def read(self, x: float, y: float, width: int, height: int, *, level: int = 0) -> np.ndarray:
        """Return a rectangle of one level.

        Args:
            x, y: Left and upper edge in level-0 pixels, as in OpenSlide; rounded to a pixel of the level.

        Returns:
            uint8 ``(height, width, 3)`` RGB.
        """
        downsample = self.levels[level].downsample
        return self._read_level(level, round(x / downsample), round(y / downsample), width, height)

    def level_for(self, mpp: float) -> tuple[int, float]:
        """Return the level that is read for a resolution, and the number of its pixels per output pixel.

        The level is the coarsest one that is fine enough. A scale within 1 % of an integer is rounded, so
        that pixels are copied or averaged.
        """
        level = self._finer_level(mpp)
        scale = self._scale(level, mpp)
        integer_scale = max(1, round(scale))
        return level, float(integer_scale) if abs(scale / integer_scale - 1) <= SAME_MPP else scale

    def level_0_px(self, mpp: float) -> float:
        """Return the number of level-0 pixels per pixel of `read_at`, along one side.

        It defines grids; because of the rounding in `level_for` it is not ``mpp / self.mpp``.
        """
        level, scale = self.level_for(mpp)
        return scale * self.levels[level].downsample

    def read_at(self, x: float, y: float, width: int, height: int, *, mpp: float) -> np.ndarray:
        """Return a rectangle at a requested resolution.

        It is resampled from the level of `level_for`: averaged by area, copied if the level is within 1 %, or
        enlarged linearly if the slide is up to 1.5 times too coarse.

        Args:
            x, y: Left and upper edge in level-0 pixels; rounded to a pixel of the level for integer scales.
            width, height: Size in output pixels.

        Returns:
            uint8 ``(height, width, 3)`` RGB.
        """
        level, scale = self.level_for(mpp)
        return self._read_scaled(x, y, width, height, level, scale)

    def overview(self, *, mpp: float) -> np.ndarray:
        """Return the whole slide at a resolution, read in blocks.

        Returns:
            uint8 ``(H, W, 3)`` RGB; ``mpp`` is exact up to the rounding of height and width.

        Raises:
            SlideError: If the slide is damaged, or has no level that is small enough.
        """
        level = self._finer_level(mpp)
        size, scale = self.levels[level], self._scale(level, mpp)
        if size.width * size.height > MAX_OVERVIEW_PX:
            raise SlideError(
                f"slide {self.path} has no smaller level than {size.width:,} x {size.height:,} pixels, too "
                "large to be read whole; save it as a pyramidal TIFF"
            )
        width, height = max(1, round(size.width / scale)), max(1, round(size.height / scale))
        result = np.empty((height, width, 3), np.uint8)
        step = scale * size.downsample
        rows = max(1, int(_BLOCK_PX / (width * scale**2)))
        columns = width
        if rows * scale < (self.tile_px(level) or (0, 0))[1]:  # to avoid decoding rows of tiles repeatedly
            rows = columns = max(1, int(_BLOCK_PX**0.5 / scale))
        for top in range(0, height, rows):
            for left in range(0, width, columns):
                n_rows, n_columns = min(rows, height - top), min(columns, width - left)
                result[top : top + n_rows, left : left + n_columns] = self._read_scaled(
                    left * step, top * step, n_columns, n_rows, level, scale
                )
        return result

    def thumbnail(self, max_px: int) -> np.ndarray:
        """Return the whole slide with a longer side of at most ``max_px`` pixels."""
        longer = max(self.width, self.height)
        if longer <= max_px:
            return self.read(0, 0, self.width, self.height)
        return self.overview(mpp=self.mpp * longer / max_px)

    def _finer_level(self, mpp: float) -> int:
        """Return the coarsest level that is fine enough, within 1 %."""
        check_mpp(self.path.name, self.mpp, mpp)
        fine = [n for n in range(len(self.levels)) if self._scale(n, mpp) >= 1 - SAME_MPP]
        return max(fine, key=lambda n: self.levels[n].downsample, default=0)

    def _scale(self, level: int, mpp: float) -> float:
        return mpp / (self.mpp * self.levels[level].downsample)

    def _read_scaled(
        self, x: float, y: float, width: int, height: int, level: int, scale: float
    ) -> np.ndarray:
        if scale == 1:
            return self.read(x, y, width, height, level=level)
        step = scale * self.levels[level].downsample
        left, top = _find_margin(x / step, scale), _find_margin(y / step, scale)
        right, bottom = left + width, top + height
        source = self.read(
            x - left * step,
            y - top * step,
            _source_size(right, scale),
            _source_size(bottom, scale),
            level=level,
        )
        interpolation = cv2.INTER_AREA if scale > 1 else cv2.INTER_LINEAR
        # the exact scale, not the ratio of sizes, so that positions do not depend on the width
        resized = cv2.resize(source, None, fx=1 / scale, fy=1 / scale, interpolation=interpolation)
        return np.ascontiguousarray(resized[top:bottom, left:right])

    def _read_level(self, level: int, left: int, top: int, width: int, height: int) -> np.ndarray:
        """Return a rectangle of a level in its pixels, white outside the level."""
        size = self.levels[level]
        right, bottom = min(left + width, size.width), min(top + height, size.height)
        first, upper = max(left, 0), max(top, 0)
        if (first, upper, right, bottom) == (left, top, left + width, top + height):
            return self._backend.read(level, left, top, width, height)
        region = np.full((height, width, 3), _WHITE, np.uint8)
        if right > first and bottom > upper:
            inside = self._backend.read(level, first, upper, right - first, bottom - upper)
            region[upper - top : bottom - top, first - left : right - left] = inside
        return region


def _open_backend(path: Path) -> Backend:
    import openslide

    try:
        open_regular(path).close()
        vendor = openslide.OpenSlide.detect_format(path)
        if vendor is None:
            return ImageBackend(path)
        return TiffBackend(path) if vendor in PLAIN_TIFF else OpenSlideBackend(path)
    except FileFormatError as error:
        raise SlideError(f"slide {error}", error.reason) from None
    except openslide.OpenSlideError as error:
        raise SlideError(f"slide {path} cannot be read: {error}") from None


def _find_margin(start: float, scale: float) -> int:
    """Return the margin in output pixels with which a read starts at a source pixel."""
    begins = (start - np.arange(_EARLIER_PX)) * scale
    return int((np.abs(begins - np.rint(begins)) / _NEAR_PX).astype(int).argmin())


def _source_size(n: int, scale: float) -> int:
    """Return the number of source pixels for ``n`` output pixels."""
    n_source = int(np.ceil(n * scale))
    while round(n_source / scale) < n:
        n_source += 1
    return max(n_source, 1)
