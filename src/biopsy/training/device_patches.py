"""Training patches in the memory of a GPU: resized and sent once, gathered there for every batch."""

import logging
from dataclasses import replace

import numpy as np
import torch

from biopsy.training.batches import Batches, DevicePatches

logger = logging.getLogger(__name__)

SHARE = 0.25
"""Share of the free memory of the device that patches may take; the network's activations need the rest."""
CHUNK = 4096  # patches resized and sent at a time


def place_patches(batches: Batches, rows: np.ndarray, n_visits: int) -> Batches:
    """Return batches with all patches in the memory of their GPU, if that saves time and they fit.

    Patches are resized to the input of the network by the same code as otherwise, so batches are the same.
    The batches are returned unchanged on a CPU, with cached features, if the training uses fewer patches than
    there are, and (which is logged) if the patches need more than a quarter of the GPU's free memory.

    Args:
        rows: Rows of the pack that train.
        n_visits: Number of patches in all epochs of the training.
    """
    free_bytes = count_free_bytes(torch.device(batches.device))
    if free_bytes is None or batches.cached_features is not None or n_visits <= len(rows):
        return batches
    n_bytes = len(rows) * 3 * batches.preprocessing.input_px**2
    size = f"{n_bytes / 1e6:,.0f} MB for {len(rows):,} patches"
    if n_bytes > SHARE * free_bytes:
        logger.info("training patches would take %s of the GPU: they are sent batch by batch", size)
        return batches
    logger.info("training patches lie on the GPU: %s", size)
    return replace(batches, placed=_send_patches(batches, rows))


def count_free_bytes(device: torch.device) -> int | None:
    """Return the free memory of a GPU; None for other devices, which have no memory of their own."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def _send_patches(batches: Batches, rows: np.ndarray) -> DevicePatches:
    side = batches.preprocessing.input_px
    values = torch.empty((len(rows), side, side, 3), dtype=torch.uint8, device=batches.device)
    for start in range(0, len(rows), CHUNK):
        pixels = batches.resize(rows[start : start + CHUNK])
        values[start : start + len(pixels)] = torch.from_numpy(np.ascontiguousarray(pixels))
    index = np.full(len(batches.patches), -1)
    index[rows] = np.arange(len(rows))
    return DevicePatches(values, index)
