"""Seconds of training until a sustained validation AUROC of .90 on PCam's training patches.

* ``pcam-small``: the recipe as it is; ``pcam-small-1``: the same with ``train.epochs=1``, so that its
  learning rate falls within one pass;
* ``keras-cancernet``: the post's network, augmentation and optimiser in Keras, from files, batches of 32;
* ``pytorch-resnet18``: torchvision's ResNet-18 from random weights, ``ImageFolder`` and ``DataLoader``,
  flips, Adam at 1e-3, batches of 64.

All train on the same patches and are validated on the same 1,500 others of the same slides (copies of a patch
left out) after every 1,024 training patches. The time is that at which the first of three validations in a
row, all at .90 or more, began; a run that has not come there in ``--minutes`` is censored. Every run is a
process on one core, and time is its processor time from the first import on, validation not counted: on an
idle core that is the time of day, and what else the machine does hardly changes it.

    python benchmarks/time_to_quality.py ../shared/data/pcam/pcam_train_valid.zip --work DIR

Runs whose row is in the results (same arm, seed; not censored, or censored as late) are not repeated, so
the command goes on where it was stopped. Results: ``results/time-to-quality.csv``; the validations of a run
lie in ``DIR/<arm>-<seed>.csv``.
"""

import argparse
import csv
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from recording import append_rows

RESULTS = Path(__file__).parent / "results" / "time-to-quality.csv"
TARGET_AUROC, N_IN_A_ROW = 0.90, 3
N_VALIDATION, EVERY = 1500, 1024


class Data(NamedTuple):
    """The patches: a pack with the rows of both subsets, and the same as folders of files."""

    pack: Path
    train: np.ndarray
    val: np.ndarray
    tree: Path


class Learner(NamedTuple):
    """What a stack does in turns: learn from `EVERY` patches, and score the validation patches."""

    learn: Callable[[], object]
    score: Callable[[], tuple[np.ndarray, np.ndarray]]
    """Return classes and scores of the validation patches."""


def open_data(source: Path, work: Path) -> Data:
    """Prepare the archive, draw the validation patches, and unpack its files into a folder per subset."""
    from biopsy.data.packs import Pack
    from biopsy.data.prepare import prepare

    path, tree = work / "pcam.pack", work / "tree"
    if not path.exists():
        prepare(source, path)
    table = Pack.open(path).table
    rows = np.flatnonzero((table["official_subset"] == "train") & ~table["sha256"].duplicated())
    val = np.sort(np.random.default_rng(0).choice(rows, N_VALIDATION, replace=False))
    data = Data(path, np.setdiff1d(rows, val), val, tree)
    if not tree.exists():
        with zipfile.ZipFile(source) as archive:
            for subset in ("train", "val"):
                for name, label in table.loc[getattr(data, subset), ["source", "target"]].to_numpy():
                    target = tree / subset / str(label) / Path(name).name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(archive.read(name))
    return data


