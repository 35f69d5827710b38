"""Verbs about data: fetch, prepare, inspect, split."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

import biopsy
from biopsy.cli.console import (
    KNOWN_ERROR,
    AsJson,
    PackPath,
    Seed,
    SplitName,
    comma_list,
    name_skipped,
    print_json,
    print_table,
    progress,
    say,
)

if TYPE_CHECKING:
    from biopsy.data.packs import Pack
    from biopsy.data.splits import Split


def fetch(
    name: Annotated[str, typer.Argument(help="idc, pcam, hcd or weights:TAG.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder to download into.", show_default=False)],
) -> None:
    """Download a published data set or pretrained weights; the only verb that touches the network."""
    with progress(f"fetching {name}", unit="bytes") as show:
        fetched = biopsy.fetch(
            name,
            out,
            on_progress=lambda state: show(state.done_bytes, state.total_bytes, f"{state.step} {state.file}"),
        )
    if fetched.kept:
        say(f"{len(fetched.kept)} were there already: {', '.join(path.name for path in fetched.kept)}")
    print(fetched.path)


def prepare(
    source: Annotated[
        Path,
        typer.Argument(
            help="Archive or folder of patches, or of slides with annotations.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option(help="The pack to write.", show_default=False)],
    dataset: Annotated[
        str | None, typer.Option(help="Layout of the source; recognised where not given.")
    ] = None,
    patients: Annotated[
        str | None, typer.Option(help="Who a patch belongs to: a csv, or a pattern of the file name.")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="A csv of labels that override those of the source.")
    ] = None,
    join: Annotated[
        Path | None, typer.Option(help="A csv of further columns, such as site, scanner or age.")
    ] = None,
    positive: Annotated[
        str | None, typer.Option(help="Positive class; several, with commas, are folded into one.")
    ] = None,
    mpp: Annotated[
        float | None,
        typer.Option(
            help="Micrometres per pixel, where the source does not say; of patches cut from slides."
        ),
    ] = None,
    patch_px: Annotated[
        int | None, typer.Option(help="Cut slides with annotations into patches of this side.")
    ] = None,
    stride_px: Annotated[int | None, typer.Option(help="Stride in pixels (default: the patch size).")] = None,
    label_frac: Annotated[
        float, typer.Option(help="Share of a patch its class must cover to be its label.")
    ] = 0.5,
    classes: Annotated[
        str | None,
        typer.Option(
            help="Classes and the annotations they come from; by default the annotated ones.",
            metavar="NAME=ANNOTATED,...",
        ),
    ] = None,
    rest: Annotated[
        str | None, typer.Option(help="Class of what lies in the region and in no annotation.")
    ] = None,
    region: Annotated[str, typer.Option(help="Annotated class that limits where labels hold.")] = "Region*",
    slide_mpp: Annotated[
        str | None,
        typer.Option(
            help="Micrometres per pixel of slides that do not say; one value, or a csv of slide,mpp."
        ),
    ] = None,
    annotations: Annotated[
        Path | None,
        typer.Option(
            help="Annotations of slides (GeoJSON; XML of ASAP, HALO, ImageScope): folder, or one file.",
            metavar="DIR|FILE",
        ),
    ] = None,
    crop: Annotated[
        bool,
        typer.Option(
            "--crop/--no-crop", help="Whether QuPath cropped slides to their bounds when it exported."
        ),
    ] = True,
    export_tree: Annotated[
        Path | None,
        typer.Option(help="Also sort the original files into training|validation|testing/<class>/ here."),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="The tree's split; the recipe's published one by default.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Whose published split the tree has; cancernet-2020 by default.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Decode an archive of patches once, or cut annotated slides, into a pack."""
    with progress("decoding") as on_progress:
        pack = biopsy.prepare(
            source,
            out,
            dataset=dataset,
            patients=patients,
            labels=labels,
            join=join,
            positive=positive,
            mpp=mpp,
            patch_px=patch_px,
            stride_px=stride_px,
            label_frac=label_frac,
            classes=comma_list(classes),
            rest=rest,
            region=region,
            slide_mpp=slide_mpp,
            annotations=annotations,
            crop=crop,
            export_tree=export_tree,
            split=split,
            recipe=recipe,
            on_progress=on_progress,
        )
    tree = None if export_tree is None else _count_tree(export_tree)
    if as_json:
        about = {"path": pack.path, **pack.info.model_dump()}
        print_json(about if tree is None else {**about, "tree": tree})
    else:
        _print_pack(pack)
        if tree is not None:
            print(
                f"{export_tree}: the original files, class folders numbered in the order of the classes above"
            )
            print_table(
                [[side, *counts.values()] for side, counts in tree.items()], ["side", *tree["training"]]
            )
    name_skipped(pack.info.skipped, str(pack.path / "pack.json"))


def _count_tree(folder: Path) -> dict[str, dict[str, int]]:
    from biopsy.data.export_tree import count_tree

    return count_tree(folder)


_COUNTS = {"odd_sizes": "padded to a square", "duplicates": "identical copies left out"}


def _print_pack(pack: "Pack") -> None:
    info = pack.info
    mpp = "unknown" if info.mpp is None else f"{info.mpp:g}"
    print(f"{pack.path}: {info.dataset}, {info.patch_px} px at {mpp} um/px, positive: {info.positive_class}")
    for name, count in info.counts.items():
        if isinstance(count, dict):
            count = ", ".join(f"{key} {value:,}" for key, value in count.items()) or "none"
        label = _COUNTS.get(name, name.replace("_", " "))
        print(f"  {label}: {count:,}" if isinstance(count, int) else f"  {label}: {count}")


