"""Verbs that train many runs for one question: study, sweep, reproduce."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import biopsy
from biopsy.cli.console import interrupted, print_json, say
from biopsy.cli.learning import EpochLines
from biopsy.cli.options import AsJson, Device, Setting, SplitName, comma_list, seed_list

if TYPE_CHECKING:
    from biopsy.studies.records import Study

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
    from biopsy.studies.gaps import list_rows, write_markdown

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


def register(app: typer.Typer) -> None:
    """Add the verbs of this file."""
    for verb in (study, sweep, reproduce):
        app.command()(verb)
