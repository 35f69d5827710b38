"""A chapter on the whole slides that a run has mapped into its own folder."""

from collections.abc import Mapping, Sequence
from typing import Any

from biopsy.reporting.document import Block, Picture, Pictures, Section, Table, Text, number
from biopsy.reporting.facts import RunFacts


def describe_maps(facts: RunFacts) -> Section | None:
    """The mapped slides: pictures, and areas with the range that calibration allows."""
    if not facts.maps:
        return None
    pictures = [
        Picture(f"{found['slide']}: probability of {facts.positive} over the tissue.", image=image)
        for found, image in facts.maps
    ]
    blocks: list[Block] = [
        Text(
            "Each cell of the grid is one patch, read from the slide at the classifier's own resolution. "
            "Cells without a colour are no tissue."
        ),
        Pictures(pictures, across=1),
        _table_of_areas([found for found, _ in facts.maps], facts.positive),
    ]
    return Section("maps", "Whole slides", blocks)


def _table_of_areas(summaries: Sequence[Mapping[str, Any]], positive: str) -> Table:
    rows = []
    for summary in summaries:
        found = summary.get("positive") or {}
        low, high = found.get("low_mm2"), found.get("high_mm2")
        rows.append(
            [
                str(summary["slide"]),
                number(summary.get("n_patches")),
                number(summary.get("mapped_mm2"), 2),
                number(found.get("area_mm2"), 2),
                f"{number(low, 2)} to {number(high, 2)}" if low is not None else "not calibrated",
                number(summary.get("classes", {}).get(positive, {}).get("largest_region_mm2"), 2),
                number(summary.get("abstained_share")),
                number((summary.get("unlike_training") or {}).get("share")),
            ]
        )
    columns = ["slide", "patches", "mapped, mm2", f"{positive}, mm2", "range", "largest region", "no answer"]
    columns.append("unlike training")
    note = (
        "Range: from the area whose calibrated probability is .9 or more to the area where it is .1 or more. "
        "No answer: share of the cells on which the classifier abstains. Unlike training: share of up to 250 "
        "patches whose colours or features lie beyond those of 99% of validation; where it is many times 1%, "
        "probabilities and areas mean little."
    )
    return Table(columns, rows, caption="Areas", note=note)
