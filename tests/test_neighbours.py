"""Neighbours on the slide: counts by hand, the border, and flipped labels that are found again."""

import re
import zipfile

import numpy as np
import pandas as pd
import pytest

from biopsy.data.coordinates import find_slides, find_step
from biopsy.evaluation.neighbours import (
    count_neighbours,
    find_zones,
    measure_zones,
    rank_label_issues,
)
from biopsy.evaluation.scored import ScoredPatches


def make_table(rows, columns, *, step=50, slide="8863"):
    """All places of a grid, row by row, as IDC counts them."""
    y, x = (grid.ravel() for grid in np.mgrid[:rows, :columns])
    return pd.DataFrame({"x": x * step + 1, "y": y * step + 1, "slide_id": slide, "patient_id": None})


def test_a_patch_has_the_eight_neighbours_of_its_own_slide():
    table = pd.concat([make_table(3, 4), make_table(3, 4, slide="8865")], ignore_index=True)
    n = count_neighbours(table, np.zeros(24, int), 2)[:, 0]
    assert n[:12].reshape(3, 4).tolist() == [[3, 5, 5, 3], [5, 8, 8, 5], [3, 5, 5, 3]]
    assert n[12:].tolist() == n[:12].tolist()


def test_border_and_deep_by_hand():
    table, target = make_table(3, 5), np.tile([0, 0, 0, 1, 1], 3)
    zones = find_zones(count_neighbours(table, target, 2), target)
    assert zones["zone"].tolist() == ["deep", "deep", "border", "border", "deep"] * 3
    assert zones["n_against"].tolist() == [0, 0, 2, 2, 0, 0, 0, 3, 3, 0, 0, 0, 2, 2, 0]
    assert zones["n_neighbours"].tolist()[5:10] == [5, 8, 8, 8, 5]


@pytest.mark.parametrize("step", [1, 50, 96, 333])
def test_order_scale_and_place_change_nothing(step):
    rng = np.random.default_rng(0)
    table, target = make_table(9, 7, step=step), rng.integers(0, 3, 63)
    assert find_step(find_slides(table)) == step
    expected = count_neighbours(make_table(9, 7), target, 3)
    np.testing.assert_array_equal(count_neighbours(table.assign(x=table["x"] + 7), target, 3), expected)
    order = rng.permutation(63)
    shuffled = table.iloc[order].reset_index(drop=True)
    np.testing.assert_array_equal(count_neighbours(shuffled, target[order], 3), expected[order])
    assert (expected * (expected.sum(axis=1, keepdims=True) > 8)).sum() == 0


def test_gaps_in_a_slide_are_no_neighbours():
    table = make_table(5, 5).drop(index=[7, 12]).reset_index(drop=True)
    n = count_neighbours(table, np.zeros(23, int), 1)[:, 0]
    assert n.max() == 7 and n.min() == 3


def test_without_coordinates_or_slide_there_is_nothing_to_count():
    table = make_table(2, 2).astype({"x": "Int64"})
    table.loc[0, "x"] = pd.NA
    table.loc[1, "slide_id"] = None
    target = np.array([0, 1, 0, 1])
    zones = find_zones(count_neighbours(table, target, 2), target)
    assert zones["n_neighbours"].isna().tolist() == [True, True, False, False]
    assert zones["zone"].isna().tolist() == [True, True, False, False]
    lonely = find_zones(count_neighbours(make_table(1, 1), np.array([1]), 2), np.array([1]))
    assert lonely["n_neighbours"].tolist() == [0] and lonely["zone"].isna().all()
    assert find_step(find_slides(table.assign(x=pd.NA))) == 1.0


def score(target, prob, groups, unit="slide"):
    return ScoredPatches(
        target=target,
        probs=np.stack([1 - prob, prob], axis=1),
        pred=(prob >= 0.5).astype(int),
        group_ids=groups,
        class_names=["deep", "tumour"],
        positive_class="tumour",
        unit=unit,
    )


