"""Whether a slide's map depends on how it was scanned or stored; memory; interruption.

Command::

    python benchmarks/slide_accuracy.py maps RUN [--work DIR]
    python benchmarks/slide_accuracy.py formats RUN [--work DIR]
    python benchmarks/slide_accuracy.py huge RUN [--work DIR]
    python benchmarks/slide_accuracy.py kill RUN [--work DIR]
    python benchmarks/slide_accuracy.py kill-huge RUN [--work DIR]

RUN was trained on phantom patches, as `biopsy demo` does it.

``maps``: the same tissue (one drawing) as slides of 0.25, 0.5 and 1.0 um/px, each mapped at three strides.
AUROC of the patch grid against the tumour's outline (a patch is tumour when half its area is), Dice of the
cells called tumour against the outline, and Dice of each map against the first one of its stride.

``formats``: the same pixels as TIFF, PNG, DICOM and SVS, with and without levels, at the classifier's own mpp
and where they are averaged; how far each map's probabilities are from the first one's, on the patches that
both have.

``huge``: a sparse slide of 100,000 x 80,000 pixels (25 x 20 mm at 0.25 um/px), mapped with the run's network
told that its patches are 50 um wide, so that there are many. Peak memory of the process.

``kill``: four slides are mapped by a process that is killed (SIGKILL) at moments spread over its time, then
once to the end; every file is compared with those of a process that was left alone. ``kill-huge``: so with
the slide of ``huge``: while it is read, when nearly all is read, when its folder appears under a temporary
name, and when all but the renaming is done.

Rows are appended to ``results/slide-maps.csv``, ``slide-formats.csv``, ``slide-memory.csv`` and
``slide-kill.csv``.
"""

import argparse
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import shapely
import tifffile
from PIL import Image
from sklearn.metrics import roc_auc_score

import biopsy
from biopsy.phantom.slides import PhantomTruth, make_phantom_slide
from biopsy.slide_io.pyramids import write_pyramid
from biopsy.slide_io.reader import open_slide
from biopsy.training.open_model import open_classifier
from recording import append_rows

RESULTS = Path(__file__).parent / "results"
SIZE_UM = (6000, 4800)
STRIDES = (1, 2, 5)  # parts of a patch
SCALES = (1.0, 4.0, 8 / 3)  # pixels of level 0 in one that the classifier sees
COMMAND = [sys.executable, "-c", "from biopsy.cli import main; main()", "slide"]


def shares(tumour: shapely.MultiPolygon, x: np.ndarray, y: np.ndarray, side: float) -> np.ndarray:
    """Return the share of every square that lies in the tumour."""
    shapely.prepare(tumour)
    squares = shapely.box(x, y, x + side, y + side)
    return shapely.area(shapely.intersection(squares, tumour)) / side**2


def dice(one: np.ndarray, other: np.ndarray) -> float:
    """Return the Dice overlap of two masks, cut to what both cover."""
    rows, columns = np.minimum(one.shape, other.shape)
    one, other = one[:rows, :columns], other[:rows, :columns]
    return float(2 * (one & other).sum() / (one.sum() + other.sum()))


def measure(slide_map: biopsy.SlideMap, truth: PhantomTruth) -> tuple[float, float, np.ndarray]:
    """Return AUROC of the patches and Dice of the cells against the outline, and the cells called tumour."""
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


def run_formats(model: Path, work: Path) -> None:
    """Map the same pixels in several formats, copied and averaged."""
    classifier = open_classifier(model)
    wanted = classifier.info.mpp or 0
    for scale in SCALES:
        mpp = wanted / scale
        width, height = (round(side / mpp) for side in SIZE_UM)
        drawn = make_phantom_slide(
            work / f"drawn-{mpp:g}.tiff",
            seed=11,
            width=width,
            height=height,
            mpp=mpp,
            drawn_mpp=2.0,
            compression="deflate",
        )
        folder = work / f"formats-{mpp:g}"
        shutil.rmtree(folder, ignore_errors=True)
        paths = write_formats(folder, tifffile.imread(drawn.path, key=0), mpp)
        first: biopsy.SlideMap | None = None
        for name, path in paths.items():
            stated = mpp if path.suffix == ".png" else None
            stride_um = classifier.info.patch_px * wanted / 2
            slide_map = biopsy.slide(classifier, path, mpp=stated, stride_um=stride_um, precision="fp32")
            first = first or slide_map
            with open_slide(path, mpp=stated) as slide:
                levels = len(slide.levels)
            about = {"trained_on": classifier.info.pack.get("name"), "mpp": round(mpp, 4), "format": name}
            about |= {"levels": levels, "level_read": slide_map.about["mpp"]["level"]}
            about["patches"] = len(slide_map)
            report("slide-formats.csv", about | compare(first, slide_map))
        shutil.rmtree(folder)


def write_formats(folder: Path, image: np.ndarray, mpp: float) -> dict[str, Path]:
    """Write an image in every format, lossless but for one."""
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    from dicom_files import write_dicom

    folder.mkdir()
    height, width = image.shape[:2]
    size = {"width": width, "height": height, "mpp": mpp}
    aperio = f"Aperio Image Library\n{width}x{height}|AppMag = {10 / mpp:g}|MPP = {mpp:.6f}"
    per_cm = 10_000 / mpp
    tifffile.imwrite(
        folder / "rows.tiff", image, resolution=(per_cm, per_cm), resolutionunit="CENTIMETER", metadata=None
    )
    Image.fromarray(image).save(folder / "image.png", compress_level=1)
    options = {"compression": "deflate", **size}
    return {
        "TIFF, one level, tiles": write_pyramid(folder / "tiles.tiff", image, levels=1, **options),
        "TIFF, one level, rows": folder / "rows.tiff",
        "PNG": folder / "image.png",
        "TIFF, pyramid": write_pyramid(folder / "pyramid.tiff", image, **options),
        "SVS": write_pyramid(folder / "slide.svs", image, description=aperio, **options),
        "DICOM": write_dicom(folder / "dicom", image, mpp=mpp, tile_px=256, levels=4),
        "SVS, JPEG 90": write_pyramid(folder / "jpeg.svs", image, description=aperio, **size),
    }


