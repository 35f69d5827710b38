"""Images, archives and tables that are wrong or harmful: refused in a line, or named and left out, soon."""

import corpus_images
import corpus_tables
import corpus_zip
import pytest
from command import check, run

from biopsy.data.packs import Pack

pytestmark = pytest.mark.slow


@pytest.fixture
def classes(tmp_path):
    """Sixteen good patches in class folders."""
    for seed, key in enumerate(corpus_tables.KEYS):
        path = tmp_path / "x" / f"{key}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(corpus_images.encode("PNG", corpus_images.picture(seed)))
    return tmp_path / "x"


@pytest.mark.parametrize("name", corpus_images.INPUTS)
def test_images(name, classes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (classes / "benign" / "P09_0.png").write_bytes(corpus_images.INPUTS[name]())
    accepted = name in corpus_images.ACCEPTED
    code, *rest = run("prepare", classes, "--out", tmp_path / "pack")
    check(code, *rest, accepted=accepted)
    pack = Pack.open(tmp_path / "pack")
    assert (len(pack), pack.info.patch_px) == (17 if accepted else 16, 50)
    assert [item["source"] for item in pack.info.skipped] == [] if accepted else ["benign/P09_0.png"]
    assert {path.name for path in tmp_path.iterdir()} == {
        "x",
        "pack",
    }  # nothing was executed that wrote a file


@pytest.mark.parametrize("name", corpus_zip.INPUTS)
def test_archives(name, tmp_path):
    source = corpus_zip.INPUTS[name](tmp_path)
    before = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
    more = ["--positive", "7"] if name == "class_of_5000_digits" else []
    code, *rest = run("prepare", source, "--out", tmp_path / "pack", *more)
    check(code, *rest, accepted=name in corpus_zip.ACCEPTED)
    if code != 1:
        pack = Pack.open(tmp_path / "pack")
        assert {"8863", "8865", "8867"} <= set(pack.table["patient_id"].dropna()) or name.startswith("class_")
        assert code == 0 or pack.info.skipped
    after = {path: path.lstat().st_mtime_ns for path in before}
    assert after == before


@pytest.mark.parametrize("name", corpus_tables.INPUTS)
def test_tables(name, classes, tmp_path):
    option, content = corpus_tables.INPUTS[name]
    path = tmp_path / "table.csv"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)
    code, *rest = run("prepare", classes, "--out", tmp_path / "pack", option, path)
    check(code, *rest, accepted=name in corpus_tables.ACCEPTED)
    if name not in corpus_tables.ACCEPTED:
        assert code == 1 and not (tmp_path / "pack").exists()
    elif option == "--patients":
        counts = Pack.open(tmp_path / "pack").info.counts
        assert counts["patients"] == 4


@pytest.mark.parametrize("name", corpus_tables.OTHERS)
def test_patients_that_are_no_file(name, classes, tmp_path):
    code, *rest = run(
        "prepare", classes, "--out", tmp_path / "pack", "--patients", corpus_tables.OTHERS[name]
    )
    check(code, *rest)
    assert code == 1
