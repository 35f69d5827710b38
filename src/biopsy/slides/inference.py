"""Slides in, logits out: threads read ahead, across slides, and each tile of a file is decoded once.

On the CPU every thread reads a piece of a slide, cuts it and asks the network about small batches by itself:
batches that stay in a core's cache, and no core that waits for another. On a GPU the threads read, cut and
resize, and the network is asked in large batches from one place. Either way a few pieces are in memory at a
time, whatever the slide's size, and a patch's logits do not depend on how many threads there are.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from biopsy.core.errors import DataError, SlideError
from biopsy.models.classifier import Classifier
from biopsy.models.hardware import count_cores
from biopsy.models.out_of_distribution import out_of_distribution_scores
from biopsy.models.runtimes import Runtime, open_runtime
from biopsy.slide_io.reader import Slide, open_slide
from biopsy.slide_io.tissue import find_tissue_of
from biopsy.slides.grids import Block, PatchGrid, cut_blocks, lay_grid, pick_stride

OnProgress = Callable[[int, int], None]

N_CHECKED = 250  # patches of a slide that are compared with training: their share is known to 3 % or better


class SlideTask(NamedTuple):
    """A slide to be mapped: where it lies, and its mpp where the user states one."""

    path: Path
    mpp: float | None = None


@dataclass(frozen=True)
class View:
    """A slide that is open, and what of it is mapped.

    Attributes:
        slide: The open slide.
        thumbnail: The whole slide, uint8 ``(H, W, 3)``.
        tissue: Where its tissue is, bool ``(H, W)``.
        grid: The patches.
        downsample: Side of a pixel that the classifier sees, in pixels of the level that is read.
        level: The level that is read.
        checked: Which patches are compared with training, bool ``(n_patches,)``.
    """

    slide: Slide
    thumbnail: np.ndarray
    tissue: np.ndarray
    grid: PatchGrid
    downsample: float
    level: int
    checked: np.ndarray


class SlideLogits(NamedTuple):
    """What became of a slide: its view and logits ``(n, n_classes)``, or the reason why there are none.

    ``software`` is the name and version of what computed them, ``unlike`` says of the patches that were
    checked which are out of distribution, in the order of the grid, bool ``(n_checked,)``.
    """

    task: SlideTask
    view: View | None
    logits: np.ndarray | None
    software: tuple[str, str]
    unlike: np.ndarray
    error: DataError | None = None


def open_view(task: SlideTask, classifier: Classifier, stride_um: float | None = None) -> View:
    """Open a slide, find its tissue and lay the classifier's grid over it.

    Raises:
        SlideError: If the slide cannot be read at the classifier's resolution, has no tissue, or the
            classifier does not know its resolution.
    """
    info = classifier.info
    if info.mpp is None:
        raise SlideError(
            "the classifier does not say at how many um/px its patches were cut: prepare its pack with --mpp "
            "and train again"
        )
    slide = open_slide(task.path, mpp=task.mpp)
    try:
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
    except BaseException:
        slide.close()
        raise
    checked = np.zeros(len(grid), bool)
    if info.out_of_distribution is not None:
        checked[np.linspace(0, len(grid) - 1, min(len(grid), N_CHECKED)).astype(int)] = True
    return View(slide, thumbnail, tissue, grid, downsample, level, checked)


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
    """Return the logits of every patch of every slide, slide by slide in their order.

    While one slide is asked about, the next is opened and read. A slide that fails does not stop the others.

    Args:
        device: ``cpu``, ``cuda``, ``cuda:1`` ...
        stride_um: Step of the grid; by default a patch's side.
        n_threads: Threads that read; by default one a core.
        on_progress: Called with patches done and patches in all of the slide at hand.
    """
    n_threads = n_threads or count_cores()
    waiting: deque[_Piece] = deque()
    with contextlib.ExitStack() as stack:
        pool = ThreadPoolExecutor(n_threads)
        stack.callback(pool.shutdown, cancel_futures=True)
        ahead = _ReadAhead(tasks, pool, lambda task: open_view(task, classifier, stride_um))
        # made while the first slide is being opened
        runtime = stack.enter_context(open_runtime(classifier, device, precision, n_threads=n_threads))
        network = _Network(runtime, classifier)
        slide = _Gathered(network)
        for piece in ahead.read(network):
            waiting.append(piece)
            while len(waiting) > 2 * n_threads:
                if result := slide.add(waiting.popleft(), on_progress):
                    yield result
        while waiting:
            if result := slide.add(waiting.popleft(), on_progress):
                yield result


class _Piece(NamedTuple):
    """A part of a slide on its way: its result comes; the last of a slide has no block."""

    task: SlideTask
    view: View | None
    block: Block | None = None
    coming: "Future[_Found | tuple[np.ndarray, np.ndarray]] | None" = None
    error: DataError | None = None


class _Found(NamedTuple):
    """What a network says of a piece: logits, and its checked patches with their features."""

    logits: np.ndarray
    checked: np.ndarray
    features: np.ndarray


class _Network(NamedTuple):
    """A network on its way over slides."""

    runtime: Runtime
    classifier: Classifier

    def read(self, view: View, block: Block) -> _Found | tuple[np.ndarray, np.ndarray]:
        """Read a piece in a thread; return its logits, or the patches where one thread predicts for all."""
        grid = view.grid
        image = view.slide.read_at(block.x, block.y, block.width_px, block.height_px, mpp=grid.mpp)
        patches = block.cut(image, grid.patch_px)
        resized = self.classifier.info.preprocessing.resize_patches(patches)
        checked = patches[view.checked[block.index]]
        return self.predict(resized, checked) if self.runtime.in_threads else (resized, checked)

    def predict(self, resized: np.ndarray, checked: np.ndarray) -> _Found:
        """Ask about a piece: all its patches at the network's size, the checked ones as they were cut."""
        logits = self.runtime.logits(resized)
        features = (
            self.runtime.logits_and_features(checked)[1] if len(checked) else np.zeros((0, 0), np.float32)
        )
        return _Found(logits, checked, features)

    def find_unlike(self, pieces: list[_Found]) -> np.ndarray:
        """Return which checked patches of a slide are out of distribution, bool ``(n_checked,)``."""
        known = [piece for piece in pieces if len(piece.checked)]
        if not known:
            return np.zeros(0, bool)
        checked = np.concatenate([piece.checked for piece in known])
        features = np.concatenate([piece.features for piece in known])
        return out_of_distribution_scores(self.classifier, checked, None, features)[
            "out_of_distribution"
        ].to_numpy()


