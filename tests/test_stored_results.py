"""Stored results are read for the predictions they were computed from only."""

import numpy as np
import pytest

from biopsy.core.files import write_json
from biopsy.evaluation.stored_results import affordable_patches, draw_rows, read_result
from biopsy.models.networks import build_network
from biopsy.statistics.resampling import Interval

KEY = {"format": "biopsy-test/1", "subset": "test", "n_patches": 3}


def test_a_result_is_read_with_its_key_only(tmp_path):
    def read(path, key):
        return read_result(path, key, dict[str, str | int])

    assert read(tmp_path / "none.json", KEY) is None
    write_json(tmp_path / "result.json", {**KEY, "value": 1})
    assert read(tmp_path / "result.json", KEY) == {**KEY, "value": 1}
    assert read(tmp_path / "result.json", {**KEY, "subset": "validation"}) is None
    assert read(tmp_path / "result.json", {**KEY, "format": "biopsy-test/2"}) is None
    assert read(tmp_path / "result.json", {**KEY, "seed": 0}) is None


def test_rows_are_drawn_once_each_in_order():
    assert draw_rows(5, 9, seed=0).tolist() == [0, 1, 2, 3, 4]
    rows = draw_rows(1000, 50, seed=0)
    assert len(set(rows)) == 50 and (np.diff(rows) > 0).all()
    assert (rows == draw_rows(1000, 50, seed=0)).all() and (rows != draw_rows(1000, 50, seed=1)).any()


def test_larger_networks_and_inputs_predict_fewer_patches():
    small = build_network("cancernet", n_classes=2, input_px=48)
    counts = [affordable_patches(small, 48, budget, (1, 10**9)) for budget in (1e9, 2e9)]
    assert counts[1] == pytest.approx(2 * counts[0], abs=1) and counts[0] > 1
    limits = [affordable_patches(small, 48, budget, (7, 9)) for budget in (1.0, 1e30)]
    assert limits == [7, 9]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.6, 0.7, "higher"), (0.3, 0.4, "lower"), (0.4, 0.6, "not different"), (None, None, "inconclusive")],
)
def test_an_interval_is_compared_with_a_value(low, high, expected):
    assert Interval(0.5, low, high).compare(0.5) == expected
