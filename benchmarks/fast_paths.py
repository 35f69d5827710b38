"""Whether training in bfloat16 ends where float32 ends: pairs of runs with the same seed.

The recipes that train in bfloat16, `idc-small` and `pcam-small`, are shortened and trained in both precisions
from the same initial weights, in the same order of patches and with the same augmentation; only the precision
differs. After every epoch the AUROC of the validation patches is kept. Reported: the mean paired difference
after the last epoch (bfloat16 less float32) with its 90 % interval (Student's t over seeds), beside the
standard deviation over seeds of float32 alone.

Command::

    python benchmarks/fast_paths.py idc-small PACK --seeds 10 --work DIR

PACK is a pack of IDC, of which `--val-patients` validate, or of PCam, of whose training patches 2,400 drawn
at random do. Runs whose rows are in the results are not repeated. Results: `results/fast-paths.csv`.
"""

import argparse
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

import biopsy
from biopsy.data.splits import save_split, split, with_subsets
from recording import append_rows

RESULTS = Path(__file__).parent / "results" / "fast-paths.csv"
SETTINGS = {"idc-small": {"train.epochs": 3}, "pcam-small": {"train.epochs": 1, "train.fraction": 0.6}}
PRECISIONS = ("fp32", "bf16")
N_VALIDATION, CONFIDENCE = 2400, 0.90


def divide(pack: biopsy.Pack, recipe: str, val_patients: list[str]) -> str:
    """Store a split of training and validation patches; gives its name."""
    name = "fast-paths"
    if recipe == "idc-small":
        base = split(pack, protocol="patients", save=False)
        subset = np.where(pack.table["patient"].isin(val_patients), "validation", "train")
    else:
        base = split(pack, protocol="official", save=False)
        trains = np.flatnonzero(pack.table["official_subset"] == "train")
        subset = np.full(len(pack), "test", object)
        subset[trains] = "train"
        subset[np.random.default_rng(0).choice(trains, N_VALIDATION, replace=False)] = "validation"
    save_split(pack, with_subsets(base, pack, subset, name=name, note={}))
    return name


def main() -> None:
    """Train what is missing, then compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", choices=SETTINGS)
    parser.add_argument("pack", type=Path)
    parser.add_argument("--val-patients", default="8867")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--work", type=Path, required=True)
    arguments = parser.parse_args()
    recipe, pack = arguments.recipe, biopsy.Pack.open(arguments.pack)
    name = divide(pack, recipe, arguments.val_patients.split(","))
    rows = pd.read_csv(RESULTS).to_dict("records") if RESULTS.exists() else []
    done = {(row["recipe"], row["seed"], row["precision"]) for row in rows}
    for seed in range(arguments.seeds):
        for precision in PRECISIONS:
            if (recipe, seed, precision) not in done:
                row = train(recipe, pack, name, seed, precision, arguments.work / f"{seed}-{precision}")
                append_rows(RESULTS, [row])
                print(row, flush=True)
    report(recipe)


def train(recipe: str, pack: biopsy.Pack, split_name: str, seed: int, precision: str, out: Path) -> dict:
    """Train one run; gives its row."""
    shutil.rmtree(out, ignore_errors=True)
    aurocs: list[float] = []
    biopsy.train(
        recipe,
        pack,
        split=split_name,
        seed=seed,
        overrides={**SETTINGS[recipe], "train.precision": precision},
        out=out,
        on_epoch=lambda record: aurocs.append(record["val_auroc"]),
    )
    curve, last = " ".join(f"{auroc:.4f}" for auroc in aurocs), round(aurocs[-1], 5)
    return {"recipe": recipe, "seed": seed, "precision": precision, "auroc": last, "curve": curve}


def report(recipe: str) -> None:
    """Print the paired difference with its interval."""
    table = pd.read_csv(RESULTS).query("recipe == @recipe")
    auroc = table.pivot(index="seed", columns="precision", values="auroc").dropna()
    difference = auroc["bf16"] - auroc["fp32"]
    n, mean, error = len(difference), difference.mean(), stats.sem(difference)
    low, high = stats.t.interval(CONFIDENCE, n - 1, loc=mean, scale=error)
    print(
        f"{recipe}: {n} seeds, float32 {auroc['fp32'].mean():.4f} (sd over seeds {auroc['fp32'].std():.4f})"
    )
    print(f"bfloat16 less float32: {mean:+.5f} ({low:+.5f} to {high:+.5f})")


if __name__ == "__main__":
    main()