class _Gathered:
    """The logits of one slide after the other, put together from their pieces."""

    def __init__(self, network: _Network) -> None:
        self._network = network
        self._logits: np.ndarray | None = None
        self._checked: list[_Found] = []
        self._places: list[np.ndarray] = []  # of the checked patches of each piece, in the grid
        self._error: DataError | None = None
        self._done = 0

    def add(self, piece: _Piece, on_progress: OnProgress | None) -> SlideLogits | None:
        """Take a piece; gives the slide's result when it was the last one."""
        if piece.block is None:
            whole = SlideLogits(
                piece.task,
                piece.view,
                self._logits,
                self._network.runtime.software,
                self._find_unlike(),
                piece.error or self._error,
            )
            if piece.view is not None:
                piece.view.slide.close()
            self.__init__(self._network)  # type: ignore[misc]
            return whole
        assert piece.view is not None and piece.coming is not None
        try:
            result = piece.coming.result()
            if not isinstance(result, _Found):
                result = self._network.predict(*result)
            if self._logits is None:
                self._logits = np.empty((len(piece.view.grid), result.logits.shape[1]), np.float32)
            self._logits[piece.block.index] = result.logits
            self._checked.append(result._replace(logits=result.logits[:0]))
            self._places.append(piece.block.index[piece.view.checked[piece.block.index]])
        except DataError as error:
            self._error = self._error or error
        self._done += len(piece.block.index)
        if on_progress:
            on_progress(self._done, len(piece.view.grid))
        return None

    def _find_unlike(self) -> np.ndarray:
        """Return `SlideLogits.unlike`: in the order of the grid, not of the pieces."""
        unlike = self._network.find_unlike(self._checked)
        return unlike[np.argsort(np.concatenate(self._places))] if len(unlike) else unlike


class _ReadAhead:
    """Hands slides to the threads piece by piece; a slide is opened while the one before it is read."""

    def __init__(
        self, tasks: Iterable[SlideTask], pool: ThreadPoolExecutor, open_task: Callable[[SlideTask], View]
    ) -> None:
        self._coming = iter(tasks)
        self._pool = pool
        self._open_task = open_task
        self._opening: deque[tuple[SlideTask, Future[View]]] = deque()
        self._open_next()

    def read(self, network: _Network) -> Iterator[_Piece]:
        """Return the pieces of all slides as they are handed out, and the end of each slide."""
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
