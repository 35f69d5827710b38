"""Tissue detection by colour at about 8 um/px, deterministic.

Haematoxylin and eosin absorb green more than blue and red. Glass, dust, scanner bars, black borders and
pencil are grey; red ink absorbs blue as much as green; blue and green ink absorb red most. So tissue is where
green is absorbed most, by the difference and ratio of densities, which do not depend on brightness. Fat is
white except for cell walls; gaps up to the size of a fat cell are closed.
"""

import cv2
import numpy as np

from biopsy.core.errors import SlideError
from biopsy.slide_io.reader import Slide

WORKING_MPP = 8.0
"""Resolution of the detection, at which nuclei are averaged out and walls of fat cells are visible."""

MIN_TISSUE_FRAC = 0.5
"""Minimum fraction of tissue of a patch."""

THUMBNAIL_PX = 2048
"""Longer side of the thumbnail for tissue detection."""

COARSEST_MPP = 64.0
"""Coarsest resolution, at which walls of fat cells are visible."""

_STAINED = 0.012  # minimum of green minus blue density; JPEG noise on glass is below .01
_BLUE_SHARE = 0.8  # of green density: at most .78 for 99 % of tissue on six slides, 1 for grey and red ink
_RED_SHARE = 0.95  # of green density: .2 to .95 for tissue, above 1 for blue and green ink
_DARK = 0.15  # minimum density of ink and scanner bars
_GLASS = 0.1  # maximum density of glass
_MAX_TINT = 0.03
_NEVER_SCANNED = 253  # grey level of pixels outside the scanned area
_SAMPLE = 1_000_000  # values from which the colour of glass is estimated
_WALL = 0.03  # green density of walls of fat cells, whose colour is lost by JPEG
_AROUND_UM = 30.0  # scale over which their colour is averaged instead
_GAP_UM = 80.0  # diameter of a large fat cell
_SMOOTH_UM = 4.0
_MIN_MM2 = 0.02  # area of a component of tissue or ink: 140 x 140 um

_DENSITY = -np.log10((np.arange(256, dtype=np.float32) + 1) / 256)


def find_tissue_of(slide: Slide) -> tuple[np.ndarray, np.ndarray]:
    """Return the thumbnail of a slide, uint8 ``(H, W, 3)``, and its tissue mask, bool ``(H, W)``."""
    thumbnail = slide.thumbnail(THUMBNAIL_PX)
    return thumbnail, find_tissue(thumbnail, mpp=slide.mpp * slide.width / thumbnail.shape[1])


def find_tissue(thumbnail: np.ndarray, *, mpp: float) -> np.ndarray:
    """Return the tissue mask of a slide stained with haematoxylin and eosin.

    Args:
        thumbnail: uint8 ``(H, W, 3)`` RGB of the whole slide.
        mpp: Pixel size of the thumbnail in µm, at most `COARSEST_MPP`; ideally 8 or less.

    Returns:
        bool ``(H, W)``.

    Raises:
        SlideError: If there is no tissue, or the thumbnail is too coarse.
    """
    if not 0 < mpp <= COARSEST_MPP:
        raise SlideError(f"tissue cannot be detected at {mpp:g} um/px; at most {COARSEST_MPP:g} is needed")
    height, width = thumbnail.shape[:2]
    scale = max(1.0, WORKING_MPP / mpp)
    size = max(1, round(width / scale)), max(1, round(height / scale))
    small = cv2.resize(thumbnail, size, interpolation=cv2.INTER_AREA)
    mask = _find(small, mpp * width / size[0])
    if not mask.any():
        raise SlideError(
            "no tissue was found: no area is stained pink or violet over "
            f"{_MIN_MM2:g} mm2 or more; check the thumbnail"
        )
    return cv2.resize(mask.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST).astype(bool)


def _find(image: np.ndarray, mpp: float) -> np.ndarray:
    density = _densities(image, mpp)
    red, green, _ = np.moveaxis(density, 2, 0)
    around = cv2.GaussianBlur(density, (0, 0), _AROUND_UM / mpp)
    stained = _is_stained(density, _STAINED) | (_is_stained(around, _STAINED / 2) & (green > _WALL))
    foreign = _remove_small(~stained & (np.maximum(red, green) > _DARK), mpp)
    return _remove_small(_close_gaps(stained, mpp) & ~foreign, mpp)


def _is_stained(density: np.ndarray, least: float) -> np.ndarray:
    red, green, blue = np.moveaxis(density, 2, 0)
    return (green - blue > least) & (blue < _BLUE_SHARE * green) & (red < _RED_SHARE * green)


def _densities(image: np.ndarray, mpp: float) -> np.ndarray:
    """Return smoothed optical densities relative to glass, ``(H, W, 3)`` in red, green and blue."""
    density = cv2.LUT(image, _DENSITY)
    density = cv2.GaussianBlur(density, (0, 0), max(_SMOOTH_UM / mpp, 0.5))
    step = int(np.ceil(np.sqrt(image.size / _SAMPLE)))
    density_sample, image_sample = density[::step, ::step], image[::step, ::step]
    glass = density_sample[
        (density_sample.max(axis=2) < _GLASS) & (image_sample.min(axis=2) < _NEVER_SCANNED)
    ]
    if len(glass):  # the brightest tenth: in fat, gaps between cell walls
        brightness = glass.sum(axis=1)
        tint = np.median(glass[brightness <= np.quantile(brightness, 0.1)], axis=0)
        grey = tint.mean()
        density = density - np.clip(tint, grey - _MAX_TINT, grey + _MAX_TINT).astype(np.float32)
    return density


def _close_gaps(mask: np.ndarray, mpp: float) -> np.ndarray:
    """Return the morphological closing of a mask by a disc; an empty margin keeps it from its edges."""
    margin = int(_GAP_UM / mpp) + 2
    side = 2 * max(1, round(_GAP_UM / 2 / mpp)) + 1
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
    closed = cv2.morphologyEx(np.pad(mask.astype(np.uint8), margin), cv2.MORPH_CLOSE, disc)
    return closed[margin:-margin, margin:-margin].astype(bool)


def _remove_small(mask: np.ndarray, mpp: float) -> np.ndarray:
    """Return a mask of the components of at least `_MIN_MM2`."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)
    return mask & (stats[:, cv2.CC_STAT_AREA] * (mpp / 1000) ** 2 >= _MIN_MM2)[labels]
