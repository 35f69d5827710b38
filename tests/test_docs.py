"""Documentation that runs: Python blocks, command lines, examples in docstrings, links.

The Python blocks of a page share a namespace, in an empty folder of the page's own. There they find
``breast-histopathology-images.zip``, a small synthetic archive in Kaggle's layout, and ``phantom.pack``, a
small pack that is also at hand under the name ``pack``. ``<!-- skip: next -->`` before a block leaves it out.
"""

import doctest
import importlib
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cyclopts import UnknownCommandError, UnknownOptionError
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

import biopsy
from biopsy.cli import build_app
from biopsy.core import errors as errors_module
from conftest import write_idc_zip, write_pack

PROJECT = Path(__file__).resolve().parents[1]
PACKAGE = PROJECT / "src" / "biopsy"
PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").rglob("*.md"))]
APP = build_app()

SHELLS = ("console", "bash", "sh", "shell")
FENCE = re.compile(r"^ *```(\w+)[^\n]*\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!`)\]\(([^)\s#]+)[^)]*\)")


def show(path: Path) -> str:
    return str(path.relative_to(PROJECT))


def pages_with(pattern: str) -> list[Path]:
    return [path for path in PAGES if re.search(pattern, path.read_text(encoding="utf-8"), re.MULTILINE)]


def find_command_lines(text: str) -> list[list[str]]:
    """Return the arguments of every ``biopsy`` call in the shell blocks of a page."""
    calls = []
    for language, block in FENCE.findall(text):
        if language not in SHELLS:
            continue
        lines = block.replace("\\\n", " ").splitlines()
        if any(line.lstrip().startswith("$ ") for line in lines):  # what stands without a prompt is output
            lines = [line.lstrip()[2:] for line in lines if line.lstrip().startswith("$ ")]
        for line in lines:
            lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            words: list[str] = []
            for word in [*lexer, ";"]:
                if word and set(word) <= set("();<>|&"):
                    if "biopsy" in words[:3]:  # after nothing, `uv run`, or an assignment
                        calls.append(words[words.index("biopsy") + 1 :])
                    words = []
                else:
                    words.append(word)
    return calls


def check_command_line(arguments: list[str]) -> None:
    """Let the real command line parse it, without running anything."""
    launch, bound, _ = APP.meta.parse_args(arguments, exit_on_error=False, print_error=False)
    if launch is APP.meta.default_command:
        APP.parse_args(bound.args, exit_on_error=False, print_error=False)


SLOW_PAGES = (
    "docs/how-to/map-a-slide.md",
    "docs/how-to/map-with-your-own-model.md",
    "docs/how-to/calibrate.md",
    "docs/how-to/evaluate-predictions.md",
    "docs/how-to/pretrain-on-your-patches.md",
    "docs/how-to/train-on-arrays.md",
    "docs/start/first-slide.md",
    "docs/datasets/phantom.md",
    "README.md",
)


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """The archive and the pack that pages find in their folder: change only a copy."""
    place = tmp_path_factory.mktemp("material")
    size = {"n_patients": 10, "patches_per_patient": 12, "patch_px": 50}
    write_idc_zip(place, "breast-histopathology-images.zip", **size)
    write_pack(place, "phantom.pack", **size)
    return place


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[pytest.mark.slow] if show(path) in SLOW_PAGES else [])
        for path in pages_with(r"^ *```python")
    ],
    ids=show,
)
def test_python_blocks_run(path, material, tmp_path, monkeypatch, own_registrations):
    shutil.copytree(material, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    document = Sybil([PythonCodeBlockParser(), SkipParser()]).parse(path)
    for example in document.examples():
        example.evaluate()


@pytest.mark.parametrize("path", pages_with(rf"^ *```({'|'.join(SHELLS)})\b"), ids=show)
def test_command_lines_parse(path):
    for arguments in find_command_lines(path.read_text(encoding="utf-8")):
        check_command_line(arguments)


def test_command_lines_are_found_and_wrong_ones_refused():
    text = (
        "```console\n$ pip install uv && uv run biopsy demo --out here\noutput of biopsy list\n"
        "$ RUN=1 biopsy predict runs/x a.png \\\n    'b c.png' > out.txt  # a remark\n```\n"
        "```python\nbiopsy.demo()\n```\n```bash\nbiopsy evaluate run --sid test | less\n```\n"
    )
    calls = find_command_lines(text)
    assert calls == [
        ["demo", "--out", "here"],
        ["predict", "runs/x", "a.png", "b c.png"],
        ["evaluate", "run", "--sid", "test"],
    ]
    check_command_line(calls[0])
    check_command_line(calls[1])
    with pytest.raises(UnknownOptionError):
        check_command_line(calls[2])
    with pytest.raises(UnknownCommandError):
        check_command_line(["trian"])


@pytest.mark.parametrize("path", PAGES, ids=show)
def test_links_lead_somewhere(path):
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    targets = [
        target for target in LINK.findall(text) if "://" not in target and not target.startswith("mailto:")
    ]
    assert [target for target in targets if not (path.parent / target).exists()] == []


@pytest.mark.parametrize(
    "path",
    [path for path in sorted(PACKAGE.rglob("*.py")) if ">>> " in path.read_text(encoding="utf-8")],
    ids=show,
)
def test_examples_in_docstrings(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    module = importlib.import_module(".".join(parts).removesuffix(".__init__"))
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    said: list[str] = []
    for test in doctest.DocTestFinder(exclude_empty=True).find(module):
        runner.run(test, out=said.append)
    assert runner.tries > 0
    assert runner.failures == 0, "".join(said)


def test_the_reference_has_every_public_name():
    text = (PROJECT / "docs" / "reference" / "api.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^::: biopsy\.(\w+)$", text, re.MULTILINE))
    public = {name for name in biopsy.__all__ if not name.startswith("_")}
    errors = {name for name in public if name in vars(errors_module)}
    assert named == public - errors


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path, monkeypatch):
    """Dead links, missing anchors, pages in no menu and references to nothing fail."""
    pytest.importorskip("mkdocs", reason="the docs dependency group is not installed")
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path / "site")]
    subprocess.run(command, cwd=PROJECT, check=True, timeout=300)
    assert (tmp_path / "site" / "reference" / "api.html").stat().st_size > 100_000
    assert "leakage" in (tmp_path / "site" / "search" / "search_index.json").read_text()


def test_pictures_are_small():
    pictures = [path for path in (PROJECT / "docs" / "images").iterdir() if path.suffix in (".png", ".jpg")]
    assert pictures and max(path.stat().st_size for path in pictures) < 300_000
