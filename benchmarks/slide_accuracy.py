"""Whether a slide's map depends on how it was scanned, where the tumour is known; memory; interruption.

Command::

    python benchmarks/slide_accuracy.py maps RUN [--work DIR]
    python benchmarks/slide_accuracy.py huge RUN [--work DIR]
    python benchmarks/slide_accuracy.py kill RUN [--work DIR]

RUN was trained on phantom patches, as `biopsy demo` does it.

``maps``: the same tissue (one drawing) as slides of 0.25, 0.5 and 1.0 um/px, each mapped at three strides.
AUROC of the patch grid against the tumour's outline (a patch is tumour when half its area is), Dice of the
cells called tumour against the outline, and Dice of each map against the first one of its stride.

``huge``: a sparse slide of 100,000 x 80,000 pixels (25 x 20 mm at 0.25 um/px), mapped with the run's network
told that its patches are 50 um wide, so that there are many. Peak memory of the process.

``kill``: four slides are mapped by a process that is killed (SIGKILL) at moments spread over its time, then
once to the end; every file is compared with those of a process that was left alone.

Rows are appended to ``results/slide-maps.csv``, ``slide-memory.csv`` and ``slide-kill.csv``.
"""

import argparse
import csv
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import shapely
from sklearn.metrics import roc_auc_score

import biopsy
from biopsy.data.phantom.whole_slides import PhantomTruth, make_phantom_slide
from biopsy.learning.opening import open_classifier

RESULTS = Path(__file__).parent / "results"
SIZE_UM = (6000, 4800)
STRIDES = (1, 2, 5)  # parts of a patch
COMMAND = [sys.executable, "-c", "from biopsy.cli import main; main()", "slide"]


def shares(tumour: shapely.MultiPolygon, x: np.ndarray, y: np.ndarray, side: float) -> np.ndarray:
    """Give the share of every square that lies in the tumour."""
    shapely.prepare(tumour)
    squares = shapely.box(x, y, x + side, y + side)
    return shapely.area(shapely.intersection(squares, tumour)) / side**2


def dice(one: np.ndarray, other: np.ndarray) -> float:
    """Give the Dice overlap of two masks, cut to what both cover."""
    rows, columns = np.minimum(one.shape, other.shape)
    one, other = one[:rows, :columns], other[:rows, :columns]
    return float(2 * (one & other).sum() / (one.sum() + other.sum()))


def measure(slide_map: biopsy.SlideMap, truth: PhantomTruth) -> tuple[float, float, np.ndarray]:
    """Give AUROC of the patches and Dice of the cells against the outline, and the cells called tumour."""
    grid, positive = slide_map.grid, slide_map.positive_index
    assert positive is not None
    inside = shares(truth.tumour, grid.x, grid.y, grid.patch_px * grid.scale) >= 0.5
    auroc = float(roc_auc_score(inside, slide_map.probs[:, positive]))
    called = slide_map.cells_pred() == positive
    row, column = np.indices(called.shape)
    side = slide_map.cell_px
    cells = shares(truth.tumour, column.ravel() * side, row.ravel() * side, side).reshape(called.shape) >= 0.5
    mapped = ~np.isnan(slide_map.cells()[..., 0])
    return auroc, dice(called, cells & mapped), called


def run_maps(model: Path, work: Path) -> None:
    """Map the same tissue at three pixel sizes and three strides."""
    classifier = open_classifier(model)
    patch_um = classifier.info.patch_px * (classifier.info.mpp or 0)
    first: dict[int, np.ndarray] = {}
    for mpp in (0.25, 0.5, 1.0):
        width, height = (round(side / mpp) for side in SIZE_UM)
        truth = make_phantom_slide(
            work / f"phantom-{mpp:g}.tiff", seed=11, width=width, height=height, mpp=mpp, drawn_mpp=2.0
        )
        for parts in STRIDES:
            for precision in ("fp32", "auto") if parts == 1 else ("auto",):
                slide_map = biopsy.slide(
                    classifier, truth.path, stride_um=patch_um / parts, precision=precision
                )
                auroc, overlap, called = measure(slide_map, truth)
                first.setdefault(parts, called)
                row = {
                    "mpp": mpp,
                    "stride_um": round(patch_um / parts, 1),
                    "precision": slide_map.about["precision"],
                    "patches": len(slide_map),
                    "auroc": round(auroc, 4),
                    "dice_truth": round(overlap, 4),
                    "dice_first": round(dice(called, first[parts]), 4),
                }
                report("slide-maps.csv", row)


