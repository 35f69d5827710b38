"""Mutated files are read or refused: never a traceback, a hang, or a change that nobody notices.

Command (POSIX only)::

    python benchmarks/fuzz.py [--parser archive,pack] [--mutations 500] [--minutes 0] [--seed 0] [--only N]

For each parser, small valid files are written by the package itself. Each mutation changes one of them
(`mutations.py`), calls the parser in a forked process, and has one outcome:

* ``accepted``: the parser returned;
* ``refused``: it raised a `BiopsyError` of one line;
* ``fault``: it raised anything else, took more than 20 s or 1.5 GB more than before, ended the process,
  opened a connection, started a program, wrote outside its folder, or (of files whose content is hashed)
  returned other content than was written without a warning.

``--only N`` repeats one mutation and prints its traceback. ``--minutes`` goes on until that time is over.

Results: `results/fuzzing.csv`, one row per parser, shown in `docs/reliability.md`.
"""

import argparse
import contextlib
import io
import json
import logging
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import torch
from PIL import Image

import biopsy
from biopsy.core.errors import BiopsyError
from biopsy.core.files import plain, sha256_file, warn_unsealed
from biopsy.data.packs import Pack
from biopsy.data.predictions import read_predictions, write_predictions
from biopsy.data.protocols.published import read_cases
from biopsy.data.splits import list_splits, load_split
from biopsy.evaluation.predictions import evaluate_table
from biopsy.experiments.sweeps import read_grid, read_space
from biopsy.models.classifier import Classifier
from biopsy.models.importers.keras import load_keras_into
from biopsy.models.importers.wsinfer import open_wsinfer
from biopsy.models.weight_files import fill_network
from biopsy.phantom.slides import make_phantom_slide
from biopsy.recipes import load_recipe, recipe_toml
from biopsy.slide_io.annotations import read_annotations
from biopsy.slide_io.images import decode
from biopsy.slide_io.reader import open_slide
from biopsy.slides.maps import SlideMap, collect_regions, find_regions
from biopsy.slides.sources import list_sources
from biopsy.training.checkpoints import Progress, load_checkpoint, save_checkpoint
from biopsy.training.runs import Run
from mutations import mutate

RESULTS = Path(__file__).parent / "results" / "fuzzing.csv"
MAX_SECONDS, MAX_MB = 20, 1500
WATCHED = (
    "socket.connect",
    "socket.getaddrinfo",
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
)


@dataclass(frozen=True)
class Parser:
    """What is fuzzed.

    Attributes:
        make: Writes valid files into an empty folder.
        read: Reads the folder, of which the file by this name was mutated; returns what it holds.
        files: Pattern of the files that are mutated.
        is_hashed: Whether what is read must be what was written, unless a document's own hash was made anew.
    """

    make: Callable[[Path], object]
    read: Callable[[Path, str], Any]
    files: str = "**/*"
    is_hashed: bool = False


WARNINGS: list[str] = []


