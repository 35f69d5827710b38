"""Many slides: what is written, what is kept, what is named, and that an interruption leaves no trace."""

import contextlib
import inspect
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import openslide
import pandas as pd
import pytest
import tifffile

import biopsy
import biopsy.core.files as files
import biopsy.slides.cohorts as cohorts
import biopsy.slides.mapping as mapping
import biopsy.slides.outputs as outputs
from biopsy.cli.console import set_up_log, show
from biopsy.core.errors import DataError, SlideError, UserFileError
from biopsy.core.files import LOCK, MANIFEST, sha256_file, write_json
from biopsy.slide_io.annotations import read_annotations
from biopsy.slide_io.reader import open_slide
from biopsy.slides.cohorts import SlideCohort, slide
from biopsy.slides.maps import SlideMap
from biopsy.slides.section import describe_maps
from biopsy.slides.sources import list_sources
from command_line import call
from conftest import abandon, write_slide
from refusals import refuses
from slide_maps import make_classifier, save_classifier

FILES = {"heatmap.tiff", "map.parquet", "overlay.png", "regions.geojson", "summary.json", "tissue.jpg"}


def contents(folder):
    """Return every file under a folder; the lock says nothing."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != LOCK)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_one_slide_gives_its_map(make_slide):
    slide_map = slide(make_classifier(), make_slide())
    assert isinstance(slide_map, SlideMap) and slide_map.name == "slide"
    assert len(slide_map) > 100 and slide_map.picture is not None
    assert slide_map.probs.sum(axis=1) == pytest.approx(1, abs=1e-6)


@pytest.fixture(scope="module")
def mapped(tmp_path_factory):
    """A cohort of one slide, and its folder: change neither."""
    place = tmp_path_factory.mktemp("mapped")
    model, path = save_classifier(place / "classifier"), write_slide(place, "a.tiff")
    return slide(model, [path], out=place / "out", stride_um=8, detections=True), place / "out"


def test_everything_is_written(mapped):
    cohort, out = mapped
    assert isinstance(cohort, SlideCohort) and cohort.failed == [] and len(cohort) == 1
    assert {path.name for path in (out / "a").iterdir()} == FILES | {"detections.geojson", MANIFEST}
    (slide_map,) = cohort
    summary = json.loads((out / "a" / "summary.json").read_text())
    assert summary["format"] == "biopsy-slide/1" and summary["n_patches"] == len(slide_map)
    assert summary["mpp"] | {"objective": None} == {
        "slide": 0.5,
        "source": "slide",
        "classifier": 1.0,
        "level": 1,
        "downsample": 1.0,
        "objective": None,
    }
    assert summary["classifier"]["sha256"] == biopsy.Classifier.load(out.parent / "classifier").sha256
    assert summary["command"].startswith(
        "biopsy slide classifier a.tiff --out DIR --stride-um 8 --detections"
    )
    assert 0.4 < summary["tissue_share"] < 0.6  # an ellipse over four fifths of both sides: .50
    areas = sum(entry["area_mm2"] for entry in summary["classes"].values())
    assert areas == pytest.approx(summary["mapped_mm2"])
    assert areas == pytest.approx(summary["tissue_mm2"], rel=0.15)
    assert read_annotations(out / "a" / "regions.geojson").items
    row = pd.read_csv(out / "status.csv").iloc[0]
    assert (row["slide"], row["status"], row["n_patches"]) == ("a", "done", len(slide_map))


def test_a_slide_unlike_training_is_named_with_where_to_look(mapped):
    cohort, out = mapped
    same, other = (
        replace(
            cohort, status=cohort.status.assign(out_of_distribution=share, out_of_distribution_quantile=0.95)
        )
        for share in (0.1, 0.5)
    )
    assert same.problems() == []
    assert other.blocks()[0].rows[0][-1].startswith(f"{same.blocks()[0].rows[0][-1]} (not")
    warning, advice = other.problems()
    assert warning.startswith("a: 50%")
    summary = json.loads((out / "a" / "summary.json").read_text())
    assert summary["warning"] is None  # its classifier cannot tell
    assert replace(cohort, status=cohort.status.assign(out_of_distribution=np.nan)).problems() == []
    assert {f"`biopsy view {out}`", "`biopsy prepare`", "`biopsy train`"} <= set(re.findall("`.*?`", advice))


def test_its_area_follows_the_warning_and_is_marked_there_and_in_the_report(mapped):
    cohort, out = mapped
    status = cohort.status.assign(out_of_distribution=0.5, out_of_distribution_quantile=0.95)
    screen = io.StringIO()
    with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
        set_up_log()
        show(replace(cohort, status=status), as_json=False)
    assert 0 <= screen.getvalue().find("warning: a: 50%") < screen.getvalue().find(outputs.UNRELIABLE)
    for share, is_marked in ((0.1, False), (0.5, True)):
        checked = {"n_checked": 100, "share": share, "quantile": 0.95}
        warning = outputs.warn_of_areas(share, 0.95)
        summary = {**outputs.read_summary(out / "a"), "out_of_distribution": checked, "warning": warning}
        maps = [(summary, b"")]
        facts = SimpleNamespace(positive="tumour", result=lambda *names, maps=maps: maps)
        *_, table = describe_maps(facts).blocks
        assert table.rows[0][3].endswith(outputs.UNRELIABLE) == is_marked


def test_the_heat_map_lies_over_the_slide(mapped):
    _, out = mapped
    with open_slide(out / "a" / "heatmap.tiff") as heatmap, openslide.OpenSlide(out.parent / "a.tiff") as of:
        assert heatmap.width * heatmap.mpp == pytest.approx(of.dimensions[0] * 0.5, rel=0.01)
        assert heatmap.height * heatmap.mpp == pytest.approx(of.dimensions[1] * 0.5, rel=0.01)
        assert len(heatmap.levels) > 1
        pixels = heatmap.read(0, 0, heatmap.width, heatmap.height)
    assert (pixels[0, 0] == 255).all()  # no tissue, no answer
    assert (pixels[heatmap.height // 2, heatmap.width // 2] != 255).any()


@pytest.mark.slow
def test_finished_slides_are_kept_and_changed_questions_asked_again(make_slide, tmp_path):
    model, path, out = save_classifier(tmp_path / "c"), make_slide("a.tiff"), tmp_path / "out"

    def map_again(**options):
        slide(model, [path], out=out, **options)
        return (out / "a" / "summary.json").stat().st_mtime_ns

    first = map_again()
    leftovers = [abandon(out, is_folder=True), abandon(out / "a")]
    assert map_again() == first and not any(path.exists() for path in leftovers)
    strided = map_again(stride_um=8)
    assert strided > first
    make_slide("a.tiff", seed=1)
    other = map_again(stride_um=8)
    assert other > strided
    (out / "a" / "summary.json").unlink()
    assert map_again(stride_um=8) > other


def test_failing_slides_are_named_and_the_others_mapped(make_slide, tmp_path):
    make_slide("a.tiff")
    make_slide("unknown.png")
    (tmp_path / "unknown.png").write_bytes(b"no image at all")
    make_slide("coarse.tiff", mpp=3.0)
    (tmp_path / "notes.txt").write_text("no slide")
    model = save_classifier(tmp_path / "models" / "c")
    result = call("slide", str(model), str(tmp_path), "--out", str(tmp_path / "out"))
    assert result.exit_code == 3, result.output
    assert "2 inputs" in result.stderr and "too coarse" in result.stderr
    status = pd.read_csv(tmp_path / "out" / "status.csv")
    assert dict(zip(status["slide"], status["status"], strict=True)) == {
        "a": "done",
        "coarse": "failed",
        "unknown": "failed",
    }
    assert not (tmp_path / "out" / "coarse").exists()


def test_a_slide_that_changes_while_it_is_mapped_fails_and_the_rest_is_done(
    make_slide, tmp_path, monkeypatch
):
    slides = [make_slide("a.tiff"), make_slide("b.tiff")]
    model, predict = save_classifier(tmp_path / "c"), mapping.predict_slides

    def change_first(sources, *arguments, **options):
        for done in predict(sources, *arguments, **options):
            if done.source.name == "a" and not done.error:
                with slides[0].open("ab") as file:
                    file.write(b"more")
            yield done

    with monkeypatch.context() as patched:
        patched.setattr(mapping, "predict_slides", change_first)
        cohort = slide(model, slides, out=tmp_path / "out")
    assert [Path(row["source"]).name for row in cohort.failed] == ["a.tiff"] and len(cohort) == 2
    assert not (tmp_path / "out" / "a").exists()
    assert not slide(model, slides, out=tmp_path / "out").failed


def test_a_slide_whose_inode_changes_is_the_same_version(tmp_path):
    path, copy = tmp_path / "a.tiff", tmp_path / "copy"
    path.write_bytes(b"II*\0")
    [source] = list_sources([path], None)
    before = source.version()
    shutil.copy2(path, copy)
    copy.replace(path)
    assert source.version() == before
    path.write_bytes(b"II*\0 more")
    assert source.version() not in (before, None)


@pytest.mark.slow
def test_no_slide_ends_a_cohort(make_slide, tmp_path):
    folder = tmp_path / "s"
    folder.mkdir()
    for name in ("a.tiff", "z.tiff", "twin.tiff", "twin.tif", f"{'s' * 243}.tif", os.fsdecode(b"\xfc.tif")):
        shutil.copy(make_slide(), folder / name)
    tifffile.imwrite(folder / "u16.tif", np.zeros((300, 300, 3), np.uint16), tile=(64, 64), photometric="rgb")
    os.mkfifo(folder / "pipe.svs")
    (folder / "gone.svs").symlink_to("nowhere")
    (folder / "shut.tif").write_bytes(b"")
    (tmp_path / "list.csv").write_text("slide\ns/folder\n" + "n" * 300 + ".tif\n")
    (folder / "folder").mkdir()
    model = save_classifier(tmp_path / "c")
    arguments = ["slide", str(model), str(folder), str(tmp_path / "list.csv"), "--out", str(tmp_path / "out")]
    result = call(*arguments)
    assert result.exit_code == 3, result.output
    status = pd.read_csv(tmp_path / "out" / "status.csv").set_index("slide")
    done = set(status.index[status["status"] == "done"])
    assert {"a", "z", "twin_tif", "twin_tiff", "%FC"} < done and len(done) == 6
    reasons = status.loc[status["status"] == "failed", "reason"]
    wanted = {
        "u16": "16 bits",
        "pipe": "pipe, device or socket",
        "gone": "does not exist",
        "shut": "is empty",
        "folder": "is a folder",
    }
    assert all(wanted[name] in reasons[name] for name in wanted) and len(reasons) == 6
    assert status.loc["%FC", "source"].endswith("%FC.tif")
    assert json.loads((tmp_path / "out" / "%FC" / "summary.json").read_text())["source"] == "%FC.tif"


def test_a_place_that_cannot_be_written_is_named(make_slide, tmp_path):
    slides, out = [make_slide("a.tiff"), make_slide("b.tiff")], tmp_path / "out"
    out.mkdir()
    (out / "a").write_text("a file of the user's")
    cohort = slide(make_classifier(), slides, out=out)
    assert cohort.status["status"].tolist() == ["failed", "done"]
    assert (out / "a").read_text() == "a file of the user's"


@pytest.mark.parametrize(
    ("slide_name", "data", "out"),
    [
        ("x.mrxs", "x", "."),  # x/ beside x.mrxs holds its pixels
        ("x.mrxs", "x", "x"),
        ("other.mrxs", "other", "."),  # of a slide that is not mapped
        ("series/x.dcm", "series", "series"),
        ("series/series.dcm", "series", "."),
        ("x/x.tiff", "x", "."),
        ("x", None, "."),
    ],
)
def test_a_slide_is_not_mapped_into_its_own_data(make_slide, tmp_path, monkeypatch, slide_name, data, out):
    monkeypatch.chdir(tmp_path)
    pixels = make_slide("given.tiff").rename(tmp_path.parent / f"{tmp_path.name}.tiff")
    path = tmp_path / slide_name
    path.parent.mkdir(exist_ok=True)
    shutil.copy(pixels, path)
    if data is not None:
        (tmp_path / data).mkdir(exist_ok=True)
        (tmp_path / data / "Data0000.dat").write_bytes(b"pixels")
    asked = tmp_path / "elsewhere" / "other.tiff" if slide_name == "other.mrxs" else path
    asked.parent.mkdir(exist_ok=True)
    shutil.copy(pixels, asked)
    before = contents(tmp_path)
    with pytest.raises(UserFileError) as caught:
        slide(make_classifier(), [asked], out=out)
    assert caught.value.reason == "input" and contents(tmp_path) == before
    if slide_name == "x/x.tiff":  # what is elsewhere is no reason
        assert len(slide(make_classifier(), [asked], out=tmp_path / "maps")) == 1


def test_an_edited_map_stays_and_does_not_stop_the_others(make_slide, tmp_path):
    model, paths = save_classifier(tmp_path / "c"), [make_slide("a.tiff"), make_slide("b.tiff", seed=1)]
    slide(model, paths, out=tmp_path / "out", stride_um=8)
    (tmp_path / "out" / "a" / "regions.geojson").write_text("drawn anew by a pathologist")
    kept = contents(tmp_path / "out" / "a")
    cohort = slide(model, paths, out=tmp_path / "out")
    assert [Path(item["source"]).name for item in cohort.failed] == ["a.tiff"]
    assert contents(tmp_path / "out" / "a") == kept
    assert len(cohort) == 2 and next(iter(cohort)).name == "b"


@pytest.mark.slow
def test_a_csv_states_an_mpp_for_each_slide(tmp_path, make_slide):
    from conftest import draw_slide, encode_png

    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(encode_png(draw_slide()))
    (tmp_path / "slides.csv").write_text("slide,mpp\na.png,0.5\nb.png,\ngone.svs,0.25\n")
    cohort = slide(make_classifier(), [tmp_path / "slides.csv"], out=tmp_path / "out")
    assert [item["reason"][:12] for item in cohort.failed] == ["b.png has no", f"{tmp_path}"[:12]]
    done = cohort.status.iloc[0]
    assert (done["mpp"], done["mpp_source"]) == (0.5, "stated")
    with refuses(SlideError, "b.png", "--mpp"):
        slide(make_classifier(), [tmp_path / "b.png"], out=tmp_path / "out")
    assert slide(make_classifier(), tmp_path / "b.png", mpp=0.5).about["mpp"]["source"] == "stated"


@pytest.mark.parametrize(
    ("text", "facts", "reason"),
    [
        ("name\na\n", ["name", "slide"], "columns"),
        ("slide,mpp\na\0b,1\n", ["NUL"], "encoding"),
        ("slide,mpp\n,\n", ["no slides"], ""),
        ("slide,mpp\n,0.5\n", ["0.5"], ""),
        ("slide,mpp\na,nan\n", ["mpp 'nan'"], ""),
        ("slide,mpp\na,x\n", ["mpp 'x'"], ""),
    ],
)
def test_csv_files_that_say_nothing_are_refused(tmp_path, text, facts, reason):
    (tmp_path / "s.csv").write_text(text)
    with refuses(DataError, "s.csv", *facts, reason=reason):
        slide(make_classifier(), [tmp_path / "s.csv"], out=tmp_path / "out")


@pytest.mark.slow
def test_slides_of_one_name_are_distinguished(tmp_path, make_slide):
    path = make_slide("x.tiff")
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        shutil.copy(path, tmp_path / folder)
    cohort = slide(make_classifier(), [tmp_path / "one", tmp_path / "two"], out=tmp_path / "out")
    assert cohort.status["slide"].tolist() == ["one_x", "two_x"]


def test_several_slides_need_a_place_and_slides_must_exist(tmp_path, make_slide):
    with refuses(DataError, "out=DIR"):
        slide(make_classifier(), [make_slide()])
    with refuses(DataError, "none.svs"):
        slide(make_classifier(), tmp_path / "none.svs")
    (tmp_path / "empty").mkdir()
    with refuses(DataError, "empty"):
        slide(make_classifier(), tmp_path / "empty", out=tmp_path / "out")


@pytest.mark.slow
def test_a_pack_becomes_its_slides_again(make_pack, tmp_path):
    pack = make_pack(patch_px=16, n_patients=2)
    table = pack.table.assign(x=(pack.table["x"] - 1) // 50 * 16 + 1, y=(pack.table["y"] - 1) // 50 * 16 + 1)
    table.to_parquet(pack.path / "patches.parquet")
    size = (pack.path / "patches.parquet").stat().st_size
    document = json.loads((pack.path / "pack.json").read_text())
    document["files"]["patches.parquet"] = size
    document["table_sha256"] = sha256_file(pack.path / "patches.parquet")
    write_json(pack.path / "pack.json", document)
    model = save_classifier(tmp_path / "c", mpp=4.0)
    cohort = slide(model, [pack.path], out=tmp_path / "out")
    assert cohort.status["slide"].tolist() == ["8863", "8865"]
    predicted = biopsy.predict(model, pack.path, out=tmp_path / "p.parquet").frame.set_index(
        ["slide_id", "x", "y"]
    )
    for slide_map in cohort:
        frame = slide_map.to_frame()
        rows = [predicted.loc[(slide_map.name, x, y)] for x, y in zip(frame["x"], frame["y"], strict=True)]
        assert frame["prob"].tolist() == pytest.approx([row["prob"] for row in rows], abs=0.02)  # bf16
        summary = json.loads((tmp_path / "out" / slide_map.name / "summary.json").read_text())
        assert summary["annotated"]["n_positive"] == sum(row["target"] for row in rows)
        assert (tmp_path / "out" / slide_map.name / "panels.png").stat().st_size > 1000
    with refuses(DataError, "--stride-um", "slides"):
        slide(model, [pack.path], out=tmp_path / "other", stride_um=8)


@pytest.mark.slow
def test_more_than_two_classes_and_abstention(make_slide, tmp_path):
    model = save_classifier(tmp_path / "three", n_classes=3)
    slide(model, [make_slide("a.tiff")], out=tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "a" / "summary.json").read_text())
    assert set(summary["classes"]) == {"class_0", "class_1", "class_2"} and summary["positive"] is None
    assert (tmp_path / "out" / "a" / "overlay.png").stat().st_size > 1000
    unsure = make_classifier(conformal={"quantiles": [0.9, 0.9]})  # both classes are likely enough everywhere
    slide_map = slide(unsure, make_slide("a.tiff"))
    assert slide_map.abstained.all() and set(slide_map.cells_pred().ravel()) <= {-1, -2}


def test_labels_and_macro_images_are_never_requested():
    import ast

    for module in Path(inspect.getfile(slide)).parent.glob("*.py"):
        names = {
            node.attr for node in ast.walk(ast.parse(module.read_text())) if isinstance(node, ast.Attribute)
        }
        assert "associated_images" not in names


@pytest.mark.slow
def test_killed_at_any_moment_and_run_again_gives_the_same(make_slide, tmp_path):
    slides = tmp_path / "slides"
    slides.mkdir()
    for seed in range(3):
        shutil.move(make_slide(f"{seed}.tiff", seed=seed), slides)
    model = save_classifier(tmp_path / "c")
    command = [
        sys.executable,
        "-m",
        "biopsy.cli",
        "slide",
        str(model),
        str(slides),
        "--device",
        "cpu",
        "--out",
    ]
    code = [sys.executable, "-c", "from biopsy.cli import main; main()", *command[3:]]
    started = time.monotonic()
    subprocess.run([*code, str(tmp_path / "whole")], check=True, capture_output=True)
    seconds = time.monotonic() - started
    whole = contents(tmp_path / "whole")
    rng = np.random.default_rng(0)
    out = tmp_path / "killed"
    for moment in sorted(rng.uniform(0.3, 1, 6)):
        process = subprocess.Popen([*code, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(moment * seconds)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        if rng.random() < 0.5:
            shutil.rmtree(out, ignore_errors=True)
    subprocess.run([*code, str(out)], check=True, capture_output=True)
    assert contents(out) == whole


@pytest.mark.slow
def test_killed_between_writing_and_renaming(make_slide, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def die(*arguments, **options):
        raise Killed

    def replace_but_summary(a, b):
        return die() if Path(b).name == "summary.json" and Path(b).parent == out / "a" else replace(a, b)

    replace = os.replace
    model, path, out = save_classifier(tmp_path / "c"), make_slide("a.tiff"), tmp_path / "out"
    slide(model, [path], out=tmp_path / "whole", stride_um=8)
    moments = {
        "before the record": (outputs, "write_json", die, (True, False)),
        "before renaming": (
            files.os,
            "replace",
            lambda a, b: die() if Path(a).is_dir() else replace(a, b),
            (True,),
        ),
        "before the last file": (files.os, "replace", replace_but_summary, (False,)),
        "before the status": (cohorts, "_write_status", die, (True, False)),
    }
    for place, name, instead, news in moments.values():
        for is_new in news:
            shutil.rmtree(out, ignore_errors=True)
            if not is_new:  # what lies there answers another question: it must go
                slide(model, [path], out=out, stride_um=16, detections=True)
            with monkeypatch.context() as patched:
                patched.setattr(files, "_remove", lambda path: None)  # a killed process does not clean up
                patched.setattr(place, name, instead)
                with pytest.raises(Killed):
                    slide(model, [path], out=out, stride_um=8)
            slide(model, [path], out=out, stride_um=8)
            assert contents(out) == contents(tmp_path / "whole")
