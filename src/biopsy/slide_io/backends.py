"""Backends of the slide reader: OpenSlide, images in memory, and tiled TIFFs."""

import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import cv2
import numpy as np
import tifffile

from biopsy.core.errors import DataError, FileFormatError, SlideError
from biopsy.core.loaders import read_bytes
from biopsy.slide_io.images import IMAGE_SUFFIXES, decode
from biopsy.slide_io.resolution import Recorded

SLIDE_SUFFIXES = (*IMAGE_SUFFIXES, *".svs .ndpi .mrxs .dcm .scn .bif .vms .vmu .svslide .czi".split())
"""Suffixes of slides and large images, in lower case: those of `decode` and of OpenSlide."""

MAX_TILE_PX = 2**26
"""Largest number of pixels of a tile: 8192 x 8192, 0.2 GB."""

MAX_IMAGE_PX = 2**28
"""Largest number of pixels of an image without tiles: 16,384 x 16,384, 0.8 GB in memory."""

_MAX_IMAGE_BYTES = 4 * MAX_IMAGE_PX  # of the file

CACHE_BYTES = 2**28  # of decoded tiles: a row of 512-px tiles of a slide of 100,000 px

PLAIN_TIFF = ("aperio", "generic-tiff")
"""Vendors in OpenSlide of formats whose levels are TIFF pages."""

_RGB, _YCBCR = 2, 6  # TIFF 6.0's PhotometricInterpretation, and how many samples a pixel has
_SAMPLES = {0: (1, 2), 1: (1, 2), 3: (1, 2), _RGB: (3, 4), _YCBCR: (3,)}
_UNSIGNED = 1

_OME_UM = {"pm": 1e-6, "nm": 1e-3, "\u00b5m": 1.0, "\u03bcm": 1.0, "um": 1.0, "mm": 1e3, "cm": 1e4}
"""Micrometres of OME's units of length; the micro sign is also written as a Greek letter."""

_IMAGES = {
    b"\x89PNG": "png",
    b"\xff\xd8\xff": "jpeg",
    b"II": "tiff",
    b"MM": "tiff",
    b"BM": "bmp",
    b"RIFF": "webp",
}


class Level(NamedTuple):
    """One level of a slide's pyramid."""

    width: int
    height: int
    downsample: float
    """Level-0 pixels per pixel of this level, 1 or more."""


class Backend(Protocol):
    """Interface of the backends of a `Slide`."""

    format: str
    levels: tuple[Level, ...]
    recorded: Recorded
    corner: tuple[int, int]
    """Corner of the scanned bounds in level-0 pixels, the origin of coordinates in QuPath."""

    def tile_px(self, level: int) -> tuple[int, int] | None:
        """Return width and height of the native tiles of a level, None without tiles."""

    def read(self, level: int, left: int, top: int, width: int, height: int) -> np.ndarray:
        """Return a rectangle inside a level, uint8 ``(height, width, 3)``."""

    def close(self) -> None:
        """Close the file."""


