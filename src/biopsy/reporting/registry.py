"""The sections of a run's report: each feature registers its own, beside what it measures.

To add one, write a module named ``section.py`` in the feature's folder with a function under `section`; a
package outside this one names its module under the entry point group ``biopsy.sections``. A section renders
what its feature has measured and computes nothing: where that is missing it is left out, and the report names
the command that makes it.
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
    """What a feature has measured of a run and kept on disk.

    Attributes:
        load: Return it, None where it has not been measured.
        hide: Replace the ids in it by pseudonyms.
        title: Name of what is missing where it has not been measured; empty if nobody need be told.
        command: The command that makes it; ``{run}`` is the run's folder.
        make: Measure it, and keep it in the run.
        applies: Whether it can be measured of this run.
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
        order: Place in the report; sections stand in increasing order.
        **results: What it renders beyond the run's own records, by the name under which the section finds it
            in ``facts.results``.
    """

    def register(compose: Compose) -> Compose:
        _SECTIONS.add(name, (order, compose), compose)
        _RESULTS.update(results)
        return compose

    return register


def list_sections() -> list[Compose]:
    """Return the functions that write sections, in the order of the report."""
    return [compose for _, compose in sorted(_SECTIONS.values(), key=lambda entry: entry[0])]


def list_results() -> dict[str, Result]:
    """Return what sections render beyond the run's own records, by name."""
    _SECTIONS.load()
    return dict(_RESULTS)
