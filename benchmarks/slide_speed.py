"""How fast slides are mapped, beside WSInfer 0.6.1 on the same slide with the same TorchScript network.

Command::

    python benchmarks/slide_speed.py RUN PACK --wsinfer PYTHON [--turns 3] [--slide 8867] [--work DIR]

RUN is a CancerNet trained on IDC patches, PACK holds their slide. The slide is put together, enlarged eight
times and written as a pyramid of 26,008 x 18,408 pixels at 0.5 um/px. The network is told that its patches of
50 px are cut at 1.0 um/px; what it says is then of no use, what it costs is the same. PYTHON is that of an
environment with ``wsinfer`` 0.6.1, ``zarr<3`` and OpenSlide; the online list of models that its command asks
for at the start is replaced by an empty one.

Three commands take turns in random order, each a process of its own from start to end: WSInfer (two loading
processes), `biopsy slide` in float32, and `biopsy slide` as it is by default, all from one bundle: WSInfer
takes its TorchScript, ours what lies beside it. Both have run before, so that Python has compiled their
sources. Both tools choose the tissue by themselves, so speed is patches a second, each over its own patches.
Where other work shares the machine, seconds of processor time are given too.

Then: how far probabilities differ, on the patches that both have, on a part of the slide at 1.0 um/px, where
nothing is resampled; how far the default mode moves probabilities; AUROC and Dice against the annotation in
both modes, of the run at its own 4.0 um/px and threshold with a stride of 40 um; and where the time goes,
with one thread.

A row is appended to ``results/slide-speed.csv``.
"""

import argparse
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

import biopsy
from biopsy.exporting.bundles import write_networks
from biopsy.models.importers.wsinfer import CONFIG, SCRIPT
from biopsy.slide_io.pyramids import write_pyramid
from biopsy.slides.sources import list_slides, stitch_slide
from biopsy.training.open_model import open_classifier
from recording import append_rows

RESULTS = Path(__file__).parent / "results"
ENLARGED, MPP, PATCH_MPP = 8, 0.5, 1.0
MODES, STRIDE_UM = ("fp32", "auto"), 40.0
CORNER_PX = (1000, 800, 900, 900)  # of the stitched slide: left, top, width, height of the part for parity
WSINFER = """
import sys, types, wsinfer_zoo.client as client
client.load_registry = lambda *_: types.SimpleNamespace(models={})
from wsinfer.cli.cli import cli
cli(sys.argv[1:])
"""


