"""Time and peak memory of the commands as archives and cohorts grow: linear in time, flat in memory?

Archives of 5,000 to 320,000 patches (the patches of an IDC archive, repeated under other patients' ids) go
through ``prepare``, ``inspect``, ``split``, one epoch of ``train idc-small`` and ``predict idc``; 1, 4 and 16
synthetic slides through ``slide idc``. Every command is a process of its own; its seconds of processor time
and its peak resident memory are what the system counts (`os.wait4`). Pages of memory-mapped files are among
it, which the system takes back when it needs them; the peak without them is looked at 20 times a second.

    python benchmarks/scaling.py ../shared/data/idc/idc_kaggle_subset.zip

Results: ``results/scaling.csv``, a row a command and size.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from recording import append_rows
from training_speed import describe_machine

RESULTS = Path(__file__).parent / "results" / "scaling.csv"
SIZES = (5_000, 20_000, 80_000, 320_000)
SLIDES = (1, 4, 16)
COMMANDS = ("prepare", "inspect", "split", "train", "predict")
SLIDE_PX, SLIDE_MPP = 4000, 0.5


def repeat_archive(source: Path, path: Path, n_patches: int) -> None:
    """Write an archive in IDC's layout: copies of the source's patients, each with an id of its own."""
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(path, "w") as target:
        names = sorted(name for name in archive.namelist() if name.endswith(".png"))
        contents = {name: archive.read(name) for name in names}
        for number in range(n_patches):
            copy, index = divmod(number, len(names))
            *_, class_name, file_name = names[index].split("/")
            patient, rest = file_name.split("_", 1)
            patient = f"{int(patient) + 20_000 * copy}"
            target.writestr(f"{patient}/{class_name}/{patient}_{rest}", contents[names[index]])


def draw_slides(folder: Path, n_slides: int) -> list[Path]:
    """Write synthetic slides of `SLIDE_PX` pixels a side."""
    from biopsy.phantom.slides import make_phantom_slide

    paths = [folder / f"slide-{number:02}.tiff" for number in range(n_slides)]
    for seed, path in enumerate(paths):
        make_phantom_slide(path, seed=seed, width=SLIDE_PX, height=SLIDE_PX, mpp=SLIDE_MPP)
    return paths


class Usage(NamedTuple):
    """What a command took."""

    seconds: float
    cpu_seconds: float
    peak_rss_mb: float
    peak_anon_mb: float


def measure(arguments: Sequence[str]) -> Usage:
    """Run a command and return what it took."""
    start, errors = time.perf_counter(), tempfile.TemporaryFile()
    process = subprocess.Popen(
        [sys.executable, "-c", "from biopsy.cli import main; main()", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=errors,
    )
    peak_anon_mb, ended = 0.0, 0
    while not ended:
        peak_anon_mb = max(peak_anon_mb, read_anonymous(process.pid))
        time.sleep(0.05)
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
    has_copies = arguments[0] == "inspect"  # which are blocking issues: exit code 1
    errors.seek(0)
    if os.waitstatus_to_exitcode(status) not in (0, int(has_copies)):
        raise SystemExit(f"biopsy {' '.join(arguments)} failed:\n{errors.read().decode()}")
    seconds = time.perf_counter() - start
    return Usage(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, peak_anon_mb)


def read_anonymous(process_id: int) -> float:
    """Return the resident MB of a process that belong to no file."""
    try:
        lines = Path(f"/proc/{process_id}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon")), 0.0)


def note(command: str, size: int, usage: Usage) -> None:
    """Append a row and print it."""
    row: dict[str, object] = {"command": command, "size": size}
    row |= {name: round(value, 1) for name, value in usage._asdict().items()}
    row |= {"load": round(os.getloadavg()[0], 1)} | describe_machine()
    append_rows(RESULTS, [row])
    values = "{:8.1f} s {:8.1f} CPU s {:8.0f} MB, {:8.0f} MB without files".format(*usage)
    print(f"{command:>8} {size:>8,} {values}", flush=True)


def measure_patches(source: Path, n_patches: int, commands: Sequence[str], folder: Path) -> None:
    """Measure the commands on an archive."""
    archive, pack, run = folder / "patches.zip", folder / "patches.pack", folder / "run"
    repeat_archive(source, archive, n_patches)
    train = ["--data", str(pack), "--split", "patients", "--out", str(run)]
    arguments = {
        "prepare": [str(archive), "--out", str(pack), "--dataset", "idc"],
        "inspect": [str(pack)],
        "split": [str(pack), "--protocol", "patients"],
        "train": ["idc-small", *train, "--set", "train.epochs=1", "--set", "model.context=0"],
        "predict": ["idc", str(pack), "--out", str(folder / "p.parquet")],
    }
    for command in commands:
        note(command, n_patches, measure([command, *arguments[command]]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="a zip in IDC's layout")
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=COMMANDS)
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES)
    parser.add_argument("--slides", type=int, nargs="*", default=SLIDES)
    arguments = parser.parse_args()
    for n_patches in arguments.sizes:
        with tempfile.TemporaryDirectory() as name:
            measure_patches(arguments.source, n_patches, arguments.commands, Path(name))
    for n_slides in arguments.slides:
        with tempfile.TemporaryDirectory() as name:
            slides = [str(path) for path in draw_slides(Path(name), n_slides)]
            note("slide", n_slides, measure(["slide", "idc", *slides, "--out", str(Path(name) / "maps")]))
