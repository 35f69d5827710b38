"""Dynamic batching: patches of several clients that wait while a batch is computed form the next batch."""

import contextlib
import math
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from biopsy.core.errors import BiopsyError
from biopsy.evaluation.predict import pad_patches, predict_patches
from biopsy.models.classifier import Classifier
from biopsy.models.engine import Engine
from biopsy.models.inference import open_predictor
from biopsy.models.runtimes import MIN_PATCHES_TO_CONVERT

BATCH = 256


class Busy(BiopsyError):
    """The queue is full.

    Attributes:
        retry_after_s: When there should be room again.
    """

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"the queue is full: try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


@dataclass
class _Request:
    names: list[str]
    images: list[np.ndarray]
    answer: "Future[pd.DataFrame]" = field(default_factory=Future)


class Batcher:
    """Predicts patches with one classifier, in its own thread.

    Args:
        max_waiting: Patches that may wait; more are refused.
        max_wait_s: Seconds that patches may wait, as long as patches took before; more are refused.
        on_batch: Called with the number of patches of each batch.
    """

    def __init__(
        self,
        classifier: Classifier,
        *,
        engine: Engine,
        max_waiting: int,
        max_wait_s: float = math.inf,
        on_batch: Callable[[int], None] = lambda n: None,
    ) -> None:
        self.classifier = classifier.single_patch()
        self.max_waiting, self.max_wait_s, self.waiting = max_waiting, max_wait_s, 0
        self._on_batch, self._opened = on_batch, contextlib.ExitStack()
        self._predictor = self._opened.enter_context(
            open_predictor(self.classifier, engine, MIN_PATCHES_TO_CONVERT)
        )
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._per_patch_s = 0.01  # until it is measured
        self._thread = threading.Thread(target=self._work, daemon=True, name="batches")
        self._thread.start()

    def reserve(self, n: int) -> None:
        """Reserve room in the queue for ``n`` patches, freed by `submit` or `release`.

        Raises:
            Busy: If there is none.
        """
        with self._lock:
            wait_s = self.waiting * self._per_patch_s
            if self.waiting + n > self.max_waiting or wait_s > self.max_wait_s:
                raise Busy(max(1, round(wait_s)))
            self.waiting += n

    def release(self, n: int) -> None:
        """Free reserved room."""
        with self._lock:
            self.waiting -= n

    def submit(self, names: list[str], images: list[np.ndarray]) -> "Future[pd.DataFrame]":
        """Predict patches for which room was reserved; their frame is as `predict_patches` returns it."""
        request = _Request(names, images)
        self._queue.put(request)
        return request.answer

    def close(self) -> None:
        """Predict the waiting patches and end the thread."""
        self._queue.put(None)
        self._thread.join()
        self._opened.close()

    def _work(self) -> None:
        while (request := self._queue.get()) is not None:
            batch, n = [request], len(request.images)
            while n < BATCH and not self._queue.empty():
                following = self._queue.get()
                if following is None:
                    self._queue.put(None)  # ends the thread after this batch
                    break
                batch.append(following)
                n += len(following.images)
            self._answer(batch, n)

    def _answer(self, batch: list[_Request], n: int) -> None:
        batch = [request for request in batch if request.answer.set_running_or_notify_cancel()]
        images = [image for request in batch for image in request.images]
        start, frame, failure = time.perf_counter(), pd.DataFrame(), None
        try:
            if images:  # none if all clients have disconnected
                patches, sizes = pad_patches(images, self.classifier.info.patch_px)
                rows = pd.DataFrame({"patch_id": [name for request in batch for name in request.names]})
                frame = predict_patches(self.classifier, rows, patches, sizes, predictor=self._predictor)
        except Exception as error:  # raised in the waiting clients
            failure = error
        per_patch_s = (time.perf_counter() - start) / n
        weight = n / (n + BATCH)
        self._per_patch_s += (per_patch_s - self._per_patch_s) * weight
        self._on_batch(len(images))
        self.release(n)  # before the results, so that a client can send its next patches
        at = 0
        for request in batch:
            if failure is not None:
                request.answer.set_exception(failure)
            else:
                request.answer.set_result(frame.iloc[at : at + len(request.images)])
            at += len(request.images)
