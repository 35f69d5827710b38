"""Mutated files are read or refused; `benchmarks/fuzz.py` tries more of them."""

import subprocess
import sys

import pandas as pd
import pytest

from conftest import PROJECT

sys.path.insert(0, str(PROJECT / "benchmarks"))
from fuzz import PARSERS

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("parser", PARSERS)
def test_mutations_are_read_or_refused(parser, tmp_path):
    script, table = PROJECT / "benchmarks" / "fuzz.py", tmp_path / "fuzzing.csv"
    words = ["--parser", parser, "--mutations", "60", "--seed", "1", "--out", str(table)]
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    row = pd.read_csv(table).iloc[0]
    assert row["mutations"] == 60 and row["faults"] == 0 and row["refused"] > 0