class Note(logging.Handler):
    """Keeps warnings: what is accepted with one is not accepted silently."""

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a warning."""
        WARNINGS.append(record.getMessage())


class Silent(Exception):
    """Other content was accepted without a word."""


# --- valid files, and what reads them
def draw(seed: int, px: int = 24) -> np.ndarray:
    """Return a patch of noise around pink."""
    noise = np.random.default_rng(seed).integers(-40, 40, (px, px, 3))
    return (np.array([215, 160, 195]) + noise).astype(np.uint8)


def make_tree(folder: Path) -> None:
    """Write twelve patches in two class folders."""
    for index in range(12):
        path = folder / ("benign", "malignant")[index % 2] / f"P{index // 3}_{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw(index)).save(path)


def prepare(source: Path, **options: Any) -> list[Any]:
    """Prepare a pack beside the mutated folder, and return what is in it."""
    with tempfile.TemporaryDirectory(dir=source.parent) as out:
        pack = biopsy.prepare(source, out=Path(out) / "pack", **options)
        return [pack.table.shape, pack.class_names]


def make_zip(folder: Path) -> None:
    """Write the class folders as a zip."""
    with tempfile.TemporaryDirectory() as place:
        make_tree(Path(place))
        shutil.make_archive(str(folder / "tree"), "zip", place)


def make_images(folder: Path) -> None:
    """Write one patch in every format that is read."""
    image = Image.fromarray(draw(0))
    for suffix in ("png", "jpg", "bmp", "tif", "webp"):
        image.save(folder / f"rgb.{suffix}")
    image.convert("L").save(folder / "grey.png")
    image.convert("L").save(folder / "grey.jpg")
    image.quantize(16).save(folder / "palette.png")
    image.save(folder / "packed.tiff", compression="tiff_deflate")
    image.save(folder / "progressive.jpeg", progressive=True, exif=image.getexif())


ASAP = """<?xml version="1.0"?><ASAP_Annotations><Annotations>
<Annotation Name="A 0" Type="Polygon" PartOfGroup="Tumor" Color="#F4FA58"><Coordinates>
<Coordinate Order="0" X="10.5" Y="20" /><Coordinate Order="1" X="200" Y="20" />
<Coordinate Order="2" X="200" Y="220" /><Coordinate Order="3" X="10" Y="200" /></Coordinates></Annotation>
<Annotation Name="A 1" Type="Rectangle" PartOfGroup="None" Color="#F4FA58"><Coordinates>
<Coordinate Order="0" X="300" Y="300" /><Coordinate Order="1" X="400" Y="300" />
<Coordinate Order="2" X="400" Y="400" /><Coordinate Order="3" X="300" Y="400" /></Coordinates></Annotation>
</Annotations><AnnotationGroups><Group Name="Tumor" PartOfGroup="None" Color="#64FE2E"><Attributes />
</Group></AnnotationGroups></ASAP_Annotations>
"""
HALO = """<Annotations><Annotation LineColor="65535" Name="Tumor"><Regions>
<Region Type="Polygon" HasEndcaps="0" NegativeROA="0"><Vertices><V X="10" Y="10" /><V X="210" Y="10" />
<V X="210" Y="210" /><V X="10" Y="210" /></Vertices></Region>
<Region Type="Rectangle" HasEndcaps="0" NegativeROA="1"><Vertices><V X="50" Y="50" /><V X="90" Y="90" />
</Vertices></Region><Region Type="Ellipse" HasEndcaps="0" NegativeROA="0"><Vertices><V X="300" Y="300" />
<V X="400" Y="380" /></Vertices></Region></Regions></Annotation></Annotations>
"""
IMAGESCOPE = """<Annotations MicronsPerPixel="0.25"><Annotation Id="1" Name="" Type="4"><Attributes>
<Attribute Name="Tumor" Id="0" Value="" /></Attributes><Regions>
<Region Id="1" Type="0" NegativeROA="0" Text=""><Vertices>
<Vertex X="10" Y="10" Z="0" /><Vertex X="210" Y="10" Z="0" /><Vertex X="210" Y="210" Z="0" />
<Vertex X="10" Y="210" Z="0" /></Vertices></Region><Region Id="2" Type="2" NegativeROA="0" Text="a"><Vertices>
<Vertex X="300" Y="300" Z="0" /><Vertex X="400" Y="380" Z="0" /></Vertices></Region></Regions></Annotation>
</Annotations>
"""


def make_geojson(folder: Path) -> None:
    """Write what QuPath does: a polygon with a hole, several polygons, an object within another."""

    def box(x: int, y: int, side: int) -> list[list[float]]:
        return [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]

    def feature(kind: str, coordinates: object, name: str, **more: object) -> dict[str, object]:
        about = {"objectType": "annotation", "classification": {"name": name, "color": [200, 0, 0]}, **more}
        geometry = {"type": kind, "coordinates": coordinates}
        return {"type": "Feature", "id": "0b1", "geometry": geometry, "properties": about}

    child = feature("Polygon", [box(310, 310, 20)], "Stroma")
    features = [
        feature("Polygon", [box(10, 10, 200), box(50, 50, 20)[::-1]], "Tumor"),
        feature("MultiPolygon", [[box(300, 10, 50)], [box(400, 10, 50)]], "Tumor", isLocked=True),
        feature("Polygon", [box(300, 300, 90)], "Region", childObjects=[child]),
    ]
    (folder / "a.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    (folder / "b.geojson").write_text(json.dumps(features))


def make_xml(folder: Path) -> None:
    """Write one file of each program whose XML is read."""
    for name, text in (("asap.xml", ASAP), ("halo.annotations", HALO), ("imagescope.xml", IMAGESCOPE)):
        (folder / name).write_text(text)


def make_tables(folder: Path) -> None:
    """Write class folders, and beside them every kind of table that people bring."""
    make_tree(folder / "tree")
    stems = [f"{('benign', 'malignant')[index % 2]}/P{index // 3}_{index}" for index in range(12)]
    rows = list(enumerate(stems))
    tables = {
        "patients": ["patch_id,patient_id,site", *(f"{stem},P{i // 3},{i % 2}" for i, stem in rows)],
        "labels": ["patch_id,label,who,when", *(f"{stem},benign,Anna,2026-01-02" for stem in stems[:3])],
        "join": ["patch_id,age,scanner", *(f'{stem},{50 + i},"s {i % 2}"' for i, stem in rows)],
        "cases": ["case_id,split", "P0,train", "P1,val", "P2,test", "P3,train"],
        "slides": ["slide,mpp", "a.tiff,0.5", "b.tiff,"],
        "images": ["path,label,patient_id,x,y", *(f"tree/{s}.png,{i % 2},P{i},{i},0" for i, s in rows)],
        "outside": ["id,patient,y_true,y_prob", *(f"{i},P{i // 3},{i % 2},0.{i}5" for i in range(9))],
    }
    for name, lines in tables.items():
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")


def read_table(folder: Path, name: str) -> Any:
    """Read a table for what it is meant."""
    path, kind = folder / name, name.removesuffix(".csv")
    match kind:
        case "cases":
            return read_cases(path)
        case "slides":
            return list_sources([path], None)
        case "images":
            with tempfile.TemporaryDirectory(dir=folder) as out:
                return Pack.from_table(path, out=Path(out) / "pack").class_names
        case "outside":
            return repr(evaluate_table(path))
        case _:
            return prepare(folder / "tree", **{kind: path})


def make_recipes(folder: Path) -> None:
    """Write a recipe, changes of settings and ranges of a search."""
    (folder / "recipe.toml").write_text(recipe_toml(load_recipe("idc-small")))
    (folder / "set.txt").write_text(
        "train.lr=0.05\nmodel.params.base_channels=4\npreprocessing.input_px=32\n"
    )
    (folder / "search.txt").write_text("train.lr=1e-4..1e-1 log\ntrain.batch_size=16,32\ntrain.epochs=1..5\n")
    (folder / "grid.txt").write_text("train.lr=0.1,0.05\ntrain.optimiser=sgd,adamw\n")


def read_recipe(folder: Path, name: str) -> Any:
    """Read settings as a recipe file, as ``--set``, as ``--search`` or as ``--grid``."""
    if name == "recipe.toml":
        return recipe_toml(load_recipe(folder / name))
    text = (folder / name).read_text(encoding="utf-8", errors="surrogateescape")
    lines = text.split("\n")[:-1]
    if name == "set.txt":
        return recipe_toml(load_recipe("idc-small", lines))
    return (read_space if name == "search.txt" else read_grid)(lines)


def make_keras(folder: Path) -> None:
    """Write one small network in the three layouts of Keras."""
    rng = np.random.default_rng(0)
    kernels = {
        "conv2d": [rng.random((3, 3, 3, 4), np.float32), np.zeros(4, np.float32)],
        "dense": [rng.random((16, 2), np.float32), np.zeros(2, np.float32)],
    }
    layers = [("InputLayer", {"name": "input_layer", "batch_shape": [None, 4, 4, 3]})]
    layers += [("Conv2D", {"name": "conv2d"}), ("Flatten", {"name": "flatten"}), ("Dense", {"name": "dense"})]
    layers[-1][1]["activation"] = "softmax"
    listed = [{"module": "keras.layers", "class_name": kind, "config": about} for kind, about in layers]
    config = {"class_name": "Sequential", "config": {"name": "model", "layers": listed}}
    with h5py.File(folder / "whole.h5", "w") as file:
        file.attrs["model_config"] = json.dumps(config)
        group = file.create_group("model_weights")
        group.attrs["layer_names"] = np.array(list(kernels), "S")
        for name, arrays in kernels.items():
            titles = [f"{name}/kernel:0", f"{name}/bias:0"]
            layer = group.create_group(name)
            layer.attrs["weight_names"] = np.array(titles, "S")
            for title, array in zip(titles, arrays, strict=True):
                layer[title] = array
    weights = io.BytesIO()
    with h5py.File(weights, "w") as file:
        for name, arrays in kernels.items():
            for number, array in enumerate(arrays):
                file[f"layers/{name}/vars/{number}"] = array
    (folder / "model.weights.h5").write_bytes(weights.getvalue())
    with contextlib.closing(__import__("zipfile").ZipFile(folder / "model.keras", "w")) as archive:
        archive.writestr("metadata.json", json.dumps({"keras_version": "3.15.1"}))
        archive.writestr("config.json", json.dumps(config))
        archive.writestr("model.weights.h5", weights.getvalue())


def read_keras_file(folder: Path, name: str) -> None:
    """Fill a network of the same layers."""
    load_keras_into(folder / name, torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(16, 2)))


def make_weights(folder: Path) -> None:
    """Write the weights of a small network by name."""
    from safetensors.torch import save_file

    state = small_network().state_dict()
    torch.save(state, folder / "weights.pth")
    torch.save({"state_dict": state, "epoch": 3}, folder / "old.pt", _use_new_zipfile_serialization=False)
    save_file(state, folder / "weights.safetensors")


def small_network() -> torch.nn.Module:
    """Return a network of two layers."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 2))


