"""Base class of results: a JSON document with a table and notebook representation."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False, repr=False)
class Result(Mapping[str, Any]):
    """Result of a command: ``result[key]`` is an entry of the JSON document that the command writes.

    The representation consists of ``heading`` and table (`to_frame`).

    Attributes:
        document: The content of the JSON document.
    """

    document: Mapping[str, Any]

    def __getitem__(self, key: str) -> Any:
        return self.document[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.document)

    def __len__(self) -> int:
        return len(self.document)

    @property
    @abstractmethod
    def heading(self) -> str:
        """One sentence above the table."""

    @abstractmethod
    def to_frame(self) -> "pd.DataFrame":
        """Return the result as a table."""

    def to_dict(self) -> dict[str, Any]:
        """Return the content of the JSON document."""
        return dict(self.document)

    def __repr__(self) -> str:
        return f"{self.heading}\n{self.to_frame().round(3).to_string()}"

    def _repr_html_(self) -> str:
        return f"<p>{escape(self.heading)}</p>{self.to_frame().round(3).to_html(na_rep='')}"
