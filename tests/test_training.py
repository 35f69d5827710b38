"""Training: the same twice, exact resumption from any point, refusals, and that it learns."""

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import biopsy.training.checkpoints as checkpoints
import biopsy.training.fit as fitting
import biopsy.training.train as training
from biopsy.core import files
from biopsy.core.errors import DataError, PackError, RecipeError, RunError, SplitError, TrainingDiverged
from biopsy.core.files import read_json, write_json
from biopsy.data.packs import Pack
from biopsy.data.splits import save_split
from biopsy.data.splits import split as make_split
from biopsy.training.runs import Run
from biopsy.training.train import train
from conftest import abandon, write_pack
from refusals import refuses
from tiny_runs import LIVELY, assert_same_run, interrupt_at, train_tiny, weights

RECIPE = "cancernet-2020"
THREE = "train.epochs=3"


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    return write_pack(tmp_path_factory.mktemp("training"), n_patients=8, patches_per_patient=8)


@pytest.fixture(scope="module")
def whole(pack, tmp_path_factory):
    """Three epochs without interruption; change only a copy of it."""
    return train_tiny(pack, tmp_path_factory.mktemp("whole") / "run", THREE)


def test_same_seed_same_bits(pack, whole, tmp_path):
    assert_same_run(whole, train_tiny(pack, tmp_path / "again", THREE))
    other = train_tiny(pack, tmp_path / "other", THREE, seed=1)
    assert not torch.equal(weights(whole)["head.weight"], weights(other)["head.weight"])


def slow(*values):
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.mark.parametrize(
    "optimiser",
    ["adam", *slow("muon", "adagrad", "adagrad-keras2", "adamw", "sgd", "rmsprop", "rmsprop-keras2")],
)
def test_resumed_equals_never_interrupted(pack, tmp_path, optimiser):
    settings = (
        *(THREE, f"train.optimiser={optimiser}", "train.lr=0.001"),
        f"train.sampling={'within-patient' if optimiser == 'muon' else 'oversample'}",
        *("train.schedule=one-cycle", "train.ema_decay=0.9"),
        *(("train.momentum=0.95", "train.nesterov=true") if optimiser == "muon" else ()),
    )
    whole = train_tiny(pack, tmp_path / "whole", *settings)
    with pytest.raises(KeyboardInterrupt) as stop:
        train_tiny(pack, tmp_path / "cut", *settings, on_epoch=interrupt_at(2))
    assert stop.value.args == (str(tmp_path / "cut"),)  # by which the command line says how to go on
    assert Run.open(tmp_path / "cut").info["status"] == "interrupted"
    assert_same_run(whole, train(resume=tmp_path / "cut", device="cpu"))


def test_a_pack_altered_while_a_run_is_completed_does_not_finish_it(pack, whole, tmp_path, monkeypatch):
    own = Pack.open(shutil.copytree(pack.path, tmp_path / "own.pack"))

    def flip_last_byte():
        with open(own.path / "patches.npy", "r+b") as file:
            file.seek(-1, os.SEEK_END)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 0x55]))

    def complete(*arguments):
        flip_last_byte()
        finish(*arguments)

    finish = training.complete
    with monkeypatch.context() as patch, pytest.raises(PackError) as refused:
        patch.setattr(training, "complete", complete)
        train_tiny(own, tmp_path / "run", THREE)
    assert refused.value.reason == "altered" and Run.open(tmp_path / "run").info["status"] == "running"
    flip_last_byte()
    assert_same_run(whole, train(resume=tmp_path / "run", device="cpu"))


def test_a_pack_that_goes_away_stops_a_training_that_resumes(pack, whole, tmp_path):
    own = Pack.open(shutil.copytree(pack.path, tmp_path / "own.pack"))

    def remove(record):
        (own.path / "patches.parquet").rename(tmp_path / "away")

    with pytest.raises(PackError):
        train_tiny(own, tmp_path / "run", THREE, on_epoch=remove)
    info = Run.open(tmp_path / "run").info
    assert info["status"] == "interrupted" and "patches.parquet" in info["reason"]
    (tmp_path / "away").rename(own.path / "patches.parquet")
    resumed = train(resume=tmp_path / "run", device="cpu")
    assert_same_run(whole, resumed)
    assert "reason" not in resumed.info


def break_nth(monkeypatch, module, name, n, error):
    """Let the n-th call of a function fail."""
    real, calls = getattr(module, name), []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == n:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, failing)


@pytest.mark.parametrize("moment", [1, 2, 3, *slow(4, 5, 6)])
def test_killed_while_a_checkpoint_is_written(pack, whole, tmp_path, monkeypatch, moment):
    with monkeypatch.context() as patch:
        break_nth(patch, checkpoints, "_write", moment, OSError("killed"))
        try:
            train_tiny(pack, tmp_path / "cut", THREE)
        except OSError:
            assert_same_run(whole, train(resume=tmp_path / "cut", device="cpu"))
        else:
            assert moment > 4  # the best epoch's weights are written only when there is a new best


