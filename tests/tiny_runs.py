"""Short trainings on small packs, for the tests of what runs leave behind."""

import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from biopsy.data.packs import Pack
from biopsy.training.runs import Run
from biopsy.training.train import train

TINY = ("preprocessing.input_px=8", "train.epochs=2", "train.batch_size=8", "train.lr=0.02")

# CancerNet's normalisation takes hundreds of steps to settle and calls all patches alike until then; the
# network of idc-small tells them apart after a few epochs.
LIVELY = (
    "preprocessing.input_px=16",
    "model.params.base_channels=4",
    "model.tta=none",
    "model.context=0",
    "train.optimiser=adamw",
    "train.momentum=0",
    "train.nesterov=false",
    "train.schedule=cosine",
    "train.warmup_epochs=1",
    "train.label_smoothing=0",
    "train.ema_decay=0",
    "train.checkpoint=best",
    "train.precision=fp32",
    "train.epochs=4",
    "train.batch_size=8",
    "train.lr=0.02",
)

torch.set_num_threads(1)  # on batches this small a second thread only waits


def copy_run(run: Run, place: Path) -> Run:
    """Copy a run with its pack, as if it had been trained there; judging a run writes into both."""
    pack = shutil.copytree(run.open_pack(verify=False).path, place / "own.pack")
    path = shutil.copytree(run.path, place / "run")
    copied = Run.open(path)
    copied.update(pack={**run.info["pack"], "path": str(pack)})
    return copied


def train_tiny(
    pack: Pack, out: Path, *settings: str, recipe: str | Path = "cancernet-2020", **options: Any
) -> Run:
    """Train a recipe on patches of 8 px for two epochs; ``settings`` and ``options`` change that."""
    return train(recipe, pack, overrides=(*TINY, *settings), out=out, device="cpu", **options)


def interrupt_at(n: int) -> Callable[[dict[str, Any]], None]:
    """Return an ``on_epoch`` that interrupts the command at its n-th epoch, as Ctrl-C does."""
    epochs = count(1)

    def stop(record: dict[str, Any]) -> None:
        if next(epochs) == n:
            raise KeyboardInterrupt

    return stop


def weights(run: Run) -> dict[str, torch.Tensor]:
    """Return the weights of the classifier that came out."""
    return load_file(run.path / "classifier" / "weights.safetensors")


def assert_same_run(one: Run, other: Run) -> None:
    """Require that two runs have the same weights, log, choices and predictions."""
    left, right = weights(one), weights(other)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    timing = ("images_per_s", "seconds", "time_left_s")
    strip = [[{k: v for k, v in r.items() if k not in timing} for r in run.log()] for run in (one, other)]
    assert strip[0] == strip[1]
    for key in ("status", "epochs_done", "chosen_epoch", "stopped_early", "threshold"):
        assert one.info[key] == other.info[key]
    assert one.predictions("validation")[0].equals(other.predictions("validation")[0])
