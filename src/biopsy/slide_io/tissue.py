"""Where tissue is on a slide, from its colour at about 8 um/px; the same picture gives the same mask.

Haematoxylin and eosin both absorb green more than blue and red, whatever their amount. Glass, dust, the
scanner's bars, black borders and pencil are grey; red ink absorbs blue as much as green; blue and green ink
absorb red most. So tissue is where green is absorbed most, by a difference and a share of densities, which do
not move with brightness. Fat is white but for its cells' walls; gaps as wide as a fat cell are closed.
"""

import cv2
import numpy as np

from biopsy.core.errors import SlideError
from biopsy.slide_io.reader import Slide

WORKING_MPP = 8.0
"""Finer pictures are averaged to this: nuclei melt into their tissue, the walls of fat cells still show."""

MIN_TISSUE_FRAC = 0.5
"""A patch is cut or mapped when at least this share of it is tissue."""

THUMBNAIL_PX = 2048
"""Longer side of the picture of a slide on which tissue is sought."""

COARSEST_MPP = 64.0
"""A fat cell's wall no longer shows in a coarser picture."""

_STAINED = 0.012  # green less blue density; JPEG's noise on averaged glass stays below .01
_BLUE_SHARE = 0.8  # of green density: at most .78 for 99 % of tissue on six slides, 1 for grey and red ink
_RED_SHARE = 0.95  # of green density: .2 to .95 on tissue, above 1 for blue and green ink
_DARK = 0.15  # density of a stroke or a bar
_GLASS = 0.1  # density under which a pixel may be glass
_MOST_TINT = 0.03
_NEVER_SCANNED = 253  # pure white is no glass but what was left out of the scan
_SAMPLE = 1_000_000  # values of the picture from which the glass is told
_WALL = 0.03  # green density of a fat cell's wall, where JPEG has flattened its colour
_AROUND_UM = 30.0  # over which that colour is averaged instead
_GAP_UM = 80.0  # across the section of a large fat cell
_SMOOTH_UM = 4.0
_SMALLEST_MM2 = 0.02  # a piece of tissue of 140 x 140 um; also of ink, to count as a stroke

_DENSITY = -np.log10((np.arange(256, dtype=np.float32) + 1) / 256)


def find_tissue_of(slide: Slide) -> tuple[np.ndarray, np.ndarray]:
    """Return a slide's thumbnail, uint8 ``(H, W, 3)``, and where tissue is on it, bool ``(H, W)``.

    Raises:
        SlideError: As `find_tissue`.
    """
    thumbnail = slide.thumbnail(THUMBNAIL_PX)
    return thumbnail, find_tissue(thumbnail, mpp=slide.mpp * slide.width / thumbnail.shape[1])


def find_tissue(thumbnail: np.ndarray, *, mpp: float) -> np.ndarray:
    """Return where tissue is on a picture of a slide stained with haematoxylin and eosin.

    Args:
        thumbnail: uint8 ``(H, W, 3)`` RGB of the whole slide.
        mpp: Micrometres per pixel of the thumbnail, at most `COARSEST_MPP`; 8 is best, finer is averaged.

    Returns:
        bool ``(H, W)``.

    Raises:
        SlideError: If there is no tissue, or the picture is too coarse to tell.
    """
    if not 0 < mpp <= COARSEST_MPP:
        raise SlideError(
            f"tissue cannot be seen at {mpp:g} um/px; pass a picture of at most {COARSEST_MPP:g}"
        )
    height, width = thumbnail.shape[:2]
    scale = max(1.0, WORKING_MPP / mpp)
    size = max(1, round(width / scale)), max(1, round(height / scale))
    small = cv2.resize(thumbnail, size, interpolation=cv2.INTER_AREA)
    mask = _find(small, mpp * width / size[0])
    if not mask.any():
        raise SlideError(
            "no tissue was found: nothing on the slide is stained pink or violet over "
            f"{_SMALLEST_MM2:g} mm2 or more; look at its thumbnail"
        )
    return cv2.resize(mask.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST).astype(bool)


def _find(image: np.ndarray, mpp: float) -> np.ndarray:
    density = _densities(image, mpp)
    red, green, _ = np.moveaxis(density, 2, 0)
    around = cv2.GaussianBlur(density, (0, 0), _AROUND_UM / mpp)
    stained = _is_stained(density, _STAINED) | (_is_stained(around, _STAINED / 2) & (green > _WALL))
    foreign = _large(~stained & (np.maximum(red, green) > _DARK), mpp)
    closed = cv2.morphologyEx(_framed(stained, mpp), cv2.MORPH_CLOSE, _disc(_GAP_UM / 2 / mpp))
    tissue = _unframed(closed, mpp) & ~foreign
    return _large(tissue, mpp)


def _is_stained(density: np.ndarray, least: float) -> np.ndarray:
    red, green, blue = np.moveaxis(density, 2, 0)
    return (green - blue > least) & (blue < _BLUE_SHARE * green) & (red < _RED_SHARE * green)


def _densities(image: np.ndarray, mpp: float) -> np.ndarray:
    """Return the optical densities above the glass's own, ``(H, W, 3)`` in red, green and blue, smoothed."""
    density = cv2.LUT(image, _DENSITY)
    density = cv2.GaussianBlur(density, (0, 0), max(_SMOOTH_UM / mpp, 0.5))
    step = int(np.ceil(np.sqrt(image.size / _SAMPLE)))
    some, seen = density[::step, ::step], image[::step, ::step]
    glass = some[(some.max(axis=2) < _GLASS) & (seen.min(axis=2) < _NEVER_SCANNED)]
    if len(glass):  # the brightest tenth: in fat, what lies between the walls
        brightness = glass.sum(axis=1)
        tint = np.median(glass[brightness <= np.quantile(brightness, 0.1)], axis=0)
        grey = tint.mean()
        density = density - np.clip(tint, grey - _MOST_TINT, grey + _MOST_TINT).astype(np.float32)
    return density


def _disc(radius_px: float) -> np.ndarray:
    side = 2 * max(1, round(radius_px)) + 1
    return np.asarray(cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side)))


def _framed(mask: np.ndarray, mpp: float) -> np.ndarray:
    """Add an empty margin, so that closing does not run along the picture's edge."""
    return np.pad(mask.astype(np.uint8), _margin(mpp))


def _unframed(mask: np.ndarray, mpp: float) -> np.ndarray:
    margin = _margin(mpp)
    return mask[margin:-margin, margin:-margin].astype(bool)


def _margin(mpp: float) -> int:
    return int(_GAP_UM / mpp) + 2


def _large(mask: np.ndarray, mpp: float) -> np.ndarray:
    """Keep the pieces that are not specks."""
    _, labels, result, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)
    return mask & (result[:, cv2.CC_STAT_AREA] * (mpp / 1000) ** 2 >= _SMALLEST_MM2)[labels]
