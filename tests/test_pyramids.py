"""Pyramids out: what is written is what tifffile and OpenSlide read, whole or not at all."""

import hashlib
import itertools

import cv2
import numpy as np
import openslide
import pytest
import tifffile

from biopsy.core.errors import SlideError
from biopsy.slide_io.pyramids import write_pyramid
from conftest import draw_slide
from refusals import refuses


def write(path, image, **options):
    size = {"width": image.shape[1], "height": image.shape[0], "mpp": 0.5, "tile_px": 64}
    return write_pyramid(path, image, **(size | {"compression": "deflate"} | options))


def pages(path):
    with tifffile.TiffFile(path) as file:
        return [page.asarray() for page in file.pages]


@pytest.mark.parametrize("size", [(600, 400), (513, 257), (64, 64), (1, 1), (65, 1)])
def test_lossless_levels_are_the_image_and_its_averages(tmp_path, size):
    image = draw_slide(640, 420)[: size[1], : size[0]]
    found = pages(write(tmp_path / "a.tiff", image))
    np.testing.assert_array_equal(found[0], image)
    for finer, coarser in itertools.pairwise(found):
        assert coarser.shape[:2] == (-(-finer.shape[0] // 2), -(-finer.shape[1] // 2))
        even = finer[: finer.shape[0] // 2 * 2, : finer.shape[1] // 2 * 2].astype(float)
        mean = even.reshape(even.shape[0] // 2, 2, even.shape[1] // 2, 2, 3).mean((1, 3))
        assert np.abs(coarser[: mean.shape[0], : mean.shape[1]] - mean).max(initial=0) <= 0.5
    assert max(found[-1].shape[:2]) <= 64


def test_openslide_reads_the_same_pixels_and_the_mpp(tmp_path):
    image = draw_slide(640, 384)
    path = write(tmp_path / "a.tiff", image, mpp=0.2431)
    with openslide.OpenSlide(path) as slide:
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.2431, rel=1e-6)
        assert slide.level_downsamples == (1, 2, 4, 8, 16)[: slide.level_count]
        read = np.asarray(slide.read_region((0, 0), 0, slide.dimensions))[..., :3]
    np.testing.assert_array_equal(read, image)


def test_jpeg_is_near_and_smaller(tmp_path):
    image = cv2.GaussianBlur(draw_slide(), (0, 0), 2)
    lossless = write(tmp_path / "a.tiff", image)
    lossy = write(tmp_path / "b.tiff", image, compression="jpeg")
    assert np.abs(pages(lossy)[0].astype(int) - image).mean() < 2
    assert lossy.stat().st_size < 0.5 * lossless.stat().st_size


def test_a_description_like_aperios_makes_an_svs(tmp_path):
    path = write(tmp_path / "a.svs", draw_slide(), description="Aperio\n600x400|AppMag = 20|MPP = 0.4990")
    with openslide.OpenSlide(path) as slide:
        assert slide.properties["openslide.vendor"] == "aperio"
        assert slide.properties["openslide.mpp-x"] == "0.499"


def test_tiles_come_row_by_row_once_each_and_none_is_background(tmp_path):
    image, asked = draw_slide(), []

    def source(x, y, width, height):
        asked.append((y, x))
        return None if x < 128 else image[y : y + height, x : x + width]

    path = write_pyramid(
        tmp_path / "a.tiff",
        source,
        width=600,
        height=400,
        mpp=0.5,
        tile_px=64,
        compression="deflate",
        background=(1, 2, 3),
    )
    assert asked == [(y, x) for y in range(0, 400, 64) for x in range(0, 600, 64)]
    found = pages(path)
    assert (found[0][:, :128] == (1, 2, 3)).all() and (found[1][:, :64] == (1, 2, 3)).all()
    np.testing.assert_array_equal(found[0][:, 128:], image[:, 128:])


def test_same_bytes_whatever_the_threads(tmp_path):
    paths = [write(tmp_path / f"{n}.tiff", draw_slide(), workers=n, compression="jpeg") for n in (1, 3)]
    digests = {hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    assert len(digests) == 1


def test_levels_as_requested(tmp_path):
    assert len(pages(write(tmp_path / "a.tiff", draw_slide(), levels=1))) == 1
    assert len(pages(write(tmp_path / "b.tiff", draw_slide(), levels=3))) == 3


def test_nothing_is_left_when_the_source_fails(tmp_path):
    def source(x, y, width, height):
        if y:
            raise KeyError("gone")

    with pytest.raises(KeyError):
        write_pyramid(tmp_path / "a.tiff", source, width=600, height=400, mpp=0.5, tile_px=64)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ({"mpp": 0.0}, ["0.0 um/px"]),
        ({"tile_px": 100}, ["tile_px 100", "16"]),
        ({"compression": "zip"}, ["'zip'", "deflate", "jpeg"]),
        ({"width": 10}, ["uint8", "10, 3"]),
    ],
)
def test_refusals(tmp_path, options, facts):
    with refuses(SlideError, *facts):
        write(tmp_path / "a.tiff", draw_slide(), **options)


def test_refusals_of_pixels(tmp_path):
    with refuses(SlideError, "uint8"):
        write(tmp_path / "a.tiff", draw_slide()[..., 0])
    with refuses(SlideError, "uint8"):
        write(tmp_path / "a.tiff", draw_slide() / 255)
    with refuses(SlideError, "(3, 3, 3)"):
        write_pyramid(
            tmp_path / "a.tiff",
            lambda *place: np.zeros((3, 3, 3), np.uint8),
            width=64,
            height=64,
            mpp=1.0,
            tile_px=64,
        )
