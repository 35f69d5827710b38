"""Tables of benchmarks' results grow by rows and by columns."""

from recording import append_rows


def test_rows_are_appended_and_new_columns_are_empty_in_earlier_rows(tmp_path):
    path = tmp_path / "results" / "speed.csv"
    append_rows(path, [{"name": "x, y", "seconds": 1}])
    before = path.read_text()
    append_rows(path, [{"seconds": 2, "name": "z"}])
    assert path.read_text() == before + "z,2\n"
    append_rows(path, [{"name": "w", "cores": 2}])
    assert path.read_text().splitlines() == ["name,seconds,cores", '"x, y",1,', "z,2,", "w,,2"]
