"""The verb that trains one run: train; and how training is shown."""

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

import biopsy
from biopsy.cli.console import interrupted, say
from biopsy.cli.options import Data, Device, Seed, Setting, SplitName


def train(
    recipe: Annotated[
        str | None, typer.Argument(help="Name of a recipe, or a .toml file.", show_default=False)
    ] = None,
    data: Data = None,
    split: SplitName = None,
    fold: Annotated[int | None, typer.Option(help="Which fold of a folded split is tested.")] = None,
    seed: Seed = 0,
    overrides: Setting = None,
    out: Annotated[
        Path | None, typer.Option(help="The run's own folder; without it, runs/ gets one.")
    ] = None,
    device: Device = "auto",
    plot: Annotated[Path | None, typer.Option(help="Draw the training curves to this file.")] = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write TensorBoard events too.")] = False,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with a run that was interrupted.", metavar="RUN")
    ] = None,
) -> None:
    """Train a recipe on a pack; prints the path of the run."""
    if resume is None and (recipe is None or data is None):
        raise typer.BadParameter("name a RECIPE and --data, or a run with --resume")
    lines = EpochLines()
    try:
        run = biopsy.train(
            recipe,
            data,
            split=split,
            fold=fold,
            seed=seed,
            overrides=overrides or (),
            out=out,
            device=device,
            plot=plot,
            tensorboard=tensorboard,
            resume=resume,
            on_epoch=lines,
        )
    except KeyboardInterrupt as stop:
        if not stop.args:  # nothing was begun
            raise
        interrupted(f"go on with `biopsy train --resume {stop.args[0]}`")
    print(run.path)


class EpochLines:
    """Prints each epoch's record as one aligned line on stderr, under the run it belongs to."""

    def __init__(self) -> None:
        self.run: str | None = None

    def __call__(self, record: Mapping[str, Any]) -> None:
        """Print one record."""
        if record["run"] != self.run:
            self.run = record["run"]
            say(f"run {self.run}")
        say(epoch_line(record))


def epoch_line(record: Mapping[str, Any]) -> str:
    """Write an epoch's record as one line: loss, metrics, learning rate, speed, time left."""
    auroc = record["val_auroc"]
    parts = [
        f"epoch {record['epoch']:3d}",
        f"loss {record['loss']:7.4f}",
        f"accuracy {record['accuracy']:.3f}",
        f"val loss {record['val_loss']:7.4f}",
        f"accuracy {record['val_accuracy']:.3f}",
        "auroc     -" if auroc is None else f"auroc {auroc:.3f}",
        f"lr {record['lr']:.2e}",
        f"{record['images_per_s']:7,.0f} images/s",
        f"{timedelta(seconds=round(record['time_left_s']))} left",
    ]
    return "  ".join(parts) + ("  best so far" if record["best"] else "")


def register(app: typer.Typer) -> None:
    """Add the verbs of this file."""
    app.command()(train)
