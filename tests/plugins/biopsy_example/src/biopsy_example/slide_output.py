"""An output for slides."""

from pathlib import Path
from typing import Any

from biopsy.slides.outputs import MappedSlide, slide_output


@slide_output("example-largest.csv")
def write_largest(path: Path, mapped: MappedSlide) -> dict[str, Any]:
    areas = {name: 0.0 for name in mapped.slide_map.class_names}
    for region in mapped.regions:
        areas[region.class_name] = max(areas[region.class_name], region.area_mm2)
    lines = ["class,area_mm2", *(f"{name},{area}" for name, area in areas.items())]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {"example_largest_mm2": areas}
