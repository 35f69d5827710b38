"""Whether training in bfloat16 ends where float32 ends: pairs of runs with the same seed.

The recipes that train in bfloat16, `idc-small` and `pcam-small`, are shortened and trained in both precisions
from the same initial weights, in the same order of patches and with the same augmentation; only the precision
differs. After every epoch the AUROC of the validation patches is kept. Reported: the mean paired difference
after the last epoch (bfloat16 less float32) with its 90 % interval (Student's t over seeds), beside the
standard deviation over seeds of float32 alone.

Command::

    python benchmarks/fast_paths.py idc-small PACK --seeds 10 --work DIR

PACK is a pack of IDC (without patient 8863) or of PCam (its training patches). Patches drawn at random from
it validate, of the same slides as those that train, since on other slides seeds differ by far more than the
two precisions do. Runs whose rows are in the results are not repeated. Results: `results/fast-paths.csv`.
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
SETTINGS = {
    "idc-small": {"train.epochs": 4, "model.tta": "none", "model.context": 0},
    "pcam-small": {"train.epochs": 1, "train.fraction": 0.6, "model.tta": "none"},
}
PRECISIONS = ("fp32", "bf16")
N_VALIDATION, N_TEST, CONFIDENCE = {"idc-small": 1500, "pcam-small": 2400}, 100, 0.90


def copy_anonymous(pack: biopsy.Pack, recipe: str, path: Path) -> biopsy.Pack:
    """Copy the patches used into a pack without patients, which may be divided patch by patch."""
    if (path / "pack.json").exists():
        return biopsy.Pack.open(path)
    left_out = (
        pack.table["patient_id"] == "8863"
        if recipe == "idc-small"
        else pack.table["official_subset"] != "train"
    )
    rows = np.flatnonzero(~left_out)
    return biopsy.Pack.from_arrays(pack.patches[rows], pack.target[rows], out=path)


def divide(pack: biopsy.Pack, n_validation: int) -> str:
    """Store a split with patches drawn at random for validation, and a few for the test; gives its name."""
    subset = np.full(len(pack), "train", object)
    drawn = np.random.default_rng(0).permutation(len(pack))
    subset[drawn[:n_validation]], subset[drawn[-N_TEST:]] = "validation", "test"
    base = split(pack, protocol="patients", save=False)
    save_split(pack, with_subsets(base, pack, subset, name="fast-paths", note={}))
    return "fast-paths"


def main() -> None:
    """Train what is missing, then compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", choices=SETTINGS)
    parser.add_argument("pack", type=Path)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--work", type=Path, required=True)
    arguments = parser.parse_args()
    recipe = arguments.recipe
    pack = copy_anonymous(biopsy.Pack.open(arguments.pack), recipe, arguments.work / f"{recipe}.pack")
    name = divide(pack, N_VALIDATION[recipe])
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