def start_biopsy(data: Data, seed: int, epochs: int | None = None) -> Learner:
    """Set up ``pcam-small`` as `biopsy train` runs it: schedule, precision, averaged weights."""
    from biopsy.data.packs import Pack
    from biopsy.models.engine import Engine, make_loss
    from biopsy.models.inference import predict_logits
    from biopsy.models.weights import make_network
    from biopsy.recipes import load_recipe
    from biopsy.training.batches import Batches
    from biopsy.training.finalize import fit_preprocessing
    from biopsy.training.fit import optimiser_of
    from biopsy.training.optimisers import learning_rate, set_learning_rate
    from biopsy.training.sampling import sample_epoch
    from biopsy.training.weight_averaging import WeightAverage

    recipe = load_recipe("pcam-small", () if epochs is None else (f"train.epochs={epochs}",))
    pack, settings = Pack.open(data.pack), recipe.train
    preprocessing, engine = fit_preprocessing(recipe, pack, data.train), Engine("cpu", settings.precision)
    network = engine.place(make_network(recipe, 2, seed)[0]).train()
    optimiser, average = optimiser_of(recipe, network), WeightAverage(network, settings.ema_decay)
    loss_fn = make_loss("softmax", label_smoothing=settings.label_smoothing)
    batches = Batches.from_pack(pack, recipe, data.train, preprocessing, seed=seed)
    total_steps = settings.epochs * batches.count(len(data.train))

    def update() -> Iterator[None]:
        step = 0
        while True:
            epoch = step // batches.count(len(data.train)) + 1
            order = sample_epoch(data.train, pack.target, sampling="none", seed=seed, epoch=epoch)
            for batch, target in batches.iterate(order, epoch=epoch):
                rate = learning_rate(
                    step, lr=settings.lr, schedule=settings.schedule, total_steps=total_steps
                )
                set_learning_rate(optimiser, rate)
                engine.train_step(network, optimiser, batch, target, loss_fn)
                step += 1
                average.update(step)
                yield

    updates = update()

    def score() -> tuple[np.ndarray, np.ndarray]:
        with average.applied():
            logits = predict_logits(network, preprocessing, pack.patches, pack.sizes, data.val, engine=engine)
        return pack.target[data.val], logits[:, 1] - logits[:, 0]

    return Learner(lambda: [next(updates) for _ in range(EVERY // settings.batch_size)], score)


def start_keras(data: Data, seed: int) -> Learner:
    """Set up the post's code."""
    import keras
    from keras.src.legacy.preprocessing.image import ImageDataGenerator

    from training_speed import BATCH_SIZE, INPUT_PX, augment_keras, build_keras

    keras.utils.set_random_seed(seed)
    model = build_keras()
    options: dict[str, Any] = {"target_size": (INPUT_PX, INPUT_PX)}
    train = augment_keras().flow_from_directory(
        data.tree / "train", class_mode="categorical", batch_size=BATCH_SIZE, seed=seed, **options
    )
    val = ImageDataGenerator(rescale=1 / 255.0).flow_from_directory(
        data.tree / "val", shuffle=False, batch_size=256, **options
    )
    return Learner(
        lambda: model.fit(train, steps_per_epoch=EVERY // BATCH_SIZE, epochs=1, verbose=0),
        lambda: (val.classes, model.predict(val, verbose=0)[:, 1]),
    )


def start_resnet(data: Data, seed: int) -> Learner:
    """Set up the loop that tutorials on PyTorch write."""
    import torch
    from torch.utils.data import DataLoader
    from torchvision import models, transforms
    from torchvision.datasets import ImageFolder

    torch.manual_seed(seed)
    network = models.resnet18(weights=None, num_classes=2)
    optimiser, loss_fn = torch.optim.Adam(network.parameters(), 1e-3), torch.nn.CrossEntropyLoss()
    flips = [transforms.RandomHorizontalFlip(), transforms.RandomVerticalFlip(), transforms.ToTensor()]
    train = ImageFolder(str(data.tree / "train"), transforms.Compose(flips))
    val = ImageFolder(str(data.tree / "val"), transforms.ToTensor())
    loader = DataLoader(train, 64, shuffle=True, drop_last=True)

    def repeat() -> Iterator[Any]:
        while True:
            yield from loader

    batches = repeat()

    def learn() -> None:
        network.train()
        for _ in range(EVERY // 64):
            batch, target = next(batches)
            optimiser.zero_grad()
            loss_fn(network(batch), target).backward()
            optimiser.step()

    def score() -> tuple[np.ndarray, np.ndarray]:
        network.eval()
        with torch.inference_mode():
            logits = torch.cat([network(batch) for batch, _ in DataLoader(val, 256)]).numpy()
        return np.array(val.targets), logits[:, 1] - logits[:, 0]

    return Learner(learn, score)


ARMS: dict[str, Callable[[Data, int], Learner]] = {
    "pcam-small": start_biopsy,
    "pcam-small-1": lambda data, seed: start_biopsy(data, seed, epochs=1),
    "keras-cancernet": start_keras,
    "pytorch-resnet18": start_resnet,
}


def find_sustained(curve: list[tuple[float, float]]) -> float | None:
    """Return the seconds of the first of `N_IN_A_ROW` validations that reach the target; None without."""
    reached = [auroc >= TARGET_AUROC for _, auroc in curve]
    for first in range(len(curve) - N_IN_A_ROW + 1):
        if all(reached[first : first + N_IN_A_ROW]):
            return curve[first][0]
    return None


def run(arm: str, seed: int, data: Data, limit_s: float, path: Path) -> dict[str, object]:
    """Train until the target is sustained or the time is up; returns the row."""
    from sklearn.metrics import roc_auc_score

    started = time.process_time()
    learner = ARMS[arm](data, seed)
    spent, curve, result = time.process_time() - started, [], None
    while result is None and spent < limit_s:
        started = time.process_time()
        learner.learn()
        spent += time.process_time() - started
        curve.append((spent, float(roc_auc_score(*learner.score()))))
        append_rows(path, [{"seconds": round(spent, 1), "auroc": round(curve[-1][1], 4)}])
        result = find_sustained(curve)
    return {
        "arm": arm,
        "seed": seed,
        "seconds": "" if result is None else round(result, 1),
        "censored_s": round(limit_s) if result is None else "",
        "best_auroc": round(max(auroc for _, auroc in curve), 4),
        "train_patches": EVERY * len(curve),
        "images_per_s": round(EVERY * len(curve) / curve[-1][0]),
        "load": round(os.getloadavg()[0], 1),
    }


def is_done(arm: str, seed: int, limit_s: float) -> bool:
    """Return whether a row answers the run: its target was reached, or it was censored as late."""
    if not RESULTS.exists():
        return False
    with open(RESULTS, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["arm"] == arm and int(row["seed"]) == seed]
    return any(row["seconds"] or float(row["censored_s"]) >= round(limit_s) for row in rows)


def work_as(arm: str, seed: int, source: Path, work: Path, limit_s: float) -> None:
    """Do one run on one core and append its row."""
    from training_speed import describe_machine

    curve = work / f"{arm}-{seed}.csv"
    curve.unlink(missing_ok=True)
    row = run(arm, seed, open_data(source, work), limit_s, curve)
    append_rows(RESULTS, [row | describe_machine()])
    print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="PCam's class folders in a zip")
    parser.add_argument("--work", type=Path, required=True, help="folder for the pack, the files and curves")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--work-as", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.work_as:
        arm, seed = arguments.work_as
        work_as(arm, int(seed), arguments.source, arguments.work, 60 * arguments.minutes)
        sys.exit()
    open_data(arguments.source, arguments.work)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    for seed in arguments.seeds:  # seed by seed, so that all arms have the same times of day
        for arm in arguments.arms:
            if not is_done(arm, seed, 60 * arguments.minutes):
                command = [sys.executable, __file__, str(arguments.source), "--work", str(arguments.work)]
                options = ["--minutes", str(arguments.minutes), "--work-as", arm, str(seed)]
                subprocess.run([*command, *options], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
