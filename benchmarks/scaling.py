"""Time and peak memory of the commands as archives and cohorts grow: linear in time, flat in memory?

Archives of 5,000 to 320,000 patches (the patches of an IDC archive, repeated under other patients' ids) go
through ``prepare``, ``inspect``, ``split``, one epoch of ``train idc-small`` and ``predict idc``; 1, 4 and 16
synthetic slides through ``slide idc``. Every command is a process of its own; its peak resident memory is
what the system counts (`os.wait4`), pages of memory-mapped files among it.

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

from recording import append_rows
from training_speed import describe_machine

RESULTS = Path(__file__).parent / "results" / "scaling.csv"
SIZES = (5_000, 20_000, 80_000, 320_000)
SLIDES = (1, 4, 16)
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


def measure(arguments: Sequence[str]) -> tuple[float, float]:
    """Return the seconds and the peak resident MB of a command."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", "from biopsy.cli import main; main()", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    message = process.stderr.read() if process.stderr else b""
    _, status, usage = os.wait4(process.pid, 0)
    has_copies = arguments[0] == "inspect"  # which are blocking issues: exit code 1
    if os.waitstatus_to_exitcode(status) not in (0, int(has_copies)):
        raise SystemExit(f"biopsy {' '.join(arguments)} failed:\n{message.decode()}")
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def note(command: str, size: int, measured: tuple[float, float]) -> None:
    """Append a row and print it."""
    seconds, peak_mb = measured
    row = {"command": command, "size": size, "seconds": round(seconds, 1), "peak_rss_mb": round(peak_mb)}
    row |= {"load": round(os.getloadavg()[0], 1)} | describe_machine()
    append_rows(RESULTS, [row])
    print(f"{command:>8} {size:>8,} {seconds:8.1f} s {peak_mb:8.0f} MB", flush=True)


def measure_patches(source: Path, n_patches: int, folder: Path) -> None:
    """Measure the commands on an archive."""
    archive, pack, run = folder / "patches.zip", folder / "patches.pack", folder / "run"
    repeat_archive(source, archive, n_patches)
    note("prepare", n_patches, measure(["prepare", str(archive), "--out", str(pack), "--dataset", "idc"]))
    archive.unlink()
    note("inspect", n_patches, measure(["inspect", str(pack)]))
    note("split", n_patches, measure(["split", str(pack), "--protocol", "patients"]))
    train = ["train", "idc-small", "--data", str(pack), "--split", "patients", "--out", str(run)]
    note("train", n_patches, measure([*train, "--set", "train.epochs=1", "--set", "model.context=0"]))
    note("predict", n_patches, measure(["predict", "idc", str(pack), "--out", str(folder / "p.parquet")]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="a zip in IDC's layout")
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES)
    parser.add_argument("--slides", type=int, nargs="*", default=SLIDES)
    arguments = parser.parse_args()
    for n_patches in arguments.sizes:
        with tempfile.TemporaryDirectory() as name:
            measure_patches(arguments.source, n_patches, Path(name))
    for n_slides in arguments.slides:
        with tempfile.TemporaryDirectory() as name:
            slides = [str(path) for path in draw_slides(Path(name), n_slides)]
            note("slide", n_slides, measure(["slide", "idc", *slides, "--out", str(Path(name) / "maps")]))