def run_huge(model: Path, work: Path) -> None:
    """Map a slide of 100,000 x 80,000 pixels and read the process's peak memory."""
    classifier = open_classifier(model)
    classifier.info = classifier.info.model_copy(update={"mpp": 50 / classifier.info.patch_px})
    classifier.save(work / "fine-classifier")
    path = work / "huge.tiff"
    if not path.exists():
        make_phantom_slide(
            path,
            seed=5,
            width=100_000,
            height=80_000,
            mpp=0.25,
            tissue_mm2=18.0,
            n_sections=4,
            drawn_mpp=2.0,
        )
    shutil.rmtree(work / "huge", ignore_errors=True)
    started = time.monotonic()
    subprocess.run([*COMMAND, work / "fine-classifier", path, "--out", work / "huge"], check=True)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    slide_map = biopsy.SlideMap.from_parquet(work / "huge" / "huge" / "map.parquet")
    row = {
        "width": 100_000,
        "height": 80_000,
        "file_mb": round(path.stat().st_size / 1e6),
        "patches": len(slide_map),
        "peak_mb": round(used.ru_maxrss / 1000),
        "seconds": round(time.monotonic() - started, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
    }
    report("slide-memory.csv", row)


def run_kill(model: Path, work: Path) -> None:
    """Kill a process that maps four slides at ten moments, and compare what is there in the end."""
    slides = work / "killed-slides"
    slides.mkdir(exist_ok=True)
    for seed in range(4):
        make_phantom_slide(
            slides / f"{seed}.tiff", seed=seed, width=1600, height=1200, mpp=2.0, drawn_mpp=2.0
        )
    whole, out = work / "whole", work / "killed"
    for folder in (whole, out):
        shutil.rmtree(folder, ignore_errors=True)
    command = [*map(str, (*COMMAND, model, slides)), "--stride-um", "40", "--detections", "--out"]
    started = time.monotonic()
    subprocess.run([*command, whole], check=True, stdout=subprocess.DEVNULL)
    seconds, n_begun = time.monotonic() - started, 0
    for part in np.linspace(0.2, 1.0, 10):
        process = subprocess.Popen([*command, out], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(part * seconds)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        n_begun += len(list(out.glob(".*.partial")))
        for folder in list(out.glob("[0-9]"))[::2]:
            shutil.rmtree(folder)  # so that there is something left to do
    subprocess.run([*command, out], check=True, stdout=subprocess.DEVNULL)
    one, other = (
        {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}
        for folder in (whole, out)
    )
    different = sum(one.get(name) != other.get(name) for name in one.keys() | other.keys())
    report("slide-kill.csv", {"kills": 10, "in_writing": n_begun, "files": len(one), "different": different})


def report(name: str, row: dict[str, object]) -> None:
    """Print a row and append it to a table of results."""
    print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    row = {
        **row,
        "machine": "AMD EPYC (avx512_bf16, no AMX), two cores",
        "load": round(os.getloadavg()[0], 1),
    }
    path = RESULTS / name
    is_new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["maps", "huge", "kill"])
    parser.add_argument("run", type=Path)
    parser.add_argument("--work", type=Path, default=Path("slide-accuracy"))
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    {"maps": run_maps, "huge": run_huge, "kill": run_kill}[arguments.part](arguments.run, arguments.work)


if __name__ == "__main__":
    main()
