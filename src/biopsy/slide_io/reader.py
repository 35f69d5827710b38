"""Slides and large images at a stated resolution: any rectangle, at level 0's coordinates, in RGB.

`open_slide` gives a `Slide`; it reads at a level of the file's pyramid or at a wanted mpp. What lies beyond
the slide's edge, or was never scanned, is white. Reads may come from many threads at once. Colour profiles
are not applied.
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
"""Pixels of the largest level that is averaged down to a picture of the whole slide: 46,340 x 46,340."""

_BLOCK_PX = 2**24  # level pixels held at once while a whole slide is averaged down
_EARLIER_PX = 32  # at most, that a resampled read begins before its corner
_NEAR_PX = 1 / 64
_WHITE = 255


def open_slide(path: Path | str, *, mpp: float | None = None) -> "Slide":
    """Open a slide: what OpenSlide reads (SVS, NDPI, MRXS, DICOM, tiled TIFF), or a large plain image.

    Args:
        path: The file; for DICOM any file of the series.
        mpp: Micrometres per pixel at level 0 as the user states it, for a slide that has no value of its own
            or one that cannot be true.

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

    ``width, height`` are pixels of level 0, ``mpp`` its micrometres per pixel and ``mpp_source`` where that
    value came from; ``objective`` is the magnification the file names, None if it names none; ``format`` is
    OpenSlide's name of the vendor, or ``png``, ``jpeg``, ``tiff``, ``bmp``, ``webp``; ``corner`` is where
    what was scanned begins at level 0, from which QuPath counts.
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
        """Let go of the file."""
        self._backend.close()

    def tile_px(self, level: int = 0) -> tuple[int, int] | None:
        """Return width and height of a level's tiles in the file, None where it has none."""
        return self._backend.tile_px(level)

    def read(self, x: float, y: float, width: int, height: int, *, level: int = 0) -> np.ndarray:
        """Return a rectangle of one level.

        Args:
            x: Left edge in pixels of level 0, as in OpenSlide; taken to the nearest pixel of the level.
            y: Upper edge in pixels of level 0.
            level: Which level; 0 is the finest.

        Returns:
            uint8 ``(height, width, 3)`` RGB.
        """
        downsample = self.levels[level].downsample
        return self._read_level(level, round(x / downsample), round(y / downsample), width, height)

    def level_for(self, mpp: float) -> tuple[int, float]:
        """Return the level that is read for a resolution, and how many of its pixels make one wanted pixel.

        The level is the coarsest that is as fine as wanted. The scale is a whole number where it is within
        1 % of one, so that pixels are taken, or averaged, as they are.

        Raises:
            SlideError: If the slide is too coarse.
        """
        level = self._finer_level(mpp)
        scale = self._scale(level, mpp)
        whole = max(1, round(scale))
        return level, float(whole) if abs(scale / whole - 1) <= SAME_MPP else scale

    def level_0_px(self, mpp: float) -> float:
        """Return how many pixels of level 0, along one side, make one pixel of `read_at`.

        Lay grids out by this: where `level_for` takes a whole number, it is not ``mpp / self.mpp``.

        Raises:
            SlideError: If the slide is too coarse.
        """
        level, scale = self.level_for(mpp)
        return scale * self.levels[level].downsample

    def read_at(self, x: float, y: float, width: int, height: int, *, mpp: float) -> np.ndarray:
        """Return a rectangle at a wanted resolution.

        It is taken from the level that `level_for` names: averaged down over the area each pixel covers,
        copied where the level is within 1 %, enlarged linearly where the slide is up to 1.5 times too coarse.

        Args:
            x: Left edge in pixels of level 0; taken to the nearest pixel of the level where pixels are copied
                or averaged by whole numbers, and else nearer than that.
            y: Upper edge in pixels of level 0.
            width: Pixels at ``mpp``.
            height: Pixels at ``mpp``.
            mpp: Micrometres per pixel of the answer.

        Returns:
            uint8 ``(height, width, 3)`` RGB.

        Raises:
            SlideError: If the slide is too coarse, or damaged.
        """
        level, scale = self.level_for(mpp)
        return self._read_scaled(x, y, width, height, level, scale)

    def overview(self, *, mpp: float) -> np.ndarray:
        """Return the whole slide at a resolution, block by block, in memory bounded by the answer.

        Returns:
            uint8 ``(H, W, 3)`` RGB; ``mpp`` is exact but for the rounding of height and width.

        Raises:
            SlideError: If the slide is damaged, or has no level that is small enough to be read whole.
        """
        level = self._finer_level(mpp)
        size, scale = self.levels[level], self._scale(level, mpp)
        if size.width * size.height > MAX_OVERVIEW_PX:
            raise SlideError(
                f"slide {self.path} has no smaller level than {size.width:,} x {size.height:,} pixels, too "
                "large to be read whole; save it as a pyramidal TIFF"
            )
        width, height = max(1, round(size.width / scale)), max(1, round(size.height / scale))
        whole = np.empty((height, width, 3), np.uint8)
        step = scale * size.downsample
        rows = max(1, int(_BLOCK_PX / (width * scale**2)))
        columns = width
        if rows * scale < (self.tile_px(level) or (0, 0))[1]:  # else rows of tiles are decoded many times
            rows = columns = max(1, int(_BLOCK_PX**0.5 / scale))
        for top in range(0, height, rows):
            for left in range(0, width, columns):
                n_rows, n_columns = min(rows, height - top), min(columns, width - left)
                whole[top : top + n_rows, left : left + n_columns] = self._read_scaled(
                    left * step, top * step, n_columns, n_rows, level, scale
                )
        return whole

    def thumbnail(self, max_px: int) -> np.ndarray:
        """Return the whole slide, its longer side at most ``max_px`` pixels; a small slide as it is."""
        longer = max(self.width, self.height)
        if longer <= max_px:
            return self.read(0, 0, self.width, self.height)
        return self.overview(mpp=self.mpp * longer / max_px)

    def _finer_level(self, mpp: float) -> int:
        """Return the coarsest level that is as fine as wanted, or within 1 %."""
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
        left, top = _count_earlier(x / step, scale), _count_earlier(y / step, scale)
        right, bottom = left + width, top + height
        source = self.read(
            x - left * step, y - top * step, _covering(right, scale), _covering(bottom, scale), level=level
        )
        how = cv2.INTER_AREA if scale > 1 else cv2.INTER_LINEAR
        # by the exact scale, not the ratio of whole sizes: pixels lie right in a read of any width
        resized = cv2.resize(source, None, fx=1 / scale, fy=1 / scale, interpolation=how)
        return np.ascontiguousarray(resized[top:bottom, left:right])

    def _read_level(self, level: int, left: int, top: int, width: int, height: int) -> np.ndarray:
        """Read in a level's own pixels; what lies beyond its edge is white."""
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
    """Open a slide with what can read it."""
    import openslide

    try:
        open_regular(path).close()
        vendor = openslide.OpenSlide.detect_format(path)
        if vendor is None:
            return ImageBackend(path)
        return TiffBackend(path) if vendor in PLAIN_TIFF else OpenSlideBackend(path)
    except FileFormatError as error:
        raise SlideError(f"slide {error}") from None
    except openslide.OpenSlideError as error:
        raise SlideError(f"slide {path} cannot be read: {error}") from None


def _count_earlier(start: float, scale: float) -> int:
    """Return how many resampled pixels earlier to begin, so that the first begins at a source pixel."""
    begins = (start - np.arange(_EARLIER_PX)) * scale
    return int((np.abs(begins - np.rint(begins)) / _NEAR_PX).astype(int).argmin())


def _covering(n: int, scale: float) -> int:
    """Return how many source pixels ``n`` resampled ones need, so that as many whole ones come out."""
    n_source = int(np.ceil(n * scale))
    while round(n_source / scale) < n:
        n_source += 1
    return max(n_source, 1)
