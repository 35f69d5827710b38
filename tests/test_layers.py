"""The shape of the package: layers import downwards, no siblings in circles, lower layers without torch."""

import re
import subprocess
import sys
from pathlib import Path

import biopsy

PROJECT = Path(__file__).resolve().parents[1]
PACKAGE = PROJECT / "src" / "biopsy"
WITHOUT_TORCH = {"core", "statistics", "plotting", "slide_io", "recipes", "data", "phantom", "cli"}

MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def run_contracts(config: Path) -> int:
    """Return import-linter's exit code, in its own process: it disables the loggers of the one it is in."""
    code = (
        "import sys\nfrom importlinter.cli import lint_imports\n"
        "sys.exit(lint_imports(config_filename=sys.argv[1], no_cache=True))"
    )
    return subprocess.run(
        [sys.executable, "-c", code, str(config)], capture_output=True, check=False
    ).returncode


def test_the_contracts_of_pyproject_hold():
    assert run_contracts(PROJECT / "pyproject.toml") == 0


def test_a_contract_can_be_broken(tmp_path):
    config = tmp_path / "contracts.toml"
    config.write_text(
        '[tool.importlinter]\nroot_package = "biopsy"\n[[tool.importlinter.contracts]]\n'
        'name = "upside down"\ntype = "layers"\nlayers = ["biopsy.core", "biopsy.data"]\n'
    )
    assert run_contracts(config) == 1


def test_files_are_named_after_their_subject():
    assert {path.stem for path in MODULES.values()}.isdisjoint({"utils", "util", "helpers", "misc", "common"})


def test_the_readme_prints_the_tree_of_the_package():
    tree = (PROJECT / "README.md").read_text().split("src/biopsy/\n")[1].split("```")[0]
    listed = set(re.findall(r"  (\w+)/", tree))
    packages = {path.parent for path in PACKAGE.rglob("__init__.py")} - {PACKAGE}
    assert {folder.name for folder in packages if len(folder.relative_to(PACKAGE).parts) <= 2} == listed


def test_no_module_under_the_package_shadows_a_public_function():
    modules = {path.stem for path in PACKAGE.iterdir() if path.is_dir() or path.suffix == ".py"}
    assert modules.isdisjoint(set(biopsy.__all__) - {"__version__"})


def test_lower_layers_slides_and_pages_load_without_torch():
    """Importing it takes seconds and 700 MB, which every command on slides, and `view`, would wait for."""
    modules = [name for name in MODULES if (*name.split("."), "", "")[1] in WITHOUT_TORCH]
    modules += ["biopsy.slides.cohorts", "biopsy.training.open_model", "biopsy.app.viewer"]
    code = f"""if True:
        import importlib, sys
        for name in {modules}:
            importlib.import_module(name)
            assert "torch" not in sys.modules, name
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