def build(pack: Path, slide_id: str, work: Path) -> pd.DataFrame:
    """Write the slide and a part of it; gives the annotated patches, in pixels of the stitched slide."""
    opened = biopsy.Pack.open(pack)
    index = list_slides(opened)[slide_id]
    table = opened.table.iloc[index][["x", "y", "target"]].astype(int)
    width, height = table["x"].max() + 50, table["y"].max() + 50
    picture = np.full((height, width, 3), 255, np.uint8)
    for row, (x, y) in zip(index, table[["x", "y"]].to_numpy(), strict=True):
        picture[y : y + 50, x : x + 50] = opened.patches[row]
    assert stitch_slide(opened, slide_id, index)[0].width == width
    left, top, across, down = CORNER_PX
    parts = {"slide": (picture, ENLARGED, MPP)}
    parts["part"] = (picture[top : top + down, left : left + across], ENLARGED // 2, PATCH_MPP)
    for name, (image, times, mpp) in parts.items():
        folder = work / name
        folder.mkdir(parents=True, exist_ok=True)
        large = cv2.resize(image, None, fx=times, fy=times, interpolation=cv2.INTER_CUBIC)
        size = {"width": large.shape[1], "height": large.shape[0]}
        write_pyramid(folder / "case.tiff", large, mpp=mpp, workers=2, **size)
    return table


def write_bundle(run: Path, work: Path) -> Path:
    """Write the TorchScript of the run's network with patches of 50 px at 1.0 um/px."""
    classifier = open_classifier(run)
    classifier.info = classifier.info.model_copy(update={"mpp": PATCH_MPP})
    bundle = work / "bundle"
    shutil.rmtree(bundle, ignore_errors=True)
    bundle.mkdir()
    classifier.save(bundle)
    write_networks(classifier, bundle)
    return bundle


def environment(out: Path) -> dict[str, str]:
    """Return the environment of both tools: compiled sources are kept, as after any installation."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return kept | {"PYTHONPYCACHEPREFIX": str(out.parent.resolve() / "compiled")}


def run_wsinfer(python: str, bundle: Path, slides: Path, out: Path) -> pd.DataFrame:
    """Run WSInfer's own command; gives its table."""
    options = ["-c", bundle / CONFIG, "-p", bundle / SCRIPT, "-n", "2"]
    command = [python, "-c", WSINFER, "run", "-i", slides, "-o", out, *options]
    subprocess.run(
        command, check=True, capture_output=True, env=environment(out) | {"WSINFER_FORCE_CPU": "1"}
    )
    table = pd.read_csv(out / "model-outputs-csv" / "case.csv")
    return table.rename(columns={"minx": "x", "miny": "y", "prob_idc": "prob"})[["x", "y", "prob"]]


def run_biopsy(precision: str, bundle: Path, slides: Path, out: Path) -> pd.DataFrame:
    """Run this package's command; gives its table."""
    code = [sys.executable, "-c", "from biopsy.cli import main; main()"]
    options = ["--out", out, "--precision", precision, "--device", "cpu"]
    command = [*code, "slide", bundle, slides / "case.tiff", *options]
    subprocess.run(command, check=True, capture_output=True, env=environment(out))
    return biopsy.SlideMap.from_parquet(out / "case" / "map.parquet").to_frame()[["x", "y", "prob"]]


def take_turns(arguments: argparse.Namespace, bundle: Path) -> dict[str, list[tuple[float, float, int]]]:
    """Run the three commands in turn; gives seconds, processor seconds and patches of every run."""
    work, order = arguments.work, random.Random(0)
    commands = {
        "wsinfer": lambda out: run_wsinfer(arguments.wsinfer, bundle, work / "slide", out),
        "fp32": lambda out: run_biopsy("fp32", bundle, work / "slide", out),
        "auto": lambda out: run_biopsy("auto", bundle, work / "slide", out),
    }
    taken: dict[str, list[tuple[float, float, int]]] = {name: [] for name in commands}
    for _ in range(arguments.turns):
        for name in order.sample(list(commands), 3):
            out = work / f"out-{name}"
            shutil.rmtree(out, ignore_errors=True)
            before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
            table = commands[name](out)
            seconds, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            taken[name].append((seconds, cpu, len(table)))
            load = os.getloadavg()[0]
            print(
                f"{name}: {len(table):,} patches, {seconds:.1f} s, {cpu:.1f} CPU s, load {load:.1f}",
                flush=True,
            )
    return taken


def compare_on_part(arguments: argparse.Namespace, bundle: Path) -> dict[str, float]:
    """Compare probabilities where nothing is resampled."""
    part, tables = arguments.work / "part", []
    for name, run in (
        ("wsinfer", lambda out: run_wsinfer(arguments.wsinfer, bundle, part, out)),
        ("fp32", lambda out: run_biopsy("fp32", bundle, part, out)),
    ):
        out = arguments.work / f"part-{name}"
        shutil.rmtree(out, ignore_errors=True)
        tables.append(run(out))
    both = tables[0].merge(tables[1], on=["x", "y"], suffixes=("", "_ours"))
    return {"shared": len(both), "largest_difference": float((both["prob"] - both["prob_ours"]).abs().max())}


def compare_modes(run: Path, work: Path, annotated: pd.DataFrame) -> dict[str, float]:
    """Compare the default mode with float32: probabilities as timed; AUROC and Dice of the run itself."""
    maps = [biopsy.SlideMap.from_parquet(work / f"out-{name}" / "case" / "map.parquet") for name in MODES]
    moves = np.abs(maps[0].probs - maps[1].probs)
    found = {"timed_largest_move": float(moves.max()), "timed_median_move": float(np.median(moves))}
    places = zip(annotated["x"] // 50, annotated["y"] // 50, strict=True)
    targets = dict(zip(places, annotated["target"], strict=True))
    classifier, path, probs = open_classifier(run), work / "slide" / "case.tiff", []
    for name in MODES:
        slide_map = biopsy.slide(classifier, path, stride_um=STRIDE_UM, precision=name)
        frame = slide_map.to_frame()
        middle = (frame[["x", "y"]] / ENLARGED + 25).astype(int)
        frame["target"] = [targets.get(((x - 1) // 50, (y - 1) // 50)) for x, y in middle.to_numpy()]
        known = frame.dropna()
        truth, prob = known["target"].to_numpy(bool), known["prob"].to_numpy()
        called = prob >= slide_map.threshold
        found[f"auroc_{name}"] = float(roc_auc_score(truth, prob))
        found[f"dice_{name}"] = float(2 * (called & truth).sum() / (called.sum() + truth.sum()))
        probs.append(prob)
    return found | {"judged": len(probs[0]), "largest_move": float(np.abs(probs[0] - probs[1]).max())}


def find_time(work: Path, bundle: Path) -> dict[str, float]:
    """Return processor seconds of each part of the default mode, one thread, without starting Python."""
    from biopsy.models.hardware import pick_precision
    from biopsy.slides.grids import cut_blocks
    from biopsy.slides.inference import open_view, predict_slides
    from biopsy.slides.sources import Source

    classifier = open_classifier(bundle)
    marks = [time.process_time()]
    task = Source("case", work / "slide" / "case.tiff")
    with open_view(task, classifier).slide:
        marks.append(time.process_time())
    view = open_view(task, classifier)
    begun = time.process_time()
    for block in cut_blocks(view.grid, view.downsample):
        image = view.slide.read_at(block.x, block.y, block.width_px, block.height_px, mpp=view.grid.mpp)
        block.cut(image, view.grid.patch_px)
    read = time.process_time() - begun
    view.slide.close()
    begun = time.process_time()
    list(predict_slides([task], classifier, precision=pick_precision("auto", "cpu"), n_threads=1))
    together = time.process_time() - begun
    return {"tissue_and_grid": marks[1] - marks[0], "reading": read, "all_but_writing": together}


def main() -> None:
    """Build, run in turns, compare, and append a row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("pack", type=Path)
    parser.add_argument(
        "--wsinfer", default=os.environ.get("WSINFER_PYTHON"), help="its environment's Python"
    )
    parser.add_argument("--slide", default="8867")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("slide-speed"))
    arguments = parser.parse_args()
    annotated = build(arguments.pack, arguments.slide, arguments.work)
    bundle = write_bundle(arguments.run, arguments.work)
    part = compare_on_part(arguments, bundle)
    print(json.dumps(part), flush=True)
    taken = take_turns(arguments, bundle)
    row: dict[str, Any] = {"turns": arguments.turns}
    for name, runs in taken.items():
        for what, column in (("patches_a_s", 0), ("patches_a_cpu_s", 1)):
            speeds = [run[2] / run[column] for run in runs]
            row[f"{name}_{what}"] = round(statistics.median(speeds), 1)
            row[f"{name}_{what}_range"] = f"{min(speeds):.1f}-{max(speeds):.1f}"
    for name in ("fp32", "auto"):
        for what in ("patches_a_s", "patches_a_cpu_s"):
            row[f"{name}_{what}_ratio"] = round(row[f"{name}_{what}"] / row[f"wsinfer_{what}"], 2)
    row |= {key: round(value, 6) for key, value in part.items()}
    row |= {
        key: round(value, 5) for key, value in compare_modes(arguments.run, arguments.work, annotated).items()
    }
    row |= {f"cpu_s_{key}": round(value, 2) for key, value in find_time(arguments.work, bundle).items()}
    row |= {"load": round(os.getloadavg()[0], 1), "torch": version("torch"), "cores": os.cpu_count()}
    for key, value in row.items():
        print(f"{key}: {value}")
    path = RESULTS / "slide-speed.csv"
    append_rows(path, [row])


if __name__ == "__main__":
    main()
