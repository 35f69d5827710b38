"""Slides and lists of slides that people or programs got wrong, or that were made to do harm.

`INPUTS` names each, with a function that puts it into a folder and returns what ``biopsy slide`` is to map.
"""

import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tifffile

INPUTS: dict[str, Callable[[Path], list[Path]]] = {}


def draw(height=600, width=800, seed=0):
    """Return a white slide with a block of tissue."""
    image = np.full((height, width, 3), 244, np.uint8)
    tissue = np.array([190, 110, 170]) + np.random.default_rng(seed).integers(-30, 30, (height, width, 1))
    rows, columns = slice(height // 6, -(height // 6) or None), slice(width // 6, -(width // 6) or None)
    image[rows, columns] = np.clip(tissue, 0, 255)[rows, columns]
    return image


def write(path, image=None, **options):
    """Write a tiled TIFF at 4 um/px."""
    plain = {"tile": (256, 256), "photometric": "rgb", "compression": "deflate", "metadata": None}
    plain |= {"resolution": (2500, 2500), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, draw() if image is None else image, **plain | options)


def tags(path, *entries, data=b""):
    """Write a little-endian TIFF of one page with these ``(tag, type, count, value)``, whatever they say."""
    rows = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    page = struct.pack("<H", len(entries)) + rows + struct.pack("<I", 0)
    path.write_bytes(b"II*\0" + struct.pack("<I", 8) + page + data)


def lying(width, height, tile, n_tiles=1):
    """Return the tags of a tiled RGB page of any size, whose tiles all are the file's first bytes."""
    shape = [(256, 4, 1, width), (257, 4, 1, height), (322, 4, 1, tile), (323, 4, 1, tile)]
    kind = [(258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 2), (277, 3, 1, 3), (284, 3, 1, 1)]
    return [*shape, *kind, (324, 4, n_tiles, 8), (325, 4, n_tiles, 8)]


def one(name, suffix=".tif"):
    """Register what writes one slide beside a good one."""

    def register(make):
        def put(folder):
            make(folder / f"odd{suffix}")
            write(folder / "good.tif")
            return [folder]

        INPUTS[name] = put
        return make

    return register


def listed(name, text):
    """Register a csv that lists slides."""

    def put(folder):
        write(folder / "good.tif")
        content = text if isinstance(text, bytes) else text.encode()
        (folder / "list.csv").write_bytes(content)
        return [folder / "list.csv"]

    INPUTS[f"list_{name}"] = put


def sparse(path, side):
    """Write a square of tissue without smaller levels, every tile the same one."""
    import imagecodecs

    tile = np.full((2048, 2048, 3), (230, 110, 200), np.uint8)
    data = imagecodecs.zlib_encode(tile.tobytes(), 9)
    n_across = -(-side // 2048)
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        file.write(
            (data for _ in range(n_across**2)),
            shape=(side, side, 3),
            dtype="uint8",
            tile=(2048, 2048),
            photometric="rgb",
            compression="deflate",
            resolution=(2500, 2500),
            resolutionunit="CENTIMETER",
            metadata=None,
        )


def _pages(path, pages, **options):
    with tifffile.TiffWriter(path) as file:
        for page in pages:
            file.write(page, tile=(256, 256), metadata=None, **options)


def _damage(path):
    write(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 3 : len(content) // 3 + 2000] = b"\xa5" * 2000
    path.write_bytes(content)


def _cut(path):
    write(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _loop_of_pages(path):
    tags(path, *lying(600, 600, 256))
    content = bytearray(path.read_bytes())
    content[-4:] = struct.pack("<I", 8)
    path.write_bytes(content)


grey = draw()[..., 1]
for _name, _make in {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "folder": lambda path: (path.mkdir(), write(path / "inside.tif")),
    "link_to_nowhere": lambda path: path.symlink_to("nowhere"),
    "link_to_itself": lambda path: path.symlink_to(path.name),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no slide"),
    "cut_short": _cut,
    "damaged": _damage,
    "square_200000": lambda path: sparse(path, 200_000),
    "header_4_billion": lambda path: tags(path, *lying(2**32 - 1, 2**32 - 1, 256)),
    "header_2_million": lambda path: tags(path, *lying(2_000_000, 2_000_000, 512)),
    "tile_1_million": lambda path: tags(path, *lying(1_000_000, 1_000_000, 2**20)),
    "tile_of_nothing": lambda path: tags(path, *lying(600, 600, 0)),
    "size_of_nothing": lambda path: tags(path, *lying(0, 600, 256)),
    "tiles_missing": lambda path: tags(path, *lying(60_000, 60_000, 256, n_tiles=2**30)),
    "loop_of_pages": _loop_of_pages,
    "tags_beyond_the_end": lambda path: path.write_bytes(b"II*\0" + struct.pack("<I", 2**31) + b"\0" * 64),
    "bits_16": lambda path: write(path, draw().astype(np.uint16) * 128),
    "bits_12": lambda path: write(path, draw().astype(np.uint16) * 16),
    "floats": lambda path: write(path, draw().astype(np.float32)),
    "cmyk": lambda path: write(path, np.dstack([draw(), grey]), photometric="separated"),
    "five_channels": lambda path: write(path, np.dstack([draw(), grey, grey]), extrasamples=[0, 0]),
    "channel_pages": lambda path: _pages(path, [grey] * 3, photometric="minisblack"),
    "focal_planes": lambda path: _pages(path, [draw()] * 5, photometric="rgb"),
    "strips_16_bits": lambda path: write(path, draw().astype(np.uint16) * 128, tile=None),
    "one_pixel": lambda path: write(path, draw(1, 1), tile=(16, 16)),
    "one_row": lambda path: write(path, np.full((1, 100_000, 3), 100, np.uint8), tile=(16, 256)),
    "no_tissue": lambda path: write(path, np.full((600, 800, 3), 250, np.uint8)),
    "noise": lambda path: write(path, np.random.default_rng(0).integers(0, 256, (600, 800, 3), np.uint8)),
    "mpp_of_nothing": lambda path: write(path, resolution=(0, 0)),
    "mpp_of_a_screen": lambda path: write(path, resolution=(72, 72), resolutionunit="INCH"),
}.items():  # fmt: skip
    one(_name)(_make)

for _name, _suffix in {
    "svs": ".svs",
    "mrxs": ".mrxs",
    "ndpi": ".ndpi",
    "dicom": ".dcm",
    "czi": ".czi",
}.items():
    one(f"junk_{_name}", _suffix)(lambda path: path.write_bytes(bytes(range(256)) * 40))
one("png_lies", ".png")(
    lambda path: path.write_bytes(
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">IIBBBBB", 10**6, 10**6, 8, 2, 0, 0, 0) + b"\0" * 99
    )
)

listed("nul", b"slide\nodd\0.tif\ngood.tif\n")
listed("latin_1", b"slide\nM\xfcller.tif\ngood.tif\n")
listed("columns_million", "slide," + ",".join(map(str, range(1_000_000))) + "\ngood.tif\n")
listed("itself", "slide\nlist.csv\n")
listed("address", "slide\nhttp://127.0.0.1:9/x.svs\ngood.tif\n")
listed("mpp_not_a_number", "slide,mpp\ngood.tif,nan\n")
listed("mpp_infinite", "slide,mpp\ngood.tif,1e400\n")
listed("outside", "slide\n../../../../etc/passwd\ngood.tif\n")
listed("long_name", "slide\n" + "n" * 5000 + ".tif\ngood.tif\n")
listed("twice", "slide,slide\ngood.tif,good.tif\n")
listed("nothing", "")
listed("blank", "slide,mpp\n,\n,\n")


def _names(folder):
    for name in (
        b"s" * 243 + b".tif",
        b"\xfc.tif",
        b"a\nb.tif",
        b"=1+1.tif",
        b"..tif",
        b"status.csv.tif",
        b"x.tif",
    ):
        write(folder / os.fsdecode(name))
    write(folder / "x.tiff")
    return [folder]


def _path_too_long(folder):
    write(folder / "good.tif")
    return [folder / ("n" * 300), folder]


INPUTS |= {"names": _names, "path_too_long": _path_too_long}
