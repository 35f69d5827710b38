"""The full protocols on phantom data in the layout of the originals, and what the originals would take.

Phantom patches are written as Kaggle's breast-histopathology-images (everything twice, beside the three
published lists of cases), as PCam's six HDF5 files with their ``meta.csv``, and as Kaggle's "Histopathologic
Cancer Detection" (``train_labels.csv``, ``train/``, ``test/``, a csv of slides). The commands of
``docs/how-to/run-a-full-protocol.md`` then run on each from `prepare` to the report.

For the size of the originals it predicts, per recipe:

* floating-point operations of training, validation and test with their test-time augmentation, which PyTorch
  counts in one update and one forward pass; an update counts as three forward passes at most, since PyTorch
  takes the backward pass of depthwise convolutions for one of full ones;
* memory of a GPU in training: weights, gradients, optimiser, averaged weights, the tensors that autograd
  keeps of a batch in the recipe's precision, and the input and output of the largest layer, counted;
* time on this machine: these operations at the rate that the training on phantom data reached;
* time on a GPU, under an assumption: ``ASSUMED_FLOPS`` operations a second, or as long as one core takes to
  gather the batches, whichever is longer.

Command (minutes on one core)::

    python benchmarks/full_protocols.py --out /tmp/protocols

Writes ``results/full-protocols.csv``, a row per protocol.
"""

import argparse
import csv
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import h5py
import numpy as np
import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode

from biopsy.data.packs import Pack
from biopsy.models.engine import Engine, make_loss, outputs_of
from biopsy.models.weights import make_network
from biopsy.phantom.cohort import FIRST_PATIENT, ROOT, write_archive
from biopsy.phantom.slides import plan_painter
from biopsy.recipes import Recipe, load_recipe
from biopsy.recipes.schema import Augmentation
from biopsy.training.batches import Batches
from biopsy.training.fit import optimiser_of
from biopsy.training.runs import Run

RESULTS = Path(__file__).parent / "results" / "full-protocols.csv"
PCAM_PX, PCAM_MPP = 96, 0.972
ASSUMED_FLOPS = 5e12
ORIGINAL = {  # patches in train, validation and test; IDC's by the share of its 279 patients in each list
    "idc": tuple(round(277_524 * n / 279) for n in (84, 29, 49)),
    "pcam": (262_144, 32_768, 32_768),
    "hcd": (154_017, 44_004, 22_002),
}
PACKED = {"idc": 277_524, "pcam": 327_680, "hcd": 220_025}  # with patches of patients in no list
RECIPES = {"idc": "idc", "pcam": "pcam", "hcd": "vgg16-pcam"}


# --- phantom data in the layouts of the originals


