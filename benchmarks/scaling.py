"""Time and peak memory of the commands as archives and cohorts grow: linear in time, flat in memory?

Archives of 5,000 to 320,000 patches (the patches of an IDC archive, repeated under other patients' ids) go
through ``prepare``, ``inspect``, ``split``, one epoch of ``train idc-small`` and ``predict idc``; 1, 4 and 16
copies of a synthetic slide through ``slide idc``. Every command is a process of its own; its seconds of
processor time are what the system counts (`os.wait4`). Its peak resident memory is the mark that Linux keeps
(VmHWM), and the peak without pages of memory-mapped files, which the system takes back when it needs them,
the highest value seen; both are read 20 times a second.

    python benchmarks/scaling.py ../shared/data/idc/idc_kaggle_subset.zip

Results: ``results/scaling.csv``, a row per command and size.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Sequence
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
    """Write a synthetic slide of `SLIDE_PX` pixels a side, and copies of it under other names."""
    from biopsy.phantom.slides import make_phantom_slide

    first, *others = [folder / f"slide-{number:02}.tiff" for number in range(n_slides)]
    make_phantom_slide(first, seed=0, width=SLIDE_PX, height=SLIDE_PX, mpp=SLIDE_MPP)
    return [first, *(Path(shutil.copy(first, path)) for path in others)]


class Usage(NamedTuple):
    """What a command took."""

    seconds: float
    cpu_seconds: float
    peak_rss_mb: float
    peak_anon_mb: float

    def round(self) -> dict[str, float]:
        """Return the columns of a table."""
        return {name: round(value, 1) for name, value in self._asdict().items()}


def measure(
    arguments: Sequence[str],
    folder: Path | None = None,
    port: int | None = None,
    visit: Callable[[int], None] | None = None,
    before: str = "",
) -> Usage:
    """Run a command and return what it took; one that serves a port is interrupted once it has answered.

    Args:
        arguments: The words after ``biopsy``.
        folder: Where it runs.
        port: Port that it serves.
        visit: Called with the port, to ask for more before the interruption.
        before: Code that is run before the command.
    """
    start, peak_mb, ended = time.perf_counter(), [0.0, 0.0], 0
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", f"{before}\nfrom biopsy.cli import main; main()", *arguments],
            stdout=subprocess.DEVNULL,
            stderr=errors,
            cwd=folder,
        )
        while not ended:
            peak_mb = [max(pair) for pair in zip(peak_mb, read_memory(process.pid), strict=True)]
            if port and is_answering(port):
                if visit:
                    visit(port)
                    peak_mb = [max(pair) for pair in zip(peak_mb, read_memory(process.pid), strict=True)]
                process.send_signal(signal.SIGINT)
                port = None
            time.sleep(0.05)
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        has_copies = arguments[0] == "inspect"  # which are blocking issues: exit code 1
        if process.returncode not in (0, int(has_copies)):
            raise SystemExit(f"biopsy {' '.join(arguments)} failed:\n{errors.read().decode()}")
    seconds = time.perf_counter() - start
    return Usage(seconds, usage.ru_utime + usage.ru_stime, *peak_mb)


def is_answering(port: int) -> bool:
    """Return whether a page is served at a port of this machine."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=60) as answer:
            return bool(answer.read())
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


def read_memory(process_id: int) -> tuple[float, float]:
    """Return the peak resident MB of a process, and those now that belong to no file."""
    try:
        lines = Path(f"/proc/{process_id}/status").read_text().splitlines()
    except OSError:
        return 0.0, 0.0
    values = dict(line.split(":", 1) for line in lines)
    peak, anonymous = (int(values.get(name, "0 kB").split()[0]) / 1024 for name in ("VmHWM", "RssAnon"))
    return peak, anonymous


def note(command: str, size: int, usage: Usage) -> None:
    """Append a row and print it."""
    row: dict[str, object] = {"command": command, "size": size}
    row |= usage.round()
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
