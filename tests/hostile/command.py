"""The command line as a user runs it: exit code, what it printed, processor seconds and most bytes held.

Every call is a process of its own, forked from one that has imported the package, which saves seconds a call.
"""

import multiprocessing
import os
import resource
import sys
import tempfile
from pathlib import Path

MAX_SECONDS = 20  # of the processor
MAX_BYTES = 1.5e9
CONNECTED = "a connection was opened:"

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    ["biopsy.cli", "biopsy.data.prepare", "biopsy.slides.mapping", "biopsy.models.compiling"]
)


def run(*arguments):
    """Run the command line; return exit code, what it printed, processor seconds and most bytes held."""
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = _FORKS.Pipe(duplex=False)
        process = _FORKS.Process(
            target=_call, args=([*map(str, arguments)], os.getcwd(), f"{folder}/printed", theirs)
        )
        process.start()
        theirs.close()
        try:
            usage = ours.recv()
        except EOFError:
            usage = float("inf"), float("inf")
        process.join()
        return process.exitcode, Path(folder, "printed").read_text(errors="replace"), *usage


def _call(arguments, folder, printed, pipe):
    os.chdir(folder)
    file = os.open(printed, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.addaudithook(_tell_of_connections)
    sys.argv = ["biopsy", *arguments]
    try:
        from biopsy.cli import main

        main()
    finally:
        used = resource.getrusage(resource.RUSAGE_SELF)
        pipe.send((used.ru_utime + used.ru_stime, used.ru_maxrss * 1024))


def _tell_of_connections(event, arguments):
    if event == "socket.getaddrinfo" or (event == "socket.connect" and isinstance(arguments[1], tuple)):
        os.write(2, f"\n{CONNECTED} {arguments[-1]}\n".encode())


def check(code, printed, seconds, n_bytes, *, accepted=False):
    """Check that an input was refused in one line, or named and left out, soon; or accepted if it may be."""
    assert "Traceback" not in printed and CONNECTED not in printed, printed[-3000:]
    assert seconds < MAX_SECONDS and n_bytes < MAX_BYTES, (seconds, n_bytes)
    if code == 1:
        errors = [line for line in printed.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and len(errors[0]) < 1000, printed[-3000:]
    else:
        assert code in ((0, 3) if accepted else (3,)), (code, printed[-3000:])
