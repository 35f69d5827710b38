"""What becomes of a command that is interrupted, or meets a full disk, and is then run again.

Command (POSIX only)::

    python benchmarks/faults.py [--points 10] [--seed 0] [--commands train,slide] [--faults SIGKILL]

Small phantom inputs are made once. Each command (`prepare`, `train`, `evaluate`, `slide`, `study`, `sweep`)
runs three times undisturbed: what is equal in all three (files; of JSON and csv files, values) is what a
disturbed one must come to. Every point is a process of its own, forked from this one:

* ``SIGKILL``, ``SIGTERM``, ``SIGINT``: sent at, or up to 20 ms after, a random one of the command's file
  operations (opening to write, renaming, making, removing; counted by an audit hook), four points in five;
  else at a random time of the run;
* ``disk full``: no file may grow beyond a size between 4 kB and the largest file's, on a logarithmic scale
  (RLIMIT_FSIZE), and in every other point file operations fail with ENOSPC from one on;
* ``read-only``: file operations that change the folder fail with EROFS from the first on, or from a later
  one, as when a system mounts a disk anew after an error;
* ``no temporary space``: file operations outside the folder, such as in that for temporary files and in those
  for caches, fail with ENOSPC from one on; as many points as the command has of those, and at least one;
* ``few handles``: a limit of open files (RLIMIT_NOFILE), from 4 up to the lowest with which the command
  succeeds, which is searched first;
* ``clock set back``: all files are a day younger than the clock, which from a file operation on shows an hour
  less (``time.time``);
* ``input altered``, ``input removed``: a byte of a file that the command reads is changed, or the file is
  removed, at a file operation, in every other point at a moment of the run; it is as it was when the
  command is run again (what was made without it, exit code 3, is removed first);
* ``slow storage``: SIGKILL at a random file operation, where every opening, renaming, making, removing,
  listing and ``fsync`` that Python does in the folder takes 1 to 50 ms more, as on a network file system; the
  second run is as slow;
* ``two at once``: the command is started twice in the same folder, the second time up to the command's
  duration later.

Limits, file operations and moments other than those of signals are spread evenly over their range, so that no
two points of a row are the same.

``shards`` is ``slide`` by two processes, ``--shard 1/2`` and ``2/2``, of which the first is disturbed.

Then the same command (of a training, ``biopsy train --resume``) runs undisturbed. A point passes if the
disturbed process ended by its signal, with an error and no traceback, or with its result, which is compared
before anything else runs (if an input was altered or removed before it was first read, with the result that
this gives); the second run succeeded; and its files are those of an undisturbed one, with no temporary file
left. The count of openings in a pack's ledger may be higher: each was one.

Results: `results/faults.csv`, one row per command and fault, shown in `docs/reliability.md`.
"""

import argparse
import csv
import errno
import faulthandler
import hashlib
import importlib
import itertools
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

import biopsy
from biopsy.cli import app
from biopsy.core.files import LOCK, MANIFEST, find_changed
from biopsy.phantom.cohort import write_archive
from biopsy.phantom.slides import make_phantom_slide

