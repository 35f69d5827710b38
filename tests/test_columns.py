"""Tables a user brings: who is who, and columns that are joined."""

import pandas as pd
import pytest

from biopsy.core.errors import DataError
from biopsy.data.tables import check_ids, join_columns, join_patients
from refusals import refuses


@pytest.fixture
def table():
    return pd.DataFrame(
        {
            "patch_id": ["a/p1_1", "a/p1_2", "b/p2_1"],
            "patient_id": None,
            "slide_id": ["s1", "s1", "s2"],
            "site_id": None,
            "class_name": ["a", "a", "b"],
            "source": ["data/a/p1_1.png", "data/a/p1_2.png", "data/b/p2_1.png"],
        }
    )


@pytest.fixture
def csv(tmp_path):
    def write(text, name="x.csv"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


@pytest.mark.parametrize(
    "text",
    [
        "patch_id,patient_id\na/p1_1,007\na/p1_2,007\nb/p2_1,8\n",
        "ID,Patient\na/p1_1.png,007\na/p1_2.png,007\nb/p2_1.png,8\n",
        "source,patient\ndata/a/p1_1.png,007\ndata/a/p1_2.png,007\ndata/b/p2_1.png,8\nother.png,9\n",
        "slide_id,patient_id\ns1,007\ns2,8\n",
    ],
)
def test_patients_by_csv_keep_their_zeros(table, csv, text):
    found, record = join_patients(table, csv(text))
    assert found["patient_id"].tolist() == ["007", "007", "8"]
    assert record["file"] == "x.csv" and record["without_patient_id"] == 0
    assert found["slide_id"].tolist() == ["s1", "s1", "s2"]


@pytest.mark.parametrize("pattern", [r"(p\d)_", r"(?P<patient>p\d)_(?P<n>\d)", r"(?P<patient_id>p\d)_"])
def test_patients_by_pattern(table, pattern):
    found, record = join_patients(table, pattern)
    assert found["patient_id"].tolist() == ["p1", "p1", "p2"]
    assert record == {"pattern": pattern, "without_patient_id": 0}


def test_a_pattern_can_name_slides_and_sites(table):
    found, _ = join_patients(table, r"(?P<site>\w)/(?P<slide>p\d)_")
    assert found["site_id"].tolist() == ["a", "a", "b"]
    assert found["slide_id"].tolist() == ["p1", "p1", "p2"]
    assert found["patient_id"].isna().all()


def test_patches_without_a_patient_are_counted(table, csv):
    found, record = join_patients(table, csv("patch_id,patient_id,wsi\na/p1_1,1,\nb/p2_1,,s9\n"))
    assert (record["without_patient_id"], record["without_slide_id"]) == (2, 0)
    assert found["slide_id"].tolist() == ["s1", "s1", "s9"]  # what the table does not say stays as it was


@pytest.mark.parametrize(
    ("cells", "patients"),
    [
        ((" P1", "P1\u00a0", "P2"), ["P1", "P1", "P2"]),
        (("1", "1.0", "2.0"), ["1", "1", "2"]),
        (("Mu\u0308ller", "M\u00fcller", "x"), ["M\u00fcller", "M\u00fcller", "x"]),
        (("NA", "None", "nan"), ["NA", "None", "nan"]),
        (("a\\\\b", "a/b", "null"), ["a/b", "a/b", "null"]),
        (("  ", "\u00a0", "P2"), [None, None, "P2"]),
    ],
)
def test_patients_are_read_in_one_spelling(table, csv, cells, patients):
    ids = ["a/p1_1.png", "a\\p1_2", " b/p2_1 "]
    text = "".join(f"{patch},{cell}\n" for patch, cell in zip(ids, cells, strict=True)).replace("\\\\", "\\")
    found, _ = join_patients(table, csv("Patch_ID,Patient\n" + text))
    assert [None if pd.isna(name) else name for name in found["patient_id"]] == patients
    checked, _ = check_ids(found.assign(slide_id=None))
    assert checked["patient_id"].notna().tolist() == [True] * 3 or patients[0] is None


def test_rows_without_a_patch_are_counted_and_named_with_the_likely_patch(table, csv, caplog):
    join_patients(table, csv("patch_id,patient_id\na/p1_1,1\na/p1_2,1\nB/P2_1,2\n"))
    assert "1 of 3 rows match no patch of the data set: 'B/P2_1' (perhaps 'b/p2_1')" in caplog.text
    table["patient_id"] = ["03", "03", "04"]
    join_columns(table, csv("patient_id,age\n3,60\n04,61\n"))
    assert "'3' (perhaps '03')" in caplog.text


def test_patients_of_a_table_replace_those_of_the_source_with_a_warning(table, csv, caplog):
    table["patient_id"] = ["1", "1", "2"]
    found, _ = join_patients(table, csv("patch_id,patient_id\na/p1_1,1\na/p1_2,9\n"))
    assert found["patient_id"].tolist() == ["1", "9", "2"]
    assert "patient_id of the source, 9 for 1 of a/p1_2" in caplog.text


def test_one_slide_of_two_patients_is_refused(table):
    with refuses(DataError, "'s1'", "'1' and '2'"):
        check_ids(table.assign(patient_id=["1", "2", "2"]))


def test_a_patch_without_a_patient_is_of_the_patient_of_its_slide(table, caplog):
    checked, counts = check_ids(table.assign(patient_id=["1", None, None]))
    assert checked["patient_id"].fillna("nobody").tolist() == ["1", "1", "nobody"]
    assert counts == {"by_slide": 1, "without": 1}
    assert "b/p2_1" in caplog.text
    assert check_ids(table)[1] == {}  # where nobody is named, nobody is missing


@pytest.mark.parametrize("ids", [["p1", "P1", "x"], ["07", "7", "8"], ["P01", "P1", "P2"]])
def test_ids_that_are_likely_one_are_named(table, ids, caplog):
    table["slide_id"] = None
    checked, _ = check_ids(table.assign(patient_id=ids))
    assert checked["patient_id"].tolist() == ids
    assert repr(sorted(ids[:2])[0]) in caplog.text and "differ only by" in caplog.text


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("patch_id,patient_id\nx,1\n", ["patch_id", "'a/p1_1'", "'x'"]),
        ("patch_id,patient_id\nb/p2_1,1\n,2\n", ["patch_id", "1 rows", "row 1"]),
        ("patch_id,patient_id\nb/p2_1,1\nb/p2_1,2\n", ["patch_id", "1 repeated", "b/p2_1"]),
        ("name,patient_id\nb/p2_1,1\n", ["name, patient_id", "patch_id, id, source, slide_id"]),
        ("", ["empty"]),
    ],
)
def test_patients_refusals(table, csv, text, facts):
    with refuses(DataError, "x.csv", *facts):
        join_patients(table, csv(text))


