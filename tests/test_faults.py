"""The fault campaign itself, with few points: every command comes to its result after every fault."""

import os
import subprocess
import sys

import pandas as pd
import pytest

from conftest import PROJECT
from faults import FAULTS, SIGNALS, SLOW


def disturb(folder, commands, *words):
    """Return the rows of the campaign on some commands."""
    script, table = PROJECT / "benchmarks" / "faults.py", folder / "faults.csv"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # results depend on the number of threads
    done = subprocess.run(
        [sys.executable, script, *words, "--commands", ",".join(commands), "--out", str(table)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    print(done.stdout)  # what is wrong with which point
    assert done.returncode == 0, done.stderr
    return pd.read_csv(table)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("faults", "points"), [(SIGNALS, 2), (tuple(name for name in FAULTS if name not in (*SIGNALS, SLOW)), 1)]
)
def test_a_disturbed_command_comes_to_the_result_of_an_undisturbed_one(faults, points, tmp_path):
    commands = ["prepare", "train", "evaluate", "slide", "study", "sweep"]
    rows = disturb(tmp_path, commands, "--points", str(points), "--faults", ",".join(faults))
    assert len(rows) == len(commands) * len(faults) and (rows["passed"] == rows["points"]).all(), rows
    assert (rows.groupby("command")["between_writes"].sum() > 0).all()


@pytest.mark.slow
def test_kills_on_slow_storage_cost_nothing(tmp_path):
    rows = disturb(tmp_path, ["slide", "shards", "train"], "--points", "2", "--faults", SLOW)
    assert len(rows) == 3 and (rows["points"] == 2).all()
    assert (rows["passed"] == 2).all() and (rows["ended_before"] < 2).all(), rows


@pytest.mark.slow
def test_a_command_that_does_not_end_is_aborted_and_says_where_it_stood(tmp_path):
    code = """if True:
        import sys, time
        from pathlib import Path
        import faults

        def never_end():
            time.sleep(60)

        faults.LONGEST_S = 1
        print(faults.find_fault(faults.wait(faults.start(Path(sys.argv[1]), never_end)), {0}))
    """
    (tmp_path / "here").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "here"],
        capture_output=True,
        text=True,
        check=True,
        cwd=PROJECT / "benchmarks",
    )
    assert "in never_end" in done.stdout
