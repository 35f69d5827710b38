"""Measured properties of patches: stain, brightness, sharpness, heterogeneity and nuclear density."""

from functools import partial

import cv2
import numpy as np
import pandas as pd

from biopsy.slide_io.stain import find_nuclei, measure_in_threads, separate_stains

TISSUE_STAIN = 0.1  # less absorbs at most a fifth of green light, which H&E absorbs most

PROPERTIES = {
    "haematoxylin": "mean amount of haematoxylin, in units of optical density",
    "eosin": "mean amount of eosin, in units of optical density",
    "stain": "haematoxylin and eosin together, in units of optical density",
    "brightness": "mean luma (Rec. 601), 0 black to 255 white",
    "tissue_frac": f"share of pixels in which both stains together reach {TISSUE_STAIN}",
    "sharpness": "standard deviation of luma's Laplacian, in grey levels",
    "heterogeneity": "standard deviation of the amount of haematoxylin from pixel to pixel",
    "nuclear_density": "blobs of haematoxylin of a nucleus's size per square millimetre",
}
"""Definition and unit of each property; amounts from `slide_io.stain.separate_stains`."""


def property_name(name: str) -> str:
    """Return the display name of a property.

    Example:
        >>> property_name("tissue_frac"), property_name("nuclear_density")
        ('tissue fraction', 'nuclear density')
    """
    return name.replace("_frac", "_fraction").replace("_", " ")


_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601


def measure_properties(
    patches: np.ndarray,
    sizes: np.ndarray | None = None,
    *,
    index: np.ndarray | None = None,
    mpp: float | None = None,
    chunk: int = 256,
) -> pd.DataFrame:
    """Measure the properties of patches.

    Args:
        patches: uint8 ``(N, H, W, 3)`` RGB, may be memory-mapped.
        sizes: True ``(width, height)`` of each patch, ``(N, 2)``; padding is ignored.
        index: Indices of the patches to measure, ``(n,)`` (default: all).
        mpp: Pixel size in µm; if None, ``nuclear_density`` is NaN.
        chunk: Number of patches per task.

    Returns:
        One row per patch and one column for each of `PROPERTIES`, float64.

    Example:
        >>> measure_properties(np.full((1, 8, 8, 3), 255, np.uint8))["tissue_frac"].tolist()
        [0.0]
    """
    measure = partial(_measure, mpp=mpp)
    values = measure_in_threads(measure, len(PROPERTIES), patches, sizes, index, chunk=chunk)
    return pd.DataFrame(values, columns=list(PROPERTIES))


def _measure(images: np.ndarray, mpp: float | None) -> np.ndarray:
    """Return the properties of patches of one size, ``(n, n_properties)``."""
    n, (height, width) = len(images), images.shape[1:3]
    amounts = separate_stains(images).reshape(n, -1, 3)
    haematoxylin, both = amounts[..., 0], amounts[..., 0] + amounts[..., 1]
    luma = cv2.transform(images.reshape(-1, 1, 3).astype(np.float32), _LUMA[None]).reshape(images.shape[:3])
    edges = [cv2.Laplacian(image, cv2.CV_32F).std() for image in luma]
    columns = [
        haematoxylin.mean(axis=1),
        amounts[..., 1].mean(axis=1),
        both.mean(axis=1),
        luma.reshape(n, -1).mean(axis=1),
        (both >= TISSUE_STAIN).mean(axis=1),
        edges,
        haematoxylin.std(axis=1),
        _nuclear_density(haematoxylin.reshape(n, height, width), mpp),
    ]
    return np.stack([np.asarray(column, np.float64) for column in columns], axis=1)


def _nuclear_density(haematoxylin: np.ndarray, mpp: float | None) -> np.ndarray:
    if mpp is None:
        return np.full(len(haematoxylin), np.nan)
    area_mm2 = haematoxylin.shape[1] * haematoxylin.shape[2] * (mpp / 1000) ** 2
    return np.array([len(find_nuclei(amount, mpp)) for amount in haematoxylin]) / area_mm2
