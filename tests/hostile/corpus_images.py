"""Image files that lie, are damaged, are something else, or were made to do harm: `INPUTS` by name."""

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image

INPUTS: dict[str, Callable[[], bytes]] = {}
ACCEPTED = {
    "png_palette_alpha",
    "jpeg_trailing_bytes",
    "png_long_text",
    "bmp_negative_height",
    "tiff_page_after_itself",
}
SIDE = 50


def image(make):
    INPUTS[make.__name__] = make
    return make


def picture(seed=0, side=SIDE):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def encode(kind, source=None, **options):
    buffer = io.BytesIO()
    (source or picture()).save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(*chunks, width=SIDE, height=SIDE, depth=8, mode=2):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, mode, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")


def pixels(side=SIDE):
    return chunk(b"IDAT", zlib.compress(bytes((3 * side + 1) * side)))


def tiff(tags, data=b"", next_page=0):
    """Write a little-endian TIFF of one page; a tag's value is a number."""
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return struct.pack("<4sIH", b"II*\0", 8, len(tags)) + entries + struct.pack("<I", next_page) + data


def plain_tags(width, height, **more):
    start = 8 + 2 + 12 * (10 + len(more)) + 4
    tags = {
        256: width,
        257: height,
        258: 8,
        259: 1,
        262: 2,
        273: start,
        277: 3,
        278: height,
        279: 3 * width * height,
    }
    return tags | {284: 1} | {int(tag[1:]): value for tag, value in more.items()}


def lie(data, offset, form, *values):
    changed = bytearray(data)
    struct.pack_into(form, changed, offset, *values)
    return bytes(changed)


@image
def empty():
    return b""


@image
def text():
    return b"I am no image" * 99


@image
def postscript():
    canary = b"(CANARY) (w) file closefile"
    return (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n%%EndComments\n"
        + canary
        + b"\nshowpage\n%%EOF\n"
    )


@image
def postscript_for_ever():
    return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n%%EndComments\n{} loop\n%%EOF\n"


@image
def pdf():
    return encode("PDF")


@image
def gif():
    return encode("GIF")


@image
def icon():
    return encode("ICO")


@image
def jpeg_2000():
    return encode("JPEG2000")


@image
def svg():
    return b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'


@image
def png_lying_2000():
    return png(pixels(), width=2000, height=2000)


@image
def png_lying_8000():
    return png(pixels(), width=8000, height=8000)


@image
def png_lying_two_thousand_million():
    return png(pixels(), width=2**31 - 1, height=2**31 - 1)


@image
def png_no_pixels():
    return png()


@image
def png_zero_wide():
    return png(pixels(), width=0)


@image
def png_16_bit():
    return encode("PNG", Image.fromarray(np.ones((SIDE, SIDE), np.uint16)))


@image
def png_cut():
    return encode("PNG")[:4000]


@image
def png_cut_and_ended():
    return encode("PNG")[:4000] + chunk(b"IEND", b"")


@image
def png_zeros_at_the_end():
    return encode("PNG")[:4000] + bytes(3500)


@image
def png_flipped():
    return lie(encode("PNG"), 3000, "B", 7)


@image
def png_grey_zeros_at_the_end():
    data = encode("PNG", picture().convert("L"))
    return data[:1500] + bytes(len(data) - 1500)


@image
def png_animated():
    return encode("PNG", save_all=True, append_images=[picture(1)])


@image
def png_blank_8000():
    return png(pixels(8000), width=8000, height=8000)


@image
def png_blank_900():
    return png(pixels(900), width=900, height=900)


@image
def png_text_bomb():
    return png(chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**27))), pixels(), mode=0)


@image
def png_profile_bomb():
    return png(chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2**27))), chunk(b"tRNS", b"\0" * 6), pixels())[
        :-12
    ]


@image
def png_long_text():
    return png(chunk(b"tEXt", b"a\0" + b"x" * 10**6), pixels())


@image
def png_palette_alpha():
    return encode("PNG", picture().quantize(8), transparency=3)


@image
def jpeg_lying_8000():
    data = encode("JPEG")
    return lie(data, data.index(b"\xff\xc0") + 5, ">HH", 8000, 8000)


