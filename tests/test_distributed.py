"""Training over processes: parts of batches, and that several processes train as one does."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from biopsy.cli.app import USAGE, run
from biopsy.core.errors import RecipeError
from biopsy.core.launch import Launch, read_launch
from biopsy.models.engine import make_loss
from biopsy.recipes.preprocessing import Preprocessing
from biopsy.recipes.schema import Augmentation
from biopsy.training.batches import Batches
from biopsy.training.distributed import Processes, join_processes
from biopsy.training.runs import Run
from biopsy.training.stain_augmentation import fit_rand_stain_na, fit_stain_transfer
from biopsy.training.train import train
from conftest import write_pack
from refusals import refuses
from tiny_runs import train_tiny, weights

SLURM = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"}
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1"}


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    return write_pack(tmp_path_factory.mktemp("distributed"), n_patients=8, patches_per_patient=10)


@pytest.fixture
def environment(monkeypatch):
    for name in (*SLURM, *TORCHRUN, "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    return lambda names: [monkeypatch.setenv(name, value) for name, value in names.items()]


@given(n=st.integers(1, 200), world_size=st.integers(1, 17))
def test_each_patch_is_in_one_part_and_no_part_is_a_single_patch(n, world_size):
    group = [Processes(rank, world_size) for rank in range(world_size)]
    taken = [range(n)[process.part(n)] for process in group]
    assert [i for process, part in zip(group, taken, strict=True) for i in part[: process.count(n)]] == [
        *range(n)
    ]
    assert min(map(len, taken)) >= min(n, 2)
    counts = [process.count(n) for process in group if process.count(n)]
    assert max(counts) - min(counts) <= 1
    assert sum(process.weight(n) for process in group) == pytest.approx(world_size)


@given(n=st.integers(1, 40), world_size=st.integers(1, 6), seed=st.integers(0, 9))
def test_the_mean_of_weighted_losses_has_the_gradient_of_the_whole_batch(n, world_size, seed):
    rng = torch.Generator().manual_seed(seed)
    batch, target = torch.randn(n, 5, generator=rng), torch.randint(0, 3, (n,), generator=rng)
    matrix = torch.randn(5, 3, generator=rng, requires_grad=True)
    loss_fn, patch = make_loss("softmax", [1.0, 2.0, 0.5]), torch.rand(n, generator=rng)
    (whole,) = torch.autograd.grad(loss_fn(batch @ matrix, target, patch), matrix)
    mean = torch.zeros_like(whole)
    for rank in range(world_size):
        process = Processes(rank, world_size)
        part = process.part(n)
        loss = loss_fn(batch[part] @ matrix, target[part], patch[part]) * process.weight(n)
        mean += torch.autograd.grad(loss, matrix)[0] / world_size
    assert torch.allclose(mean, whole, atol=1e-6)


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_parts_of_augmented_batches_are_those_of_one_process(pack, world_size):
    rows = np.arange(len(pack.target))

    def batches(rank, world_size):
        return Batches(
            patches=pack.patches,
            target=pack.target,
            preprocessing=Preprocessing(input_px=16),
            batch_size=11,
            stain_transfer=fit_stain_transfer(pack, rows, 0.5, seed=0),
            rand_stain_na=fit_rand_stain_na(pack, rows, 0.5, seed=0),
            augmentation=Augmentation(
                rotation_deg=20,
                zoom=0.2,
                flip_vertical=True,
                hed_jitter=0.1,
                rand_augment_n=2,
                blur_px=1,
                cutout=0.3,
            ),
            processes=Processes(rank, world_size),
        )

    parts = [list(batches(rank, world_size).iterate(rows, epoch=2)) for rank in range(world_size)]
    for number, (batch, target) in enumerate(batches(0, 1).iterate(rows, epoch=2)):
        n = batches(0, 1).size(len(rows), number)
        counts = [Processes(rank, world_size).count(n) for rank in range(world_size)]
        for place, whole in enumerate((batch, target)):
            joined = torch.cat(
                [part[number][place][:count] for part, count in zip(parts, counts, strict=True)]
            )
            assert torch.allclose(joined, whole, atol=1e-5)


def test_slurm_counts_where_an_address_is_set_and_torchrun_before_it(environment):
    environment(SLURM)
    assert read_launch() == Launch(0, 1, 0)
    environment({"MASTER_ADDR": "node1"})
    assert read_launch() == Launch(3, 4, 1)
    environment(TORCHRUN)
    assert read_launch() == Launch(1, 2, 1)


def test_settings_that_several_processes_cannot_share_are_refused(environment, capsys):
    environment(TORCHRUN)
    with refuses(RecipeError, "one GPU"), join_processes("cuda:1"):
        pass
    assert run(["evaluate", "runs/first"]) == USAGE
    assert "--shard" in capsys.readouterr().err


CODE = """
import json, sys
from biopsy.training.train import train
from tiny_runs import interrupt_at
options = json.loads(sys.argv[1])
stop = options.pop("stop", None)
train(**options, device="cpu", on_epoch=interrupt_at(stop) if stop else None)
"""
PLAIN = (
    "preprocessing.input_px=16",
    "model.params.widths=[4,8]",
    "model.params.dropout=0",
    "train.epochs=3",
    "train.batch_size=9",
    "train.optimiser=sgd",
    "train.lr=0.05",
    "train.class_weights=balanced",
    "train.ema_decay=0.5",
)
OFF = tuple(
    f"augmentation.{name}"
    for name in ("rotation_deg=0", "zoom=0", "shift=0", "flip_horizontal=false", "flip_vertical=false")
)

LEARNED = ("train.teacher={RUN}", "train.patch_weights={WEIGHTS}", "train.sampling=within-patient")


def start(world_size: int, **options: object) -> list[tuple[int, str]]:
    """Train in several processes; returns the exit code of each, and what it wrote on stderr."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
    processes = []
    for rank in range(world_size):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
        environment = {
            **os.environ,
            **{name: str(value) for name, value in place.items()},
            "MASTER_ADDR": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        command = [sys.executable, "-c", CODE, json.dumps(given)]
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    texts = [process.communicate(timeout=300)[1] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, texts, strict=True)]


