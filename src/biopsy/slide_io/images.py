"""Decoding of image files to RGB.

PNG, JPEG, TIFF, BMP and WebP are read, by content and not by name; other files are refused. The size is
checked before decoding, and files that decode only in part are refused: warnings of libjpeg are errors,
checksums of PNG and compressed parts of TIFF are verified. (Uncompressed files, LZW and WebP have no
checksums.)

JPEG is decoded by libjpeg-turbo, 8-bit RGB PNG by libpng and uncompressed 8-bit RGB TIFF here, with the same
pixels as Pillow. Other images are decoded by Pillow:

* binary, grey and palette images are converted to RGB;
* transparent pixels are composited over white, the colour of an empty slide;
* 16-bit, floating-point, CMYK and Lab images and files of several pages or frames (channels, focal planes,
  animations) are refused, because their conversion to RGB is not defined.

As in Pillow, the orientation of TIFF is applied, EXIF orientation and colour profiles are not.
"""

import contextlib
import io
import logging
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import imagecodecs
import numpy as np
import simplejpeg
import tifffile
from PIL import Image, UnidentifiedImageError

from biopsy.core.errors import DataError

MAX_PX = 2**26
"""Largest number of pixels of an image: 8192 x 8192."""

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
"""Suffixes of image files; others are ignored in folders."""

Data = bytes | memoryview

_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP")
_PNG, _JPEG, _TIFF = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", (b"II*\0", b"MM\0*")
_BIG_TIFF = b"II+\0"  # Pillow reads no big-endian one
_PNG_NOT_PLAIN = {b"tRNS", b"acTL", b"iCCP"}  # transparency, animation, profile (libpng prints its faults)
_SIZE_MARKERS = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # JPEG's SOF0-SOF15 without DHT, JPG and DAC
_LONE_MARKERS = {0x01, *range(0xD0, 0xD9)}  # TEM, RST0-RST7, SOI: no length follows
_MAX_SCANS = 200  # of a progressive JPEG; encoders write about ten
_KNOWN_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "YCbCr")
_TIFF_TYPES = {3: "H", 4: "I"}  # SHORT and LONG
_TIFF_WIDTH, _TIFF_HEIGHT, _TIFF_DEPTH, _TIFF_PHOTOMETRIC = 256, 257, 258, 262
_TIFF_COMPRESSION, _TIFF_ORIENTATION, _TIFF_SAMPLES, _TIFF_PLANES, _TIFF_NUMBERS = 259, 274, 277, 284, 339
_TIFF_STRIPS, _TIFF_STRIP_BYTES = 273, 279
_TIFF_PLAIN = {  # tag -> (value of a plain image, default value)
    _TIFF_DEPTH: (8, 1),
    _TIFF_COMPRESSION: (1, 1),
    _TIFF_PHOTOMETRIC: (2, 0),
    _TIFF_SAMPLES: (3, 1),
    _TIFF_PLANES: (1, 1),
    _TIFF_ORIENTATION: (1, 1),
    _TIFF_NUMBERS: (1, 1),
}
_PILLOW = threading.Lock()
logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # errors are raised, not logged
_DECODER_ERRORS = (
    *(EOFError, OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError),
    *(RuntimeError, LookupError, TypeError, AttributeError, ZeroDivisionError),  # tifffile's and imagecodecs'
)


class Header(NamedTuple):
    """Header of an image file."""

    width: int
    height: int
    plain: bool
    """Whether it is one 8-bit RGB image (JPEG: or grey), decoded without Pillow."""


def read_header(data: Data, *, max_px: int = MAX_PX) -> Header:
    """Return the header of an image file, without decoding it."""
    view = memoryview(data)
    start = bytes(view[:8])
    if start == _PNG:
        header = _read_png_header(view)
    elif start[:3] == _JPEG:
        header = _read_jpeg_header(view)
    elif start[:4] in _TIFF:
        header = _read_tiff_header(view) or _read_other_header(view)
    else:
        header = _read_other_header(view)
    if header.width * header.height > max_px or not header.width or not header.height:
        raise DataError(
            f"is {header.width:,} x {header.height:,} pixels; 1 to {max_px:,} are decoded", "too-large"
        )
    return header


