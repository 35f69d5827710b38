"""A section of the report."""

from biopsy.reporting.document import Section, Text
from biopsy.reporting.facts import RunFacts
from biopsy.reporting.registry import section


@section("example-image-size", order=145)
def describe_image_size(facts: RunFacts) -> Section | None:
    return Section("example-image-size", "Image size", [Text(f"Patches are {facts.patch_px} px wide.")])