@pytest.mark.parametrize(
    "name", ["last.safetensors", "log.jsonl", "weights.safetensors", "validation.parquet"]
)
def test_a_full_disk_is_named_and_the_run_goes_on(pack, whole, tmp_path, monkeypatch, name):
    replace, times = os.replace, []

    def fill(source, target):
        times.append(Path(target).name)
        if times.count(name) == (2 if name in ("last.safetensors", "log.jsonl") else 1):
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(files.os, "replace", fill)
        with refuses(RunError, name, "No space left", "--resume") as caught:
            train_tiny(pack, tmp_path / "cut", THREE)
    assert str(tmp_path / "cut") in str(caught.value) and ".partial" not in str(caught.value)
    assert list((tmp_path / "cut").rglob("*.partial")) == []
    assert_same_run(whole, train(resume=tmp_path / "cut", device="cpu"))


def test_killed_in_the_middle_of_an_epoch(pack, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        break_nth(patch, fitting, "set_learning_rate", 8, SystemExit(1))
        with pytest.raises(SystemExit):
            train_tiny(pack, tmp_path / "cut", THREE)
    abandon(tmp_path / "cut")
    abandon(tmp_path / "cut" / "checkpoints")
    resumed = train(resume=tmp_path / "cut", device="cpu")
    assert_same_run(whole, resumed)
    assert not list(resumed.path.rglob("*.partial"))


@pytest.mark.parametrize("moment", [1, 3])
def test_killed_between_a_checkpoint_and_the_log(pack, whole, tmp_path, monkeypatch, moment):
    with monkeypatch.context() as patch:
        break_nth(patch, Run, "write_log", moment, SystemExit(1))
        with pytest.raises(SystemExit):
            train_tiny(pack, tmp_path / "cut", THREE)
    assert_same_run(whole, train(resume=tmp_path / "cut", device="cpu"))


def test_killed_while_the_classifier_is_made(pack, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        break_nth(patch, training, "complete", 1, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            train_tiny(pack, tmp_path / "cut", THREE)
    assert_same_run(whole, train(resume=tmp_path / "cut", device="cpu"))


def test_a_loss_that_is_not_finite_stops_the_run(pack, tmp_path):
    settings = ("train.optimiser=sgd", "train.lr=1e30")
    with refuses(TrainingDiverged, "epoch 1, step ", "train.lr"):
        train_tiny(pack, tmp_path / "run", *settings)
    info = read_json(tmp_path / "run" / "run.json")
    assert info["status"] == "failed" and "step" in info["reason"]
    with refuses(TrainingDiverged, "epoch 1", "validation", "1 steps"):
        train_tiny(pack, tmp_path / "one-step", *settings, "train.batch_size=64")
    assert not (tmp_path / "one-step" / "checkpoints" / "last.safetensors").exists()


def test_learns_what_can_be_learned(pack, tmp_path):
    settings = (*LIVELY, "train.epochs=8", "train.lr=0.01")
    run = train_tiny(pack, tmp_path / "run", *settings, recipe="idc-small")
    assert max(record["val_auroc"] for record in run.log()) > 0.9
    assert run.info["chosen_epoch"] == max(run.log(), key=lambda r: (r["val_auroc"], -r["epoch"]))["epoch"]


def test_early_stopping_stops(pack, tmp_path):
    settings = ("train.epochs=30", "train.early_stopping_patience=2", "train.lr=1e-9")
    run = train_tiny(pack, tmp_path / "run", *settings)
    assert run.info["epochs_done"] == run.info["chosen_epoch"] + 2 < 30
    assert run.info["stopped_early"]


def test_the_rate_falls_on_a_plateau(pack, tmp_path):
    settings = ("train.schedule=plateau", "train.epochs=5", "train.optimiser=sgd", "train.lr=1e-12")
    rates = [record["lr"] for record in train_tiny(pack, tmp_path / "run", *settings).log()]
    assert rates[:4] == [1e-12] * 4 and rates[4] == pytest.approx(1e-13)


def test_as_published_takes_the_last_epoch_and_the_arg_max(pack, tmp_path):
    run = train_tiny(pack, tmp_path / "run", split="as-published")
    assert run.info["split"]["patients_overlap"] is True
    assert run.info["chosen_epoch"] == 2
    assert run.info["threshold"]["value"] == 0.5


def keep_in_training(pack, name, *counts):
    """Save a split by patient in which training has so many patches of each class."""
    split = make_split(pack, protocol="patients", save=False)
    table = split.table.copy()
    for label, count in enumerate(counts):
        rows = table.index[(table["subset"] == "train") & (pack.target == label)]
        table.loc[rows[count:], "subset"] = ""
    save_split(pack, type(split)(**{**vars(split), "name": name, "table": table}))


@pytest.mark.parametrize(
    ("counts", "settings", "steps"),
    [
        ((21, 19), ("train.drop_last=false", "train.batch_size=13"), 3),
        ((24, 4), ("train.sampling=undersample", "train.batch_size=26"), 1),
    ],
    ids=["three batches and a single patch", "fewer than a batch"],
)
def test_a_last_batch_of_any_size_is_met(make_pack, tmp_path, counts, settings, steps):
    pack = make_pack(n_patients=8, patches_per_patient=8)
    keep_in_training(pack, "few", *counts)
    run = train_tiny(pack, tmp_path / "run", "train.epochs=1", *settings, split="few")
    assert run.info["split"]["subsets"]["train"]["patches"] == sum(counts)
    assert run.log()[0]["step"] == steps


def test_refusals(pack, whole, tmp_path):
    with refuses(RunError, "finished"):
        train(resume=whole.path)
    with refuses(RunError, whole.path, "another folder"):
        train_tiny(pack, whole.path)
    with refuses(RunError, pack.path, "run.json"):
        train(resume=pack.path)
    for options in ({"recipe": RECIPE, "data": pack}, {"overrides": {"train.lr": 1}}, {"split": "patients"}):
        with refuses(RunError, "recipe", "settings"):
            train(**options, resume=whole.path)
    with refuses(RunError, "recipe", "data"):
        train(RECIPE)


@pytest.mark.parametrize(
    ("settings", "options", "error", "facts"),
    [
        (["train.momentum=0.9"], {}, RecipeError, ["'adagrad'", "momentum=0.9", "'sgd'"]),
        (["preprocessing.input_px=4"], {}, RecipeError, ["input_px=4", "8"]),
        (["model.params.dropout=0.1"], {}, RecipeError, ["'dropout'", "'stage_dropout'"]),
        ([], {"split": "patient"}, SplitError, ["'patient'", "'patients'"]),
        ([], {"fold": 1}, SplitError, ["'patients'", "fold=1"]),
        ([], {"plot": "curves.txt"}, RunError, ["curves.txt", ".png, .svg, .pdf"]),
    ],
)
def test_errors_that_would_stop_a_run_later_are_refused_at_once(
    pack, tmp_path, settings, options, error, facts
):
    with refuses(error, *facts):
        train_tiny(pack, tmp_path / "run", *settings, **options)
    assert not (tmp_path / "run").exists()


def test_a_device_that_is_not_here_is_refused_at_once(pack, tmp_path):
    with refuses(RecipeError, "device='gpuu'"):
        train(RECIPE, pack, out=tmp_path / "run", device="gpuu")
    assert not (tmp_path / "run").exists()


def test_a_run_whose_pack_changed_is_refused(whole, tmp_path):
    run = Run.open(shutil.copytree(whole.path, tmp_path / "run"))
    pack = shutil.copytree(run.open_pack().path, tmp_path / "own.pack")
    run.update(pack={**run.info["pack"], "path": str(pack)})
    document = json.loads((pack / "pack.json").read_text())
    document["content_sha256"] = "0" * 64
    write_json(pack / "pack.json", document)
    with refuses(RunError, "another pack"):
        run.open_pack()
    shutil.rmtree(pack)
    with refuses(RunError, pack, "pack.json"):
        run.open_pack()


def test_a_class_missing_from_training_is_refused(make_pack, tmp_path):
    two = make_pack("two.pack", n_patients=6, patches_per_patient=6)
    keep_in_training(two, "one-class", 99, 0)
    with refuses(SplitError, "two classes"):
        train_tiny(two, tmp_path / "run", split="one-class")
    three = make_pack("three.pack", n_patients=6, patches_per_patient=6, n_classes=3)
    keep_in_training(three, "two-classes", 99, 99, 0)
    with refuses(DataError, "class", ", 0]", "train.class_weights=none"):
        train_tiny(three, tmp_path / "run", split="two-classes")
    assert not (tmp_path / "run").exists()


def test_a_class_without_training_patches_is_named(make_pack, tmp_path, caplog):
    three = make_pack("three.pack", n_patients=6, patches_per_patient=6, n_classes=3)
    keep_in_training(three, "two-classes", 99, 99, 0)
    train_tiny(three, tmp_path / "run", "train.class_weights=none", "train.epochs=1", split="two-classes")
    [warned] = [
        record for record in caplog.records if record.name == training.__name__ and "class_2" in record.args
    ]
    assert warned.levelname == "WARNING"


def test_a_folder_with_files_of_others_is_refused_before_a_network_is_made(pack, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "make_network", None)
    (tmp_path / "notes.txt").write_text("mine")
    with refuses(RunError, tmp_path, "empty"):
        train_tiny(pack, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_featurewise_statistics_come_from_training_patches(pack, tmp_path):
    run = train_tiny(pack, tmp_path / "run", "train.epochs=1", "preprocessing.standardise=featurewise")
    patches = pack.patches[run.subsets(pack) == "train"].reshape(-1, 3) / 255
    found = run.classifier.info.preprocessing
    np.testing.assert_allclose(found.mean, patches.mean(axis=0), rtol=1e-9)
    np.testing.assert_allclose(found.std, patches.std(axis=0), rtol=1e-6)


def test_curves_are_drawn_on_request(pack, tmp_path):
    run = train_tiny(pack, tmp_path / "run", plot=tmp_path / "figures" / "curves.png")
    assert (tmp_path / "figures" / "curves.png").read_bytes()[:4] == b"\x89PNG"
    lines = (run.path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2]
