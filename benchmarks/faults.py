"""What interruptions and faults cost: every command is disturbed, repeated, and its result compared.

Command::

    python benchmarks/faults.py [--points 10] [--only prepare,slide] [--work DIR]

Each command runs once undisturbed on a small synthetic cohort. Then, ``--points`` times (10; 50 for the
full table), it gets SIGKILL, SIGTERM or SIGINT in turn at a random moment, two thirds of them between its
first write and its end, and is given again (`train --resume` where there is a run). A point is passed if
nothing printed a traceback, the command given again ended with exit code 0, its result equals the
undisturbed one, and no temporary file is left. Moments at which the command had ended already are drawn
again.

Then once each: no file may grow beyond half of the largest result (EFBIG, as a full disk), the output folder
is read-only, 24 file handles, two processes of the same command at once. Passed is: an error of one line or
the right result, no traceback, and the right result when given again without the fault.

Rows go to ``results/faults.csv``.
"""

import argparse
import csv
import hashlib
import json
import os
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import biopsy
from biopsy.core.files import LOCK
from biopsy.phantom.cohort import write_archive
from biopsy.phantom.slides import make_phantom_slide

RESULTS = Path(__file__).parent / "results" / "faults.csv"
COLUMNS = ("command", "fault", "passed", "tried", "seconds", "failures")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
CLI = (sys.executable, "-c", "from biopsy.cli import main; main()")
SETTINGS = (
    "preprocessing.input_px=16",
    "model.params.base_channels=4",
    "train.epochs=4",
    "train.batch_size=16",
)
CHANGING = (
    *("evaluated", "times_opened", "ledger", "document_sha256", "seconds", "images_per_s", "time_left_s"),
    *("started", "id", "command", "environment", "path", "run", "files"),
)


@dataclass(frozen=True)
class Command:
    """A command to disturb.

    Attributes:
        name: Of its row.
        arguments: What follows ``biopsy``, given the folder it writes into.
        results: Its results in that folder, by name, in a form in which equal ones compare equal.
        prepare: Brings the folder into the state before the command.
    """

    name: str
    arguments: Callable[[Path], list[str]]
    results: Callable[[Path], dict[str, str]]
    prepare: Callable[[Path], object] = lambda out: out.mkdir(parents=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=10)
    parser.add_argument("--only", default="")
    parser.add_argument("--work", type=Path, default=Path("faults-work"))
    options = parser.parse_args()
    commands = make_commands(options.work)
    for command in commands:
        if not options.only or command.name in options.only.split(","):
            for row in disturb(command, options.work / "out", options.points):
                append(row)


# --- what is disturbed
def make_commands(work: Path) -> list[Command]:
    """Draw a cohort and slides, train a run on it, and return the commands."""
    archive, pack, run, slides = work / "cohort.zip", work / "cohort.pack", work / "run", work / "slides"
    if not archive.exists():
        write_archive(archive, n_patients=6, patches_per_patient=60)
    biopsy.prepare(archive, pack)
    if not (pack / "splits").exists():
        biopsy.split(pack, protocol="patients", name="patients")
        biopsy.split(pack, protocol="folds", folds=2, name="folds")
    train = ["residual-small", "--data", str(pack), "--split", "patients", "--device", "cpu"]
    train += [word for setting in SETTINGS for word in ("--set", setting)]
    if not run.exists():
        biopsy.train("residual-small", pack, split="patients", overrides=SETTINGS, out=run, device="cpu")
    if not slides.exists():
        for name in "abcd":
            slide = slides / f"{name}.tiff"
            make_phantom_slide(slide, seed=1, patient=name, width=1000, height=800, mpp=2.0)

    def train_or_resume(out: Path) -> list[str]:
        place = out / "run"
        begun = (place / "run.json").exists()
        return ["train", "--resume", str(place)] if begun else ["train", *train, "--out", str(place)]

    def copy(out: Path) -> None:
        shutil.copytree(run, out / "run")

    study = ["study", "residual-small", "--data", str(pack), "--split", "folds", "--device", "cpu"]
    study += [word for setting in SETTINGS for word in ("--set", setting)]
    return [
        Command("prepare", lambda out: ["prepare", str(archive), "--out", str(out / "x.pack")], read_pack),
        Command(
            "slide", lambda out: ["slide", str(run), str(slides), "--out", str(out / "maps")], read_bytes
        ),
        Command("evaluate", lambda out: ["evaluate", str(out / "run")], read_evaluation, copy),
        Command("train", train_or_resume, read_run),
        Command("study", lambda out: [*study, "--out", str(out / "study")], read_study),
    ]


