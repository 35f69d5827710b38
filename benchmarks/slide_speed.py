"""How fast slides are mapped beside WSInfer, TIAToolbox and LazySlide: the same slide, the same network.

Command::

    python benchmarks/slide_speed.py RUN PACK --wsinfer PYTHON [--tiatoolbox PYTHON] [--lazyslide PYTHON]
        [--turns 5] [--slide 8867] [--work DIR]

RUN is a CancerNet trained on IDC patches, PACK holds their slide. The slide is put together, enlarged eight
times and written as a pyramid of 26,008 x 18,408 pixels at 0.5 um/px. The network is told that its patches of
50 px are cut at 1.0 um/px; what it says is then of no use, what it costs is the same. PYTHON is that of an
environment with the peer (`slide_peers.py` says which version).

The commands take turns in random order, each a process of its own from start to end: every peer (two loading
processes), `biopsy slide` in float32, and `biopsy slide` as it is by default, all from one bundle: the peers
take its TorchScript, ours what lies beside it. All have run before, so that Python has compiled their
sources. Each chooses the tissue by itself, so speed is patches a second, each over its own patches.
Where other work shares the machine, seconds of processor time are given too.

Then: how far probabilities differ from ours in float32, on the patches that both have, on the slide as timed
(resampled by a factor of two) and on a part of it at 1.0 um/px, where nothing is resampled; AUROC and Dice
against the annotation in both modes, of the run at its own 4.0 um/px and threshold with a stride of 40 um;
and where the time goes, with one thread.

A row is appended to ``results/slide-speed.csv``.
"""

import argparse
import itertools
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

import biopsy
from biopsy.exporting.bundles import write_networks
from biopsy.slide_io.pyramids import write_pyramid
from biopsy.slides.sources import list_slides, stitch_slide
from biopsy.training.open_model import open_classifier
from recording import append_rows

RESULTS = Path(__file__).parent / "results"
ENLARGED, MPP, PATCH_MPP = 8, 0.5, 1.0
MODES, STRIDE_UM = ("fp32", "auto"), 40.0
CORNER_PX = (1000, 800, 900, 900)  # of the stitched slide: left, top, width, height of the part for parity
PEERS = ("wsinfer", "tiatoolbox", "lazyslide")
Command = Callable[[Path], pd.DataFrame]
Times = dict[str, list[tuple[float, float, int]]]


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


def run_peer(name: str, python: str, bundle: Path, slides: Path, out: Path) -> pd.DataFrame:
    """Run a peer's engine; gives its table."""
    command = [
        python,
        "-P",
        Path(__file__).with_name("slide_peers.py"),
        name,
        bundle,
        slides / "case.tiff",
        out,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment(out))
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr[-3000:]}")
    return pd.read_csv(out / "patches.csv")


def run_biopsy(precision: str, bundle: Path, slides: Path, out: Path) -> pd.DataFrame:
    """Run this package's command; gives its table."""
    code = [sys.executable, "-c", "from biopsy.cli import main; main()"]
    options = ["--out", out, "--precision", precision, "--device", "cpu"]
    command = [*code, "slide", bundle, slides / "case.tiff", *options]
    subprocess.run(command, check=True, capture_output=True, env=environment(out))
    return biopsy.SlideMap.from_parquet(out / "case" / "map.parquet").to_frame()[["x", "y", "prob"]]


def list_commands(arguments: argparse.Namespace, bundle: Path, slides: Path) -> dict[str, Command]:
    """Return what maps the slide of a folder, by name."""
    peers = {name: getattr(arguments, name) for name in PEERS if getattr(arguments, name)}
    commands: dict[str, Command] = {
        name: partial(run_peer, name, python, bundle, slides) for name, python in peers.items()
    }
    return commands | {mode: partial(run_biopsy, mode, bundle, slides) for mode in MODES}


