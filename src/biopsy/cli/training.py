"""Commands that train: train, study, sweep, reproduce; and import-keras."""

import contextlib
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import biopsy
from biopsy.cli.console import (
    AsJson,
    Data,
    Device,
    Seed,
    Setting,
    SplitName,
    comma_list,
    interrupted,
    print_json,
    say,
    seed_list,
)

if TYPE_CHECKING:
    from biopsy.training.study import Study


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


Source = Annotated[
    Path,
    typer.Option(help="A pack, or an archive to make one from.", metavar="PACK|SOURCE", show_default=False),
]
StudyName = Annotated[str | None, typer.Option(help="Name of the study; the same name goes on with it.")]
StudyOut = Annotated[Path | None, typer.Option(help="The study's own folder; without it, studies/ gets one.")]


def study(
    recipes: Annotated[
        list[str], typer.Argument(help="Names of recipes, or .toml files.", show_default=False)
    ],
    data: Source,
    split: SplitName = None,
    folds: Annotated[
        int | None, typer.Option(help="Number of folds, where the split is not made yet.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Training seeds, with commas.")] = "0,1,2",
    overrides: Setting = None,
    name: StudyName = None,
    out: StudyOut = None,
    device: Device = "auto",
) -> None:
    """Train recipes over folds and seeds, and pool what they predict; prints the path of the study."""
    asked_seeds = seed_list(seeds)
    with _kept_on_interruption():
        made = biopsy.study(
            recipes,
            data,
            split=split,
            folds=folds,
            seeds=asked_seeds,
            overrides=overrides or (),
            name=name,
            out=out,
            device=device,
            on_epoch=EpochLines(),
        )
    _name_failed(made)
    print(made.path)


def sweep(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe, or a .toml file.", show_default=False)],
    data: Source,
    grid: Annotated[
        list[str],
        typer.Option(
            help="A setting and the values to try; may be repeated, for every combination.",
            metavar="KEY=VALUE,VALUE",
            show_default=False,
        ),
    ],
    split: SplitName = None,
    fold: Annotated[int | None, typer.Option(help="Which fold of a folded split is tested.")] = None,
    seeds: Annotated[str, typer.Option(help="Training seeds, with commas.")] = "0",
    overrides: Setting = None,
    name: StudyName = None,
    out: StudyOut = None,
    device: Device = "auto",
) -> None:
    """Try every combination of some settings, and choose on validation; prints the path of the study."""
    asked_seeds = seed_list(seeds)
    with _kept_on_interruption():
        made = biopsy.sweep(
            recipe,
            data,
            grid=tuple(grid),
            split=split,
            fold=fold,
            seeds=asked_seeds,
            overrides=overrides or (),
            name=name,
            out=out,
            device=device,
            on_epoch=EpochLines(),
        )
    _name_failed(made)
    print(made.path)


def reproduce(
    data: Source,
    papers: Annotated[
        list[str] | None,
        typer.Argument(
            help="Recipes with a claim; without any, all that were published on the data.",
            metavar="[PAPER...]",
            show_default=False,
        ),
    ] = None,
    budget: Annotated[
        float | None, typer.Option(help="Minutes that all runs may take; without it, full length.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Training seeds of both arms, with commas.")] = "0,1,2",
    split: Annotated[str | None, typer.Option(help="The split that keeps patients apart.")] = None,
    test_patients: Annotated[
        str | None, typer.Option(help="Patients or slides whose leak is measured, with commas.")
    ] = None,
    leak_seeds: Annotated[
        str, typer.Option(help="Seeds of the leak, with commas; '' leaves it out.")
    ] = "0,1,2,3,4",
    overrides: Setting = None,
    name: StudyName = None,
    out: StudyOut = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Run published recipes as published and with patients apart; prints one table."""
    asked_seeds = seed_list(seeds)
    with _kept_on_interruption():
        made = biopsy.reproduce(
            papers or (),
            data,
            budget=budget,
            seeds=asked_seeds,
            split=split,
            test_patients=comma_list(test_patients),
            leak_seeds=seed_list(leak_seeds, "--leak-seeds") if leak_seeds else (),
            overrides=overrides or (),
            name=name,
            out=out,
            device=device,
            on_epoch=EpochLines(),
        )
    from biopsy.experiments.reproduction_summary import list_rows, write_markdown

    _name_failed(made)
    say(f"study {made.path}")
    summary = made.summary()
    if as_json:
        print_json({"path": made.path, **summary})
    else:
        print(write_markdown(list_rows(summary)), end="")


def _name_failed(made: "Study") -> None:
    for run, reason in made.info["failed"].items():
        say(f"failed: {run}: {reason}")


@contextlib.contextmanager
def _kept_on_interruption() -> Iterator[None]:
    """Say on Ctrl-C that what was trained stays."""
    try:
        yield
    except KeyboardInterrupt:
        interrupted("run the same command again to go on: finished runs are kept")


def import_keras(
    file: Annotated[Path, typer.Argument(metavar="FILE", show_default=False)],
    model: Annotated[
        str, typer.Option(help="The recipe whose network it is, or a .toml file.", show_default=False)
    ],
    out: Annotated[
        Path, typer.Option(help="The classifier's new folder.", metavar="CLASSIFIER", show_default=False)
    ],
    class_names: Annotated[
        str | None, typer.Option(help="Names of the outputs in their order, with commas.")
    ] = None,
    positive: Annotated[str | None, typer.Option(help="The positive class; the second by default.")] = None,
    mpp: Annotated[float | None, typer.Option(help="Micrometres per pixel of its patches.")] = None,
    patch_px: Annotated[int | None, typer.Option(help="Side of its patches in pixels.")] = None,
) -> None:
    """Make a classifier of a file that Keras saved (.h5, .weights.h5, .keras); prints its folder."""
    biopsy.import_keras(
        file,
        model=model,
        out=out,
        class_names=comma_list(class_names) or None,
        positive=positive,
        mpp=mpp,
        patch_px=patch_px,
    )
    print(out)


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    for command in (train, study, sweep, reproduce):
        app.command()(command)
    app.command("import-keras")(import_keras)
