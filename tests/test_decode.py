"""Image bytes to RGB: equal to Pillow, by the stated rules elsewhere, refused in words."""

import io
import struct
import zipfile
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image

from biopsy.core.errors import DataError
from biopsy.slide_io.images import decode, read_header
from refusals import refuses


def encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def by_pillow(data):
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (33, 50, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("kind", "options", "plain"),
    [
        ("PNG", {}, True),
        ("TIFF", {}, True),
        ("TIFF", {"compression": "tiff_lzw"}, False),
        ("TIFF", {"compression": "jpeg"}, False),
        ("BMP", {}, False),
        *[
            ("JPEG", {"subsampling": s, "quality": q, "progressive": s == 1}, True)
            for s in (0, 1, 2)
            for q in (40, 95)
        ],
    ],
)
def test_rgb_files_equal_pillow(picture, kind, options, plain):
    data = encode(picture, kind, **options)
    assert read_header(data) == (50, 33, plain)
    assert np.array_equal(decode(data), by_pillow(data))
    if kind == "PNG":
        assert np.array_equal(decode(memoryview(data)), np.array(picture))


@pytest.mark.parametrize("mode", ["1", "L", "P"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_grey_and_palette_files_equal_pillow(picture, mode, kind):
    data = encode(picture.convert(mode), kind)
    assert np.array_equal(decode(data), by_pillow(data))


def test_transparency_is_laid_over_white():
    pixels = np.full((2, 3, 4), (200, 0, 100, 255), dtype=np.uint8)
    pixels[0, 0, 3], pixels[0, 1, 3] = 0, 51  # 51/255 = one fifth
    image = decode(encode(Image.fromarray(pixels), "PNG"))
    assert image[0, 0].tolist() == [255, 255, 255]
    assert image[0, 1].tolist() == [244, 204, 224]
    assert image[1, 2].tolist() == [200, 0, 100]
    assert decode(encode(Image.fromarray(pixels[..., 2:]), "PNG"))[0, 1].tolist() == [224] * 3


@pytest.mark.parametrize(
    ("kind", "shape"), [("JPEG", (33, 50, 3)), ("PNG", (33, 50, 3)), ("TIFF", (50, 33, 3))]
)
def test_orientation_is_treated_as_pillow_does(picture, kind, shape):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(picture, kind, exif=exif)
    assert decode(data).shape == shape
    for image in (picture, picture.crop((0, 0, 33, 33))):
        data = encode(image, kind, exif=exif)
        assert np.array_equal(decode(data), by_pillow(data))


def test_a_cut_file_is_refused_or_whole(picture):
    for kind in ("PNG", "JPEG", "TIFF"):
        data = encode(picture, kind)
        for length in (0, 1, 7, 20, 30, 100, len(data) // 2):
            with refuses(DataError) as caught:
                decode(data[:length])
            assert caught.value.reason in ("empty", "format", "syntax")
    data = encode(picture, "PNG")
    assert np.array_equal(decode(data[:-12]), np.array(picture))  # only the end mark is missing
    assert np.array_equal(decode(data + b"more"), np.array(picture))


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_jpeg_that_decodes_in_part_is_refused(picture, mode, options):
    data = encode(picture.convert(mode), "JPEG", quality=95, **options)
    middle = len(data) * 2 // 3
    for damaged in (
        data[:-2],  # no end mark
        data[:-3] + data[-2:],
        data[:middle] + data[-2:],  # cut before the end mark
        data[:middle] + bytes(len(data) - middle),
        data[:middle] + np.random.default_rng(1).bytes(len(data) - middle - 2) + data[-2:],
    ):
        with refuses(DataError, "decoded"):
            decode(damaged)
    assert np.array_equal(decode(data + b"more"), by_pillow(data))


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
def test_a_png_that_decodes_in_part_is_refused(picture, mode):
    data = encode(picture.convert(mode), "PNG")
    middle = len(data) * 2 // 3
    flipped = bytearray(data)
    flipped[middle] ^= 0x41
    for damaged in (data[:middle] + data[-12:], data[:middle] + bytes(len(data) - middle), bytes(flipped)):
        with refuses(DataError, "decoded"):
            decode(damaged)


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate", "jpeg"])
def test_a_tiff_that_decodes_in_part_is_refused(picture, compression):
    data = encode(picture, "TIFF", compression=compression)
    tags = Image.open(io.BytesIO(data)).tag_v2
    start, n_bytes = tags[273][0], sum(tags[279])
    for damaged in (data[: start + n_bytes // 2], data[:start] + data[start : start + n_bytes // 2]):
        with refuses(DataError) as caught:
            decode(damaged)
        assert caught.value.reason in ("format", "syntax")
    if compression != "raw":
        zeros = data[: start + n_bytes // 2] + bytes(n_bytes - n_bytes // 2) + data[start + n_bytes :]
        with refuses(DataError, "decoded"):
            decode(zeros)


def write_tiff(pixels, **options):
    content = io.BytesIO()
    tifffile.imwrite(content, pixels, photometric="rgb", **options)
    return content.getvalue()


@pytest.mark.parametrize(("bigtiff", "order"), [(False, "<"), (False, ">"), (True, "<")])
def test_tiff_of_both_sizes_and_orders(picture, bigtiff, order):
    pixels = np.array(picture)
    content = write_tiff(pixels, bigtiff=bigtiff, byteorder=order, compression="deflate")
    np.testing.assert_array_equal(decode(content), pixels)
    with pytest.raises(DataError):
        decode(content.replace(content[-40:], bytes(40)))
    with pytest.raises(DataError):
        decode(write_tiff(pixels, bigtiff=bigtiff, byteorder=order)[:-500])


@pytest.mark.parametrize("compression", [None, "deflate"])
def test_tiff_of_signed_numbers_or_many_channels_is_refused(picture, compression):
    pixels = np.array(picture)
    for odd in (pixels.astype(np.int8), np.dstack([pixels, pixels[..., :2]])):
        with pytest.raises(DataError):
            decode(write_tiff(odd, compression=compression))


@pytest.mark.parametrize("n_px", [2000, 8000])
def test_a_header_that_declares_more_pixels_than_there_are_is_refused(picture, n_px):
    png = encode(picture, "PNG")
    jpeg = bytearray(encode(picture, "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    struct.pack_into(">HH", jpeg, frame + 5, n_px, n_px)
    bitmap = bytearray(encode(picture, "BMP"))
    struct.pack_into("<ii", bitmap, 18, n_px, n_px)
    tiff = bytearray(encode(picture, "TIFF"))
    for tag in (256, 257):
        place = tiff.index(struct.pack("<HH", tag, 4)) if struct.pack("<HH", tag, 4) in tiff else None
        place = place if place is not None else tiff.index(struct.pack("<HH", tag, 3))
        struct.pack_into("<HII", tiff, place + 2, 4, 1, n_px)
    for data in (png_header(n_px, n_px) + png[33:], bytes(jpeg), bytes(bitmap), bytes(tiff)):
        assert read_header(data)[:2] == (n_px, n_px)
        with refuses(DataError, "decoded"):
            decode(data)


@pytest.mark.parametrize("kind", ["EPS", "PDF", "GIF", "ICO", "PPM", "TGA", "JPEG2000", "ICNS", "DDS", "PCX"])
def test_content_of_other_formats_is_no_image_whatever_its_name(picture, kind, monkeypatch):
    monkeypatch.setenv("PATH", "")  # were Ghostscript asked for, it would not be found
    try:
        data = encode(picture, kind)
    except (KeyError, OSError):
        pytest.skip(f"this Pillow does not write {kind}")
    with refuses(DataError, "PNG", "JPEG", "TIFF", "BMP", "WebP"):
        decode(data)


def test_an_animation_is_several_pictures_and_a_transparent_colour_becomes_white(picture):
    other = Image.new("RGB", picture.size)
    for kind in ("PNG", "WEBP", "TIFF"):
        with refuses(DataError, "pages", "frames"):
            decode(encode(picture, kind, save_all=True, append_images=[other]))
    pixels = np.zeros((2, 2, 3), np.uint8)
    pixels[0, 0] = 7, 8, 9
    image = decode(encode(Image.fromarray(pixels), "PNG", transparency=(7, 8, 9)))
    assert image[0, 0].tolist() == [255] * 3 and not image[1].any()


def test_a_jpeg_of_very_many_scans_is_refused(picture):
    data = encode(picture, "JPEG", progressive=True)
    start = data.rindex(b"\xff\xda")
    with refuses(DataError, "200 scans", reason="syntax"):
        decode(data[:start] + data[start:-2] * 500 + data[-2:])


def png_header(width, height, depth=8, mode=2):
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, depth, mode, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


def test_a_huge_image_is_refused_before_decoding():
    with refuses(DataError, "100,000 x 100,000", "67,108,864", reason="too-large"):
        decode(png_header(100_000, 100_000) + b"IEND")
    with refuses(DataError, "0 x 5", reason="too-large"):
        read_header(png_header(0, 5))
    bitmap = bytearray(encode(Image.new("RGB", (2, 2)), "BMP"))
    struct.pack_into("<ii", bitmap, 18, 100_000, 100_000)
    with refuses(DataError, "10") as caught:
        decode(bytes(bitmap))
    assert caught.value.reason in ("too-large", "syntax")  # the latter from Pillow's own limit


def sixteen_bit_rgb_png():
    rows = b"".join(b"\0" + bytes(2 * 6) for _ in range(2))
    chunks = png_header(2, 2, depth=16)
    for kind, content in ((b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        chunks += (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )
    return chunks


@pytest.mark.parametrize(
    ("data", "fact", "reason"),
    [
        (b"", "", "empty"),
        (b"hello, I am no image", "PNG, JPEG, TIFF, BMP or WebP", "format"),
        (encode(Image.new("CMYK", (4, 4)), "JPEG"), "CMYK", "colour"),
        (encode(Image.new("CMYK", (4, 4)), "TIFF"), "CMYK", "colour"),
        (encode(Image.new("LAB", (4, 4)), "TIFF"), "LAB", "colour"),
        (encode(Image.new("F", (4, 4)), "TIFF"), "32 bits", "colour"),
        (encode(Image.fromarray(np.ones((4, 4), np.uint16)), "PNG"), "16 bits", "colour"),
        (encode(Image.fromarray(np.ones((4, 4), np.uint16)), "TIFF"), "16 bits", "colour"),
        (sixteen_bit_rgb_png(), "16 bits", "colour"),
        (
            encode(Image.new("RGB", (4, 4)), "TIFF", save_all=True, append_images=[Image.new("RGB", (4, 4))]),
            "",
            "pages",
        ),
    ],
)
def test_images_of_ambiguous_colour_are_refused_in_one_line(data, fact, reason):
    with refuses(DataError, fact, reason=reason):
        decode(data)


@pytest.mark.data
@pytest.mark.parametrize("archive", ["idc/idc_kaggle_subset.zip", "pcam/pcam_train_valid.zip"])
def test_real_patches_equal_pillow(data_dir, archive):
    with zipfile.ZipFile(data_dir / archive) as file:
        for name in file.namelist():
            data = file.read(name)
            assert read_header(data).plain
            assert np.array_equal(decode(data), by_pillow(data)), name
