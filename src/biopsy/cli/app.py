"""The application: all verbs, and what becomes of an error."""

import gc
import io
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from biopsy.cli import data, evaluation, slides, tools, training, viewing
from biopsy.cli.console import fail, interrupted, show_log
from biopsy.core.errors import BiopsyError


class Verbs(TyperGroup):
    """Turns errors that are known into one line and exit code 1; a traceback is a defect of ours."""

    def invoke(self, ctx: Any) -> Any:
        """Run the verb that was asked for."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            interrupted("nothing half-written is left under a final name, run the same command again")
        except BrokenPipeError:
            raise
        except BiopsyError as error:
            fail(str(error))
        except OSError as error:  # a path that is missing or forbidden, a full disk
            named = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
            fail(": ".join(part for part in (named, error.strerror or str(error)) if part))


app = typer.Typer(
    cls=Verbs,
    name="biopsy",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        from biopsy import __version__

        print(f"biopsy {__version__}")
        raise typer.Exit


@app.callback()
def start(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    accept_licence: Annotated[
        str | None,
        typer.Option(help="Licences of weights that you accept, with commas."),
    ] = None,
) -> None:
    """Train, judge and run breast-histopathology patch classifiers that can be trusted.

    Research use only: not a medical device, not for diagnosis.
    """
    show_log()
    if accept_licence is not None:
        os.environ["BIOPSY_ACCEPT_LICENCE"] = accept_licence


for group in (tools, data, training, evaluation, slides, viewing):
    group.register(app)


def main() -> None:
    """Run the command line; what a stream's encoding cannot hold is escaped."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    finally:
        if "torch" not in sys.modules:  # whose own libraries want to be taken apart in order
            gc.freeze()  # or Python would look through all that is loaded for garbage before it ends
