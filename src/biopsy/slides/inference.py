"""Inference on slides, with threads that read ahead.

On the CPU, every thread reads blocks of a slide and predicts their patches in small batches, which fit into
the cache of a core. On a GPU, threads read and resize, and one thread predicts in large batches. Only a few
blocks are in memory at a time, and logits do not depend on the number of threads.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, Literal, NamedTuple

import numpy as np

from biopsy.core.errors import DataError, DownloadError, SlideError
from biopsy.core.storage import staged
from biopsy.models.classifier import Classifier
from biopsy.models.hardware import count_cores
from biopsy.models.out_of_distribution import out_of_distribution_scores
from biopsy.models.runtimes import open_runtime
from biopsy.slide_io.reader import Slide, open_slide
from biopsy.slide_io.tissue import find_tissue_of
from biopsy.slides.grids import Block, PatchGrid, cut_blocks, lay_grid, pick_stride
from biopsy.slides.sources import Source

OnProgress = Callable[[int, int], None]
Cut = Callable[[PatchGrid, float], Iterable[Block]]
"""Returns the blocks to be predicted, as `cut_blocks`."""

N_CHECKED = 250  # patches per slide checked for being out of distribution; standard error of at most 3 %


@dataclass(frozen=True)
class View:
    """An open slide with the grid of its patches.

    Attributes:
        thumbnail: The whole slide, uint8 ``(H, W, 3)``.
        tissue: Tissue mask, bool ``(H, W)``.
        downsample: Side of a patch pixel in pixels of the level that is read.
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


class StripLogits(NamedTuple):
    """Logits of some blocks of a slide.

    Attributes:
        patch_index: Indices of their patches in the grid, ascending, int ``(n,)``.
        logits: ``(n, n_classes)``.
        is_ood: Mask of the checked ones that are out of distribution, bool.
        software: Name and version of the runtime.
    """

    patch_index: np.ndarray
    logits: np.ndarray
    is_ood: np.ndarray
    software: tuple[str, str]


@dataclass
class SlideLogits:
    """Logits of a slide, collected block by block, or the error.

    Attributes:
        software: Name and version of the runtime.
        view: The open slide; None if it could not be opened.
        logits: ``(n, n_classes)``, in the order of the grid.
        is_ood: Mask of the checked patches that are out of distribution, in the order of the grid, bool
            ``(n_checked,)``.
        error: Why there are no logits.
        n_done: Number of patches done.
    """

    source: Source
    software: tuple[str, str]
    view: View | None = None
    logits: np.ndarray | None = None
    is_ood: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    error: DataError | None = None
    n_done: int = 0
    _checked: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list, repr=False)

    def add(self, block: Block, outputs: "_Outputs") -> None:
        assert self.view is not None
        if self.logits is None:
            self.logits = np.empty((len(self.view.grid), outputs.logits.shape[1]), np.float32)
        self.logits[block.index] = outputs.logits
        if len(outputs.checked):
            index = block.index[self.view.checked[block.index]]
            self._checked.append((index, outputs.checked, outputs.features))

    def finish(self, classifier: Classifier) -> "SlideLogits":
        """Find the patches that are out of distribution, and close the slide."""
        if self._checked:
            index, checked, features = map(np.concatenate, zip(*self._checked, strict=True))
            scores = out_of_distribution_scores(classifier, checked, None, features)
            self.is_ood = scores["out_of_distribution"].to_numpy()[np.argsort(index)]
            self._checked.clear()
        if self.view is not None:
            self.view.files.close()
        return self

    def to_strip(self, blocks: Iterable[Block]) -> StripLogits:
        """Return the logits of the predicted blocks alone."""
        assert self.logits is not None
        index = np.sort(np.concatenate([block.index for block in blocks]))
        return StripLogits(index, self.logits[index], self.is_ood, self.software)


def join_strips(source: Source, view: View, strips: Sequence[StripLogits]) -> SlideLogits:
    """Return the logits of a slide from those of its strips, in any order, and close the slide.

    Raises:
        SlideError: If the strips are not those of the grid.
    """
    index, logits, is_ood = (np.concatenate(parts) for parts in list(zip(*strips, strict=True))[:3])
    view.files.close()
    order = np.argsort(index)
    if not np.array_equal(index[order], np.arange(len(view.grid))):
        raise SlideError(f"the strips of {source.path} are of another grid of patches: map it again")
    is_ood = is_ood[np.argsort(index[view.checked[index]])]
    return SlideLogits(source, strips[0].software, view, logits[order], is_ood)