def make_checkpoint(folder: Path) -> None:
    """Write a checkpoint after one step."""
    network = small_network()
    optimiser = torch.optim.AdamW(network.parameters())
    sum(weight.sum() for weight in network.parameters()).backward()
    optimiser.step()
    save_checkpoint(folder, network, optimiser, Progress(1, 1, 1, 0.5, [{"epoch": 1, "val_loss": 0.7}]))


def read_checkpoint(folder: Path, name: str) -> Any:
    """Resume from a checkpoint."""
    network = small_network()
    optimiser = torch.optim.AdamW(network.parameters())
    progress = load_checkpoint(folder, network, optimiser, torch.device("cpu"))
    state = {**network.state_dict(), **{f"{i}": s for i, s in enumerate(optimiser.state.values())}}
    return [vars(progress), optimiser.state_dict()["param_groups"], listed(state)]


def listed(value: Any) -> Any:
    """Return tensors and arrays as what can be compared."""
    if isinstance(value, dict):
        return {str(key): listed(item) for key, item in value.items()}
    if isinstance(value, torch.Tensor):
        return value.tolist()
    return value


def make_pack(folder: Path) -> None:
    """Write a pack with a split of subsets, one of folds, and a ledger."""
    images = [draw(index) for index in range(24)]
    patients = [f"P{index // 4}" for index in range(24)]
    labels = [index % 2 for index in range(24)]
    pack = Pack.from_arrays(np.stack(images), labels, patients, mpp=1.0, out=folder / "in.pack")
    biopsy.split(pack, protocol="patients")
    biopsy.split(pack, protocol="folds", folds=3)


