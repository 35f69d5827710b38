"""Typed results: mappings of the documents that commands write, with tables and representations."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import biopsy
from biopsy.core.results import Result, Table


def compare_with_copy(run: "biopsy.Run", place: Path) -> Result:
    return biopsy.compare([run, shutil.copytree(run.path, place / "copy")], out=place / "comparison")


RESULTS: dict[str, Callable[["biopsy.Run", Path], Result]] = {
    "Comparison": compare_with_copy,
    "ErrorAnalysis": lambda run, place: biopsy.errors(run, n=2, out=place / "errors"),
    "Evaluation": lambda run, place: biopsy.evaluate(run),
    "Explanations": lambda run, place: biopsy.explain(run, errors=1, out=place / "explain"),
    "Inspection": lambda run, place: biopsy.inspect(run.open_pack(), out=place / "inspection"),
    "Recalibration": lambda run, place: biopsy.calibrate(run, method="none"),
}


@pytest.fixture
def run(trained_run: "biopsy.Run", tmp_path: Path) -> "biopsy.Run":
    run = biopsy.Run.open(shutil.copytree(trained_run.path, tmp_path / "run"))
    biopsy.evaluate(run)
    return run


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_is_a_typed_mapping_with_a_table(
    name: str, run: "biopsy.Run", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("biopsy.data.inspection.MAX_SLIDES", 1)
    result = RESULTS[name](run, tmp_path)
    assert type(result) is getattr(biopsy, name)
    assert dict(result) == result.to_json() and len(result) == len(result.document)
    assert len(result.to_frame().columns) > 0
    tables = [block for block in result.blocks() if isinstance(block, Table)]
    html = result._repr_html_()
    assert html.count("<tr") == sum(1 + len(table.rows) for table in tables) and "<script" not in html
    assert all(line in repr(result) for line in result.blocks() if isinstance(line, str))
    assert len(repr(result).splitlines()) < 80


def test_a_comparison_has_one_row_per_metric(run: "biopsy.Run", tmp_path: Path) -> None:
    comparison = compare_with_copy(run, tmp_path)
    assert list(comparison.to_frame()["metric"]) == list(comparison["differences"][0]["metrics"])


def test_the_documents_are_those_on_disk(run: "biopsy.Run", tmp_path: Path) -> None:
    analysis = biopsy.errors(run, n=2, out=tmp_path / "errors")
    stored = json.loads((run.path / "errors/errors.json").read_text())
    assert all(stored[key] == value for key, value in analysis.items())
    frame = run.predictions("test")[0]
    assert len(analysis.to_frame()) == (frame["pred"] != frame["target"]).sum()
