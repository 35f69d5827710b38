"""How fast `biopsy prepare` reads a zip of patches, and how much memory it takes.

Speed: timed in turn, in one process, on the same archive,

* ``prepare``: from the zip to a pack on disk: listed, checked, decoded on all cores, hashed, written;
* ``reading``: the part of it between the first and the last call of its progress: decoded, hashed, written;
* ``decoder``: the decoder alone on all cores, from files that are in memory already, nothing kept;
* ``pillow``: the usual loop, one thread: zipfile or files, ``Image.open(...).convert("RGB")``, into an array.

``--kinds folder doubled`` first unpacks the archive into a folder, or writes it as Kaggle has it today, every
patch a second time below ``IDC_regular_ps50_idx5/``; ``prepare`` then reads that.

Memory: an archive like Kaggle's of today, every patch at the root and again below ``IDC_regular_ps50_idx5/``,
made of phantom patches whose pixels are all shifted differently, is prepared in a fresh process that watches
its own resident pages. ``peak_rss_mb`` is all of them, the mapped archive included; ``peak_anonymous_mb``
those that no file backs. The pack is written, not mapped, so none of its pages are in either.

Commands::

    python benchmarks/prepare_speed.py ../shared/data/idc/idc_kaggle_subset.zip --kinds zip folder doubled
    python benchmarks/prepare_speed.py --full-size 277524

On a machine that others use too, put ``chrt -r 1`` before the first command: its few seconds are then not
shared, and the row says so. Rows are appended to ``results/prepare-speed.csv`` and
``results/prepare-memory.csv``.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import cv2
import numpy as np
import PIL
from PIL import Image

from biopsy.data.prepare import prepare
from biopsy.models.hardware import count_cores
from biopsy.phantom.cohort import iter_patches
from biopsy.slide_io.images import decode
from recording import append_rows

RESULTS = Path(__file__).parent / "results"


def describe_machine() -> dict[str, object]:
    """Return what a reader needs to compare: processor, cores, load by others, versions."""
    processor = platform.processor()
    if Path("/proc/cpuinfo").exists():
        names = [
            line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")
        ]
        processor = names[0].partition(":")[2].strip() if names else processor
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "processor": processor,
        "cores": os.cpu_count(),
        "load_at_start": round(os.getloadavg()[0], 1),
        "real_time": os.sched_getscheduler(0) != os.SCHED_OTHER,
        "python": platform.python_version(),
        "opencv": cv2.__version__,
        "pillow": PIL.__version__,
    }


def write_row(name: str, row: dict[str, object]) -> None:
    """Append a row to a csv in the results folder."""
    path = RESULTS / name
    append_rows(path, [row])
    print("\n".join(f"{key:>18}: {value}" for key, value in row.items()))


def read_by_pillow(source: Path) -> np.ndarray:
    """Decode a zip or folder of patches the usual way; none is larger than the first."""
    with contextlib.ExitStack() as stack:
        if source.is_dir():
            names = [str(path) for path in source.rglob("*") if path.suffix in (".png", ".jpg")]
            read = lambda name: Path(name).read_bytes()  # noqa: E731
        else:
            archive = stack.enter_context(zipfile.ZipFile(source))
            names, read = [n for n in archive.namelist() if n.endswith((".png", ".jpg"))], archive.read
        first = Image.open(io.BytesIO(read(names[0])))
        patches = np.zeros((len(names), first.height, first.width, 3), np.uint8)
        for row, name in enumerate(names):
            patch = np.asarray(Image.open(io.BytesIO(read(name))).convert("RGB"))
            patches[row, : patch.shape[0], : patch.shape[1]] = patch
    return patches


def time_prepare(source: Path, out: Path) -> tuple[float, float]:
    """Return patches per second of `prepare` as a whole and of its reading."""
    calls: list[tuple[float, int]] = []
    start = time.perf_counter()
    n_patches = len(
        prepare(source, out, on_progress=lambda done, _: calls.append((time.perf_counter(), done)))
    )
    seconds = time.perf_counter() - start
    (first, done_first), (last, done_last) = calls[0], calls[-1]
    return n_patches / seconds, (done_last - done_first) / (last - first)


def time_decoder(source: Path) -> float:
    """Return patches per second of the decoder alone on all cores."""
    with zipfile.ZipFile(source) as archive:
        files = [archive.read(name) for name in archive.namelist() if name.endswith((".png", ".jpg"))]
    parts = [files[start : start + 64] for start in range(0, len(files), 64)]

    def decode_all(part: list[bytes]) -> None:
        for file in part:
            decode(file)

    start = time.perf_counter()
    with ThreadPoolExecutor(count_cores()) as pool:
        list(pool.map(decode_all, parts))
    return len(files) / (time.perf_counter() - start)


def write_kind(kind: str, source: Path, folder: Path) -> Path:
    """Return the patches of an archive as ``zip``, ``folder`` or ``doubled`` archive."""
    if kind == "zip":
        return source
    with zipfile.ZipFile(source) as archive:
        if kind == "folder":
            archive.extractall(folder / "patches")
            return folder / "patches"
        with zipfile.ZipFile(folder / "doubled.zip", "w") as doubled:
            for name in archive.namelist():
                for root in ("", "IDC_regular_ps50_idx5/"):
                    doubled.writestr(root + name, archive.read(name))
    return folder / "doubled.zip"


def time_pillow(source: Path) -> float:
    """Return patches per second of the usual loop."""
    start = time.perf_counter()
    return len(read_by_pillow(source)) / (time.perf_counter() - start)


def compare_speed(source: Path, kind: str, repeats: int) -> None:
    """Time all in turn, after one warm-up of each."""
    rates: dict[str, list[float]] = {"prepare": [], "reading": [], "decoder": [], "pillow": []}
    with tempfile.TemporaryDirectory() as folder:
        given = write_kind(kind, source, Path(folder))
        for repeat in range(repeats + 1):
            out = Path(folder) / f"{repeat}.pack"
            whole, reading = time_prepare(given, out)
            shutil.rmtree(out)
            turn = (whole, reading, time_decoder(source), time_pillow(given if kind == "folder" else source))
            if repeat:
                for name, rate in zip(rates, turn, strict=True):
                    rates[name].append(rate)
    row: dict[str, object] = {"archive": source.name, "kind": kind, "repeats": repeats}
    for name, values in rates.items():
        row[f"{name}_per_s"] = round(statistics.median(values))
    for ours, other in itertools.product(("prepare", "reading"), ("pillow", "decoder")):
        ratios = [own / theirs for own, theirs in zip(rates[ours], rates[other], strict=True)]
        row[f"{ours}_beside_{other}"] = round(statistics.median(ratios), 2)
        row[f"{ours}_beside_{other}_range"] = f"{min(ratios):.2f}-{max(ratios):.2f}"
    write_row("prepare-speed.csv", row | describe_machine())


def write_full_size_archive(path: Path, n_patches: int, n_painted: int = 2000) -> None:
    """Write phantom patches as Kaggle's archive has IDC's, each painted one many times, shifted in colour."""
    painted = list(itertools.islice(iter_patches(8, n_painted // 8, seed=0), n_painted))
    with zipfile.ZipFile(path, "w") as archive:
        for index in range(n_patches):
            copy, patch = index // len(painted), painted[index % len(painted)]
            pixels = patch.image + np.array([copy % 16, copy // 16 % 16, copy // 256], np.uint8)
            patient = int(patch.patient_id) + 100 * copy
            name = f"{patient}_idx5_x{patch.x}_y{patch.y}_class{patch.target}.png"
            done, encoded = cv2.imencode(".png", pixels[..., ::-1])
            assert done
            for root in ("", "IDC_regular_ps50_idx5/"):
                archive.writestr(f"{root}{patient}/{patch.target}/{name}", encoded.tobytes())


def read_memory() -> dict[str, int]:
    """Return this process's memory by kind, in kB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith(("Vm", "Rss"))}


