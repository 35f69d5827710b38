"""Whether a training by several processes ends where one process ends, and how fast it is.

`idc-small` has batch normalisation, which each process does on its own part of a batch, so weights differ.
The learning curve must not differ by more than between seeds: the same seeds are trained by one process and
by several (torchrun, Gloo, on the processor) with shortened settings, and the validation AUROC of every epoch
is compared pairwise, as the mean difference with its 90 % interval (Student's t over seeds).

Command::

    python benchmarks/processes.py idc.pack --split lo-8863 [--processes 1,2,4] [--seeds 0,1,2,3,4]

The cores are divided among the processes. Finished runs are not trained again. Results:
``results/processes.csv``, a row per run; the comparison is printed.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from biopsy.training.runs import Run
from recording import append_rows
from training_speed import describe_machine

RESULTS = Path(__file__).parent / "results" / "processes.csv"


def train(pack: Path, split: str, n_processes: int, seed: int, epochs: int, out: Path) -> Run:
    """Train by a number of processes, and return the finished run."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n_processes)),
        *("-m", "biopsy", "train", "idc-small", "--data", str(pack), "--split", split, "--seed", str(seed)),
        *("--set", f"train.epochs={epochs}", "--set", "train.precision=fp32"),
        *("--device", "cpu", "--out", str(out), "--quiet"),
    ]
    threads = max(1, (os.cpu_count() or 1) // n_processes)
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    return Run.open(out)


def describe(run: Run, n_processes: int) -> dict[str, object]:
    """Return the row of a run: validation AUROC of each epoch, images trained a second."""
    history = run.log()
    return {
        "processes": n_processes,
        "seed": run.info["seed"],
        "images_per_s": round(float(np.median([epoch["images_per_s"] for epoch in history[1:]])), 1),
        **{f"auroc_{epoch['epoch']}": round(epoch["val_auroc"], 5) for epoch in history},
    }


def compare(rows: pd.DataFrame, n_processes: int) -> str:
    """Return the difference from one process at each epoch, with its 90 % interval over seeds."""
    alone = rows[rows["processes"] == 1].set_index("seed")
    several = rows[rows["processes"] == n_processes].set_index("seed")
    lines = []
    for name in [column for column in rows if column.startswith("auroc_")]:
        gain = (several[name] - alone[name]).dropna()
        half = stats.t.ppf(0.95, len(gain) - 1) * gain.std(ddof=1) / np.sqrt(len(gain))
        lines.append(
            f"{n_processes} processes, {name}: {gain.mean():+.4f} (90 %: {gain.mean() - half:+.4f} to "
            f"{gain.mean() + half:+.4f}); one process, sd over seeds {alone[name].std(ddof=1):.4f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pack", type=Path)
    parser.add_argument("--split", required=True)
    parser.add_argument("--processes", default="1,2")
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/processes"))
    arguments = parser.parse_args()
    numbers, rows = [int(number) for number in arguments.processes.split(",")], []
    for seed in map(int, arguments.seeds.split(",")):
        for number in numbers:
            out = arguments.out / f"{number}-s{seed}"
            is_new = not (out / "run.json").exists()
            run = train(arguments.pack, arguments.split, number, seed, arguments.epochs, out)
            rows.append(describe(run, number))
            if is_new:
                append_rows(RESULTS, [rows[-1] | describe_machine()])
    for number in numbers:
        if number > 1:
            print(compare(pd.DataFrame(rows), number))


if __name__ == "__main__":
    main()
