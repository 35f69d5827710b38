"""What is named as slides: the endings that count are the same for maps and for packs."""

import os
from pathlib import Path

import pytest

from biopsy.core.errors import DataError, FileFormatError
from biopsy.data.archives import open_archive
from biopsy.data.datasets import annotated_slides
from biopsy.slide_io.backends import SLIDE_SUFFIXES
from biopsy.slides.sources import list_sources, refuse_own_data
from conftest import draw_slide
from dicom_files import write_dicom
from refusals import refuses


@pytest.mark.parametrize("suffix", SLIDE_SUFFIXES)
def test_a_slide_to_be_mapped_is_one_to_be_cut(tmp_path, suffix):
    (tmp_path / f"case{suffix.upper()}").touch()
    (tmp_path / "case.geojson").touch()
    (tmp_path / "notes.txt").touch()
    assert [source.name for source in list_sources([tmp_path], None)] == ["case"]
    assert annotated_slides.recognise(open_archive(tmp_path))


def test_a_folder_without_slides_is_refused_with_what_is_looked_for(tmp_path):
    (tmp_path / "notes.txt").touch()
    with refuses(DataError, ".png", ".svs", ".czi"):
        list_sources([tmp_path], None)


def test_a_dicom_series_is_one_slide(tmp_path):
    folder = write_dicom(tmp_path / "series", draw_slide(120, 80, seed=0), mpp=1.0).parent
    (folder / "broken.dcm").write_bytes(b"no DICOM")
    assert len(list(folder.glob("level-*.dcm"))) == 2
    assert [source.path.name for source in list_sources([folder], None)] == ["broken.dcm", "level-0.dcm"]


def names_of(*paths):
    return [source.name for source in list_sources(list(paths), None)]


def touch(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


def test_slides_of_one_name_are_distinguished_and_one_named_twice_is_listed_once(tmp_path):
    one, two = touch(tmp_path / "one", "x.tif"), touch(tmp_path / "two", "x.tif")
    assert names_of(one, two) == ["one_x", "two_x"]
    assert names_of(one, one / "x.tif", one) == ["x"]
    three = touch(tmp_path / "three", "x.tif", "x.tiff", "X.svs", "y.tif")
    assert names_of(three) == ["X_svs", "x_tif", "x_tiff", "y"]
    assert names_of(one, three) == ["x_tif", "X_svs", "three_x_tif", "x_tiff", "y"]
    (tmp_path / "twice.csv").write_text("slide,mpp\none/x.tif,0.5\none/x.tif,0.25\none/x.tif,0.25\n")
    twice = list_sources([tmp_path / "twice.csv"], None)
    assert [(source.name, source.mpp) for source in twice] == [("x_tif", 0.5), ("one_x_tif", 0.25)]


def test_slides_in_folders_of_a_folder_are_named(tmp_path, caplog):
    (tmp_path / "case.svs").touch()
    for name in ("empty", "maps"):
        (tmp_path / name).mkdir()
    for file in ("map.parquet", "heatmap.tiff"):
        (tmp_path / "maps" / file).touch()
    list_sources([tmp_path], None)
    assert not caplog.text
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "case.svs").touch()
    assert len(list_sources([tmp_path], None)) == 1 and "second" in caplog.text


def test_a_folder_takes_a_name_of_any_length_and_spelling(tmp_path):
    long, odd = "s" * 240, os.fsdecode(b"M\xfcller")
    folder = touch(tmp_path / "a", f"{long}.tif", f"{long}t.tif", f"{odd}.tif", " .tif", "status.csv.tif")
    names = names_of(folder)
    assert len(set(names)) == 5 and "M%FCller" in names and "slide" in names
    assert all(1 <= len(name.encode()) <= 120 for name in names)
    assert sum(name.startswith("sss") for name in names) == 2 and "status.csv" not in names


@pytest.mark.parametrize(
    "text",
    [
        "slide,mpp\n001.tif ,\n\n,\n",
        "Slide,MPP\r\n001.tif,\r\n , \r\n",
        "\ufeffSLIDE;mpp\n001.tif;\n;\n",
        "slide\tmpp\n\u00a0001.tif\t\n",
        "mpp,slide,notes\n,001.tif,\n",
        "slide\n001.tif",
    ],
    ids=["blank rows", "capitals", "semicolons", "tabs", "order", "one column"],
)
def test_lists_of_slides_are_read_as_spreadsheets_save_them(tmp_path, text):
    (tmp_path / "list.csv").write_text(text, encoding="utf-8", newline="")
    sources = list_sources([tmp_path / "list.csv"], 2.0)
    assert [(s.name, s.path, s.mpp) for s in sources] == [("001", tmp_path / "001.tif", 2.0)]


def test_a_list_may_be_of_another_language_and_system(tmp_path):
    touch(tmp_path / "sub", "a.tif")
    (tmp_path / "list.csv").write_text("slide;mpp\nsub\\a.tif;0,25\n")
    (source,) = list_sources([tmp_path / "list.csv"], None)
    assert source.path == tmp_path / "sub" / "a.tif" and source.mpp == 0.25


def test_missing_files_are_listed_so_that_they_are_reported(tmp_path):
    folder = touch(tmp_path / "a", "a.tif")
    os.mkfifo(folder / "pipe.tif")
    (folder / "gone.svs").symlink_to("nowhere")
    (folder / "loop.svs").symlink_to("loop.svs")
    (folder / "folder.tif").mkdir()
    sources = {source.name: source for source in list_sources([folder], None)}
    assert list(sources) == ["a", "gone", "loop", "pipe"]
    assert len(sources["a"].fingerprint()) == 64
    refuse_own_data(tmp_path / "maps", list(sources.values()))
    for name, reason in (("gone", "missing"), ("loop", "unreadable"), ("pipe", "not-regular")):
        with pytest.raises(FileFormatError) as error:
            sources[name].fingerprint()
        assert error.value.reason == reason
    with refuses(DataError, "n" * 300):
        list_sources([Path("n" * 300)], None)
