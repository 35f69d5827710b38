"""Ours beside its peers, in turns in one run: training, prediction, metrics with intervals.

* training: ``biopsy`` in float32 and bfloat16 beside the post's own Keras code (both as in
  `training_speed.py`), beside a plain PyTorch loop: the same network, ``ImageFolder`` and ``DataLoader`` with
  the same kinds of augmentation, and beside fastai's ``Learner`` with the same network;
* training of the recommended recipe, ``idc-small``, in its precision and in float32, beside a plain loop over
  the same network;
* prediction of the same patches by the same network: `biopsy.models.inference` in float32 and bfloat16 beside
  ``keras.Model.predict`` (the fastest of four batch sizes) and beside the plain loop (batches of 256);
* sensitivity, specificity, AUROC, average precision and Brier score with intervals over patients:
  every metric of `biopsy evaluate` beside a loop of 1,000 bootstrap samples over scikit-learn's
  five.

Every stack is a process of its own that sleeps while another works. The first pass of each (tracing,
conversion, warming up) is not counted. Ratios are of passes in the same turn. A peer that is not installed is
left out with a word (fastai: ``uv run --with fastai``).

    python benchmarks/peers.py ../shared/data/idc/idc_kaggle_subset.zip --turns 5

Results: `results/peers.csv`, one row per task, peer and arm of ours.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from recording import append_rows
from training_speed import BATCH_SIZE, INPUT_PX, describe_machine, draw_files, start_biopsy, start_keras

RESULTS = Path(__file__).parent / "results" / "peers.csv"
IDC_RECIPE = "idc-small"
N_PATIENTS, N_BOOTSTRAP = 50, 1000
KERAS_BATCH_SIZES = (32, 128, 256, 1024)
Pass = Callable[[], int]


def train_biopsy(tree: Path, pack: Path, precision: str = "fp32") -> Pass:
    """Set up ours; the pass returns its patches."""
    return start_biopsy(pack, precision)


def train_keras(tree: Path, pack: Path) -> Pass:
    """Set up the post's code."""
    return start_keras(tree)


def train_pytorch(tree: Path, pack: Path) -> Pass:
    """Set up what a tutorial on PyTorch does, with two workers."""
    import torch
    from torchvision import transforms

    from biopsy.models.networks import build_network

    network = build_network("cancernet", n_classes=2, input_px=INPUT_PX, seed=0).train()
    optimiser = torch.optim.Adagrad(network.parameters(), 1e-2)
    change = [
        transforms.RandomHorizontalFlip(),
        transforms.RandomVerticalFlip(),
        transforms.RandomAffine(20, translate=(0.1, 0.1), scale=(0.95, 1.05), shear=3),
    ]
    return _loop(network, optimiser, _load_folder(tree, INPUT_PX, BATCH_SIZE, change))


def train_fastai(tree: Path, pack: Path) -> Pass:
    """Set up fastai's ``Learner`` over the same network, with its own augmentation on batches."""
    import torch
    from fastai.vision import all as fastai

    from biopsy.models.networks import build_network

    multiprocessing.set_start_method("fork", force=True)  # its DataLoader cannot be pickled
    change = fastai.aug_transforms(
        flip_vert=True, max_rotate=20, min_zoom=0.95, max_zoom=1.05, max_warp=0, max_lighting=0
    )
    block = fastai.DataBlock(
        blocks=(fastai.ImageBlock, fastai.CategoryBlock),
        get_items=fastai.get_image_files,
        get_y=fastai.parent_label,
        splitter=lambda items: (range(len(items)), []),
        item_tfms=fastai.Resize(INPUT_PX, method="squish"),
        batch_tfms=change,
    )
    learner = fastai.Learner(
        block.dataloaders(tree, bs=BATCH_SIZE, num_workers=2, device=torch.device("cpu")),
        build_network("cancernet", n_classes=2, input_px=INPUT_PX, seed=0),
        loss_func=fastai.CrossEntropyLossFlat(),
        opt_func=partial(fastai.OptimWrapper, opt=torch.optim.Adagrad),
        lr=1e-2,
    )

    def run() -> int:
        with learner.no_bar(), learner.no_logging():
            learner.fit(1)
        return len(learner.dls.train) * BATCH_SIZE

    return run