RESULTS = Path(__file__).parent / "results" / "faults.csv"
TINY = (
    *("preprocessing.input_px=16", "model.params.base_channels=4", "model.tta=none", "model.context=0"),
    *("train.epochs=2", "train.batch_size=16", "train.precision=fp32"),
)
SETTINGS = [word for setting in TINY for word in ("--set", setting)]
STUDY = ("idc-small", "--data", "in.pack", "--split", "patients", "--device", "cpu", "--seeds", "0,1")
COMMANDS = {
    "prepare": ("prepare", "cohort.zip", "--out", "out.pack"),
    "train": (
        *(
            "train",
            "idc-small",
            "--data",
            "in.pack",
            "--split",
            "patients",
            "--out",
            "out",
            "--device",
            "cpu",
        ),
        *SETTINGS,
    ),
    "evaluate": ("evaluate", "in.run"),
    "slide": ("slide", "in.run", "slides", "--out", "out", "--device", "cpu"),
    "shards": ("slide", "in.run", "slides", "--out", "out", "--device", "cpu", "--shard", "1/2"),
    "study": ("study", *STUDY, "--out", "out", *SETTINGS),
    "sweep": ("sweep", *STUDY[:-1], "0", "--grid", "train.lr=0.1,0.05", "--out", "out", *SETTINGS),
}
INPUTS = {
    "in.pack": ("prepare", "cohort.zip", "--out", "in.pack"),
    "in.run": (*COMMANDS["train"][:6], "--out", "in.run", "--device", "cpu", *SETTINGS),
}
SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT")
ON_INPUTS = ("input altered", "input removed")
SLOW, TWICE = "slow storage", "two at once"
LONGEST_S = 300  # after which a process counts as one that never ends
LEAST = 4096  # bytes that a file may hold when the disk is full, so that messages can be kept
FAULTS = (
    *(*SIGNALS, "disk full", "read-only", "no temporary space", "few handles", TWICE),
    *("clock set back", *ON_INPUTS, SLOW),
)
READ = {
    "prepare": ("cohort.zip",),
    "evaluate": ("in.pack/patches.npy", "in.run/classifier/weights.safetensors", "in.run/split.csv"),
    "slide": ("slides/0.tiff", "in.run/classifier/weights.safetensors"),
}
READ["shards"] = READ["slide"]
READ |= dict.fromkeys(("train", "study", "sweep"), ("in.pack/patches.npy", "in.pack/patches.parquet"))
CHANGING = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate"}
VOLATILE = {
    *("ledger", "times_opened", "seconds", "made", "evaluated", "started"),
    *("document_sha256", "table_sha256"),
}
"""Values that a second attempt or a second process may change: openings, durations, times, hashes of such
files."""
SKIPPED = {MANIFEST, LOCK, "ledger.jsonl"}


SLOWED = CHANGING | {"open", "os.listdir", "os.scandir"}

Disturbance = Callable[[int], None]
"""Called in the process with 0 before the command, and with n at its nth file operation."""


@dataclass(frozen=True)
class Outcome:
    """How a process ended: exit code (negative: the signal), what it printed, operations that change files
    inside and outside the folder, seconds."""

    code: int
    text: str
    operations: int
    outside: int
    seconds: float


# --- processes
def start(
    folder: Path, command: Callable[[], int], disturb: Disturbance | None = None
) -> tuple[int, Path, float]:
    """Fork a process that runs a command in a folder; return its id, the file of what it prints, the time."""
    descriptor, log = tempfile.mkstemp(suffix=".log", dir=folder.parent)
    began, pid = time.monotonic(), os.fork()
    if pid:
        os.close(descriptor)
        return pid, Path(log), began
    code = 99
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which programs in the background ignore
        os.chdir(folder)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        faulthandler.enable(2)  # says where each thread stands when `wait` gives up
        count = count_operations(folder, disturb)
        code = command()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # one that comes too late
        sys.stdout.flush()
        os.write(1, f"\noperations={count[0]} {count[1]}".encode())
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc(file=sys.stdout)
        sys.stdout.flush()
    finally:
        os._exit(code)


def wait(process: tuple[int, Path, float]) -> Outcome:
    """Wait for a process that `start` has made; one that does not end is aborted."""
    pid, log, began = process
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() - began > LONGEST_S:
            os.kill(pid, signal.SIGABRT)
            ended = os.waitpid(pid, 0)
            break
        time.sleep(0.01)
    code = os.waitstatus_to_exitcode(ended[1])
    text, _, counts = log.read_text(errors="replace").partition("\noperations=")
    log.unlink()
    inside, outside = map(int, counts.split() or (0, 0))
    return Outcome(code, text, inside, outside, time.monotonic() - began)


def run(folder: Path, words: tuple[str, ...], disturb: Disturbance | None = None) -> Outcome:
    """Run a command line in a folder, in a process of its own."""
    return wait(start(folder, lambda: app.run([*words, "--quiet"]), disturb))


