"""Results of benchmarks, kept as rows of a csv that grows with every run."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path


def append_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Append rows to a table; columns that only one of them has are empty in the others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header: list[str] = []
    earlier: list[dict[str, str]] = []
    if path.exists():
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            header, earlier = list(reader.fieldnames or []), list(reader)
    columns = list(dict.fromkeys([*header, *(name for row in rows for name in row)]))
    with open(path, "a" if columns == header else "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if columns != header:
            writer.writeheader()
            writer.writerows(earlier)
        writer.writerows(rows)
