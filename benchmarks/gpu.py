"""One command for a machine with a GPU: an epoch of CancerNet of IDC's size, and slides.

* Training: 199,818 synthetic patches (as many as an epoch of the post has) through this package's batches,
  augmentation and updates, in batches of 32 (as in the post, which states 133 s an epoch) and of 1,024,
  in float32 and bfloat16, the network as it is and, on a GPU, compiled into CUDA graphs
  (``torch.compile(mode="reduce-overhead")``). Two passes; the first one, with compilation, is given apart:
  what compiling costs beside what it saves in each further epoch.
* Slides: the whole command ``biopsy slide idc`` on a synthetic slide, every 40 um, in bfloat16.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --device cpu --small    # tries the script without a GPU, in seconds

Results: ``results/gpu.csv``, a row per task.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from biopsy.phantom.slides import make_phantom_slide
from recording import append_rows
from training_speed import describe_machine, start_cancernet

RESULTS = Path(__file__).parent / "results" / "gpu.csv"
EPOCH, POST_EPOCH_S = 199_818, 133
PATCH_PX, SLIDE_MPP, STRIDE_UM = 50, 0.5, 40
BATCH_SIZES, SLIDE_PX = (32, 1024), 16_000
SMALL_EPOCH, SMALL_BATCH_SIZES, SMALL_SLIDE_PX = 32, (8, 16), 600


def measure_training(
    device: str, n_patches: int, batch_size: int, precision: str, *, compiled: bool
) -> dict[str, object]:
    """Return the seconds of an epoch of the post's size, and of the first one as measured."""
    rng = np.random.default_rng(0)
    patches = rng.integers(0, 256, (n_patches, PATCH_PX, PATCH_PX, 3), np.uint8)
    target, sizes = rng.integers(0, 2, n_patches), np.full((n_patches, 2), PATCH_PX)
    train = start_cancernet(
        patches, target, sizes, precision, device=device, batch_size=batch_size, compiled=compiled
    )
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        n_trained = train()  # ends by reading the losses, so the device has finished
        seconds.append(time.perf_counter() - started)
    per_s = n_trained / seconds[1]
    return {
        "task": f"train cancernet, batch {batch_size}, {precision}" + (", compiled" if compiled else ""),
        "patches": n_trained,
        "patches_per_s": round(per_s),
        "epoch_s": round(EPOCH / per_s, 1),
        "ratio_to_post": round(POST_EPOCH_S * per_s / EPOCH, 2),
        "first_pass_s": round(seconds[0], 1),
    }


def measure_slide(device: str, side_px: int) -> dict[str, object]:
    """Return the patches a second of ``biopsy slide idc``, from start to exit."""
    with tempfile.TemporaryDirectory() as name:
        slide = Path(name) / "slide.tiff"
        make_phantom_slide(slide, seed=0, width=side_px, height=side_px, mpp=SLIDE_MPP)
        command = [sys.executable, "-m", "biopsy", "slide", "idc", str(slide), "--out", f"{name}/map"]
        options = ["--device", device, "--precision", "bf16", "--stride-um", str(STRIDE_UM), "--quiet"]
        started = time.perf_counter()
        subprocess.run([*command, *options], check=True)
        seconds = time.perf_counter() - started
        summary = json.loads((Path(name) / "map" / "slide" / "summary.json").read_text())
    n_patches = summary["n_patches"]
    return {
        "task": "slide idc, bf16",
        "patches": n_patches,
        "patches_per_s": round(n_patches / seconds),
    }


def main(words: Sequence[str] | None = None) -> None:
    """Measure, write and print a row for each task."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="few patches and a small slide")
    arguments = parser.parse_args(words)
    small, device = arguments.small, torch.device(arguments.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    rows = [
        measure_training(
            arguments.device, SMALL_EPOCH if small else EPOCH, batch_size, precision, compiled=compiled
        )
        for batch_size in (SMALL_BATCH_SIZES if small else BATCH_SIZES)
        for precision in ("fp32", "bf16")
        for compiled in ((False, True) if device.type == "cuda" else (False,))
    ]
    rows.append(measure_slide(arguments.device, SMALL_SLIDE_PX if small else SLIDE_PX))
    append_rows(RESULTS, [row | {"device": name} | describe_machine() for row in rows])
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
