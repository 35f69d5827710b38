"""Runs: what a folder holds, what is refused, and that a run's own recipe trains the same again."""

import json
import re
import shlex
import shutil

import numpy as np
import pandas as pd
import pytest

from biopsy.core.errors import DataError, RunError
from biopsy.core.files import LOCK, write_json
from biopsy.models.classifier import Classifier
from biopsy.recipes import load_recipe
from biopsy.training.runs import Run, describe_environment, name_run, require_empty
from biopsy.training.train import train
from refusals import refuses
from tiny_runs import LIVELY, TINY

FILES = {
    "run.json",
    "recipe.toml",
    "split.csv",
    "log.jsonl",
    "checkpoints/last.safetensors",
    "classifier/classifier.json",
    "classifier/weights.safetensors",
    "predictions/validation.parquet",
}


@pytest.fixture
def copied(trained_run, tmp_path):
    return Run.open(shutil.copytree(trained_run.path, tmp_path / "copy"))


def change(run, **fields):
    path = run.path / "run.json"
    write_json(path, json.loads(path.read_text()) | fields)


def test_a_finished_run_has_the_files_of_the_formats_page(trained_run):
    files = [path for path in trained_run.path.rglob("*") if path.is_file() and path.name != LOCK]
    best = f"checkpoints/best-{trained_run.info['chosen_epoch']:04d}.safetensors"
    assert {str(path.relative_to(trained_run.path)) for path in files} == FILES | {best}


def test_run_json_records_request_and_outcome(trained_run):
    info, pack = trained_run.info, trained_run.open_pack()
    assert info["format"] == "biopsy-run/1" and info["status"] == "finished"
    assert re.fullmatch(r"idc-small-s0-\d{8}T\d{6}-[0-9a-f]{4}", info["id"])
    assert info["epochs"] == info["epochs_done"] == 4
    aurocs = [record["val_auroc"] for record in trained_run.log()]
    assert info["chosen_epoch"] == 1 + aurocs.index(max(aurocs))
    assert info["pack"]["content_sha256"] == pack.info.content_sha256
    assert info["classifier_sha256"] == trained_run.classifier.sha256
    subsets = trained_run.subsets(pack)
    for subset in ("train", "validation", "test"):
        target = pack.target[subsets == subset]
        counts = {"patches": 40, "groups": 5, "per_class": {"non_idc": 20, "idc": 20}}
        assert info["split"]["subsets"][subset] == counts
        assert np.bincount(target).tolist() == [20, 20]
    assert info["split"]["subsets"]["left out"]["patches"] == 0
    assert info["split"]["name"] == "official" and info["split"]["patients_overlap"] is False
    assert {"python", "torch", "numpy", "cpu", "threads"} <= info["environment"].keys()


def test_the_log_has_a_record_an_epoch(trained_run):
    log = trained_run.log()
    assert [record["epoch"] for record in log] == [1, 2, 3, 4]
    assert [record["step"] for record in log] == [5, 10, 15, 20]  # 40 patches in batches of 8
    for record in log:
        assert {"loss", "accuracy", "val_loss", "val_accuracy", "val_auroc", "lr", "best"} <= record.keys()
        assert record["images_per_s"] > 0 and record["seconds"] > 0 and record["time_left_s"] >= 0
    assert log[-1]["time_left_s"] == 0
    cosine = 0.5 * (1 + np.cos(np.pi * (9 - 5) / (20 - 5)))  # the tenth update, five of warm-up before
    assert log[1]["lr"] == pytest.approx(0.02 * cosine)


def test_its_own_recipe_trains_the_same_again(trained_run, tmp_path):
    words = shlex.split(trained_run.info["command"])
    assert words[:2] == ["biopsy", "train"] and words[2] == "run/recipe.toml"
    assert words[3:] == ["--data", "tiny.pack", "--split", "official", "--seed", "0"]
    assert trained_run.recipe == load_recipe("idc-small", (*TINY, *LIVELY))
    again = train(trained_run.path / "recipe.toml", trained_run.open_pack(), out=tmp_path / "again")
    assert again.info["id"] != trained_run.info["id"]
    for name in ("weights.safetensors", "classifier.json"):
        same = [(run.path / "classifier" / name).read_bytes() for run in (trained_run, again)]
        assert same[0] == same[1]


