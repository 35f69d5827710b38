"""Studies: every fold and seed once, the same however often interrupted, seeds apart from patients."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from biopsy.core.claims import FOLDER
from biopsy.core.errors import DataError, RunError
from biopsy.core.files import machine_id, read_json, write_json
from biopsy.core.text import class_title
from biopsy.data.packs import Pack
from biopsy.data.splits import split as make_split
from biopsy.experiments.folds import study
from biopsy.experiments.reports import report
from biopsy.recipes import load_recipe
from biopsy.training.study import Study
from conftest import write_pack
from refusals import refuses
from report_facts import Page
from tiny_runs import TINY, interrupt_at

FAST = (*TINY, "train.epochs=1")
RECIPE = "cancernet-2020"
PATCHES = {"n_patients": 6, "patches_per_patient": 6}


def ask(data, out, *, seeds=(0,), recipes=(RECIPE,), overrides=FAST, **options):
    return study(recipes, data, seeds=seeds, overrides=overrides, out=out, device="cpu", **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Three folds, two seeds; with the epoch records it gave."""
    place = tmp_path_factory.mktemp("study")
    records = []
    made = ask(write_pack(place, **PATCHES), place / "study", folds=3, seeds=(0, 1), on_epoch=records.append)
    return made, records


@pytest.fixture
def pack(make_pack):
    return make_pack(**PATCHES)


def weights(made):
    return {
        run.path.name: (run.path / "classifier" / "weights.safetensors").read_bytes() for run in made.runs()
    }


def scores(frame):
    return roc_auc_score(frame["target"].to_numpy(int), frame["prob"])


def test_every_fold_and_seed_has_a_row(finished):
    made, records = finished
    table = made.table()
    for run, row in zip(made.runs(), table.itertuples(), strict=True):
        last = run.log()[-1]
        assert (row.last_train_accuracy, row.last_val_accuracy) == (last["accuracy"], last["val_accuracy"])
        assert row.accuracy_gap == last["accuracy"] - last["val_accuracy"]
    assert sorted(zip(table["fold"], table["seed"], strict=True)) == [
        (f, s) for f in range(3) for s in (0, 1)
    ]
    assert table["run"].tolist() == [f"cancernet-2020-f{f}-s{s}" for f in range(3) for s in (0, 1)]
    tested = table.groupby("fold")["tested"].first().str.split().sum()
    assert sorted(tested) == [str(8863 + 2 * index) for index in range(6)]
    assert made.info["status"] == "finished" and made.info["failed"] == {}
    asked = [(record["recipe"], record["fold"], record["seed"], record["epoch"]) for record in records]
    assert asked == [(RECIPE, fold, seed, 1) for seed in (0, 1) for fold in range(3)]
    assert [record["run"] for record in records] == [
        str(made.path / "runs" / f"cancernet-2020-f{fold}-s{seed}") for seed in (0, 1) for fold in range(3)
    ]


def test_every_patch_is_predicted_once_a_seed_by_a_run_that_never_saw_its_patient(finished):
    made, _ = finished
    pooled, pack = made.predictions(), made.runs()[0].open_pack()
    assert set(pooled["subset"]) == {"test"}
    for _, frame in pooled.groupby("seed"):
        assert sorted(frame["patch_id"]) == sorted(pack.table["patch_id"])
    for run in made.runs():
        seen = pack.table["patient_id"][np.isin(run.subsets(pack), ("train", "validation"))]
        tested = pooled[(pooled["fold"] == run.info["split"]["fold"]) & (pooled["seed"] == run.info["seed"])]
        assert len(tested) == 12 and not set(tested["patient_id"]) & set(seen)


