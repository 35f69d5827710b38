"""Sweeps: every combination once, chosen on validation alone, nothing trained where one cannot be."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from biopsy.core.errors import MetricError, MissingExtra, RecipeError, RunError
from biopsy.core.files import read_json
from biopsy.evaluation.study_tables import SHOWN
from biopsy.experiments import run_specs, sweeps
from biopsy.experiments.reports import report
from biopsy.experiments.sweep_page import draw_sweep
from biopsy.experiments.sweeps import combine, format_value, read_grid, read_space, suggest, summarise, sweep
from biopsy.recipes import load_recipe
from biopsy.training.study import Study
from conftest import write_pack
from refusals import refuses
from report_facts import Page
from tiny_runs import interrupt_at

FAST = ("preprocessing.input_px=8", "train.epochs=1")
RECIPE = "cancernet-2020"
GRID = ("train.lr=0.01,0.001", "train.batch_size=8,16")
PATCHES = {"n_patients": 6, "patches_per_patient": 6}


def ask(data, out, *, grid=GRID, overrides=FAST, recipe=RECIPE, **options):
    return sweep(
        recipe, data, grid=grid, overrides=overrides, out=out, device="cpu", split="patients", **options
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two settings of two values, two seeds; with the epoch records it gave."""
    place, records = tmp_path_factory.mktemp("sweep"), []
    pack = write_pack(place, **PATCHES)
    return ask(pack, place / "sweep", seeds=(0, 1), on_epoch=records.append), records


# --- grids


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("train.lr=0.01, 1e-3", ["0.01", "1e-3"]),
        ("model.params.stage_widths=[32,64],[64,128]", ["[32,64]", "[64,128]"]),
        ("model.trainable=block5,all", ["block5", "all"]),
        ("decision.threshold='sensitivity=0.95',youden", ["'sensitivity=0.95'", "youden"]),
        ("model.params.note='a,b',\"[\"", ["'a,b'", '"["']),
    ],
)
def test_values_are_cut_at_commas_outside_brackets_and_quotes(text, values):
    key = text.partition("=")[0]
    assert read_grid([text]) == {key: values}


@given(st.lists(st.floats(1e-9, 1e3), min_size=1, max_size=4, unique=True), st.integers(1, 4))
def test_every_value_meets_every_other_once(rates, n_sizes):
    sizes = [2**power for power in range(3, 3 + n_sizes)]
    grid = [f"train.lr={','.join(map(repr, rates))}", f"train.batch_size={','.join(map(str, sizes))}"]
    found = combine(RECIPE, grid, ())
    assert [tuple(item.values.values()) for item in found] == [
        (rate, size) for rate in rates for size in sizes
    ]
    assert all((i.recipe.train.lr, i.recipe.train.batch_size) == tuple(i.values.values()) for i in found)
    assert len({item.name for item in found}) == len(found)
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", item.name) for item in found)


def test_a_value_written_twice_is_one_combination():
    assert len(combine(RECIPE, ["train.lr=0.01,1e-2,0.010"], ())) == 1
    assert len(combine("idc-small", ["model.params.base_channels=4,8", "train.fraction=0.5,1"], ())) == 4


def test_values_are_spelled_for_readers():
    assert [format_value(value) for value in ("all", 0.001, [32, 64], True)] == [
        "all",
        "0.001",
        "[32, 64]",
        "true",
    ]