def read_pack(out: Path) -> dict[str, str]:
    return {"content": json.loads((out / "x.pack" / "pack.json").read_text())["content_sha256"]}


def read_bytes(out: Path) -> dict[str, str]:
    files = (path for path in out.rglob("*") if path.is_file() and path.name != LOCK)
    return {str(path.relative_to(out)): digest(path.read_bytes()) for path in files}


def read_evaluation(out: Path) -> dict[str, str]:
    path = out / "run" / "evaluation" / "metrics.json"
    predictions = out / "run" / "predictions" / "test.parquet"
    return {"metrics": strip(json.loads(path.read_text())), "predictions": digest(predictions.read_bytes())}


def read_run(out: Path) -> dict[str, str]:
    return read_trained(out / "run")


def read_trained(run: Path) -> dict[str, str]:
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    weights = digest((run / "classifier" / "weights.safetensors").read_bytes())
    predictions = digest((run / "predictions" / "val.parquet").read_bytes())
    return {"weights": weights, "log": strip(log), "predictions": predictions}


def read_study(out: Path) -> dict[str, str]:
    study = out / "study"
    runs = {path.name: read_trained(path) for path in sorted((study / "runs").iterdir())}
    predictions = digest((study / "predictions.parquet").read_bytes())
    return {"runs": json.dumps(runs), "predictions": predictions}


