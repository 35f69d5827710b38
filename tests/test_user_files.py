"""What a user keeps is never removed or written over: the mechanism, then every command that writes."""

import os
import shlex
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest

from biopsy.cli.app import COMMANDS
from biopsy.core import files
from biopsy.core.errors import DataError, UserFileError
from biopsy.core.files import (
    MANIFEST,
    check_outputs,
    create_directory,
    hold_outputs,
    read_json,
    refuse_inputs,
    remove_abandoned,
    remove_outputs,
    replace_atomic,
    update_directory,
    write_atomic,
    write_json,
    write_output,
)
from biopsy.data.datasets.base import RemoteFile, Source
from biopsy.experiments import demo
from command_line import call as run_command
from conftest import abandon
from keras_files import build, keras_layers, make_config, write_keras
from tiny_runs import TINY, copy_run


def put(folder: Path, **contents: str) -> None:
    """Write what a command would write into a folder: ``a__b="x"`` is ``a/b``."""
    names = [name.replace("__", "/") for name in contents]
    with update_directory(folder, *{name.split("/")[0] + "*" for name in names}, *names) as partial:
        for name, content in zip(names, contents.values(), strict=True):
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).write_text(content)


def read(folder: Path) -> dict[str, str]:
    """Return what a folder holds beside the manifest."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {path.relative_to(folder).as_posix(): path.read_text() for path in found}


def refusal(reason: str) -> "pytest.RaisesExc[UserFileError]":
    return pytest.RaisesExc(UserFileError, check=lambda error: error.reason == reason)


# --- folders that hold a user's files too


def test_own_outputs_are_replaced_and_other_files_stay(tmp_path):
    folder = tmp_path / "out"
    put(folder, a="1", m__x="1", m__y="1")
    (folder / "notes").write_text("mine")
    (folder / "m" / "mine").write_text("mine")
    (folder / "empty").mkdir()
    put(folder, a="2", m__x="2")
    assert read(folder) == {"a": "2", "m/x": "2", "notes": "mine", "m/mine": "mine"}
    assert (folder / "empty").is_dir()


def test_names_of_other_commands_stay(tmp_path):
    put(tmp_path, a="1")
    put(tmp_path, b="1")
    assert read(tmp_path) == {"a": "1", "b": "1"}
    put(tmp_path, a="2")
    assert read(tmp_path) == {"a": "2", "b": "1"}


def test_a_folder_of_which_nothing_is_left_goes(tmp_path):
    folder = tmp_path / "out"
    put(folder, m__x="1")
    with update_directory(folder, "m/*"):
        pass
    assert not (folder / "m").exists()


def test_a_file_that_was_changed_is_refused_before_any_work(tmp_path):
    put(tmp_path, a="1", m__x="1")
    (tmp_path / "m" / "x").write_text("with my arrows")
    with refusal("edited"), update_directory(tmp_path, "a", "m/*"):
        raise AssertionError("work was begun")
    assert read(tmp_path) == {"a": "1", "m/x": "with my arrows"}


def test_a_file_of_the_user_in_the_way_is_refused(tmp_path):
    (tmp_path / "a").write_text("mine")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "x").write_text("mine")
    with refusal("foreign"):
        check_outputs(tmp_path, "a")
    with refusal("foreign"), update_directory(tmp_path, "m/*") as partial:
        (partial / "m").mkdir()
        (partial / "m" / "x").write_text("ours")
    (tmp_path / "m" / "x").unlink()
    (tmp_path / "m").rmdir()
    (tmp_path / "m").write_text("a file where a folder would be")
    with refusal("foreign"):
        check_outputs(tmp_path, "m/*")
    assert read(tmp_path) == {"a": "mine", "m": "a file where a folder would be"}


@pytest.mark.parametrize("name", ["a", "m"])
def test_links_are_not_followed(tmp_path, name):
    outside, folder = tmp_path / "outside", tmp_path / "out"
    outside.mkdir()
    (outside / "x").write_text("mine")
    put(folder, a="1", m__x="1")
    for path in ("a", "m/x"):
        (folder / path).unlink()
    (folder / "m").rmdir()
    (folder / name).symlink_to(outside / "x" if name == "a" else outside)
    with refusal("foreign"), update_directory(folder, "a", "m/*"):
        raise AssertionError("work was begun")
    remove_outputs(folder)
    assert (folder / name).is_symlink() and (outside / "x").read_text() == "mine"


def test_equal_content_is_no_conflict_and_nothing_is_written_then(tmp_path):
    put(tmp_path, a="1")
    before = (tmp_path / "a").stat().st_mtime_ns
    put(tmp_path, a="1")
    assert (tmp_path / "a").stat().st_mtime_ns == before


def test_a_failure_leaves_all_as_it_was(tmp_path):
    put(tmp_path / "out", a="1")
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(ZeroDivisionError), update_directory(tmp_path / "out", "a") as partial:
        (partial / "a").write_text("2")
        raise ZeroDivisionError
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("moment", range(8))
def test_killed_while_files_are_brought_in(tmp_path, monkeypatch, moment):
    """Whatever moment it is, the last file is not there unless all are, and the next time goes through."""

    class Killed(BaseException):
        pass

    def write(a: str, b: str) -> None:
        with update_directory(tmp_path, "a", "b", "m/*", "last", last="last") as partial:
            (partial / "m").mkdir()
            for name, content in (("a", a), ("b", b), ("m/x", a), (f"m/{a}", a), ("last", a + b)):
                (partial / name).write_text(content)

    def count_down(function):
        def counted(*arguments, **options):
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return function(*arguments, **options)

        return counted

    write("1", "1")
    (tmp_path / "notes").write_text("mine")
    left = moment
    with monkeypatch.context() as patched:
        patched.setattr(files.os, "replace", count_down(os.replace))
        patched.setattr(files, "_unlink", count_down(files._unlink))
        patched.setattr(files, "_remove", lambda path: None)
        try:
            write("2", "1")
            assert moment == 7, "there are fewer moments than were tried"
        except Killed:
            found = read(tmp_path)
            if found.get("last") == "11":
                assert (found["a"], found["b"], found["m/x"]) == ("1", "1", "1")
            assert found.get("last") != "21"
    write("3", "3")
    assert read(tmp_path) == {"a": "3", "b": "3", "m/x": "3", "m/3": "3", "last": "33", "notes": "mine"}
    assert list(tmp_path.rglob("*.partial")) == []


def test_files_that_are_written_repeatedly_are_held(tmp_path):
    with hold_outputs(tmp_path, "table.csv"):
        write_atomic(tmp_path / "table.csv", "1")
        write_atomic(tmp_path / "table.csv", "2")
    with hold_outputs(tmp_path, "table.csv"):
        write_atomic(tmp_path / "table.csv", "3")
    (tmp_path / "table.csv").write_text("3, and my notes")
    with refusal("edited"), hold_outputs(tmp_path, "table.csv"):
        raise AssertionError("work was begun")
    assert read(tmp_path) == {"table.csv": "3, and my notes"}


def test_after_a_crash_what_was_held_may_be_written_again(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(files, "sha256_file", lambda path: (_ for _ in ()).throw(OSError("dead")))
        with hold_outputs(tmp_path, "table.csv"):
            write_atomic(tmp_path / "table.csv", "half")
    write_output(tmp_path / "table.csv", "whole")
    assert read(tmp_path) == {"table.csv": "whole"}


def test_without_a_manifest_a_folder_of_ours_is_adopted(tmp_path):
    (tmp_path / "report.html").write_text("of an older version")
    with refusal("foreign"):
        write_output(tmp_path / "report.html", "new")
    write_output(tmp_path / "report.html", "new", adopt=True)
    assert read(tmp_path) == {"report.html": "new"}
    (tmp_path / "report.html").write_text("with my notes")
    with refusal("edited"):
        write_output(tmp_path / "report.html", "newer", adopt=True)


def test_a_named_file_that_is_replaced_stays_ours(tmp_path):
    write_output(tmp_path / "report.html", "1")
    write_atomic(tmp_path / "report.html", "2")
    write_output(tmp_path / "report.html", "3")
    assert read(tmp_path) == {"report.html": "3"}


def test_only_what_was_written_is_removed(tmp_path):
    folder = tmp_path / "out"
    put(folder, a="1", b="1", m__x="1")
    (folder / "b").write_text("changed")
    (folder / "notes").write_text("mine")
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "metrics.json").write_text("{}")
    removed, kept = remove_outputs(folder, "evaluation/metrics.json", "gone.json")
    assert (set(removed), kept) == ({"a", "m/x", "evaluation/metrics.json"}, ["b"])
    assert read(folder) == {"b": "changed", "notes": "mine"} and not (folder / "m").exists()
    put(tmp_path / "other", a="1")
    remove_outputs(tmp_path / "other")
    assert not (tmp_path / "other").exists()
    assert remove_outputs(tmp_path / "never") == ([], [])


@pytest.mark.parametrize("name", ["../outside", "m/../../outside", "/", "", "."])
def test_a_manifest_that_somebody_made_reaches_nothing_outside(tmp_path, name):
    (tmp_path / "outside").write_text("mine")
    folder = tmp_path / "out"
    folder.mkdir()
    names = {name if name != "/" else str(tmp_path / "outside"): files.sha256_file(tmp_path / "outside")}
    write_json(folder / MANIFEST, {"format": "biopsy-manifest/1", "files": names})
    put(folder, m__x="1")
    remove_outputs(folder)
    assert (tmp_path / "outside").read_text() == "mine"


@pytest.mark.parametrize("text", ["", "[]", '{"format": "biopsy-manifest/1"}', '{"files": 3}', "\0"])
def test_a_damaged_manifest_makes_nothing_ours(tmp_path, text):
    put(tmp_path, a="1")
    (tmp_path / MANIFEST).write_text(text)
    with refusal("foreign"):
        write_output(tmp_path / "a", "2")
    assert (tmp_path / "a").read_text() == "1"


# --- files and folders that a user names


def test_a_new_folder_takes_the_place_of_nothing(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / ".hidden").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("folder", "file"):
        with refusal("not-empty"), create_directory(tmp_path / name):
            raise AssertionError("work was begun")
    with refusal("not-empty"), create_directory(tmp_path / "late"):
        (tmp_path / "late").mkdir()
        (tmp_path / "late" / "notes").write_text("came while it was made")
    assert (tmp_path / "late" / "notes").exists() and list(tmp_path.glob(".*.partial")) == []


def test_a_file_takes_the_place_of_files_only(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        with refusal("not-a-file"):
            write_atomic(tmp_path / name, "text")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_atomic(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "text"


def test_inputs_are_never_written(tmp_path):
    pack = tmp_path / "a.pack"
    pack.mkdir()
    (pack / "patches.parquet").write_text("mine")
    (tmp_path / "same").symlink_to(pack)
    os.link(pack / "patches.parquet", tmp_path / "linked")
    for out in (pack, tmp_path / "same", pack / "patches.parquet", tmp_path / "same" / "patches.parquet"):
        with refusal("input"):
            refuse_inputs(out, None, pack)
    with refusal("input"):
        refuse_inputs(tmp_path / "linked", pack / "patches.parquet")
    refuse_inputs(pack / "inspection", pack)
    refuse_inputs(tmp_path / "new", pack, tmp_path / "never")


# --- what dead processes left


def test_only_leftovers_of_dead_processes_are_removed(tmp_path):
    dead = [abandon(tmp_path, is_folder=True), abandon(tmp_path)]
    mine = [
        ".mine.partial",
        ".biopsy.partial",
        f".biopsy-{files.machine_id()}-{os.getppid()}-0badcafe.partial",
    ]
    mine += [f".biopsy-00000000-{dead[0].name.split('-')[2]}-0badcafe.partial", "x.partial"]
    for name in mine:
        (tmp_path / name).write_text("mine")
    with replace_atomic(tmp_path / "first") as partial:
        partial.write_text("being written")
        write_atomic(tmp_path / "second", "text")
        assert partial.exists(), "what this process is writing was removed"
    assert not any(path.exists() for path in dead)
    assert {path.name for path in tmp_path.iterdir()} == {*mine, "first", "second"}
    remove_abandoned(tmp_path / "never")


def test_every_refusal_names_the_file_and_a_remedy(tmp_path):
    (tmp_path / "a").write_text("mine")
    with pytest.raises(DataError) as caught:
        write_output(tmp_path / "a", "ours")
    assert isinstance(caught.value, UserFileError) and caught.value.path == tmp_path / "a"
    assert str(tmp_path / "a") in str(caught.value) and "\n" not in str(caught.value)


def test_the_manifest_is_a_document(tmp_path):
    put(tmp_path, a="1")
    found = read_json(tmp_path / MANIFEST, format="biopsy-manifest/1")
    assert found["files"] == {"a": files.sha256_file(tmp_path / "a")}


# --- every command


OUTSIDE = "a folder elsewhere"
PAPER = """
format = "biopsy-recipe/1"
name = "tiny-paper"
title = "A tiny paper"
[origin]
dataset = "synthetic"
updates = 100
claim = { accuracy = 0.8 }
corrected = { balanced_accuracy = 0.75 }
[preprocessing]
input_px = 8
[model]
name = "dabydeen_hedges"
params = { widths = [4], dense = 4 }
[train]
epochs = 1
batch_size = 8
[as_published]
split = { method = "shuffled-paths", seed = 42, train = 0.8, validation = 0.1 }
"""


@dataclass(frozen=True)
class Case:
    """A command and where it writes, relative to the folder the test works in.

    Attributes:
        words: The command line.
        out: What it is asked to write.
        is_new: Whether it makes that folder, and so refuses one that holds anything.
        taken: Of a folder it shares with the user, files of its own that the user may have, or may edit.
        before: Commands that must have been run.
        beside: Words that change what is answered, so that a second call writes anew.
    """

    words: str
    out: str = ""
    is_new: bool = False
    taken: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    beside: str = ""


SETTINGS = " ".join(f"--set {setting}" for setting in (*TINY, "train.epochs=1"))
STUDY = f"cancernet-2020 --data own.pack {SETTINGS}"
JUDGED = ("evaluate run",)
CASES = {
    "list": Case("list models"),
    "doctor": Case("doctor"),
    "verify": Case("verify run"),
    "fetch": Case("fetch idc --out fetched", "fetched"),
    "prepare": Case("prepare idc.zip --out new.pack --export-tree tree", "new.pack", is_new=True),
    "inspect": Case(
        "inspect own.pack --split official --out drawn", "drawn", taken=("classes.png", "patients.svg")
    ),
    "split": Case("split own.pack --protocol patients --name mine", "own.pack/splits", taken=("mine.csv",)),
    "train": Case(f"train {STUDY} --out trained --plot curves.svg", "trained", is_new=True),
    "pretrain": Case(
        f"pretrain {STUDY} --split official --epochs 1 --out learned",
        "learned",
        is_new=True,
        taken=("weights.safetensors",),
    ),
    "evaluate": Case("evaluate run", "run/evaluation"),
    "calibrate": Case("calibrate run", "run/explain", before=("evaluate run", "explain run", "errors run")),
    "report": Case("report run --out pages", "pages", taken=("run-report.html",), before=JUDGED),
    "predict": Case("predict run own.pack", ".", taken=("predictions.csv", "predictions.csv.json")),
    "next": Case("next run own.pack --budget 3 --out queue.csv", ".", taken=("queue.csv",)),
    "explain": Case(
        "explain run --method saliency --out shown",
        "shown",
        taken=("saliency.png", "explain.json"),
        beside="--errors 3",
    ),
    "errors": Case("errors run --out wrong", "wrong", taken=("errors.csv",), before=JUDGED, beside="--n 3"),
    "label-issues": Case(
        "label-issues run --out sheet", "sheet", taken=("labels.csv", "labels.html"), beside="--n 3"
    ),
    "slide": Case(
        "slide run/classifier slide.tiff --out maps",
        "maps",
        taken=("status.csv", "slide/overlay.png", "slide/regions.geojson"),
        beside="--detections",
    ),
    "compare": Case(
        "compare run other --out compared", "compared", is_new=True, before=("evaluate run", "evaluate other")
    ),
    "import-keras": Case("import-keras k.keras --model cancernet-2020 --out mine", "mine", is_new=True),
    "export": Case("export run bundle", "bundle", is_new=True),
    "study": Case(
        f"study {STUDY} --split official --seeds 0 --out s", "s", is_new=True, taken=("table.csv",)
    ),
    "sweep": Case(
        f"sweep {STUDY} --split official --grid train.fraction=1 --out s",
        "s",
        is_new=True,
        taken=("table.csv",),
    ),
    "reproduce": Case(
        "reproduce paper.toml --data own.pack --seeds 0 --leak-seeds= --out s",
        "s",
        is_new=True,
        taken=("table.csv", "runs.csv"),
    ),
    "demo": Case("demo --out demo", "demo", is_new=True),
}
SLOW = {
    *("report", "inspect", "calibrate", "export", "reproduce", "demo", "slide", "errors"),
    *("train", "sweep", "study", "compare", "explain"),
}


@pytest.fixture
def place(trained_run, make_slide, make_idc_zip, tmp_path, monkeypatch, request) -> Path:
    """A folder with everything that the commands read, which is the current one."""
    (tmp_path / "inputs").mkdir()
    copy_run(trained_run, tmp_path)
    if "other" in request.param.words:
        shutil.copytree(tmp_path / "run", tmp_path / "other")
    make_slide(mpp=2.0)
    make_idc_zip()
    (tmp_path / "paper.toml").write_text(PAPER)
    layers = keras_layers(build(input_px=48))
    write_keras(tmp_path / "k.keras", layers, make_config(layers, input_px=48))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "N_PATIENTS", 12)
    monkeypatch.setattr(demo, "PATCHES_PER_PATIENT", 20)
    monkeypatch.setattr(demo, "SLIDE_PX", (600, 450))
    source = Source("idc", "IDC", "none", "none", files=(RemoteFile((tmp_path / "idc.zip").as_uri()),))
    monkeypatch.setattr("biopsy.models.fetch.find_source", lambda name: source)
    return tmp_path


def keep(folder: Path, outside: Path) -> None:
    """Put what a user may keep into a folder."""
    (folder / "notes.txt").write_text(f"seen on {folder}")
    (folder / "annotations.qpdata").write_bytes(bytes(range(256)))
    (folder / ".hidden").write_text("hidden")
    (folder / ".lock").write_text("another program's")
    (folder / ".mine.partial").write_text("half, but mine")
    (folder / ".case1.12345678.partial").mkdir(exist_ok=True)
    (folder / ".case1.12345678.partial" / "data").write_text("mine")
    (folder / "below").mkdir(exist_ok=True)
    (folder / "below" / "table.csv").write_text("a,b\n1,2\n")
    if not (folder / "elsewhere").is_symlink():
        (folder / "elsewhere").symlink_to(outside)


MINE = {"notes.txt", "annotations.qpdata", ".hidden", ".lock", ".mine.partial", ".case1.12345678.partial"}
MINE |= {"below", "elsewhere"}


def keep_everywhere(place: Path, outside: Path) -> dict[Path, bytes | str]:
    """Put a user's files into all folders there are, and give what must be the same afterwards."""
    for folder in [place, *(path for path in place.rglob("*") if path.is_dir())]:
        if not MINE & set(folder.relative_to(place).parts):
            keep(folder, outside)
    found: dict[Path, bytes | str] = {}
    for path in [*outside.rglob("*"), *place.rglob("*")]:
        if path.is_relative_to(outside) or MINE & set(path.relative_to(place).parts):
            found[path] = (
                os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else ""
            )
    return found


