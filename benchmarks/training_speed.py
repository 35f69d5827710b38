"""How many images a second CancerNet trains at, beside the stack its publication used.

Two processes read the same files and take turns, one pass over all patches each, the other one idle:

* ``biopsy``: a pack made of them once (its time is given apart), batches with the post's augmentation, the
  recipe's loss, class weights and Adagrad;
* ``keras``: the post's own lines, ``ImageDataGenerator.flow_from_directory`` and ``fit`` on TensorFlow.

Both are measured end to end: pixels read, resized, augmented, and the network updated, 32 patches at a time
in float32 on all cores. The first pass of each, in which TensorFlow traces its graph, is not counted. The
share of the machine's matrix speed is the floating-point operations of a step per second over those of a
large matrix product in the same run.

Command::

    python benchmarks/training_speed.py ../shared/data/idc/idc_kaggle_subset.zip

A row is appended to ``results/training-speed.csv``; times of day with other load on the machine are no use.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from recording import append_rows

RESULTS = Path(__file__).parent / "results"
BATCH_SIZE, INPUT_PX = 32, 48
CLASS_WEIGHTS = (1.0, 2.52)


def build_keras() -> Any:
    """Return the post's network, compiled as in the post."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import keras
    from keras import layers

    model = keras.Sequential([keras.Input((INPUT_PX, INPUT_PX, 3))])
    for stage in ((32,), (64, 64), (128, 128, 128)):
        for channels in stage:
            model.add(layers.SeparableConv2D(channels, (3, 3), padding="same"))
            model.add(layers.Activation("relu"))
            model.add(layers.BatchNormalization())
        model.add(layers.MaxPooling2D((2, 2)))
        model.add(layers.Dropout(0.25))
    model.add(layers.Flatten())
    model.add(layers.Dense(256))
    model.add(layers.Activation("relu"))
    model.add(layers.BatchNormalization())
    model.add(layers.Dropout(0.5))
    model.add(layers.Dense(2))
    model.add(layers.Activation("softmax"))
    rate = keras.optimizers.schedules.InverseTimeDecay(1e-2, decay_steps=1, decay_rate=1e-2 / 40)
    model.compile(loss="binary_crossentropy", optimizer=keras.optimizers.Adagrad(rate), metrics=["accuracy"])
    return model


def augment_keras() -> Any:
    """Return the post's augmentation."""
    from keras.src.legacy.preprocessing.image import ImageDataGenerator

    return ImageDataGenerator(
        rescale=1 / 255.0,
        rotation_range=20,
        zoom_range=0.05,
        width_shift_range=0.1,
        height_shift_range=0.1,
        shear_range=0.05,
        horizontal_flip=True,
        vertical_flip=True,
        fill_mode="nearest",
    )


def start_keras(tree: Path) -> Callable[[], int]:
    """Set up the post's training and return a function that does a pass and returns its number of patches."""
    model = build_keras()
    flow = augment_keras().flow_from_directory(
        tree, class_mode="categorical", target_size=(INPUT_PX, INPUT_PX), shuffle=True, batch_size=BATCH_SIZE
    )
    steps = flow.samples // BATCH_SIZE

    def train_once() -> int:
        model.fit(
            flow, steps_per_epoch=steps, epochs=1, verbose=0, class_weight=dict(enumerate(CLASS_WEIGHTS))
        )
        return steps * BATCH_SIZE

    return train_once


def start_biopsy(path: Path, precision: str) -> Callable[[], int]:
    """Set up ours likewise."""
    from biopsy.data.packs import Pack

    pack = Pack.open(path)
    return start_cancernet(pack.patches, pack.target, pack.sizes, precision)


