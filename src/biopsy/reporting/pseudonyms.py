"""Replacement of ids by numbers, before a report is built.

Numbers are ordered by a hash of the id, and are the same everywhere: in tables, figures, paths, commands and
settings.
"""

import hashlib
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import is_dataclass, replace
from typing import Any

import pandas as pd
from pydantic import BaseModel

KINDS = ("patient", "slide", "patch")
SHORTEST_IN_TEXT = 3  # shorter ids cannot be distinguished from numbers in text
_NAMING_FLAGS = re.compile(
    r"(--(?:test-|val-)?(?:patients?|patch|cases|slides?))([ =])"
    r"('[^']*'(?:\\''[^']*')*|\"(?:[^\"\\]|\\.)*\"|\S+)"  # as a shell quotes what holds blanks
)
_ABSOLUTE_PATH = re.compile(r"(?<![\w.:/])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\'\"]+[/\\])+")
_UNUSUAL = re.compile(r"[^A-Za-z0-9._-]")  # such an id would be cut by the expressions above and below
_TOKEN = re.compile(r"[^\s,;:'\"()\[\]{}=]+")


class Pseudonymizer:
    """Replaces ids by numbers.

    Args:
        ids: The ids of each of ``patient``, ``slide`` and ``patch``; missing ones are ignored.
        salt: Salt of the hash that determines the order of numbers.

    Example:
        >>> aliases = Pseudonymizer({"patient": ["8863", "8865"]})
        >>> sorted(aliases.of("patient", name) for name in ("8863", "8865"))
        ['1', '2']
    """

    def __init__(self, ids: Mapping[str, Iterable[object]], salt: str = "") -> None:
        self._numbers = {kind: _number(ids.get(kind, ()), f"{salt}/{kind}") for kind in KINDS}
        self._names = {kind: {alias: name for name, alias in self._numbers[kind].items()} for kind in KINDS}
        inside = {
            name: f"{kind}-{alias}"
            for kind in reversed(KINDS[:2])
            for name, alias in self._numbers[kind].items()
            if len(name) >= SHORTEST_IN_TEXT and not (name.isdigit() and len(name) < 4)
        }
        self._inside, self._pattern = inside, _match_any(inside)
        self._any = {
            spelling: f"{kind}-{alias}"
            for kind in reversed(KINDS[:2])  # of patches there may be too many
            for name, alias in self._numbers[kind].items()
            if len(name) >= SHORTEST_IN_TEXT and _UNUSUAL.search(name)
            for spelling in (shlex.quote(name), name, name.replace("'", "'\"'\"'"))
        }
        self._unusual = _match_any(self._any)

    def of(self, kind: str, name: object) -> str:
        """Return the number of an id, or ``hidden`` for unknown ids."""
        return self._numbers[kind].get(str(name), "hidden")

    def original(self, kind: str, alias: str) -> str:
        """Return the id behind a number."""
        return self._names[kind][alias]

    def text(self, text: str) -> str:
        """Replace ids in free text, and remove folders of absolute paths and values of flags with ids."""
        # ids first: parts of ids, cut at blanks or slashes, would not be recognised later
        if self._unusual:
            text = self._unusual.sub(lambda name: self._any[name[0]], text)
        text = _NAMING_FLAGS.sub(r"\1\2(hidden)", text)
        text = _ABSOLUTE_PATH.sub("", text)
        text = _TOKEN.sub(lambda token: self._patch_in(token[0]), text)
        return self._pattern.sub(lambda name: self._inside[name[0]], text) if self._pattern else text

    def nested(self, value: Any) -> Any:
        """Replace ids in every string, key and value, of nested records."""
        if is_dataclass(value) and not isinstance(value, type):
            return replace(value, **{name: self.nested(item) for name, item in vars(value).items()})
        if isinstance(value, BaseModel):
            return value.model_copy(update={name: self.nested(item) for name, item in value})
        if isinstance(value, Mapping):
            return {self._whole(key): self.nested(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.nested(item) for item in value]
        return self._whole(value) if isinstance(value, str) else value

    def table(self, table: pd.DataFrame) -> pd.DataFrame:
        """Replace the id columns of a table of patches and order its rows by the numbers.

        Other text columns are treated as free text.
        """
        hidden = table.copy()
        for column in hidden.columns:
            kind = column.removesuffix("_id")
            if kind in KINDS:
                has_id = hidden[column].notna()
                shown = [
                    self.of(kind, name) if there else None
                    for name, there in zip(hidden[column], has_id, strict=True)
                ]
                hidden[column] = pd.Series(shown, index=hidden.index, dtype=object)
            elif not pd.api.types.is_numeric_dtype(hidden[column]) or self._are_ids(column, hidden[column]):
                words = {word: self._whole(word) for word in hidden[column].dropna().unique()}
                hidden[column] = hidden[column].map(words).astype(object)
        by = [f"{kind}_id" for kind in KINDS if f"{kind}_id" in hidden]
        return hidden.sort_values(by).reset_index(drop=True) if by else hidden

    def _are_ids(self, column: str, values: pd.Series) -> bool:
        """Return whether folds are named by the ids of the tested patients."""
        ids = self._numbers["patient"].keys() | self._numbers["slide"].keys()
        return column == "fold" and values.notna().all() and {str(value) for value in values} <= ids

    def _whole(self, text: object) -> str:
        for kind in KINDS:
            if str(text) in self._numbers[kind]:
                return f"{kind}-{self.of(kind, text)}"
        return self.text(str(text))

    def _patch_in(self, token: str) -> str:
        stem, dot, ending = token.rpartition(".")
        for name, suffix in ((token, ""), (stem, dot + ending)):
            if len(name) >= SHORTEST_IN_TEXT and not name.isdigit() and name in self._numbers["patch"]:
                return f"patch-{self.of('patch', name)}{suffix}"
        return token


def _match_any(ids: Iterable[str]) -> re.Pattern[str] | None:
    """Return a pattern that matches complete ids, the longest first."""
    names = "|".join(re.escape(name) for name in sorted(ids, key=len, reverse=True))
    return re.compile(rf"(?<![A-Za-z0-9])(?:{names})(?![A-Za-z0-9])") if names else None


def _number(names: Iterable[object], salt: str) -> dict[str, str]:
    ids = {str(name) for name in names if not pd.isna(name)}
    order = sorted(ids, key=lambda name: hashlib.sha256(f"{salt}/{name}".encode()).digest())
    width = len(str(len(order)))
    return {name: f"{index:0{width}d}" for index, name in enumerate(order, start=1)}