def assert_kept(before: dict[Path, bytes | str]) -> None:
    for path, content in before.items():
        now = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else ""
        assert os.path.lexists(path) and now == content, path


def call(words: str, *, codes: tuple[int, ...] = (0,)) -> str:
    result = run_command(*shlex.split(words))
    assert result.exit_code in codes, (words, result.stderr)
    return result.stderr


def test_every_command_has_a_case():
    elsewhere = {
        "view",
        "serve",
        "probe",
        "publish",
    }  # in their own files
    assert {name.replace("_", "-") for name in COMMANDS} - elsewhere == CASES.keys()


@pytest.mark.parametrize(
    "place",
    [pytest.param(case, id=name, marks=[pytest.mark.slow] * (name in SLOW)) for name, case in CASES.items()],
    indirect=True,
)
def test_a_user_keeps_all_files(place, tmp_path_factory, request):
    case = request.node.callspec.params["place"]
    outside = tmp_path_factory.mktemp("elsewhere") / OUTSIDE
    outside.mkdir()
    (outside / "thesis.txt").write_text("precious")
    for words in case.before:
        call(words)
    if case.out:
        (place / case.out).mkdir(parents=True, exist_ok=True)
    before = keep_everywhere(place, outside)
    if case.is_new:  # it takes no folder that holds anything
        listed = sorted(place.rglob("*"))
        call(case.words, codes=(1,))
        assert_kept(before)
        assert {path.name for path in (place / case.out).iterdir()} == MINE, "something was written"
        assert [path for path in sorted(place.rglob("*.partial")) if path not in listed] == []
        shutil.rmtree(place / case.out)
        before = {path: content for path, content in before.items() if os.path.lexists(path)}
    call(case.words)
    assert_kept(before)
    before = keep_everywhere(place, outside)
    again = f"{case.words} {case.beside}"
    call(again, codes=(0, 1) if case.is_new else (0,))
    assert_kept(before)
    for name in case.taken:
        path = place / case.out / name
        mine = path.read_bytes() + b"\nand what I think of it\n"
        path.write_bytes(mine)
        call(case.words, codes=(1,))
        assert path.read_bytes() == mine
        assert_kept(before)
        path.unlink()


