"""Slides in, logits out: threads read ahead, across slides, and each tile of a file is decoded once.

On the CPU every thread reads a piece of a slide, cuts it and asks the network about small batches by itself:
batches that stay in a core's cache, and no core that waits for another. On a GPU the threads read, cut and
resize, and the network is asked in large batches from one place. Either way a few pieces are in memory at a
time, whatever the slide's size, and a patch's logits do not depend on how many threads there are.
"""

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from biopsy.errors import SlideError
from biopsy.imaging.reader import Slide, open_slide
from biopsy.imaging.tissue import find_tissue_of
from biopsy.learning.classifiers import Classifier
from biopsy.learning.engine import Engine
from biopsy.learning.engine import Precision as EnginePrecision
from biopsy.learning.folding import fold
from biopsy.slides.grids import Block, PatchGrid, cut_blocks, lay_grid, pick_stride

Precision = Literal["auto", "fp32", "bf16"]
OnProgress = Callable[[int, int], None]

_CPU_BATCH, _GPU_BATCH = 32, 1024


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
    """

    slide: Slide
    thumbnail: np.ndarray
    tissue: np.ndarray
    grid: PatchGrid
    downsample: float
    level: int


class Answer(NamedTuple):
    """What became of a slide: its view and logits ``(n, n_classes)``, or the reason why there are none."""

    task: SlideTask
    view: View | None
    logits: np.ndarray | None
    error: SlideError | None = None


def pick_precision(precision: Precision, device: torch.device) -> EnginePrecision:
    """Give the arithmetic: ``auto`` is bfloat16 where the processor multiplies it in hardware."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if _multiplies_bf16() else "fp32"


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
            scale=downsample * slide.levels[level].downsample,
            patch_px=info.patch_px,
            stride_px=pick_stride(info.patch_px, info.mpp, stride_um),
        )
    except BaseException:
        slide.close()
        raise
    return View(slide, thumbnail, tissue, grid, downsample, level)


def predict_slides(
    tasks: Iterable[SlideTask],
    classifier: Classifier,
    *,
    engine: Engine,
    stride_um: float | None = None,
    n_threads: int | None = None,
    on_progress: OnProgress | None = None,
) -> Iterator[Answer]:
    """Give the logits of every patch of every slide, slide by slide in their order.

    While one slide is asked about, the next is opened and read. A slide that fails does not stop the others.

    Args:
        tasks: The slides.
        classifier: The network and how to feed it.
        engine: Device and precision.
        stride_um: Step of the grid; by default a patch's side.
        n_threads: Threads that read; by default one a core.
        on_progress: Called with patches done and patches in all of the slide at hand.
    """
    asker = _Asker(classifier, engine)
    n_threads = n_threads or count_cores()
    pool = ThreadPoolExecutor(n_threads)
    waiting: deque[_Piece] = deque()
    with _one_thread_each(engine), contextlib.ExitStack() as stack:
        stack.callback(pool.shutdown, cancel_futures=True)
        slide = _Gathered()
        for piece in _read_ahead(tasks, pool, asker, lambda task: open_view(task, classifier, stride_um)):
            waiting.append(piece)
            while len(waiting) > 2 * n_threads:
                if answer := slide.add(waiting.popleft(), asker, on_progress):
                    yield answer
        while waiting:
            if answer := slide.add(waiting.popleft(), asker, on_progress):
                yield answer


class _Piece(NamedTuple):
    """A part of a slide on its way: its answer comes; the last of a slide has no block."""

    task: SlideTask
    view: View | None
    block: Block | None = None
    coming: "Future[np.ndarray] | None" = None
    error: SlideError | None = None


class _Asker:
    """The network, on its device, and how it is fed."""

    def __init__(self, classifier: Classifier, engine: Engine) -> None:
        self.network = engine.place(fold(classifier.network.eval()))
        self.preprocessing = classifier.info.preprocessing
        self.n_classes = len(classifier.info.class_names)
        self.engine = engine
        self.asks_in_threads = engine.device.type == "cpu"

    def read(self, view: View, block: Block) -> np.ndarray:
        """Read a piece in a thread; gives its logits, or for a GPU its patches at the network's size."""
        grid = view.grid
        image = view.slide.read_at(block.x, block.y, block.width_px, block.height_px, mpp=grid.mpp)
        if not self.asks_in_threads:
            return self.preprocessing.resize_patches(block.cut(image, grid.patch_px))
        parts = (
            self.preprocessing.resize_patches(block.cut(image, grid.patch_px, part))
            for part in _batches(len(block.index), _CPU_BATCH)
        )
        return self._ask(parts)

    def finish(self, answer: np.ndarray) -> np.ndarray:
        """Give the logits of what a thread came back with."""
        if self.asks_in_threads:
            return answer
        return self._ask(answer[part] for part in _batches(len(answer), _GPU_BATCH))

    def _ask(self, batches: Iterable[np.ndarray]) -> np.ndarray:
        with torch.inference_mode(), self.engine.autocast():
            logits = [
                self.network(self.preprocessing.prepare(batch, device=self.engine.device)).float()
                for batch in batches
            ]
            return torch.cat(logits).cpu().numpy()


class _Gathered:
    """The logits of one slide after the other, put together from their pieces."""

    def __init__(self) -> None:
        self._logits: np.ndarray | None = None
        self._error: SlideError | None = None
        self._done = 0

    def add(self, piece: _Piece, asker: _Asker, on_progress: OnProgress | None) -> Answer | None:
        """Take a piece; gives the slide's answer when it was the last one."""
        if piece.block is None:
            answer = Answer(piece.task, piece.view, self._logits, piece.error or self._error)
            if piece.view is not None:
                piece.view.slide.close()
            self.__init__()  # type: ignore[misc]
            return answer
        assert piece.view is not None and piece.coming is not None
        if self._logits is None:
            self._logits = np.empty((len(piece.view.grid), asker.n_classes), np.float32)
        try:
            self._logits[piece.block.index] = asker.finish(piece.coming.result())
        except SlideError as error:
            self._error = self._error or error
        self._done += len(piece.block.index)
        if on_progress:
            on_progress(self._done, len(piece.view.grid))
        return None


def _read_ahead(
    tasks: Iterable[SlideTask],
    pool: ThreadPoolExecutor,
    asker: _Asker,
    open_task: Callable[[SlideTask], View],
) -> Iterator[_Piece]:
    """Hand slides to the threads piece by piece; a slide is opened while the one before it is read."""
    opening: deque[tuple[SlideTask, Future[View]]] = deque()
    coming = iter(tasks)

    def open_next() -> None:
        for task in coming:
            opening.append((task, pool.submit(open_task, task)))
            return

    open_next()
    while opening:
        task, opened = opening.popleft()
        try:
            view = opened.result()
        except SlideError as error:
            open_next()
            yield _Piece(task, None, error=error)
            continue
        open_next()
        for block in cut_blocks(view.grid, view.downsample):
            yield _Piece(task, view, block, pool.submit(asker.read, view, block))
        yield _Piece(task, view)


def _batches(n: int, most: int) -> Iterator[slice]:
    """Cut ``n`` rows into slices of at most ``most``, as equal as can be."""
    n_batches = -(-n // most)
    for number in range(n_batches):
        yield slice(n * number // n_batches, n * (number + 1) // n_batches)


@contextlib.contextmanager
def _one_thread_each(engine: Engine) -> Iterator[None]:
    """On the CPU, let every call of the network run in the thread that makes it."""
    before = torch.get_num_threads()
    if engine.device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def count_cores() -> int:
    """Give the cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _multiplies_bf16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
