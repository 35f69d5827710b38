"""The fault campaign itself, with few points: every command comes to its result after every fault."""

import os
import subprocess
import sys

import pandas as pd
import pytest

from conftest import PROJECT
from faults import FAULTS, SLOW


def disturb(command, folder, *words):
    """Return the rows of the campaign on a command."""
    script, table = PROJECT / "benchmarks" / "faults.py", folder / "faults.csv"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # results depend on the number of threads
    done = subprocess.run(
        [sys.executable, script, *words, "--commands", command, "--out", str(table)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    print(done.stdout)  # what is wrong with which point
    assert done.returncode == 0, done.stderr
    return pd.read_csv(table)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["prepare", "train", "evaluate", "slide", "study", "sweep"])
def test_a_disturbed_command_comes_to_the_result_of_an_undisturbed_one(command, tmp_path):
    faults = [name for name in FAULTS if name != SLOW]
    rows = disturb(command, tmp_path, "--points", "2", "--faults", ",".join(faults))
    assert len(rows) == len(faults) and (rows["passed"] == rows["points"]).all(), rows
    assert rows["between_writes"].sum() > 0


@pytest.mark.slow
@pytest.mark.parametrize("command", ["slide", "shards", "train"])
def test_kills_on_slow_storage_cost_nothing(command, tmp_path):
    rows = disturb(command, tmp_path, "--points", "4", "--faults", SLOW)
    assert list(rows["fault"]) == [SLOW] and rows["points"].item() == 4
    assert rows["passed"].item() == 4 and rows["ended_before"].item() < 4