def draw_patches(slide: str, n_patches: int) -> tuple[np.ndarray, np.ndarray]:
    """Return PCam-like patches of a phantom slide, about half with tumour in their centre, and labels."""
    tissue_mm2 = 1.5 * n_patches * (PCAM_PX * PCAM_MPP / 1000) ** 2
    painter = plan_painter(0, slide, tissue_mm2=tissue_mm2, tumour_frac=0.5)
    half = PCAM_PX // 2  # drawn at half the resolution, which takes a quarter of the time
    columns, rows = (size // half for size in painter.size_px(2 * PCAM_MPP))
    extent = (0, 0, columns * half, rows * half, 2 * PCAM_MPP)
    tissue, tumour = (
        painter.mask(name, *extent).reshape(rows, half, columns, half).swapaxes(1, 2)
        for name in ("tissue", "tumour")
    )
    third = slice(PCAM_PX // 6, PCAM_PX // 3)
    label = tumour[:, :, third, third].any((2, 3)).astype(int)
    fullest = np.argsort(-tissue.mean((2, 3)), axis=None, kind="stable")
    chosen = [fullest[label.flat[fullest] == k][: n_patches // 2] for k in (0, 1)]
    places = np.sort(np.concatenate(chosen))
    image = painter.paint(*extent).reshape(rows, half, columns, half, 3).swapaxes(1, 2)
    patches = [cv2.resize(image[divmod(place, columns)], (PCAM_PX, PCAM_PX)) for place in places]
    return np.stack(patches), label.flat[places]


def draw_slides(prefix: str, n_slides: int, per_slide: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return patches, labels and slides of several phantom slides, in random order."""
    names = [f"{prefix}_{number:03d}" for number in range(n_slides)]
    drawn = [draw_patches(name, per_slide) for name in names]
    slides = np.repeat(names, [len(labels) for _, labels in drawn])
    order = np.random.default_rng(0).permutation(len(slides))
    patches, labels = (np.concatenate(parts)[order] for parts in zip(*drawn, strict=True))
    return patches, labels, slides[order].tolist()


def write_idc(folder: Path, n_slides: int, per_slide: int) -> None:
    """Write Kaggle's breast-histopathology-images and the three lists of cases, which leave patients out."""
    source = folder / "breast-histopathology-images"
    write_archive(source, n_patients=n_slides, patches_per_patient=per_slide)
    for patient in sorted((source / ROOT).glob("9*")):
        shutil.copytree(patient, source / patient.name, copy_function=os.link)
    ids = [str(FIRST_PATIENT + number) for number in range(n_slides)]
    ends = [round(n_slides * n / 279) for n in (0, 84, 84 + 29, 84 + 29 + 49)]
    for subset, start, end in zip(("train", "val", "test"), ends, ends[1:], strict=False):
        (folder / f"cases_{subset}.txt").write_text("\n".join(ids[start:end]) + "\n")


def write_pcam(folder: Path, n_slides: int, per_slide: int) -> None:
    """Write PCam's six HDF5 files and three tables of slides."""
    folder.mkdir(parents=True)
    for subset, share in (("train", 0.8), ("valid", 0.1), ("test", 0.1)):
        patches, labels, slides = draw_slides(subset, max(round(n_slides * share), 2), per_slide)
        name = f"camelyonpatch_level_2_split_{subset}"
        for part, values in (("x", patches), ("y", labels.reshape(-1, 1, 1, 1).astype(np.uint8))):
            with h5py.File(folder / f"{name}_{part}.h5", "w") as file:
                file[part] = values
        table = pd.DataFrame({"coord_y": 0, "coord_x": 0, "tumor_patch": labels > 0, "wsi": slides})
        table.assign(center_tumor_patch=labels > 0).to_csv(folder / f"{name}_meta.csv")


def write_hcd(folder: Path, n_slides: int, per_slide: int) -> None:
    """Write Kaggle's csv and ``.tif`` files, a fifth of them unlabelled, and the slides' csv beside them."""
    source = folder / "histopathologic-cancer-detection"
    patches, labels, slides = draw_slides("slide", n_slides, per_slide)
    ids = [hashlib.sha1(patch.tobytes()).hexdigest() for patch in patches]
    table = pd.DataFrame({"id": ids, "label": labels, "wsi": slides, "patch": list(patches)})
    table = table.drop_duplicates("id")
    labelled, unlabelled = table.iloc[: len(table) * 4 // 5], table.iloc[len(table) * 4 // 5 :]
    for subset, rows in (("train", labelled), ("test", unlabelled)):
        (source / subset).mkdir(parents=True)
        for patch_id, patch in zip(rows["id"], rows["patch"], strict=True):
            cv2.imwrite(str(source / subset / f"{patch_id}.tif"), patch[..., ::-1])
    labelled[["id", "label"]].to_csv(source / "train_labels.csv", index=False)
    unlabelled[["id"]].assign(label=0).to_csv(source / "sample_submission.csv", index=False)
    labelled[["id", "wsi"]].to_csv(folder / "patch_id_wsi_full.csv", index=False)


WRITERS = {"idc": write_idc, "pcam": write_pcam, "hcd": write_hcd}


# --- the commands


def list_commands(protocol: str, folder: Path, settings: Sequence[str] = ()) -> list[list[str]]:
    """Return the commands of a protocol, from its data in ``folder/data`` to the report."""
    data, pack, run = folder / "data", folder / f"{protocol}.pack", folder / "run"
    source, split, extra = {
        "idc": (data / "breast-histopathology-images", "official", ["--cases", data]),
        "pcam": (data, "official", []),
        "hcd": (data / "histopathologic-cancer-detection", "as-published", ["--recipe", "vgg16-pcam"]),
    }[protocol]
    changes = [word for setting in settings for word in ("--set", setting)]
    commands = [
        ["prepare", source, "--out", pack],
        ["split", pack, "--protocol", split, *extra, "--name", split, "--seed", 0],
        ["train", RECIPES[protocol], "--data", pack, "--split", split, "--out", run, *changes],
        ["evaluate", run],
        ["report", run, "--out", folder / "report.html"],
    ]
    if protocol == "hcd":
        target = folder / "submission.csv"
        commands.append(["predict", run, source / "test", "--format", "kaggle", "--out", target])
    return [list(map(str, command)) for command in commands]


# --- what the originals take


class Costs(NamedTuple):
    """Operations and memory of a recipe."""

    train_flops: float  # a patch, forward and backward
    forward_flops: float  # a patch and view
    gpu_bytes: int  # training: weights, gradients, optimiser, average, what autograd keeps of a batch


def count_costs(recipe: Recipe) -> Costs:
    """Count the operations and the memory of an update of a recipe."""
    engine, size = Engine("cpu", recipe.train.precision), recipe.preprocessing.input_px
    network, _ = make_network(recipe, 2, seed=0)
    optimiser = optimiser_of(recipe, engine.place(network).train())
    n = recipe.train.batch_size
    batch, target = torch.rand(n, 3, size, size), torch.arange(n) % 2
    kept: dict[int, int] = {}

    largest = [0]

    def watch(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> None:
        largest.append(output.nbytes)

    for module in network.modules():
        if not list(module.children()):
            module.register_forward_hook(watch)

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tensors = [*network.parameters(), *network.buffers()]
    with (
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(note, lambda x: x),
    ):
        engine.train_step(network, optimiser, batch, target, make_loss(outputs_of(recipe.train.loss)))
    for tensor in tensors:
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    with FlopCounterMode(display=False) as forward:
        engine.predict(network.eval(), batch)
    states = [x for state in optimiser.state.values() for x in state.values() if torch.is_tensor(x)]
    grads = [weight.grad for weight in network.parameters() if weight.grad is not None]
    averaged = tensors if recipe.train.ema_decay else []
    held = sum(tensor.nbytes for tensor in [*tensors, *averaged, *grads, *states, batch])
    forward_flops = forward.get_total_flops() / n
    train_flops = min(counter.get_total_flops() / n, 3 * forward_flops)
    return Costs(train_flops, forward_flops, held + sum(kept.values()) + 2 * max(largest))


def measure_gathering(recipe: Recipe, pack: Pack, seconds: float = 2.0) -> float:
    """Return the patches a second of which one core makes batches; a GPU does the augmentation."""
    plain = recipe.model_copy(update={"augmentation": Augmentation()})
    batches = Batches.from_pack(pack, plain, np.arange(len(pack)), recipe.preprocessing.fixed())
    order, n_patches, started = np.arange(len(pack)), 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        n_patches += sum(len(target) for _, target in batches.iterate(order))
    return n_patches / elapsed


def predict_costs(
    protocol: str, recipe: Recipe, images_per_s: float, gathered_per_s: float
) -> dict[str, object]:
    """Return the predicted time and memory of a recipe on the original data."""
    n_train, n_val, n_test = ORIGINAL[protocol]
    costs, train = count_costs(recipe), recipe.train
    visits = train.epochs * (train.steps_per_epoch * train.batch_size or n_train)
    views = 8 if recipe.model.tta == "d4" else 1
    seen = visits + (train.epochs + views) * n_val + views * n_test
    flops = (
        visits * costs.train_flops + (train.epochs * n_val + views * (n_val + n_test)) * costs.forward_flops
    )
    return {
        "recipe": recipe.name,
        "original_train": n_train,
        "epochs": train.epochs,
        "mflops_forward": round(costs.forward_flops / 1e6, 1),
        "pflops_total": round(flops / 1e15, 2),
        "gpu_memory_gb": round(costs.gpu_bytes / 1e9, 2),
        "pack_gb": round(PACKED[protocol] * recipe.preprocessing.input_px**2 * 3 / 1e9, 1),
        "images_per_s_here": round(images_per_s),
        "hours_here": round(flops / (images_per_s * costs.train_flops) / 3600, 1),
        "gathered_per_s_here": round(gathered_per_s),
        "gpu_hours_assumed": round(max(flops / ASSUMED_FLOPS, seen / gathered_per_s) / 3600, 2),
    }


def run_protocol(protocol: str, folder: Path, n_slides: int, per_slide: int, settings: Sequence[str]) -> Run:
    """Write phantom data and run the commands on it, in processes of their own."""
    WRITERS[protocol](folder / "data", n_slides, per_slide)
    for command in list_commands(protocol, folder, settings):
        subprocess.run([sys.executable, "-m", "biopsy", "--quiet", *command], check=True)
    return Run.open(folder / "run")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for data, packs and runs")
    parser.add_argument("--slides", type=int, default=30)
    parser.add_argument("--per-slide", type=int, default=40)
    options = parser.parse_args()
    rows = []
    for protocol, name in RECIPES.items():
        settings = ["train.epochs=2", *(["model.pretrained=false"] if protocol != "idc" else [])]
        settings += ["train.steps_per_epoch=5"] if protocol == "hcd" else []  # of 100
        run = run_protocol(protocol, options.out / protocol, options.slides, options.per_slide, settings)
        speed = max(record["images_per_s"] for record in run.log())
        recipe = load_recipe(name, {"model.pretrained": False})
        gathered = measure_gathering(recipe, run.open_pack())
        rows.append({"protocol": protocol, **predict_costs(protocol, recipe, speed, gathered)})
        print(rows[-1], flush=True)
    with open(RESULTS, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