def test_numbers_follow_from_the_pooled_predictions(finished):
    made, _ = finished
    pooled, table = made.predictions(), made.table()
    for row in table.itertuples():
        frame = pooled[(pooled["fold"] == row.fold) & (pooled["seed"] == row.seed)]
        assert row.auroc == pytest.approx(scores(frame), abs=1e-12)
        assert row.n_patches == len(frame) and row.n_positive == frame["target"].sum()
    entry = json.loads((made.path / "metrics.json").read_text())["recipes"][RECIPE]
    by_seed = [scores(frame) for _, frame in pooled.groupby("seed")]
    assert by_seed[0] != by_seed[1]
    assert entry["pooled"]["patch"]["auroc"]["value"] == pytest.approx(np.mean(by_seed), abs=1e-12)
    assert entry["pooled"]["n_seeds"] == 2 and entry["pooled"]["n_patches"] == 36
    assert sum(entry["pooled"]["confusion"].values()) == 72
    spread = {"mean": np.mean(by_seed), "sd": np.std(by_seed, ddof=1)}
    spread |= {"min": min(by_seed), "max": max(by_seed)}
    assert entry["over_seeds"]["auroc"] == pytest.approx(spread, abs=1e-12)
    by_fold = table.groupby("fold")["auroc"].mean()
    within = {"mean": by_fold.mean(), "min": by_fold.min(), "max": by_fold.max(), "n_folds": 3}
    assert entry["within_folds"]["auroc"] == pytest.approx(within, abs=1e-12)
    for found, (_, rows) in zip(entry["folds"], table.groupby("fold"), strict=True):
        gain = rows["auroc"] - rows["baseline_auroc"]
        assert found["auroc"] == pytest.approx({"mean": rows["auroc"].mean(), "sd": rows["auroc"].std()})
        assert (found["gain"]["mean"], found["gain"]["min"]) == pytest.approx((gain.mean(), gain.min()))


def test_the_report_is_one_self_contained_file(finished, tmp_path):
    made, _ = finished
    for hide_ids in (False, True):
        (path,) = report(made.path, out=tmp_path / "report.html", hide_ids=hide_ids)
        page = path.read_text()
        assert not re.search(r"(src|href)=\"(?!data:|#)", page) and "@import" not in page
        assert "3 folds, 2 seeds, 6 runs" in page
        text = re.sub(r"base64,[^\"]*", "", page)
        assert all((str(8863 + 2 * index) in text) is not hide_ids for index in range(6))


def test_a_finished_study_is_not_trained_or_evaluated_again(finished, tmp_path):
    made, _ = finished
    pack = made.runs()[0].open_pack()
    before, ledger = weights(made), (pack.path / "ledger.jsonl").read_text()
    assert len(ledger.splitlines()) == 6
    again = ask(pack, made.path, folds=3, seeds=(0, 1), on_epoch=lambda record: pytest.fail("trained again"))
    assert weights(again) == before and (pack.path / "ledger.jsonl").read_text() == ledger
    assert again.table().equals(made.table())


def test_interrupted_and_continued_equals_uninterrupted(finished, tmp_path):
    made, _ = finished
    pack = made.runs()[0].open_pack()
    with pytest.raises(KeyboardInterrupt):
        ask(pack, tmp_path / "cut", folds=3, on_epoch=interrupt_at(2))
    cut = Study.open(tmp_path / "cut")
    assert cut.info["status"] == "running" and repr(cut) == "<Study cut: running, 2 runs>"
    assert [run.info["status"] for run in cut.runs()] == ["finished", "interrupted"]
    assert len(cut.table()) == 1
    whole = ask(pack, tmp_path / "cut", folds=3)
    first_seed = made.predictions().query("seed == 0").reset_index(drop=True)
    pd.testing.assert_frame_equal(whole.predictions(), first_seed, check_exact=True)
    uninterrupted = made.table().query("seed == 0").drop(columns="seconds").reset_index(drop=True)
    pd.testing.assert_frame_equal(whole.table().drop(columns="seconds"), uninterrupted, check_exact=True)


def test_a_shard_begins_with_its_part_and_does_all_that_no_other_does(finished, tmp_path):
    made, _ = finished
    pack, begun = made.runs()[0].open_pack(), []
    with refuses(DataError, "'3/2'", "I/N"):
        ask(pack, tmp_path / "study", folds=3, shard="3/2")
    (tmp_path / "study" / f".biopsy-{machine_id()}-999999999-0123abcd.partial").mkdir(parents=True)
    whole = ask(pack, tmp_path / "study", folds=3, shard="3/3", on_epoch=lambda r: begun.append(r["fold"]))
    assert begun == [2, 0, 1]
    first_seed = made.predictions().query("seed == 0").reset_index(drop=True)
    pd.testing.assert_frame_equal(whole.predictions(), first_seed, check_exact=True)
    assert not (whole.path / FOLDER).exists()


