"""How long an evaluation takes, and how much memory: every number with every interval.

A pack of noise and a run on it are made, then `biopsy.evaluate` judges the run's test
subset in a process of its own. All is as for any run (metrics and intervals over patients, calibration,
decisions, abstention, subgroups of two joined columns, colour alone, tables written) but for the network,
whose logits are drawn from patients who differ in prevalence and in how hard they are. Patches have 16 px:
pixels are mapped from the pack's file, and what the system holds of it counts as the process's memory.

    python benchmarks/evaluation_speed.py --patches 50000 --patients 50 --cores 2

Results: `results/evaluation-speed.csv`, one row per measurement. Aim: 20 s and 1 GB at 50,000 patches of
50 patients on two cores.
"""

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from recording import append_rows

RESULTS = Path(__file__).parent / "results" / "evaluation-speed.csv"
PATCH_PX = 16
LEARNING = {"train": (4, 50), "validation": (20, 50)}  # patients and patches of each on the other subsets
SETTINGS = (
    "preprocessing.input_px=16",
    "model.params.base_channels=4",
    "train.epochs=4",
    "train.batch_size=8",
    "model.context=0",
)


def make_run(folder: Path, n_patches: int, n_patients: int) -> None:
    """Write a pack with a test subset of the asked size, and a run on it."""
    from biopsy.data.pack_files import PIXELS, finish_pack, patch_sha256
    from biopsy.data.packs import Pack
    from biopsy.training.train import train

    rng = np.random.default_rng(0)
    counts = [(subset, n_each) for subset, (n, n_each) in LEARNING.items() for _ in range(n)]
    counts += [("test", len(part)) for part in np.array_split(np.arange(n_patches), n_patients)]
    patient = np.repeat(np.arange(len(counts)), [n for _, n in counts])
    share = rng.beta(1.5, 3.5, len(counts)).clip(0.05, 0.95)
    target = (rng.random(len(patient)) < share[patient]).astype(int)
    patches = rng.integers(0, 200, (len(patient), PATCH_PX, PATCH_PX, 3), dtype=np.uint8)
    patches += (20 * target[:, None, None, None]).astype(np.uint8)  # a little brighter: enough to learn from
    names = np.array([f"patient-{index:05d}" for index in range(len(counts))])[patient]
    table = pd.DataFrame(
        {
            "patch_id": [f"patch-{index:07d}" for index in range(len(patient))],
            "patient_id": names,
            "slide_id": names,
            "site_id": np.array(["north", "south", "west"])[patient % 3],
            "scanner": np.array(["a", "b"])[patient % 2],
            "x": pd.array([None] * len(patient), dtype="Int64"),
            "y": pd.array([None] * len(patient), dtype="Int64"),
            "target": target,
            "width": PATCH_PX,
            "height": PATCH_PX,
            "official_subset": np.array([subset for subset, _ in counts])[patient],
            "sha256": [patch_sha256(patch) for patch in patches],
            "source": "drawn",
        }
    )
    pack = folder / "drawn.pack"
    pack.mkdir()
    np.save(pack / PIXELS, patches)
    finish_pack(
        pack,
        table,
        dataset="drawn",
        class_names=["not IDC", "IDC"],
        positive_class="IDC",
        mpp=1.0,
        patch_px=PATCH_PX,
        origin={"source": "benchmarks/evaluation_speed.py"},
    )
    train(
        "idc-small",
        Pack.open(pack),
        split="official",
        overrides=SETTINGS,
        out=folder / "run",
        device="cpu",
    )


def draw_logits(target: np.ndarray, group_ids: np.ndarray) -> np.ndarray:
    """Draw logits of two classes, ``(n, 2)``, as a network might give them."""
    rng = np.random.default_rng(1)
    codes = pd.factorize(group_ids)[0]
    hard = rng.normal(0, 0.6, codes.max() + 1)[codes]
    logit = hard + 2 * target - 1.3 + rng.normal(0, 1, len(target))
    return np.stack([-logit / 2, logit / 2], axis=1)


def read_peak_mb() -> int:
    """Return the most memory this process has held (Linux); `resource` would count its parent too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1000 for line in lines if line.startswith("VmHWM"))


def evaluate_here(folder: Path) -> None:
    """Evaluate in this process, and print seconds and peak memory as JSON."""
    from biopsy.evaluation import evaluate as evaluation

    class Drawn:
        software = ("none", "0")

        def logits(self, patches: Any, sizes: Any, rows: Any) -> Any:
            table = pd.read_parquet(folder / "drawn.pack" / "patches.parquet").iloc[rows]
            return draw_logits(table["target"].to_numpy(int), table["patient_id"].to_numpy(str))

    evaluation.open_predictor = lambda *_: contextlib.nullcontext(Drawn())  # type: ignore[assignment]
    at_start_mb, start, start_cpu = read_peak_mb(), time.perf_counter(), time.process_time()
    found = evaluation.evaluate(folder / "run")
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    row = {
        "patches": found["n_patches"],
        "patients": found["n_patients"],
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu_seconds, 2),
        "rss_at_start_mb": at_start_mb,
        "peak_rss_mb": read_peak_mb(),
        "entries": " ".join(key for key in found if found[key] is not None),
    }
    print(json.dumps(row))


def evaluate_apart(folder: Path, cores: int) -> dict[str, object]:
    """Evaluate in a process of its own with so many threads."""
    threads = {f"{name}_NUM_THREADS": str(cores) for name in ("OMP", "OPENBLAS", "MKL")}
    command = [sys.executable, __file__, "--here", str(folder)]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, **threads}
    ).stdout
    return json.loads(done.splitlines()[-1])


def describe_machine(cores: int) -> dict[str, object]:
    """Return what a reader needs to compare: processor, cores, load by others, versions."""
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
    parser.add_argument("--here", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        evaluate_here(arguments.here)
        raise SystemExit
    with tempfile.TemporaryDirectory() as place:
        make_run(Path(place), arguments.patches, arguments.patients)
        rows = [
            evaluate_apart(Path(place), arguments.cores) | describe_machine(arguments.cores)
            for _ in range(arguments.repeats)
        ]
    append_rows(RESULTS, rows)
    for row in rows:
        print("\n".join(f"{key:>15}: {value}" for key, value in row.items()))