def read_pack(folder: Path, name: str) -> Any:
    """Read a pack, its pixels and its splits."""
    pack = Pack.open(folder / "in.pack")
    pack.verify()
    splits = {}
    for split_name in list_splits(pack):
        split = load_split(pack, split_name)
        splits[split_name] = [split.unit, split.seed, split.table.to_dict("list")]
    return [pack.class_names, pack.info.positive_class, pack.table.astype(str).to_dict("list"), splits]


SETTINGS = (
    *("preprocessing.input_px=16", "model.params.base_channels=4", "model.tta=none", "model.context=0"),
    *("train.epochs=1", "train.batch_size=16", "train.precision=fp32"),
)


def make_run(folder: Path) -> None:
    """Train on a tiny pack, and evaluate."""
    make_pack(folder)
    run = biopsy.train(
        "idc-small",
        folder / "in.pack",
        split="patients",
        overrides=SETTINGS,
        out=folder / "in.run",
        device="cpu",
    )
    biopsy.evaluate(run)
    (folder / "in.run" / ".train.lock").unlink(missing_ok=True)


def read_run(folder: Path, name: str) -> Any:
    """Read all of a run that numbers rest on."""
    run = Run.open(folder / "in.run")
    pack = run.open_pack()
    values = [run.info, recipe_toml(run.recipe), run.subsets(pack).tolist(), run.log(), plain(run.metrics())]
    for subset in ("validation", "test"):
        frame, about = run.predictions(subset)
        values += [frame.astype(str).to_dict("list"), about]
    return [*values, run.classifier.sha256, listed(run.classifier.network.state_dict())]


def make_classifier(folder: Path) -> None:
    """Write a classifier and its predictions."""
    make_run(folder)
    run = Run.open(folder / "in.run")
    run.classifier.save(folder / "classifier")
    frame, about = run.predictions("test")
    write_predictions(folder / "predictions.parquet", frame, about)
    write_predictions(folder / "predictions.csv", frame, about)
    for name in ("in.run", "in.pack"):
        shutil.rmtree(folder / name)


