"""Items of two reporting guidelines, linked to the sections of a report that address them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from typing_extensions import TypedDict

from biopsy.core.loaders import load_toml, validate
from biopsy.reporting.document import Checklist, ChecklistItem, Section, Text

TOP = ("answer", "Summary")


@dataclass(frozen=True)
class GuidelineItem:
    """An item of a guideline.

    Attributes:
        number: Number in the guideline; empty for additions of STARD-AI.
        text: The item, paraphrased.
        sections: Ids of the sections that address it; those in the report are linked.
    """

    number: str
    text: str
    sections: Sequence[str]


class _Guideline(TypedDict):
    items: list[tuple[str, str, list[str]]]


@cache
def load_guidelines() -> dict[str, list[GuidelineItem]]:
    """Return the items of TRIPOD+AI and of STARD-AI by name of the guideline, from ``guidelines.toml``."""
    path = Path(__file__).with_name("guidelines.toml")
    document = validate(path, dict[str, _Guideline], load_toml(path))
    return {
        name: [GuidelineItem(*item) for item in guideline["items"]] for name, guideline in document.items()
    }


def describe_checklist(sections: Sequence[Section], *, has_subgroups: bool = False) -> Section:
    """Return the items of both guidelines, each linked to the sections that address it, or "not done".

    Args:
        has_subgroups: Whether the section on patients contains subgroups.
    """
    headings = dict([TOP, *((section.id, section.heading) for section in sections)])
    if has_subgroups and "patients" in headings:
        headings["subgroups"] = headings["patients"]
    lists = [
        Checklist(
            f"{guideline}: {sum(bool(_find(item, headings)) for item in items)} of {len(items)} items have a "
            "section here",
            [ChecklistItem(item.number, item.text, _find(item, headings)) for item in items],
        )
        for guideline, items in load_guidelines().items()
    ]
    note = Text(
        "A link shows where the report addresses an item, not that it does so completely. Most items without "
        "a link need information from those who collected the data.",
        "note",
    )
    return Section("checklist", "Reporting checklist", [note, *lists])


def _find(item: GuidelineItem, headings: dict[str, str]) -> list[tuple[str, str]]:
    """Return the anchors and headings of the sections that address an item."""
    return [
        ("patients" if section == "subgroups" else section, headings[section])
        for section in item.sections
        if section in headings
    ]