def compare(first: biopsy.SlideMap, other: biopsy.SlideMap) -> dict[str, object]:
    """Return how far one map's probabilities are from another's, and what only one of them has."""
    one, two = (
        dict(zip(zip(table.grid.column, table.grid.row, strict=True), table.probs[:, 1], strict=True))
        for table in (first, other)
    )
    moved = [abs(float(one[place] - two[place])) for place in one.keys() & two.keys()]
    called = [table.cells_pred() == table.positive_index for table in (first, other)]
    return {
        "in_one_map_only": len(one.keys() ^ two.keys()),
        "median_diff": round(float(np.median(moved)), 6),
        "p99_diff": round(float(np.quantile(moved, 0.99)), 6),
        "largest_diff": round(max(moved), 6),
        "dice_first": round(dice(*called), 4),
    }


def find_huge(model: Path, work: Path) -> tuple[Path, Path]:
    """Return the run's classifier told that its patches are 50 um wide, and the huge slide; drawn once."""
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
    return work / "fine-classifier", path


def run_huge(model: Path, work: Path) -> None:
    """Map a slide of 100,000 x 80,000 pixels and read the process's peak memory."""
    fine, path = find_huge(model, work)
    shutil.rmtree(work / "huge", ignore_errors=True)
    started = time.monotonic()
    subprocess.run([*COMMAND, fine, path, "--out", work / "huge"], check=True)
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
    whole, out = empty(work, "whole"), empty(work, "killed")
    command = [*map(str, (*COMMAND, model, slides)), "--stride-um", "40", "--detections", "--out"]
    started = time.monotonic()
    watch([*command, whole])
    seconds, n_killed, n_begun = time.monotonic() - started, 0, 0
    for part in np.linspace(0.2, 0.98, 10):
        n_killed += watch([*command, out], lambda since, end=part * seconds: since > end)
        n_begun += bool(find_partial(out))
        for folder in list(out.glob("[0-9]"))[::2]:
            shutil.rmtree(folder)  # so that there is something left to do
    watch([*command, out])
    report_kills("four of 1,600 x 1,200", n_killed, n_begun, whole, out)


def run_kill_huge(model: Path, work: Path) -> None:
    """Kill a process that maps the huge slide at four moments, and compare what is there in the end."""
    whole, out = empty(work, "whole-huge"), empty(work, "killed-huge")
    command = [*map(str, (*COMMAND, *find_huge(model, work))), "--out"]
    writing: list[float] = []  # seconds from the start at which it was seen to write
    watch([*command, whole], lambda since: find_partial(whole) and writing.append(since))
    n_killed = n_begun = 0
    for is_moment in (
        lambda since: since > 0.5 * writing[0],
        lambda since: since > 0.9 * writing[0],
        lambda _: find_partial(out),
        lambda _: any((folder / "summary.json").exists() for folder in find_partial(out)),
    ):
        n_killed += watch([*command, out], is_moment)
        n_begun += bool(find_partial(out))
        shutil.rmtree(out / "huge", ignore_errors=True)  # the last moment is short and may be missed
    watch([*command, out])
    report_kills("100,000 x 80,000", n_killed, n_begun, whole, out)


def watch(command: list[str | Path], is_moment: Callable[[float], object] = lambda _: False) -> bool:
    """Run a command, kill it at the moment that is waited for, and say whether it was killed."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        if is_moment(time.monotonic() - started):
            os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.001)
    if process.returncode not in (0, -signal.SIGKILL):
        raise SystemExit(f"the command ended with {process.returncode}")
    return process.returncode != 0


def find_partial(out: Path) -> list[Path]:
    """Return the folders that are being written."""
    return [path for path in out.glob(".*.partial") if path.is_dir()]


def empty(work: Path, name: str) -> Path:
    """Return a place where nothing is yet."""
    shutil.rmtree(work / name, ignore_errors=True)
    return work / name


def report_kills(slides: str, n_killed: int, n_begun: int, whole: Path, out: Path) -> None:
    """Count the files that are missing or differ by a byte where a run was killed, beside one left alone."""
    one, other = (
        {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (whole, out)
    )
    different = sum(one.get(name) != other.get(name) for name in one.keys() | other.keys())
    row = {"slides": slides, "kills": n_killed, "in_writing": n_begun}
    report("slide-kill.csv", {**row, "files": len(one), "different": different})


def report(name: str, row: dict[str, object]) -> None:
    """Print a row and append it to a table of results."""
    print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    row = {
        **row,
        "machine": "AMD EPYC (avx512_bf16, no AMX), two cores",
        "load": round(os.getloadavg()[0], 1),
    }
    path = RESULTS / name
    append_rows(path, [row])


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("run", type=Path)
    parser.add_argument("--work", type=Path, default=Path("slide-accuracy"))
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    PARTS[arguments.part](arguments.run, arguments.work)


PARTS = {
    "maps": run_maps,
    "formats": run_formats,
    "huge": run_huge,
    "kill": run_kill,
    "kill-huge": run_kill_huge,
}

if __name__ == "__main__":
    main()