def count_operations(folder: Path, disturb: Disturbance | None) -> list[int]:
    """Count, in this process from now on, the operations that change files inside a folder, and outside."""
    count = [0, 0]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        path = changed_path(event, arguments)
        if path and path.startswith(f"{folder}{os.sep}"):
            count[0] += 1
            if disturb:
                disturb(count[0])
        elif path:
            count[1] += 1

    if disturb:
        disturb(0)
    sys.addaudithook(hook)
    return count


def changed_path(event: str, arguments: tuple[Any, ...]) -> str | None:
    """Return the path that an audited operation changes; None if it changes no file."""
    if event == "open":
        path, mode, flags = arguments
        writes = set(mode) & set("wax+") if isinstance(mode, str) else flags & (os.O_WRONLY | os.O_RDWR)
    else:
        path, writes = arguments[0] if arguments else 0, event in CHANGING
    if not writes or not isinstance(path, str | bytes | os.PathLike):
        return None
    return os.path.abspath(os.fsdecode(path))


# --- faults
def send(number: signal.Signals, operation: int | None, delay: float) -> Disturbance:
    """Return what sends a signal some seconds after a file operation, or after the start."""

    def disturb(n: int) -> None:
        if n == (operation or 0):
            if delay:
                threading.Timer(delay, os.kill, (os.getpid(), number)).start()
            else:
                os.kill(os.getpid(), number)

    return disturb


def fail_from(operation: int, code: int) -> Disturbance:
    """Return what lets file operations fail from one on."""

    def disturb(n: int) -> None:
        if n >= operation:
            raise OSError(code, os.strerror(code))

    return disturb


def fill_outside(operation: int) -> Disturbance:
    """Return what lets file operations outside the folder fail from one on."""

    def disturb(n: int) -> None:
        if n == 0:
            count, folder = itertools.count(1), f"{os.getcwd()}{os.sep}"

            def hook(event: str, arguments: tuple[Any, ...]) -> None:
                path = changed_path(event, arguments)
                if path and not path.startswith((folder, "/dev/")) and next(count) >= operation:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

            sys.addaudithook(hook)

    return disturb


def wait_first(seconds: float) -> Disturbance:
    """Return what lets a process start later."""
    return lambda n: None if n else time.sleep(seconds)


def limit(kind: int, value: int) -> Disturbance:
    """Return what limits the process from its start."""

    def disturb(n: int) -> None:
        if n == 0:
            resource.setrlimit(kind, (value, resource.getrlimit(kind)[1]))

    return disturb


def set_clock_back(operation: int) -> Disturbance:
    """Return what makes files younger than the clock, and from a file operation on sets it an hour back."""

    def disturb(n: int) -> None:
        if n == 0:
            tomorrow = time.time() + 86400
            for path in Path().rglob("*"):
                os.utime(path, (tomorrow, tomorrow))
        if n == operation:
            now = time.time
            time.time = lambda: now() - 3600

    return disturb


def alter(path: Path, place: float | None) -> None:
    """Change the byte at a place of a file (a share of its size), or for None remove the file."""
    if place is None:
        path.unlink(missing_ok=True)
        return
    with open(path, "r+b") as file:
        file.seek(int(place * (path.stat().st_size - 1)))
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0x55]))


def spoil(name: str, place: float | None, *, operation: int = 0, delay: float = 0) -> Disturbance:
    """Return what alters a file at a file operation, or a moment."""

    def disturb(n: int) -> None:
        if n == operation:
            timer = threading.Timer(delay, alter, (Path(name).absolute(), place))
            timer.daemon = True
            timer.start()
            if not delay:
                timer.join()

    return disturb