def train_idc_biopsy(tree: Path, pack: Path, precision: str = "") -> Pass:
    """Set up the recommended recipe as it trains: in its precision or another, with averaged weights."""
    from biopsy.data.packs import Pack
    from biopsy.models.engine import Engine, make_loss
    from biopsy.models.weights import make_network
    from biopsy.recipes import load_recipe
    from biopsy.training.batches import Batches
    from biopsy.training.finalize import fit_preprocessing
    from biopsy.training.fit import optimiser_of
    from biopsy.training.weight_averaging import WeightAverage

    recipe, data = load_recipe(IDC_RECIPE), Pack.open(pack)
    settings, rows = recipe.train, np.arange(len(data))
    engine = Engine("cpu", precision or settings.precision)
    network = engine.place(make_network(recipe, 2, 0)[0]).train()
    optimiser = optimiser_of(recipe, network)
    average = WeightAverage(network, settings.ema_decay)
    loss_fn = make_loss("softmax", label_smoothing=settings.label_smoothing)
    batches = Batches.from_pack(data, recipe, rows, fit_preprocessing(recipe, data, rows))
    rng = np.random.default_rng(0)

    def run() -> int:
        n = 0
        for number, (batch, target) in enumerate(batches.iterate(rng.permutation(rows))):
            engine.train_step(network, optimiser, batch, target, loss_fn)
            average.update(number + 1)
            n += len(target)
        return n

    return run


def train_idc_pytorch(tree: Path, pack: Path) -> Pass:
    """Set up a plain loop over the same network, with a colour jitter in place of the stains'."""
    import torch
    from torchvision import transforms

    from biopsy.models.weights import make_network
    from biopsy.recipes import load_recipe

    recipe = load_recipe(IDC_RECIPE)
    network = make_network(recipe, 2, 0)[0].train()
    optimiser = torch.optim.SGD(
        network.parameters(), 0.05, momentum=0.9, nesterov=True, weight_decay=recipe.train.weight_decay
    )
    change = [
        transforms.RandomHorizontalFlip(),
        transforms.RandomVerticalFlip(),
        transforms.ColorJitter(0.2, 0.2, 0.2),
    ]
    return _loop(
        network,
        optimiser,
        _load_folder(tree, recipe.preprocessing.input_px, recipe.train.batch_size, change),
        label_smoothing=recipe.train.label_smoothing,
    )


def _loop(network: Any, optimiser: Any, loader: Any, *, label_smoothing: float = 0.0) -> Pass:
    """Return a pass of the loop that tutorials on PyTorch write."""
    import torch

    loss_fn = torch.nn.CrossEntropyLoss(label_smoothing=label_smoothing)

    def run() -> int:
        n = 0
        for batch, target in loader:
            optimiser.zero_grad()
            loss = loss_fn(network(batch), target)
            loss.backward()
            optimiser.step()
            n += len(target)
        return n

    return run


def predict_biopsy(tree: Path, pack: Path, precision: str = "fp32") -> Pass:
    """Set up our inference on a pack, the network opened as `predict` opens it."""
    from biopsy.data.packs import Pack
    from biopsy.models.classifier import Classifier, ClassifierInfo
    from biopsy.models.engine import Engine
    from biopsy.models.inference import open_predictor
    from biopsy.models.networks import build_network
    from biopsy.models.runtimes import MIN_PATCHES_TO_CONVERT
    from biopsy.recipes.preprocessing import Preprocessing

    data = Pack.open(pack)
    info = ClassifierInfo(
        network="cancernet",
        class_names=data.class_names,
        positive_class=data.class_names[1],
        patch_px=data.info.patch_px,
        mpp=None,
        preprocessing=Preprocessing(input_px=INPUT_PX),
    )
    classifier = Classifier(info, build_network("cancernet", n_classes=2, input_px=INPUT_PX, seed=0))
    predictor = open_predictor(classifier, Engine("cpu", precision), MIN_PATCHES_TO_CONVERT).__enter__()
    return lambda: len(predictor.logits(data.patches, data.sizes))


