"""The engine ``ray``: the same results as of one process, also where a process or a node dies."""

import shutil
import subprocess
import sys
import time
from functools import partial

import pandas as pd
import pytest

from biopsy.core.claims import FOLDER
from biopsy.core.errors import DataError, MissingExtra, RecipeError, RunError
from biopsy.core.files import LOCK
from biopsy.core.ray_engine import MAX_RETRIES, TaskLost, check_engine, run_tasks
from biopsy.experiments.folds import study
from biopsy.experiments.sweeps import sweep
from biopsy.slides.cohorts import slide
from refusals import refuses
from slide_maps import save_classifier
from tiny_runs import TINY

CLI = (sys.executable, "-c", "from biopsy.cli import main; main()")


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != LOCK)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def cluster():
    """A Ray cluster on this machine: one node with one core, to which a test may add more."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield cluster
    cluster.shutdown()


@pytest.fixture
def slides(make_slide, tmp_path):
    folder = tmp_path / "slides"
    folder.mkdir()
    for seed in range(12):
        shutil.move(make_slide(f"{seed:02}.tiff", seed=seed, width=900, height=700), folder)
    (folder / "broken.tiff").write_bytes(b"II*\0")
    return folder


@pytest.mark.parametrize(
    ("engine", "address", "shard"), [("slurm", None, None), ("local", "auto", None), ("ray", None, "1/2")]
)
def test_engines_and_options_that_do_not_fit_are_refused(engine, address, shard):
    with pytest.raises(RunError):
        check_engine(engine, address, shard)


def test_ray_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr("biopsy.core.ray_engine.find_spec", lambda name: None)
    with refuses(MissingExtra, "--engine ray", extra="ray"):
        check_engine("ray", None)


def test_trials_of_a_search_are_not_for_a_cluster(make_pack):
    pytest.importorskip("ray")
    pytest.importorskip("optuna")
    with refuses(RecipeError, "--engine"):
        sweep("idc-small", make_pack(), search=["train.lr=0.01..0.1"], engine="ray")


def test_maps_of_a_cluster_need_a_folder(slides, tmp_path):
    pytest.importorskip("ray")
    with refuses(DataError, "out=DIR"):
        slide(save_classifier(tmp_path / "c"), slides / "00.tiff", engine="ray")


@pytest.mark.slow
def test_a_cluster_that_is_not_there_is_one_line(slides, tmp_path):
    pytest.importorskip("ray")
    with refuses(RunError, "127.0.0.1:1") as error:
        slide(
            save_classifier(tmp_path / "c"), slides, out=tmp_path / "out", engine="ray", address="127.0.0.1:1"
        )
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("max_patches", [50_000, 300])
def test_slides_on_a_cluster_that_loses_a_node_are_those_of_one_process(
    cluster, slides, make_slide, tmp_path, max_patches
):
    for seed in (3, 5, 7):  # four bands of blocks
        name = f"{seed:02}.tiff"
        make_slide(name, seed=seed, width=400, height=4000).replace(slides / name)
    model, out = save_classifier(tmp_path / "c"), tmp_path / "out"
    slide(model, slides, out=tmp_path / "whole", device="cpu")
    second = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    code = f"import biopsy.slides.cohorts as it; it.MAX_PATCHES_PER_TASK = {max_patches}; {CLI[2]}"
    command = [*CLI[:2], code, "slide", str(model), str(slides), "--device", "cpu", "--out", str(out)]
    command += ["--engine", "ray", "--address", cluster.address]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and len(list(out.glob("*/summary.json"))) < 3:
        time.sleep(0.02)
    assert process.poll() is None
    cluster.remove_node(second, allow_graceful=False)
    n_done = len(list(out.glob("*/summary.json")))
    errors = process.communicate()[1]
    assert process.returncode == 3, errors  # one slide is broken
    assert n_done < 12
    found = contents(out)
    assert {name: content for name, content in found.items() if FOLDER not in name} == contents(
        tmp_path / "whole"
    )
    assert not list((out / FOLDER).glob("*.claim"))
    assert (pd.read_csv(out / "status.csv")["status"] == "done").sum() == 12


@pytest.mark.slow
def test_runs_on_a_cluster_are_those_of_one_process(cluster, make_pack, tmp_path):
    train = partial(study, ["cancernet-2020"], make_pack(), overrides=TINY, seeds=(0, 1, 2), device="cpu")
    one = train(out=tmp_path / "one")
    two = train(out=tmp_path / "two", engine="ray", address=cluster.address)
    assert two.info["status"] == "finished"
    tables = [pd.read_csv(result.path / "table.csv").drop(columns="seconds") for result in (one, two)]
    pd.testing.assert_frame_equal(*tables)
    assert not (two.path / FOLDER).exists()


@pytest.mark.slow
def test_a_task_that_kills_its_process_is_given_up_and_the_others_are_done(cluster, tmp_path):
    def prepare(n_cores):
        def work(task):
            import os
            import signal

            with open(tmp_path / task, "a") as file:
                file.write(".")
            if task == "poison":
                os.kill(os.getpid(), signal.SIGKILL)
            return (task, n_cores)

        return work

    results = dict(run_tasks(prepare, ["a", "poison", "b"], address=cluster.address, device="cpu"))
    assert isinstance(results.pop("poison"), TaskLost)
    assert results == {"a": ("a", 1), "b": ("b", 1)}
    assert len((tmp_path / "poison").read_text()) == MAX_RETRIES + 1


@pytest.mark.slow
def test_an_error_of_a_task_is_that_of_the_command(cluster):
    def prepare(n_cores):
        def work(task):
            raise DataError(f"{task} cannot be read")

        return work

    with refuses(DataError, "a "):
        list(run_tasks(prepare, ["a"], address=cluster.address, device="cpu"))