class _Outputs(NamedTuple):
    """Logits of a block, and its checked patches with their features."""

    logits: np.ndarray
    checked: np.ndarray
    features: np.ndarray


def open_view(source: Source, classifier: Classifier, stride_um: float | None = None) -> View:
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
            path = source.path if source.url is None else files.enter_context(staged(source.url))
        except DownloadError as error:
            raise SlideError(str(error), error.reason) from None
        slide = open_slide(path, mpp=source.mpp)
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
    sources: Iterable[Source],
    classifier: Classifier,
    *,
    device: str = "cpu",
    precision: Literal["fp32", "bf16", "int8"] = "fp32",
    stride_um: float | None = None,
    n_threads: int | None = None,
    on_progress: OnProgress | None = None,
    cut: Cut = cut_blocks,
) -> Iterator[SlideLogits]:
    """Yield the logits of each slide, in order.

    The next slide is opened and read while one is predicted. Errors of a slide do not stop the others.

    Args:
        on_progress: Called with the numbers of patches done and in all of the current slide.
        cut: Called with the grid and the downsample of each slide; returns the blocks to be predicted.
    """
    n_threads = n_threads or count_cores()
    waiting: deque[_Piece] = deque()
    with contextlib.ExitStack() as stack:
        pool = ThreadPoolExecutor(n_threads)
        stack.callback(pool.shutdown, cancel_futures=True)
        opening = _open_ahead(sources, lambda source: pool.submit(open_view, source, classifier, stride_um))
        first = list(islice(opening, 1))  # is opened while the runtime is
        runtime = stack.enter_context(open_runtime(classifier, device, precision, n_threads=n_threads))

        def predict(resized: np.ndarray, checked: np.ndarray) -> _Outputs:
            logits = runtime.logits(resized)
            no_features = np.zeros((0, 0), np.float32)
            features = runtime.logits_and_features(checked)[1] if len(checked) else no_features
            return _Outputs(logits, checked, features)

        def read(view: View, block: Block) -> _Outputs | tuple[np.ndarray, np.ndarray]:
            """Return the outputs of a block, or its patches if one thread predicts for all."""
            grid = view.grid
            image = view.slide.read_at(block.x, block.y, block.width_px, block.height_px, mpp=grid.mpp)
            patches = block.cut(image, grid.patch_px)
            resized = classifier.info.preprocessing.resize_patches(patches)
            checked = patches[view.checked[block.index]]
            return predict(resized, checked) if runtime.in_threads else (resized, checked)

        def collect(most: int) -> Iterator[SlideLogits]:
            """Add waiting blocks to their slides until at most ``most`` wait; yield finished slides."""
            while len(waiting) > most:
                slide, block, future = waiting.popleft()
                if block is None or future is None or slide.view is None:
                    yield slide.finish(classifier)
                    continue
                try:
                    outputs = future.result()
                    slide.add(block, outputs if isinstance(outputs, _Outputs) else predict(*outputs))
                except DataError as error:
                    slide.error = slide.error or error
                slide.n_done += len(block.index)
                if on_progress:
                    on_progress(slide.n_done, len(slide.view.grid))

        def submit(view: View, block: Block) -> "Future[Any]":
            return pool.submit(read, view, block)

        for piece in _submit_blocks(chain(first, opening), runtime.software, cut, submit):
            waiting.append(piece)
            yield from collect(2 * n_threads)
        yield from collect(0)


_Piece = tuple[SlideLogits, Block | None, "Future[_Outputs | tuple[np.ndarray, np.ndarray]] | None"]
"""A slide, one of its blocks and the pending outputs; the last piece of a slide has no block."""


def _open_ahead(
    sources: Iterable[Source], submit: Callable[[Source], "Future[View]"]
) -> Iterator[tuple[Source, "Future[View]"]]:
    """Yield slides being opened; the next one is opened while one is read."""
    ahead: deque[tuple[Source, Future[View]]] = deque()
    for source in sources:
        ahead.append((source, submit(source)))
        if len(ahead) > 1:
            yield ahead.popleft()
    yield from ahead


def _submit_blocks(
    opening: Iterable[tuple[Source, "Future[View]"]],
    software: tuple[str, str],
    cut: Cut,
    submit: Callable[[View, Block], Any],
) -> Iterator[_Piece]:
    """Yield the pieces of all slides; a block is submitted when its piece is requested."""
    for source, opened in opening:
        slide = SlideLogits(source, software)
        try:
            slide.view = opened.result()
        except DataError as error:
            slide.error = error
        else:
            for block in cut(slide.view.grid, slide.view.downsample):
                yield slide, block, submit(slide.view, block)
        yield slide, None, None
