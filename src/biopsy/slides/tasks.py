"""Tasks of a cohort on a cluster: slides, and strips of slides with many patches.

The task of a slide maps it, or divides it into strips, each predicted by a task; a last task makes the map of
their logits. A task that fails ends its slide.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

from biopsy.slides.grids import BlockRange
from biopsy.slides.inference import StripLogits
from biopsy.slides.sources import Source

MAX_PATCHES_PER_TASK = 50_000  # about 20 s on a core with CancerNet, docs/scaling.md

Outcome = TypeVar("Outcome")


@dataclass(frozen=True)
class SlideTask:
    """What one process does at a time.

    Attributes:
        request: The request of the slide (`Mapper.request`).
        version: Version of the slide file (`Source.version`), which must be that of all its strips.
        blocks: First block of the strip to be predicted, and that after its last; None for all.
        strips: Logits of all strips, of which the map is made.
    """

    source: Source
    request: dict[str, object]
    version: tuple[int, int] | None
    blocks: BlockRange | None = None
    strips: tuple[StripLogits, ...] = ()


class TaskQueue(Iterator[SlideTask]):
    """Tasks in the order in which they are handed out; results add to them.

    Tasks of divided slides come before further slides, so that the logits of few slides are in memory.
    """

    def __init__(self, slides: Iterator[SlideTask]) -> None:
        self._slides = slides
        self._strips: deque[SlideTask] = deque()
        self._n_strips: dict[str, int] = {}
        self._logits: dict[str, list[StripLogits]] = {}

    def __next__(self) -> SlideTask:
        return self._strips.popleft() if self._strips else next(self._slides)

    def add_result(self, task: SlideTask, result: Outcome | list[BlockRange] | StripLogits) -> Outcome | None:
        """Add the tasks that follow from a result; return the row of a slide that has ended."""
        name = task.source.name
        if isinstance(result, list):
            self._n_strips[name], self._logits[name] = len(result), []
            self._strips += (replace(task, blocks=blocks) for blocks in result)
            return None
        if task.blocks is not None and name not in self._logits:  # another strip has failed
            return None
        if not isinstance(result, StripLogits):
            self._logits.pop(name, None)
            self._strips = deque(waiting for waiting in self._strips if waiting.source.name != name)
            return result
        self._logits[name].append(result)
        if len(self._logits[name]) == self._n_strips[name]:
            self._strips.appendleft(replace(task, blocks=None, strips=tuple(self._logits.pop(name))))
        return None
