"""How much haematoxylin and eosin a pixel holds: colour deconvolution.

Stains absorb light independently, so their optical densities add up: a pixel's optical density is the sum of
each stain's amount times its colour (Ruifrok & Johnston 2001, Anal Quant Cytol Histol 23:291).
"""

import cv2
import numpy as np

# Optical density in R, G, B of one unit of stain; Ruifrok & Johnston 2001, as published.
HAEMATOXYLIN = (0.65, 0.70, 0.29)
EOSIN = (0.07, 0.99, 0.11)

# The third row is what neither stain explains: at right angles to both, so that the first two amounts are
# the least-squares ones.
_RESIDUAL = np.cross(HAEMATOXYLIN, EOSIN)
STAINS = np.array([HAEMATOXYLIN, EOSIN, _RESIDUAL / np.linalg.norm(_RESIDUAL)])
_FROM_DENSITY = np.linalg.inv(STAINS)

# Density of each grey value; 255 is clear glass. One is added so that black has a density too.
_DENSITY = -np.log10((np.arange(256, dtype=np.float32) + 1) / 256)


def separate_stains(rgb: np.ndarray) -> np.ndarray:
    """Give the amounts of haematoxylin, eosin and what neither explains.

    Args:
        rgb: uint8 ``(..., 3)``.

    Returns:
        float32 ``(..., 3)``; 0 is clear glass, 1 about one unit of optical density (a tenth of the light
        passes). Amounts may be negative where a colour is none that the two stains can give.

    Example:
        >>> separate_stains(np.full((2, 2, 3), 255, np.uint8)).max()
        np.float32(0.0)
    """
    return cv2.transform(cv2.LUT(_as_image(rgb), _DENSITY), _FROM_DENSITY.T).reshape(rgb.shape)


def combine_stains(amounts: np.ndarray) -> np.ndarray:
    """Give the colours that amounts of stain make, the inverse of `separate_stains`.

    Args:
        amounts: float ``(..., 3)``: haematoxylin, eosin and residual.

    Returns:
        uint8 ``(..., 3)`` RGB.
    """
    density = cv2.transform(_as_image(amounts.astype(np.float32)), STAINS.T).reshape(amounts.shape)
    return np.clip(np.rint(256 * np.power(10, -density) - 1), 0, 255).astype(np.uint8)


def _as_image(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).reshape(-1, 1, 3)
