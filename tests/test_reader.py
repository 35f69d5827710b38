"""Slides read: equal to slicing what they were written from, at any level, edge, resolution and thread."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

import biopsy.slide_io.backends as backends
from biopsy.core.errors import SlideError
from biopsy.slide_io.backends import OpenSlideBackend, TileCache
from biopsy.slide_io.images import IMAGE_SUFFIXES
from biopsy.slide_io.reader import open_slide
from conftest import draw_slide
from dicom_files import write_dicom
from refusals import refuses


@pytest.fixture
def slide(make_slide):
    with open_slide(make_slide()) as slide:
        yield slide


def cut(image, x, y, width, height):
    """Slice with white beyond the edges."""
    padded = np.pad(image, ((500, 500), (500, 500), (0, 0)), constant_values=255)
    return padded[y + 500 : y + 500 + height, x + 500 : x + 500 + width]


def test_metadata_of_a_slide(slide):
    assert (slide.width, slide.height) == (600, 400)
    assert (slide.mpp, slide.mpp_source, slide.objective) == (0.5, "slide", None)
    assert slide.format == "generic-tiff" and slide.path.name == "slide.tiff"
    assert [level.downsample for level in slide.levels] == [1, 2, 4, 8, 16]
    assert slide.tile_px() == (64, 64)


@pytest.mark.parametrize(
    "place",
    [
        (0, 0, 600, 400),
        (63, 1, 70, 130),
        (-20, -30, 100, 90),
        (590, 390, 50, 50),
        (700, 0, 8, 8),
        (5, 5, 1, 1),
    ],
)
def test_reading_is_slicing(slide, place):
    read = slide.read(*place)
    assert read.dtype == np.uint8 and read.flags.c_contiguous
    np.testing.assert_array_equal(read, cut(draw_slide(), *place))


def test_levels_are_read_at_level_0_coordinates(slide):
    with tifffile.TiffFile(slide.path) as file:
        for n, page in enumerate(file.pages):
            level, image = slide.levels[n], page.asarray()
            assert image.shape[:2] == (level.height, level.width)
            x, y = 7, 3
            read = slide.read(x * level.downsample, y * level.downsample, 20, 15, level=n)
            np.testing.assert_array_equal(read, cut(image, x, y, 20, 15))


def test_pixels_equal_those_of_openslide(make_slide):
    path = make_slide(compression="jpeg")
    with open_slide(path) as slide:
        other = OpenSlideBackend(path)
        for n, level in enumerate(slide.levels):
            ours = slide.read(0, 0, level.width, level.height, level=n)
            np.testing.assert_array_equal(ours, other.read(n, 0, 0, level.width, level.height))
        other.close()


def test_transparent_pixels_of_openslide_are_white(make_slide):
    backend = OpenSlideBackend(make_slide())
    read = backend.read(0, 590, 390, 20, 20)  # a slide itself never asks beyond the edge
    backend.close()
    np.testing.assert_array_equal(read, cut(draw_slide(), 590, 390, 20, 20))


@pytest.mark.parametrize(("mpp", "level", "scale"), [(0.5, 0, 1), (1.0, 1, 1), (3.0, 2, 1.5), (0.504, 0, 1)])
def test_level_for(slide, mpp, level, scale):
    assert slide.level_for(mpp) == (level, pytest.approx(scale))


def test_level_for_takes_whole_scales_within_a_percent(make_slide):
    with open_slide(make_slide(mpp=0.499, levels=1)) as slide:
        assert slide.level_for(0.5) == (0, 1.0)
        assert slide.level_for(1.0) == (0, 2.0)
        assert slide.level_for(0.6) == (0, pytest.approx(0.6 / 0.499))


def test_a_wanted_pixel_in_pixels_of_level_0(make_slide):
    for levels in (1, 4):
        with open_slide(make_slide(mpp=0.499, levels=levels)) as slide:
            assert [slide.level_0_px(mpp) for mpp in (0.5, 1.0, 2.0, 4.0)] == [1, 2, 4, 8]
            assert slide.level_0_px(1.3) == pytest.approx(1.3 / 0.499)


def test_read_at_copies_averages_and_keeps_the_mean(make_slide):
    image = draw_slide()
    with open_slide(make_slide(levels=1)) as slide:
        np.testing.assert_array_equal(slide.read_at(10, 20, 64, 48, mpp=0.502), image[20:68, 10:74])
        halved = slide.read_at(10, 20, 64, 48, mpp=1.0)
        blocks = image[20:116, 10:138].reshape(48, 2, 64, 2, 3).mean((1, 3))
        assert np.abs(halved - blocks).max() <= 0.5
        for mpp, n in ((0.65, 100), (1.3, 60), (1.77, 50), (5.0, 30)):
            read = slide.read_at(100, 100, n, n, mpp=mpp)
            covered = image[100 : 100 + round(n * mpp / 0.5), 100 : 100 + round(n * mpp / 0.5)]
            assert read.mean((0, 1)) == pytest.approx(covered.mean((0, 1)), abs=0.6)


def test_read_at_is_area_averaging_by_the_exact_scale(make_slide):
    image, scale = draw_slide(), 2.6
    with open_slide(make_slide(levels=1)) as slide:
        read = slide.read_at(0, 0, 151, 151, mpp=0.5 * scale).astype(float)
    edges = np.arange(152) * scale
    summed = np.pad(image.astype(float).cumsum(0).cumsum(1), ((1, 0), (1, 0), (0, 0)))
    below = np.floor(edges).astype(int)
    part = (edges - below)[:, None, None]
    rows = summed[below] * (1 - part) + summed[np.minimum(below + 1, 400)] * part
    columns = (
        rows[:, below].swapaxes(0, 1) * (1 - part) + rows[:, below + 1].swapaxes(0, 1) * part
    ).swapaxes(0, 1)
    exact = np.diff(np.diff(columns, axis=0), axis=1) / scale**2
    assert np.abs(read - exact).max() < 0.51


def test_a_wide_read_is_narrow_ones_side_by_side(make_slide):
    with open_slide(make_slide(levels=1)) as slide:
        for mpp in (0.5, 1.0, 2.0):
            wide = slide.read_at(30, 40, 100, 20, mpp=mpp)
            step = 20 * slide.level_0_px(mpp)
            narrow = [slide.read_at(30 + n * step, 40, 20, 20, mpp=mpp) for n in range(5)]
            np.testing.assert_array_equal(np.hstack(narrow), wide)


@pytest.mark.parametrize("mpp", [1.3, 4 / 3, 0.8, 0.45])
def test_a_resampled_read_may_begin_between_two_pixels(make_slide, mpp):
    with open_slide(make_slide()) as slide:  # at 1.3 and 4 / 3 from level 1
        step = slide.level_0_px(mpp)
        wide = slide.read_at(0, 0, 130, 90, mpp=mpp).astype(int)
        for column, row in ((1, 2), (7, 0), (33, 41), (64, 20)):
            read = slide.read_at(column * step, row * step, 40, 40, mpp=mpp)
            assert np.abs(read - wide[row : row + 40, column : column + 40]).max() <= 1


def test_slightly_coarse_slides_are_enlarged_and_coarse_ones_refused(slide):
    enlarged = slide.read_at(200, 200, 90, 60, mpp=0.4)
    assert enlarged.shape == (60, 90, 3)
    assert enlarged.mean() == pytest.approx(slide.read(200, 200, 72, 48).mean(), abs=1)
    with refuses(SlideError, "0.30 um/px", "slide.tiff", "0.50 um/px"):
        slide.read_at(0, 0, 10, 10, mpp=0.3)


def test_overview_and_thumbnail_hold_the_whole_slide(slide, monkeypatch):
    assert slide.thumbnail(150).shape == (100, 150, 3)
    assert slide.thumbnail(10_000).shape == (400, 600, 3)
    whole = slide.overview(mpp=4.0)
    expected = cv2.resize(draw_slide(), (75, 50), interpolation=cv2.INTER_AREA)
    assert np.abs(whole.astype(int) - expected).mean() < 1
    monkeypatch.setattr("biopsy.slide_io.reader._BLOCK_PX", 20_000)  # bands of a few rows
    assert np.abs(slide.overview(mpp=3.3).astype(int) - slide.overview(mpp=3.3)).max() == 0
    banded = slide.overview(mpp=4.0)
    np.testing.assert_array_equal(banded, whole)


def test_an_overview_of_a_wide_level_decodes_each_tile_a_few_times_only(make_slide, monkeypatch):
    path = make_slide("wide.tiff", width=2000, height=600, levels=1, tile_px=64)
    with open_slide(path) as slide:
        whole = slide.overview(mpp=6.5)
        monkeypatch.setattr("biopsy.slide_io.reader._BLOCK_PX", 100_000)  # bands would be 50 rows high
        n_read = []
        monkeypatch.setattr(slide._backend, "read", lambda *place: n_read.append(place) or read(*place))
        read = type(slide._backend).read.__get__(slide._backend)
        blocks = slide.overview(mpp=6.5)
        assert all(width < 500 and height > 200 for _, _, _, width, height in n_read[:6])
        assert np.abs(blocks.astype(int) - whole).max() <= 3
        monkeypatch.setattr("biopsy.slide_io.reader.MAX_OVERVIEW_PX", 1_000_000)
        with refuses(SlideError, "2,000 x 600", "pyramidal TIFF"):
            slide.thumbnail(500)
        assert slide.read(0, 0, 5, 5).shape == (5, 5, 3)


def test_threads_read_the_same_bytes(slide):
    rng = np.random.default_rng(0)
    places = rng.integers(0, 400, (200, 2)).tolist()
    alone = [slide.read(x, y, 90, 70) for x, y in places]
    with ThreadPoolExecutor(8) as pool, open_slide(slide.path) as fresh:
        together = list(pool.map(lambda place: fresh.read(*place, 90, 70), places))
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


def test_cached_tiles_are_made_once_and_dropped_when_full():
    made = []

    def make(*place):
        made.append(place)
        return np.zeros(100, np.uint8)

    cache = TileCache(250)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: cache.get((0, n % 2, 0), make), range(40)))
    assert sorted(made) == [(0, 0, 0), (0, 1, 0)]
    cache.get((0, 2, 0), make)
    cache.get((0, 2, 0), make)
    assert len(made) == 3
    cache.get((0, 0, 0), make), cache.get((0, 1, 0), make)
    assert 4 <= len(made) <= 5  # the oldest of three went


def test_a_tile_that_fails_is_tried_again():
    cache, tries = TileCache(100), []

    def make(*place):
        tries.append(place)
        raise SlideError("damaged")

    for _ in range(2):
        with pytest.raises(SlideError):
            cache.get((0, 0, 0), make)
    assert len(tries) == 2


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_plain_images_need_a_stated_mpp(tmp_path, suffix):
    path, image = tmp_path / f"a{suffix}", draw_slide()
    Image.fromarray(image).save(path, quality=95, lossless=True)
    with refuses(SlideError, path.name, "--mpp"):
        open_slide(path)
    with open_slide(path, mpp=0.5) as slide:
        kind = {".tif": "tiff", ".jpg": "jpeg"}.get(suffix, suffix[1:])
        assert (slide.format, slide.mpp_source) == (kind, "stated")
        assert slide.tile_px() is None and len(slide.levels) == 1
        read = slide.read(-5, 380, 50, 40)
        tolerance = 30 if kind == "jpeg" else 0
        assert np.abs(read.astype(int) - cut(image, -5, 380, 50, 40)).max() <= tolerance


def test_a_plain_tiff_may_say_its_mpp(tmp_path):
    for unit, per_unit in (("CENTIMETER", 20000), ("INCH", 50800)):
        path = tmp_path / f"{unit}.tiff"
        tifffile.imwrite(path, draw_slide(), resolution=(per_unit, per_unit), resolutionunit=unit)
        with open_slide(path) as slide:
            assert (slide.mpp, slide.mpp_source) == (pytest.approx(0.5), "slide")
    tifffile.imwrite(path, draw_slide(), resolution=(300, 300), resolutionunit="INCH")
    with refuses(SlideError, "84.67 um/px", "300 dots"):
        open_slide(path)


@pytest.mark.parametrize("tile", [None, (128, 128)])
@pytest.mark.parametrize(("size", "unit"), [(0.5, "\u00b5m"), (500, "nm"), (0.0005, "mm"), (0.5, None)])
def test_the_mpp_of_an_ome_tiff_is_that_of_its_metadata(tmp_path, tile, size, unit):
    """As Bio-Formats and tifffile write it, with or without tags of resolution of their own."""
    sizes = {f"PhysicalSize{axis}": size for axis in "XY"}
    units = {f"PhysicalSize{axis}Unit": unit for axis in "XY"} if unit else {}
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(path, draw_slide(), ome=True, photometric="rgb", tile=tile, metadata={**sizes, **units})
    with open_slide(path) as slide:
        assert (slide.mpp, slide.mpp_source) == (pytest.approx(0.5), "slide")
        assert np.array_equal(slide.read(100, 50, 60, 40), draw_slide()[50:90, 100:160])


@pytest.mark.parametrize("metadata", [{}, {"PhysicalSizeX": 1.0, "PhysicalSizeXUnit": "pixel"}])
def test_an_ome_tiff_without_a_size_needs_a_stated_mpp(tmp_path, metadata):
    tifffile.imwrite(tmp_path / "a.ome.tif", draw_slide(), ome=True, photometric="rgb", metadata=metadata)
    with refuses(SlideError, "--mpp"):
        open_slide(tmp_path / "a.ome.tif")


def test_transparency_is_white(tmp_path):
    image = np.dstack([draw_slide(), np.full((400, 600), 255, np.uint8)])
    image[:, :300, 3] = 0
    Image.fromarray(image).save(tmp_path / "a.png")
    with open_slide(tmp_path / "a.png", mpp=1.0) as slide:
        read = slide.read(0, 0, 600, 400)
    assert (read[:, :300] == 255).all()
    np.testing.assert_array_equal(read[:, 300:], image[:, 300:, :3])


def test_the_same_slide_in_five_formats(make_slide, tmp_path):
    image = cv2.GaussianBlur(draw_slide(), (0, 0), 5)
    tiff, png, plain = make_slide(pixels=image, levels=1), tmp_path / "a.png", tmp_path / "plain.tiff"
    aperio = {"description": "Aperio\nx|AppMag = 20|MPP = 0.5", "compression": "jpeg", "quality": 95}
    svs, dicom = make_slide("a.svs", pixels=image, **aperio), write_dicom(tmp_path / "dicom", image, mpp=0.5)
    tifffile.imwrite(plain, image)
    Image.fromarray(image).save(png)
    reads, formats, sources = [], [], []
    for path in (tiff, plain, png, dicom, svs):
        with open_slide(path, mpp=0.5) as slide:
            reads.append(slide.read_at(100, 60, 100, 70, mpp=2.0).astype(int))
            formats.append(slide.format)
            sources.append(slide.mpp_source)
    assert formats == ["generic-tiff", "tiff", "png", "dicom", "aperio"]
    assert sources == ["slide", "stated", "stated", "slide", "slide"]
    np.testing.assert_array_equal(reads[0], reads[1])
    np.testing.assert_array_equal(reads[0], reads[2])
    assert np.abs(reads[0] - reads[3]).max() <= 1  # level 1 was rounded before it was averaged again
    assert np.abs(reads[0] - reads[4]).mean() < 2  # what JPEG loses


def test_dicom_is_read_whole(tmp_path):
    image = draw_slide(500, 333)
    with open_slide(write_dicom(tmp_path / "dicom", image, mpp=0.25)) as slide:
        assert (slide.format, slide.mpp, slide.mpp_source) == ("dicom", 0.25, "slide")
        assert [level.downsample for level in slide.levels] == [1, 2]
        np.testing.assert_array_equal(slide.read(-3, 300, 90, 60), cut(image, -3, 300, 90, 60))


def test_unreadable_files_are_named(tmp_path, make_slide, monkeypatch):
    with refuses(SlideError, "gone.svs"):
        open_slide(tmp_path / "gone.svs")
    (tmp_path / "text.svs").write_text("no slide")
    with refuses(SlideError, "text.svs", "image"):
        open_slide(tmp_path / "text.svs")
    os.mkfifo(tmp_path / "pipe.svs")
    (tmp_path / "link.svs").symlink_to(tmp_path / "gone.svs")
    for path, reason in {
        tmp_path: "not-regular",
        tmp_path / "pipe.svs": "not-regular",
        "/dev/zero": "not-regular",
        tmp_path / "link.svs": "missing",
        tmp_path / "a\0b.svs": "unreadable",
        tmp_path / ("n" * 300): "unreadable",
    }.items():
        with refuses(SlideError, reason=reason):
            open_slide(path)
    Image.fromarray(draw_slide()).save(tmp_path / "large.png")
    monkeypatch.setattr(backends, "MAX_IMAGE_PX", 1000)
    with refuses(SlideError, "large.png", "600 x 400", "pyramidal TIFF"):
        open_slide(tmp_path / "large.png", mpp=0.5)


GREY = draw_slide()[..., 1]
UNCERTAIN = {  # what OpenSlide would turn into some RGB: the low byte left out, channels as grey, ...
    "15 bits": (draw_slide().astype(np.uint16) * 128, {}, "has 16 bits per channel"),
    "12 bits, grey": (GREY.astype(np.uint16) * 16, {"photometric": "minisblack"}, "has 16 bits per channel"),
    "floats": (draw_slide().astype(np.float32), {}, "has 32 bits per channel"),
    "signed": (draw_slide().astype(np.int8), {}, "is of mode RGB with 3 channels"),
    "CMYK": (np.dstack([draw_slide(), GREY]), {"photometric": "separated"}, "is of mode SEPARATED"),
    "Lab": (draw_slide(), {"photometric": "cielab"}, "is of mode CIELAB"),
    "five channels": (
        np.dstack([draw_slide(), GREY, GREY]),
        {"extrasamples": ["unspecified"] * 2},
        "is of mode RGB with 5 channels",
    ),
    "grey of three": (
        draw_slide(),
        {"photometric": "minisblack", "planarconfig": "contig"},
        "is of mode MINISBLACK with 3 channels",
    ),
    "channels": ([GREY, GREY, GREY], {"photometric": "minisblack"}, "has 3 pages of 600 x 400 pixels"),
    "focal planes": ([draw_slide()] * 2, {}, "has 2 pages of 600 x 400 pixels, channels or focal planes"),
}


@pytest.mark.parametrize("is_svs", [False, True])
@pytest.mark.parametrize("name", UNCERTAIN)
def test_tiled_pixels_without_certain_rgb_are_refused_like_plain_ones(tmp_path, name, is_svs):
    pages, options, reason = UNCERTAIN[name]
    plain = {"tile": (128, 128), "photometric": "rgb", "resolution": (20000, 20000), "metadata": None}
    plain |= {"resolutionunit": "CENTIMETER", "description": "Aperio x\r\ny|MPP = 0.5" if is_svs else "y"}
    with tifffile.TiffWriter(tmp_path / "case.tif") as file:
        for page in pages if isinstance(pages, list) else [pages]:
            file.write(page, **plain | options)
        file.write(draw_slide()[::4, ::4], photometric="rgb", metadata=None)  # a thumbnail, as SVS has
    with refuses(SlideError, "case.tif", reason):
        open_slide(tmp_path / "case.tif")


@pytest.mark.parametrize("name", ["grey", "palette", "planes"])
def test_tiled_pixels_with_certain_rgb_are_read(tmp_path, name):
    colours = np.random.default_rng(0).integers(0, 256, (3, 256)).astype(np.uint16)
    pixels, options, wanted = {
        "grey": (GREY, {"photometric": "minisblack"}, np.dstack([GREY] * 3)),
        "palette": (GREY, {"photometric": "palette", "colormap": colours * 257}, colours.T[GREY]),
        "planes": (
            np.moveaxis(draw_slide(), 2, 0).copy(),
            {"photometric": "rgb", "planarconfig": "separate"},
            draw_slide(),
        ),
    }[name]
    tifffile.imwrite(
        tmp_path / "case.tif", pixels, tile=(128, 128), resolution=(2e4, 2e4), resolutionunit=3, **options
    )
    with open_slide(tmp_path / "case.tif") as slide:
        np.testing.assert_array_equal(slide.read(0, 0, 600, 400), wanted)


def test_a_size_beyond_the_tiles_listed_is_refused_where_they_end(make_slide):
    path = make_slide(width=300, height=200)
    with tifffile.TiffFile(path, mode="r+b") as file:
        file.pages[0].tags["ImageLength"].overwrite(5000)
    with open_slide(path, mpp=0.5) as slide:
        assert slide.read(0, 0, 60, 60).shape == (60, 60, 3)
        with refuses(SlideError, "slide.tiff", "level 0"):
            slide.read(0, 4000, 60, 60)


def test_a_tile_too_large_to_decode_is_refused(tmp_path, monkeypatch, make_slide):
    monkeypatch.setattr(backends, "MAX_TILE_PX", 100 * 100)
    with refuses(SlideError, "128 x 128"):
        open_slide(make_slide(tile_px=128))


def test_damaged_tiles_are_named(make_slide, tmp_path):
    path = make_slide(compression="jpeg")
    with tifffile.TiffFile(path) as file:
        offset, n_bytes = file.pages[0].dataoffsets[11], file.pages[0].databytecounts[11]
    damaged = shutil.copy(path, tmp_path / "damaged.tiff")
    with open(damaged, "r+b") as file:
        file.seek(offset)
        file.write(b"\0" * n_bytes)
    with open_slide(damaged) as slide:
        slide.read(0, 0, 60, 60)
        for _ in range(2):
            with refuses(SlideError, "damaged.tiff", "x=64, y=64", "level 0"):
                slide.read(0, 0, 200, 200)


def test_a_codec_that_cannot_be_loaded_is_no_damage(make_slide, monkeypatch):
    def fail(*_, **__):
        raise ImportError("could not import name 'jpeg8_decode'")  # as with too few file handles

    with open_slide(make_slide(compression="jpeg")) as slide:
        monkeypatch.setattr(tifffile.TiffPage, "decode", property(lambda page: fail))
        with pytest.raises(SlideError) as refused:
            slide.read(0, 0, 60, 60)
    assert "jpeg8_decode" in str(refused.value) and "damaged" not in str(refused.value)


def test_a_slide_cut_short_is_named(make_slide):
    path = make_slide(compression="jpeg", levels=1)
    with tifffile.TiffFile(path) as file:
        end = file.pages[0].dataoffsets[-1] + 10
    path.write_bytes(path.read_bytes()[:end])
    with refuses(SlideError, "slide.tiff"), open_slide(path, mpp=0.5) as slide:
        slide.read(0, 0, slide.width, slide.height)


@pytest.mark.data
def test_real_slides(data_dir):
    with open_slide(data_dir / "wsi" / "CMU-1-Small-Region.svs") as slide:
        assert (slide.mpp, slide.mpp_source, slide.objective, slide.format) == (
            0.499,
            "slide",
            20.0,
            "aperio",
        )
        assert slide.thumbnail(512).shape == (512, 383, 3)
    tcga = data_dir / "wsi" / "tcga-cr-7395-01a-01-ts1.svs"
    with refuses(SlideError, "tcga-cr-7395-01a-01-ts1.svs", "--mpp"):
        open_slide(tcga)
    with open_slide(tcga, mpp=0.5) as slide:
        assert slide.level_for(1.0) == (1, 1.0) and slide.mpp_source == "stated"
    with refuses(SlideError, "broken.svs"):
        open_slide(data_dir / "wsi" / "broken.svs", mpp=0.5)
    with open_slide(data_dir / "wsi" / "openslide_small.svs") as slide:
        assert slide.read(0, 0, 20, 20)[16:].min() == 255


@pytest.mark.data
def test_real_slides_read_as_openslide_reads_them(data_dir):
    for name in ("CMU-1-Small-Region.svs", "tcga-cr-7395-01a-01-ts1.svs", "openslide_boxes.tiff"):
        path = data_dir / "wsi" / name
        with open_slide(path, mpp=None if name.startswith("CMU") else 0.5) as slide:
            other = OpenSlideBackend(path)
            for n, level in enumerate(slide.levels):
                size = min(level.width, 1500), min(level.height, 1500)
                np.testing.assert_array_equal(slide.read(0, 0, *size, level=n), other.read(n, 0, 0, *size))
            other.close()


@pytest.mark.data
def test_drawn_boxes(data_dir):
    path = data_dir / "wsi" / "openslide_boxes.tiff"
    with refuses(SlideError, "352.8 um/px", "72 dots"):
        open_slide(path)
    with open_slide(path, mpp=0.5) as slide:
        assert [level.downsample for level in slide.levels] == [1, 2, 4, 8]
        image = tifffile.imread(path, key=0)
        np.testing.assert_array_equal(slide.read(0, 0, 300, 250), image)
        red, green, blue, white = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
        golden = {(50, 50): red, (150, 60): red, (250, 60): white, (50, 200): white, (150, 200): blue}
        golden |= {(250, 200): green, (299, 249): white}
        assert {place: tuple(slide.read(*place, 1, 1)[0, 0].tolist()) for place in golden} == golden
