"""Short trainings on small packs, for the tests of what runs leave behind."""

from pathlib import Path
from typing import Any

import torch

from biopsy.data.packs import Pack
from biopsy.learning.runs import Run
from biopsy.learning.training import train

TINY = ("preprocessing.input_px=8", "train.epochs=2", "train.batch_size=8", "train.lr=0.02")

# CancerNet's normalisation takes hundreds of steps to settle and calls all patches alike until then; this
# network tells them apart after a few epochs.
LIVELY = (
    "preprocessing.input_px=16",
    "model.params.base_channels=4",
    "train.epochs=4",
    "train.batch_size=8",
    "train.lr=0.003",
)

torch.set_num_threads(1)  # on batches this small a second thread only waits


def train_tiny(
    pack: Pack, out: Path, *settings: str, recipe: str | Path = "cancernet-2020", **options: Any
) -> Run:
    """Train a recipe on patches of 8 px for two epochs; ``settings`` and ``options`` change that."""
    return train(recipe, pack, set=(*TINY, *settings), out=out, device="cpu", **options)