def strip(document: object) -> str:
    """Write a document without what differs from run to run: times and counts of openings."""

    def clean(value: object) -> object:
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items() if key not in CHANGING}
        return [clean(item) for item in value] if isinstance(value, list) else value

    return json.dumps(clean(document), sort_keys=True)


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# --- disturbances
def disturb(command: Command, out: Path, points: int):
    """Yield a row per kind of fault."""
    renew(command, out)
    started = time.monotonic()
    process = start(command, out)
    first_write = None
    before = set(out.rglob("*"))
    while process.poll() is None:
        if first_write is None and set(out.rglob("*")) != before:
            first_write = time.monotonic() - started
        time.sleep(0.02)
    seconds = time.monotonic() - started
    stderr = process.communicate()[1]
    if process.returncode:
        raise SystemExit(f"{command.name}, undisturbed: {stderr}")
    expected = command.results(out)
    first_write = min(first_write or 0.0, seconds)
    largest = max(path.stat().st_size for path in out.rglob("*") if path.is_file())
    rng = random.Random(0)
    for number in SIGNALS:
        failures, tried = [], 0
        began = time.monotonic()
        for point in range(-(-points // len(SIGNALS))):
            low = 0.0 if point % 3 == 0 else first_write
            problem = interrupt(command, out, number, lambda low=low: rng.uniform(low, seconds), expected)
            tried += 1
            failures += [problem] if problem else []
        yield row_of(command, number.name, tried, failures, time.monotonic() - began)
    faults: dict[str, Callable[[Path], list[str]]] = {
        "file size limit": lambda out: limited(command, out, resource.RLIMIT_FSIZE, largest // 2),
        "read-only folder": lambda out: read_only(command, out),
        "24 file handles": lambda out: limited(command, out, resource.RLIMIT_NOFILE, 24),
        "two at once": lambda out: twice(command, out),
    }
    for name, fault in faults.items():
        began = time.monotonic()
        renew(command, out)
        failures = fault(out)
        problem = go_on(command, out, expected)
        failures += [problem] if problem else []
        yield row_of(command, name, 1, failures, time.monotonic() - began)


def interrupt(
    command: Command, out: Path, number: int, moment: Callable[[], float], expected: dict[str, str]
) -> str | None:
    """Interrupt a command and give it again; return what went wrong."""
    for _ in range(20):
        renew(command, out)
        process = start(command, out)
        time.sleep(moment())
        if process.poll() is None:
            break
        process.communicate()
    process.send_signal(number)
    stderr = process.communicate()[1]
    if "Traceback" in stderr:
        return f"traceback: {stderr.strip().splitlines()[-1]}"
    return go_on(command, out, expected)


def go_on(command: Command, out: Path, expected: dict[str, str]) -> str | None:
    """Give a command again and compare; one that had finished may say so."""
    try:
        finished = command.results(out) == expected
    except (OSError, ValueError):
        finished = False
    process = start(command, out)
    stderr = process.communicate()[1]
    last = stderr.strip().splitlines()[-1] if stderr.strip() else ""
    if "Traceback" in stderr or (process.returncode and not finished):
        return f"given again: exit code {process.returncode}, {last}"
    if command.results(out) != expected:
        return "given again: another result"
    left = [path.name for path in out.rglob("*.partial")]
    return f"left behind: {left[0]}" if left else None


def limited(command: Command, out: Path, kind: int, limit: int) -> list[str]:
    return judge(start(command, out, preexec_fn=lambda: resource.setrlimit(kind, (limit, limit))))


def read_only(command: Command, out: Path) -> list[str]:
    """Run a command on a folder that cannot be written to; root needs a mount of its own for that."""
    if os.geteuid():
        paths = [out, *out.rglob("*")]
        modes = {path: path.stat().st_mode for path in paths}
        for path in paths:
            path.chmod(modes[path] & ~0o222)
        failures = judge(start(command, out))
        for path in reversed(paths):
            path.chmod(modes[path])
        return failures
    script = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
    return judge(start(command, out, before=("unshare", "-m", "sh", "-c", script, str(out))))


def twice(command: Command, out: Path) -> list[str]:
    processes = [start(command, out) for _ in range(2)]
    return [failure for process in processes for failure in judge(process)]


def judge(process: subprocess.Popen[str]) -> list[str]:
    """Wait for a disturbed command; return what is wrong about how it ended."""
    stderr = process.communicate()[1]
    lines = stderr.strip().splitlines()
    if "Traceback" in stderr:
        return [f"traceback: {lines[-1]}"]
    if process.returncode not in (0, 1, 3):
        return [f"exit code {process.returncode}: {lines[-1] if lines else ''}"]
    if process.returncode == 1 and sum(line.startswith("error") for line in lines) != 1:
        return [f"not one error: {stderr.strip()}"]
    return []


def renew(command: Command, out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    command.prepare(out)


def start(command: Command, out: Path, *, before: tuple[str, ...] = (), **options) -> subprocess.Popen[str]:
    words = [*before, *CLI, *command.arguments(out)]
    pipe = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, **pipe, **options)


def row_of(
    command: Command, fault: str, tried: int, failures: list[str], seconds: float
) -> dict[str, object]:
    passed = tried - min(tried, len(failures))
    return {
        "command": command.name,
        "fault": fault,
        "passed": passed,
        "tried": tried,
        "seconds": round(seconds),
        "failures": " | ".join(dict.fromkeys(failures)),
    }


def append(row: dict[str, object]) -> None:
    print(row, flush=True)
    is_new = not RESULTS.exists()
    about = {"date": time.strftime("%Y-%m-%d"), "biopsy": biopsy.__version__, "machine": platform.machine()}
    with open(RESULTS, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *about])
        if is_new:
            writer.writeheader()
        writer.writerow(row | about)


if __name__ == "__main__":
    main()
