"""What a user keeps is never removed or written over: the mechanism, then every command that writes."""

import os
import stat
from pathlib import Path

import pytest

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
from conftest import abandon


def put(folder: Path, **contents: str) -> None:
    """Write what a command would write into a folder: ``a__b="x"`` is ``a/b``."""
    names = [name.replace("__", "/") for name in contents]
    with update_directory(folder, *{name.split("/")[0] + "*" for name in names}, *names) as partial:
        for name, content in zip(names, contents.values(), strict=True):
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).write_text(content)


def read(folder: Path) -> dict[str, str]:
    """Give what a folder holds beside the manifest."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {path.relative_to(folder).as_posix(): path.read_text() for path in found}


def refusal(reason: str) -> "pytest.RaisesExc[UserFileError]":
    return pytest.RaisesExc(UserFileError, check=lambda error: error.reason == reason)


# --- folders that hold a user's files too


def test_what_was_written_before_is_replaced_and_anything_else_stays(tmp_path):
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
    with pytest.raises(ValueError, match="stop"), update_directory(tmp_path / "out", "a") as partial:
        (partial / "a").write_text("2")
        raise ValueError("stop")
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


def test_what_is_read_is_not_written(tmp_path):
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


def test_what_a_dead_process_left_goes_and_nothing_else(tmp_path):
    dead = [abandon(tmp_path, is_folder=True), abandon(tmp_path)]
    mine = [".mine.partial", ".biopsy.partial", f".biopsy-{files._machine()}-{os.getppid()}-0badcafe.partial"]
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


def test_every_refusal_says_what_stands_where_and_what_to_do(tmp_path):
    (tmp_path / "a").write_text("mine")
    with pytest.raises(DataError) as caught:
        write_output(tmp_path / "a", "ours")
    assert isinstance(caught.value, UserFileError) and caught.value.path == tmp_path / "a"
    assert str(tmp_path / "a") in str(caught.value) and "\n" not in str(caught.value)


def test_the_manifest_is_a_document(tmp_path):
    put(tmp_path, a="1")
    found = read_json(tmp_path / MANIFEST, format="biopsy-manifest/1")
    assert found["files"] == {"a": files.sha256_file(tmp_path / "a")}
