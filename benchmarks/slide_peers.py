"""Map a slide with a peer's own engine and the TorchScript of a bundle; run by `slide_speed.py`.

Command, with the Python of an environment that has the peer and OpenSlide::

    PYTHON -P benchmarks/slide_peers.py PEER BUNDLE SLIDE OUT

PEER is wsinfer (0.6.1, with ``zarr<3``), tiatoolbox (2.1) or lazyslide (0.13). Patch size and um/px are
those of the bundle's ``config.json``; every engine chooses the tissue by itself and uses the processor only.
Writes ``OUT/patches.csv``: left and top edge of every patch in pixels of the slide, and its
probability of the last class.
"""

import argparse
import json
import os
import sys
from pathlib import Path

PATCHES = "patches.csv"
WORKERS = 2  # processes that read


def read_config(bundle: Path) -> tuple[int, float, int]:
    """Return the side of a patch in pixels, its um/px, and the number of classes."""
    config = json.loads((bundle / "config.json").read_text())
    return config["patch_size_pixels"], config["spacing_um_px"], config["num_classes"]


def run_wsinfer(bundle: Path, slide: Path, out: Path):
    """Run WSInfer's command; the online list of models that it asks for is replaced by an empty one."""
    import types

    import pandas as pd
    import wsinfer_zoo.client

    os.environ["WSINFER_FORCE_CPU"] = "1"
    wsinfer_zoo.client.load_registry = lambda *_: types.SimpleNamespace(models={})
    from wsinfer.cli.cli import cli

    files = ["-c", bundle / "config.json", "-p", bundle / "torchscript_model.pt"]
    words = ["run", "-i", slide.parent, "-o", out, *files, "-n", WORKERS]
    cli([str(word) for word in words], standalone_mode=False)
    table = pd.read_csv(out / "model-outputs-csv" / f"{slide.stem}.csv")
    return table[["minx", "miny", table.columns[-1]]]


def run_tiatoolbox(bundle: Path, slide: Path, out: Path):
    """Run TIAToolbox's PatchPredictor."""
    import numpy as np
    import pandas as pd
    import torch
    import zarr
    from openslide import PROPERTY_NAME_MPP_X, OpenSlide
    from tiatoolbox.models.engine.patch_predictor import PatchPredictor
    from tiatoolbox.models.models_abc import ModelABC

    patch_px, mpp, n_classes = read_config(bundle)

    class Network(ModelABC):
        def __init__(self) -> None:
            super().__init__()
            self.script = torch.jit.load(str(bundle / "torchscript_model.pt"), map_location="cpu")

        def forward(self, batch):
            return self.script(batch.permute(0, 3, 1, 2).float() / 255).softmax(dim=1)

        @staticmethod
        def infer_batch(model, batch_data, *, device="cpu"):
            with torch.inference_mode():
                return model(batch_data).numpy()

    slide_mpp = float(OpenSlide(slide).properties[PROPERTY_NAME_MPP_X])
    engine = PatchPredictor(Network().eval(), batch_size=32, num_workers=WORKERS, device="cpu", verbose=False)
    written = engine.run(
        images=[slide],
        patch_mode=False,
        input_resolutions=[{"units": "mpp", "resolution": mpp}],
        patch_input_shape=(patch_px, patch_px),
        stride_shape=(patch_px, patch_px),
        auto_get_mask=True,
        return_probabilities=True,
        class_dict={i: str(i) for i in range(n_classes)},
        save_dir=out / "tiatoolbox",
        output_type="zarr",
        wsireader_kwargs={"mpp": slide_mpp},
    )
    group = zarr.open(str(next(iter(written.values()))), mode="r")
    edges, probs = np.asarray(group["coordinates"]) * (mpp / slide_mpp), np.asarray(group["probabilities"])
    return pd.DataFrame({"x": edges[:, 0], "y": edges[:, 1], "prob": probs[:, -1]})


def run_lazyslide(bundle: Path, slide: Path, out: Path):
    """Run LazySlide's tile prediction."""
    import lazyslide
    import torch
    from torchvision.transforms import v2
    from wsidata import open_wsi

    patch_px, mpp, _ = read_config(bundle)

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.script = torch.jit.load(str(bundle / "torchscript_model.pt"), map_location="cpu")

        def predict(self, images):
            return {"prob": self.script(images).softmax(dim=1)[:, -1].numpy()}

    wsi = open_wsi(slide, store=str(out / "store.zarr"))
    lazyslide.pp.find_tissues(wsi)
    lazyslide.pp.tile_tissues(wsi, patch_px, mpp=mpp)
    to_tensor = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    lazyslide.tl.tile_prediction(
        wsi,
        Network().eval(),
        transform=to_tensor,
        batch_size=32,
        num_workers=WORKERS,
        device="cpu",
        pbar=False,
    )
    tiles = wsi.shapes["tiles"]
    edges = tiles.geometry.bounds
    return edges[["minx", "miny"]].assign(prob=tiles["prob"])


PEERS = {"wsinfer": run_wsinfer, "tiatoolbox": run_tiatoolbox, "lazyslide": run_lazyslide}


def main() -> None:
    """Run the peer and write its patches."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peer", choices=PEERS)
    for name in ("bundle", "slide", "out"):
        parser.add_argument(name, type=Path)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True)
    table = PEERS[arguments.peer](arguments.bundle, arguments.slide, arguments.out)
    table.columns = ["x", "y", "prob"]
    table.to_csv(arguments.out / PATCHES, index=False)


if __name__ == "__main__":
    sys.exit(main())