def start_cancernet(
    patches: Any,
    target: Any,
    sizes: Any,
    precision: str,
    *,
    device: str = "cpu",
    batch_size: int = BATCH_SIZE,
    compiled: bool = False,
) -> Callable[[], int]:
    """Set up this package's training of CancerNet and return a function that does a pass.

    Args:
        compiled: The network is compiled by ``torch.compile`` into CUDA graphs, in the first pass.
    """
    import numpy as np
    import torch

    from biopsy.models.engine import Engine, make_loss
    from biopsy.models.networks import build_network
    from biopsy.recipes.preprocessing import Preprocessing
    from biopsy.recipes.schema import Augmentation
    from biopsy.training.batches import Batches
    from biopsy.training.device_patches import place_patches
    from biopsy.training.optimisers import learning_rate, make_optimiser, set_learning_rate

    engine = Engine(device, precision)  # type: ignore[arg-type]
    network = engine.place(build_network("cancernet", n_classes=2, input_px=INPUT_PX, seed=0)).train()
    optimiser = make_optimiser("adagrad", network.parameters(), 1e-2)
    loss_fn = make_loss("softmax", CLASS_WEIGHTS, device=engine.device)
    batches = Batches(
        patches=patches,
        target=target,
        widths=sizes[:, 0],
        heights=sizes[:, 1],
        preprocessing=Preprocessing(input_px=INPUT_PX),
        augmentation=Augmentation(
            rotation_deg=20, zoom=0.05, shift=0.1, shear_deg=0.05, flip_horizontal=True, flip_vertical=True
        ),
        batch_size=batch_size,
        drop_last=True,
        device=engine.device,
    )
    batches = place_patches(batches, np.arange(len(target)), n_visits=2 * len(target))
    learner = torch.compile(network, mode="reduce-overhead") if compiled else network
    rng, done = np.random.default_rng(0), iter(range(sys.maxsize))

    def train_once() -> int:
        epoch = next(done)
        losses, order = [], rng.permutation(len(target))
        for number, (batch, classes) in enumerate(batches.iterate(order, epoch=epoch)):
            step = epoch * batches.count(len(order)) + number
            set_learning_rate(
                optimiser, learning_rate(step, lr=1e-2, schedule="inverse-time", decay=1e-2 / 40)
            )
            if compiled:
                torch.compiler.cudagraph_mark_step_begin()
            losses.append(engine.train_step(learner, optimiser, batch, classes, loss_fn)[0])
        assert torch.stack(losses).isfinite().all()
        return batches.count(len(order)) * batch_size

    return train_once


def measure_matrix_speed() -> float:
    """Return the machine's GFLOP/s in a 2048 x 2048 float32 product, the best of ten."""
    import torch

    left, right = torch.rand(2, 2048, 2048)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        torch.mm(left, right)
        times.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(times) / 1e9


def count_operations() -> float:
    """Return the floating-point operations of one training step, in GFLOP per patch.

    Three times those of the forward pass: the gradients by weights and by inputs cost as much again each.
    (PyTorch counts the backward pass of a depthwise convolution as if it were a dense one.)
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from biopsy.models.networks import build_network

    network = build_network("cancernet", n_classes=2, input_px=INPUT_PX, seed=0).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.rand(BATCH_SIZE, 3, INPUT_PX, INPUT_PX))
    return 3 * counter.get_total_flops() / BATCH_SIZE / 1e9


class Worker:
    """One of the two stacks in a process of its own, which works when told to and sleeps otherwise."""

    def __init__(self, stack: str, source: Path) -> None:
        command = [sys.executable, __file__, str(source), "--work-as", stack]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self) -> float:
        """Have one pass done; give its images per second."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        for line in self.process.stdout:  # TensorFlow prints beside
            if line.startswith("{"):
                return json.loads(line)["images_per_s"]
        raise RuntimeError("the worker ended before its time; see its output above")

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


def work(stack: str, source: Path) -> None:
    """Do a pass for every line on standard input."""
    if stack == "keras":
        train_once = start_keras(source)
    else:
        train_once = start_biopsy(source, stack.partition("-")[2] or "fp32")
    for _ in sys.stdin:
        start = time.perf_counter()
        n_patches = train_once()
        print(json.dumps({"images_per_s": n_patches / (time.perf_counter() - start)}), flush=True)


