"""The notebook of the documentation runs, and shows typed results and figures in place."""

from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient", reason="the docs dependency group is not installed")
nbformat = pytest.importorskip("nbformat", reason="the docs dependency group is not installed")
pytest.importorskip("ipykernel", reason="the docs dependency group is not installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),  # of the kernel's own libraries
]
NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "docs").rglob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs_and_shows_its_results(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "kept without outputs"
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs for cell in code if not cell.source.startswith("import"))
    kinds = [set(output.get("data", {})) for cell in code for output in cell.outputs]
    assert sum("text/html" in kind for kind in kinds) >= 3, "tables"
    assert sum(bool(kind & {"image/png", "image/svg+xml"}) for kind in kinds) == 2, "figures"
