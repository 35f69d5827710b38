"""Slides and annotations that are wrong or harmful: an error in one line, or named and left out, soon."""

import corpus_annotations
import corpus_slides
import pytest
from command import check, run

from slide_maps import save_classifier

pytestmark = pytest.mark.slow
ACCEPTED = {  # odd, but with one right reading
    "geojson_4d", "geojson_mixed_dimensions", "geojson_no_rings",
    "geojson_hole_outside", "geojson_strips_2000",
    "folder", "noise", "list_long_name", "names", "list_latin_1",
}  # fmt: skip


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return save_classifier(tmp_path_factory.mktemp("models") / "c", mpp=4.0)


@pytest.mark.parametrize("name", corpus_slides.INPUTS)
def test_slides(name, classifier, tmp_path):
    folder = tmp_path / "slides"
    folder.mkdir()
    paths = corpus_slides.INPUTS[name](folder)
    before = {path: path.lstat().st_mtime_ns for path in folder.iterdir()}
    code, *rest = run("slide", classifier, *paths, "--out", tmp_path / "out", "--device", "cpu")
    check(code, *rest, accepted=name in ACCEPTED)
    assert {path: path.lstat().st_mtime_ns for path in folder.iterdir()} == before
    if (folder / "good.tif").exists() and code == 3:
        assert (tmp_path / "out" / "good" / "summary.json").exists()


@pytest.mark.parametrize("name", corpus_annotations.INPUTS)
def test_annotations(name, tmp_path):
    folder = tmp_path / "slides"
    folder.mkdir()
    corpus_slides.write(folder / "case.tif", corpus_slides.draw(1200, 1500))
    more = corpus_annotations.INPUTS[name](folder)
    rules = ["--mpp", "4", "--patch-px", "50", "--classes", "tumour=Tumor", "--rest", "normal"]
    code, *rest = run("prepare", folder, "--out", tmp_path / "pack", *rules, *more)
    check(code, *rest, accepted=name in ACCEPTED)
    assert code == 0 or not (tmp_path / "pack").exists()
