"""Signatures of the public functions, read from their source: importing one would load PyTorch first.

A parameter keeps what a command line can say of its type (text, numbers, paths, choices, and lists of them).
Those for which nothing remains, such as callbacks and transforms, are left out.
"""

import ast
import functools
import importlib.util
import inspect
import re
import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union

import biopsy

_SCALARS = {"str": str, "int": int, "float": float, "bool": bool, "Path": Path}
_TEXT = (str, Path)


def list_functions() -> dict[str, tuple[str, str]]:
    """Return module and name of each public function, by its public name, in the order of the stub."""
    stub = ast.parse(Path(biopsy.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    names = [
        (alias.asname or alias.name, f"biopsy.{node.module}", alias.name)
        for node in stub.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]
    return {public: (module, name) for public, module, name in names if public[0].islower()}


@dataclass(frozen=True)
class PublicFunction:
    """What a command line needs to know of a public function.

    Attributes:
        signature: Its parameters as far as a command line goes.
        callbacks: The parameters that were left out.
    """

    signature: inspect.Signature
    doc: str
    callbacks: tuple[str, ...]


def read_function(module: str, name: str) -> PublicFunction:
    """Read signature and docstring of a function from the source, without importing its module."""
    function = _parse_function(module, name)
    arguments = function.args
    defaults = [*[None] * (len(arguments.args) - len(arguments.defaults)), *arguments.defaults]
    kinds: list[Any] = [inspect.Parameter.POSITIONAL_OR_KEYWORD] * len(arguments.args)
    kinds += [inspect.Parameter.KEYWORD_ONLY] * len(arguments.kwonlyargs)
    named = zip(
        [*arguments.args, *arguments.kwonlyargs], [*defaults, *arguments.kw_defaults], kinds, strict=True
    )
    parameters, callbacks = [], []
    for argument, default, kind in named:
        hint = _read_type(argument.annotation, module)
        if hint is None:
            callbacks.append(argument.arg)
            continue
        value = inspect.Parameter.empty if default is None else _read_value(default, module)
        parameters.append(inspect.Parameter(argument.arg, kind, default=value, annotation=hint))
    return PublicFunction(inspect.Signature(parameters), ast.get_docstring(function) or "", tuple(callbacks))


@functools.cache
def _source(module: str) -> str:
    spec = importlib.util.find_spec(module.partition(".")[0])
    assert spec is not None and spec.submodule_search_locations
    path = Path(spec.submodule_search_locations[0], *module.split(".")[1:])
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return path.read_text(encoding="utf-8")


def read_summary(module: str, name: str) -> PublicFunction:
    """Return a function without parameters, with the first paragraph of its docstring."""
    _, _, doc = _find_head(module, name).partition('    """')
    return PublicFunction(inspect.Signature(), re.split(r'\n\n|"""', doc)[0].replace("\n    ", "\n"), ())


def _find_head(module: str, name: str) -> str:
    """Return the source of a function up to the end of its docstring."""
    head = re.search(rf'^def {name}\(.*?^    """.*?"""$', _source(module), re.MULTILINE | re.DOTALL)
    assert head is not None, f"{module}.{name} has no docstring"
    return head[0]


def _parse_function(module: str, name: str) -> ast.FunctionDef:
    """Parse a function up to the end of its docstring, which is much faster than the whole module."""
    function = ast.parse(_find_head(module, name)).body[0]
    assert isinstance(function, ast.FunctionDef)
    return function


def _read_type(node: ast.expr | None, module: str) -> Any:
    """Return the type a command line can read for an annotation; None where there is none."""
    match node:
        case ast.BinOp(left=left, right=right):
            return _unite([_read_type(left, module), _read_type(right, module)])
        case ast.Constant(value=None):
            return types.NoneType
        case ast.Name(id=name) if name in _SCALARS:
            return _SCALARS[name]
        case ast.Name(id=name):
            definition, place = _find_definition(name, module)
            return None if definition is None else _read_type(definition, place)
        case ast.Subscript(value=ast.Name(id="Literal"), slice=choices):
            return Literal[ast.literal_eval(choices)]
        case ast.Subscript(value=ast.Name(id="Sequence" | "Iterable"), slice=item):
            inner = _read_type(item, module)
            return None if inner is None else Sequence[inner]  # type: ignore[valid-type]
    return None


def _unite(hints: list[Any]) -> Any:
    """Unite types in their order, up to the first that takes any text."""
    members: list[Any] = []
    for hint in hints:
        for member in getattr(hint, "__args__", [hint]) if _is_union(hint) else [hint]:
            if member is types.NoneType or not any(_takes_text(known) for known in members):
                members.append(member)
    members = [member for member in members if member is not None]
    return None if set(members) <= {types.NoneType} else Union[tuple(members)]  # noqa: UP007


def _is_union(hint: Any) -> bool:
    return getattr(hint, "__origin__", None) is Union or isinstance(hint, types.UnionType)


def _takes_text(hint: Any) -> bool:
    return hint in _TEXT or getattr(hint, "__origin__", None) is Sequence


def _read_value(node: ast.expr, module: str) -> object:
    """Return a default: a literal, or a constant defined by one."""
    if isinstance(node, ast.Name):
        definition, place = _find_definition(node.id, module)
        assert definition is not None, f"{module}: the default {node.id} is no constant"
        return _read_value(definition, place)
    return ast.literal_eval(node)


@functools.cache
def _find_definition(name: str, module: str) -> tuple[ast.expr | None, str]:
    """Return the expression that a module-level name is bound to, and where; None for a class."""
    source = _source(module)
    if assigned := re.search(rf"^{name}(?:: \w+)? = (.+)$", source, re.MULTILINE):
        return ast.parse(assigned[1], mode="eval").body, module
    imports = re.finditer(r"from (biopsy[\w.]*) import (\([^)]*\)|[^\n(]+)", source)
    for origin, names in (result.groups() for result in imports):
        if re.search(rf"\b{name}\b", names):
            return _find_definition(name, origin)
    return None, module
