"""How long the numbers of an evaluation take, and how much memory: every metric with every interval.

Predictions of synthetic test patches, of patients who differ in prevalence and in how hard they are, go
through `biopsy.judging.evaluation.measure_predictions` in a process of its own, its threads held to the cores
that are stated. No network is run: what it says is drawn.

    python benchmarks/evaluation_speed.py --patches 50000 --patients 50 --cores 2

Results: `results/evaluation-speed.csv`, one row a measurement. The aim is 20 s and 1 GB at 50,000 patches of
50 patients on two cores.
"""

import argparse
import csv
import json
import os
import platform
import resource
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from scipy.special import expit

RESULTS = Path(__file__).parent / "results" / "evaluation-speed.csv"


def draw_predictions(n_patches: int, n_patients: int, seed: int = 0) -> SimpleNamespace:
    """Draw targets, patients and probabilities as `measure_predictions` reads them from a pack."""
    rng = np.random.default_rng(seed)
    patient = np.sort(rng.integers(n_patients, size=n_patches))
    target = (rng.random(n_patches) < rng.beta(1.5, 3.5, n_patients)[patient]).astype(int)
    score = rng.normal(0, 0.6, n_patients)[patient] + 2 * target - 1.3 + rng.normal(0, 1, n_patches)
    pack = SimpleNamespace(
        target=target,
        group_ids=np.array([f"patient-{index:05d}" for index in range(n_patients)], dtype=object)[patient],
        positive_index=1,
        class_names=["not IDC", "IDC"],
        unit="patient",
    )
    prob = expit(score)
    return SimpleNamespace(pack=pack, probs=np.stack([1 - prob, prob], axis=1))


def measure_here(n_patches: int, n_patients: int) -> None:
    """Evaluate in this process, and print seconds and peak memory as JSON."""
    from biopsy.judging.evaluation import measure_predictions

    drawn = draw_predictions(n_patches, n_patients)
    before_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    start = time.perf_counter()
    threshold = {"value": 0.4, "rule": "youden", "chosen_on": "val"}
    found = measure_predictions(drawn.pack, np.arange(n_patches), drawn.probs, threshold, seed=0)
    seconds = time.perf_counter() - start
    usage = resource.getrusage(resource.RUSAGE_SELF)
    row = {
        "patches": n_patches,
        "patients": n_patients,
        "entries": " ".join(found),
        "seconds": round(seconds, 2),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "start_rss_mb": round(before_mb),
        "peak_rss_mb": round(usage.ru_maxrss / 1000),
    }
    print(json.dumps(row))


def measure_apart(n_patches: int, n_patients: int, cores: int) -> dict[str, object]:
    """Evaluate in a process of its own on so many cores."""
    threads = {f"{name}_NUM_THREADS": str(cores) for name in ("OMP", "OPENBLAS", "MKL")}
    command = [sys.executable, __file__, "--here", "--patches", str(n_patches), "--patients", str(n_patients)]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, **threads}
    ).stdout
    return json.loads(done.splitlines()[-1])


def describe_machine(cores: int) -> dict[str, object]:
    """Give what a reader needs to compare: processor, cores, load by others, versions."""
    from importlib.metadata import version

    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "processor": names[0] if names else platform.processor(),
        "cores": cores,
        "load_at_start": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "scipy": version("scipy"),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--patches", type=int, default=50_000)
    parser.add_argument("--patients", type=int, default=50)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        measure_here(arguments.patches, arguments.patients)
        raise SystemExit
    machine = describe_machine(arguments.cores)
    rows = [
        measure_apart(arguments.patches, arguments.patients, arguments.cores) | machine
        for _ in range(arguments.repeats)
    ]
    new = not RESULTS.exists()
    with open(RESULTS, "a", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        if new:
            writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print("\n".join(f"{key:>14}: {value}" for key, value in row.items()))