def prepare_and_watch(source: Path, out: Path) -> None:
    """Prepare a pack, print how long it took and how much memory, as JSON."""
    at_start = read_memory()
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], read_memory()["RssAnon"])

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    pack = prepare(source, out)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    row = {
        "patches": len(pack),
        "duplicates": pack.info.counts["duplicates"],
        "seconds": round(seconds, 1),
        "per_s": round(len(pack) / seconds),
        "rss_at_start_mb": at_start["VmRSS"] // 1000,
        "peak_rss_mb": read_memory()["VmHWM"] // 1000,
        "peak_anonymous_mb": peak[0] // 1000,
        "archive_mb": source.stat().st_size // 10**6,
        "pack_mb": sum(pack.info.files.values()) // 10**6,
    }
    print(json.dumps(row))


def measure_memory(n_patches: int) -> None:
    """Make the archive, prepare it in a process of its own, write what that one saw."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "phantom.zip"
        write_full_size_archive(source, n_patches)
        command = [sys.executable, __file__, str(source), "--watch", str(Path(folder) / "phantom.pack")]
        answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    write_row("prepare-memory.csv", json.loads(answer.splitlines()[-1]) | describe_machine())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "source", nargs="?", type=Path, help="a zip of patches, all of one size or smaller than the first"
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--kinds", nargs="+", choices=("zip", "folder", "doubled"), default=["zip"])
    parser.add_argument(
        "--full-size", type=int, metavar="N", help="measure memory on a phantom archive of N patches"
    )
    parser.add_argument("--watch", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.full_size:
        measure_memory(arguments.full_size)
    elif arguments.watch:
        prepare_and_watch(arguments.source, arguments.watch)
    elif arguments.source:
        for kind in arguments.kinds:
            compare_speed(arguments.source, kind, arguments.repeats)
    else:
        parser.error("a zip or --full-size is needed")
