"""What colour contributes: patches with colour taken out, and saliency counted by colour of pixel."""

from collections.abc import Callable

import cv2
import numpy as np
import pandas as pd

from biopsy.imaging.stain import combine_stains, separate_stains

BLUE_YELLOW = 10.0  # of CIELAB's b*: blue from -10 down, yellow from 10 up; between them grey, pink and red
COLOURS = ("blue", "yellow")


def to_grey(patches: np.ndarray) -> np.ndarray:
    """Put luma (Rec. 601) in all three channels of patches ``(n, H, W, 3)``."""
    grey = cv2.cvtColor(patches.reshape(-1, 1, 3), cv2.COLOR_RGB2GRAY).reshape(patches.shape[:3])
    return np.repeat(grey[..., None], 3, axis=3)


def keep_stain(patches: np.ndarray, stain: int) -> np.ndarray:
    """Render patches as if one stain (0 haematoxylin, 1 eosin) had been all there was."""
    amounts = separate_stains(patches)
    kept = np.zeros_like(amounts)
    kept[..., stain] = amounts[..., stain]
    return combine_stains(kept)


REMOVALS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "grey": to_grey,
    "haematoxylin only": lambda patches: keep_stain(patches, 0),
    "eosin only": lambda patches: keep_stain(patches, 1),
}
"""Ways to take colour out of uint8 RGB patches; each gives uint8 RGB again."""


def share_saliency(patches: np.ndarray, maps: np.ndarray, sizes: np.ndarray | None = None) -> pd.DataFrame:
    """Give the share of blue and of yellow pixels in each patch's area and in its saliency.

    Blue and yellow are those of CIELAB's b* axis beyond `BLUE_YELLOW`; what is purple counts as blue.

    Args:
        patches: uint8 ``(n, H, W, 3)`` RGB.
        maps: Saliency, not below 0, ``(n, H, W)``.
        sizes: True ``(width, height)`` of each patch; padding is not counted.

    Returns:
        One row a patch: ``<colour>_area`` and ``<colour>_saliency`` for each of `COLOURS`, 0-1; NaN in the
        latter where a map is 0 everywhere.
    """
    unit = np.ascontiguousarray(patches).reshape(-1, 1, 3).astype(np.float32) / 255
    b = cv2.cvtColor(unit, cv2.COLOR_RGB2LAB)[..., 2].reshape(patches.shape[:3])
    real = np.ones(b.shape, bool)
    if sizes is not None:
        rows, columns = np.arange(patches.shape[1]), np.arange(patches.shape[2])
        widths, heights = sizes.T
        real = (columns < widths[:, None, None]) & (rows[:, None] < heights[:, None, None])
    weight = np.where(real, maps, 0.0)
    total = weight.sum(axis=(1, 2))
    shares = {}
    for colour, chosen in zip(COLOURS, (b <= -BLUE_YELLOW, b >= BLUE_YELLOW), strict=True):
        shares[f"{colour}_area"] = (chosen & real).sum(axis=(1, 2)) / real.sum(axis=(1, 2))
        held = np.where(chosen, weight, 0.0).sum(axis=(1, 2))
        shares[f"{colour}_saliency"] = np.divide(
            held, total, out=np.full(len(total), np.nan), where=total > 0
        )
    return pd.DataFrame(shares)
