"""Asking a network: pixels in, logits and features out."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import numpy as np
import torch

from biopsy.models.classifier import Classifier
from biopsy.models.engine import Engine
from biopsy.models.networks import Network
from biopsy.models.networks.symmetry import N_VIEWS, SymmetryAveraged
from biopsy.models.preprocessing import Preprocessing

BATCH_SIZE = 256
OnProgress = Callable[[int, int], None]


def predict_logits(
    network: torch.nn.Module,
    preprocessing: Preprocessing,
    patches: np.ndarray,
    sizes: np.ndarray | None = None,
    index: np.ndarray | None = None,
    *,
    engine: Engine,
    on_progress: OnProgress | None = None,
) -> np.ndarray:
    """Return the logits of patches, float32 ``(n, n_classes)``.

    Args:
        network: Already placed on the engine's device; left in the mode it was in.
        preprocessing: As in training.
        patches: uint8 ``(N, H, W, 3)``, an array or a memory map.
        sizes: True ``(width, height)`` of each patch; None where none is padded.
        index: Rows wanted, in this order; None for all.
        engine: Device and precision.
        on_progress: Called with patches done and patches in all after each batch.
    """
    batches = _ask(network, preprocessing, patches, sizes, index, engine, on_progress, with_features=False)
    return np.concatenate([logits for logits, _ in batches])


def predict_with_features(
    classifier: Classifier,
    patches: np.ndarray,
    sizes: np.ndarray | None = None,
    index: np.ndarray | None = None,
    *,
    engine: Engine,
    on_progress: OnProgress | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return logits ``(n, n_classes)`` and the penultimate layer ``(n, n_features)``, both float32."""
    network = engine.place(classifier.network)
    batches = _ask(
        network, classifier.info.preprocessing, patches, sizes, index, engine, on_progress, with_features=True
    )
    logits, features = zip(*batches, strict=True)
    return np.concatenate(logits), np.concatenate(features)


def _ask(
    network: torch.nn.Module,
    preprocessing: Preprocessing,
    patches: np.ndarray,
    sizes: np.ndarray | None,
    index: np.ndarray | None,
    engine: Engine,
    on_progress: OnProgress | None,
    *,
    with_features: bool,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield logits and features batch by batch, the next batch being prepared meanwhile."""
    index = np.arange(len(patches)) if index is None else np.asarray(index)
    size = BATCH_SIZE // N_VIEWS if isinstance(network, SymmetryAveraged) else BATCH_SIZE
    chunks = [index[start : start + size] for start in range(0, len(index), size)] or [index]

    def prepare(rows: np.ndarray) -> torch.Tensor:
        widths, heights = (None, None) if sizes is None else sizes[rows].T
        return preprocessing.prepare(patches[rows], widths, heights, device=engine.device)

    training = network.training
    network.eval()
    try:
        with ThreadPoolExecutor(1) as worker:
            waiting = worker.submit(prepare, chunks[0])
            done = 0
            for number, rows in enumerate(chunks, start=1):
                batch = waiting.result()
                if number < len(chunks):
                    waiting = worker.submit(prepare, chunks[number])
                with torch.inference_mode(), engine.autocast():
                    logits = network(batch)
                    features = cast(Network, network).features(batch) if with_features else logits[:, :0]
                yield logits.float().cpu().numpy(), features.float().cpu().numpy()
                done += len(rows)
                if on_progress:
                    on_progress(done, len(index))
    finally:
        network.train(training)
