"""The command line: each verb is a library call plus printing.

One file per group of verbs; ``console`` holds how things are printed, ``app`` joins the groups and turns
known errors into one line and an exit code. Nothing heavy is imported before a verb runs: the functions are
reached through ``biopsy.<verb>``, which loads them when first used.

To add a verb, write a function here whose parameters carry the names of the library function's, export that
function from ``biopsy``, and register it in the ``register`` of its group; a test compares the two.
"""

from biopsy.cli.app import app, main

__all__ = ["app", "main"]
