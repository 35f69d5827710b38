"""The sections of a run's report: each feature registers its own, beside what it measures.

To add one, write a module named ``section.py`` in the feature's folder with a function under `section`; a
package outside this one names its module under the entry point group ``biopsy.sections``. A section renders
what its feature has measured and computes nothing: where that is missing it is left out, and the report names
the command that makes it.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from biopsy.reporting.document import Section
from biopsy.reporting.facts import RunFacts
from biopsy.reporting.pseudonyms import Aliases
from biopsy.training.runs import Run

MODULES = ("section.py", "sections.py")
ENTRY_POINTS = "biopsy.sections"

Compose = Callable[[RunFacts], Section | None]

logger = logging.getLogger(__name__)


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
    hide: Callable[[Any, Aliases], Any] = lambda value, aliases: aliases.nested(value)
    title: str = ""
    command: str = ""
    make: Callable[[Run], Any] | None = None
    applies: Callable[[Run], bool] = lambda run: True


_SECTIONS: dict[str, tuple[float, Compose]] = {}
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
        _SECTIONS[name] = (order, compose)
        _RESULTS.update(results)
        return compose

    return register


def list_sections() -> list[Compose]:
    """Return the functions that write sections, in the order of the report."""
    _import_modules()
    return [compose for _, compose in sorted(_SECTIONS.values(), key=lambda entry: entry[0])]


def list_results() -> dict[str, Result]:
    """Return what sections render beyond the run's own records, by name."""
    _import_modules()
    return dict(_RESULTS)


@cache
def _import_modules() -> None:
    """Import every module of this package and of installed ones that registers sections."""
    package = Path(__file__).parents[1]
    for path in sorted(path for name in MODULES for path in package.rglob(name)):
        import_module(".".join((package.name, *path.relative_to(package).with_suffix("").parts)))
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            entry.load()
        except Exception as error:  # a package of somebody else's; the rest of the report works
            logger.warning("section %s of %s cannot be loaded: %s", entry.name, entry.value, error)
