"""The fault campaign itself, with few points: every command comes to its result after every fault."""

import os
import subprocess
import sys

import pandas as pd
import pytest

from conftest import PROJECT


@pytest.mark.slow
@pytest.mark.parametrize("command", ["prepare", "train", "evaluate", "slide", "study", "sweep"])
def test_a_disturbed_command_comes_to_the_result_of_an_undisturbed_one(command, tmp_path):
    script, table = PROJECT / "benchmarks" / "faults.py", tmp_path / "faults.csv"
    words = ["--points", "2", "--commands", command, "--out", str(table)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # results depend on the number of threads
    done = subprocess.run(
        [sys.executable, script, *words], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    rows = pd.read_csv(table)
    assert len(rows) == 10 and (rows["passed"] == rows["points"]).all(), done.stdout
    assert rows["between_writes"].sum() > 0
