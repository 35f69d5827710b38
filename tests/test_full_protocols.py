"""The full protocols run on phantom data in the layout of the originals, from `prepare` to the report."""

import re

import numpy as np
import pandas as pd
import pytest

import full_protocols
from biopsy.recipes import load_recipe
from biopsy.training.runs import Run
from command_line import call
from conftest import PROJECT
from full_protocols import ORIGINAL, RECIPES, WRITERS, count_costs, list_commands

PAGE = PROJECT / "docs" / "how-to" / "run-a-full-protocol.md"
FAST = {
    "idc": ("preprocessing.input_px=16", "train.batch_size=8", "model.params.base_channels=4"),
    "pcam": ("model.pretrained=false", "preprocessing.input_px=32", "train.batch_size=8"),
    "hcd": ("model.pretrained=false", "preprocessing.input_px=32", "train.steps_per_epoch=2"),
}


@pytest.fixture
def run_protocol(tmp_path):
    """Write phantom data and run every command of a protocol on it."""

    def run(protocol, n_slides=12):
        WRITERS[protocol](tmp_path / "data", n_slides, 20)
        for command in list_commands(protocol, tmp_path, ("train.epochs=1", *FAST[protocol])):
            called = call(*command)
            assert called.exit_code == 0, (command, called.stderr)
        assert (tmp_path / "report.html").stat().st_size > 100_000
        return Run.open(tmp_path / "run"), tmp_path

    return run


@pytest.mark.slow
def test_the_official_split_of_idc(run_protocol):
    run, folder = run_protocol("idc", n_slides=20)
    pack = run.open_pack()
    assert len(pack) == 400 and len(pack.table["patient_id"].unique()) == 20  # both copies are one
    assert pack.info.is_synthetic
    subset = dict(zip(pack.table["patient_id"], run.subsets(pack), strict=True))
    for name, file in (("train", "train"), ("validation", "val"), ("test", "test")):
        listed = (folder / "data" / f"cases_{file}.txt").read_text().split()
        assert {patient for patient, value in subset.items() if value == name} == set(listed) != set()
    assert sum(value == "" for value in subset.values()) == 8  # in no list
    assert run.metrics().unit == "patient"


@pytest.mark.slow
def test_the_published_split_of_pcam(run_protocol):
    run, _ = run_protocol("pcam")
    pack = run.open_pack()
    assert pack.unit == "slide" and (pack.info.patch_px, pack.info.mpp) == (96, 0.972)
    subsets = run.subsets(pack)
    prefix = pack.table["slide_id"].str.partition("_")[0]
    assert (prefix.replace("valid", "validation") == subsets).all()
    assert run.metrics().n_patches == (subsets == "test").sum()


@pytest.mark.slow
def test_the_split_of_hcd_and_the_submission(run_protocol):
    run, folder = run_protocol("hcd")
    pack = run.open_pack()
    assert run.info["split"]["as_published"]
    rows, subsets = pack.table["row"].to_numpy(int), run.subsets(pack)
    assert rows[subsets == "train"].max() < rows[subsets == "validation"].min()
    assert rows[subsets == "validation"].max() < rows[subsets == "test"].min()
    assert (subsets == "").sum() == 2  # one at each border
    submission = pd.read_csv(folder / "submission.csv")
    sample = pd.read_csv(folder / "data" / "histopathologic-cancer-detection" / "sample_submission.csv")
    assert list(submission.columns) == ["id", "label"]
    assert set(submission["id"]) == set(sample["id"]) and submission["label"].between(0, 1).all()


def test_operations_and_memory_are_counted():
    recipe = load_recipe("idc-small", {"preprocessing.input_px": 16, "train.precision": "fp32"})
    costs = count_costs(recipe)
    twice = count_costs(load_recipe(recipe, {"train.batch_size": 2 * recipe.train.batch_size}))
    assert twice.train_flops == pytest.approx(costs.train_flops)
    assert (
        2.5 < costs.train_flops / costs.forward_flops < 3.1
    )  # the first layer needs no gradient of its input
    assert 1.5 < twice.gpu_bytes / costs.gpu_bytes < 2


def test_frozen_stages_cost_no_backward_pass():
    settings = {"model.pretrained": False, "preprocessing.input_px": 32, "train.batch_size": 4}
    frozen = count_costs(load_recipe("vgg16-pcam", settings))
    whole = count_costs(load_recipe("vgg16-pcam", settings | {"model.trainable": "all"}))
    assert frozen.train_flops < 0.6 * whole.train_flops and frozen.forward_flops == whole.forward_flops
    assert frozen.gpu_bytes < whole.gpu_bytes


def test_the_page_shows_these_commands(tmp_path):
    text = PAGE.read_text(encoding="utf-8").replace("\\\n", " ")
    shown = {" ".join(line.split()) for line in re.findall(r"^\$ biopsy (.*)$", text, re.MULTILINE)}
    for protocol in RECIPES:
        for command in list_commands(protocol, tmp_path):
            words = " ".join(command).replace(f"{tmp_path}/", "")
            assert words in shown, (protocol, words)
    assert np.all(np.array(list(ORIGINAL.values())) > 0) and full_protocols.ASSUMED_FLOPS == 5e12
