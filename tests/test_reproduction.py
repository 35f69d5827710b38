"""Reproductions: equal patches and updates in all conditions, paired leakage, and one table."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from biopsy.core.errors import MetricError, RecipeError, RunError, SplitError
from biopsy.core.files import read_json
from biopsy.core.results import to_text
from biopsy.data.protocols import LEAK_PROTOCOLS
from biopsy.data.splits import split as make_split
from biopsy.experiments import reproduction
from biopsy.experiments.reports import report
from biopsy.experiments.reproduction import Reproduction, Speed, choose_papers, reproduce
from biopsy.experiments.reproduction_page import draw_reproduction, table_of_lengths, table_of_papers
from biopsy.experiments.reproduction_summary import COMPARED, ReproductionSummary, tabulate
from biopsy.recipes import load_recipe
from biopsy.training.study import Study
from conftest import write_pack
from refusals import refuses
from report_facts import Page
from tiny_runs import interrupt_at

pytestmark = pytest.mark.slow

PAPER = """
format = "biopsy-recipe/1"
name = "tiny-paper"
title = "A tiny paper"

[origin]
dataset = "synthetic"
updates = 100
claim = { accuracy = 0.8 }
corrected = { balanced_accuracy = 0.75 }

[preprocessing]
input_px = 8

[model]
name = "dabydeen_hedges"
params = { widths = [4], dense = 4 }

[train]
epochs = 2
batch_size = 8
early_stopping_patience = 1

