"""One spelling of ids and names, wherever they come from."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from biopsy.core.text import find_lookalikes, list_unmatched, normalize_id, normalize_name, printable


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("a/b.png", "a/b.png"),
        ("a\\b\\c.png", "a/b/c.png"),
        (" a \u00a0/\tb  c.png", "a/b c.png"),
        ("Mu\u0308ller", "M\u00fcller"),
        ("P\u200b01\ufeff", "P01"),
        (os.fsdecode(b"M\xfcller"), "M%FCller"),
        ("a\x1b[31mb\x00", "a%1B[31mb%00"),
        ("\u3000", ""),
    ],
)
def test_names(written, name):
    assert normalize_name(written) == name


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("12.0", "12"),
        ("12.00 ", "12"),
        ("007", "007"),
        ("1.05", "1.05"),
        ("NA", "NA"),
        ("\u00a0", ""),
        ("v1.0", "v1.0"),
    ],
)
def test_ids(written, name):
    assert normalize_id(written) == name


@given(st.text())
def test_a_normal_name_is_normal_and_can_be_written(text):
    for spell in (normalize_name, normalize_id):
        name = spell(text)
        assert spell(name) == name
        assert name.encode("utf-8") and name == name.strip() if name else True


def test_lookalikes_differ_by_case_or_zeros_alone():
    assert find_lookalikes(["P1", "p1", "P01", "P10", "Q1"]) == [["P01", "P1", "p1"]]
    assert find_lookalikes(["benign", "malignant", "0", "00"]) == [["0", "00"]]


def test_names_that_are_not_known_come_with_the_likely_ones():
    assert list_unmatched(["3", "zz"], ["03"]) == "'3' (perhaps '03'), 'zz'"
    assert list_unmatched(map(str, range(9)), []).endswith("and 6 more")


def test_a_path_keeps_its_backslashes():
    assert printable("a\\b") == "a\\b"
    assert printable(os.fsdecode(b"a\xff")) == "a%FF"
