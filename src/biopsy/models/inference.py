"""Inference: logits and features of patches."""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from biopsy.models.classifier import Classifier
from biopsy.models.engine import Engine
from biopsy.models.hardware import count_cores
from biopsy.models.runtimes import Runtime, TorchRuntime, open_runtime
from biopsy.recipes.preprocessing import Preprocessing

if TYPE_CHECKING:
    from torch import nn

BATCH_SIZE = 256
_THREAD_CHUNK = 64  # patches per task of a thread
OnProgress = Callable[[int, int], None]
_Output = TypeVar("_Output")


class Predictor:
    """A network and its preprocessing, executed by a runtime."""

    def __init__(self, runtime: Runtime, preprocessing: Preprocessing) -> None:
        self.software = runtime.software
        self._runtime = runtime
        self._preprocessing = preprocessing

    def logits(
        self,
        patches: np.ndarray,
        sizes: np.ndarray | None = None,
        index: np.ndarray | None = None,
        *,
        on_progress: OnProgress | None = None,
    ) -> np.ndarray:
        """Return the logits of patches, float32 ``(n, n_classes)``.

        Args:
            patches: uint8 ``(N, H, W, 3)``, an array or a memory map.
            sizes: ``(width, height)`` of each patch without padding; None if no patch is padded.
            index: Rows to predict, in this order (default: all).
            on_progress: Called with the numbers of patches done and in all after each batch.
        """
        return np.concatenate(list(self._run(self._runtime.logits, patches, sizes, index, on_progress)))

    def logits_and_features(
        self,
        patches: np.ndarray,
        sizes: np.ndarray | None = None,
        index: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return logits ``(n, n_classes)`` and the penultimate layer ``(n, n_features)``, both float32."""
        logits, features = zip(
            *self._run(self._runtime.logits_and_features, patches, sizes, index, None), strict=True
        )
        return np.concatenate(logits), np.concatenate(features)

    def _run(
        self,
        predict: Callable[[np.ndarray], _Output],
        patches: np.ndarray,
        sizes: np.ndarray | None,
        index: np.ndarray | None,
        on_progress: OnProgress | None,
    ) -> Iterator[_Output]:
        """Yield outputs in chunks, predicted in threads, or in this thread with resizing in threads."""
        index = np.arange(len(patches)) if index is None else np.asarray(index)
        in_threads = self._runtime.in_threads
        size = _THREAD_CHUNK if in_threads else BATCH_SIZE
        chunks = [index[start : start + size] for start in range(0, len(index), size)] or [index]

        def resize(rows: np.ndarray) -> np.ndarray:
            widths, heights = (None, None) if sizes is None else sizes[rows].T
            return self._preprocessing.resize_patches(patches[rows], widths, heights)

        def work(rows: np.ndarray) -> Any:
            return predict(resize(rows)) if in_threads else resize(rows)

        n_threads, done = min(count_cores(), len(chunks)), 0
        with ThreadPoolExecutor(n_threads) as pool:
            pending = iter(chunks)
            waiting = deque(pool.submit(work, rows) for rows in islice(pending, 2 * n_threads))
            for rows in chunks:
                result = waiting.popleft().result()
                waiting.extend(pool.submit(work, following) for following in islice(pending, 1))
                yield result if in_threads else predict(result)
                done += len(rows)
                if on_progress:
                    on_progress(done, len(index))


@contextlib.contextmanager
def open_predictor(classifier: Classifier, engine: Engine, n_patches: int) -> Iterator[Predictor]:
    """Return a predictor for a number of patches.

    On a CPU, OpenVINO is used if it is installed, reproduces PyTorch's outputs, and there are enough patches
    to be worth the conversion; otherwise PyTorch is used.
    """
    with open_runtime(
        classifier, str(engine.device), engine.precision, n_threads=count_cores(), n_patches=n_patches
    ) as runtime:
        yield Predictor(runtime, classifier.info.preprocessing)


def predict_classifier(
    classifier: Classifier,
    patches: np.ndarray,
    sizes: np.ndarray | None = None,
    index: np.ndarray | None = None,
    *,
    engine: Engine,
) -> np.ndarray:
    """Return a classifier's logits of patches, without context; see `Predictor.logits`."""
    with open_predictor(classifier, engine, len(patches if index is None else index)) as predictor:
        return predictor.logits(patches, sizes, index)


def predict_with_features(
    classifier: Classifier,
    patches: np.ndarray,
    sizes: np.ndarray | None = None,
    index: np.ndarray | None = None,
    *,
    engine: Engine,
) -> tuple[np.ndarray, np.ndarray]:
    """Return a classifier's logits and features of patches; see `Predictor.logits_and_features`."""
    with open_predictor(classifier, engine, len(patches if index is None else index)) as predictor:
        return predictor.logits_and_features(patches, sizes, index)


def predict_logits(
    network: "nn.Module",
    preprocessing: Preprocessing,
    patches: np.ndarray,
    sizes: np.ndarray | None = None,
    index: np.ndarray | None = None,
    *,
    engine: Engine,
) -> np.ndarray:
    """Return the logits of a network computed by PyTorch, float32 ``(n, n_classes)``.

    For networks in training, and as the reference for faster runtimes.
    """
    training = network.training
    network.eval()
    try:
        predictor = Predictor(TorchRuntime(network, preprocessing, engine), preprocessing)
        return predictor.logits(patches, sizes, index)
    finally:
        network.train(training)