def take_turns(arguments: argparse.Namespace, bundle: Path) -> tuple[Times, dict[str, pd.DataFrame]]:
    """Run the commands in turn; gives seconds, processor seconds and patches of each run; the last tables."""
    work, order = arguments.work, random.Random(0)
    commands = list_commands(arguments, bundle, work / "slide")
    taken: Times = {name: [] for name in commands}
    tables: dict[str, pd.DataFrame] = {}
    for _ in range(arguments.turns):
        for name in order.sample(list(commands), len(commands)):
            out = work / f"out-{name}"
            shutil.rmtree(out, ignore_errors=True)
            before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
            tables[name] = commands[name](out)
            seconds, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            taken[name].append((seconds, cpu, len(tables[name])))
            load, count = os.getloadavg()[0], len(tables[name])
            print(f"{name}: {count:,} patches, {seconds:.1f} s, {cpu:.1f} CPU s, load {load:.1f}", flush=True)
    return taken, tables


def compare_probs(tables: dict[str, pd.DataFrame], where: str) -> dict[str, float]:
    """Compare every table with ours in float32, on the patches that both have."""
    found: dict[str, float] = {f"{where}_prob_sd": float(tables["fp32"]["prob"].std())}
    for name in (*PEERS, "auto"):
        if name in tables:
            both = tables[name].merge(tables["fp32"], on=["x", "y"], suffixes=("", "_ours"))
            moves = (both["prob"] - both["prob_ours"]).abs()
            found |= {
                f"{where}_{name}_shared": len(both),
                f"{where}_{name}_median_difference": float(moves.median()),
                f"{where}_{name}_largest_difference": float(moves.max()),
            }
    return found


def compare_on_part(arguments: argparse.Namespace, bundle: Path) -> dict[str, float]:
    """Compare probabilities where nothing is resampled."""
    tables = {}
    for name, command in list_commands(arguments, bundle, arguments.work / "part").items():
        out = arguments.work / f"part-{name}"
        shutil.rmtree(out, ignore_errors=True)
        tables[name] = command(out)
    return compare_probs(tables, "part")


def compare_modes(run: Path, work: Path, annotated: pd.DataFrame) -> dict[str, float]:
    """Compare the default mode with float32: AUROC and Dice of the run itself."""
    found: dict[str, float] = {}
    places = zip(annotated["x"] // 50, annotated["y"] // 50, strict=True)
    targets = dict(zip(places, annotated["target"], strict=True))
    classifier, path, probs = open_classifier(run), work / "slide" / "case.tiff", []
    for name in MODES:
        slide_map = biopsy.slide(classifier, path, stride_um=STRIDE_UM, precision=name)
        frame = slide_map.to_frame()
        middle = (frame[["x", "y"]] / ENLARGED + 25).astype(int)
        frame["target"] = [targets.get(((x - 1) // 50, (y - 1) // 50)) for x, y in middle.to_numpy()]
        known = frame.dropna(subset=["target"])
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
    for name in PEERS:
        parser.add_argument(f"--{name}", help="its environment's Python")
    parser.add_argument("--slide", default="8867")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path("slide-speed"))
    arguments = parser.parse_args()
    annotated = build(arguments.pack, arguments.slide, arguments.work)
    bundle = write_bundle(arguments.run, arguments.work)
    part = compare_on_part(arguments, bundle)
    print(json.dumps(part), flush=True)
    taken, tables = take_turns(arguments, bundle)
    row: dict[str, Any] = {"turns": arguments.turns}
    for name, runs in taken.items():
        for what, column in (("patches_a_s", 0), ("patches_a_cpu_s", 1)):
            speeds = [run[2] / run[column] for run in runs]
            row[f"{name}_{what}"] = round(statistics.median(speeds), 1)
            row[f"{name}_{what}_range"] = f"{min(speeds):.1f}-{max(speeds):.1f}"
    for mode, peer in itertools.product(MODES, [name for name in PEERS if name in taken]):
        ratios = [
            ours[2] / ours[0] * theirs[0] / theirs[2]
            for ours, theirs in zip(taken[mode], taken[peer], strict=True)
        ]
        row[f"{mode}_beside_{peer}"] = round(statistics.median(ratios), 2)
        row[f"{mode}_beside_{peer}_range"] = f"{min(ratios):.2f}-{max(ratios):.2f}"
    row |= {key: round(value, 6) for key, value in {**part, **compare_probs(tables, "timed")}.items()}
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