def decode(data: Data, *, max_px: int = MAX_PX) -> np.ndarray:
    """Decode an image file.

    Returns:
        uint8 ``(height, width, 3)`` RGB.

    Raises:
        DataError: Without the name of the file; ``reason`` is ``empty``, ``format`` (not an image),
            ``syntax`` (damaged or truncated), ``too-large`` (more than ``max_px`` pixels), or ``colour`` or
            ``pages`` (not supported, see the rules of this module).
    """
    header = read_header(data, max_px=max_px)
    start = bytes(memoryview(data)[:4])
    if header.plain:
        with _decoder_errors():
            return _decode_plain(data, start)
    if start in _TIFF or start == _BIG_TIFF:
        _check_tiff(data, max_px)
    return _decode_by_rules(data)


def _decode_plain(data: Data, start: bytes) -> np.ndarray:
    if start[:3] == _JPEG:
        return simplejpeg.decode_jpeg(data, "RGB", strict=True)
    if start == _PNG[:4]:
        return imagecodecs.png_decode(data)  # type: ignore[arg-type]
    tags, _ = _read_tiff_tags(memoryview(data))
    strips = zip(tags[_TIFF_STRIPS], tags[_TIFF_STRIP_BYTES], strict=True)
    pixels = b"".join(memoryview(data)[start : start + n_bytes] for start, n_bytes in strips)
    shape = tags[_TIFF_HEIGHT][0], tags[_TIFF_WIDTH][0], 3
    return np.frombuffer(pixels, np.uint8).reshape(shape).copy()


def _check_tiff(data: Data, max_px: int) -> None:
    """Refuse a TIFF with an incomplete part, which libtiff would fill in, or with signed numbers."""
    with _decoder_errors(), tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages.first
        if page.sampleformat == tifffile.SAMPLEFORMAT.INT or page.samplesperpixel > 4:
            raise DataError("holds signed numbers or more than four channels; save it as 8-bit RGB", "colour")
        tables = page.jpegtables
        if page.is_tiled and page.tilewidth * page.tilelength > max_px:
            raise DataError(
                f"has tiles of {page.tilewidth:,} x {page.tilelength:,} pixels: it is damaged", "syntax"
            )
        for index, (start, n_bytes) in enumerate(zip(page.dataoffsets, page.databytecounts, strict=True)):
            part = bytes(memoryview(data)[start : start + n_bytes])
            if len(part) < n_bytes:
                raise DataError("cannot be decoded: the file is truncated", "syntax")
            if page.compression == tifffile.COMPRESSION.JPEG:
                simplejpeg.decode_jpeg(tables[:-2] + part[2:] if tables else part, strict=True)
            elif page.compression != tifffile.COMPRESSION.NONE:
                page.decode(part, index)


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Suppress warnings of Pillow; the lock is needed because warning filters are global."""
    with _PILLOW, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _decoder_errors() -> Iterator[None]:
    """Convert exceptions of decoders to `DataError`."""
    try:
        yield
    except DataError:
        raise
    except _DECODER_ERRORS as error:
        raise DataError(f"cannot be decoded: {' '.join(str(error).split())}", "syntax") from None


def _decode_by_rules(data: Data) -> np.ndarray:
    with _without_warnings(), _decoder_errors(), _open(data) as image:
        if getattr(image, "n_frames", 1) > 1:
            raise DataError("has several pages or frames; expected one image", "pages")
        if (bits := _bits(image, data)) > 8:
            raise DataError(f"has {bits} bits per channel; save it as 8-bit RGB", "colour")
        if image.mode not in _KNOWN_MODES:
            raise DataError(
                f"is of mode {image.mode}, which has no defined conversion to RGB; save it as 8-bit RGB",
                "colour",
            )
        if image.format == "PNG":
            _check_png(memoryview(data))
        if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
            white = Image.new("RGBA", image.size, "white")
            return np.array(Image.alpha_composite(white, image.convert("RGBA")).convert("RGB"))
        return np.array(image.convert("RGB"))


def _bits(image: Image.Image, data: Data) -> int:
    """Return the bits per channel of the file, which Pillow's modes do not show."""
    if image.format == "PNG":
        return memoryview(data)[24]
    depth = getattr(image, "tag_v2", {}).get(_TIFF_DEPTH, 8)
    return max(depth) if isinstance(depth, tuple) else int(depth)


def _open(data: Data) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError:
        if not memoryview(data).nbytes:
            raise DataError("is empty", "empty") from None
        raise DataError("is not an image (PNG, JPEG, TIFF, BMP or WebP)", "format") from None


