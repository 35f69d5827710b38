"""Time: how fast a recipe trains here, and how long every run may be so that all end in time."""

import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from biopsy.data.packs import Pack
from biopsy.data.splits import Split
from biopsy.evaluation.evaluate import evaluate
from biopsy.models.weights import make_network
from biopsy.recipes import Recipe, load_recipe
from biopsy.training.fit import optimiser_of
from biopsy.training.train import train

PROBE_STEPS = 10  # updates of each of the two epochs that are timed; the first warms up
VALIDATION_SHARE = 0.25  # of a run's time, at most, goes to looking at validation
MARGIN = 0.9  # of the time is planned with: machines slow down
NEVER_STOP = "train.early_stopping_patience=0"  # both arms of a comparison make the same updates


@dataclass(frozen=True)
class Speed:
    """What a recipe costs here, in seconds.

    Attributes:
        update_s: An optimiser update.
        patch_s: The look at a patch of validation or test.
        fixed_s: What a run costs besides: building, predictions, baseline, intervals, files.
    """

    update_s: float
    patch_s: float
    fixed_s: float

    def cost(self, length: "Length", n_val: float, n_test: float) -> float:
        """Return the seconds of a run of some length."""
        looks = length.epochs * n_val + n_test
        return self.fixed_s + self.patch_s * looks + self.update_s * length.updates


@dataclass(frozen=True)
class Length:
    """How long a run is: epochs, each ended by a look at validation, and optimiser updates in each."""

    epochs: int
    steps_per_epoch: int

    @property
    def updates(self) -> int:
        return self.epochs * self.steps_per_epoch


@dataclass(frozen=True)
class Need:
    """What one recipe asks of the time there is.

    Attributes:
        n_runs: How many runs.
        full: Their full length.
        speed: What they cost.
        n_val: Mean number of validation patches.
        n_test: Mean number of test patches.
    """

    n_runs: int
    full: Length
    speed: Speed
    n_val: float
    n_test: float

    def full_cost(self) -> float:
        """Return the seconds of a run at full length."""
        return self.speed.cost(self.full, self.n_val, self.n_test)

    def total(self, length: Length) -> float:
        """Return the seconds of all runs at some length."""
        return self.n_runs * self.speed.cost(length, self.n_val, self.n_test)

    def fit(self, seconds: float) -> Length:
        """Return the longest length whose runs take no more than some seconds each, at least one update.

        As many of the recipe's looks at validation are kept as a quarter of the time allows.
        """
        if seconds >= self.full_cost():
            return self.full
        free = seconds - self.speed.fixed_s - self.speed.patch_s * self.n_test
        look = self.speed.patch_s * self.n_val
        affordable = int(VALIDATION_SHARE * free / look) if look > 0 else self.full.epochs
        updates = int((free - look) / self.speed.update_s)
        epochs = max(1, min(self.full.epochs, affordable, updates))
        updates = int((free - epochs * look) / self.speed.update_s)
        return Length(epochs, max(1, min(updates // epochs, self.full.updates // epochs)))


def full_length(recipe: Recipe, target: np.ndarray) -> Length:
    """Return the recipe's own epochs and updates in each.

    Args:
        recipe: The recipe.
        target: Classes of the training patches, ``(n,)``.
    """
    settings, per_class = recipe.train, np.bincount(target)
    per_class = per_class[per_class > 0]
    n_seen = {
        "none": per_class.sum(),
        "undersample": len(per_class) * per_class.min(),
        "oversample": len(per_class) * per_class.max(),
    }[settings.sampling]
    steps = n_seen / settings.batch_size
    whole = int(steps) if settings.drop_last else int(np.ceil(steps))
    return Length(settings.epochs, settings.steps_per_epoch or max(1, whole))


def with_length(recipe: Recipe, length: Length) -> Recipe:
    """Return a recipe whose runs make exactly so many updates, whatever validation says on the way."""
    lines = [f"train.epochs={length.epochs}", f"train.steps_per_epoch={length.steps_per_epoch}", NEVER_STOP]
    return load_recipe(recipe, lines)


def measure_speed(recipe: Recipe, pack: Pack, split: Split, *, device: str) -> Speed:
    """Time two short epochs of a recipe, and what a run costs besides, on validation alone."""
    optimiser_of(recipe, make_network(recipe, len(pack.class_names), seed=0)[0])  # the first takes seconds
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        short = with_length(recipe, Length(2, PROBE_STEPS))
        run = train(short, pack, split=split, out=Path(folder) / "probe", device=device)
        if not split.val_is_test:
            evaluate(run, side="val")
        last = run.log()[-1]
    elapsed = time.perf_counter() - started
    update_s = recipe.train.batch_size / last["images_per_s"]
    n_val = max(1, int((split.sides(pack) == ("test" if split.val_is_test else "val")).sum()))
    patch_s = max(0.0, last["seconds"] - PROBE_STEPS * update_s) / n_val
    return Speed(update_s, patch_s, max(0.0, elapsed - 2 * last["seconds"]))


def share_out(seconds: float, needs: Mapping[str, Need]) -> dict[str, Length]:
    """Return a length for every recipe, so that all runs together take no more than some seconds.

    Every run may take as long as any other; what a short recipe leaves over goes to the others.
    """
    lengths: dict[str, Length] = {}
    open_needs = dict(needs)
    left = MARGIN * seconds
    while open_needs:
        share = left / sum(need.n_runs for need in open_needs.values())
        content = {name: need for name, need in open_needs.items() if need.full_cost() <= share}
        if not content:
            return lengths | {name: need.fit(share) for name, need in open_needs.items()}
        for name, need in content.items():
            lengths[name] = need.full
            left -= need.n_runs * need.full_cost()
            del open_needs[name]
    return lengths


def describe_plan(length: Length, full: Length, speed: Speed | None, minutes: float | None) -> dict[str, Any]:
    """Return the entry of a recipe's length in ``study.json``."""
    return {
        **asdict(length),
        "updates": length.updates,
        "full_updates": full.updates,
        "budget_minutes": minutes,
        "measured": None if speed is None else asdict(speed),
    }
