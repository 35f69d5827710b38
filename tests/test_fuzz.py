"""Mutated files are read or refused; `benchmarks/fuzz.py` tries more of them."""

import subprocess
import sys

import pandas as pd
import pytest

from conftest import PROJECT

sys.path.insert(0, str(PROJECT / "benchmarks"))
from fuzz import PARSERS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    """What the program printed, and its table."""
    script, table = PROJECT / "benchmarks" / "fuzz.py", tmp_path_factory.mktemp("fuzz") / "fuzzing.csv"
    words = ["--mutations", "30", "--seed", "1", "--out", str(table)]
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr, pd.read_csv(table).set_index("parser")


@pytest.mark.parametrize("parser", PARSERS)
def test_mutations_are_read_or_refused(parser, fuzzed):
    printed, table = fuzzed
    assert parser in table.index, printed
    row = table.loc[parser]
    assert row["mutations"] == 30 and row["faults"] == 0 and row["refused"] > 0, printed