def _read_other_header(view: memoryview) -> Header:
    with _without_warnings(), _decoder_errors(), _open(view) as image:
        return Header(*image.size, plain=False)


def _read_png_header(view: memoryview) -> Header:
    """Read the size, and from the chunks before the pixels whether the image is plain."""
    if len(view) < 33 or bytes(view[12:16]) != b"IHDR":
        raise DataError("cannot be decoded: the file is truncated or damaged", "syntax")
    width, height, depth, mode = struct.unpack_from(">IIBB", view, 16)
    plain = depth == 8 and mode == 2 and bytes(view[-8:-4]) == b"IEND"
    for kind, _, _ in _walk_png(view) if plain else ():
        plain = plain and kind not in _PNG_NOT_PLAIN
        if kind == b"IDAT":
            break
    return Header(width, height, plain)


def _walk_png(view: memoryview) -> Iterator[tuple[bytes, int, int]]:
    """Yield kind, start and length of each chunk."""
    position = 8
    while position + 8 <= len(view):
        length, kind = struct.unpack_from(">I4s", view, position)
        yield kind, position + 8, length
        position += length + 12


def _check_png(view: memoryview) -> None:
    """Verify length and checksum of all chunks, which Pillow does in part only."""
    for kind, start, length in _walk_png(view):
        end = start + length
        if end + 4 > len(view):
            raise DataError("cannot be decoded: the file is truncated", "syntax")
        if zlib.crc32(view[start - 4 : end]) != struct.unpack_from(">I", view, end)[0]:
            raise DataError(f"cannot be decoded: chunk {kind!r} does not match its checksum", "syntax")
        if kind == b"IEND":
            return


def _read_jpeg_header(view: memoryview) -> Header:
    """Read the size; a JPEG is plain if it has one or three channels of 8 bits."""
    position = 2
    try:
        while True:
            mark, kind = struct.unpack_from(">BB", view, position)
            if mark != 0xFF:
                raise DataError("cannot be decoded: it is a damaged JPEG", "syntax")
            if kind == 0xFF or kind in _LONE_MARKERS:  # a marker may be preceded by any number of 0xFF
                position += 1 if kind == 0xFF else 2
                continue
            if kind in _SIZE_MARKERS:
                depth, height, width, channels = struct.unpack_from(">BHHB", view, position + 4)
                break
            position += 2 + struct.unpack_from(">H", view, position + 2)[0]
    except struct.error:
        raise DataError("cannot be decoded: the file is truncated", "syntax") from None
    if bytes(view).count(b"\xff\xda") > _MAX_SCANS:
        raise DataError(f"cannot be decoded: it has more than {_MAX_SCANS} scans", "syntax")
    return Header(width, height, depth == 8 and channels in (1, 3))


def _read_tiff_header(view: memoryview) -> Header | None:
    """Read the size; None if the tags cannot be read."""
    try:
        tags, next_page = _read_tiff_tags(view)
        plain = all(tags.get(tag, absent)[0] == value for tag, (value, *absent) in _TIFF_PLAIN.items())
        plain = plain and not next_page and {_TIFF_STRIPS, _TIFF_STRIP_BYTES} <= tags.keys()
        return Header(tags[_TIFF_WIDTH][0], tags[_TIFF_HEIGHT][0], plain)
    except (struct.error, LookupError):
        return None


def _read_tiff_tags(view: memoryview) -> tuple[dict[int, tuple[int, ...]], int]:
    """Return the integer tags of the first page, and the offset of the next page (0: none)."""
    order = "<" if view[0] == 0x49 else ">"
    (page,) = struct.unpack_from(order + "I", view, 4)
    (n_tags,) = struct.unpack_from(order + "H", view, page)
    tags: dict[int, tuple[int, ...]] = {}
    for offset in range(page + 2, page + 2 + 12 * n_tags, 12):
        tag, kind, count = struct.unpack_from(order + "HHI", view, offset)
        if kind in _TIFF_TYPES:
            values, value_offset = f"{order}{count}{_TIFF_TYPES[kind]}", offset + 8
            if struct.calcsize(values) > 4:
                (value_offset,) = struct.unpack_from(order + "I", view, value_offset)
            tags[tag] = struct.unpack_from(values, view, value_offset)
    (next_page,) = struct.unpack_from(order + "I", view, page + 2 + 12 * n_tags)
    return tags, next_page