@pytest.mark.slow
def test_two_processes_of_which_one_is_killed_leave_what_one_leaves(finished, tmp_path):
    pack, out = finished[0].info["pack"]["path"], tmp_path / "study"
    command = [sys.executable, "-c", "from biopsy.cli import main; main()", "study", RECIPE, "--folds", "3"]
    command += [word for setting in FAST for word in ("--set", setting)]
    command += ["--data", pack, "--seeds", "0,1", "--device", "cpu", "--out"]
    # a process of its own: sums differ in their last bits from this one's, which limits PyTorch to one thread
    subprocess.run([*command, str(tmp_path / "alone")], check=True, capture_output=True)
    made = Study.open(tmp_path / "alone")
    processes = [
        subprocess.Popen([*command, str(out), "--shard", f"{i}/2"], stderr=subprocess.PIPE, text=True)
        for i in (1, 2)
    ]
    while processes[0].poll() is None and not list(out.glob("runs/*-f[01]-s0/checkpoints")):
        time.sleep(0.01)
    assert processes[0].poll() is None  # killed with a run in work
    processes[0].send_signal(signal.SIGKILL)
    processes[0].communicate()
    _, errors = processes[1].communicate()
    assert processes[1].returncode == 0, errors
    shared = Study.open(out)
    assert shared.info["status"] == "finished" and weights(shared) == weights(made)
    pd.testing.assert_frame_equal(shared.predictions(), made.predictions(), check_exact=True)
    tables = [one.table().drop(columns="seconds") for one in (shared, made)]
    pd.testing.assert_frame_equal(*tables, check_exact=True)


@pytest.mark.slow
def test_seeds_and_recipes_may_be_added(pack, tmp_path):
    first = ask(pack, tmp_path / "study", split="patients")
    before = weights(first)
    ask(pack, tmp_path / "study", split="patients", seeds=(3,))
    both = ask(pack, tmp_path / "study", split="patients", recipes=("cancernet-2019",))
    assert list(zip(both.table()["recipe"], both.table()["seed"], strict=True)) == [
        ("cancernet-2019", 0),
        (RECIPE, 0),
        (RECIPE, 3),
    ]
    assert both.info["seeds"] == [0, 3] and set(both.info["recipes"]) == {"cancernet-2019", RECIPE}
    assert before.items() <= weights(both).items() and both.table()["fold"].isna().all()
    pages = report(both)
    assert [page.name for page in pages] == ["report-cancernet-2019.html", "report-cancernet-2020.html"]


def test_another_question_in_the_same_folder_is_refused(finished, make_pack, tmp_path):
    made, _ = finished
    pack = Pack.open(shutil.copytree(made.runs()[0].open_pack().path, tmp_path / "own.pack"))
    copied = shutil.copytree(made.path, tmp_path / "study")
    with refuses(RunError, "another split"):
        ask(pack, copied, split="patients")
    with refuses(RunError, "another recipe cancernet-2020"):
        ask(pack, copied, folds=3, overrides=(*FAST, "train.lr=0.01"))
    with refuses(RunError, "another pack"):
        ask(make_pack(n_patients=7), copied, folds=3)
    make_split(pack, protocol="folds", name="folds-3", folds=3, seed=1)
    with refuses(RunError, "another split"):
        ask(pack, copied, folds=3)
    assert json.loads((copied / "study.json").read_text()) == json.loads(
        (made.path / "study.json").read_text()
    )


def test_a_run_that_diverges_is_named_and_the_others_go_on(pack, tmp_path, caplog):
    recipes = [
        load_recipe(RECIPE, FAST),
        load_recipe("cancernet-2019", (*FAST, "train.optimiser=sgd", "train.lr=1e30")),
    ]
    made = ask(pack, tmp_path / "study", split="patients", recipes=recipes, overrides=())
    assert made.info["status"] == "finished"
    assert list(made.info["failed"]) == ["cancernet-2019-s0"]
    assert "the loss became" in made.info["failed"]["cancernet-2019-s0"] and "the loss became" in caplog.text
    assert made.table()["run"].tolist() == ["cancernet-2020-s0"]
    assert [run.info["status"] for run in made.runs()] == ["failed", "finished"]


def test_a_seed_that_misses_a_fold_is_not_pooled(finished, tmp_path):
    made, _ = finished
    copied = Study.open(shutil.copytree(made.path, tmp_path / "study"))
    shutil.rmtree(copied.path / "runs" / "cancernet-2020-f2-s1")
    from biopsy.evaluation.study_tables import write_tables

    write_tables(copied)
    pooled = json.loads((copied.path / "metrics.json").read_text())["recipes"][RECIPE]["pooled"]
    assert (pooled["n_seeds"], pooled["n_patches"]) == (1, 36)
    assert len(copied.table()) == 5 and len(copied.predictions()) == 36 + 24


