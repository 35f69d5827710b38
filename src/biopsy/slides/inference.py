"""Inference on slides, with threads that read ahead.

On the CPU, every thread reads blocks of a slide and predicts their patches in small batches, which fit into
the cache of a core. On a GPU, threads read and resize, and one thread predicts in large batches. Only a few
blocks are in memory at a time, and logits do not depend on the number of threads.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from biopsy.core.errors import DataError, DownloadError, SlideError
from biopsy.core.storage import staged
from biopsy.models.classifier import Classifier
from biopsy.models.hardware import count_cores
from biopsy.models.out_of_distribution import out_of_distribution_scores
from biopsy.models.runtimes import Runtime, open_runtime
from biopsy.slide_io.reader import Slide, open_slide
from biopsy.slide_io.tissue import find_tissue_of
from biopsy.slides.grids import Block, PatchGrid, cut_blocks, lay_grid, pick_stride

OnProgress = Callable[[int, int], None]

N_CHECKED = 250  # patches per slide checked for being out of distribution; standard error of at most 3 %


class SlideTask(NamedTuple):
    """Path of a slide (``url``: where it is if not on this machine), and its mpp if given by the user."""

    path: Path
    mpp: float | None = None
    url: str | None = None


@dataclass(frozen=True)
class View:
    """An open slide with the grid of its patches.

    Attributes:
        slide: The open slide.
        thumbnail: The whole slide, uint8 ``(H, W, 3)``.
        tissue: Tissue mask, bool ``(H, W)``.
        grid: The patches.
        downsample: Side of a patch pixel in pixels of the level that is read.
        level: The level that is read.
        checked: Mask of patches checked for being out of distribution, bool ``(n_patches,)``.
        files: Closes the slide, and removes its copy.
    """

    slide: Slide
    thumbnail: np.ndarray
    tissue: np.ndarray
    grid: PatchGrid
    downsample: float
    level: int
    checked: np.ndarray
    files: contextlib.ExitStack


class SlideLogits(NamedTuple):
    """View and logits ``(n, n_classes)`` of a slide, or the error.

    ``software`` is the name and version of the runtime, ``is_ood`` marks the checked patches that are out of
    distribution, in the order of the grid, bool ``(n_checked,)``.
    """

    task: SlideTask
    view: View | None
    logits: np.ndarray | None
    software: tuple[str, str]
    is_ood: np.ndarray
    error: DataError | None = None


def open_view(task: SlideTask, classifier: Classifier, stride_um: float | None = None) -> View:
    """Open a slide, detect its tissue and make the grid of patches.

    Raises:
        SlideError: If the slide cannot be read at the resolution of the classifier, has no tissue, or the
            classifier has no resolution.
    """
    info = classifier.info
    if info.mpp is None:
        raise SlideError(
            "the classifier has no pixel size (um/px): prepare its pack with --mpp and train again"
        )
    with contextlib.ExitStack() as files:
        try:
            path = task.path if task.url is None else files.enter_context(staged(task.url))
        except DownloadError as error:
            raise SlideError(str(error)) from None
        slide = open_slide(path, mpp=task.mpp)
        files.callback(slide.close)
        level, downsample = slide.level_for(info.mpp)
        thumbnail, tissue = find_tissue_of(slide)
        grid = lay_grid(
            tissue,
            width=slide.width,
            height=slide.height,
            slide_mpp=slide.mpp,
            scale=slide.level_0_px(info.mpp),
            patch_px=info.patch_px,
            stride_px=pick_stride(info.patch_px, info.mpp, stride_um),
            corner=slide.corner,
        )
        checked = np.zeros(len(grid), bool)
        if info.out_of_distribution is not None:
            checked[np.linspace(0, len(grid) - 1, min(len(grid), N_CHECKED)).astype(int)] = True
        return View(slide, thumbnail, tissue, grid, downsample, level, checked, files.pop_all())


def predict_slides(
    tasks: Iterable[SlideTask],
    classifier: Classifier,
    *,
    device: str = "cpu",
    precision: Literal["fp32", "bf16", "int8"] = "fp32",
    stride_um: float | None = None,
    n_threads: int | None = None,
    on_progress: OnProgress | None = None,
) -> Iterator[SlideLogits]:
    """Yield the logits of each slide, in order.

    The next slide is opened and read while one is predicted. Errors of a slide do not stop the others.

    Args:
        device: ``cpu``, ``cuda``, ``cuda:1`` ...
        stride_um: Stride in µm (default: the patch size).
        n_threads: Number of reading threads (default: number of cores).
        on_progress: Called with the numbers of patches done and in all of the current slide.
    """
    n_threads = n_threads or count_cores()
    waiting: deque[_Piece] = deque()
    with contextlib.ExitStack() as stack:
        pool = ThreadPoolExecutor(n_threads)
        stack.callback(pool.shutdown, cancel_futures=True)
        ahead = _ReadAhead(tasks, pool, lambda task: open_view(task, classifier, stride_um))
        # the runtime is opened while the first slide is being read
        runtime = stack.enter_context(open_runtime(classifier, device, precision, n_threads=n_threads))
        network = _Network(runtime, classifier)
        slide = _LogitsCollector(network)
        for piece in ahead.read(network):
            waiting.append(piece)
            while len(waiting) > 2 * n_threads:
                if result := slide.add(waiting.popleft(), on_progress):
                    yield result
        while waiting:
            if result := slide.add(waiting.popleft(), on_progress):
                yield result


class _Piece(NamedTuple):
    """A block of a slide with its pending result; the last piece of a slide has no block."""

    task: SlideTask
    view: View | None
    block: Block | None = None
    coming: "Future[_BlockOutputs | tuple[np.ndarray, np.ndarray]] | None" = None
    error: DataError | None = None


class _BlockOutputs(NamedTuple):
    """Logits of a block, and its checked patches with their features."""

    logits: np.ndarray
    checked: np.ndarray
    features: np.ndarray


class _Network(NamedTuple):
    """A runtime and its classifier, applied to blocks of slides."""

    runtime: Runtime
    classifier: Classifier

    def read(self, view: View, block: Block) -> _BlockOutputs | tuple[np.ndarray, np.ndarray]:
        """Read a block; return its outputs, or its patches if one thread predicts for all."""
        grid = view.grid
        image = view.slide.read_at(block.x, block.y, block.width_px, block.height_px, mpp=grid.mpp)
        patches = block.cut(image, grid.patch_px)
        resized = self.classifier.info.preprocessing.resize_patches(patches)
        checked = patches[view.checked[block.index]]
        return self.predict(resized, checked) if self.runtime.in_threads else (resized, checked)

    def predict(self, resized: np.ndarray, checked: np.ndarray) -> _BlockOutputs:
        """Return the outputs of a block of resized patches, and of its checked patches before resizing."""
        logits = self.runtime.logits(resized)
        features = (
            self.runtime.logits_and_features(checked)[1] if len(checked) else np.zeros((0, 0), np.float32)
        )
        return _BlockOutputs(logits, checked, features)

    def find_ood(self, pieces: list[_BlockOutputs]) -> np.ndarray:
        """Return a mask of checked patches that are out of distribution, bool ``(n_checked,)``."""
        checked_pieces = [piece for piece in pieces if len(piece.checked)]
        if not checked_pieces:
            return np.zeros(0, bool)
        checked = np.concatenate([piece.checked for piece in checked_pieces])
        features = np.concatenate([piece.features for piece in checked_pieces])
        return out_of_distribution_scores(self.classifier, checked, None, features)[
            "out_of_distribution"
        ].to_numpy()


class _LogitsCollector:
    """Collector of the logits of slides from their pieces."""

    def __init__(self, network: _Network) -> None:
        self._network = network
        self._logits: np.ndarray | None = None
        self._checked: list[_BlockOutputs] = []
        self._indices: list[np.ndarray] = []  # grid indices of the checked patches of each piece
        self._error: DataError | None = None
        self._done = 0

    def add(self, piece: _Piece, on_progress: OnProgress | None) -> SlideLogits | None:
        """Add a piece; return the result of the slide if it was the last one."""
        if piece.block is None:
            slide_logits = SlideLogits(
                piece.task,
                piece.view,
                self._logits,
                self._network.runtime.software,
                self._find_ood(),
                piece.error or self._error,
            )
            if piece.view is not None:
                piece.view.files.close()
            self.__init__(self._network)  # type: ignore[misc]
            return slide_logits
        assert piece.view is not None and piece.coming is not None
        try:
            result = piece.coming.result()
            if not isinstance(result, _BlockOutputs):
                result = self._network.predict(*result)
            if self._logits is None:
                self._logits = np.empty((len(piece.view.grid), result.logits.shape[1]), np.float32)
            self._logits[piece.block.index] = result.logits
            self._checked.append(result._replace(logits=result.logits[:0]))
            self._indices.append(piece.block.index[piece.view.checked[piece.block.index]])
        except DataError as error:
            self._error = self._error or error
        self._done += len(piece.block.index)
        if on_progress:
            on_progress(self._done, len(piece.view.grid))
        return None

    def _find_ood(self) -> np.ndarray:
        """Return `SlideLogits.is_ood`, in the order of the grid."""
        is_ood = self._network.find_ood(self._checked)
        return is_ood[np.argsort(np.concatenate(self._indices))] if len(is_ood) else is_ood


class _ReadAhead:
    """Scheduler of blocks of slides; a slide is opened while the previous one is read."""

    def __init__(
        self, tasks: Iterable[SlideTask], pool: ThreadPoolExecutor, open_task: Callable[[SlideTask], View]
    ) -> None:
        self._coming = iter(tasks)
        self._pool = pool
        self._open_task = open_task
        self._opening: deque[tuple[SlideTask, Future[View]]] = deque()
        self._open_next()

    def read(self, network: _Network) -> Iterator[_Piece]:
        """Yield the pieces of all slides."""
        while self._opening:
            task, opened = self._opening.popleft()
            try:
                view = opened.result()
            except DataError as error:
                self._open_next()
                yield _Piece(task, None, error=error)
                continue
            self._open_next()
            for block in cut_blocks(view.grid, view.downsample):
                yield _Piece(task, view, block, self._pool.submit(network.read, view, block))
            yield _Piece(task, view)

    def _open_next(self) -> None:
        for task in self._coming:
            self._opening.append((task, self._pool.submit(self._open_task, task)))
            return
