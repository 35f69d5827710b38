"""Seeds, files and errors: what everything else stands on."""

import errno
import hashlib
import inspect
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from biopsy.core import errors, files
from biopsy.core.errors import BiopsyError, FileFormatError, MissingExtra, suggest
from biopsy.core.files import (
    create_directory,
    read_json,
    replace_atomic,
    sha256_file,
    write_atomic,
    write_json,
)
from biopsy.core.seeds import derive, make_rng
from refusals import refuses


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*.partial")]


# --- seeds


def test_derived_seed_is_the_documented_hash():
    digest = hashlib.sha256(b"7\x1fepoch\x1f3").digest()
    assert derive(7, "epoch", 3) == int.from_bytes(digest[:8], "little") >> 1


@given(st.integers(0, 2**63), st.lists(st.one_of(st.integers(), st.text(max_size=5)), max_size=4))
def test_derived_seeds_are_stable_and_in_range(seed, names):
    assert derive(seed, *names) == derive(seed, *names)
    assert 0 <= derive(seed, *names) < 2**63


def test_derived_seeds_differ_by_seed_name_and_grouping():
    seeds = [derive(0), derive(1), derive(0, "a"), derive(0, "b"), derive(0, "a", "b"), derive(0, "ab")]
    seeds += [derive(0, "a", 1), derive(0, "a", 2), derive(0, 1, "a")]
    assert len(set(seeds)) == len(seeds)


def test_generators_repeat_and_do_not_share_a_stream():
    assert (make_rng(3, "x").random(50) == make_rng(3, "x").random(50)).all()
    assert abs(np.corrcoef(make_rng(3, "x").random(2000), make_rng(3, "y").random(2000))[0, 1]) < 0.1


# --- files


def test_replace_atomic_writes_whole_and_leaves_nothing_beside(tmp_path):
    path = tmp_path / "new" / "file.bin"
    with replace_atomic(path) as partial:
        assert partial.parent == path.parent
        partial.write_bytes(b"abc")
        assert not path.exists()
    assert path.read_bytes() == b"abc"
    assert leftovers(tmp_path) == []


def test_interrupted_writing_keeps_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    write_atomic(path, "old")
    with pytest.raises(KeyboardInterrupt), replace_atomic(path) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert leftovers(tmp_path) == []


def test_full_disk_leaves_neither_file_nor_partial(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with refuses(OSError, errno=errno.ENOSPC):
        write_atomic(tmp_path / "file.txt", "text")
    assert list(tmp_path.iterdir()) == []


def test_full_disk_names_the_file(tmp_path):
    with pytest.raises(OSError) as caught, replace_atomic(tmp_path / "file.txt") as partial:
        partial.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path / "file.txt") and list(tmp_path.iterdir()) == []
    with pytest.raises(OSError) as caught, create_directory(tmp_path / "new") as partial:
        raise OSError(errno.ENOSPC, "No space left on device", str(partial / "weights"))
    assert caught.value.filename == str(tmp_path / "new" / "weights") and list(tmp_path.iterdir()) == []


def test_a_new_folder_is_whole_or_not_there(tmp_path):
    with create_directory(tmp_path / "new" / "folder") as partial:
        (partial / "a").write_text("1")
        assert not (tmp_path / "new" / "folder").exists()
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["a"]
    with pytest.raises(ZeroDivisionError), create_directory(tmp_path / "other") as partial:
        (partial / "c").write_text("3")
        raise ZeroDivisionError
    assert leftovers(tmp_path) == [] and not (tmp_path / "other").exists()
    (tmp_path / "empty").mkdir()
    with create_directory(tmp_path / "empty") as partial:
        (partial / "a").write_text("1")
    assert (tmp_path / "empty" / "a").exists()


def test_json_round_trip_with_numpy_values_paths_and_gaps(tmp_path):
    path = tmp_path / "document.json"
    document = {
        "count": np.int64(3),
        "share": np.float32(0.5),
        "yes": np.bool_(True),
        "array": np.array([[1.0, np.nan], [np.inf, -np.inf]]),
        "path": Path("a/b"),
        7: ("x", None),
        "name": "Gewebe µm",
    }
    write_json(path, document)
    assert read_json(path) == {
        "count": 3,
        "share": 0.5,
        "yes": True,
        "array": [[1.0, None], [None, None]],
        "path": os.fspath(Path("a/b")),
        "7": ["x", None],
        "name": "Gewebe µm",
    }
    assert "NaN" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("content", "reason", "fact"),
    [
        (None, "missing", ""),
        (b'{"format": "biopsy-pack/1"', "syntax", "JSON"),
        (b"\xff\xfe\x00", "encoding", "0xff"),
        (b'{"format": "biopsy-pack/2"}', "format", "newer than 'biopsy-pack/1'"),
        (b'{"format": "biopsy-run/1"}', "format", "'biopsy-run/1' where 'biopsy-pack/1'"),
        (b"{}", "format", "None where 'biopsy-pack/1'"),
        (b"[1, 2]", "value", "list"),
    ],
)
def test_json_of_another_format_is_refused_in_one_line(tmp_path, content, reason, fact):
    path = tmp_path / "pack.json"
    if content is not None:
        path.write_bytes(content)
    with refuses(FileFormatError, fact, path=path, reason=reason):
        read_json(path, format="biopsy-pack/1")


def test_json_of_the_right_format_is_read(tmp_path):
    write_json(tmp_path / "pack.json", {"format": "biopsy-pack/1", "n": 1})
    assert read_json(tmp_path / "pack.json", format="biopsy-pack/1")["n"] == 1
    assert json.loads((tmp_path / "pack.json").read_text())["n"] == 1


def test_sha256_of_a_file(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")  # FIPS 180-2, example B.1
    assert (
        sha256_file(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )


# --- errors


def test_every_error_has_the_package_base_and_a_builtin_one():
    found = [
        item for _, item in inspect.getmembers(errors, inspect.isclass) if item.__module__ == errors.__name__
    ]
    assert len(found) >= 10
    for error in set(found) - {BiopsyError}:
        assert issubclass(error, BiopsyError)
        builtins = [base for base in error.__mro__ if base.__module__ == "builtins"]
        assert builtins[0] not in (Exception, BaseException), error
        assert error.__name__ in errors.__doc__, "the tree in the docstring lacks it"


@pytest.mark.parametrize(
    "error",
    [
        errors.PackError("a.pack was changed", "altered"),
        errors.FileFormatError("a.json", "value", "is empty"),
        errors.UserFileError("a.csv", "edited", "is yours"),
        errors.HubError("org/name", "missing", "there is no org/name"),
        errors.DownloadError("no room", "disk"),
        MissingExtra("ray", "--engine ray"),
    ],
)
def test_errors_of_other_processes_keep_message_and_attributes(error):
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error) and str(copy) == str(error) and vars(copy) == vars(error)


def test_missing_extra_states_how_to_install_it():
    assert str(MissingExtra("fetch", "biopsy fetch idc")) == (
        "biopsy fetch idc needs the extra 'fetch': install it with "
        "`pip install 'biopsy[fetch]'` or, in a checkout, `uv sync --extra fetch`"
    )


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("cancrnet", ["cancernet", "resnet"], "did you mean 'cancernet'?"),
        ("zzz", ["b", "a"], "known: a, b"),
        ("zzz", [], "known: none"),
    ],
)
def test_suggest_names_the_nearest_or_all(name, options, said):
    assert suggest(name, iter(options)) == said