def slow_down(seed: str, further: Disturbance | None = None) -> Disturbance:
    """Return what delays every file operation in the folder by 1 to 50 ms, and disturbs further."""

    def disturb(n: int) -> None:
        if n == 0:
            rng, folder, fsync = random.Random(seed), f"{os.getcwd()}{os.sep}", os.fsync

            def delay(event: str, arguments: tuple[Any, ...]) -> None:
                path = arguments[0] if arguments and event in SLOWED else None
                if isinstance(path, str | bytes | os.PathLike):
                    if f"{os.path.abspath(os.fsdecode(path))}{os.sep}".startswith(folder):
                        time.sleep(rng.uniform(0.001, 0.05))

            def slow_fsync(descriptor: int) -> None:
                time.sleep(rng.uniform(0.001, 0.05))
                fsync(descriptor)

            sys.addaudithook(delay)
            os.fsync = slow_fsync
        if further:
            further(n)

    return disturb


def choose_input(command: str, fault: str, index: int) -> tuple[str, float | None]:
    """Return the file of a point, and the place of the byte that is changed; None where it is removed."""
    name = READ[command][index // 2 % len(READ[command])]
    return name, random.Random(f"{command} {index}").random() if fault == "input altered" else None


def draw_fault(
    command: str,
    fault: str,
    point: tuple[int, int],
    rng: random.Random,
    whole: Outcome,
    *,
    largest: int,
    handles: int,
) -> tuple[Disturbance, bool]:
    """Return one point of a fault, by its index and their number, and whether it lies between two writes.

    ``largest`` is the size in bytes of the largest file that the command writes, ``handles`` the fewest open
    files with which it succeeds.
    """
    operation, (index, n_points) = rng.randint(1, whole.operations), point
    if fault == SLOW:
        return slow_down(f"{rng.random()}", send(signal.SIGKILL, operation, 0)), True
    if fault in SIGNALS:
        number = signal.Signals[fault]
        if index % 5 == 4:
            return send(number, None, rng.uniform(0.01, whole.seconds)), False
        return send(number, operation, rng.choice([0, rng.uniform(0.0005, 0.02)])), True
    share = index / n_points
    operation = 1 + int(share * whole.operations)
    if fault == "disk full":
        if index % 2:
            return fail_from(operation, errno.ENOSPC), True
        return limit(resource.RLIMIT_FSIZE, int(LEAST * (largest / LEAST) ** share) - 1), True
    if fault == "read-only":
        return fail_from(operation, errno.EROFS), index > 0
    if fault == "no temporary space":
        return fill_outside(1 + index), False
    if fault == "clock set back":
        return set_clock_back(operation), True
    if fault in ON_INPUTS:
        name, place = choose_input(command, fault, index)
        if index % 2:
            return spoil(name, place, delay=share * whole.seconds), False
        return spoil(name, place, operation=operation), True
    return limit(resource.RLIMIT_NOFILE, 4 + int((handles - 4) * share)), False


@dataclass
class Row:
    """Points of a command and fault: all, between writes, after the command had ended, passed."""

    command: str
    fault: str
    points: int = 0
    between_writes: int = 0
    ended_before: int = 0
    passed: int = 0


# --- results
def read_values(folder: Path) -> dict[str, Any]:
    """Return what a folder holds: of JSON and csv files each value, of others a hash."""
    values: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or path.name in SKIPPED or path.name.endswith(".lock"):
            continue
        if path.suffix == ".json":
            values |= flatten(json.loads(path.read_text()), name)
        elif path.suffix == ".jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            values |= flatten(lines, name)
        elif path.suffix == ".csv":
            values |= flatten(list(csv.DictReader(path.open(newline=""))), name)
        else:
            values[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return values


def flatten(value: Any, name: str) -> dict[str, Any]:
    """Return the values of a document by their place in it."""
    if not isinstance(value, dict | list) or not value:
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {
        place: leaf
        for key, item in items
        if key not in VOLATILE
        for place, leaf in flatten(item, f"{name}/{key}").items()
    }


def find_difference(values: dict[str, Any], whole: dict[str, Any], stable: set[str]) -> str | None:
    """Return the first place where a folder's values are not those of an undisturbed run."""
    for place in sorted(whole.keys() ^ values.keys()):
        return f"{place} {'is missing' if place in whole else 'is left over'}"
    return next((f"{place} differs" for place in sorted(stable) if values[place] != whole[place]), None)


def find_changed_outputs(folder: Path) -> str | None:
    """Return a file that a manifest lists and that is not what it says."""
    for manifest in folder.rglob(MANIFEST):
        for name in find_changed(manifest.parent) or ():
            return f"{manifest.parent.relative_to(folder) / name} is not what its manifest says"
    return None


def find_fault(outcome: Outcome, codes: set[int]) -> str | None:
    """Return what is wrong with how a process ended."""
    if "Traceback" in outcome.text:
        return "traceback: " + outcome.text.strip().splitlines()[-1][:200]
    if outcome.code == -signal.SIGABRT:
        return f"did not end within {LONGEST_S} s: {outcome.text.strip()}"
    return None if outcome.code in codes else f"exit code {outcome.code}: {outcome.text.strip()[-200:]}"


# --- the campaign
class Campaign:
    """The inputs, and a folder in which every point finds them anew under the same names."""

    def __init__(self, work: Path) -> None:
        self.inputs, self.folder = work / "inputs", work / "here"
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        check(wait(start(self.folder, make_sources)))
        for words in INPUTS.values():
            check(run(self.folder, words))
        shutil.rmtree(self.inputs, ignore_errors=True)
        shutil.copytree(self.folder, self.inputs)

    def renew(self) -> None:
        """Bring the folder back to what it held before the command."""
        shutil.rmtree(self.folder)
        shutil.copytree(self.inputs, self.folder)

    def measure(self, words: tuple[str, ...]) -> tuple[Outcome, dict[str, Any], set[str], int]:
        """Run a command three times; return an outcome, its values, the stable ones, its largest file."""
        results = []
        for _ in range(3):
            self.renew()
            outcome = check(run(self.folder, words))
            results.append(read_values(self.folder))
        first = results[0]
        stable = {name for name in first if all(result.get(name) == first[name] for result in results)}
        before = {path.relative_to(self.inputs) for path in self.inputs.rglob("*")}
        new = [path for path in self.folder.rglob("*") if path.relative_to(self.folder) not in before]
        return outcome, first, stable, max(path.stat().st_size for path in new if path.is_file())

    def try_point(
        self,
        processes: Sequence[tuple[tuple[str, ...], Disturbance | None]],
        codes: set[int],
        compare: Callable[[], str],
        again: Disturbance | None = None,
        is_same_from: Callable[[dict[str, Any]], bool] | None = None,
    ) -> tuple[bool, str]:
        """Run commands at once, then the first again; return whether all ended, and what is wrong.

        ``compare`` says how the folder differs from that of an undisturbed run, ``is_same_from`` whether
        values are those that the altered or missing input gives.
        """
        self.renew()
        started = [
            start(self.folder, lambda words=words: app.run([*words, "--quiet"]), disturb)
            for words, disturb in processes
        ]
        outcomes, words = [wait(process) for process in started], processes[0][0]
        wrong = next(filter(None, (find_fault(outcome, codes) for outcome in outcomes)), "")
        for name in READ[words[0]]:
            shutil.copy2(self.inputs / name, self.folder / name)
        has_ended = all(outcome.code == 0 for outcome in outcomes)
        differs = compare() if has_ended and not wrong else ""
        values = read_values(self.folder) if differs else {}
        if outcomes[0].code == 3:
            shutil.rmtree(self.folder / words[words.index("--out") + 1])
        if words[0] == "train" and (run_file := self.folder / "out" / "run.json").exists():
            is_finished = json.loads(run_file.read_text())["status"] == "finished"
            words = words if is_finished else ("train", "--resume", "out", "--device", "cpu")
        wrong = wrong or find_fault(run(self.folder, words, again), {0}) or compare()
        if differs and not wrong and not (is_same_from and is_same_from(values)):
            wrong = f"ended as if well, but {differs}"
        return has_ended, wrong

    def find_fewest_handles(self, words: tuple[str, ...]) -> int:
        """Return the lowest limit of open files with which a command succeeds, by bisection."""
        low, high = 4, 256
        while low < high:
            middle = (low + high) // 2
            self.renew()
            ended = run(self.folder, words, limit(resource.RLIMIT_NOFILE, middle)).code == 0
            low, high = (low, middle) if ended else (middle + 1, high)
        return low


def make_sources() -> int:
    """Write the cohort and the slides."""
    write_archive("cohort.zip", n_patients=10, patches_per_patient=24, seed=0)
    for index in range(2):
        make_phantom_slide(
            f"slides/{index}.tiff", seed=index, patient=str(99000 + index), width=400, height=300, mpp=2.0
        )
    return 0


def check(outcome: Outcome) -> Outcome:
    """Return the outcome of a process that must succeed."""
    if outcome.code:
        raise SystemExit(f"an undisturbed command failed with {outcome.code}: {outcome.text}")
    return outcome


def try_command(
    campaign: Campaign, command: str, faults: Sequence[str], n_points: int, seed: int
) -> Iterator[Row]:
    """Try all faults on one command."""
    words = COMMANDS[command]
    whole, values, stable, largest = campaign.measure(words)
    handles = campaign.find_fewest_handles(words) if "few handles" in faults else 0

    def compare() -> str:
        difference = find_difference(read_values(campaign.folder), values, stable)
        return difference or find_changed_outputs(campaign.folder) or ""

    def give_same(fault: str, index: int, values: dict[str, Any]) -> bool:
        name, place = choose_input(command, fault, index)
        campaign.renew()
        alter(campaign.folder / name, place)
        run(campaign.folder, words)
        (from_altered := read_values(campaign.folder)).pop(name, None)
        values.pop(name, None)
        return find_difference(values, from_altered, stable & from_altered.keys()) is None

    for fault in faults:
        row = Row(command, fault)
        number = max(1, min(n_points, whole.outside)) if fault == "no temporary space" else n_points
        for index in range(number):
            rng = random.Random(f"{seed} {command} {fault} {index}")
            codes = {0, 1, 3}
            disturb, between, second = None, False, None
            if fault == TWICE:
                second = wait_first(index / n_points * whole.seconds)
            else:
                disturb, between = draw_fault(
                    command, fault, (index, n_points), rng, whole, largest=largest, handles=handles
                )
            if fault in SIGNALS:
                codes = {0, 130 if fault == "SIGINT" else -signal.Signals[fault]}
            slow = None
            if fault == SLOW:
                codes, second = {0, -signal.SIGKILL}, slow_down(f"{rng.random()}")
                slow = second  # for the second run too
            processes = [(words, disturb)]
            if fault == TWICE or command == "shards":
                processes += [(tuple("2/2" if word == "1/2" else word for word in words), second)]
            is_same_from = partial(give_same, fault, index) if fault in ON_INPUTS else None
            ended, wrong = campaign.try_point(processes, codes, compare, slow, is_same_from)
            row.points += 1
            row.between_writes += between
            row.ended_before += ended and fault != TWICE
            row.passed += not wrong
            if wrong:
                print(f"{command}, {fault}, point {index}: {wrong}", flush=True)
        yield row


def main() -> None:
    """Run the campaign, and add to the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--points", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", default=",".join(COMMANDS))
    parser.add_argument("--faults", default=",".join(FAULTS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    for name in {words[0] for words in COMMANDS.values()}:
        getattr(biopsy, name)  # imported once, not in every process
    importlib.import_module("torch._dynamo")
    with tempfile.TemporaryDirectory() as work:
        campaign = Campaign(Path(work).resolve())
        rows = pd.read_csv(arguments.out).to_dict("records") if arguments.out.exists() else []
        for command in arguments.commands.split(","):
            for row in try_command(
                campaign, command, arguments.faults.split(","), arguments.points, arguments.seed
            ):
                new = {**asdict(row), "seed": arguments.seed, "biopsy": biopsy.__version__}
                print(", ".join(f"{key} {value}" for key, value in new.items()), flush=True)
                old = [one for one in rows if (one["command"], one["fault"]) != (row.command, row.fault)]
                rows = [*old, new]
                pd.DataFrame(rows).to_csv(arguments.out, index=False)


if __name__ == "__main__":
    main()