def test_every_site_is_left_out_in_its_turn(make_pack, tmp_path, monkeypatch):
    sites = np.repeat(["north", "south", "west"], 12)
    pack = make_pack(**PATCHES, columns={"site_id": sites})
    asked = []
    monkeypatch.setattr(
        "biopsy.experiments.folds.run_all",
        lambda found, pack, questions, *_, **options: asked.extend(questions) or found,
    )
    ask(pack, tmp_path / "study", split="site", seeds=(0, 1))
    tested = [set(sites[one.split.subsets(pack, one.fold) == "test"]) for one in asked]
    assert tested == [{"north"}, {"south"}, {"west"}] * 2
    for one in asked:
        subsets = one.split.subsets(pack, one.fold)
        assert not set(sites[subsets == "train"]) & set(sites[np.isin(subsets, ("validation", "test"))])


def test_the_published_split_is_the_recipes_own(pack, tmp_path):
    made = ask(pack, tmp_path / "study", split="as-published", recipes=("cancernet-2019", RECIPE))
    assert made.info["split"]["patients_overlap"] is True and len(made.table()) == 2
    assert set(made.table()["threshold"]) == {0.5}
    other = load_recipe(
        RECIPE, [*FAST, "as_published.split={method='shuffled-paths', seed=1, train=0.8, validation=0.1}"]
    )
    with refuses(RunError, "different splits"):
        ask(pack, tmp_path / "two", split="as-published", recipes=("cancernet-2019", other), overrides=())


def test_three_classes_have_a_table_and_a_report(make_pack, tmp_path):
    pack = make_pack(n_patients=6, patches_per_patient=6, n_classes=3)
    made = ask(pack, tmp_path / "study", split="patients")
    row = made.table().iloc[0]
    metrics = made.runs()[0].metrics()
    assert row["auroc"] == metrics.patch["auroc"].value and np.isnan(row["threshold"])
    assert row["accuracy"] == metrics.patch["accuracy"].value
    pooled = read_json(made.path / "metrics.json")["recipes"][RECIPE]["pooled"]
    assert pooled["n_patches"] == metrics.n_patches and pooled["confusion_matrix"] == metrics.confusion_matrix
    assert pooled["patch"]["accuracy"]["value"] == row["accuracy"]
    text = Page(report(made)[0].read_text()).text
    assert f"{metrics.n_patches} patches of 1 patient" in text
    for name in (*map(class_title, pack.class_names), "macro average", "Cohen's kappa"):
        assert name in text


def test_refusals(pack, tmp_path, monkeypatch):
    with refuses(RunError, "one recipe", "one seed"):
        ask(pack, tmp_path / "study", seeds=())
    with refuses(RunError, "same name"):
        ask(pack, tmp_path / "study", recipes=(RECIPE, load_recipe(RECIPE, ["train.lr=0.5"])))
    make_split(pack, protocol="folds", name="mine", folds=3)
    with refuses(RunError, "'mine'", "3 folds", "4"):
        ask(pack, tmp_path / "study", split="mine", folds=4)
    with refuses(RunError, "'../other'"):
        ask(pack, None, split="mine", name="../other")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    with refuses(RunError, tmp_path / "full", "--name"):
        ask(pack, tmp_path / "full", split="mine")
    assert not (tmp_path / "study").exists()
    with refuses(RunError, "study.json", "biopsy study"):
        Study.open(tmp_path / "full")

    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("biopsy.data.splits.save_split", refuse)
    with refuses(RunError, "'folds-4'", "tiny.pack", "Permission denied"):
        ask(pack, tmp_path / "study", folds=4)


@pytest.mark.parametrize(("key", "value"), [("pack", None), ("status", "lost"), ("seeds", ["one"])])
def test_a_study_json_without_what_is_needed_is_refused(finished, tmp_path, key, value):
    document = read_json(finished[0].path / "study.json")
    write_json(tmp_path / "study.json", {**document, key: value})
    with refuses(RunError, f"study.json {key}"):
        Study.open(tmp_path)
    write_json(tmp_path / "study.json", {name: entry for name, entry in document.items() if name != key})
    if key != "seeds":
        with refuses(RunError, f"study.json {key}", "required"):
            Study.open(tmp_path)
