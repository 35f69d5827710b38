"""Bytes of an image file to RGB pixels, by stated rules, the size checked before anything is decoded.

8-bit RGB files (PNG, JPEG, TIFF) take the fast way, OpenCV, which gives the pixels Pillow gives: exactly for
PNG and TIFF, and for JPEG as long as both are built on libjpeg-turbo, as their wheels are (a test compares
them). Whatever is not plain, or fails there, goes to Pillow, which has the last word:

* black-and-white, grey and palette images: their grey or colour in all three channels;
* transparency: opaque pixels as they are, the rest laid over white, the colour of an empty slide;
* 16-bit, floating-point, CMYK and Lab images and files of several pages are refused: what their numbers mean
  in RGB depends on a range or a profile that a patch does not bring along.

A TIFF's orientation is followed, a camera's (EXIF) is not, and colour profiles are not applied: as in Pillow.
"""

import contextlib
import io
import struct
import threading
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from biopsy.core.errors import DataError

MAX_PX = 2**26
"""Pixels of the largest image that is decoded: 8192 x 8192."""

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
"""How the names of images end; where files are looked for, others are passed over."""

Data = bytes | memoryview

_READ_RGB = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
_PNG = b"\x89PNG\r\n\x1a\n"
_SIZE_MARKERS = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # JPEG's SOF0-SOF15 without DHT, JPG and DAC
_KNOWN_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "YCbCr")
_TIFF_TYPES = {3: "H", 4: "I"}  # SHORT and LONG, the types of every tag read here
_TIFF_WIDTH, _TIFF_HEIGHT, _TIFF_DEPTH, _TIFF_PHOTOMETRIC = 256, 257, 258, 262
_TIFF_ORIENTATION, _TIFF_SAMPLES, _TIFF_PLANES = 274, 277, 284
_TIFF_PLAIN = {  # tag -> (value of a plain image, value where the tag is absent)
    _TIFF_DEPTH: (8, 1),
    _TIFF_PHOTOMETRIC: (2, 0),
    _TIFF_SAMPLES: (3, 1),
    _TIFF_PLANES: (1, 1),
    _TIFF_ORIENTATION: (1, 1),
}
_PILLOW = threading.Lock()
_DECODER_ERRORS = (EOFError, OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)


class Header(NamedTuple):
    """What a file says about its image before it is decoded."""

    width: int
    height: int
    plain: bool
    """Eight bits a channel, RGB, whole at its end: OpenCV and Pillow agree on it."""


def read_header(data: Data, *, max_px: int = MAX_PX) -> Header:
    """Give an image's size without decoding it.

    Args:
        data: The file's bytes. Its first few hundred are enough for a PNG; ``plain`` needs them all.
        max_px: Pixels of the largest image that is taken.

    Raises:
        DataError: If this is no image, or larger than ``max_px`` pixels.
    """
    view = memoryview(data)
    start = bytes(view[:26])
    if start[:8] == _PNG and len(start) == 26 and start[12:16] == b"IHDR":
        width, height, depth, mode = struct.unpack(">IIBB", start[16:26])
        header = Header(width, height, depth == 8 and mode == 2 and bytes(view[-8:-4]) == b"IEND")
    elif start[:3] == b"\xff\xd8\xff":
        header = _read_jpeg_header(view) or _read_other_header(view)
    elif start[:4] in (b"II*\0", b"MM\0*"):
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
        max_px: Pixels of the largest image that is taken.

    Returns:
        uint8 ``(height, width, 3)`` RGB.

    Raises:
        DataError: With the reason alone (the caller knows the name): no image, cut short, larger than
            ``max_px`` pixels, or of a kind whose colours are not known (see the module's rules).
    """
    header = read_header(data, max_px=max_px)
    if header.plain:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), _READ_RGB)
        if image is not None and image.shape == (header.height, header.width, 3):
            return image
    return _decode_by_rules(data)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Pillow's warnings (bad metadata, large images) to itself: an image decodes or is refused.

    Python's warning filters are global, hence the lock.
    """
    with _PILLOW, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _decode_by_rules(data: Data) -> np.ndarray:
    with _quiet(), _open(data) as image:
        try:
            if getattr(image, "n_frames", 1) > 1:
                raise DataError("holds several pages or frames where one patch is expected")
            if _bits(image, data) > 8:
                raise DataError("has 16 bits a channel; save it with 8, so that its range is known")
            if image.mode not in _KNOWN_MODES:
                raise DataError(f"is of mode {image.mode}, which has no certain RGB; save it as 8-bit RGB")
            if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
                white = Image.new("RGBA", image.size, "white")
                return np.array(Image.alpha_composite(white, image.convert("RGBA")).convert("RGB"))
            return np.array(image.convert("RGB"))
        except DataError:
            raise
        except _DECODER_ERRORS as error:
            raise DataError(f"cannot be decoded: {error}") from None


def _bits(image: Image.Image, data: Data) -> int:
    """Give the bits a channel of the file, which Pillow's modes hide for RGB."""
    if image.format == "PNG":
        return memoryview(data)[24]
    depth = getattr(image, "tag_v2", {}).get(_TIFF_DEPTH, 8)
    return max(depth) if isinstance(depth, tuple) else int(depth)


def _open(data: Data) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        raise DataError("is not an image" if memoryview(data).nbytes else "is empty") from None
    except _DECODER_ERRORS as error:
        raise DataError(f"cannot be decoded: {error}") from None


def _read_other_header(view: memoryview) -> Header:
    with _quiet(), _open(view) as image:
        return Header(*image.size, plain=False)


def _read_jpeg_header(view: memoryview) -> Header | None:
    position = 2
    while position + 9 < len(view):
        mark, kind, length = struct.unpack_from(">BBH", view, position)
        if mark != 0xFF:
            return None
        if kind in _SIZE_MARKERS:
            depth, height, width, channels = struct.unpack_from(">BHHB", view, position + 4)
            return Header(width, height, depth == 8 and channels == 3 and bytes(view[-2:]) == b"\xff\xd9")
        position += 2 + length
    return None


def _read_tiff_header(view: memoryview) -> Header | None:
    """Read the first page's tags; None if they lie beyond ``view`` or are not the usual ones."""
    order = "<" if view[0] == 0x49 else ">"
    try:
        (page,) = struct.unpack_from(order + "I", view, 4)
        (n_tags,) = struct.unpack_from(order + "H", view, page)
        tags: dict[int, int] = {}
        for place in range(page + 2, page + 2 + 12 * n_tags, 12):
            tag, kind, count = struct.unpack_from(order + "HHI", view, place)
            if kind in _TIFF_TYPES:
                at = place + 8
                if count * struct.calcsize(_TIFF_TYPES[kind]) > 4:
                    (at,) = struct.unpack_from(order + "I", view, at)
                (tags[tag],) = struct.unpack_from(order + _TIFF_TYPES[kind], view, at)
        (next_page,) = struct.unpack_from(order + "I", view, page + 2 + 12 * n_tags)
        plain = all(tags.get(tag, absent) == value for tag, (value, absent) in _TIFF_PLAIN.items())
        return Header(tags[_TIFF_WIDTH], tags[_TIFF_HEIGHT], plain and not next_page)
    except (struct.error, KeyError):
        return None