def predict_keras(tree: Path, pack: Path) -> Pass:
    """Set up ``predict`` of the post's network on its own generator, in the fastest batch size."""
    from keras.src.legacy.preprocessing.image import ImageDataGenerator

    from training_speed import build_keras

    model, runs, seconds = build_keras(), {}, {}
    for batch_size in KERAS_BATCH_SIZES:
        flow = ImageDataGenerator(rescale=1 / 255.0).flow_from_directory(
            tree, target_size=(INPUT_PX, INPUT_PX), shuffle=False, batch_size=batch_size
        )
        runs[batch_size] = partial(model.predict, flow, verbose=0)
        runs[batch_size]()  # traces the graph
        begin = time.perf_counter()
        runs[batch_size]()
        seconds[batch_size] = time.perf_counter() - begin
    best = min(seconds, key=seconds.__getitem__)
    print(f"keras predicts fastest in batches of {best}", flush=True)
    return lambda: len(runs[best]())


def predict_pytorch(tree: Path, pack: Path) -> Pass:
    """Set up the plain loop in evaluation mode."""
    import torch

    from biopsy.models.networks import build_network

    network = build_network("cancernet", n_classes=2, input_px=INPUT_PX, seed=0).eval()
    loader = _load_folder(tree, INPUT_PX, 256)

    def run() -> int:
        with torch.inference_mode():
            return sum(len(network(batch).softmax(dim=1)) for batch, _ in loader)

    return run


def _load_folder(tree: Path, input_px: int, batch_size: int, change: Sequence[Any] = ()) -> Any:
    """Return a DataLoader as tutorials write it, with two workers; shuffled if the patches are changed."""
    from torch.utils.data import DataLoader
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    steps = [transforms.Resize((input_px, input_px)), *change, transforms.ToTensor()]
    folder = ImageFolder(str(tree), transforms.Compose(steps))
    is_training = bool(change)
    return DataLoader(
        folder,
        batch_size,
        shuffle=is_training,
        drop_last=is_training,
        num_workers=2,
        persistent_workers=True,
    )


