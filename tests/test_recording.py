"""Tables of benchmarks' results grow by rows and by columns; their runs are trained once."""

import pytest

import biopsy
from biopsy.recipes import load_recipe
from recording import append_rows
from training_runs import train_once


def test_rows_are_appended_and_new_columns_are_empty_in_earlier_rows(tmp_path):
    path = tmp_path / "results" / "speed.csv"
    append_rows(path, [{"name": "x, y", "seconds": 1}])
    before = path.read_text()
    append_rows(path, [{"seconds": 2, "name": "z"}])
    assert path.read_text() == before + "z,2\n"
    append_rows(path, [{"name": "w", "cores": 2}])
    assert path.read_text().splitlines() == ["name,seconds,cores", '"x, y",1,', "z,2,", "w,,2"]


def test_a_finished_run_is_taken_and_one_of_other_settings_is_not(trained_run):
    automatic = load_recipe(trained_run.recipe, {"train.precision": "auto"})
    pack = trained_run.open_pack(verify=False)
    split = biopsy.split(pack, protocol="patients", save=False)
    assert train_once(automatic, pack, split, 0, trained_run.path).path == trained_run.path
    with pytest.raises(SystemExit):
        train_once(load_recipe(automatic, {"train.lr": 0.5}), pack, split, 0, trained_run.path)
