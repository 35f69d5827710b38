"""Writing of pyramidal TIFFs, tile by tile, in memory independent of the height of the image.

The format is the generic tiled TIFF of OpenSlide and QuPath: each level has half the size of the
previous one, with the resolution in pixels per centimetre. Level 0 is written as its tiles arrive; smaller
levels are computed meanwhile and stored, encoded, in a temporary file.
"""

import tempfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

import cv2
import numpy as np
import tifffile
from imagecodecs import jpeg8_encode
from typing_extensions import TypedDict

from biopsy.core.errors import SlideError
from biopsy.core.files import replace_atomic

Tile = np.ndarray | None
"""uint8 ``(h, w, 3)``; None for background."""

Source = Callable[[int, int, int, int], Tile]
"""``source(x, y, width, height)`` returns a rectangle of the image at level 0."""

Compression = Literal["jpeg", "deflate"]

_CLASSIC_BYTES = 2**31  # uncompressed size above which BigTIFF is written
_SUBSAMPLING = (2, 2)  # as most scanners


def write_pyramid(
    path: Path | str,
    source: np.ndarray | Source,
    *,
    width: int,
    height: int,
    mpp: float,
    tile_px: int = 256,
    compression: Compression = "jpeg",
    quality: int = 90,
    levels: int | None = None,
    background: tuple[int, int, int] = (255, 255, 255),
    description: str = "",
    workers: int = 1,
) -> Path:
    """Write an RGB image as pyramidal TIFF, atomically.

    Args:
        source: The image, uint8 ``(height, width, 3)``, or a function that returns rectangles of it, called
            once per tile, row by row; None for a tile of background.
        tile_px: Side of a tile, a multiple of 16.
        compression: ``jpeg`` (lossy) or ``deflate`` (lossless).
        levels: Number of levels (default: until one fits into a tile).
        background: RGB colour of tiles that are None.
        description: ImageDescription; OpenSlide reads files with one that starts with "Aperio" as SVS.
        workers: Number of threads that call ``source`` and encode.
    """
    path = Path(path)
    if isinstance(source, np.ndarray):
        image = source
        if image.shape != (height, width, 3) or image.dtype != np.uint8:
            raise SlideError(
                f"{path.name}: array is {image.dtype} {image.shape}, expected uint8 ({height}, {width}, 3)"
            )
        source = lambda x, y, w, h: image[y : y + h, x : x + w]  # noqa: E731
    _check(path.name, width, height, mpp, tile_px, compression)
    coder = _Coder(tile_px, compression, quality, background)
    plan = _plan_levels(width, height, tile_px, levels)
    big = width * height * 3 > _CLASSIC_BYTES
    with replace_atomic(path) as partial, tempfile.TemporaryFile(dir=partial.parent) as spool:
        with tifffile.TiffWriter(partial, bigtiff=big) as file, ThreadPoolExecutor(workers) as pool:
            for n, level in enumerate(plan):
                tiles = _first_tiles(plan, coder, source, spool, pool) if n == 0 else level.spooled(spool)
                file.write(
                    tiles,
                    shape=(level.height, level.width, 3),
                    dtype=np.uint8,
                    subfiletype=int(n > 0),
                    resolution=(10000 / (mpp * 2**n), 10000 / (mpp * 2**n)),
                    resolutionunit="CENTIMETER",
                    description=description if n == 0 and description else None,
                    metadata=None,
                    software="biopsy",
                    **coder.tags,
                )
    return path