def read_classifier(folder: Path, name: str) -> Any:
    """Read a classifier with its weights."""
    classifier = Classifier.load(folder / "classifier")
    return [classifier.info.model_dump(), listed(classifier.network.state_dict()), repr(classifier.extras)]


def read_both_predictions(folder: Path, name: str) -> Any:
    """Read the predictions whose file, or whose file beside it, was mutated."""
    suffix = ".csv" if ".csv" in name else ".parquet"
    frame, about = read_predictions(folder / f"predictions{suffix}")
    return [frame.astype(str).to_dict("list"), about]


def make_map(folder: Path) -> None:
    """Map a phantom slide with the shipped classifier."""
    slide = folder / "a.tiff"
    make_phantom_slide(str(slide), seed=0, patient="99000", width=400, height=300, mpp=2.0)
    biopsy.slide("idc", slide, out=folder / "out", device="cpu")


def read_map(folder: Path, name: str) -> Any:
    """Read a map, and verify its folder."""
    slide_map = SlideMap.from_parquet(folder / "out" / "a" / "map.parquet")
    regions = list(collect_regions(slide_map, find_regions(slide_map)))
    return [
        slide_map.cells().shape,
        slide_map.to_frame().astype(str).to_dict("list"),
        slide_map.class_names,
        slide_map.threshold,
        regions,
    ]


def read_verified(folder: Path, path: str, trust_model: str | None = None) -> Any:
    """Verify a folder, and refuse it unless every check passes."""
    report = biopsy.verify(folder / path, trust_model=trust_model)
    if report["status"] != "PASS":
        raise BiopsyError(f"verification: {report['status']}")
    return report["status"]


def make_slide(folder: Path) -> None:
    """Write a small pyramid."""
    make_phantom_slide(str(folder / "a.tiff"), seed=0, patient="99000", width=400, height=300, mpp=2.0)


def read_slide(folder: Path, name: str) -> None:
    """Read an overview and some full-resolution pixels."""
    with contextlib.closing(open_slide(folder / name)) as slide:
        slide.thumbnail(200)
        slide.read(0, 0, 64, 64)
        slide.read(300, 200, 64, 64)


def make_bundle(folder: Path) -> None:
    """Export a tiny classifier for other programs."""
    make_classifier(folder)
    biopsy.export(folder / "classifier", folder / "bundle", mpp=1.0)
    shutil.rmtree(folder / "classifier")
    for path in folder.glob("predictions*"):
        path.unlink()


def read_bundle(folder: Path, name: str) -> Any:
    """Open a bundle as a classifier and as what WSInfer reads."""
    trusted = sha256_file(folder / "bundle" / "torchscript_model.pt")
    open_wsinfer(folder / "bundle", trust_model=trusted)
    return read_verified(folder, "bundle", trusted)


def make_h5(folder: Path) -> None:
    """Write a small PCam."""
    rng = np.random.default_rng(0)
    for side in ("train", "valid", "test"):
        for part, array in (
            ("x", rng.integers(0, 255, (6, 96, 96, 3)).astype(np.uint8)),
            ("y", np.arange(6, dtype=np.uint8).reshape(6, 1, 1, 1) % 2),
        ):
            with h5py.File(folder / f"camelyonpatch_level_2_split_{side}_{part}.h5", "w") as file:
                file[part] = array


PARSERS = {
    "archive": Parser(
        make_zip,
        lambda folder, name: prepare(folder / name),
    ),
    "image": Parser(make_images, lambda folder, name: decode((folder / name).read_bytes())),
    "geojson": Parser(make_geojson, lambda folder, name: read_annotations(folder / name).class_names),
    "xml": Parser(make_xml, lambda folder, name: read_annotations(folder / name).class_names),
    "tables": Parser(make_tables, read_table, "*.csv"),
    "recipe": Parser(make_recipes, read_recipe),
    "keras": Parser(make_keras, read_keras_file),
    "weights": Parser(
        make_weights, lambda folder, name: fill_network(small_network(), "tiny", folder / name)
    ),
    "hdf5": Parser(make_h5, lambda folder, name: prepare(folder)),
    "pack": Parser(make_pack, read_pack, "in.pack/**/*", is_hashed=True),
    "run": Parser(make_run, read_run, "in.run/**/*", is_hashed=True),
    "checkpoint": Parser(make_checkpoint, read_checkpoint, "last*", is_hashed=True),
    "classifier": Parser(make_classifier, read_classifier, "classifier/*", is_hashed=True),
    "predictions": Parser(make_classifier, read_both_predictions, "predictions*", is_hashed=True),
    "map": Parser(make_map, read_map, "out/**/map.parquet", is_hashed=True),
    "map-folder": Parser(make_map, lambda folder, name: read_verified(folder, "out"), "out/a/*"),
    "bundle": Parser(make_bundle, read_bundle, "bundle/*"),
    "slide": Parser(make_slide, read_slide, "*.tiff"),
}


