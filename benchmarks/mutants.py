"""Changes of the code that the tests must notice.

Command (POSIX only; about five seconds a mutant)::

    python benchmarks/mutants.py [--feature splits,int8] [--mutants 30] [--seed 0]

Each mutant is a copy of the source with one change at random in a function of the feature: a comparison, an
operator, a constant, a condition negated, a call left out. The feature's tests run on it in a forked process.
A mutant *survives* if they all pass; each is printed, for a person to judge: it shows a missing assertion, or
it changes nothing that anybody could see.

Results: the number of mutants and of survivors by feature, shown in `docs/reliability.md`.
"""

import argparse
import ast
import copy
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2  # noqa: F401  # imported once, before the processes are forked
import matplotlib.figure  # noqa: F401
import pandas  # noqa: F401
import pytest
import scipy.stats  # noqa: F401
import torch

ROOT = Path(__file__).resolve().parents[1]
FEATURES = {
    "statistics": (
        "statistics/metrics statistics/intervals statistics/resampling statistics/paired statistics/power "
        "statistics/weighted_counts statistics/multiclass statistics/decisions "
        "statistics/contrasts",
        "metrics intervals paired planning multiclass thresholds decisions contrasts clustered_mean "
        "model_comparison",
    ),
    "calibration": (
        "statistics/calibration statistics/calibrators statistics/reliability "
        "evaluation/calibration/recalibrate training/postprocessing",
        "calibrators calibration calibration_section decisions",
    ),
    "splits": (
        "data/splits data/protocols/groups data/protocols/published data/protocols/leakage "
        "data/protocols/pseudo_slides",
        "splits protocols leakage pseudo_slides",
    ),
    "leakage": (
        "data/audit experiments/leakage",
        "audit leakage inspection reproduction_conditions reproduction",
    ),
    "out-of-distribution": ("models/out_of_distribution", "out_of_distribution classifiers prediction"),
    "abstention": (
        "evaluation/abstention/measure statistics/abstention",
        "conformal abstention abstention_runs",
    ),
    "maps": (
        "slides/maps slides/grids slides/sources slides/inference",
        "grids regions maps geojson resolution same_map",
    ),
    "int8": ("models/runtimes models/compiling models/openvino_runtime", "runtimes inference"),
    "distributed": (
        "training/distributed training/sampling training/batches",
        "distributed sampling training",
    ),
    "storage": ("core/storage", "storage sources"),
}
"""Files of the source and of tests of each feature."""
PAIRS = "Lt LtE, Gt GtE, Eq NotEq, In NotIn, Is IsNot, Add Sub, Mult Div, And Or, BitAnd BitOr"
SWAPS: dict[type[ast.AST], type[ast.AST]] = {ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult}
for _one, _other in (pair.split() for pair in PAIRS.split(", ")):
    SWAPS |= {getattr(ast, _one): getattr(ast, _other), getattr(ast, _other): getattr(ast, _one)}


@dataclass(frozen=True)
class Mutant:
    """A changed module.

    Attributes:
        path: The file, relative to the source.
        line: Where it was changed.
        change: The line before and after.
        text: The whole module.
    """

    path: str
    line: int
    change: str
    text: str


