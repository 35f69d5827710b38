"""The shape of the package: rooms import only from rooms above them."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
PACKAGE = PROJECT / "src" / "biopsy"

# In order: a room may import from itself and from those before it. Rooms in one line stand side by side.
LAYERS = [
    ["core"],
    ["statistics"],
    ["plotting"],
    ["slide_io"],
    ["recipes"],
    ["data"],
    ["phantom"],
    ["models"],
    ["training"],
    ["reporting"],
    ["evaluation"],
    ["slides"],
    ["experiments"],
    ["exporting"],
    ["cli"],
]
RANK = {room: rank for rank, rooms in enumerate(LAYERS) for room in rooms}
WITHOUT_TORCH = {"core", "statistics", "plotting", "slide_io", "recipes", "data", "phantom", "cli"}

MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
SOURCES = [*MODULES, PACKAGE / "__init__.py"]
SOURCES += sorted(path for folder in ("tests", "benchmarks") for path in (PROJECT / folder).rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(path: Path) -> list[tuple[int, str]]:
    """Give line and dotted name of everything a file imports, also inside functions."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: imports are written in full"
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def show(path: Path) -> str:
    return str(path.relative_to(PROJECT))


COMPOSES = {("reporting", "evaluation"), ("reporting", "slides"), ("reporting", "experiments")}


def find_upward_imports(room: str, names: list[tuple[int, str]]) -> list[str]:
    """Say which imports of a module in ``room`` reach a room below it, or one beside it."""
    wrong = []
    for line, name in names:
        package, _, rest = name.partition(".")
        other = rest.partition(".")[0]
        if package != "biopsy" or other == "__version__" or (room == "cli" and not other):
            continue
        if (room, other) in COMPOSES:
            continue
        if other not in RANK or (other != room and RANK[other] >= RANK[room]):
            wrong.append(f"line {line}: {name}")
    return wrong


@pytest.mark.parametrize("path", MODULES, ids=show)
def test_a_room_imports_only_from_rooms_above(path):
    assert room_of(path) in RANK, f"{room_of(path)} is no room of the plan"
    assert find_upward_imports(room_of(path), imported(path)) == []


def test_the_check_above_can_fail():
    assert find_upward_imports("data", [(3, "biopsy.training.train.train")]) != []
    assert find_upward_imports("core", [(1, "biopsy.statistics.metrics.auroc")]) != []
    assert find_upward_imports("data", [(1, "biopsy.Pack")]) != []
    assert (
        find_upward_imports("data", [(1, "biopsy.core.errors.DataError"), (2, "biopsy.data.packs.Pack")])
        == []
    )


@pytest.mark.parametrize("path", [path for path in MODULES if room_of(path) in WITHOUT_TORCH], ids=show)
def test_lower_rooms_do_without_torch(path):
    names = {name.partition(".")[0] for _, name in imported(path)}
    assert names.isdisjoint({"torch", "torchvision", "tensorflow", "keras"})


@pytest.mark.parametrize("path", SOURCES, ids=show)
def test_a_file_is_named_after_its_subject(path):
    assert path.stem not in ("utils", "util", "helpers", "misc", "common")


@pytest.mark.parametrize("path", [path for path in SOURCES if PACKAGE in path.parents], ids=show)
def test_a_module_says_what_it_is_for(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def test_no_module_under_the_package_shadows_a_public_function():
    import biopsy

    modules = {path.stem for path in PACKAGE.iterdir() if path.is_dir() or path.suffix == ".py"}
    assert modules.isdisjoint(set(biopsy.__all__) - {"__version__"})


def test_lower_rooms_load_without_torch():
    """What the imports written down cannot show: nothing reaches torch by another way."""
    names = [
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        for path in MODULES
        if room_of(path) in WITHOUT_TORCH
    ]
    code = (
        f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
