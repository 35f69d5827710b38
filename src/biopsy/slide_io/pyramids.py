"""Large images out: pyramidal TIFF, tile by tile, in memory that does not grow with the image's height.

The file is what OpenSlide and QuPath call a generic tiled TIFF: tiles, each level half the one before, the
resolution in pixels per centimetre. Level 0 is written as its tiles arrive; the smaller levels are made on
the way and wait, encoded, in a nameless file beside it.
"""

import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

import cv2
import imagecodecs
import numpy as np
import tifffile

from biopsy.core.errors import SlideError
from biopsy.core.files import replace_atomic

Tile = np.ndarray | None
"""Pixels ``(h, w)`` or ``(h, w, 3)``; None where there is nothing but background."""

Source = Callable[[int, int, int, int], Tile]
"""``source(x, y, width, height)`` gives a rectangle of the image at level 0."""

Compression = Literal["jpeg", "deflate"]

_CLASSIC_BYTES = 2**31  # of pixels, uncompressed: larger files get 64-bit offsets
_SUBSAMPLING = (2, 2)  # as most scanners store colour


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
    channels: int = 3,
    dtype: str = "uint8",
    background: int | tuple[int, int, int] | None = None,
    description: str = "",
    workers: int = 1,
) -> Path:
    """Write an image as pyramidal TIFF, whole or not at all.

    Args:
        path: The file to be; one already there is replaced.
        source: The image ``(height, width)`` or ``(height, width, 3)``, or a function that gives rectangles
            of it. It is called once for every tile, row by row; None stands for a tile of background.
        mpp: Micrometres per pixel of level 0.
        tile_px: Side of a tile, a multiple of 16.
        compression: ``jpeg`` (8-bit RGB, lossy) or ``deflate`` (anything, lossless).
        quality: Of JPEG, 1 to 100.
        levels: How many; by default down to one that fits into a tile.
        channels: 3 or 1; an array brings its own.
        dtype: ``uint8``, or ``float32`` for one channel, which OpenSlide does not read; NaN is left out of
            averages. An array brings its own.
        background: What lies in tiles that are None; by default white in RGB and 0 in one channel.
        description: The file's ImageDescription. OpenSlide takes one that begins with "Aperio" for SVS.
        workers: Threads that call ``source`` and encode.

    Raises:
        SlideError: If sizes, mpp or the kind of pixels allow no pyramid.
    """
    path = Path(path)
    if isinstance(source, np.ndarray):
        image = source
        if image.shape[:2] != (height, width):
            result = f"{image.shape[1]} x {image.shape[0]}"
            raise SlideError(f"{path.name}: the array is {result} pixels, not {width} x {height}")
        channels, dtype = (1 if image.ndim == 2 else image.shape[2]), str(image.dtype)
        source = lambda x, y, w, h: image[y : y + h, x : x + w]  # noqa: E731
    _check(path.name, width, height, mpp, tile_px, compression, channels, dtype)
    if background is None:
        background = 255 if channels == 3 else 0
    coder = _Coder(tile_px, channels, np.dtype(dtype), compression, quality, background)
    plan = _plan_levels(width, height, tile_px, levels)
    big = width * height * channels * coder.dtype.itemsize > _CLASSIC_BYTES
    with replace_atomic(path) as partial, tempfile.TemporaryFile(dir=partial.parent) as spool:
        with tifffile.TiffWriter(partial, bigtiff=big) as file, ThreadPoolExecutor(workers) as pool:
            for n, level in enumerate(plan):
                tiles = _first_tiles(plan, coder, source, spool, pool) if n == 0 else level.spooled(spool)
                file.write(
                    tiles,
                    shape=(level.height, level.width, *coder.depth),
                    dtype=coder.dtype,
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
    """One level while it is made: its size, the row of tiles that waits for the next, where its tiles lie."""

    width: int
    height: int
    tile_px: int
    waiting: list[Tile] | None = None
    places: list[tuple[int, int]] = field(default_factory=list)

    @property
    def columns(self) -> int:
        return -(-self.width // self.tile_px)

    @property
    def rows(self) -> int:
        return -(-self.height // self.tile_px)

    def spooled(self, spool: IO[bytes]) -> Iterator[bytes]:
        """Return the encoded tiles back."""
        for offset, n_bytes in self.places:
            spool.seek(offset)
            yield spool.read(n_bytes)


class _Coder:
    """How tiles become bytes, and the TIFF tags that say so."""

    def __init__(
        self,
        tile_px: int,
        channels: int,
        dtype: np.dtype,
        compression: Compression,
        quality: int,
        background: int | tuple[int, int, int],
    ) -> None:
        self.tile_px = tile_px
        self.dtype = dtype
        self.depth = (3,) if channels == 3 else ()
        self.background = background
        self.tags: dict[str, Any] = {"tile": (tile_px, tile_px), "compression": compression}
        self._quality = quality
        self._is_jpeg = compression == "jpeg"
        self._is_differenced = compression == "deflate" and dtype == np.uint8
        if self._is_jpeg:
            self.tags |= {"photometric": "ycbcr", "subsampling": _SUBSAMPLING}
        else:
            self.tags |= {"photometric": "rgb" if channels == 3 else "minisblack"}
            self.tags |= {"predictor": 2} if self._is_differenced else {}
        self._nothing = self._encode(np.full((tile_px, tile_px, *self.depth), self.background, dtype))

    def encode(self, tile: Tile) -> bytes:
        """Return a tile's bytes, one at the edge padded by its last row and column."""
        if tile is None:
            return self._nothing
        missing = self.tile_px - tile.shape[0], self.tile_px - tile.shape[1]
        if any(missing):
            tile = np.pad(tile, ((0, missing[0]), (0, missing[1]), *[(0, 0)] * len(self.depth)), "edge")
        return self._encode(np.ascontiguousarray(tile))

    def _encode(self, tile: np.ndarray) -> bytes:
        if self._is_jpeg:
            encoded = imagecodecs.jpeg8_encode(
                tile, self._quality, colorspace="RGB", outcolorspace="YCBCR", subsampling=_SUBSAMPLING
            )
            return bytes(encoded)
        if self._is_differenced:
            tile = np.concatenate([tile[:, :1], np.diff(tile, axis=1)], axis=1)
        return bytes(imagecodecs.zlib_encode(tile.tobytes(), level=6))

    def halve(self, block: list[Tile], width: int, height: int) -> Tile:
        """Average four tiles (two rows of two, row by row) into one of ``width`` x ``height``."""
        if all(tile is None for tile in block):
            return None
        half = self.tile_px // 2
        whole = np.full((height, width, *self.depth), self.background, self.dtype)
        for n, tile in enumerate(block):
            if tile is not None:
                small = _halve(tile)
                top, left = (n // 2) * half, (n % 2) * half
                whole[top : top + small.shape[0], left : left + small.shape[1]] = small
        return whole


def _first_tiles(
    plan: list[_Level], coder: _Coder, source: Source, spool: IO[bytes], pool: ThreadPoolExecutor
) -> Iterator[bytes]:
    """Return level 0's encoded tiles, and make the other levels' on the way."""
    base, px = plan[0], coder.tile_px

    def get(place: tuple[int, int]) -> tuple[Tile, bytes]:
        x, y = place
        size = min(px, base.width - x), min(px, base.height - y)
        tile = source(x, y, *size)
        if tile is not None and tile.shape != (size[1], size[0], *coder.depth):
            raise SlideError(f"a tile of shape {tile.shape} was given where {size[0]} x {size[1]} is needed")
        tile = None if tile is None else tile.astype(coder.dtype, copy=False)
        return tile, coder.encode(tile)

    for y in range(0, base.height, px):
        row = list(pool.map(get, [(x, y) for x in range(0, base.width, px)]))
        _reduce(plan, 0, [tile for tile, _ in row], coder, spool, is_last=y + px >= base.height)
        yield from (encoded for _, encoded in row)


def _reduce(
    plan: list[_Level], n: int, row: list[Tile], coder: _Coder, spool: IO[bytes], is_last: bool
) -> None:
    """Take a finished row of tiles of level ``n``; with the one before it, it makes a row of the next."""
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
    top = len(smaller.places) // smaller.columns * px
    for column in range(smaller.columns):
        block = [half[k] if k < len(half) else None for half in pair for k in (2 * column, 2 * column + 1)]
        size = min(px, smaller.width - column * px), min(px, smaller.height - top)
        made.append(coder.halve(block, *size))
        encoded = coder.encode(made[-1])
        smaller.places.append((spool.tell(), len(encoded)))
        spool.write(encoded)
    _reduce(plan, n + 1, made, coder, spool, is_last)


def _halve(tile: np.ndarray) -> np.ndarray:
    """Average blocks of 2 x 2 pixels; an odd last row or column counts twice, a NaN not at all."""
    if tile.shape[0] % 2 or tile.shape[1] % 2:
        odd = ((0, tile.shape[0] % 2), (0, tile.shape[1] % 2))
        tile = np.pad(tile, (*odd, *[(0, 0)] * (tile.ndim - 2)), "edge")
    size = tile.shape[1] // 2, tile.shape[0] // 2
    if tile.dtype == np.uint8 or not np.isnan(tile).any():
        return np.asarray(cv2.resize(tile, size, interpolation=cv2.INTER_AREA))
    known = ~np.isnan(tile)
    share = cv2.resize(known.astype(np.float32), size, interpolation=cv2.INTER_AREA)
    total = cv2.resize(np.where(known, tile, 0).astype(np.float32), size, interpolation=cv2.INTER_AREA)
    return np.divide(total, share, out=np.full_like(total, np.nan), where=share > 0)


def _plan_levels(width: int, height: int, tile_px: int, levels: int | None) -> list[_Level]:
    plan = [_Level(width, height, tile_px)]
    while len(plan) < levels if levels else max(plan[-1].width, plan[-1].height) > tile_px:
        plan.append(_Level(-(-plan[-1].width // 2), -(-plan[-1].height // 2), tile_px))
    return plan


def _check(
    name: str, width: int, height: int, mpp: float, tile_px: int, compression: str, channels: int, dtype: str
) -> None:
    if width < 1 or height < 1 or not mpp > 0:
        raise SlideError(f"{name}: a pyramid of {width} x {height} pixels at {mpp!r} um/px cannot be written")
    if tile_px < 16 or tile_px % 16:
        raise SlideError(f"{name}: tile_px {tile_px!r} is not a multiple of 16")
    if channels not in (1, 3) or dtype not in ("uint8", "float32") or (channels == 3 and dtype != "uint8"):
        raise SlideError(
            f"{name}: {channels} channels of {dtype}; 3 of uint8, or 1 of uint8 or float32, are written"
        )
    if compression not in ("jpeg", "deflate"):
        raise SlideError(f"{name}: compression {compression!r} is unknown; known: deflate, jpeg")
    if compression == "jpeg" and (channels, dtype) != (3, "uint8"):
        raise SlideError(f"{name}: jpeg holds 8-bit RGB only; pass compression='deflate'")
