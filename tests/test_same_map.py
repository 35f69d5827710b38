"""One slide in six formats gives one map: the same where pixels are copied, closely where resampled."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

import biopsy
from biopsy.phantom.slides import make_phantom_slide
from biopsy.slide_io.pyramids import write_pyramid
from biopsy.slides.inference import open_view
from biopsy.slides.sources import Source
from dicom_files import write_dicom
from slide_maps import make_classifier

MPP, PATCH_UM, STRIDE_UM = 2.0, 96.0, 48.0
SIZE = {"width": 640, "height": 480}
LEVELS = {"svs": 4, "pyramid": 4, "dicom": 3, "tiles": 1, "tiff": 1, "png": 1}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """The pixels of one phantom slide in every format, none of them lossy."""
    folder = tmp_path_factory.mktemp("formats")
    drawn = make_phantom_slide(
        folder / "drawn.tiff", seed=4, mpp=MPP, tumour_frac=0.4, compression="deflate", workers=1, **SIZE
    )
    return write_formats(folder, tifffile.imread(drawn.path, key=0))


def write_formats(folder: Path, image: np.ndarray) -> dict[str, Path]:
    plain = {"mpp": MPP, "tile_px": 64, "compression": "deflate", **SIZE}
    aperio = f"Aperio Image Library\n{SIZE['width']}x{SIZE['height']}|AppMag = 5|MPP = {MPP}"
    per_cm = 10_000 / MPP
    tifffile.imwrite(
        folder / "plain.tiff", image, resolution=(per_cm, per_cm), resolutionunit="CENTIMETER", metadata=None
    )
    Image.fromarray(image).save(folder / "slide.png")
    return {
        "tiles": write_pyramid(folder / "tiles.tiff", image, levels=1, **plain),
        "tiff": folder / "plain.tiff",
        "png": folder / "slide.png",
        "svs": write_pyramid(folder / "slide.svs", image, description=aperio, **plain),
        "pyramid": write_pyramid(folder / "pyramid.tiff", image, **plain),
        "dicom": write_dicom(folder / "dicom", image, mpp=MPP, levels=LEVELS["dicom"]),
    }


class Density(torch.nn.Module):
    """Calls a patch tumour the darker and the more uneven it is, beside the patches that it was shown."""

    def __init__(self, patches: torch.Tensor) -> None:
        super().__init__()
        seen = self.measure(patches)
        self.register_buffer("middle", seen.median(dim=0).values)
        self.register_buffer("spread", seen.std(dim=0))

    def measure(self, patches: torch.Tensor) -> torch.Tensor:
        absorbed = torch.nn.functional.adaptive_avg_pool2d(1 - patches[:, 1], 4).flatten(1)
        return torch.stack([absorbed.mean(dim=1), absorbed.std(dim=1)], dim=1)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        z = ((self.measure(patches) - self.middle) / self.spread).sum(dim=1)
        return torch.stack([-z, z], dim=1)


def task(name: str, path: Path) -> Source:
    return Source("case", path, MPP if name == "png" else None)


def make_reader(path: Path, mpp: float) -> biopsy.Classifier:
    """Make a classifier at a resolution that tells the patches of this slide apart."""
    classifier = make_classifier(mpp=mpp, patch_px=round(PATCH_UM / mpp))
    view = open_view(Source("case", path), classifier)
    side, corners = classifier.info.patch_px, zip(view.grid.x, view.grid.y, strict=True)
    with view.slide as slide:
        patches = np.stack([slide.read_at(x, y, side, side, mpp=mpp) for x, y in corners])
    preprocessing = classifier.info.preprocessing
    batch = preprocessing.prepare(preprocessing.resize_patches(patches))
    return biopsy.Classifier(classifier.info, Density(batch))


def map_slide(name, path, classifier):
    return biopsy.slide(
        classifier, path, mpp=task(name, path).mpp, stride_um=STRIDE_UM, precision="fp32", device="cpu"
    )


def prob_at(slide_map):
    """Return the probability of every place on the grid, NaN where no patch lies."""
    probs = np.full((2 * SIZE["height"] // 48, 2 * SIZE["width"] // 48), np.nan)
    probs[slide_map.grid.row, slide_map.grid.column] = slide_map.probs[:, 1]
    return probs


def dice(one, other):
    return 2 * (one & other).sum() / (one.sum() + other.sum())


@pytest.mark.parametrize("mpp", [2.0, 4.0, 6.0, 8.0, 4.8])
def test_every_format_gives_the_same_map(paths, mpp):
    classifier = make_reader(paths["tiles"], mpp)
    maps = {name: map_slide(name, path, classifier) for name, path in paths.items()}
    places = {name: slide_map.about["mpp"] for name, slide_map in maps.items()}
    for name, place in places.items():
        assert place["slide"] == pytest.approx(MPP)
        assert place["source"] == ("stated" if name == "png" else "slide")
        assert place["level"] == min(int(np.log2(mpp / MPP)), LEVELS[name] - 1)
    assert all(slide_map.grid.shape == maps["tiles"].grid.shape for slide_map in maps.values())
    probs = {name: prob_at(slide_map) for name, slide_map in maps.items()}
    assert np.ptp(maps["tiles"].probs[:, 1]) > 0.9 and len(maps["tiles"]) > 250
    for one, other in combinations(maps, 2):
        np.testing.assert_array_equal(np.isnan(probs[one]), np.isnan(probs[other]))
        moved = np.abs(probs[one] - probs[other])[~np.isnan(probs[one])]
        if places[one]["level"] == places[other]["level"] and "dicom" not in (one, other):
            assert moved.max() <= 1e-6  # the same pixels, from wherever they came
        elif mpp in (2.0, 4.0, 8.0):
            assert moved.max() <= 0.01  # levels are averages too, rounded on the way
        else:
            assert np.median(moved) <= 0.01 and moved.max() <= 0.08  # averages of averages: smoother
        called = [maps[name].cells_pred() == 1 for name in (one, other)]
        assert dice(*called) >= 0.95


def test_a_map_that_is_off_by_a_pixel_would_be_seen(paths, tmp_path):
    classifier = make_reader(paths["tiles"], 4.0)
    moved = np.roll(tifffile.imread(paths["tiles"]), 1, axis=1)
    other = map_slide("tiles", write_formats(tmp_path, moved)["tiles"], classifier)
    change = np.abs(prob_at(map_slide("tiles", paths["tiles"], classifier)) - prob_at(other))
    assert np.nanmedian(change) > 0.01 and np.nanmax(change) > 0.1


def test_tissue_is_found_alike_on_pictures_made_from_levels(paths, monkeypatch):
    monkeypatch.setattr("biopsy.slide_io.tissue.THUMBNAIL_PX", 200)  # of 640: from level 1 where there is one
    classifier = make_reader(paths["tiles"], 4.0)
    views = {name: open_view(task(name, path), classifier, STRIDE_UM) for name, path in paths.items()}
    for view in views.values():
        view.slide.close()
    first = views["tiles"]
    for name, view in views.items():
        assert view.tissue.shape == first.tissue.shape == (150, 200)
        assert np.abs(view.thumbnail.astype(int) - first.thumbnail).mean() < 2
        assert (view.tissue & first.tissue).sum() / (view.tissue | first.tissue).sum() > 0.99
        places = [set(zip(grid.row, grid.column, strict=True)) for grid in (view.grid, first.grid)]
        assert len(places[0] ^ places[1]) <= 0.02 * len(places[0])
        if LEVELS[name] == 1:
            np.testing.assert_array_equal(view.tissue, first.tissue)
