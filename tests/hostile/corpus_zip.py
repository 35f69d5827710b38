"""Zips and folders of IDC patches of which something is wrong or harmful: `INPUTS` by name.

Each takes an empty folder and returns what `biopsy prepare` is given. Twelve good patches of three patients
lie beside whatever is bad.
"""

import io
import os
import stat
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

INPUTS: dict[str, Callable[[Path], Path]] = {}
ACCEPTED = {
    "backslashes", "decomposed_letters", "duplicate_names", "folders_2000_deep", "junk_beside",
    "latin_1_folder", "below_a_latin_1_folder",
    "nul_free_long_name", "control_characters", "empty_folders_5000", "link_in_a_circle", "zip_in_zip",
}  # fmt: skip


def source(make):
    INPUTS[make.__name__] = make
    return make


def patch(seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (50, 50, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def good():
    """Names and contents of twelve patches."""
    return {
        f"{patient}/{label}/{patient}_idx5_x{50 * n + 1}_y1_class{label}.png": patch(
            100 * patient + 10 * label + n
        )
        for patient in (8863, 8865, 8867)
        for label in (0, 1)
        for n in range(2)
    }


def bad_name(x="5001", y="51", label="0", patient="8863"):
    return f"{patient}/{label}/{patient}_idx5_x{x}_y{y}_class{label}.png"


def write(folder, more=(), **options):
    path = folder / "x.zip"
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in [*good().items(), *more]:
            archive.writestr(name, content)
    return path


def rename(path, old, new):
    """Change a name in a zip, in both places, to one of the same length."""
    data = path.read_bytes()
    assert len(old) == len(new) and data.count(old) == 2
    path.write_bytes(data.replace(old, new))
    return path


def edit(path, offset, form, *values, entries=slice(-1, None)):
    """Change a field of entries in the zip's directory."""
    data = bytearray(path.read_bytes())
    places = [index for index in range(len(data)) if data[index : index + 4] == b"PK\x01\x02"]
    for place in places[entries]:
        struct.pack_into(form, data, place + offset, *values)
    path.write_bytes(data)
    return path


def unpack(folder, more=()):
    for name, content in [*good().items(), *more]:
        path = folder / "x" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder / "x"


def with_odd_name(name, **options):
    """Register a zip with one more file, whose name is special."""

    def make(folder):
        return write(folder, [(name, patch())], **options)

    return make


NAMES = {
    "x_5000_digits": bad_name(x="1" * 5000),
    "x_billion": bad_name(x="5000000001"),
    "x_million": bad_name(x="5000001"),
    "y_million": bad_name(y="5000001"),
    "x_just_beyond": bad_name(x="50001"),
    "x_arabic_digits": bad_name(x="\u0663\u0663"),
    "path_up": "../../" + bad_name(),
    "path_up_backslash": "..\\..\\" + bad_name(),
    "path_absolute": "/tmp/" + bad_name(),
    "path_of_a_drive": "C:/" + bad_name(),
    "path_of_a_share": "\\\\server\\" + bad_name(),
    "contradicting_class": "8863/1/8863_idx5_x5001_y51_class0.png",
    "contradicting_patient": "8865/0/8863_idx5_x5001_y51_class0.png",
    "control_characters": "note\x1b[2J\x07.txt",
    "nul_free_long_name": "n" * 60_000 + ".txt",
    "other_image": "photo.png",
    "folders_2000_deep": "a/" * 2000 + "b.txt",
}
for _name, _entry in NAMES.items():
    INPUTS[_name] = with_odd_name(_entry)


@source
def backslashes(folder):
    path = write(folder)
    for name in good():
        rename(path, name.encode(), name.replace("/", "\\").encode())
    return path


@source
def name_that_is_not_utf8(folder):
    path = write(folder, [(bad_name(patient="88\u00fc"), patch())])
    old, new = "88\u00fc".encode(), b"88\xff\xfe"
    path.write_bytes(path.read_bytes().replace(old, new))
    return path


@source
def decomposed_letters(folder):
    more = [(bad_name(patient="Mu\u0308ller"), patch(1)), (bad_name(x="51", patient="M\u00fcller"), patch(2))]
    return write(folder, more)


@source
def duplicate_names(folder):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return write(folder, [*good().items(), (bad_name(), patch(1))])


@source
def duplicate_names_that_differ(folder):
    return write(folder, [("copy/" + bad_name(), patch(1)), (bad_name(), patch(2))])


@source
def encrypted(folder):
    return edit(write(folder), 8, "<H", 1)


@source
def cut_short(folder):
    path = write(folder)
    path.write_bytes(path.read_bytes()[:-200])
    return path


@source
def half_a_zip(folder):
    path = write(folder)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


@source
def no_files(folder):
    with zipfile.ZipFile(folder / "x.zip", "w") as archive:
        archive.writestr("a/", b"")
    return folder / "x.zip"


@source
def empty_file(folder):
    (folder / "x.zip").write_bytes(b"")
    return folder / "x.zip"


@source
def not_a_zip(folder):
    (folder / "x.zip").write_bytes(os.urandom(5000))
    return folder / "x.zip"


@source
def junk_beside(folder):
    return write(folder, [("__MACOSX/a.png", b"x"), (".DS_Store", b"x"), ("8863/0/Thumbs.db", b"x")])


@source
def bomb_of_zeros(folder):
    return write(folder, [(bad_name(x=str(n + 100)), bytes(2**26)) for n in range(8)], compression=8)


@source
def bomb_of_overlaps(folder):
    path = folder / "x.zip"
    with zipfile.ZipFile(path, "w", compression=8) as archive:
        archive.writestr(bad_name(), bytes(2**28))
    data = path.read_bytes()
    start = data.index(b"PK\x01\x02")
    end = data.index(b"PK\x05\x06")
    entry = data[start:end]
    directory = b"".join(entry.replace(b"_x5001_", b"_x%04d_" % number) for number in range(1000, 4000))
    tail = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 3000, 3000, len(directory), start, 0)
    path.write_bytes(data[:start] + directory + tail)
    return path


@source
def size_that_lies(folder):
    return edit(write(folder, compression=8), 24, "<I", 99)


@source
def size_of_four_gigabytes(folder):
    return edit(write(folder, compression=8), 24, "<I", 2**32 - 2)


@source
def checksum_that_lies(folder):
    return edit(write(folder), 16, "<I", 1)


@source
def offset_beyond_the_end(folder):
    return edit(write(folder), 42, "<I", 2**31)


@source
def method_of_another_kind(folder):
    return edit(write(folder), 10, "<H", 99)


@source
def compressed_by_lzma(folder):
    path = folder / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in good().items():
            archive.writestr(name, content)
        archive.writestr(bad_name(), patch(), compress_type=zipfile.ZIP_LZMA)
    return path


@source
def link_as_an_entry(folder):
    info = zipfile.ZipInfo(bad_name())
    info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    return write(folder, [(info, b"/etc/passwd")])


@source
def zip_in_zip(folder):
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("a.png", patch())
    return write(folder, [("inner.zip", inner.getvalue())])


@source
def empty_folders_5000(folder):
    return write(folder, [(f"f{number}/", b"") for number in range(5000)])


@source
def class_of_5000_digits(folder):
    path = folder / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("1" * 5000, "2" * 5000, "\u0663"):
            archive.writestr(f"{name}/a.png", patch())
            archive.writestr(f"{name}/b.txt", b"")
        archive.writestr("7/bad.png", b"no")
    return path


@source
def below_a_latin_1_folder(folder):
    place = Path(os.fsdecode(os.fsencode(folder) + b"/M\xfcller"))
    place.mkdir()
    return write(place)


@source
def latin_1_folder(folder):
    place = unpack(folder)
    odd = os.fsencode(place) + b"/M\xfcller"
    os.makedirs(odd)
    with open(odd + b"/8863_idx5_x5001_y1_class0.png", "wb") as file:
        file.write(patch())
    return place


@source
def link_in_a_circle(folder):
    place = unpack(folder)
    (place / "8863" / "up").symlink_to(place)
    return place


@source
def link_to_nowhere(folder):
    place = unpack(folder)
    (place / bad_name()).symlink_to(folder / "nowhere")
    return place


@source
def folder_that_cannot_be_read(folder):
    place = unpack(folder)
    (place / bad_name()).mkdir()
    (place / bad_name(x="5051")).write_bytes(b"no")
    return place