@pytest.mark.parametrize(
    ("grid", "facts"),
    [
        (["train.rl=1,2"], ["'train.rl'", "'train.lr'"]),
        (["train.lr"], ["--grid 'train.lr'", "'='", "--grid train.lr=0.01,0.001"]),
        (["train.lr="], ["'train.lr='", "value"]),
        (["train.lr=0.1,,0.2"], ["'train.lr=0.1,,0.2'", "value"]),
        ([], ["--grid", "--search"]),
        (["train.lr=0.1", "train.lr=0.2"], ["'train.lr'", "twice"]),
        (["train.lr=0.1,-1"], ["train.lr", "greater than 0", "-1"]),
        (["train.epochs=1,2"], ["train.epochs", "--grid", "--set"]),
        (["model.name=cancernet,cancernot"], ["'cancernot'", "'cancernet'"]),
        (["model.params.stage_width=[4],[8]"], ["'stage_width'"]),
        (["model.trainable=all,block9"], ["'block9'"]),
        (["model.pretrained=false,true"], ["model.pretrained", "model.weights"]),
    ],
)
def test_a_grid_that_cannot_be_is_refused_before_anything_is_trained(finished, tmp_path, grid, facts):
    pack = finished[0].runs()[0].open_pack()
    with refuses(RecipeError, *facts):
        ask(pack, tmp_path / "sweep", grid=grid)
    assert not (tmp_path / "sweep").exists()


def test_other_refusals(finished, tmp_path):
    made, _ = finished
    pack = made.runs()[0].open_pack()
    with refuses(RunError, "seed"):
        ask(pack, tmp_path / "sweep", seeds=())
    with refuses(RunError, "another grid"):
        ask(pack, made.path, grid=["train.lr=0.01"])
    with refuses(RunError, "another recipe cancernet-2020"):
        ask(pack, made.path, overrides=("preprocessing.input_px=8", "train.epochs=3"))
    from biopsy.experiments.folds import study

    with refuses(RunError, "sweep"):
        study([RECIPE], pack, out=made.path, split="patients")


# --- what it leaves behind


