"""Report section on the slides mapped into the folder of a run."""

import logging
from collections.abc import Sequence

import cv2

from biopsy.models.out_of_distribution import QUANTILE, expected_share
from biopsy.reporting.document import Block, Bullets, Picture, Pictures, Section, Table, Text, number
from biopsy.reporting.facts import RunFacts
from biopsy.reporting.registry import Result, section
from biopsy.slides.outputs import OVERLAY, SUMMARY, UNRELIABLE, SlideSummary, read_summary
from biopsy.training.runs import Run

MAPS = "slides"
"""Folder of a run with its mapped slides."""
MOST_MAPS, MAP_PX = 12, 1200

logger = logging.getLogger(__name__)


def load_maps(run: Run) -> list[tuple[SlideSummary, bytes]]:
    """Return summary and overlay of the slides mapped into the folder of a run."""
    result = []
    for path in sorted((run.path / MAPS).glob(f"*/{SUMMARY}"))[:MOST_MAPS]:
        overlay = cv2.imread(str(path.parent / OVERLAY))
        if overlay is None:
            logger.warning("%s has no readable %s: its map is not in the report", path.parent, OVERLAY)
            continue
        scale = min(1.0, MAP_PX / max(overlay.shape))
        small = cv2.resize(overlay, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        image = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 85])[1].tobytes()
        result.append((read_summary(path.parent), image))
    return result


@section(
    "maps", order=90, slide_maps=Result(load_maps, hide=lambda maps, pseudonymizer: None)
)  # a name is drawn on each
def describe_maps(facts: RunFacts) -> Section | None:
    """Mapped slides with pictures, areas and their calibrated range."""
    maps = facts.result("slide_maps", list)
    if not maps:
        return None
    warned = [summary for summary, _ in maps if summary.get("warning")]
    pictures = [
        Picture(f"{result['slide']}: probability of {facts.positive} over the tissue.", image=image)
        for result, image in maps
    ]
    blocks: list[Block] = [
        Text(
            "Each cell of the grid is one patch, read from the slide at the resolution (µm per pixel) of the "
            "training data. Cells without colour contain no tissue."
        ),
        *([Bullets([f"{summary['slide']}: {summary['warning']}." for summary in warned])] if warned else []),
        Pictures(pictures, across=1),
        _table_of_areas([result for result, _ in maps], facts.positive),
    ]
    return Section("maps", "Whole-slide maps", blocks)


def _table_of_areas(summaries: Sequence[SlideSummary], positive: str) -> Table:
    rows = []
    for summary in summaries:
        area, class_area = summary["positive"], summary["classes"].get(positive)
        low, high = (area["low_mm2"], area["high_mm2"]) if area else (None, None)
        checked = summary.get("out_of_distribution")
        rows.append(
            [
                str(summary["slide"]),
                number(summary.get("n_patches")),
                number(summary.get("mapped_mm2"), 2),
                number(area and area["area_mm2"], 2) + (UNRELIABLE if summary.get("warning") else ""),
                f"{number(low, 2)} to {number(high, 2)}" if low is not None else "not calibrated",
                number(class_area and class_area["largest_region_mm2"], 2),
                number(summary.get("abstained_share")),
                number(checked and checked["share"]),
            ]
        )
    columns = [
        "slide",
        "patches",
        "mapped, mm²",
        f"{positive}, mm²",
        "range",
        "largest region, mm²",
        "abstained",
    ]
    columns.append("out of distribution")
    quantiles = [share["quantile"] for summary in summaries if (share := summary.get("out_of_distribution"))]
    quantile = quantiles[0] if quantiles else QUANTILE
    low, high = expected_share(quantile)
    note = (
        "Range: from the area with a calibrated probability of at least 0.9 to the area with at least 0.1. "
        "Abstained: share of cells on which the classifier abstains. Out of distribution: share of up to 250 "
        f"patches whose colours or features lie beyond the {100 * quantile:.0f}th percentile of validation; "
        f"far above the {100 * low:.0f}-{100 * high:.0f} % expected, probabilities and areas are unreliable."
    )
    return Table(columns, rows, caption="Areas", note=note)
