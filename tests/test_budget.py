"""Budgets: runs that end in time, as long as they can be, and of the recipe's own length at most."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from biopsy.data.splits import split as make_split
from biopsy.experiments.reproduction import (
    MARGIN,
    Length,
    Need,
    Speed,
    full_length,
    measure_speed,
    share_out,
    with_length,
)
from biopsy.recipes import load_recipe
from tiny_runs import TINY

needs = st.builds(
    Need,
    st.integers(1, 20),
    st.builds(Length, st.integers(1, 50), st.integers(1, 500)),
    st.builds(Speed, st.floats(1e-4, 5), st.floats(1e-6, 0.1), st.floats(0, 30)),
    st.floats(1, 3000),
    st.floats(1, 3000),
)


@given(st.dictionaries(st.sampled_from("abcde"), needs, min_size=1), st.floats(1, 1e6))
def test_runs_end_in_time_unless_they_are_as_short_as_can_be(asked, seconds):
    lengths = share_out(seconds, asked)
    assert lengths.keys() == asked.keys()
    shortest = Length(1, 1)
    cost = sum(n.n_runs * n.speed.cost(lengths[name], n.n_val, n.n_test) for name, n in asked.items())
    least = sum(
        n.n_runs * n.speed.cost(shortest, n.n_val, n.n_test)
        for name, n in asked.items()
        if lengths[name] == shortest
    )
    assert cost <= MARGIN * seconds * (1 + 1e-9) + least
    for name, need in asked.items():
        assert 1 <= lengths[name].epochs <= need.full.epochs
        assert 1 <= lengths[name].updates <= need.full.updates


def test_time_that_a_short_recipe_leaves_goes_to_the_others():
    def need(steps):
        return Need(1, Length(1, steps), Speed(1.0, 0.0, 0.0), 1, 1)

    lengths = share_out(100 / MARGIN, {"short": need(10), "long": need(1000)})
    assert (lengths["short"].updates, lengths["long"].updates) == (10, 90)
    assert share_out(1e9, {"long": need(1000)})["long"] == Length(1, 1000)


def test_validation_takes_a_quarter_of_the_time_at_most():
    need = Need(1, Length(40, 200), Speed(update_s=0.1, patch_s=0.01, fixed_s=10), n_val=1000, n_test=500)
    length = need.fit(400)
    looks = length.epochs * 10
    assert looks <= 0.25 * 385 and need.speed.cost(length, 1000, 500) <= 400
    assert length == Length(9, 327)


@pytest.mark.parametrize(
    ("settings", "length"),
    [
        ((), (10, 4)),
        (("train.drop_last=true",), (10, 3)),
        (("train.sampling=within-patient",), (10, 4)),
        (("train.sampling=undersample",), (10, 2)),
        (("train.sampling=oversample",), (10, 5)),
        (("train.steps_per_epoch=7", "train.epochs=3"), (3, 7)),
    ],
)
def test_full_length_is_the_recipes_own(settings, length):
    base = ("train.epochs=10", "train.batch_size=8", "train.drop_last=false")
    recipe = load_recipe("idc-small", [*base, *settings])
    target = np.array([0] * 20 + [1] * 8)
    assert full_length(recipe, target) == Length(*length)
    set_so = with_length(recipe, Length(2, 9)).train
    assert (set_so.epochs, set_so.steps_per_epoch, set_so.early_stopping_patience) == (2, 9, 0)


def test_speed_is_measured_without_opening_the_test_subset(make_pack):
    pack = make_pack(n_patients=6)
    split = make_split(pack, protocol="patients", save=False)
    speed = measure_speed(load_recipe("cancernet-2020", TINY), pack, split, device="cpu")
    assert 0 < speed.update_s < 5 and 0 <= speed.patch_s < 1 and speed.fixed_s > 0
    assert not (pack.path / "ledger.jsonl").exists()