# --- processes
def try_mutation(
    parser: Parser, folder: Path, paths: Sequence[Path], name: str, whole: bytes | None
) -> tuple[str, str]:
    """Mutate one file, read the folder, bring the file back; return the outcome and what it was."""
    rng = random.Random(name)
    path = rng.choice(paths)
    place = path.relative_to(folder).as_posix()
    content = path.read_bytes()
    mutated, resealed = mutate(place, content, rng)
    path.write_bytes(mutated)
    try:
        WARNINGS.clear()
        warn_unsealed.cache_clear()
        value = parser.read(folder, place)
        unnoticed = whole is not None and not resealed and not WARNINGS
        if unnoticed and mutated != content and pickle.dumps(value) != whole:
            raise Silent(f"{place} was changed, and other content was read")
    except BiopsyError as error:
        text = str(error)
        if len(text) > 3000 or "\n" in text:
            return "fault", f"{place}: a message of {len(text):,} characters: {text[:150]!r}"
        return "refused", f"{place}: {text[:200]}"
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)
        inside = [frame for frame in where if "/biopsy/" in frame.filename] or list(where)
        at = f"{Path(inside[-1].filename).name}:{inside[-1].lineno}"
        text = " ".join(str(error).split())[:200]
        return "fault", f"{place}: {type(error).__name__}: {text} ({at})"
    finally:
        path.write_bytes(content)
    return "accepted", place


def work(
    parser: Parser, name: str, folder: Path, numbers: Sequence[int], seed: int, pipe: Connection
) -> None:
    """Try mutations one after the other; send each number before it is tried, and its outcome."""
    sys.stdout.flush()
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(null, stream)
    logging.basicConfig(handlers=[Note(logging.WARNING)], force=True)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    events: list[str] = []

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event in WATCHED and "uname" not in repr(arguments) and "ldconfig" not in repr(arguments):
            events.append(f"{event} {arguments!r}"[:200])
        if event == "open" and isinstance(arguments[0], str) and isinstance(arguments[2], int):
            writes = arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if writes and not arguments[0].startswith(
                (str(folder.parent), tempfile.gettempdir(), "/dev/", "/proc/")
            ):
                events.append(f"open {arguments[0]}"[:200])

    sys.addaudithook(watch)
    paths = sorted(path for path in folder.glob(parser.files) if path.is_file() and ".lock" not in path.name)
    places = [path.relative_to(folder).as_posix() for path in paths]
    values = [parser.read(folder, place) for place in places[: 1 if parser.is_hashed else None]]
    whole = pickle.dumps(values[0]) if parser.is_hashed else None
    events.clear()
    before = set(folder.parent.rglob("*"))
    for number in numbers:
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + MAX_MB * 2**20, -1))
        pipe.send(number)
        outcome, text = try_mutation(parser, folder, paths, f"{seed} {name} {number}", whole)
        left = set(folder.parent.rglob("*")) - before
        strange = [
            path for path in left if ".lock" not in path.name and path.suffix not in (".pyc", ".jsonl")
        ]
        if events or strange:
            outcome, text = "fault", f"{text}: {events or [str(path) for path in strange]}"[:500]
            events.clear()
            before |= left
        pipe.send((outcome, text))
    pipe.send(None)


