"""The command line as the tests run it, in this process: ``call("train", ..., folder)``."""

import contextlib
import io
from dataclasses import dataclass

from biopsy.cli import run


@dataclass(frozen=True)
class Called:
    """What a command printed, and its exit code."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        return self.stdout + self.stderr


def call(*arguments: object) -> Called:
    """Run ``biopsy`` with these arguments."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run([str(argument) for argument in arguments])
    return Called(code, out.getvalue(), err.getvalue())
