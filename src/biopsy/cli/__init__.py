"""The command line: the public functions, with how their results are printed.

``signatures`` reads the parameters of the functions from their source, ``app`` makes commands of them and
runs one, ``console`` prints what it returned, log and progress. Nothing heavy is imported before a command
runs.

To add a command, name the function in ``biopsy/__init__.pyi`` and in ``app.GROUPS``. Its parameters are
declared once, in its signature and docstring; its result derives from `core.results.Output`, which says how
it is printed.
"""

from biopsy.cli.app import build_app, main, run

__all__ = ["build_app", "main", "run"]