class OpenSlideBackend:
    """Slides read by OpenSlide: SVS, NDPI, MRXS, DICOM, pyramidal TIFF and others."""

    def __init__(self, path: Path) -> None:
        import openslide

        self._path = path
        self._slide = openslide.OpenSlide(path)
        self._slide.set_cache(openslide.OpenSlideCache(CACHE_BYTES))
        properties = self._slide.properties
        self.format = properties[openslide.PROPERTY_NAME_VENDOR]
        self._pages = _read_level_pages(path, self._slide.level_dimensions)
        _check_pages(path, self._pages, is_plain=self.format in PLAIN_TIFF)
        self._downsamples = self._slide.level_downsamples
        self.levels: tuple[Level, ...] = tuple(
            Level(*size, _whole_downsample(self._slide.dimensions, size, downsample))
            for size, downsample in zip(self._slide.level_dimensions, self._downsamples, strict=True)
        )
        ome_x, ome_y = _ome_mpp(properties.get("tiff.ImageDescription", ""))
        self.recorded = Recorded(
            mpp_x=ome_x or _number(properties, openslide.PROPERTY_NAME_MPP_X),
            mpp_y=ome_y or _number(properties, openslide.PROPERTY_NAME_MPP_Y),
            objective=_number(properties, openslide.PROPERTY_NAME_OBJECTIVE_POWER),
        )
        self.corner = _find_corner(properties)

    def tile_px(self, level: int) -> tuple[int, int] | None:
        properties = self._slide.properties
        width, height = (
            properties.get(f"openslide.level[{level}].tile-{side}") for side in ("width", "height")
        )
        return (int(width), int(height)) if width and height else None

    def read(self, level: int, left: int, top: int, width: int, height: int) -> np.ndarray:
        """Return a rectangle inside a level; transparent pixels become white."""
        import openslide

        downsample = self._downsamples[level]
        corner = round(left * downsample), round(top * downsample)
        try:
            region = self._slide.read_region(corner, level, (width, height))
        except openslide.OpenSlideError as error:
            raise SlideError(
                f"slide {self._path} is damaged at x={corner[0]}, y={corner[1]}: {error}"
            ) from None
        pixels = np.asarray(region)
        if pixels[..., 3].min() == 255:
            return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_RGBA2RGB), np.uint8)
        alpha = pixels[..., 3:].astype(np.float32) / 255
        return np.rint(pixels[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)

    def close(self) -> None:
        self._slide.close()


class ImageBackend:
    """PNG, JPEG, BMP, WebP or TIFF without tiles, decoded into memory."""

    def __init__(self, path: Path) -> None:
        try:
            data = read_bytes(path, max_bytes=_MAX_IMAGE_BYTES)
            self._pixels = decode(data, max_px=MAX_IMAGE_PX)
        except FileFormatError as error:
            raise SlideError(f"slide {error}", error.reason) from None
        except DataError as error:
            raise SlideError(f"slide {path} {error}{_ADVICE.get(error.reason, '')}", error.reason) from None
        height, width = self._pixels.shape[:2]
        self.levels: tuple[Level, ...] = (Level(width, height, 1.0),)
        self.format = next((kind for start, kind in _IMAGES.items() if data.startswith(start)), "image")
        self.corner = 0, 0
        self.recorded = Recorded(*_tiff_mpp(path)) if self.format == "tiff" else Recorded()

    def tile_px(self, level: int) -> tuple[int, int] | None:
        return None

    def read(self, level: int, left: int, top: int, width: int, height: int) -> np.ndarray:
        return self._pixels[top : top + height, left : left + width].copy()

    def close(self) -> None:
        self._pixels = np.empty((0, 0, 3), np.uint8)


def _find_corner(properties: Mapping[str, str]) -> tuple[int, int]:
    """Return the corner of the scanned bounds as in QuPath, which requires all four properties."""
    names = [f"openslide.bounds-{side}" for side in ("x", "y", "width", "height")]
    try:
        left, top, _, _ = (int(properties[name]) for name in names)
    except (KeyError, ValueError):
        return 0, 0
    return left, top


def _read_level_pages(path: Path, sizes: Sequence[tuple[int, int]]) -> list[tifffile.TiffPage]:
    """Return the pages of a TIFF that have the size of a level; none for other files."""
    with open(path, "rb") as file:
        if file.read(2) not in (b"II", b"MM"):
            return []
    try:
        with tifffile.TiffFile(path) as tiff:
            pages = [page for page in tiff.pages if isinstance(page, tifffile.TiffPage)]
            pages = [page for page in pages if (page.imagewidth, page.imagelength) in sizes]
            for page in pages:  # load lazy attributes before the file is closed
                _ = page.dataoffsets, page.databytecounts, page.jpegtables, page.decode
    except Exception as error:  # tifffile raises various exceptions for damaged files
        raise SlideError(f"slide {path} cannot be read as TIFF: {' '.join(str(error).split())}") from None
    return pages


def _check_pages(path: Path, pages: list[tifffile.TiffPage], *, is_plain: bool) -> None:
    """Refuse pixels without a defined conversion to RGB, as `decode` does."""
    for page in pages:
        kind = getattr(page.photometric, "name", page.photometric)
        if page.bitspersample > 8:
            fault = f"has {page.bitspersample} bits per channel; save it as 8-bit RGB"
        elif page.sampleformat != _UNSIGNED or page.samplesperpixel not in _SAMPLES.get(page.photometric, ()):
            fault = f"is of mode {kind} with {page.samplesperpixel} channels; save it as 8-bit RGB"
        elif page.is_tiled and page.tilewidth * page.tilelength > MAX_TILE_PX:
            fault = f"has tiles of {page.tilewidth:,} x {page.tilelength:,} pixels; save it with smaller ones"
        else:
            continue
        raise SlideError(f"slide {path} {fault}")
    tiled = [page for page in pages if page.is_tiled]  # the thumbnail of a small slide may have the same size
    largest = [page for page in tiled if page.imagewidth == max(page.imagewidth for page in tiled)]
    if is_plain and len(largest) > 1:
        raise SlideError(
            f"slide {path} has {len(largest)} pages of {largest[0].imagewidth:,} x {largest[0].imagelength:,}"
            " pixels, channels or focal planes; save one of them as 8-bit RGB"
        )


def _whole_downsample(base: tuple[int, int], size: tuple[int, int], downsample: float) -> float:
    """Return an integer downsample if it is consistent with the sizes; OpenSlide's ratio is inexact."""
    integer = max(1, round(downsample))
    near = all(abs(base_side / integer - side) < 1 for base_side, side in zip(base, size, strict=True))
    return float(integer) if near else downsample


_ADVICE = {
    "format": ", nor of a format that OpenSlide reads: the file may be damaged",
    "too-large": " without tiles; save it as a pyramidal TIFF",
}


def _number(properties: Any, name: str) -> float | None:
    """Return a property as a positive number, None if it is missing or invalid."""
    try:
        value = float(properties.get(name, ""))
    except ValueError:
        return None
    return value if value > 0 else None


def _tiff_mpp(path: Path) -> tuple[float | None, float | None]:
    """Return um/px horizontally and vertically from a TIFF's OME metadata or tags, None without a unit."""
    try:
        with tifffile.TiffFile(path) as file:
            page = file.pages.first
            tags, recorded = page.tags, _ome_mpp(page.description)
    except tifffile.TiffFileError:
        return None, None
    if all(recorded):
        return recorded
    um = {2: 25400.0, 3: 10000.0}.get(tags.valueof("ResolutionUnit", 2))
    resolutions = tags.valueof("XResolution"), tags.valueof("YResolution")
    if um is None:
        return None, None
    x, y = (um * value[1] / value[0] if value and value[0] and value[1] else None for value in resolutions)
    return x, y


def _ome_mpp(description: str) -> tuple[float | None, float | None]:
    """Return um/px horizontally and vertically from the metadata of OME-TIFF, None where they have none."""
    pixels = re.search(r"<(?:\w+:)?Pixels\s[^>]*>", description) if "<OME" in description else None
    if pixels is None:
        return None, None
    values = dict(re.findall(r'(\w+)\s*=\s*"([^"]*)"', pixels[0]))
    x, y = (
        (_number(values, f"PhysicalSize{axis}") or 0)
        * _OME_UM.get(values.get(f"PhysicalSize{axis}Unit", "um"), 0)
        for axis in "XY"
    )
    return x or None, y or None


def list_slide_files(folder: Path) -> list[Path]:
    """Return the slides in a folder, sorted by name; of a DICOM series the first file."""
    files = sorted(
        path for path in folder.iterdir() if path.suffix.lower() in SLIDE_SUFFIXES and not path.is_dir()
    )
    result: dict[str, Path] = {}
    for path in files:
        series = _read_series(path) if path.suffix.lower() == ".dcm" and path.is_file() else None
        result.setdefault(series or path.name, path)
    return list(result.values())


def _read_series(path: Path) -> str | None:
    """Return the DICOM series of a file, None if it cannot be read."""
    import openslide

    try:
        with openslide.OpenSlide(path) as slide:
            return slide.properties.get("dicom.SeriesInstanceUID")
    except openslide.OpenSlideError:
        return None


_PLAIN = (tifffile.PHOTOMETRIC.RGB, tifffile.PHOTOMETRIC.YCBCR)
_DECODER_ERRORS = (RuntimeError, ValueError, OSError, IndexError, tifffile.TiffFileError)


class TiffBackend(OpenSlideBackend):
    """A TIFF or SVS whose tiles are decoded by tifffile and imagecodecs."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._file = open(path, "rb")
        self._reading = threading.Lock()
        plain = {(page.imagewidth, page.imagelength): page for page in self._pages if _is_plain(page)}
        self._level_pages = [plain.get(level[:2]) for level in self.levels]
        self._cache = TileCache(CACHE_BYTES)

    def read(self, level: int, left: int, top: int, width: int, height: int) -> np.ndarray:
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
        self._file.close()
        super().close()

    def _decode(self, level: int, column: int, row: int) -> np.ndarray:
        page = self._level_pages[level]
        assert page is not None
        across = -(-page.imagewidth // page.tilewidth)
        index = row * across + column
        n_bytes = page.databytecounts[index] if index < len(page.databytecounts) else -1
        left, top = column * page.tilewidth, row * page.tilelength
        if n_bytes == 0:  # empty tile of Aperio; OpenSlide uses another level
            size = self.levels[level]
            width, height = min(page.tilewidth, size.width - left), min(page.tilelength, size.height - top)
            return super().read(level, left, top, width, height)
        try:
            if n_bytes < 0:
                raise ValueError("it lists fewer tiles than its size needs")
            with self._reading:
                self._file.seek(page.dataoffsets[index])
                data = self._file.read(n_bytes)
            if len(data) < n_bytes:
                raise ValueError("the file ends within a tile")
            tile, _, _ = page.decode(data, index, jpegtables=page.jpegtables)
            if tile is None or tile.shape[-1] != 3:
                raise ValueError("a tile is not RGB")
        except ImportError as error:  # imagecodecs loads a codec at its first use
            raise SlideError(f"slide {self._path} cannot be read: {error}") from None
        except _DECODER_ERRORS as error:
            reason = " ".join(str(error).split())
            raise SlideError(
                f"slide {self._path} is damaged near x={left}, y={top} of level {level}: {reason}"
            ) from None
        return np.asarray(tile[0])


TileKey = tuple[int, int, int]
"""Level, column and row of a tile."""


class TileCache:
    """Thread-safe LRU cache of decoded tiles; each tile is decoded by one thread."""

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity = capacity_bytes
        self._size_bytes = 0
        self._lock = threading.Lock()
        self._tiles: OrderedDict[TileKey, Future[np.ndarray]] = OrderedDict()

    def get(self, key: TileKey, make: Callable[[int, int, int], np.ndarray]) -> np.ndarray:
        """Return a tile, decoded by ``make`` if it is not cached."""
        with self._lock:
            future = self._tiles.get(key)
            if future is not None:
                self._tiles.move_to_end(key)
            else:
                mine = self._tiles[key] = Future()
        if future is not None:
            return future.result()
        try:
            mine.set_result(make(*key))
        except BaseException as error:
            with self._lock:
                del self._tiles[key]
            mine.set_exception(error)
            raise
        self._keep(mine.result())
        return mine.result()

    def _keep(self, tile: np.ndarray) -> None:
        """Add the size of a new tile, and evict the least recently used tiles."""
        with self._lock:
            self._size_bytes += tile.nbytes
            while self._size_bytes > self._capacity:
                key, oldest = next(iter(self._tiles.items()))
                if not oldest.done():
                    break
                self._size_bytes -= self._tiles.pop(key).result().nbytes


def _is_plain(page: tifffile.TiffPage) -> bool:
    return (
        page.is_tiled
        and page.samplesperpixel == 3
        and page.bitspersample == 8
        and page.planarconfig == tifffile.PLANARCONFIG.CONTIG
        and page.photometric in _PLAIN
    )


def _paste(tile: np.ndarray, left: int, top: int, region: np.ndarray) -> None:
    """Copy the overlap of a tile into a region; ``left, top`` is the tile's corner in the region."""
    height, width = region.shape[:2]
    rows = slice(max(top, 0), min(top + tile.shape[0], height))
    columns = slice(max(left, 0), min(left + tile.shape[1], width))
    region[rows, columns] = tile[
        rows.start - top : rows.stop - top, columns.start - left : columns.stop - left
    ]
