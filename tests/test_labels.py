"""Corrections by hand and folded classes."""

import pandas as pd
import pytest

from biopsy.core.errors import DataError
from biopsy.data.tables import fold_classes, relabel
from refusals import refuses

CLASSES = ["normal", "in_situ", "invasive"]


@pytest.fixture
def table():
    return pd.DataFrame(
        {"patch_id": ["a", "b", "c"], "source": ["a.png", "b.png", "c.png"], "class_name": CLASSES}
    )


@pytest.fixture
def csv(tmp_path):
    def write(text):
        (tmp_path / "labels.csv").write_text(text)
        return tmp_path / "labels.csv"

    return write


def test_corrections_are_made_and_recorded(table, csv):
    found, names, record = relabel(
        table, csv("source,label,who,when\nc.png,normal,AB,2024-01-02\na.png,0,CD,\n"), CLASSES
    )
    assert found["class_name"].tolist() == ["normal", "in_situ", "normal"]
    assert found["label_before"].fillna("").tolist() == ["normal", "", "invasive"]
    assert found["label_by"].fillna("").tolist() == ["CD", "", "AB"]
    assert found["label_at"].fillna("").tolist() == ["", "", "2024-01-02"]
    assert (record["named"], record["changed"], record["confirmed"]) == (2, 1, 1)
    assert names == CLASSES
    assert table["class_name"].tolist() == CLASSES


def test_who_and_when_are_optional(table, csv):
    found, *_ = relabel(table, csv("patch_id,label\nb,invasive\n"), CLASSES)
    assert found["class_name"].tolist() == ["normal", "invasive", "invasive"]
    assert found["label_by"].isna().all() and found["label_at"].isna().all()


def test_a_class_called_by_a_number_is_meant_by_its_name(csv):
    table = pd.DataFrame({"patch_id": ["a"], "source": ["a"], "class_name": ["2"]})
    assert relabel(table, csv("patch_id,label\na,1\n"), ["1", "2"])[0]["class_name"].tolist() == ["1"]


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        (
            "patch_id,label\nx,normal\ny,normal\na,normal\n",
            ["2 patches", "'x', 'y'"],
        ),
        (
            "patch_id,label\na,norml\n",
            ["'norml'", "normal, in_situ"],
        ),
        ("patch_id,label\na,\n", ["label", "a"]),
        ("patch_id,label\na,3\n", ["'3'", "normal, in_situ"]),
        ("patch_id,label\n,normal\n", ["patch_id", "1 rows", "row 0"]),
        ("patch_id,label\na,normal\na,in_situ\n", ["patch_id", "1 repeated"]),
        ("patch_id,class\na,normal\n", ["patch_id, class", "patch_id, source", "label"]),
    ],
)
def test_label_refusals(table, csv, text, facts):
    with refuses(DataError, "labels.csv", *facts):
        relabel(table, csv(text), CLASSES)


def test_labels_may_name_classes_that_folders_do_not(table, csv, caplog):
    found, names, record = relabel(
        table, csv("patch_id,label\na,grade 1\nb,grade 2\nc,normal\n"), ["normal", "in_situ", "invasive"]
    )
    assert found["class_name"].tolist() == ["grade 1", "grade 2", "normal"]
    assert names == ["normal", "grade 1", "grade 2"]
    assert record["new_classes"] == ["grade 1", "grade 2"]
    assert "adds the classes grade 1, grade 2" in caplog.text


def test_labels_are_read_in_one_spelling(table, csv):
    found, names, _ = relabel(table, csv("Patch_ID;LABEL\n a ;invasive\u00a0\n"), CLASSES)
    assert found["class_name"].tolist() == ["invasive", "in_situ", "invasive"]
    assert names == CLASSES


@pytest.mark.parametrize("label", ["Normal", "norml", "3", "in-situ", "invasiv"])
def test_a_label_that_is_likely_a_class_misspelt_is_refused(table, csv, label):
    with refuses(DataError, f"'{label}'", "a ", "normal, in_situ, invasive"):
        relabel(table, csv(f"patch_id,label\na,{label}\n"), CLASSES)


@pytest.mark.parametrize("positive", ["invasive", ["invasive"]])
def test_one_class_against_the_rest(table, positive):
    folded, names, positive_class = fold_classes(table, CLASSES, positive)
    assert (names, positive_class) == (["other", "invasive"], "invasive")
    assert folded["class_name"].tolist() == ["other", "other", "invasive"]
    assert folded["original_class"].tolist() == CLASSES


def test_two_classes_keep_their_order():
    table = pd.DataFrame({"class_name": ["a", "b"]})
    assert fold_classes(table, ["a", "b"], "a")[1:] == (["a", "b"], "a")
    assert fold_classes(table.iloc[:1], ["a"], "a")[1:] == (["a"], "a")


def test_fold_refusals(table):
    with refuses(DataError, "invasiv"):
        fold_classes(table, CLASSES, "invasiv")
    with refuses(DataError, "--positive", "normal, in_situ, invasive"):
        fold_classes(table, CLASSES, ",".join(CLASSES))
    with refuses(DataError, "--positive", "normal, in_situ, invasive"):
        fold_classes(table, CLASSES, [])


SHEET = "patch_id,label,suggested,decision,who\n"


def test_of_a_sheet_the_decisions_count_and_empty_rows_do_not(table, csv):
    rows = "a,normal,invasive,yes,AB\nb,in_situ,normal,NO,AB\nc,invasive,normal,,\n"
    found, _, record = relabel(table, csv(SHEET + rows), CLASSES)
    assert found["class_name"].tolist() == ["invasive", "in_situ", "invasive"]
    assert found["label_before"].fillna("").tolist() == ["normal", "in_situ", ""]
    assert [record[key] for key in ("named", "changed", "confirmed", "undecided")] == [2, 1, 1, 1]
    found, *_ = relabel(table, csv(SHEET + "a,normal,invasive, in_situ ,\nb,in_situ,normal,2,\n"), CLASSES)
    assert found["class_name"].tolist() == ["in_situ", "invasive", "invasive"]


def test_a_class_called_yes_is_that_class(csv):
    table = pd.DataFrame({"patch_id": ["a", "b"], "source": ["a", "b"], "class_name": ["no", "no"]})
    found, *_ = relabel(table, csv(SHEET + "a,no,yes,yes,\nb,no,yes,no,\n"), ["no", "yes"])
    assert found["class_name"].tolist() == ["yes", "no"]


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        (SHEET + "a,normal,invasive,,\n", ["decision", "yes, no"]),
        (SHEET + "a,normal,invasive,maybe,\n", ["1 ", "'maybe'"]),
        ("patch_id,label,decision\na,normal,yes\n", ["'yes'", "suggested"]),
        (SHEET + "a,normal,invasive,yes,\na,normal,invasive,,\n", ["patch_id", "1 repeated"]),
    ],
)
def test_sheet_refusals(table, csv, text, facts):
    with refuses(DataError, "labels.csv", *facts):
        relabel(table, csv(text), CLASSES)
