"""Registry of the sections of a run's report.

To add one, write a module named ``section.py`` in the folder of the feature with a function under `section`;
other packages declare their module in the entry point group ``biopsy.sections``. A section renders stored
results and computes nothing: without them it is left out, and the report lists the command to compute them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from biopsy.core.plugins import Registry
from biopsy.reporting.document import Section
from biopsy.reporting.facts import RunFacts
from biopsy.reporting.pseudonyms import Pseudonymizer
from biopsy.training.runs import Run

Compose = Callable[[RunFacts], Section | None]


@dataclass(frozen=True)
class Result:
    """Stored results of a feature.

    Attributes:
        load: Returns the results of a run, None if missing.
        hide: Replaces ids by pseudonyms.
        title: Title of missing results in the report; if empty, they are not listed.
        command: The command that computes them; ``{run}`` is the folder of the run.
        applies: Whether they are defined for a run.
    """

    load: Callable[[Run], Any]
    hide: Callable[[Any, Pseudonymizer], Any] = lambda value, pseudonymizer: pseudonymizer.nested(value)
    title: str = ""
    command: str = ""
    make: Callable[[Run], Any] | None = None
    applies: Callable[[Run], bool] = lambda run: True


_SECTIONS: Registry[tuple[float, Compose]] = Registry(
    "biopsy.sections", "biopsy", ("section.py", "*sections.py")
)
_RESULTS: dict[str, Result] = {}


def section(name: str, *, order: float, **results: Result) -> Callable[[Compose], Compose]:
    """Register a section of the report.

    Args:
        name: Its identifier, unique among sections.
        order: Position in the report; sections are in increasing order.
        **results: Additional results it renders, by the name for ``facts.result``.
    """

    def register(compose: Compose) -> Compose:
        _SECTIONS.add(name, (order, compose), compose)
        _RESULTS.update(results)
        return compose

    return register


def list_sections() -> list[Compose]:
    """Return the functions of the sections, in the order of the report."""
    return [compose for _, compose in sorted(_SECTIONS.values(), key=lambda entry: entry[0])]


def list_results() -> dict[str, Result]:
    """Return the additional results of sections, by name."""
    _SECTIONS.load()
    return dict(_RESULTS)