def _draw_predictions(n_patches: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return classes, probabilities and patients."""
    rng = np.random.default_rng(0)
    groups = np.sort(rng.integers(0, N_PATIENTS, n_patches))
    y_true = (rng.random(n_patches) < rng.beta(1.5, 3.5, N_PATIENTS)[groups]).astype(int)
    score = rng.normal(0, 0.6, N_PATIENTS)[groups] + 2 * y_true - 1.3 + rng.normal(0, 1, n_patches)
    return y_true, 1 / (1 + np.exp(-score)), groups


def measure_biopsy(tree: Path, pack: Path) -> Pass:
    """Set up every metric with its interval over patients."""
    from biopsy.statistics.intervals import estimate_metrics
    from biopsy.statistics.weighted_counts import sort_scores

    y_true, y_prob, groups = _draw_predictions(20_000)

    def run() -> int:
        estimate_metrics(sort_scores(y_true, y_prob, 0.5, group_ids=groups), seed=0)
        return len(y_true)

    return run


def measure_sklearn(tree: Path, pack: Path) -> Pass:
    """Set up a bootstrap over patients of five metrics."""
    from sklearn import metrics

    y_true, y_prob, groups = _draw_predictions(20_000)
    rows = [np.flatnonzero(groups == group) for group in range(N_PATIENTS)]
    rng = np.random.default_rng(1)

    def run() -> int:
        values = []
        for _ in range(N_BOOTSTRAP):
            index = np.concatenate([rows[group] for group in rng.integers(0, N_PATIENTS, N_PATIENTS)])
            truth, prob = y_true[index], y_prob[index]
            values.append(
                [
                    metrics.recall_score(truth, prob >= 0.5),
                    metrics.recall_score(truth, prob >= 0.5, pos_label=0),
                    metrics.roc_auc_score(truth, prob),
                    metrics.average_precision_score(truth, prob),
                    metrics.brier_score_loss(truth, prob),
                ]
            )
        np.quantile(values, [0.025, 0.975], axis=0)
        return len(y_true)

    return run


TASKS: dict[str, dict[str, Callable[[Path, Path], Pass]]] = {
    "train": {
        "biopsy": train_biopsy,
        "biopsy-bf16": partial(train_biopsy, precision="bf16"),
        "keras": train_keras,
        "pytorch": train_pytorch,
        "fastai": train_fastai,
    },
    "train-idc": {
        "biopsy": train_idc_biopsy,
        "biopsy-fp32": partial(train_idc_biopsy, precision="fp32"),
        "pytorch": train_idc_pytorch,
    },
    "predict": {
        "biopsy": predict_biopsy,
        "biopsy-bf16": partial(predict_biopsy, precision="bf16"),
        "keras": predict_keras,
        "pytorch": predict_pytorch,
    },
    "metrics": {"biopsy": measure_biopsy, "scikit-learn": measure_sklearn},
}
OPTIONAL = ("fastai",)
"""Peers that are left out where they are not installed."""


def work(pipe: Connection, start: Callable[[Path, Path], Pass], tree: Path, pack: Path) -> None:
    """Do a pass whenever told to, and send its rate."""
    run = start(tree, pack)
    while pipe.recv():
        begin = time.perf_counter()
        n = run()
        pipe.send(n / (time.perf_counter() - begin))


def take_turns(task: str, tree: Path, pack: Path, turns: int) -> dict[str, list[float]]:
    """Return the rates of every stack, turn by turn."""
    context = multiprocessing.get_context("spawn")
    pipes = {}
    for name, start in TASKS[task].items():
        if name in OPTIONAL and find_spec(name) is None:
            print(f"{task}: {name} is not installed and left out", flush=True)
            continue
        pipes[name], theirs = context.Pipe()
        context.Process(target=work, args=(theirs, start, tree, pack)).start()
        theirs.close()  # so that a stack that fails ends the run
    rates: dict[str, list[float]] = {name: [] for name in pipes}
    try:
        for turn in range(turns + 1):
            for name, pipe in pipes.items():
                pipe.send(True)
                rate = pipe.recv()
                if turn:
                    rates[name].append(rate)
                    print(f"{task} {turn}/{turns} {name:>12} {rate:10.0f} per s", flush=True)
    finally:  # or the others would wait for their turn for ever
        for pipe in pipes.values():
            with suppress(BrokenPipeError):
                pipe.send(False)
    return rates


def summarise(task: str, rates: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Return a row for each arm of ours and each peer: medians, and the ratio with its range over turns."""
    arms = [name for name in rates if name.startswith("biopsy")]
    rows = []
    for arm, name in product(arms, rates.keys() - set(arms)):
        ratios = [ours / other for ours, other in zip(rates[arm], rates[name], strict=True)]
        rows.append(
            {
                "task": task,
                "peer": name,
                "biopsy_per_s": round(statistics.median(rates[arm])),
                "peer_per_s": round(statistics.median(rates[name])),
                "ratio": round(statistics.median(ratios), 2),
                "ratio_min": round(min(ratios), 2),
                "ratio_max": round(max(ratios), 2),
                "turns": len(ratios),
                "arm": arm,
            }
        )
    return sorted(rows, key=lambda row: (str(row["peer"]), str(row["arm"])))


def compare(source: Path, n_patches: int, turns: int, tasks: list[str]) -> None:
    """Run the tasks one after another, print and append their rows."""
    from biopsy.data.prepare import prepare

    load = round(os.getloadavg()[0], 1)
    with tempfile.TemporaryDirectory() as folder:
        tree, archive = draw_files(source, n_patches, Path(folder))
        pack = prepare(archive, Path(folder) / "subset.pack").path
        for task in tasks:
            about = {"patches": n_patches, "load_at_start": load} | describe_machine()
            rows = [row | about for row in summarise(task, take_turns(task, tree, pack, turns))]
            append_rows(RESULTS, rows)
            for row in rows:
                print(
                    "{task}, {arm} beside {peer}: {ratio} ({ratio_min}-{ratio_max})".format(**row), flush=True
                )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="a zip in IDC's layout")
    parser.add_argument("--patches", type=int, default=2048)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    arguments = parser.parse_args()
    compare(arguments.source, arguments.patches, arguments.turns, arguments.tasks)