def draw_files(source: Path, n_patches: int, folder: Path) -> tuple[Path, Path]:
    """Write files of an IDC archive as the post's tree, one folder per class, and as a smaller archive."""
    tree, archive_path = folder / "tree", folder / "subset.zip"
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(archive_path, "w") as subset:
        names = sorted(name for name in archive.namelist() if name.endswith(".png"))
        for name in random.Random(0).sample(names, min(n_patches, len(names))):
            content = archive.read(name)
            subset.writestr(name, content)
            *_, class_name, file_name = name.split("/")
            (tree / class_name).mkdir(parents=True, exist_ok=True)
            (tree / class_name / file_name).write_bytes(content)
    return tree, archive_path


def compare(source: Path, n_patches: int, repeats: int, stacks: list[str]) -> None:
    """Take turns, print and write down the medians."""
    from biopsy.data.prepare import prepare

    with tempfile.TemporaryDirectory() as folder:
        tree, archive = draw_files(source, n_patches, Path(folder))
        start = time.perf_counter()
        pack = prepare(archive, Path(folder) / "subset.pack")
        prepare_s = time.perf_counter() - start
        load = os.getloadavg()[0]
        workers = {stack: Worker(stack, tree if stack == "keras" else pack.path) for stack in stacks}
        rates: dict[str, list[float]] = {stack: [] for stack in stacks}
        matrix_speeds = []
        for repeat in range(repeats + 1):
            for stack, worker in workers.items():
                rate = worker.ask()
                if repeat:
                    rates[stack].append(rate)
                    print(f"pass {repeat} of {repeats}  {stack:>12}  {rate:7.0f} images/s", flush=True)
            matrix_speeds.append(measure_matrix_speed())
        for worker in workers.values():
            worker.close()
    operations, matrix_speed = count_operations(), max(matrix_speeds)
    row: dict[str, object] = {
        "patches": len(pack.target),
        "repeats": repeats,
        "prepare_s": round(prepare_s, 1),
    }
    for stack, values in rates.items():
        row[f"{stack}_per_s"] = round(statistics.median(values))
        row[f"{stack}_spread"] = f"{min(values):.0f}-{max(values):.0f}"
        if stack != "keras":
            ratios = [ours / theirs for ours, theirs in zip(values, rates["keras"], strict=True)]
            row[f"{stack}_ratio"] = round(statistics.median(ratios), 2)
            row[f"{stack}_ratio_spread"] = f"{min(ratios):.2f}-{max(ratios):.2f}"
    row["mflop_per_patch"] = round(operations * 1e3, 1)
    row["matrix_gflop_per_s"] = round(matrix_speed)
    row["share_of_matrix_speed"] = round(statistics.median(rates["biopsy"]) * operations / matrix_speed, 3)
    row |= describe_machine() | {"load_at_start": round(load, 1)}
    path = RESULTS / "training-speed.csv"
    append_rows(path, [row])
    print("\n".join(f"{key:>22}: {value}" for key, value in row.items()))


def describe_machine() -> dict[str, object]:
    """Return what a reader needs to compare."""
    processor = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line for line in lines if line.startswith("model name")]
        processor = names[0].partition(":")[2].strip() if names else processor
        flags = next((line for line in lines if line.startswith("flags")), "")
        wide = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_tile") if flag in flags.split()]
        processor = f"{processor} ({' '.join(wide)})"
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "processor": processor,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "tensorflow", "keras") if find_spec(name)},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="a zip in IDC's layout")
    parser.add_argument("--patches", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--bf16", action="store_true", help="a third process: ours in mixed precision")
    parser.add_argument("--work-as", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work_as:
        work(arguments.work_as, arguments.source)
    else:
        stacks = ["biopsy", "keras", *(["biopsy-bf16"] if arguments.bf16 else [])]
        compare(arguments.source, arguments.patches, arguments.repeats, stacks)
