"""A zip and a folder read alike, and every bad one is refused in one line."""

import os
import struct
import zipfile

import pytest

from biopsy.core.errors import ArchiveError, DataError
from biopsy.core.files import write_json
from biopsy.data.archives import FolderArchive, ZipArchive, is_junk, open_archive
from refusals import refuses

FILES = {"b/2.png": b"two" * 100, "a/1.png": b"one", "a/10.png": os.urandom(5000), "notes.txt": b""}
JUNK = {
    ".DS_Store": b"x",
    "desktop.ini": b"x",
    "__MACOSX/a/1.png": b"x",
    "a/Thumbs.db": b"x",
    "a/.hidden/3.png": b"x",
}


def write_zip(path, files, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def write_folder(path, files):
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def refuse(path, *facts):
    with refuses(ArchiveError, path, *facts):
        open_archive(path)


@pytest.fixture(params=["stored", "deflated", "folder"])
def archive(request, tmp_path):
    if request.param == "folder":
        return open_archive(write_folder(tmp_path / "x", FILES | JUNK))
    compression = zipfile.ZIP_STORED if request.param == "stored" else zipfile.ZIP_DEFLATED
    return open_archive(write_zip(tmp_path / "x.zip", FILES | JUNK, compression))


def test_entries_are_in_order_and_without_junk(archive):
    assert [entry.name for entry in archive.entries] == ["a/1.png", "a/10.png", "b/2.png", "notes.txt"]
    for entry in archive.entries:
        assert entry.size == len(FILES[entry.name])
        assert bytes(archive.read(entry)) == FILES[entry.name]


@pytest.mark.parametrize(
    ("name", "junk"),
    [("./a.png", False), ("a/.b/c", True), ("a.b/c", False), ("Thumbs.db", True), ("Thumbs.dbx", False)],
)
def test_hidden_and_system_files_are_ignored(name, junk):
    assert is_junk(name) == junk


def test_same_compares_contents(tmp_path):
    files = {"a.png": b"12", "b.png": b"12", "c.png": b"13"}
    for archive in (
        open_archive(write_zip(tmp_path / "x.zip", files)),
        open_archive(write_folder(tmp_path / "x", files)),
    ):
        a, b, c = archive.entries
        assert archive.same(a, b) and not archive.same(a, c)


def test_a_file_that_comes_in_parts_is_read_whole(tmp_path, monkeypatch):
    archive = open_archive(write_folder(tmp_path / "x", {"a.png": b"0123456789"}))
    monkeypatch.setattr(os, "read", lambda file, n, read=os.read: read(file, min(n, 4)))
    assert archive.read(archive.entries[0]) == b"0123456789"
    (tmp_path / "x" / "a.png").write_bytes(b"0123")
    with refuses(DataError, "10 bytes"):
        archive.read(archive.entries[0])


def test_fingerprint_follows_names_and_contents(tmp_path):
    prints = {
        open_archive(write_zip(tmp_path / f"{index}.zip", files)).fingerprint()
        for index, files in enumerate([{"a": b"1"}, {"a": b"1"}, {"a": b"2"}, {"b": b"1"}])
    }
    assert len(prints) == 3
    folder = open_archive(write_folder(tmp_path / "x", {"a.png": b"1"}))
    before = folder.fingerprint()
    os.utime(tmp_path / "x" / "a.png", ns=(1, 1))
    assert open_archive(tmp_path / "x").fingerprint() != before


def test_which_archive_a_folder_is(tmp_path):
    folder = tmp_path / "x"
    folder.mkdir()
    refuse(folder, "no images", ".h5", ".geojson")
    write_zip(folder / "one.zip", FILES)
    (folder / "readme.txt").write_text("about")
    assert isinstance(open_archive(folder), ZipArchive)
    write_zip(folder / "two.zip", FILES)
    refuse(folder, "2 zips", "one.zip, two.zip")
    write_folder(folder, FILES)
    archive = open_archive(folder)
    assert isinstance(archive, FolderArchive)
    assert archive.unread == ["one.zip", "two.zip"]


def test_links_are_followed_but_not_in_circles(tmp_path):
    folder = write_folder(tmp_path / "x", {"a/1.png": b"one"})
    write_folder(tmp_path / "elsewhere", {"2.png": b"two"})
    (folder / "a" / "up").symlink_to(folder)
    (folder / "b").symlink_to(tmp_path / "elsewhere")
    (folder / "gone.png").symlink_to(tmp_path / "nowhere")
    archive = open_archive(folder)
    assert [entry.name for entry in archive.entries] == ["a/1.png", "b/2.png", "gone.png"]
    with refuses(DataError, "No such file"):
        archive.read(archive.entries[2])


def test_missing_empty_cut_and_other_files_are_refused(tmp_path):
    refuse(tmp_path / "none.zip", "exist")
    path = tmp_path / "x.zip"
    path.write_bytes(b"")
    refuse(path, "0 bytes")
    path.write_bytes(b"Rar!" + bytes(100))
    refuse(path, "zip", "folder")
    write_zip(path, FILES)
    whole = path.read_bytes()
    for length in (10, 100, len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:length])
        refuse(path, "damaged")
    write_zip(path, {".hidden": b""})
    refuse(path, "without files")


