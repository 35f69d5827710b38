"""Do WSInfer and this package say the same of the same patches, from one exported bundle?

    python benchmarks/wsinfer_parity.py BUNDLE --wsinfer PYTHON [--out results/wsinfer-parity.csv]

Draws a phantom slide at the bundle's own um/px (nothing is resampled), runs WSInfer's own command on it with
the bundle's TorchScript and config.json, cuts the patches WSInfer found at its coordinates, and compares its
probabilities with those of ``biopsy predict`` on them, and with ``biopsy slide`` (float32) where both have a
patch. ``config.json`` is held against WSInfer's own schema first. WSInfer's command asks an online list of
models when it starts: that list is replaced by an empty one. ``PYTHON`` is that of an environment with
``wsinfer`` 0.6 and ``zarr<3``.
"""

import argparse
import csv
import json
import subprocess
import tempfile
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

import biopsy
from biopsy.phantom.slides import make_phantom_slide
from biopsy.slide_io.reader import open_slide

COMMAND = """
import sys
import wsinfer_zoo.client as client
client.load_registry = lambda *_: client.ModelRegistry(models={})
from wsinfer.cli.cli import cli
cli(sys.argv[1:])
"""
VALIDATE = "import json, sys, wsinfer_zoo.client as c; c.validate_config_json(json.load(open(sys.argv[1])))"
HEADER = ["bundle", "network", "patch_px", "mpp", "patches", "predict_largest_difference"]
HEADER += ["slide_shared_patches", "slide_largest_difference", "wsinfer"]


def run_wsinfer(python: str, bundle: Path, slides: Path, results: Path) -> pd.DataFrame:
    """Return WSInfer's table of the one slide in a folder."""
    subprocess.run([python, "-c", VALIDATE, str(bundle / "config.json")], check=True)
    flags = ["--config", bundle / "config.json", "--model-path", bundle / "torchscript_model.pt"]
    places = ["--wsi-dir", slides, "--results-dir", results, "--num-workers", "1"]  # its GeoJSON wants one
    command = [python, "-c", COMMAND, "--backend", "openslide", "run", *map(str, places + flags)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return pd.read_csv(next((results / "model-outputs-csv").glob("*.csv")))


def compare(bundle: Path, python: str, seed: int) -> dict[str, object]:
    """Run both and give the row of the results."""
    config = json.loads((bundle / "config.json").read_text())
    patch_px, mpp = config["patch_size_pixels"], config["spacing_um_px"]
    columns = [f"prob_{name}" for name in config["class_names"]]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "slides").mkdir()
        side = 24 * patch_px
        drawn = make_phantom_slide(
            folder / "phantom.tiff", seed=seed, width=side, height=side, mpp=mpp, compression="deflate"
        )
        path = drawn.path.rename(folder / "slides" / "phantom.tiff")  # WSInfer wants slides alone there
        theirs = run_wsinfer(python, bundle, path.parent, folder / "results")
        with open_slide(path) as slide:
            for x, y in theirs[["minx", "miny"]].to_numpy():
                patch = slide.read(x, y, patch_px, patch_px)
                cv2.imwrite(str(folder / f"x{x}_y{y}.png"), patch[..., ::-1])
        names = [folder / f"x{x}_y{y}.png" for x, y in theirs[["minx", "miny"]].to_numpy()]
        ours = biopsy.predict(bundle, names, out=folder / "ours.csv", device="cpu").frame
        slide_map = biopsy.slide(bundle, path, precision="fp32", device="cpu")
    difference = np.abs(theirs[columns].to_numpy() - ours[columns].to_numpy()).max()
    by_place = {place: n for n, place in enumerate(map(tuple, theirs[["minx", "miny"]].to_numpy().tolist()))}
    grid = slide_map.grid
    places = [
        (round(x), round(y)) for x, y in zip(grid.x_px * grid.scale, grid.y_px * grid.scale, strict=True)
    ]
    shared = [(by_place[place], n) for n, place in enumerate(places) if place in by_place]
    theirs_at, ours_at = np.array(shared).T
    on_slide = np.abs(theirs[columns].to_numpy()[theirs_at] - slide_map.probs[ours_at]).max()
    version = subprocess.run(
        [python, "-c", "import wsinfer; print(wsinfer.__version__)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    values = [bundle.name, config["architecture"], patch_px, mpp, len(theirs), f"{difference:.2e}"]
    return dict(zip(HEADER, [*values, len(shared), f"{on_slide:.2e}", version], strict=True))


def main() -> None:
    """Compare every bundle that is named and write one row each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--wsinfer", required=True, help="Python of an environment with wsinfer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "wsinfer-parity.csv")
    options = parser.parse_args()
    rows = [compare(bundle, options.wsinfer, options.seed) for bundle in options.bundles]
    with open(options.out, "w", newline="") as file:
        writer = csv.DictWriter(file, HEADER)
        writer.writeheader()
        writer.writerows(rows)
    print(options.out.read_text())


if __name__ == "__main__":
    main()