def test_zones_add_up_and_the_border_is_harder_where_it_was_made_harder():
    rng = np.random.default_rng(1)
    table = pd.concat([make_table(12, 12, slide=str(s)) for s in range(12)], ignore_index=True)
    target = np.tile(np.repeat([0, 1], 6), 12 * 12)
    zone = find_zones(count_neighbours(table, target, 2), target)["zone"].to_numpy(object)
    wrong = rng.random(len(table)) < np.where(zone == "border", 0.4, 0.05)
    prob = np.where((target == 1) ^ wrong, 0.9, 0.1)
    slides = table["slide_id"].to_numpy(str)
    found = measure_zones(zone, score(target, prob, slides), 0.5)
    assert sum(part.n_patches for part in found.values()) == len(table)
    assert sum(part.fn + part.fp for part in found.values()) == wrong.sum()
    border, deep = (found[name].patch["sensitivity"] for name in ("border", "deep"))
    assert border.high < deep.low and border.low < 0.6 < border.high
    assert found["deep"].patient["specificity"].low is not None
    few = measure_zones(zone[:144], score(target[:144], prob[:144], np.full(144, "a")), 0.5)
    assert few["deep"].patch["sensitivity"].reason and few["deep"].patch["sensitivity"].low is None
    assert measure_zones(np.full(4, None), score(target[:4], prob[:4], target[:4], unit="patch"), 0.5) == {}


def test_doubt_is_the_smoothed_share_of_votes():
    counts = np.array([[7.0, 1.0], [8.0, 0.0], [np.nan, np.nan], [np.nan, np.nan], [0.0, 1.0]])
    target = np.array([1, 0, 1, 1, 0])
    probs = np.array([[np.nan, np.nan], [0.9, 0.1], [0.8, 0.2], [np.nan, np.nan], [np.nan, np.nan]])
    found = rank_label_issues(counts, target, probs)
    np.testing.assert_allclose(found["doubt"], [8 / 10, 1.1 / 11, 1.8 / 3, 0.5, 2 / 3])
    assert found["suggested"].tolist() == [0, 1, 0, 0, 1]
    assert found["n_for"].fillna(-1).tolist() == [7, 0, -1, -1, 1]


def test_the_class_with_most_votes_is_suggested():
    counts, probs = np.array([[1.0, 3.0, 4.0], [1.0, 3.0, 4.0]]), np.array([[0.1, 0.8, 0.1], [0.1, 0.1, 0.8]])
    found = rank_label_issues(counts, np.array([2, 0]), probs)
    assert found["suggested"].tolist() == [1, 2]
    np.testing.assert_allclose(found["doubt"], [4.8 / 11, 5.8 / 11])


def test_flipped_labels_come_first_and_a_model_helps():
    rng = np.random.default_rng(2)
    table = make_table(30, 30)
    truth = ((table["x"] - 750) ** 2 + (table["y"] - 750) ** 2 < 400**2).to_numpy(int)
    flipped = rng.random(900) < 0.05
    label = np.where(flipped, 1 - truth, truth)
    prob = np.clip(np.where(truth == 1, 0.8, 0.2) + rng.normal(0, 0.2, 900), 0, 1)
    nothing = np.full((900, 2), np.nan)
    counts = count_neighbours(table, label, 2)
    share = {}
    for name, probs in (("neighbours", nothing), ("both", np.stack([1 - prob, prob], axis=1))):
        found = rank_label_issues(counts, label, probs)
        share[name] = flipped[found["doubt"].to_numpy().argsort()[::-1][: flipped.sum()]].mean()
        listed = found["doubt"] > 0.5
        assert (found["suggested"] == 1 - label).all()
        assert flipped[listed].mean() > 0.8 and listed[flipped].mean() > 0.8
    assert share["both"] >= share["neighbours"] > 0.85


@pytest.mark.data
def test_the_whole_slides_of_idc_have_their_border(data_dir):
    """Against a count that looks up each of the eight places in turn."""
    names = zipfile.ZipFile(data_dir / "idc" / "idc_kaggle_subset.zip").namelist()
    found = [re.search(r"/(8863|8865|8867)_idx5_x(\d+)_y(\d+)_class(\d)\.png$", name) for name in names]
    label = {tuple(map(int, each.groups()[:3])): int(each[4]) for each in found if each}
    table = pd.DataFrame(list(label), columns=["slide_id", "x", "y"]).assign(patient_id=None)
    target = np.array(list(label.values()))
    zone = find_zones(count_neighbours(table, target, 2), target)["zone"]
    around = [(x, y) for x in (-50, 0, 50) for y in (-50, 0, 50) if x or y]
    for (slide, x, y), said in zip(label, zone, strict=True):
        near = {label.get((slide, x + dx, y + dy)) for dx, dy in around} - {None}
        assert said is pd.NA if not near else said == ("deep" if near == {label[slide, x, y]} else "border")
    counts = zone.groupby(table["slide_id"]).value_counts().to_dict()
    assert counts == {
        (8863, "deep"): 730,
        (8863, "border"): 245,
        (8865, "deep"): 590,
        (8865, "border"): 108,
        (8867, "deep"): 1540,
        (8867, "border"): 99,
    }