@image
def jpeg_lying_65535():
    data = encode("JPEG")
    return lie(data, data.index(b"\xff\xc0") + 5, ">HH", 65535, 65535)


@image
def jpeg_cut():
    return encode("JPEG", quality=95)[:3000]


@image
def jpeg_cut_and_ended():
    return encode("JPEG", quality=95)[:3000] + b"\xff\xd9"


@image
def jpeg_progressive_cut_and_ended():
    return encode("JPEG", quality=95, progressive=True)[:3000] + b"\xff\xd9"


@image
def jpeg_without_its_end():
    return encode("JPEG")[:-2]


@image
def jpeg_garbage_scan():
    data = encode("JPEG", quality=95)
    return data[:1000] + np.random.default_rng(0).bytes(len(data) - 1002) + data[-2:]


@image
def jpeg_no_scan():
    data = encode("JPEG")
    return data[: data.index(b"\xff\xda")] + b"\xff\xd9"


@image
def jpeg_cmyk():
    return encode("JPEG", picture().convert("CMYK"))


@image
def jpeg_scans_5000():
    data = encode("JPEG", progressive=True)
    start = data.rindex(b"\xff\xda")
    return data[:start] + data[start:-2] * 5000 + data[-2:]


@image
def jpeg_trailing_bytes():
    return encode("JPEG") + b"more"


@image
def bmp_lying_8000():
    return lie(encode("BMP"), 18, "<ii", 8000, 8000)


@image
def bmp_negative_height():
    return lie(encode("BMP"), 22, "<i", -SIDE)


@image
def bmp_cut():
    return encode("BMP")[:2000]


@image
def tiff_lying_8000():
    return tiff(plain_tags(8000, 8000), bytes(300))


@image
def tiff_strip_outside():
    return tiff(plain_tags(SIDE, SIDE) | {273: 2**31}, bytes(3 * SIDE**2))


@image
def tiff_cut():
    return tiff(plain_tags(SIDE, SIDE), bytes(3 * SIDE**2))[:3000]


@image
def tiff_page_after_itself():
    return tiff(plain_tags(SIDE, SIDE), bytes(3 * SIDE**2), next_page=8)


@image
def tiff_tile_of_a_million():
    tags = plain_tags(SIDE, SIDE) | {259: 8, 322: 10**6, 323: 10**6, 324: 200, 325: 100}
    return tiff({tag: value for tag, value in tags.items() if tag not in (273, 278, 279)}, bytes(300))


@image
def tiff_tags_65535():
    return struct.pack("<4sIH", b"II*\0", 8, 65535) + bytes(200)


@image
def tiff_count_of_four_thousand_million():
    return struct.pack("<4sIH", b"II*\0", 8, 1) + struct.pack("<HHII", 273, 4, 2**32 - 1, 8) + bytes(40)


@image
def tiff_deflate_damaged():
    data = encode("TIFF", compression="tiff_adobe_deflate")
    return data[:4000] + bytes(200) + data[4200:]


@image
def tiff_jpeg_cut():
    data = encode("TIFF", compression="jpeg")
    tags = Image.open(io.BytesIO(data)).tag_v2
    start, n_bytes = tags[273][0], tags[279][0]
    return data[: start + n_bytes // 2] + bytes(n_bytes - n_bytes // 2) + data[start + n_bytes :]


@image
def tiff_16_bit():
    return encode("TIFF", Image.fromarray(np.ones((SIDE, SIDE), np.uint16)))


@image
def tiff_float():
    return encode("TIFF", Image.fromarray(np.ones((SIDE, SIDE), np.float32)))


@image
def tiff_cmyk():
    return encode("TIFF", picture().convert("CMYK"))


@image
def tiff_a_channel_a_page():
    red, green, blue = picture().split()
    return encode("TIFF", red, save_all=True, append_images=[green, blue])


@image
def tiff_focal_planes():
    return encode("TIFF", save_all=True, append_images=[picture(n) for n in range(1, 5)])


@image
def webp_animated():
    return encode("WEBP", save_all=True, append_images=[picture(1)])


@image
def webp_cut():
    return encode("WEBP", lossless=True)[:3000]
