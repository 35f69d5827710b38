"""Csv files that users bring, and those that are written."""

import csv
import gzip
import os
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from biopsy.core.errors import FileFormatError
from biopsy.core.tables import MAX_COLUMNS, infer_numbers, read_csv_table, unmask_formulas, write_csv


@pytest.fixture
def write(tmp_path):
    def write(content: str | bytes, name: str = "table.csv"):
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return tmp_path / name

    return write


def test_cells_are_text_and_only_an_empty_one_is_missing(write):
    table = read_csv_table(write('id,n\n007,NA\nnull,""\nNone,1.0\n'))
    assert table["id"].tolist() == ["007", "null", "None"]
    assert table["n"].fillna("missing").tolist() == ["NA", "missing", "1.0"]


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_spreadsheets_save_in_several_ways(write, newline, delimiter, encoding):
    rows = [["Slide ", "mpp"], ["ä.tif", "0.5"], ["", ""], ["b.tif", ""]]
    text = newline.join(delimiter.join(row) for row in rows) + newline * 2
    table = read_csv_table(write(text.encode(encoding)), aliases={"slide": "slide"}, required=["slide"])
    assert table.columns.tolist() == ["slide", "mpp"]
    assert table["slide"].tolist() == ["ä.tif", "b.tif"]
    assert table["mpp"].isna().tolist() == [False, True]


def test_quoted_cells_hold_delimiters_newlines_and_quotes(write):
    table = read_csv_table(write('"a\nb",c\n"1,2","say ""no""\nor yes"\n'))
    assert table.to_dict("records") == [{"a\nb": "1,2", "c": 'say "no"\nor yes'}]


def test_gzipped(write):
    table = read_csv_table(write(gzip.compress(b"a,b\n1,2\n"), "t.csv.gz"))
    assert table.to_dict("records") == [{"a": "1", "b": "2"}]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "syntax"),
        (b"\n\n", "syntax"),
        (b",,\n1,2,3\n", "syntax"),
        (b"a,a\n1,2\n", "duplicate"),
        (b"a, a\n1,2\n", "duplicate"),
        (b"patient,Patient_ID\n1,2\n", "duplicate"),
        (b"x,y\n1,2\n", "columns"),
        (b"patient,b\n1,2,3\n", "syntax"),
        (b"patient,b\n1\n", "syntax"),
        (b'patient,b\n1,"2\n3,4\n', "syntax"),
        (b"patient,b\n1,\xff\n", "encoding"),
        ("patient,b\n1,2\n".encode("utf-16"), "encoding"),
        (b"patient,b\n1,\0\n", "encoding"),
        (b"patient" + b",x" * MAX_COLUMNS + b"\n", "too-large"),
        (b"\x1f\x8bgarbage", "syntax"),
        (gzip.compress(b"patient,b\n1,2\n" * 99, mtime=0)[:-12], "syntax"),
        (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "encoding"),
    ],
)
def test_refusals(write, content, reason):
    path = write(content)
    with pytest.raises(FileFormatError) as caught:
        read_csv_table(
            path, aliases={"patient": "patient_id", "patient_id": "patient_id"}, required=["patient_id"]
        )
    assert (caught.value.path, caught.value.reason) == (path, reason)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_paths_that_are_not_regular_files_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, reason in [("pipe", "not-regular"), (".", "not-regular"), ("none", "missing")]:
        with pytest.raises(FileFormatError) as caught:
            read_csv_table(tmp_path / path)
        assert caught.value.reason == reason
    with pytest.raises(FileFormatError):
        read_csv_table("a\0b")
    with pytest.raises(FileFormatError):
        read_csv_table("/dev/zero")


def test_an_address_is_not_opened(monkeypatch, tmp_path):
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileFormatError) as caught:
        read_csv_table(f"http://127.0.0.1:{server.server_port}/patients.csv")
    server.shutdown()
    server.server_close()
    assert caught.value.reason == "missing" and asked == []


@pytest.mark.parametrize(
    ("cells", "kind"),
    [
        (["1", "-20"], "int64"),
        (["1", None], "Int64"),
        (["1", "2.5", None], "float64"),
        (["1e3", ".5"], "float64"),
        (["007", "1"], "str"),
        (["1", "99999999999999999999"], "str"),
        (["1e999", "1"], "str"),
        (["inf", "1"], "str"),
        (["1_000", "1"], "str"),
        (["٣", "1"], "str"),
        ([None, None], "str"),
    ],
)
def test_numbers_are_inferred_where_nothing_is_lost(cells, kind):
    column = infer_numbers(pd.Series(cells, dtype=pd.StringDtype(na_value=float("nan"))))
    assert str(column.dtype) == kind
    assert column.notna().tolist() == [cell is not None for cell in cells]


FORMULAS = [
    "=1+1",
    "+49 170",
    "-2+3+cmd|' /C calc'!A0",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "=",
    "-",
    "'=1",
    "-1.5.2",
]


def first_cells(path) -> list[str]:
    """Return the first cell of each row as a spreadsheet reads it."""
    with open(path, encoding="utf-8", newline="") as file:
        return [row[0] for row in csv.reader(file)]


@pytest.mark.parametrize("text", FORMULAS)
def test_a_spreadsheet_runs_no_cell(tmp_path, text):
    table = pd.DataFrame({text.strip(): [text, "plain"], "n": [-1.5, 2]})
    write_csv(tmp_path / "t.csv", table)
    assert not [cell for cell in first_cells(tmp_path / "t.csv") if cell[:1] in set("=+-@\t\r")]
    again = read_csv_table(tmp_path / "t.csv")
    assert again.iloc[:, 0].tolist() == [text, "plain"]
    assert again.columns[0] == text.strip()


def test_numbers_stay_numbers(tmp_path):
    table = pd.DataFrame({"id": ["-1.5", "+2", "-1e-5"], "x": [-1.5, -2, 0.1], "n": [-1, 0, 1]})
    write_csv(tmp_path / "t.csv", table)
    assert (tmp_path / "t.csv").read_text() == "id,x,n\n-1.5,-1.5,-1\n+2,-2.0,0\n-1e-5,0.1,1\n"


@given(st.lists(st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), min_size=1)))
def test_text_comes_back_as_it_was(cells):
    table = pd.DataFrame({"a": cells, "b": "x"})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.csv"
        write_csv(path, table)
        assert read_csv_table(path)["a"].tolist() == cells
        by_pandas = pd.read_csv(path, dtype=str, keep_default_na=False)
        assert unmask_formulas(by_pandas)["a"].tolist() == cells


def test_missing_cells_and_other_types_are_written_as_ever(tmp_path):
    table = pd.DataFrame(
        {"a": [None, "x"], "b": [True, False], "c": pd.array([1, None], "Int64"), "d": [1, "-x"]}
    )
    write_csv(tmp_path / "t.csv", table)
    assert (tmp_path / "t.csv").read_text() == "a,b,c,d\n,True,1,1\nx,False,,'-x\n"
