"""The frozen stages of a network, computed once: their outputs for every patch of a training, in one file.

Where the first stages are not trained and nothing random is done to a patch before them, every epoch would
compute the same numbers again.
"""

import contextlib
import logging
import math
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from biopsy.models.engine import Engine
from biopsy.models.networks.stages import split_frozen
from biopsy.recipes.schema import Augmentation
from biopsy.training.batches import Batches, CachedFeatures, to_batch

logger = logging.getLogger(__name__)

LIMIT_BYTES = 8 << 30
BATCH_SIZE = 256


@contextlib.contextmanager
def cache_backbone_features(
    network: nn.Module, batches: Batches, rows: np.ndarray, n_visits: int, *, engine: Engine, folder: Path
) -> Iterator[tuple[nn.Module, Batches]]:
    """Yield the trainable part of a network and batches of its inputs, cached outputs of the frozen part.

    They are kept in an unnamed file until the context is left; of several processes each computes its part
    and keeps all. Network and batches come back as they are where nothing is frozen, where augmentation
    draws, where the training sees fewer patches than there are, and, with a line in the log, where the
    outputs would take more than 8 GiB or half of the free disk.

    Args:
        network: Placed on the engine's device.
        n_visits: Number of patches in all epochs of the training.
    """
    parts = split_frozen(network)
    if (
        parts is None
        or batches.augmentation != Augmentation()
        or batches.stain_transfer is not None
        or batches.transform is not None
        or n_visits <= len(rows)
    ):
        yield network, batches
        return
    frozen, trainable = parts
    frozen.eval()
    processes = batches.processes
    example, _ = next(batches.iterate(rows[:1], stop=1))
    shape = (len(rows), *engine.predict(frozen, example).movedim(1, -1).shape[1:])
    n_bytes, free_bytes = 4 * math.prod(shape), shutil.disk_usage(folder).free
    size = f"{n_bytes / 1e6:,.0f} MB for {len(rows):,} patches"
    if processes.broadcast(n_bytes > min(LIMIT_BYTES, free_bytes / 2 / processes.world_size)):
        logger.info(
            "what the layers that are not trained compute would take %s: it is computed in every epoch", size
        )
        yield network, batches
        return
    logger.info("what the layers that are not trained compute is computed once and kept: %s", size)
    with tempfile.TemporaryFile(dir=folder) as file:
        for number, (batch, _) in enumerate(replace(batches, drop_last=False).iterate(rows)):
            outputs = engine.predict(frozen, batch).movedim(1, -1).contiguous().cpu().numpy()
            file.write(processes.gather(outputs, batches.size(len(rows), number)).data)
        file.flush()
        index = np.full(len(batches.patches), -1)
        index[rows] = np.arange(len(rows))
        values = np.memmap(file, np.float32, mode="r", shape=shape)
        yield trainable, replace(batches, cached_features=CachedFeatures(values, index))


def predict_rest(
    trainable: nn.Module, features: CachedFeatures, rows: np.ndarray, *, engine: Engine
) -> np.ndarray:
    """Return logits from cached features, float32 ``(len(rows), n_classes)``."""
    training = trainable.training
    trainable.eval()
    try:
        chunks = [rows[start : start + BATCH_SIZE] for start in range(0, len(rows), BATCH_SIZE)]
        logits = [
            engine.predict(trainable, to_batch(features.take(chunk), engine.device)) for chunk in chunks
        ]
        return torch.cat(logits).cpu().numpy()
    finally:
        trainable.train(training)