@pytest.mark.parametrize("place", [CASES["predict"]], indirect=True)
@pytest.mark.parametrize(
    "out",
    [
        "own.pack/patches.parquet",
        "own.pack/splits/mine.csv",
        "run/split.csv",
        "run/predictions/validation.parquet",
    ],
)
def test_predictions_are_not_written_over_what_is_read(place, out):
    call("split own.pack --protocol patients --name mine")
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    call(f"predict run own.pack --out {out}", codes=(1,))
    assert before == {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}


@pytest.mark.parametrize("place", [CASES["predict"]], indirect=True)
def test_a_file_that_is_named_is_replaced_unless_somebody_decided_on_it(place):
    sheet = "patch_id,label,decision\na,idc,yes\n"
    (place / "labels.csv").write_text(sheet)
    call("predict run own.pack --out labels.csv", codes=(1,))
    assert (place / "labels.csv").read_text() == sheet
    (place / "old.csv").write_text("a,b\n1,2\n")
    call("predict run own.pack --out old.csv")
    assert len(pd.read_csv(place / "old.csv")) == 120


@pytest.mark.parametrize("place", [CASES["prepare"]], indirect=True)
def test_prepare_removes_what_a_killed_one_left(place):
    left = abandon(place, is_folder=True)
    call(CASES["prepare"].words)
    assert not left.exists()


SHARED = {name: case for name, case in CASES.items() if case.taken and not case.is_new}


@pytest.mark.parametrize(
    "place",
    [pytest.param(case, id=name, marks=[pytest.mark.slow] * (name in SLOW)) for name, case in SHARED.items()],
    indirect=True,
)
def test_a_file_of_the_same_name_is_refused(place, request):
    case = request.node.callspec.params["place"]
    for words in case.before:
        call(words)
    for name in case.taken:
        path = place / case.out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
        said = call(case.words, codes=(1,))
        assert path.read_text() == "mine" and name.split("/")[-1] in said
        path.unlink()