@dataclass
class _Level:
    """One level in progress: size, pending row of tiles, and positions of encoded tiles."""

    width: int
    height: int
    tile_px: int
    waiting: list[Tile] | None = None
    positions: list[tuple[int, int]] = field(default_factory=list)

    @property
    def columns(self) -> int:
        return -(-self.width // self.tile_px)

    @property
    def rows(self) -> int:
        return -(-self.height // self.tile_px)

    def spooled(self, spool: IO[bytes]) -> Iterator[bytes]:
        """Yield the encoded tiles."""
        for offset, n_bytes in self.positions:
            spool.seek(offset)
            yield spool.read(n_bytes)


class _Tags(TypedDict, total=False):
    """Keywords of tifffile's by which tiles are described."""

    tile: tuple[int, int]
    compression: Compression
    photometric: str
    subsampling: tuple[int, int]
    predictor: int


class _Coder:
    """Encoder of tiles, with the corresponding TIFF tags."""

    def __init__(
        self, tile_px: int, compression: Compression, quality: int, background: tuple[int, int, int]
    ) -> None:
        self.tile_px = tile_px
        self.background = background
        self.tags: _Tags = {"tile": (tile_px, tile_px), "compression": compression}
        self._quality = quality
        self._is_jpeg = compression == "jpeg"
        if self._is_jpeg:
            self.tags |= {"photometric": "ycbcr", "subsampling": _SUBSAMPLING}
        else:
            self.tags |= {"photometric": "rgb", "predictor": 2}
        self._empty = self._encode(np.full((tile_px, tile_px, 3), background, np.uint8))

    def encode(self, tile: Tile) -> bytes:
        """Return an encoded tile, padded by its last row and column."""
        if tile is None:
            return self._empty
        missing = self.tile_px - tile.shape[0], self.tile_px - tile.shape[1]
        if any(missing):
            tile = np.pad(tile, ((0, missing[0]), (0, missing[1]), (0, 0)), "edge")
        return self._encode(np.ascontiguousarray(tile))

    def _encode(self, tile: np.ndarray) -> bytes:
        if self._is_jpeg:
            encoded = jpeg8_encode(
                tile, self._quality, colorspace="RGB", outcolorspace="YCBCR", subsampling=_SUBSAMPLING
            )
            return bytes(encoded)
        tile = np.concatenate([tile[:, :1], np.diff(tile, axis=1)], axis=1)
        return zlib.compress(tile.tobytes(), 6)

    def halve(self, block: list[Tile], width: int, height: int) -> Tile:
        """Return the tile of ``width`` x ``height`` of four downsampled tiles (row by row)."""
        if all(tile is None for tile in block):
            return None
        half = self.tile_px // 2
        result = np.full((height, width, 3), self.background, np.uint8)
        for n, tile in enumerate(block):
            if tile is not None:
                small = _halve(tile)
                top, left = (n // 2) * half, (n % 2) * half
                result[top : top + small.shape[0], left : left + small.shape[1]] = small
        return result


def _first_tiles(
    plan: list[_Level], coder: _Coder, source: Source, spool: IO[bytes], pool: ThreadPoolExecutor
) -> Iterator[bytes]:
    """Yield the encoded tiles of level 0, and compute those of the other levels."""
    base, px = plan[0], coder.tile_px

    def get(corner: tuple[int, int]) -> tuple[Tile, bytes]:
        x, y = corner
        size = min(px, base.width - x), min(px, base.height - y)
        tile = source(x, y, *size)
        if tile is not None and tile.shape != (size[1], size[0], 3):
            raise SlideError(f"a tile has shape {tile.shape}, expected {size[1]} x {size[0]} x 3")
        return tile, coder.encode(tile)

    for y in range(0, base.height, px):
        row = list(pool.map(get, [(x, y) for x in range(0, base.width, px)]))
        _reduce(plan, 0, [tile for tile, _ in row], coder, spool, is_last=y + px >= base.height)
        yield from (encoded for _, encoded in row)


def _reduce(
    plan: list[_Level], n: int, row: list[Tile], coder: _Coder, spool: IO[bytes], is_last: bool
) -> None:
    """Combine a row of tiles of level ``n`` with the previous one into a row of the next level."""
    if n + 1 == len(plan):
        return
    level, smaller = plan[n], plan[n + 1]
    if level.waiting is None and not is_last:
        level.waiting = row
        return
    pair: list[list[Tile]] = [row, []] if level.waiting is None else [level.waiting, row]
    level.waiting = None
    made: list[Tile] = []
    px = coder.tile_px
    top = len(smaller.positions) // smaller.columns * px
    for column in range(smaller.columns):
        block = [half[k] if k < len(half) else None for half in pair for k in (2 * column, 2 * column + 1)]
        size = min(px, smaller.width - column * px), min(px, smaller.height - top)
        made.append(coder.halve(block, *size))
        encoded = coder.encode(made[-1])
        smaller.positions.append((spool.tell(), len(encoded)))
        spool.write(encoded)
    _reduce(plan, n + 1, made, coder, spool, is_last)


def _halve(tile: np.ndarray) -> np.ndarray:
    """Return the means of 2 x 2 pixels; an odd last row or column is repeated."""
    if tile.shape[0] % 2 or tile.shape[1] % 2:
        tile = np.pad(tile, ((0, tile.shape[0] % 2), (0, tile.shape[1] % 2), (0, 0)), "edge")
    size = tile.shape[1] // 2, tile.shape[0] // 2
    return np.asarray(cv2.resize(tile, size, interpolation=cv2.INTER_AREA))


def _plan_levels(width: int, height: int, tile_px: int, levels: int | None) -> list[_Level]:
    plan = [_Level(width, height, tile_px)]
    while len(plan) < levels if levels else max(plan[-1].width, plan[-1].height) > tile_px:
        plan.append(_Level(-(-plan[-1].width // 2), -(-plan[-1].height // 2), tile_px))
    return plan


def _check(name: str, width: int, height: int, mpp: float, tile_px: int, compression: str) -> None:
    if width < 1 or height < 1 or not mpp > 0:
        raise SlideError(f"{name}: a pyramid of {width} x {height} pixels at {mpp!r} um/px cannot be written")
    if tile_px < 16 or tile_px % 16:
        raise SlideError(f"{name}: tile_px {tile_px!r} is not a multiple of 16")
    if compression not in ("jpeg", "deflate"):
        raise SlideError(f"{name}: compression {compression!r} is unknown; known: deflate, jpeg")