def test_subsets_are_kept_as_they_were_trained(copied):
    pack = copied.open_pack()
    path = copied.path / "split.csv"
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    assert table["subset"].tolist() == copied.subsets(pack).tolist() == pack.table["official_subset"].tolist()
    moved = table.assign(subset=table["subset"].replace({"train": "test"}))
    for changed in (table.iloc[::-1], table.iloc[1:], moved, table.rename(columns={"subset": "x"})):
        changed.to_csv(path, index=False)
        with refuses(RunError, "split.csv", "changed"):
            copied.subsets(pack)
    changed = table.iloc[::-1]
    changed.to_csv(path, index=False)
    copied.update(files={})  # as the first versions wrote it
    with refuses(RunError, "split.csv", "patches"):
        copied.subsets(pack)


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("run.json", lambda path: Run.open(path)),
        ("recipe.toml", lambda path: Run.open(path).recipe),
        ("log.jsonl", lambda path: Run.open(path).log()),
        ("classifier/classifier.json", lambda path: Run.open(path).classifier),
        ("classifier/weights.safetensors", lambda path: Run.open(path).classifier),
    ],
)
def test_a_run_is_refused_once_its_inputs_changed(copied, name, use):
    use(copied.path)
    path = copied.path / name
    content = bytearray(path.read_bytes())
    digit = next(place for place in range(len(content) // 3, len(content)) if content[place] in b"1234567")
    content[digit] += 1
    path.write_bytes(content)
    with pytest.raises((RunError, DataError)) as caught:
        use(copied.path)
    assert "\n" not in str(caught.value)


def test_the_classifier_of_another_run_is_refused(copied):
    threshold = copied.classifier.info.thresholds[0] | {"value": 0.0001}
    classifier = Classifier.load(copied.path / "classifier")
    classifier.info.thresholds = [threshold]
    classifier.save(copied.path / "classifier")
    with pytest.raises(RunError):
        _ = copied.classifier
    copied.update(files={})  # as the first versions wrote it
    with refuses(RunError, "threshold"):
        _ = copied.classifier


@pytest.mark.parametrize(
    "fields",
    [
        {"status": "done"},
        {"seed": "x"},
        {"split": {}},
        {"pack": {"path": "p"}},
        {"threshold": [1]},
        {"epochs": -1},
        {"chosen_epoch": None},
        {"files": {"split.csv": 3}},
    ],
)
def test_a_document_that_lacks_what_is_needed_is_refused(copied, fields):
    change(copied, **fields)
    with pytest.raises(RunError) as caught:
        Run.open(copied.path)
    assert "\n" not in str(caught.value)


def test_a_pack_that_moved_with_its_run_is_found(trained_run, tmp_path):
    pack = trained_run.open_pack()
    for place in ("beside/run", "above/runs/run"):
        run = Run.open(shutil.copytree(trained_run.path, tmp_path / place))
        moved = shutil.copytree(pack.path, tmp_path / place.partition("/")[0] / pack.path.name)
        assert run.open_pack().path == pack.path
        run.update(pack={**run.info["pack"], "path": str(tmp_path / "gone.pack")})
        assert run.open_pack().path == moved
        write_json(
            moved / "pack.json", json.loads((moved / "pack.json").read_text()) | {"content_sha256": "0"}
        )
        with pytest.raises(RunError):
            run.open_pack()


def test_folders_that_are_not_runs_or_of_another_format_are_refused(copied, tmp_path):
    with refuses(RunError, "run.json", "biopsy train"):
        Run.open(tmp_path)
    assert Run.open(copied) is copied and repr(copied) == "<Run copy: finished>"
    change(copied, format="biopsy-run/2")
    with refuses(RunError, "'biopsy-run/1'", reason="format"):
        Run.open(copied.path)
    (copied.path / "run.json").write_text("{")
    with refuses(RunError, "run.json", "JSON"):
        Run.open(copied.path)


def test_an_unfinished_run_has_no_classifier(copied):
    change(copied, status="interrupted", epochs_done=1)
    with refuses(RunError, "interrupted", "1 of 4 epochs", f"biopsy train --resume {copied.path}"):
        _ = Run.open(copied.path).classifier


def test_missing_results_are_named(copied):
    shutil.rmtree(copied.path / "predictions")
    with refuses(RunError, "test.parquet", "biopsy evaluate"):
        copied.predictions("test")
    shutil.rmtree(copied.path / "evaluation", ignore_errors=True)
    with refuses(RunError, "biopsy evaluate"):
        copied.metrics()


def test_a_new_run_does_not_overwrite_anything(copied, tmp_path):
    table = pd.DataFrame({"patch_id": ["a"], "subset": ["train"]})
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("precious")
    for path in (copied.path, tmp_path / "thesis"):
        with refuses(RunError, path, "another folder") as error:
            Run.create(path, {"status": "running"}, copied.recipe, table)
        assert "--resume" not in str(error.value)  # which a finished run refuses
    change(copied, status="interrupted")
    with refuses(RunError, copied.path, f"biopsy train --resume {copied.path}"):
        require_empty(copied.path)
    assert (tmp_path / "thesis" / "thesis.txt").read_text() == "precious"
    with refuses(RunError, "thesis.txt"):
        require_empty(tmp_path / "thesis" / "thesis.txt")
    (tmp_path / "empty").mkdir()
    assert Run.create(tmp_path / "empty", {"status": "running"}, copied.recipe, table).log() == []


def test_no_two_runs_are_called_the_same():
    names = {name_run("mine", 3) for _ in range(20)}
    assert len(names) > 15 and all(name.startswith("mine-s3-") for name in names)


def test_the_environment_is_named():
    found = describe_environment()
    assert found["numpy"] == np.__version__ and found["threads"] >= 1 and found["cpu"]