def list_sites(tree: ast.Module) -> Iterator[ast.AST]:
    """Yield what can be changed, in functions only and not in messages of errors, defaults or annotations."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    waiting = [statement for function in functions for statement in function.body]
    seen: set[int] = set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen or isinstance(node, ast.Raise | ast.FunctionDef | ast.JoinedStr | ast.arguments):
            continue
        seen.add(id(node))
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_text:
            continue
        is_number = isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float)
        is_call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
        operators = node.ops if isinstance(node, ast.Compare) else [getattr(node, "op", None)]
        if is_number or is_call or isinstance(node, ast.If | ast.IfExp) or type(operators[0]) in SWAPS:
            yield node
        waiting += [
            child
            for name, value in ast.iter_fields(node)
            if name not in ("annotation", "decorator_list", "returns")
            for child in (value if isinstance(value, list) else [value])
            if isinstance(child, ast.AST)
        ]


def change(node: ast.AST) -> None:
    """Change a node in place."""
    match node:
        case ast.Constant(value=bool()):
            node.value = not node.value
        case ast.Constant():
            node.value = node.value + 1 if isinstance(node.value, int) else node.value * 1.5 + 0.1
        case ast.Compare():
            node.ops[0] = SWAPS[type(node.ops[0])]()  # type: ignore[assignment,call-overload]
        case ast.If() | ast.IfExp():
            node.test = ast.UnaryOp(ast.Not(), node.test)
        case ast.Expr():
            node.value = ast.Constant(None)
        case _:
            node.op = SWAPS[type(node.op)]()  # type: ignore[attr-defined]


def draw_mutants(files: str, number: int, seed: int) -> Iterator[Mutant]:
    """Yield mutants of some modules, each of another place."""
    sites = []
    for name in files.split():
        tree = ast.parse((ROOT / "src" / "biopsy" / f"{name}.py").read_text())
        sites += [(name, index) for index in range(len(list(list_sites(tree))))]
    for name, index in random.Random(seed).sample(sites, min(number, len(sites))):
        tree = ast.parse((ROOT / "src" / "biopsy" / f"{name}.py").read_text())
        node = list(list_sites(tree))[index]
        before = copy.deepcopy(node)
        change(node)
        shown = [ast.unparse(part).split("\n")[0] for part in (before, node)]
        yield Mutant(f"biopsy/{name}.py", node.lineno, " -> ".join(shown)[:160], ast.unparse(tree))  # type: ignore[attr-defined]


def run_tests(source: Path, tests: str, seconds: float) -> tuple[int | None, str]:
    """Return the exit code of pytest in a forked process (None: it did not end) and its last lines."""
    with tempfile.TemporaryFile("w+") as log:
        process = os.fork()
        if process == 0:
            for stream in (1, 2):
                os.dup2(log.fileno(), stream)
            os.setsid()
            sys.path.insert(0, str(source))
            os.environ["PYTHONPATH"] = str(source)
            sys.dont_write_bytecode = True
            files = [str(ROOT / "tests" / f"test_{name}.py") for name in tests.split()]
            options = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
            os.chdir(ROOT)
            os._exit(pytest.main([*options, *files]))
        end = time.monotonic() + seconds
        code: int | None = None
        while time.monotonic() < end:
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                code = os.waitstatus_to_exitcode(status)
                break
            time.sleep(0.05)
        else:
            os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
        log.seek(0)
        return code, "".join(log.readlines()[-3:])


def main() -> None:
    """Try mutants of each feature, and print those that survive."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--feature", default=",".join(FEATURES))
    options.add_argument("--mutants", type=int, default=30)
    options.add_argument("--seed", type=int, default=0)
    arguments = options.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        source = Path(place) / "src"
        shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__"))
        for feature in arguments.feature.split(","):
            files, tests = FEATURES[feature]
            start = time.monotonic()
            code, text = run_tests(source, tests, 600)
            if code != 0:
                raise SystemExit(f"{feature}: the tests fail on the source as it is: {text}")
            limit = 3 * (time.monotonic() - start) + 20
            tried = survived = 0
            for mutant in draw_mutants(files, arguments.mutants, arguments.seed):
                path = source / mutant.path
                whole = path.read_text()
                path.write_text(mutant.text)
                code, text = run_tests(source, tests, limit)
                path.write_text(whole)
                tried, survived = tried + 1, survived + (code == 0)
                if code == 0:
                    print(f"survived: {mutant.path}:{mutant.line}: {mutant.change}", flush=True)
            print(f"{feature}: {tried} mutants, {tried - survived} killed, {survived} survived", flush=True)


if __name__ == "__main__":
    main()