def test_every_combination_and_seed_has_a_row(finished):
    made, records = finished
    table = made.table()
    assert list(table)[:3] == ["train.lr", "train.batch_size", "seed"]
    wanted = [(lr, size, seed) for seed in (0, 1) for lr in (0.01, 0.001) for size in (8, 16)]
    assert list(zip(table["train.lr"], table["train.batch_size"], table["seed"], strict=True)) == wanted
    assert made.info["status"] == "finished" and made.info["question"] == "sweep"
    assert [(r["train.lr"], r["train.batch_size"], r["seed"]) for r in records] == wanted
    for run, (lr, size, seed) in zip(made.runs(), wanted, strict=True):
        recipe = run.recipe
        assert (recipe.train.lr, recipe.train.batch_size, run.info["seed"]) == (lr, size, seed)
        assert recipe.name == RECIPE and run.info["split"]["name"] == "patients"
    assert (made.path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_numbers_are_those_of_the_runs(finished):
    made, _ = finished
    table, summary = made.table(), read_json(made.path / "metrics.json")
    for row, run in zip(table.itertuples(), made.runs(), strict=True):
        assert row.val_auroc == pytest.approx(run.log()[run.info["chosen_epoch"] - 1]["val_auroc"])
        assert row.auroc == pytest.approx(run.metrics().patch["auroc"].value)
    assert summary["chosen_by"] == "val_auroc" and len(summary["combinations"]) == 4
    for entry in summary["combinations"]:
        rows = table
        for key, value in entry["values"].items():
            rows = rows[rows[key] == value]
        assert entry["n_seeds"] == 2
        spread = rows["auroc"].agg(["mean", "std", "min", "max"]).rename({"std": "sd"})
        assert entry["metrics"]["auroc"] == pytest.approx(spread.to_dict())
    best = max(summary["combinations"], key=lambda entry: entry["val_auroc"]["mean"])
    assert summary["best"] == best
    assert (summary["ledger"]["times"], summary["ledger"]["runs"]) == (8, 8)


def row(lr, seed, val_auroc, test_auroc, val_loss=0.5):
    shown = {**dict.fromkeys(SHOWN, 0.5), "auroc": test_auroc, "baseline_auroc": 0.6}
    return {"train.lr": lr, "seed": seed, "val_auroc": val_auroc, "val_loss": val_loss, **shown}


METRICS = SimpleNamespace(positive_class="idc", unit="patient", ledger=None)


def test_validation_chooses_and_test_does_not():
    rows = [row(0.1, 0, 0.7, 0.99), row(0.1, 1, 0.7, 0.99), row(0.2, 0, 0.9, 0.5), row(0.2, 1, 0.8, 0.6)]
    summary = summarise(rows, ["train.lr"], [METRICS])
    assert summary.best.values == {"train.lr": 0.2}
    assert summary.best.metrics["auroc"].mean == pytest.approx(0.55)
    chosen = summary.best.val_auroc
    assert (chosen.mean, chosen.sd) == pytest.approx((0.85, np.sqrt(0.005)))


def test_a_combination_that_lacks_a_seed_is_not_the_best():
    rows = [row(0.1, 0, 0.7, 0.9), row(0.1, 1, 0.7, 0.9), row(0.2, 0, 0.95, 0.9)]
    assert summarise(rows, ["train.lr"], [METRICS]).best.values == {"train.lr": 0.1}


def test_without_auroc_on_validation_the_loss_chooses():
    rows = [row(0.1, 0, None, 0.9, val_loss=0.7), row(0.2, 0, None, 0.5, val_loss=0.3)]
    summary = summarise(rows, ["train.lr"], [METRICS])
    assert (summary.chosen_by, summary.best.values["train.lr"]) == ("val_loss", 0.2)


@pytest.mark.slow
def test_asking_again_trains_nothing_and_more_may_be_asked(finished, tmp_path):
    place = tmp_path / "sweep"
    pack = finished[0].runs()[0].open_pack()
    options = {"recipe": "dabydeen-hedges", "grid": ["model.params.widths=[4],[4,8]"]}
    first = ask(pack, place, **options)
    before = {run.path.name: (run.path / "run.json").read_text() for run in first.runs()}
    ask(pack, place, **options, on_epoch=lambda record: pytest.fail("trained again"))
    more = ask(pack, place, **(options | {"grid": ["model.params.widths=[8]"]}), seeds=(3,))
    table = more.table()
    assert table["model.params.widths"].tolist() == ["[4]", "[4, 8]", "[8]"]
    assert more.info["seeds"] == [0, 3] and table["seed"].tolist() == [0, 0, 3]
    assert before.items() <= {r.path.name: (r.path / "run.json").read_text() for r in more.runs()}.items()


@pytest.mark.slow
def test_an_interrupted_sweep_goes_on(finished, tmp_path):
    made, _ = finished
    pack = made.runs()[0].open_pack()
    with pytest.raises(KeyboardInterrupt):
        ask(pack, tmp_path / "sweep", on_epoch=interrupt_at(2))
    assert len(Study.open(tmp_path / "sweep").table()) == 1
    whole = ask(pack, tmp_path / "sweep")
    first = made.table().query("seed == 0").drop(columns="seconds").reset_index(drop=True)
    pd.testing.assert_frame_equal(whole.table().drop(columns="seconds"), first, check_exact=True)


@pytest.mark.slow
def test_its_report_is_one_page(finished, tmp_path):
    made, _ = finished
    (path,) = report(made, out=tmp_path / "report.html")
    text = path.read_text()
    page = Page(text).text
    best = read_json(made.path / "metrics.json")["best"]
    assert f"{best['val_auroc']['mean']:.3f}" in page and "evaluated 8 times, by 8 runs" in page
    assert "train.lr" in page and text.count('role="img"') == 1
    assert not re.search(r"(src|href)=\"(?!data:|#)", text)
    (hidden,) = report(made, out=tmp_path / "hidden.html", hide_ids=True)
    assert not re.search(
        r"\b88[67]\d\b", re.sub(r"base64,[^\"]*|<svg.*?</svg>", "", hidden.read_text(), flags=re.S)
    )


# --- figures


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_one_setting_of_numbers_is_drawn_on_a_line():
    rates, validation = [1e-3, 1e-2, 1e-3, 1e-2], np.array([0.7, 0.8, 0.72, np.nan])
    figure = draw_sweep({"train.lr": rates}, validation, validation - 0.1, best={"train.lr": 1e-2})
    axes = figure.axes[0]
    assert axes.get_xscale() == "log" and axes.get_xlabel() == "train.lr"
    dots, mean = axes.lines[0], axes.lines[1]
    assert dots.get_xdata().tolist() == rates
    assert mean.get_ydata() == pytest.approx([0.71, 0.8])
    assert axes.lines[-1].get_xdata() == [1e-2, 1e-2]


def test_one_setting_of_words_has_a_place_for_each():
    figure = draw_sweep({"model.trainable": ["all", "head", "all"]}, np.array([0.7, 0.8, 0.9]))
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["all", "head"]
    assert axes.lines[0].get_xdata().tolist() == [0, 1, 0]


def test_two_settings_are_a_map_with_its_numbers():
    values = {"train.lr": [0.1, 0.2, 0.1, 0.1], "model.trainable": ["all", "all", "head", "head"]}
    figure = draw_sweep(values, np.array([0.7, 0.8, 0.6, 0.7]), np.array([0.5, 0.4, 0.3, 0.3]))
    assert texts(figure) == ["0.700\n0.500", "0.650\n0.300", "0.800\n0.400", ""]


def test_more_settings_are_ranked():
    values = {"a": [1, 2, 3], "b": [1, 1, 1], "c": ["x", "y", "z"]}
    labels = draw_sweep(values, np.array([0.7, 0.9, 0.8]), best={"a": 2, "b": 1, "c": "y"}).axes[0]
    assert [label.get_text() for label in labels.get_yticklabels()] == [
        "2 · 1 · y ◂",
        "3 · 1 · z",
        "1 · 1 · x",
    ]
    loss = draw_sweep(values, np.array([0.7, 0.9, 0.8]), metric="loss").axes[0]
    assert loss.get_yticklabels()[0].get_text() == "1 · 1 · x"


def test_figures_refuse_what_does_not_fit():
    with refuses(MetricError, "2 runs", "1 settings"):
        draw_sweep({"train.lr": [0.1]}, np.array([0.1, 0.2]))
    with refuses(MetricError, "1 runs", "0 settings"):
        draw_sweep({}, np.array([0.1]))


# --- command line


@pytest.mark.slow
def test_sweep_from_the_command_line(finished, tmp_path, monkeypatch):

    from command_line import call

    monkeypatch.chdir(tmp_path)
    pack = finished[0].runs()[0].open_pack()
    base = ["sweep", RECIPE, "--data", str(pack.path), "--split", "patients", "--device", "cpu"]
    fast = ["--set", "train.epochs=1", "--set", "preprocessing.input_px=8"]
    done = call(*base, *fast, "--grid", "train.lr=0.01,0.02", "--name", "rates")
    assert done.exit_code == 0, done.stderr
    assert done.stdout == "studies/rates\n" and "epoch   1" in done.stderr
    assert len(json.loads((tmp_path / "studies/rates/metrics.json").read_text())["combinations"]) == 2
    wrong = call(*base, "--grid", "train.rl=1")
    assert wrong.exit_code == 1 and "did you mean 'train.lr'" in wrong.stderr and wrong.stdout == ""
    assert call(*base).exit_code == 1
    ranges = ["--search", "train.lr=1e-3..1e-1 log", "--trials", "2"]
    searched = call(*base, *fast, *ranges, "--name", "search")
    assert searched.exit_code == 0, searched.stderr
    kept = json.loads((tmp_path / "studies/search/metrics.json").read_text())
    assert len(kept["combinations"]) == 2 and kept["ledger"] is None


def test_the_base_recipe_is_what_is_kept(finished):
    assert load_recipe(RECIPE).train.lr == 0.01  # so one row of the grid is the recipe as it is
    kept = finished[0].info["recipes"]
    assert list(kept) == [RECIPE] and "lr = 0.01" in kept[RECIPE]


# --- search


SPACE = ("train.lr=1e-4..1e-1 log", "train.batch_size=8,16")


def look_for(data, out, *, search=SPACE, trials=4, **options):
    return ask(data, out, grid=(), search=search, trials=trials, **options)


@pytest.mark.parametrize(
    ("line", "facts"),
    [
        ("train.lr=0.1..0.01", ["'train.lr=0.1..0.01'", "empty"]),
        ("train.lr=0.1..0.1", ["'train.lr=0.1..0.1'", "empty"]),
        ("train.lr=0..0.1 log", ["'train.lr=0..0.1 log'", "above 0"]),
        ("train.lr=a..b", ["'train.lr=a..b'", "numbers"]),
        ("train.lr=0.1", ["'train.lr=0.1'", "range", "choice"]),
        ("train.lr=", ["'train.lr='", "range"]),
        ("train.rl=0.1..0.2", ["'train.rl'", "'train.lr'"]),
        ("train.lr=-1..0.1", ["train.lr", "greater than 0", "-1"]),
        ("train.epochs=1..3", ["train.epochs", "--search", "--set"]),
        ("model.trainable=all,block9", ["'block9'"]),
    ],
)
def test_a_search_that_cannot_be_is_refused_before_anything_is_trained(finished, tmp_path, line, facts):
    pack = finished[0].runs()[0].open_pack()
    with refuses(RecipeError, *facts):
        look_for(pack, tmp_path / "search", search=[line])
    assert not (tmp_path / "search").exists()


def test_a_search_or_a_grid_but_not_both(finished, tmp_path):
    pack = finished[0].runs()[0].open_pack()
    with refuses(RecipeError, "--grid", "--search"):
        ask(pack, tmp_path / "search", search=SPACE)
    with refuses(RecipeError, "trial"):
        look_for(pack, tmp_path / "search", trials=0)


def test_suggestions_lie_in_the_space_and_learn_from_validation():
    space = read_space(["train.lr=1e-4..1e-1 log", "train.batch_size=8..64", "model.trainable=head,all"])
    trials = []
    for _ in range(40):
        values = suggest(space, trials, seed=3)
        assert 1e-4 <= values["train.lr"] <= 1e-1 and values["model.trainable"] in ("head", "all")
        assert isinstance(values["train.batch_size"], int) and 8 <= values["train.batch_size"] <= 64
        trials.append((values, -abs(np.log10(values["train.lr"]) + 2)))  # best at 0.01
    assert suggest(space, trials, seed=3) == suggest(space, trials, seed=3) != suggest(space, trials, seed=4)
    off = [abs(np.log10(values["train.lr"]) + 2) for values, _ in trials]
    assert np.mean(off[-15:]) < 0.5 * np.mean(off[:10])


@pytest.mark.slow
def test_a_search_that_was_stopped_ends_as_one_that_was_not(finished, tmp_path, monkeypatch):
    pack = finished[0].runs()[0].open_pack()
    monkeypatch.setattr(run_specs, "evaluate", lambda run: pytest.fail("the test subset was read"))
    whole = look_for(pack, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        look_for(pack, tmp_path / "search", on_epoch=interrupt_at(3))
    made = look_for(pack, tmp_path / "search")
    tables = [study.table().drop(columns="seconds") for study in (made, whole)]
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    assert len(tables[0]) == 4 and not any((run.path / "evaluation").exists() for run in made.runs())
    assert not {"auroc", "sensitivity"} & set(tables[0])
    best = tables[0].loc[tables[0]["val_auroc"].idxmax()]
    assert read_json(made.path / "metrics.json")["best"]["values"]["train.lr"] == best["train.lr"]
    more = look_for(pack, tmp_path / "search", trials=5)
    pd.testing.assert_frame_equal(more.table().drop(columns="seconds")[:4], tables[0], check_exact=True)
    with refuses(RunError, "another search"):
        look_for(pack, tmp_path / "search", seeds=(1,))
    (path,) = report(more, out=tmp_path / "report.html")
    assert "has not been evaluated" in Page(path.read_text()).text


def test_a_search_without_optuna_names_the_extra(monkeypatch):
    monkeypatch.setattr(sweeps, "find_spec", lambda name: None)
    with refuses(MissingExtra, extra="search"):
        read_space(SPACE)