@pytest.mark.parametrize(
    "name", ["../a.png", "a/../../b.png", "/etc/a.png", "C:/a.png", "..\\a.png", "a/..", "\\\\server\\a.png"]
)
def test_names_that_lead_out_are_refused(tmp_path, name):
    refuse(write_zip(tmp_path / "x.zip", {"a/1.png": b"1", name: b"2"}), repr(name))


def patch_directory(path, name, offset, value):
    """Overwrite a 16-bit field of an entry's header in the zip's directory and nothing else."""
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\x01\x02", 0, data.rindex(name.encode()))
    struct.pack_into("<H", data, at + offset, value)
    path.write_bytes(data)


def test_an_encrypted_zip_is_refused(tmp_path):
    path = write_zip(tmp_path / "x.zip", FILES)
    patch_directory(path, "b/2.png", 8, 1)  # general purpose flags
    refuse(path, "encrypted", "1 of 4 files")


def test_a_damaged_entry_is_named_when_it_is_read(tmp_path):
    path = write_zip(tmp_path / "x.zip", FILES)
    data = bytearray(path.read_bytes())
    data[data.index(FILES["a/10.png"][:50]) + 99] ^= 1
    path.write_bytes(data)
    archive = open_archive(path)
    bad = archive.entries[1]
    with refuses(DataError, "checksum"):
        archive.read(bad)
    assert bytes(archive.read(archive.entries[0])) == b"one"
    with refuses(DataError, "directory"):
        archive.read(bad._replace(offset=bad.offset + 1))
    with refuses(DataError, "end"):
        archive.read(bad._replace(offset=2**40))
    with refuses(DataError, "1,073,741,824", "536,870,912"):
        archive.read(bad._replace(size=2**30))
    with refuses(DataError, "method 12"):
        archive.read(bad._replace(method=12))


def test_an_entry_that_unpacks_to_more_than_its_stated_size_is_stopped(tmp_path):
    archive = open_archive(write_zip(tmp_path / "x.zip", {"bomb.png": bytes(10**6)}, zipfile.ZIP_DEFLATED))
    entry = archive.entries[0]
    with refuses(DataError, "1,000 bytes"):
        archive.read(entry._replace(size=1000))
    data = bytearray(archive.path.read_bytes())
    data[data.index(b"bomb.png") + len("bomb.png")] = 0xFF  # no such block type
    archive.path.write_bytes(data)
    with refuses(DataError, "inflated"):
        open_archive(archive.path).read(entry)


def test_a_folder_that_changes_while_it_is_read(tmp_path):
    archive = open_archive(write_folder(tmp_path / "x", FILES))
    (tmp_path / "x/a/1.png").unlink()
    with refuses(DataError, "No such file"):
        archive.read(archive.entries[0])


def raw_zip(path, names, *, flags=0):
    """Write a zip whose names are these bytes; `zipfile` would spell them its own way."""
    body, directory = b"", b""
    for name in names:
        head = struct.pack("<HHHHHIIIHH", 20, flags, 0, 0, 33, 0, 1, 1, len(name), 0)
        directory += (
            b"PK\x01\x02" + struct.pack("<H", 20) + head + struct.pack("<HHHII", 0, 0, 0, 0, len(body))
        )
        directory += name
        body += b"PK\x03\x04" + head + name + b"x"
    end = struct.pack("<HHHHIIH", 0, 0, len(names), len(names), len(directory), len(body), 0)
    path.write_bytes(body + directory + b"PK\x05\x06" + end)
    return path