[as_published]
split = { method = "shuffled-paths", seed = 42, train = 0.8, validation = 0.1 }
"""
TESTED = ("8863", "8865")


@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    path = tmp_path_factory.mktemp("papers") / "tiny-paper.toml"
    path.write_text(PAPER)
    return path


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    return write_pack(tmp_path_factory.mktemp("packs"), n_patients=5, patches_per_patient=12)


@pytest.fixture(scope="module")
def finished(paper, pack, tmp_path_factory):
    """Both conditions, and the leak of two patients with two seeds; with the epoch records it gave."""
    records = []
    out = tmp_path_factory.mktemp("reproduction") / "study"
    made = ask(paper, pack, out, leak_seeds=(0, 1), on_epoch=records.append)
    return made, records


def ask(paper, pack, out, *, seeds=(0,), test_patients=TESTED, leak_seeds=(), **options):
    return reproduce(
        pack,
        [paper],
        seeds=seeds,
        test_patients=test_patients,
        leak_seeds=leak_seeds,
        out=out,
        device="cpu",
        **options,
    )


def changed(paper, tmp_path, name, *replacements):
    text = paper.read_text()
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    path = tmp_path / f"{name}.toml"
    path.write_text(text)
    return path


# --- what is run


def test_every_condition_is_there_and_all_make_the_same_updates(finished):
    made, records = finished
    names = [f"tiny-paper-{condition}-s0" for condition in ("published", "apart0", "apart1")]
    names += [
        f"tiny-paper-{condition}{p}-s{s}" for s in (0, 1) for p in (0, 1) for condition in LEAK_PROTOCOLS
    ]
    assert sorted(made.info["runs"]) == sorted(names) == sorted(run.path.name for run in made.runs())
    # 60 patches, 48 of them trained on as published less 4 that validate; 36 with patients apart: 5 batches
    plan = made.info["papers"]["tiny-paper"]["plan"]
    assert (plan["epochs"], plan["steps_per_epoch"], plan["updates"]) == (2, 5, 10)
    assert {run.log()[-1]["step"] for run in made.runs()} == {10}
    assert {record["condition"] for record in records} == {"published", "apart", *LEAK_PROTOCOLS}
    assert made.info["status"] == "finished" and made.info["test_patients"] == list(TESTED)


def test_both_conditions_train_on_as_many_patches(finished, pack):
    made, _ = finished
    counts = {run.path.name: int((run.subsets(pack) == "train").sum()) for run in made.runs()}
    assert {counts[name] for name in counts if "-leak" not in name} == {36}
    assert len({counts[name] for name in counts if "-leak" in name}) == 1
    leaking = ("published", "leak-with", "leak-blocked-with")
    for run in made.runs():
        subsets, condition = run.subsets(pack), made.info["runs"][run.path.name]["condition"]
        tested, learned = (set(pack.group_ids[subsets == subset]) for subset in ("test", "train"))
        assert bool(tested & learned) == (condition in leaking), run.path.name
        assert run.info["split"]["as_published"] is (condition == "published")


def test_each_condition_follows_its_own_rules(finished):
    made, _ = finished
    for run in made.runs():
        rule = run.info["threshold"]["rule"]
        assert rule == ("argmax" if "published" in run.path.name else "youden")
        assert run.recipe.train.early_stopping_patience == 0 and run.info["stopped_early"] is False
        if "published" in run.path.name:
            assert run.info["chosen_epoch"] == 2


def test_conditions_of_the_leak_test_the_same_patches_and_differ_by_one_patient(finished, pack):
    made, _ = finished
    runs = {run.path.name: run for run in made.runs()}
    for place, tested in enumerate(TESTED):
        for seed in (0, 1):
            pair = [
                runs[f"tiny-paper-leak-{condition}{place}-s{seed}"]
                for condition in ("apart", "with", "placebo")
            ]
            frames = [run.predictions("test")[0]["patch_id"].tolist() for run in pair]
            assert frames[0] == frames[1] == frames[2] and len(frames[0]) == 6
            assert set(pack.group_ids[pair[1].subsets(pack) == "validation"]) == {TESTED[1 - place]}
            assert set(pack.group_ids[pair[1].subsets(pack) == "test"]) == {tested}


# --- what it adds up to


def test_numbers_follow_from_the_predictions(finished):
    made, _ = finished
    entry = read_json(made.path / "metrics.json")["papers"]["tiny-paper"]
    scores = {}
    for run in made.runs():
        frame = run.predictions("test")[0]
        scores[run.path.name] = roc_auc_score(frame["target"].to_numpy(int), frame["prob"])
    assert entry["published"]["auroc"]["mean"] == pytest.approx(scores["tiny-paper-published-s0"])
    folds = [scores[f"tiny-paper-apart{place}-s0"] for place in (0, 1)]
    assert entry["apart"]["auroc"]["mean"] == pytest.approx(np.mean(folds))
    assert [fold["auroc"]["mean"] for fold in entry["apart"]["folds"]] == pytest.approx(folds)
    assert [fold["tested"] for fold in entry["apart"]["folds"]] == list(TESTED)
    assert entry["apart"]["interval"] is None
    gaps = np.array(
        [
            [
                scores[f"tiny-paper-leak-with{p}-s{s}"] - scores[f"tiny-paper-leak-placebo{p}-s{s}"]
                for s in (0, 1)
            ]
            for p in (0, 1)
        ]
    )
    for slide, values in zip(entry["leak"]["slides"], gaps, strict=True):
        assert slide["auroc"]["values"] == pytest.approx(values)
        assert (slide["auroc"]["min"], slide["auroc"]["max"]) == pytest.approx((values.min(), values.max()))
    over_seeds = gaps.mean(axis=0)
    assert entry["leak"]["auroc"]["mean"] == pytest.approx(over_seeds.mean())
    assert entry["leak"]["auroc"]["sd"] == pytest.approx(over_seeds.std(ddof=1))
    assert entry["label"] == "" and entry["updates"] == 10 and entry["n_runs"] == 23


def test_the_table_has_a_row_a_metric(finished):
    made, _ = finished
    table = made.table()
    assert table["metric"].tolist() == list(COMPARED) and set(table["recipe"]) == {"tiny-paper"}
    accuracy = table.iloc[0]
    assert (accuracy["published"], accuracy["updates"], accuracy["published_updates"]) == (0.8, 10, 100)
    assert table.iloc[1]["corrected"] == 0.75 and np.isnan(table.iloc[1]["published"])
    assert table["colour_alone"].notna().tolist() == [False, False, True]
    runs = pd.read_csv(made.path / "runs.csv", keep_default_na=False)
    assert len(runs) == 23 and set(runs["condition"]) == {"published", "apart", *LEAK_PROTOCOLS}
    papers = made.summary(ReproductionSummary).papers
    assert len(tabulate(made.summary(ReproductionSummary))) == 3
    rows = table_of_papers(papers).rows
    assert [row[:3] for row in rows] == [
        ["tiny-paper", "accuracy", "0.800"],
        ["tiny-paper", "balanced accuracy", "-"],
        ["tiny-paper", "AUROC", "-"],
    ]
    assert "10 of 100" in table_of_lengths(papers, made.info["papers"]).rows[0]
    assert (made.path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_its_report_is_one_page_that_can_hide_ids(finished, tmp_path):
    made, _ = finished
    entry = read_json(made.path / "metrics.json")["papers"]["tiny-paper"]
    for hide_ids in (False, True):
        (path,) = report(made, out=tmp_path / "report.html", hide_ids=hide_ids)
        text = path.read_text()
        page = Page(text).text
        assert f"{entry['published']['accuracy']['mean']:.3f}" in page and text.count('role="img"') == 1
        assert not re.search(r"(src|href)=\"(?!data:|#)", text)
        assert all((tested in text) is not hide_ids for tested in TESTED)


# --- going on


@pytest.mark.slow
def test_asking_again_trains_nothing_and_seeds_and_recipes_may_be_added(finished, paper, pack, tmp_path):
    place = tmp_path / "study"
    first = ask(paper, pack, place, budget=None)
    kept = {run.path.name: (run.path / "run.json").read_text() for run in first.runs()}
    assert (
        len(kept) == 3
        and read_json(first.path / "metrics.json")["papers"]["tiny-paper"]["leak"]["reason"]
        == "not asked for"
    )
    ask(paper, pack, place, on_epoch=lambda record: pytest.fail("trained again"))
    other = changed(paper, tmp_path, "other", ('"tiny-paper"', '"other"'), ("updates = 100", "updates = 101"))
    ask(other, pack, place)
    more = ask(paper, pack, place, seeds=(1,))
    assert kept.items() <= {r.path.name: (r.path / "run.json").read_text() for r in more.runs()}.items()
    papers = read_json(more.path / "metrics.json")["papers"]
    assert list(papers) == ["tiny-paper", "other"] and papers["tiny-paper"]["published"]["seeds"] == [0, 1]
    assert (papers["tiny-paper"]["label"], papers["other"]["label"]) == ("", "smoke")
    assert papers["tiny-paper"]["published"]["auroc"]["sd"] is not None and more.info["seeds"] == [0, 1]
    with refuses(RunError, "another test patients"):
        ask(paper, pack, place, test_patients=("8863", "8867"))
    with refuses(RunError, "another recipe tiny-paper"):
        ask(paper, pack, place, overrides=("train.lr=0.5",))


def test_an_interrupted_reproduction_goes_on(finished, paper, pack, tmp_path):
    made, _ = finished
    with pytest.raises(KeyboardInterrupt):
        ask(paper, pack, tmp_path / "study", on_epoch=interrupt_at(3))
    assert len(Study.open(tmp_path / "study").evaluated_runs()) == 1
    whole = read_json(ask(paper, pack, tmp_path / "study").path / "metrics.json")["papers"]["tiny-paper"]
    uninterrupted = read_json(made.path / "metrics.json")["papers"]["tiny-paper"]
    assert whole["apart"] == uninterrupted["apart"] and whole["published"] == uninterrupted["published"]


def test_a_budget_that_is_too_short_is_reported(paper, pack, tmp_path, monkeypatch, caplog):
    speed = Speed(update_s=1.0, patch_s=0.0, fixed_s=30.0)
    monkeypatch.setattr(reproduction, "measure_speed", lambda *args, **options: speed)
    monkeypatch.setattr(reproduction, "run_all", lambda study, *args, **options: study)
    made = ask(paper, pack, tmp_path / "study", budget=1)
    assert made.info["papers"]["tiny-paper"]["plan"]["updates"] == 1
    assert "the budget of 1 minutes is too short: runs of minimum length take about 2" in caplog.text


@pytest.mark.slow
def test_a_budget_is_shared_out_once_and_kept(finished, paper, pack, tmp_path, monkeypatch):
    speed = Speed(update_s=1.0, patch_s=0.0, fixed_s=0.0)
    monkeypatch.setattr(reproduction, "measure_speed", lambda *args, **options: speed)
    made = ask(paper, pack, tmp_path / "study", budget=0.2)  # 12 s for three runs of 10 updates, one a second
    plan = made.info["papers"]["tiny-paper"]["plan"]
    assert plan["updates"] < plan["full_updates"] == 10 and plan["measured"]["update_s"] == 1.0
    assert {run.log()[-1]["step"] for run in made.runs()} == {plan["updates"]}
    assert read_json(made.path / "metrics.json")["papers"]["tiny-paper"]["label"] == (
        "smoke" if plan["updates"] < 10 else ""
    )
    monkeypatch.setattr(reproduction, "measure_speed", lambda *args, **options: pytest.fail("measured again"))
    again = ask(paper, pack, tmp_path / "study", budget=60, seeds=(0, 1))
    assert again.info["papers"]["tiny-paper"]["plan"] == plan


# --- other data


def test_without_patients_the_gap_is_not_measurable(make_pack, paper, tmp_path):
    nobody = {"patient_id": None, "slide_id": None}
    pack = make_pack(n_patients=4, patches_per_patient=12, columns=nobody)
    made = ask(paper, pack, tmp_path / "study", test_patients=(), leak_seeds=(0,))
    entry = read_json(made.path / "metrics.json")["papers"]["tiny-paper"]
    said = "not measurable: tiny.pack has neither patient nor slide ids"
    assert entry["leak"]["reason"] == entry["apart"]["reason"] == said
    assert entry["published"]["auroc"]["mean"] is not None
    (path,) = report(made)
    assert said in Page(path.read_text()).text


def test_own_subsets_are_one_condition_and_five_patients_give_an_interval(make_pack, paper, tmp_path):
    pack = make_pack(n_patients=15, patches_per_patient=8, official_subsets=("train", "validation", "test"))
    made = ask(paper, pack, tmp_path / "study", test_patients=(), seeds=(0, 1))
    entry = read_json(made.path / "metrics.json")["papers"]["tiny-paper"]["apart"]
    assert len(entry["folds"]) == 1 and entry["seeds"] == [0, 1]
    interval = entry["interval"]["auroc"]
    assert interval["value"] == pytest.approx(entry["auroc"]["mean"])
    assert interval["low"] is None or interval["low"] < interval["value"] < interval["high"]


# --- refusals


def test_refusals(finished, pack, paper, tmp_path, make_pack):
    with refuses(RecipeError, "idc-small", "cancernet"):
        ask("idc-small", pack, tmp_path / "study")
    with refuses(RecipeError, "cancernet-2019", "'idc'"):
        ask("cancernet-2019", pack, tmp_path / "study")
    with refuses(RecipeError, "'synthetic'"):
        reproduce(pack, [], out=tmp_path / "study")
    with refuses(RecipeError, "same name"):
        reproduce(pack, [paper, paper], out=tmp_path / "study")
    with refuses(RunError, "seed"):
        ask(paper, pack, tmp_path / "study", seeds=())
    with refuses(RunError, "budget=0"):
        ask(paper, pack, tmp_path / "study", budget=0)
    with refuses(SplitError, "'8864'"):
        ask(paper, pack, tmp_path / "study", test_patients=("8864", "8863"), leak_seeds=(0,))
    with refuses(RecipeError, "'train.rl'", "'train.lr'"):
        ask(paper, pack, tmp_path / "study", overrides=("train.rl=1",))
    with refuses(RunError, "3 classes"):
        ask(paper, make_pack(n_patients=3, n_classes=3), tmp_path / "study")
    leaking = make_pack("leaking.pack", n_patients=6)
    shuffled = load_recipe(paper).as_published.split
    make_split(leaking, protocol="as-published", name="leaks", recipe=shuffled)
    with refuses(RunError, "leaks", "patients"):
        ask(paper, leaking, tmp_path / "study", split="leaks")
    assert not (tmp_path / "study").exists()


def test_papers_are_found_by_data_set(make_pack):
    class Known:
        def __init__(self, dataset):
            self.path, self.info = type("P", (), {"name": "x.pack"})(), type("I", (), {"dataset": dataset})()

    idc = {recipe.name for recipe in choose_papers((), Known("idc"))}
    assert {"cancernet-2019", "cancernet-2020"} <= idc
    pcam, hcd = ({recipe.name for recipe in choose_papers((), Known(name))} for name in ("pcam", "hcd"))
    assert pcam == hcd and not pcam & idc


# --- figure and command line


def test_the_figure_shows_both_conditions_and_every_seed_of_the_leak(finished):
    papers = finished[0].summary(ReproductionSummary).papers
    figure = draw_reproduction(papers)
    assert len(figure.axes) == 4
    assert [axes.get_yticklabels()[0].get_text() for axes in figure.axes[:3]] == ["tiny-paper"] * 3
    accuracy = {line.get_label(): line.get_xdata()[0] for line in figure.axes[0].lines}
    assert accuracy["published"] == 0.8
    assert accuracy["patients apart"] == pytest.approx(papers["tiny-paper"].apart.accuracy.mean)
    dots = [line for line in figure.axes[3].lines if line.get_marker() == "o"]
    drawn = [
        line.get_xdata().tolist() if hasattr(line.get_xdata(), "tolist") else line.get_xdata()
        for line in dots
    ]
    assert drawn == [slide.auroc.values for slide in papers["tiny-paper"].leak.slides]
    with refuses(MetricError, reason="empty"):
        draw_reproduction({})


def test_reproduce_from_the_command_line(finished, paper, pack, tmp_path, monkeypatch):

    from command_line import call

    monkeypatch.chdir(tmp_path)
    base = ["reproduce", str(paper), "--data", str(pack.path), "--seeds", "0", "--leak-seeds", ""]
    base += ["--test-patients", ",".join(TESTED), "--out", str(finished[0].path), "--device", "cpu"]
    done = call(*base)
    assert done.exit_code == 0, done.stderr
    assert done.stdout == f"{to_text(Reproduction.open(finished[0].path).blocks())}\n"
    assert "10 of 100" in done.stdout and finished[0].path.name in done.stdout
    asked = call(*base, "--json")
    summary = json.loads(asked.stdout)
    assert summary["papers"]["tiny-paper"]["n_runs"] == 23 and summary["path"] == str(finished[0].path)
    assert call("reproduce", str(paper)).exit_code == 2
    wrong = call(*base, "--seeds", "one")
    assert wrong.exit_code == 2
    refused = call("reproduce", "idc-small", "--data", str(pack.path))
    assert refused.exit_code == 1 and refused.stderr.count("\n") == 1
    assert "no published results" in refused.stderr
