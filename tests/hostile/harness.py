"""Hostile inputs: each is made by a few lines, given to a command, and must be refused or named as skipped.

A file ``corpus_<parser>.py`` beside this one holds a list ``INPUTS``; to add a trick, add an entry there.
Commands run in a fork of one process that has loaded everything (`Server`), so that an input takes seconds.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAX_SECONDS, MAX_MB = 20, 1500
CANARY = "CANARY"  # what code in an input would write


@dataclass(frozen=True)
class Input:
    """One hostile input.

    Attributes:
        name: Parser and trick.
        make: Changes or adds files in a folder that holds ``in.pack``, ``in.run`` and ``tree``.
        words: The command's words after ``biopsy``, from that folder.
        codes: Exit codes that are right: 1 for a refusal, 3 for skipped input, 0 where it is harmless.
    """

    name: str
    make: Callable[[Path], Any]
    words: tuple[str, ...]
    codes: tuple[int, ...] = (1,)


@dataclass
class Server:
    """A process that forks a child for each command and says how that ended."""

    process: "subprocess.Popen[str]" = field(init=False)

    def __post_init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, folder: Path, words: tuple[str, ...]) -> dict[str, Any]:
        """Return ``code`` (None after the time limit), ``seconds``, ``mb``, ``output`` and ``events``."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([str(folder), list(words)]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def check(server: Server, entry: Input, material: Path, folder: Path) -> None:
    """Return an input to its command, and require all that must hold."""
    shutil.copytree(material, folder, symlinks=True)
    (folder / "notes").mkdir()
    (folder / "notes" / "mine.txt").write_text("the user's own")
    entry.make(folder)
    before = _list_files(folder)
    done = server.run(folder, entry.words)
    shown = f"{entry.name}: {done}"
    assert done["code"] in entry.codes, shown
    assert "Traceback" not in done["output"], shown
    assert done["seconds"] <= MAX_SECONDS and done["mb"] <= MAX_MB, shown
    assert not done["events"] and not list(folder.rglob(CANARY)), shown
    if done["code"] == 1:
        lines = [line for line in done["output"].splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and len(lines[0]) < 1500, shown
    after = _list_files(folder)
    assert before.keys() <= after.keys(), entry.name
    changed = {name for name in before if before[name] != after[name]}
    assert all(name.endswith((".lock", "run.json", "ledger.jsonl", "metrics.json")) for name in changed), (
        entry.name,
        changed,
    )


def _list_files(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def _serve() -> None:
    import biopsy.cli
    import biopsy.evaluation.evaluate
    import biopsy.training.train  # noqa: F401

    for line in sys.stdin:
        folder, words = json.loads(line)
        print(json.dumps(_run(folder, words)), flush=True)


def _run(folder: str, words: list[str]) -> dict[str, Any]:
    import time

    output, events = f"{folder}.out", f"{folder}.events"
    started, child = time.perf_counter(), os.fork()
    if not child:
        _become(folder, words, output, events)
    code: int | None = None
    while True:
        pid, status, usage = os.wait4(child, os.WNOHANG)
        if pid:
            code = os.waitstatus_to_exitcode(status)
            break
        if time.perf_counter() - started > 2 * MAX_SECONDS:
            os.kill(child, signal.SIGKILL)
            _, status, usage = os.wait4(child, 0)
            break
        time.sleep(0.02)
    return {
        "code": code,
        "seconds": round(time.perf_counter() - started, 1),
        "mb": usage.ru_maxrss // 1024,
        "output": Path(output).read_text(errors="replace")[-5000:],
        "events": Path(events).read_text() if os.path.exists(events) else "",
    }


def _become(folder: str, words: list[str], output: str, events: str) -> None:
    """Turn this fork into the command: its output goes to a file, its doings are watched."""
    code = 70
    try:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(folder)
        watched = ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec")

        def watch(event: str, args: tuple[Any, ...]) -> None:
            if event in watched and "uname" not in repr(args):
                with open(events, "a") as file:
                    file.write(f"{event} {args!r}"[:300] + "\n")

        sys.addaudithook(watch)
        sys.argv = ["biopsy", *words]
        from biopsy.cli import main

        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
