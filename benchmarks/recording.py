"""Results of benchmarks, kept as rows of a csv that grows with every run."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path


def append_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Append rows to a table; columns that only one of them has are empty in the others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    earlier: list[dict[str, str]] = []
    if path.exists():
        with open(path, newline="", encoding="utf-8") as file:
            earlier = list(csv.DictReader(file))
    columns = dict.fromkeys(name for row in (*earlier, *rows) for name in row)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows([*earlier, *rows])