def inspect(
    pack: PackPath,
    split: SplitName = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the pictures; PACK/inspection where not given.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Audit a pack and draw it; exit 1 when something would spoil a result."""
    audit = biopsy.inspect(pack, split=split, out=out)
    if as_json:
        print_json(audit)
    else:
        _print_audit(audit)
    for spoiler in audit["spoilers"]:
        say(f"would spoil a result: {spoiler}")
    if audit["spoilers"]:
        raise typer.Exit(KNOWN_ERROR)


def _spell_sizes(padded: Mapping[str, Any]) -> str:
    sizes = ", ".join(
        f"{each['width']} x {each['height']} px: {each['count']:,}" for each in padded["by_size"]
    )
    return f"{padded['count']:,} patches" + (f" ({sizes})" if sizes else "")


def _print_audit(audit: Mapping[str, Any]) -> None:
    exact, labels, groups, division = (
        audit[key] for key in ("exact_duplicates", "label_conflicts", "groups", "split")
    )
    print(f"audit: {audit['paths']['audit']}")
    print(f"  unreadable files: {audit['unreadable']['count']:,}")
    print(f"  padded to a square: {_spell_sizes(audit['odd_sizes'])}")
    print(f"  blank patches: {audit['blank']['count']:,}")
    print(f"  exact duplicates: {exact['patches']:,} patches in {exact['count']:,} groups")
    print(f"  near duplicates: {audit['near_duplicates']['count']:,} pairs")
    conflicts = labels["same_pixels"]["count"], labels["same_place"]["count"]
    print("  label conflicts: {:,} of the same pixels, {:,} of the same place".format(*conflicts))
    if groups["count"]:
        print(f"  {audit['unit']}s: {groups['count']:,}, of one class {groups['one_class']['count']:,}")
        if groups["unknown"]:
            print(f"  patches of no known {audit['unit']}: {groups['unknown']:,}")
    if division and division["may_overlap"] and division["patients_overlap"]:
        why = "as published" if division["is_published"] else "on purpose"
        print(f"  PATIENTS OVERLAP in split {division['name']}, {why}: {division['overlap']['count']:,}")
    for picture in audit["paths"]["pictures"]:
        print(f"picture: {picture}")


def split(
    pack: PackPath,
    protocol: Annotated[
        str,
        typer.Option(
            help="official, patients, folds, leave-one-out, site, kaggle-rows, as-published, "
            "leak-apart, leak-with, leak-placebo, leak-blocked-with or leak-blocked-placebo.",
            show_default=False,
        ),
    ],
    name: Annotated[
        str | None, typer.Option(help="Name to keep it under; the protocol's by default.")
    ] = None,
    seed: Seed = 0,
    recipe: Annotated[str | None, typer.Option(help="Whose split as-published is.")] = None,
    cases: Annotated[
        Path | None, typer.Option(help="Case lists of an official split: a csv, or a folder of cases_*.txt.")
    ] = None,
    test_patients: Annotated[
        str | None, typer.Option(help="Ids, with commas, that are tested.", metavar="ID[,ID]")
    ] = None,
    val_patients: Annotated[
        str | None, typer.Option(help="Ids, with commas, that validate.", metavar="ID[,ID]")
    ] = None,
    folds: Annotated[int, typer.Option(help="Number of folds.")] = 5,
    unit: Annotated[
        Literal["patient", "slide", "patch"] | None,
        typer.Option(help="What is kept apart; the pack's own unit by default."),
    ] = None,
    unknown_patients: Annotated[
        Literal["leave-out", "alone"],
        typer.Option(help="Patches whose patient is not known, where others' are: left out, or each alone."),
    ] = "leave-out",
    as_json: AsJson = False,
) -> None:
    """Divide a pack's patients into sides or folds, and keep the split in the pack."""
    made = biopsy.split(
        pack,
        protocol=protocol,
        name=name,
        seed=seed,
        recipe=recipe,
        cases=cases,
        test_patients=comma_list(test_patients),
        val_patients=comma_list(val_patients),
        folds=folds,
        unit=unit,
        unknown_patients=unknown_patients,
    )
    if as_json:
        print_json(
            {
                "name": made.name,
                "protocol": made.protocol,
                "unit": made.unit,
                "seed": made.seed,
                "patients_overlap": made.overlap,
                "parameters": made.parameters,
            }
        )
    else:
        _print_split(made)


def _print_split(made: "Split") -> None:
    print(f"split {made.name!r} ({made.protocol}) by {made.unit}, seed {made.seed}")
    if made.overlap:
        why = "as published" if made.is_published else "on purpose"
        print(f"PATIENTS OVERLAP between sides, {why}: figures on it say nothing about a new patient")
    if made.val_is_test:
        print("the test side also validates, as published: everything is chosen on what is tested")
    counts = made.parameters["counts"]
    rows = []
    for fold, sides in enumerate(counts.get("folds", [counts])):
        for side, count in sides.items():
            if count["patches"]:
                first = [fold, side] if made.n_folds else [side]
                rows.append([*first, count["patches"], count["groups"], *count["per_class"].values()])
    header = [*(["fold"] if made.n_folds else []), "side", "patches", f"{made.unit}s"]
    print_table(rows, header + list(count["per_class"]))


def register(app: typer.Typer) -> None:
    """Add the verbs of this file."""
    for verb in (fetch, prepare, inspect, split):
        app.command()(verb)
