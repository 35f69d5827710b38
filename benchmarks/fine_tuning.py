"""The open questions of the VGG16 post: which learning rate, and how many blocks to train.

VGG16's weights are not at hand: SqueezeNet 1.1 with ImageNet weights stands in, and its fire modules for the
blocks. Trained is from ``features.3`` on (all eight modules), ``features.9`` (the last four), ``features.12``
(the last one) or ``head``. AUROC is that of the best epoch on PCam's own validation slides, on a subset of
2,000 training and 1,000 validation patches; they chose the epoch, so the best is optimistic.

Command (one core)::

    BIOPSY_WEIGHTS=weights python benchmarks/fine_tuning.py pcam_train_valid.zip --work work

Appends to ``results/fine-tuning.csv``; runs that are finished in ``work`` are not trained again.
"""

import argparse
import time
import zipfile
from collections import defaultdict
from pathlib import Path, PurePosixPath

import numpy as np
from sklearn.metrics import roc_auc_score

import biopsy
from recording import append_rows

RESULTS = Path(__file__).parent / "results" / "fine-tuning.csv"
N_PATCHES = {"train": 1000, "valid": 500}  # of each class
FIRST_TRAINED = ("head", "features.12", "features.9", "features.3")
LEARNING_RATES = (1e-4, 3e-4, 1e-3)


def draw_subset(archive: Path, out: Path) -> Path:
    """Copy `N_PATCHES` of each subset and class, drawn with seed 0."""
    rng, folders = np.random.default_rng(0), defaultdict(list)
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as subset:
        for name in sorted(name for name in source.namelist() if name.endswith(".jpg")):
            folders[PurePosixPath(name).parent].append(name)
        for folder, names in folders.items():
            for name in rng.choice(names, N_PATCHES[folder.parent.name], replace=False):
                subset.writestr(str(name), source.read(str(name)))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("archive", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--first-trained", nargs="+", default=FIRST_TRAINED)
    parser.add_argument("--lr", type=float, nargs="+", default=LEARNING_RATES)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if not (options.work / "pcam.pack").exists():
        subset = draw_subset(options.archive, options.work / "pcam.zip")
        biopsy.prepare(subset, out=options.work / "pcam.pack")
    for stage in options.first_trained:
        for lr in options.lr:
            begun = time.perf_counter()
            run = biopsy.train(
                "squeezenet-pcam",
                options.work / "pcam.pack",
                split="official",
                overrides={"model.trainable": stage, "train.lr": lr, "train.epochs": options.epochs},
                out=options.work / f"{stage}-{lr:g}",
            )
            frame, _ = run.predictions("validation")
            row = {
                "first_trained": stage,
                "trainable": run.info["parameters"]["trainable"],
                "lr": lr,
                "epochs": options.epochs,
                "seed": 0,
                "auroc": f"{roc_auc_score(frame['target'], frame['prob']):.4f}",
                "seconds": f"{time.perf_counter() - begun:.0f}",
            }
            append_rows(RESULTS, [row])
            print(row, flush=True)


if __name__ == "__main__":
    main()