@pytest.mark.parametrize(
    ("written", "flags", "name"),
    [
        (b"data\\benign\\1.png", 0, "data/benign/1.png"),
        ("M\u00fcller\u00a0/ 1.png".encode(), 0x800, "M\u00fcller/1.png"),
        ("Mu\u0308ller/1.png".encode(), 0x800, "M\u00fcller/1.png"),
        (b"a/1\x1b[31m.png", 0, "a/1%1B[31m.png"),
    ],
)
def test_names_have_one_spelling(tmp_path, written, flags, name):
    assert [
        entry.name for entry in open_archive(raw_zip(tmp_path / "x.zip", [written], flags=flags)).entries
    ] == [name]


def test_folders_of_a_zip_made_on_windows_are_no_files(tmp_path):
    archive = open_archive(raw_zip(tmp_path / "x.zip", [b"data\\", b"data\\a\\", b"data\\a\\1.png"]))
    assert [entry.name for entry in archive.entries] == ["data/a/1.png"]


def test_a_name_that_is_not_utf8_in_a_folder_is_escaped_and_read(tmp_path):
    folder = tmp_path / "x"
    folder.mkdir()
    for name, content in ((b"M\xfcller.png", b"one"), ("Mu\u0308ller.png".encode(), b"two")):
        with open(os.fsencode(folder) + b"/" + name, "wb") as file:
            file.write(content)
    archive = open_archive(folder)
    contents = {entry.name: archive.read(entry) for entry in archive.entries}
    assert contents == {"M%FCller.png": b"one", "M\u00fcller.png": b"two"}
    assert archive.fingerprint()


def test_a_name_that_is_not_the_utf8_that_it_is_declared_to_be_is_refused(tmp_path):
    refuse(raw_zip(tmp_path / "x.zip", [b"a/\xff\xfe.png"], flags=0x800), "UTF-8")


def test_entries_that_share_their_bytes_are_refused(tmp_path):
    path = write_zip(tmp_path / "x.zip", {f"{name}.png": os.urandom(300) for name in "abc"})
    data = bytearray(path.read_bytes())
    places = [index for index in range(len(data)) if data[index : index + 4] == b"PK\x01\x02"]
    for place in places:
        struct.pack_into("<I", data, place + 42, 0)  # every entry lies where the first does
    path.write_bytes(data)
    refuse(path, "same bytes")
    data[places[1] + 42 : places[1] + 46] = struct.pack("<I", 40)  # inside the first
    path.write_bytes(data)
    refuse(path, "same bytes")


@pytest.mark.parametrize("n_bytes", [2**24, 2**24 + 1])
def test_an_entry_that_unpacks_to_very_much_more_is_not_read(tmp_path, n_bytes):
    path = write_zip(tmp_path / "x.zip", {"a.png": bytes(n_bytes)}, zipfile.ZIP_DEFLATED)
    archive = open_archive(path)
    if n_bytes == 2**24:
        assert len(archive.read(archive.entries[0])) == n_bytes
    else:
        with refuses(DataError, f"{n_bytes:,}"):
            archive.read(archive.entries[0])


@pytest.mark.parametrize(
    ("document", "output"),
    [("run", "a run"), ("study", "a study"), ("classifier", "a classifier"), ("explain", "explanations")],
)
def test_pictures_of_outputs_are_no_patches(tmp_path, document, output):
    write_folder(tmp_path / "out", FILES)
    write_json(tmp_path / "out" / f"{document}.json", {"format": f"biopsy-{document}/1"})
    refuse(tmp_path / "out", output)
    refuse(tmp_path, output, "no images", tmp_path / "out")  # a folder of outputs only
    write_folder(tmp_path / "patches", FILES)
    assert [entry.name for entry in open_archive(tmp_path).images] == [
        f"patches/{name}" for name in ("a/1.png", "a/10.png", "b/2.png")
    ]


def test_a_users_document_of_the_same_name_marks_no_output(tmp_path):
    write_folder(tmp_path, FILES)
    for text in ("{}", "[]", '{"format": 1}', "not JSON"):
        (tmp_path / "run.json").write_text(text)
        assert len(open_archive(tmp_path).images) == 3


def test_figures_of_a_run_are_no_patches(tmp_path):
    write_json(tmp_path / "run.json", {"format": "biopsy-run/1"})
    refuse(write_folder(tmp_path / "figures", FILES), "run", tmp_path.name)
