"""How long 10,000 slides take on N processes with ``--shard``, from the times that were measured on one.

Command::

    python benchmarks/scaling_simulation.py

A process has two cores. A slide costs ``FIXED_S`` and its patches at ``PATCHES_PER_S`` (fitted to
`results/slide-speed.csv` and `results/slide-memory.csv`: 27,330 patches in 13.2 s). Sizes of slides, bytes
read and the speed of the storage are assumptions, not measurements: log-normal sizes with the median of the
slide that was measured, 1 GB a slide. All processes share the storage's bandwidth evenly; reading goes on
beside computing, so the slower of the two counts. Each process takes the next free slide. It looks once at
every slide to see whether it is finished (3 MB; 20 ms measured on a local disk), and at the end, one process
at a time, at every summary (0.3 ms measured on a local disk; a network file system takes longer).

Results: `results/scaling-simulation.csv`, shown in `docs/scaling.md`.
"""

import heapq
from pathlib import Path

import numpy as np
import pandas as pd

RESULTS = Path(__file__).parent / "results" / "scaling-simulation.csv"
N_SLIDES = 10_000
PATCHES_PER_S, FIXED_S = 4382, 7.0
MEDIAN_PATCHES, SIGMA = 27_330, 0.6
SLIDE_GB, LOOK_GB, LOOK_S, GATHER_S = 1.0, 0.003, 0.02, 0.0003


def simulate(n_processes: int, gb_per_s: float, seed: int = 0) -> dict[str, float]:
    """Return hours until all slides are done, and what part of them was spent on what."""
    patches = MEDIAN_PATCHES * np.random.default_rng(seed).lognormal(0, SIGMA, N_SLIDES)
    computing = FIXED_S + patches / PATCHES_PER_S
    reading = SLIDE_GB * patches / patches.mean() * n_processes / gb_per_s
    ends = [0.0] * n_processes
    for seconds in np.maximum(computing, reading):
        heapq.heapreplace(ends, ends[0] + seconds)
    looking = N_SLIDES * (LOOK_S + LOOK_GB * n_processes / gb_per_s)
    gathering = N_SLIDES * n_processes * GATHER_S
    total = max(ends) + looking + gathering
    return {
        "processes": n_processes,
        "storage_gb_per_s": gb_per_s,
        "hours": round(total / 3600, 2),
        "efficiency": round(computing.sum() / n_processes / total, 3),
        "looking_hours": round(looking / 3600, 2),
        "gathering_hours": round(gathering / 3600, 2),
        "last_slides_minutes": round((max(ends) - min(ends)) / 60, 2),
        "waiting_for_storage": round(float((reading > computing).mean()), 3),
    }


if __name__ == "__main__":
    table = pd.DataFrame([simulate(n, speed) for speed in (1.0, 10.0) for n in (1, 4, 16, 64, 256)])
    table.to_csv(RESULTS, index=False, lineterminator="\n")
    print(table.to_string(index=False))
