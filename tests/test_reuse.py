"""A question that a finished run has answered is not trained again."""

import logging
import shutil
from pathlib import Path

import pytest

from biopsy.core.errors import RunError
from biopsy.training.runs import Run
from biopsy.training.train import train
from conftest import write_pack
from refusals import refuses

RECIPE = "cancernet-2020"
ONE = ("preprocessing.input_px=8", "train.epochs=1", "train.batch_size=8")


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    return write_pack(tmp_path_factory.mktemp("training"), n_patients=8, patches_per_patient=8)


def test_an_answered_question_is_not_trained_again(pack, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "0-empty").mkdir(parents=True)
    first = train(RECIPE, pack, overrides=ONE, device="cpu")
    epochs = []
    with caplog.at_level(logging.INFO):
        again = train(RECIPE, pack, overrides=ONE, device="cpu", on_epoch=epochs.append)
    assert again.path == first.path and epochs == []
    assert f"{first.path} of 2" in caplog.text
    assert train(RECIPE, pack, overrides=ONE, out=first.path, device="cpu").path == first.path
    assert len(list((tmp_path / "runs").glob("cancer*"))) == 1
    elsewhere = train(
        RECIPE, pack, overrides=ONE, out=tmp_path / "elsewhere", device="cpu", on_epoch=epochs.append
    )
    assert len(epochs) == 1 and elsewhere.info["config_sha256"] == first.info["config_sha256"]
    for options in ({"seed": 1}, {"split": "as-published"}, {"overrides": (*ONE, "train.lr=0.5")}):
        other = train(RECIPE, pack, **{"overrides": ONE, "device": "cpu", **options})
        assert other.path != first.path
        assert other.info["config_sha256"] != first.info["config_sha256"]
        with refuses(RunError, first.path, "another folder"):
            train(RECIPE, pack, **{"overrides": ONE, "device": "cpu", **options}, out=first.path)


def test_an_unfinished_answer_is_none(pack, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = train(RECIPE, pack, overrides=ONE, device="cpu")
    first.update(status="interrupted")
    assert train(RECIPE, pack, overrides=ONE, device="cpu").path != first.path
    with refuses(RunError, first.path, "--resume"):  # before data are read
        train(RECIPE, "none.pack", overrides=ONE, device="cpu", out=first.path)


def test_an_answer_finds_its_pack_where_it_lies_now(pack, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    moved = Path(shutil.copytree(pack.path, tmp_path / "old.pack"))
    first = train(RECIPE, moved, overrides=ONE, device="cpu")
    shutil.rmtree(moved)
    again = train(RECIPE, pack, overrides=ONE, device="cpu")
    assert again.path == first.path
    assert Run.open(first.path).open_pack().path.resolve() == pack.path.resolve()
