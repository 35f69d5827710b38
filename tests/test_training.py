"""Training: the same twice, exact resumption from any point, refusals, and that it learns."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import biopsy.learning.checkpoints as checkpoints
import biopsy.learning.fitting as fitting
from biopsy.data.splits import make_split, save_split
from biopsy.errors import RunError, SplitError, TrainingDiverged
from biopsy.files import read_json
from biopsy.learning.runs import Run
from biopsy.learning.training import train

TINY = (
    "preprocessing.input_px=16",
    "train.epochs=4",
    "train.batch_size=8",
    "train.lr=0.02",
)


@pytest.fixture
def pack(make_pack):
    return make_pack(n_patients=8, patches_per_patient=8)


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.path / "classifier" / "weights.safetensors")


def assert_same_run(one: Run, other: Run) -> None:
    left, right = weights(one), weights(other)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    timing = ("images_per_s", "seconds", "time_left_s")
    strip = [[{k: v for k, v in r.items() if k not in timing} for r in run.log()] for run in (one, other)]
    assert strip[0] == strip[1]
    assert one.info["threshold"] == other.info["threshold"]
    assert one.predictions("val")[0].equals(other.predictions("val")[0])


def test_same_seed_same_bits(pack, tmp_path):
    runs = [train("cancernet-2020", pack, set=TINY, out=tmp_path / name) for name in "ab"]
    assert_same_run(*runs)
    other = train("cancernet-2020", pack, set=TINY, seed=1, out=tmp_path / "c")
    assert not torch.equal(weights(runs[0])["head.weight"], weights(other)["head.weight"])


@pytest.mark.parametrize("optimiser", ["adagrad", "adagrad-keras2", "adam", "adamw", "sgd", "rmsprop"])
def test_resumed_equals_never_interrupted(pack, tmp_path, optimiser):
    settings = (*TINY, f"train.optimiser={optimiser}", "train.lr=0.001", "train.sampling=oversample")
    whole = train("cancernet-2020", pack, set=settings, out=tmp_path / "whole")

    def stop(record):
        if record["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train("cancernet-2020", pack, set=settings, out=tmp_path / "cut", on_epoch=stop)
    assert Run.open(tmp_path / "cut").info["status"] == "interrupted"
    assert_same_run(whole, train(resume=tmp_path / "cut"))


def break_nth(monkeypatch, module, name, n, error):
    """Let the n-th call of a function fail."""
    real, calls = getattr(module, name), []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == n:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, failing)


@pytest.mark.parametrize("moment", range(1, 9))
def test_killed_between_writing_and_renaming(pack, tmp_path, monkeypatch, moment):
    whole = train("cancernet-2020", pack, set=TINY, out=tmp_path / "whole")
    with monkeypatch.context() as patch:
        break_nth(patch, checkpoints, "_write", moment, OSError("killed"))
        try:
            train("cancernet-2020", pack, set=TINY, out=tmp_path / "cut")
        except OSError:
            assert_same_run(whole, train(resume=tmp_path / "cut"))
        else:
            assert moment > 4  # the best epoch's weights are written only when there is a new best


def test_killed_in_the_middle_of_an_epoch(pack, tmp_path, monkeypatch):
    whole = train("cancernet-2020", pack, set=TINY, out=tmp_path / "whole")
    with monkeypatch.context() as patch:
        break_nth(patch, fitting, "set_learning_rate", 11, SystemExit(1))
        with pytest.raises(SystemExit):
            train("cancernet-2020", pack, set=TINY, out=tmp_path / "cut")
    (tmp_path / "cut" / ".run.json.0badcafe.partial").write_text("half")
    resumed = train(resume=tmp_path / "cut")
    assert_same_run(whole, resumed)
    assert not list(resumed.path.rglob("*.partial"))


def test_a_loss_that_is_not_finite_stops_the_run(pack, tmp_path):
    with pytest.raises(TrainingDiverged, match=r"epoch 1, step \d+; no epoch was finished"):
        train(
            "cancernet-2020", pack, set=(*TINY, "train.optimiser=sgd", "train.lr=1e30"), out=tmp_path / "run"
        )
    info = read_json(tmp_path / "run" / "run.json")
    assert info["status"] == "failed" and "step" in info["reason"]


def test_learns_what_can_be_learned(pack, tmp_path):
    run = train("cancernet-2020", pack, set=(*TINY, "train.epochs=15"), out=tmp_path / "run")
    assert max(record["val_auroc"] for record in run.log()) > 0.9
    assert run.info["chosen_epoch"] == max(run.log(), key=lambda r: (r["val_auroc"], -r["epoch"]))["epoch"]


def test_early_stopping_stops(pack, tmp_path):
    settings = (*TINY, "train.epochs=30", "train.early_stopping_patience=2", "train.lr=1e-9")
    run = train("cancernet-2020", pack, set=settings, out=tmp_path / "run")
    assert run.info["epochs_done"] == run.info["chosen_epoch"] + 2 < 30
    assert run.info["stopped_early"]


def test_as_published_takes_the_last_epoch_and_the_arg_max(pack, tmp_path):
    run = train("cancernet-2020", pack, split="as-published", set=TINY, out=tmp_path / "run")
    assert run.info["split"]["patients_overlap"] is True
    assert run.info["chosen_epoch"] == 4
    assert run.info["threshold"]["value"] == 0.5


def test_refusals(pack, tmp_path):
    run = train("cancernet-2020", pack, set=TINY, out=tmp_path / "run")
    with pytest.raises(RunError, match="is finished: there is nothing to resume"):
        train(resume=run.path)
    with pytest.raises(RunError, match="is not empty"):
        train("cancernet-2020", pack, set=TINY, out=tmp_path / "run")
    with pytest.raises(RunError, match="is not a run"):
        train(resume=pack.path)
    with pytest.raises(RunError, match="has its own recipe and data"):
        train("cancernet-2020", pack, resume=run.path)
    with pytest.raises(RunError, match="needs a recipe and data"):
        train("cancernet-2020")


def test_a_run_whose_pack_changed_is_refused(pack, tmp_path):
    run = train("cancernet-2020", pack, set=TINY, out=tmp_path / "run")
    document = json.loads((pack.path / "pack.json").read_text())
    document["content_sha256"] = "0" * 64
    (pack.path / "pack.json").write_text(json.dumps(document))
    with pytest.raises(RunError, match="was trained on another content"):
        run.open_pack()
    shutil.rmtree(pack.path)
    with pytest.raises(RunError, match="is not a pack"):
        run.open_pack()


def test_one_class_in_training_is_refused(make_pack, tmp_path):
    pack = make_pack(n_patients=6, patches_per_patient=6)
    one_class = pack.table["target"].to_numpy() == 0
    split = make_split(pack, protocol="patients")
    table = split.table.copy()
    table.loc[(table["side"] == "train") & ~one_class, "side"] = ""
    save_split(pack, type(split)(**{**vars(split), "name": "one-class", "table": table}))
    with pytest.raises(SplitError, match="nothing can be learned from one class"):
        train("cancernet-2020", pack, split="one-class", set=TINY, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_featurewise_statistics_come_from_training_patches(pack, tmp_path):
    run = train(
        "cancernet-2020", pack, set=(*TINY, "preprocessing.standardise=featurewise"), out=tmp_path / "run"
    )
    patches = pack.patches[run.sides(pack) == "train"].reshape(-1, 3) / 255
    found = run.classifier.info.preprocessing
    np.testing.assert_allclose(found.mean, patches.mean(axis=0), rtol=1e-9)
    np.testing.assert_allclose(found.std, patches.std(axis=0), rtol=1e-6)


def test_curves_are_drawn_where_asked(pack, tmp_path):
    train("cancernet-2020", pack, set=TINY, out=tmp_path / "run", plot=tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert [
        json.loads(line)["epoch"] for line in Path(tmp_path / "run/log.jsonl").read_text().splitlines()
    ] == [1, 2, 3, 4]
