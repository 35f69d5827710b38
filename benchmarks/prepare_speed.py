"""How fast `biopsy prepare` reads a zip of patches, and how much memory it takes.

Measures, alternating in one process, on the same archive:

* ``prepare``: from the zip to a finished pack on disk (listed, checked, decoded on all cores, hashed, written);
* ``pillow``: the loop many scripts have: zipfile, ``Image.open(...).convert("RGB")``, one thread, into an array.

Commands::

    python benchmarks/prepare_speed.py ../shared/data/idc/idc_kaggle_subset.zip
    python benchmarks/prepare_speed.py --full-size 277524

The second makes an archive of that many 50 x 50 patches in IDC's layout (phantom patches, each with pixels
of its own) and prints the peak memory of `prepare` in a fresh process: all resident pages, and those not backed
by a file, which leave out the pack's and the archive's own. Both write a row to ``benchmarks/results``.
"""

import argparse
import csv
import io
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from datetime import UTC, datetime
from pathlib import Path

import cv2
import numpy as np
import PIL
from PIL import Image

from biopsy.data.packing import prepare

RESULTS = Path(__file__).parent / "results"


def describe_machine() -> dict[str, object]:
    """Give what a reader needs to compare: processor, cores, load by others, versions."""
    processor = platform.processor()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        processor = names[0].partition(":")[2].strip() if names else processor
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "processor": processor,
        "cores": os.cpu_count(),
        "load_at_start": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "opencv": cv2.__version__,
        "pillow": PIL.__version__,
    }


def write_row(name: str, row: dict[str, object]) -> None:
    """Append a row to a csv in the results folder."""
    path = RESULTS / name
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow(row)
    print("\n".join(f"{key:>18}: {value}" for key, value in row.items()))


def read_by_pillow(source: Path) -> np.ndarray:
    """Decode a zip of patches of up to 50 x 50 pixels the usual way."""
    with zipfile.ZipFile(source) as archive:
        names = [name for name in archive.namelist() if name.endswith((".png", ".jpg"))]
        first = Image.open(io.BytesIO(archive.read(names[0])))
        patches = np.zeros((len(names), first.height, first.width, 3), np.uint8)
        for row, name in enumerate(names):
            patch = np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB"))
            patches[row, : patch.shape[0], : patch.shape[1]] = patch
    return patches


def compare_speed(source: Path, repeats: int) -> None:
    """Time both, alternating, after one warm-up of each."""
    times: dict[str, list[float]] = {"prepare": [], "pillow": []}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(repeats + 1):
            out = Path(folder) / f"{repeat}.pack"
            for name, work in (("prepare", lambda out=out: prepare(source, out)), ("pillow", lambda: read_by_pillow(source))):
                start = time.perf_counter()
                n_patches = len(work())
                if repeat:
                    times[name].append(time.perf_counter() - start)
            shutil.rmtree(out)
    rates = {name: [n_patches / seconds for seconds in values] for name, values in times.items()}
    ratios = [ours / theirs for ours, theirs in zip(rates["prepare"], rates["pillow"], strict=True)]
    row: dict[str, object] = {"archive": source.name, "patches": n_patches, "repeats": repeats}
    for name, values in rates.items():
        row[f"{name}_per_s"] = round(statistics.median(values))
        row[f"{name}_spread"] = f"{min(values):.0f}-{max(values):.0f}"
    row["ratio"] = round(statistics.median(ratios), 2)
    row["ratio_spread"] = f"{min(ratios):.2f}-{max(ratios):.2f}"
    write_row("prepare-speed.csv", row | describe_machine())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", type=Path, help="a zip of patches")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    compare_speed(arguments.source, arguments.repeats)