def fuzz(name: str, numbers: Sequence[int], seed: int, until: float | None) -> Iterator[tuple[int, str, str]]:
    """Yield number, outcome and text of each mutation; a process that hangs or dies is replaced."""
    parser, left = PARSERS[name], numbers
    with tempfile.TemporaryDirectory() as work_folder:
        folder = Path(work_folder).resolve() / "files"
        folder.mkdir()
        run_apart(parser.make, folder)
        while left and (until is None or time.monotonic() < until):
            ours, theirs = multiprocessing.Pipe(duplex=False)
            copy = folder.with_name(f"copy{left[0]}") / "files"
            shutil.copytree(folder, copy)
            process = multiprocessing.get_context("fork").Process(
                target=work, args=(parser, name, copy, left, seed, theirs)
            )
            process.start()
            theirs.close()
            number: int | None = None
            fault = "the process ended"
            try:
                while (sent := receive(ours, 600 if number is None else MAX_SECONDS)) is not None:
                    if isinstance(sent, int):
                        number = sent
                        continue
                    yield number or 0, *sent
                    left = left[left.index(number) + 1 :]
                    if until is not None and time.monotonic() > until:
                        left = []
                        break
            except TimeoutError:
                fault = f"more than {MAX_SECONDS} s"
            except EOFError:
                process.join()
                fault = f"the process ended with {process.exitcode}"
            else:
                number = None
            if process.pid and process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
            process.join()
            ours.close()
            shutil.rmtree(copy.parent, ignore_errors=True)
            if number is not None:
                yield number, "fault", fault
                left = left[left.index(number) + 1 :]
            elif fault != "the process ended" and left:
                raise SystemExit(f"{name}: the valid files cannot be read: {fault}")


def run_apart(make: Callable[[Path], object], folder: Path) -> None:
    """Write valid files in a process of its own, which leaves no threads behind."""
    process = multiprocessing.get_context("fork").Process(target=make, args=(folder,))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit("the valid files could not be written")


def receive(pipe: Connection, seconds: float) -> Any:
    """Return what a process sends, within a time."""
    if not pipe.poll(seconds):
        raise TimeoutError
    return pipe.recv()


def repeat(name: str, number: int, seed: int) -> None:
    """Repeat one mutation in this process and print what is raised."""
    parser = PARSERS[name]
    with tempfile.TemporaryDirectory() as work_folder:
        folder = Path(work_folder).resolve() / "files"
        folder.mkdir()
        parser.make(folder)
        rng = random.Random(f"{seed} {name} {number}")
        paths = sorted(p for p in folder.glob(parser.files) if p.is_file() and ".lock" not in p.name)
        path = rng.choice(paths)
        content = path.read_bytes()
        mutated, resealed = mutate(path.relative_to(folder).as_posix(), content, rng)
        path.write_bytes(mutated)
        print(f"{path}: {len(content):,} bytes become {len(mutated):,}; hash made anew: {resealed}")
        print(mutated[:1500])
        print(parser.read(folder, path.relative_to(folder).as_posix()))


def main() -> None:
    """Fuzz parsers, print faults, and add to the table; exit with 1 where there is a fault."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--parser", default=",".join(PARSERS))
    options.add_argument("--mutations", type=int, default=500)
    options.add_argument("--first", type=int, default=0)
    options.add_argument("--minutes", type=float, default=0)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--only", type=int)
    options.add_argument("--out", type=Path, default=RESULTS)
    arguments = options.parse_args()
    n_faults = 0
    for name in arguments.parser.split(","):
        if arguments.only is not None:
            repeat(name, arguments.only, arguments.seed)
            continue
        began, counts, seen = time.monotonic(), Counter[str](), Counter[str]()
        until = began + 60 * arguments.minutes if arguments.minutes else None
        last = 10**9 if until else arguments.first + arguments.mutations
        for number, outcome, text in fuzz(name, range(arguments.first, last), arguments.seed, until):
            counts[outcome] += 1
            if outcome == "fault":
                print(f"{name} {number}: {text}", flush=True)
            seen[text] += 1
        seconds = round(time.monotonic() - began)
        row = {"parser": name, "mutations": counts.total(), **{k: counts[k] for k in ("accepted", "refused")}}
        row |= {"faults": counts["fault"], "seconds": seconds, "seed": arguments.seed}
        print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        n_faults += counts["fault"]
        write_row(arguments.out, row | {"biopsy": biopsy.__version__})
    raise SystemExit(n_faults > 0)


def write_row(path: Path, row: dict[str, Any]) -> None:
    """Put a parser's row into the table, in the place of an older one."""
    rows = pd.read_csv(path).to_dict("records") if path.exists() else []
    rows = [old for old in rows if old["parser"] != row["parser"]]
    pd.DataFrame([*rows, row]).to_csv(path, index=False)


if __name__ == "__main__":
    main()
