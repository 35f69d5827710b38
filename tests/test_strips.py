"""Slides divided into strips: the same files as of one process, and failures end a slide once."""

import os
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

import biopsy.slides.cohorts as cohorts
from biopsy.core.errors import SlideError
from biopsy.core.files import LOCK
from biopsy.core.ray_engine import TaskLost
from biopsy.models.engine import Engine
from biopsy.models.inference import open_predictor
from biopsy.models.out_of_distribution import fit_reference
from biopsy.slides.cohorts import slide
from biopsy.slides.inference import StripLogits, join_strips, open_view, predict_slides
from biopsy.slides.mapping import Mapped, Mapper
from biopsy.slides.sources import Source
from biopsy.slides.tasks import SlideTask, TaskQueue
from refusals import refuses
from slide_maps import make_classifier, save_classifier

MAX_PATCHES = 150
TALL = {"width": 300, "height": 2400}  # three bands of blocks


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != LOCK)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


class Cluster:
    """Stands in for `run_tasks`: two tasks are handed out, the last ends first, each in a new process."""

    def __init__(self, change=lambda task: None):
        self.started = []
        self._change = change

    def __call__(self, prepare, tasks, *, address, device):
        running = []
        while True:
            running += islice(tasks, 2 - len(running))
            if not running:
                return
            task = running.pop()
            self.started.append(task)
            yield task, self._change(task) or prepare(1)(task)


@pytest.fixture
def map_in_strips(monkeypatch):
    monkeypatch.setattr(cohorts, "check_engine", lambda *arguments: None)
    monkeypatch.setattr(cohorts, "MAX_PATCHES_PER_TASK", MAX_PATCHES)

    def run(model, slides, out, change=lambda task: None):
        engine = Cluster(change)
        monkeypatch.setattr(cohorts, "run_tasks", engine)
        return slide(model, slides, out=out, engine="ray", device="cpu"), engine.started

    return run


@pytest.fixture
def slides(make_slide):
    return [make_slide("a.tiff", **TALL), make_slide("b.tiff")]


def strips_of(started, name):
    return [task.blocks for task in started if task.source.name == name and task.blocks is not None]


@pytest.mark.slow
def test_files_of_divided_slides_are_those_of_one_process(map_in_strips, slides, tmp_path):
    model = save_classifier(tmp_path / "classifier")
    slide(model, slides, out=tmp_path / "whole", device="cpu")
    cohort, started = map_in_strips(model, slides, tmp_path / "out")
    assert not cohort.failed
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    for name, n_strips in (("a", 3), ("b", 0)):
        blocks = strips_of(started, name)
        assert len(set(blocks)) == len(blocks) == n_strips
        n_tasks = n_strips + 2 if n_strips else 1
        assert len([task for task in started if task.source.name == name]) == n_tasks


def test_strips_come_before_further_slides():
    def prepare(n_cores):
        def work(task):
            if task.blocks is not None:
                return StripLogits(np.arange(1), np.zeros((1, 2)), np.zeros(0, bool), ("torch", "2"))
            return "done" if task.strips else [(0, 2), (2, 3), (3, 7)]

        return work

    tasks = TaskQueue(SlideTask(Source(str(n), Path(f"{n}.tiff")), {}, None) for n in range(40))
    n_open, ended = 0, []
    for task, result in Cluster()(prepare, tasks, address=None, device="cpu"):
        n_open += isinstance(result, list)
        if tasks.add_result(task, result) is not None:
            ended.append(task)
            n_open -= 1
        assert n_open <= 2  # as many as are handed out at a time
    assert {task.source.name for task in ended} == set(map(str, range(40))) and len(ended) == 40
    assert all(len(task.strips) == 3 and task.blocks is None for task in ended)


def test_joined_strips_are_what_one_process_predicts(make_slide, monkeypatch):
    monkeypatch.setattr("biopsy.slides.grids._READ_PX", 512 * 70)  # blocks of four columns
    path, classifier = make_slide(**TALL), make_classifier()
    source = Source("case", path)
    view = open_view(source, classifier)
    grid = view.grid
    patches = np.stack(
        [view.slide.read_at(x, y, 16, 16, mpp=1.0) for x, y in zip(grid.x, grid.y, strict=True)]
    )
    view.files.close()
    sizes, rows = np.full((len(grid), 2), 16), np.arange(len(grid))
    with open_predictor(classifier, Engine("cpu"), 1) as predictor:
        fit_reference(classifier, predictor, patches, sizes, rows, rows[:200], seed=0)
    (whole,) = predict_slides([source], classifier)
    mapper = Mapper(classifier, None, None, False, "fp32", "cpu", None, None, None)
    blocks = mapper.map_or_divide(source, MAX_PATCHES)
    assert len(blocks) == 3
    assert isinstance(mapper.map_or_divide(source, len(grid)), Mapped)
    strips = [mapper.predict_strip(source, source.version(), strip) for strip in blocks[::-1]]
    joined = join_strips(source, open_view(source, classifier), strips)
    assert np.array_equal(joined.logits, whole.logits) and joined.logits.dtype == whole.logits.dtype
    assert np.array_equal(joined.is_ood, whole.is_ood) and 0 < whole.is_ood.sum() < len(whole.is_ood)
    for others in (strips[1:], [*strips[1:], strips[1]]):
        with refuses(SlideError, path):
            join_strips(source, open_view(source, classifier), others)


@pytest.mark.parametrize("is_lost", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_strip_that_fails_ends_its_slide_and_the_others_are_mapped(
    map_in_strips, slides, tmp_path, monkeypatch, is_lost
):
    predict = Mapper.predict_strip

    def fail(mapper, source, version, blocks):
        if blocks[0] == 1:
            raise SlideError(f"tile {blocks} is damaged")
        return predict(mapper, source, version, blocks)

    def lose(task):
        return TaskLost("its process died") if task.blocks and task.blocks[0] == 1 else None

    if not is_lost:
        monkeypatch.setattr(Mapper, "predict_strip", fail)
    model = save_classifier(tmp_path / "classifier")
    cohort, started = map_in_strips(model, slides, tmp_path / "out", lose if is_lost else lambda task: None)
    assert cohort.status["status"].tolist() == ["failed", "done"]
    assert cohort.failed[0]["source"] == str(slides[0])
    assert ("died" if is_lost else "damaged") in cohort.failed[0]["reason"]
    assert len(strips_of(started, "a")) == 2  # as many as are handed out at a time
    assert not (tmp_path / "out" / "a").exists()


def touch(path):
    state = path.stat()
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 10**9))


def extend(path):
    with path.open("ab") as file:
        file.write(b"more")


@pytest.mark.parametrize(
    ("is_moment", "alter", "reason"),
    [
        (lambda task: task.blocks, touch, "changed"),
        pytest.param(lambda task: task.strips, touch, "changed", marks=pytest.mark.slow),
        (lambda task: task.blocks, extend, "differ"),
    ],
)
def test_a_divided_slide_that_changes_is_refused(map_in_strips, slides, tmp_path, is_moment, alter, reason):
    def change(task):
        if is_moment(task):
            alter(slides[0])

    model = save_classifier(tmp_path / "classifier")
    cohort, started = map_in_strips(model, slides, tmp_path / "out", change)
    assert cohort.status["status"].tolist() == ["failed", "done"]
    assert reason in cohort.failed[0]["reason"]
    assert is_moment(next(task for task in started[::-1] if task.source.name == "a"))
    assert not (tmp_path / "out" / "a").exists()
