"""A recipe trained on PCam's training patches and tested on PCam's own validation slides.

Patches name no slide, so validation patches are held back by pseudo-slides (clusters of colour and texture)
of the official training patches, or drawn from them at random. Settings are chosen by the AUROC on held-back
pseudo-slides, not by that on the test subset, nor by that on random validation patches, which have neighbours
in training. Clusters depend on ``--split-seed``.

Command::

    python benchmarks/pcam.py pcam.pack --recipe pcam-small --seeds 0,1,2 --out runs/pcam
    python benchmarks/pcam.py pcam.pack --set augmentation.cutout=0.3 --name "cutout .3" --no-test
    python benchmarks/pcam.py pcam.pack --validation random --patches 4000

The second one changes settings of the recipe and calls its rows NAME; the test subset stays closed. The third
one trains on 4,000 patches.

Finished runs are not trained again, interrupted ones are gone on with. Writes a row per run to
``results/pcam-runs.csv`` as soon as it is there. Intervals are over patches, so they are too narrow.
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd

import biopsy
from biopsy.data.packs import Pack
from biopsy.data.splits import Split, find_split, list_splits, save_split, with_subsets
from biopsy.recipes import load_recipe
from biopsy.training.runs import Run
from training_runs import make_parser, parse_arguments, train_once

RESULTS = Path(__file__).parent / "results" / "pcam-runs.csv"
TESTED = "validation"  # PCam's own subset
RANDOM_SHARE = 0.15 / 0.85  # of the official training patches, about what pseudo-slides take
KEY = ["recipe", "validation", "split_seed", "n_groups", "n_train", "seed"]


def find_or_make_split(pack: Pack, validation: str, seed: int, n_groups: int) -> Split:
    """Return the split that tests on PCam's validation slides."""
    by_appearance = validation == "pseudo-slides"
    name = f"pcam-pseudo-{n_groups}-s{seed}" if by_appearance else f"pcam-random-s{seed}"
    if name in list_splits(pack):
        return find_split(pack, name)
    if by_appearance:
        return biopsy.split(
            pack, protocol="pseudo-slides", test_patients=[TESTED], n_groups=n_groups, name=name, seed=seed
        )
    subset_of = {"train": "train", TESTED: "test"}
    subsets = pack.table["official_subset"].map(subset_of).fillna("").to_numpy("<U10")
    rng = np.random.default_rng(seed)
    for class_index in range(len(pack.class_names)):
        rows = np.flatnonzero((subsets == "train") & (pack.target == class_index))
        subsets[rng.choice(rows, round(RANDOM_SHARE * len(rows)), replace=False)] = "validation"
    official = biopsy.split(pack, protocol="official", seed=seed, save=False)
    note = {"validated": "random patches of the official training subset"}
    split = with_subsets(official, pack, subsets, name=name, note=note)
    save_split(pack, split)
    return split


def measure(run: Run, *, test: bool) -> dict[str, object]:
    """Return metrics on validation and, if asked, test patches; a test subset once opened is not again."""
    auroc = biopsy.evaluate(run, subset="validation")["patch"]["auroc"]
    row = {f"validation_auroc{suffix}": auroc[key] for suffix, key in SUFFIXES.items()}
    if test:
        path = run.path / "evaluation" / "metrics.json"
        metrics = json.loads(path.read_text()) if path.exists() else biopsy.evaluate(run).document
        patch = metrics["patch"]
        row |= {f"test_auroc{suffix}": patch["auroc"][key] for suffix, key in SUFFIXES.items()}
        row |= {name: patch[name]["value"] for name in ("balanced_accuracy", "ece")}
        row["auroc_colour_alone"] = metrics["baseline"]["auroc"]
    return row | {"seconds": round(run.info["seconds"], 1)}


SUFFIXES = {"": "value", "_low": "low", "_high": "high"}


def record(row: dict[str, object]) -> None:
    """Add a row to the results in place of an earlier one of the same run."""
    table = pd.DataFrame([row])
    if RESULTS.exists():
        known = pd.read_csv(RESULTS)
        is_same = (known[KEY].astype(str) == table[KEY].astype(str).iloc[0]).all(axis=1)
        table = pd.concat([known[~is_same], table])
    table.to_csv(RESULTS, index=False, float_format="%.5g")


def main() -> None:
    parser = make_parser(__doc__.partition("\n")[0], "pcam-small", "runs/pcam")
    parser.add_argument("--validation", choices=["pseudo-slides", "random"], default="pseudo-slides")
    parser.add_argument("--n-groups", type=int, default=24, help="number of pseudo-slides (default: 24)")
    parser.add_argument("--split-seed", type=int, default=0)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--fraction", type=float, help="fraction of the training patches (default: all)")
    size.add_argument("--patches", type=int, help="number of training patches (default: all)")
    parser.add_argument("--no-test", action="store_true", help="leave the test subset closed")
    arguments = parse_arguments(parser)
    pack = Pack.open(arguments.pack)
    split = find_or_make_split(pack, arguments.validation, arguments.split_seed, arguments.n_groups)
    fraction = arguments.fraction
    if arguments.patches is not None:
        n_train = int((split.subsets(pack) == "train").sum())
        if not 0 < arguments.patches <= n_train:
            parser.error(f"--patches {arguments.patches}: the split has {n_train} training patches")
        fraction = arguments.patches / n_train
    settings = arguments.set + ([f"train.fraction={fraction}"] if fraction is not None else [])
    recipe = load_recipe(arguments.recipe, settings)
    name = arguments.name or recipe.name
    for seed in map(int, arguments.seeds.split(",")):
        size_name = f"-f{recipe.train.fraction:.4f}" if recipe.train.fraction < 1 else ""
        folder = f"{name.replace(' ', '-')}{size_name}-{split.name}-s{seed}"
        run = train_once(recipe, pack, split, seed, arguments.out / folder)
        counts = run.info["split"]
        row = {
            "recipe": name,
            "validation": arguments.validation,
            "split_seed": arguments.split_seed,
            "n_groups": arguments.n_groups if arguments.validation == "pseudo-slides" else 0,
            "n_train": counts["used"]["patches"],
            "n_validation": counts["subsets"]["validation"]["patches"],
            "n_test": counts["subsets"]["test"]["patches"],
            "seed": seed,
            **measure(run, test=not arguments.no_test),
        }
        record(row)
        print(*(f"{key}={value}" for key, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
