"""Bytes of an image file to RGB pixels, by stated rules: the one way into the package for pixels of files.

The content decides, not the file's name: PNG, JPEG, TIFF, BMP and WebP are read, everything else is refused
(Pillow, left to itself, would start Ghostscript for PostScript). The size is checked before anything is
decoded, and a file that decodes only in part is refused: libjpeg's warnings are errors, the checksums of a
PNG and every compressed part of a TIFF are checked. (Uncompressed files, LZW and WebP have no checksum that
would tell.)

JPEG is decoded by libjpeg-turbo, 8-bit RGB PNG by libpng and 8-bit RGB TIFF without compression here, with
the pixels that Pillow gives (a test compares them). Whatever is not plain goes to Pillow:

* black-and-white, grey and palette images: their grey or colour in all three channels;
* transparency: opaque pixels as they are, the rest laid over white, the colour of an empty slide;
* 16-bit, floating-point, CMYK and Lab images and files of several pages or frames (channels, focal planes,
  animations) are refused: what their numbers mean in RGB depends on a range, a profile or a choice that a
  patch does not bring along.

A TIFF's orientation is followed, a camera's (EXIF) is not, and colour profiles are not applied: as in Pillow.
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
"""Pixels of the largest image that is decoded: 8192 x 8192."""

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
"""How the names of images end; where files are looked for, others are passed over."""

Data = bytes | memoryview

_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP")
_PNG, _JPEG, _TIFF = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", (b"II*\0", b"MM\0*")
_PNG_NOT_PLAIN = {b"tRNS", b"acTL"}  # transparency, animation
_SIZE_MARKERS = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # JPEG's SOF0-SOF15 without DHT, JPG and DAC
_LONE_MARKERS = {0x01, *range(0xD0, 0xD9)}  # TEM, RST0-RST7, SOI: no length follows
_MAX_SCANS = 200  # of a progressive JPEG; encoders write about ten, and each costs a pass over the image
_KNOWN_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "YCbCr")
_TIFF_TYPES = {3: "H", 4: "I"}  # SHORT and LONG, the types of every tag read here
_TIFF_WIDTH, _TIFF_HEIGHT, _TIFF_DEPTH, _TIFF_PHOTOMETRIC = 256, 257, 258, 262
_TIFF_COMPRESSION, _TIFF_ORIENTATION, _TIFF_SAMPLES, _TIFF_PLANES = 259, 274, 277, 284
_TIFF_STRIPS, _TIFF_STRIP_BYTES = 273, 279
_TIFF_PLAIN = {  # tag -> (value of a plain image, value where the tag is absent)
    _TIFF_DEPTH: (8, 1),
    _TIFF_COMPRESSION: (1, 1),
    _TIFF_PHOTOMETRIC: (2, 0),
    _TIFF_SAMPLES: (3, 1),
    _TIFF_PLANES: (1, 1),
    _TIFF_ORIENTATION: (1, 1),
}
_PILLOW = threading.Lock()
logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # an image decodes or is refused, without a log
_DECODER_ERRORS = (
    *(EOFError, OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError),
    *(RuntimeError, LookupError, TypeError, AttributeError, ZeroDivisionError),  # tifffile's and imagecodecs'
)


class Header(NamedTuple):
    """What a file says about its image before it is decoded."""

    width: int
    height: int
    plain: bool
    """Eight bits a channel, one picture, RGB (a JPEG: or grey): decoded without Pillow."""


def read_header(data: Data, *, max_px: int = MAX_PX) -> Header:
    """Return the size that an image file states, without decoding it.

    Raises:
        DataError: If this is no image, or larger than ``max_px`` pixels.
    """
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
        raise DataError(f"is {header.width:,} x {header.height:,} pixels; 1 to {max_px:,} are decoded")
    return header


def decode(data: Data, *, max_px: int = MAX_PX) -> np.ndarray:
    """Decode an image file.

    Args:
        data: The file's bytes.

    Returns:
        uint8 ``(height, width, 3)`` RGB.

    Raises:
        DataError: With the reason alone (the caller knows the name): no image, damaged or cut short, larger
            than ``max_px`` pixels, or of a kind whose colours are not known (see the module's rules).
    """
    header = read_header(data, max_px=max_px)
    start = bytes(memoryview(data)[:4])
    if header.plain:
        with _errors_named():
            return _decode_plain(data, start)
    if start in _TIFF:
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
    """Refuse a TIFF with a part that is not whole: libtiff, below Pillow, fills in what is missing."""
    with _errors_named(), tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages.first
        tables = page.jpegtables
        if page.is_tiled and page.tilewidth * page.tilelength > max_px:
            raise DataError(f"has tiles of {page.tilewidth:,} x {page.tilelength:,} pixels: it is damaged")
        for index, (start, n_bytes) in enumerate(zip(page.dataoffsets, page.databytecounts, strict=True)):
            part = bytes(memoryview(data)[start : start + n_bytes])
            if len(part) < n_bytes:
                raise DataError("cannot be decoded: the file is cut short")
            if page.compression == tifffile.COMPRESSION.JPEG:
                simplejpeg.decode_jpeg(tables[:-2] + part[2:] if tables else part, strict=True)
            elif page.compression != tifffile.COMPRESSION.NONE:
                page.decode(part, index)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Pillow's warnings (bad metadata, large images) to itself: an image decodes or is refused.

    Python's warning filters are global, hence the lock.
    """
    with _PILLOW, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _errors_named() -> Iterator[None]:
    """Turn what decoders raise on damaged files into the package's error."""
    try:
        yield
    except DataError:
        raise
    except _DECODER_ERRORS as error:
        raise DataError(f"cannot be decoded: {' '.join(str(error).split())}") from None


def _decode_by_rules(data: Data) -> np.ndarray:
    with _quiet(), _errors_named(), _open(data) as image:
        if getattr(image, "n_frames", 1) > 1:
            raise DataError("holds several pages or frames where one patch is expected")
        if _bits(image, data) > 8:
            raise DataError("has 16 bits a channel; save it with 8, so that its range is known")
        if image.mode not in _KNOWN_MODES:
            raise DataError(f"is of mode {image.mode}, which has no certain RGB; save it as 8-bit RGB")
        if image.format == "PNG":
            _check_png(memoryview(data))
        if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
            white = Image.new("RGBA", image.size, "white")
            return np.array(Image.alpha_composite(white, image.convert("RGBA")).convert("RGB"))
        return np.array(image.convert("RGB"))


def _bits(image: Image.Image, data: Data) -> int:
    """Return the bits a channel of the file, which Pillow's modes hide for RGB."""
    if image.format == "PNG":
        return memoryview(data)[24]
    depth = getattr(image, "tag_v2", {}).get(_TIFF_DEPTH, 8)
    return max(depth) if isinstance(depth, tuple) else int(depth)


def _open(data: Data) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError:
        raise DataError(
            "is not an image (PNG, JPEG, TIFF, BMP or WebP)" if memoryview(data).nbytes else "is empty"
        ) from None


def _read_other_header(view: memoryview) -> Header:
    with _quiet(), _errors_named(), _open(view) as image:
        return Header(*image.size, plain=False)


def _read_png_header(view: memoryview) -> Header:
    """Read the size, and by the chunks before the pixels whether they are all there is."""
    if len(view) < 33 or bytes(view[12:16]) != b"IHDR":
        raise DataError("cannot be decoded: the file is cut short or damaged")
    width, height, depth, mode = struct.unpack_from(">IIBB", view, 16)
    plain = depth == 8 and mode == 2 and bytes(view[-8:-4]) == b"IEND"
    for kind, _, _ in _walk_png(view) if plain else ():
        plain = plain and kind not in _PNG_NOT_PLAIN
        if kind == b"IDAT":
            break
    return Header(width, height, plain)


def _walk_png(view: memoryview) -> Iterator[tuple[bytes, int, int]]:
    """Yield the kind, start and length of each chunk, as far as the file goes."""
    position = 8
    while position + 8 <= len(view):
        length, kind = struct.unpack_from(">I4s", view, position)
        yield kind, position + 8, length
        position += length + 12


def _check_png(view: memoryview) -> None:
    """Refuse a chunk that is cut or does not match its checksum, which Pillow looks at in part only."""
    for kind, start, length in _walk_png(view):
        end = start + length
        if end + 4 > len(view):
            raise DataError("cannot be decoded: the file is cut short")
        if zlib.crc32(view[start - 4 : end]) != struct.unpack_from(">I", view, end)[0]:
            raise DataError(f"cannot be decoded: chunk {kind!r} does not match its checksum")
        if kind == b"IEND":
            return


def _read_jpeg_header(view: memoryview) -> Header:
    """Read the size; a JPEG is plain if it has one or three channels of 8 bits."""
    position = 2
    try:
        while True:
            mark, kind = struct.unpack_from(">BB", view, position)
            if mark != 0xFF:
                raise DataError("cannot be decoded: it is a damaged JPEG")
            if kind == 0xFF or kind in _LONE_MARKERS:  # a marker may be preceded by any number of 0xFF
                position += 1 if kind == 0xFF else 2
                continue
            if kind in _SIZE_MARKERS:
                depth, height, width, channels = struct.unpack_from(">BHHB", view, position + 4)
                break
            position += 2 + struct.unpack_from(">H", view, position + 2)[0]
    except struct.error:
        raise DataError("cannot be decoded: the file is cut short") from None
    if bytes(view).count(b"\xff\xda") > _MAX_SCANS:
        raise DataError(f"cannot be decoded: it has more than {_MAX_SCANS} scans")
    return Header(width, height, depth == 8 and channels in (1, 3))


def _read_tiff_header(view: memoryview) -> Header | None:
    """Read the size; None if the tags lie beyond ``view`` or are not the usual ones."""
    try:
        tags, next_page = _read_tiff_tags(view)
        plain = all(tags.get(tag, absent)[0] == value for tag, (value, *absent) in _TIFF_PLAIN.items())
        plain = plain and not next_page and {_TIFF_STRIPS, _TIFF_STRIP_BYTES} <= tags.keys()
        return Header(tags[_TIFF_WIDTH][0], tags[_TIFF_HEIGHT][0], plain)
    except (struct.error, LookupError):
        return None


def _read_tiff_tags(view: memoryview) -> tuple[dict[int, tuple[int, ...]], int]:
    """Return the first page's whole-number tags, and where the next page lies (0: nowhere)."""
    order = "<" if view[0] == 0x49 else ">"
    (page,) = struct.unpack_from(order + "I", view, 4)
    (n_tags,) = struct.unpack_from(order + "H", view, page)
    tags: dict[int, tuple[int, ...]] = {}
    for place in range(page + 2, page + 2 + 12 * n_tags, 12):
        tag, kind, count = struct.unpack_from(order + "HHI", view, place)
        if kind in _TIFF_TYPES:
            values, at = f"{order}{count}{_TIFF_TYPES[kind]}", place + 8
            if struct.calcsize(values) > 4:
                (at,) = struct.unpack_from(order + "I", view, at)
            tags[tag] = struct.unpack_from(values, view, at)
    (next_page,) = struct.unpack_from(order + "I", view, page + 2 + 12 * n_tags)
    return tags, next_page
