"""The tiles of a TIFF slide, decoded one by one and kept for a while.

OpenSlide decodes a TIFF's tiles through several copies; decoding them here, with the same pixels, is about
six times as fast, and a tile that many reads touch is decoded once, whatever the number of threads. OpenSlide
still says what the levels are and reads what is not a plain tile.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import tifffile

from biopsy.core.errors import SlideError
from biopsy.imaging.backends import CACHE_BYTES, OpenSlideBackend

_PLAIN = (tifffile.PHOTOMETRIC.RGB, tifffile.PHOTOMETRIC.YCBCR)
_DECODER_ERRORS = (RuntimeError, ValueError, OSError, IndexError, tifffile.TiffFileError)


class TiffBackend(OpenSlideBackend):
    """A TIFF or SVS that OpenSlide opens, its tiles decoded by tifffile and imagecodecs."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._file = open(path, "rb")
        self._reading = threading.Lock()
        plain = {(page.imagewidth, page.imagelength): page for page in self._pages if _is_plain(page)}
        self._level_pages = [plain.get(level[:2]) for level in self.levels]
        self._cache = TileCache(CACHE_BYTES)

    def read(self, level: int, left: int, top: int, width: int, height: int) -> np.ndarray:
        """Give a rectangle inside a level."""
        page = self._level_pages[level]
        if page is None:
            return super().read(level, left, top, width, height)
        region = np.empty((height, width, 3), np.uint8)
        for row in range(top // page.tilelength, (top + height - 1) // page.tilelength + 1):
            for column in range(left // page.tilewidth, (left + width - 1) // page.tilewidth + 1):
                tile = self._cache.get((level, column, row), self._decode)
                _paste(tile, column * page.tilewidth - left, row * page.tilelength - top, region)
        return region

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()
        super().close()

    def _decode(self, level: int, column: int, row: int) -> np.ndarray:
        page = self._level_pages[level]
        assert page is not None
        across = -(-page.imagewidth // page.tilewidth)
        index = row * across + column
        n_bytes = page.databytecounts[index]
        left, top = column * page.tilewidth, row * page.tilelength
        if n_bytes == 0:  # Aperio leaves some out; OpenSlide draws them from another level
            size = self.levels[level]
            width, height = min(page.tilewidth, size.width - left), min(page.tilelength, size.height - top)
            return super().read(level, left, top, width, height)
        try:
            with self._reading:
                self._file.seek(page.dataoffsets[index])
                data = self._file.read(n_bytes)
            if len(data) < n_bytes:
                raise ValueError("the file ends within a tile")
            tile, _, _ = page.decode(data, index, jpegtables=page.jpegtables)
            if tile is None or tile.shape[-1] != 3:
                raise ValueError("a tile holds no RGB")
        except _DECODER_ERRORS as error:
            reason = " ".join(str(error).split())
            raise SlideError(
                f"slide {self._path} is damaged near x={left}, y={top} of level {level}: {reason}"
            ) from None
        return np.asarray(tile[0])


Place = tuple[int, int, int]
"""Level, column and row of a tile."""


class TileCache:
    """Decoded tiles, the ones used least recently dropped; each is made once, other threads wait for it."""

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity = capacity_bytes
        self._held = 0
        self._lock = threading.Lock()
        self._tiles: OrderedDict[Place, Future[np.ndarray]] = OrderedDict()

    def get(self, place: Place, make: Callable[[int, int, int], np.ndarray]) -> np.ndarray:
        """Give a tile; the first to ask makes it."""
        with self._lock:
            future = self._tiles.get(place)
            if future is not None:
                self._tiles.move_to_end(place)
            else:
                mine = self._tiles[place] = Future()
        if future is not None:
            return future.result()
        try:
            mine.set_result(make(*place))
        except BaseException as error:
            with self._lock:
                del self._tiles[place]
            mine.set_exception(error)
            raise
        self._keep(mine.result())
        return mine.result()

    def _keep(self, tile: np.ndarray) -> None:
        """Count a new tile, and drop the oldest finished ones that no longer fit."""
        with self._lock:
            self._held += tile.nbytes
            while self._held > self._capacity:
                place, oldest = next(iter(self._tiles.items()))
                if not oldest.done():
                    break
                self._held -= self._tiles.pop(place).result().nbytes


def _is_plain(page: tifffile.TiffPage) -> bool:
    return (
        page.is_tiled
        and page.samplesperpixel == 3
        and page.bitspersample == 8
        and page.planarconfig == tifffile.PLANARCONFIG.CONTIG
        and page.photometric in _PLAIN
    )


def _paste(tile: np.ndarray, left: int, top: int, region: np.ndarray) -> None:
    """Copy what of a tile lies in a region; the tile's corner is at ``left, top`` of it."""
    height, width = region.shape[:2]
    rows = slice(max(top, 0), min(top + tile.shape[0], height))
    columns = slice(max(left, 0), min(left + tile.shape[1], width))
    region[rows, columns] = tile[
        rows.start - top : rows.stop - top, columns.start - left : columns.stop - left
    ]