@pytest.mark.parametrize(
    ("pattern", "facts"),
    [
        ("(p", ["'(p'", "csv", "missing )"]),
        ("p1", ["'p1'", "(?P<patient>"]),
        ("(?P<who>p)", ["(?P<patient>"]),
        ("(z)", ["(z)", "3 patches"]),
        ("absent.csv", ["absent.csv"]),
    ],
)
def test_pattern_refusals(table, pattern, facts):
    with refuses(DataError, *facts):
        join_patients(table, pattern)


def test_join_by_each_key_keeps_nulls_and_types(table, csv):
    table["patient_id"] = ["1", "1", "2"]
    joined, record = join_columns(table, csv("slide_id,age,scanner\ns1,61,\ns3,4,x\n"))
    assert joined["age"].fillna(-1).tolist() == [61, 61, -1]
    assert joined["scanner"].isna().all()
    assert record["key"] == "slide_id"
    assert (record["patches_without_row"], record["rows_without_patch"]) == (1, 1)
    joined, record = join_columns(table, csv("patient_id,grade\n1,3\n2,1\n"))
    assert joined["grade"].tolist() == [3, 3, 1]
    joined, _ = join_columns(table, csv("patch_id,slide,grade\na/p1_2,z,2\n"))
    assert joined["grade"].isna().tolist() == [True, False, True]


def test_join_fills_the_site(table, csv):
    joined, _ = join_columns(table, csv("slide_id,site\ns1,1\ns2,2\n"))
    assert joined["site_id"].tolist() == ["1", "1", "2"]
    joined, _ = join_columns(table, csv("slide_id,site_id\ns1,north\ns2,south\n"))
    assert joined["site_id"].tolist() == ["north", "north", "south"]
    with refuses(DataError, "x.csv", "site_id"):
        join_columns(joined, csv("slide_id,site_id\ns1,north\n"))


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("slide_id,target\ns1,1\n", ["target"]),
        ("slide_id,official_subset,sha256\ns1,1,2\n", ["official_subset, sha256"]),
        ("name,age\ns1,1\n", ["name, age", "patch_id, patient_id, slide_id"]),
        ("slide_id,age\nS1,1\n", ["slide_id", "'s1'", "'S1'"]),
        ("slide_id,age\ns1,1\n,2\n", ["slide_id", "1 rows", "row 1"]),
        ("slide_id,age\ns1,1\ns1,2\n", ["slide_id", "1 repeated", "s1"]),
    ],
)
def test_join_refusals(table, csv, text, facts):
    with refuses(DataError, "x.csv", *facts):
        join_columns(table, csv(text))