def start_plain(world_size, pack, out, *settings, **options):
    overrides = [*PLAIN, *settings]
    return start(
        world_size, recipe="dabydeen-hedges", data=pack.path, out=out, overrides=overrides, **options
    )


def assert_close(one: Run, other: Run) -> None:
    left, right = weights(one), weights(other)
    assert max(float((left[name] - right[name]).abs().max()) for name in left) < 1e-5
    for name in ("loss", "accuracy", "val_loss", "val_accuracy", "val_auroc", "lr", "step", "best"):
        values = [[record[name] for record in run.log()] for run in (one, other)]
        assert values[0] == pytest.approx(values[1], abs=1e-5)
    frames = [run.predictions("validation")[0] for run in (one, other)]
    assert frames[0]["patch_id"].tolist() == frames[1]["patch_id"].tolist()
    assert one.info["chosen_epoch"] == other.info["chosen_epoch"]
    assert one.info["config_sha256"] == other.info["config_sha256"]


@pytest.fixture(scope="module")
def alone(pack, tmp_path_factory):
    """The training of one process, with and without augmentation."""
    folder = tmp_path_factory.mktemp("alone")
    return {
        settings: train_tiny(pack, folder / str(len(settings)), *PLAIN, *settings, recipe="dabydeen-hedges")
        for settings in ((), OFF)
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "settings"),
    [(2, OFF), (4, OFF), (2, ()), (2, (*OFF, "model.trainable=dense")), (3, (*OFF, *LEARNED))],
    ids=["two", "four", "augmented", "frozen stages", "teacher and weights"],
)
def test_processes_train_as_one_does(pack, alone, tmp_path, world_size, settings):
    weight = np.linspace(0, 1, len(pack))
    pd.DataFrame({"patch_id": pack.table["patch_id"], "weight": weight}).to_csv(
        tmp_path / "w.csv", index=False
    )
    places = {"RUN": alone[()].path, "WEIGHTS": tmp_path / "w.csv"}
    settings = tuple(setting.format(**places) for setting in settings)
    ended = start_plain(world_size, pack, tmp_path / "run", *settings)
    assert [code for code, _ in ended] == [0] * world_size, ended
    one = alone.get(settings) or train_tiny(
        pack, tmp_path / "one", *PLAIN, *settings, recipe="dabydeen-hedges"
    )
    run = Run.open(tmp_path / "run")
    assert run.info["processes"] == world_size
    assert_close(one, run)


@pytest.mark.slow
def test_a_run_of_two_processes_is_resumed_by_one_and_the_reverse(pack, alone, tmp_path):
    ended = start_plain(2, pack, tmp_path / "two", *OFF, stop=2)
    assert all(code for code, _ in ended)
    assert Run.open(tmp_path / "two").info["status"] == "interrupted"
    assert "lost the others" in ended[1][1]
    assert_close(alone[OFF], train(resume=tmp_path / "two", device="cpu"))

    assert start_plain(1, pack, tmp_path / "one", *OFF, stop=1)[0][0]
    assert [code for code, _ in start(2, resume=tmp_path / "one")] == [0, 0]
    assert_close(alone[OFF], Run.open(tmp_path / "one"))


@pytest.mark.slow
def test_an_error_of_the_first_process_ends_all(pack, tmp_path):
    (first, said), (second, told) = start_plain(2, pack, tmp_path / "run", "train.momentum=7")
    assert first and second
    assert "RecipeError" in said and "RunError: process 2 of 2 ends: the first one failed" in told
    assert not (tmp_path / "run").exists()
