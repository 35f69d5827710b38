"""Arguments and flags that several verbs share, and how lists are written in them."""

from pathlib import Path
from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON, for machines.")]
Data = Annotated[
    Path | None, typer.Option(help="A pack, or an archive to make one from.", metavar="PACK|SOURCE")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
PackPath = Annotated[Path, typer.Argument(metavar="PACK", show_default=False)]
Seed = Annotated[int, typer.Option(help="Seed of every random choice.")]
Setting = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a recipe's value; may be repeated.", metavar="KEY=VALUE"),
]
SplitName = Annotated[str | None, typer.Option(help="Name of a split of the pack.")]
TrustModel = Annotated[
    str | None,
    typer.Option(help="Hash of a WSInfer model's TorchScript, whose code may then run.", metavar="SHA256"),
]


def comma_list(text: str | None) -> tuple[str, ...]:
    """Read ``"a,b"`` as ``("a", "b")``; nothing is an empty list."""
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def seed_list(text: str, flag: str = "--seeds") -> tuple[int, ...]:
    """Read ``"0,1,2"`` as ``(0, 1, 2)``."""
    try:
        seeds = tuple(int(part) for part in comma_list(text))
    except ValueError:
        seeds = ()
    if not seeds:
        raise typer.BadParameter(f"{flag} {text!r} is no list of whole numbers such as 0,1,2")
    return seeds
