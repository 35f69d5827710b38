"""Results of benchmarks, kept as rows of a csv that grows with every run."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path


def append_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Append rows to a table, with its header where it is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)
