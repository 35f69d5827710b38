"""Downloads through Kaggle's client, with a stand-in for it, and what is said of every source."""

import errno
import os
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from biopsy.core.errors import DataError, DownloadError, MissingExtra
from biopsy.data.datasets.base import KaggleData, RemoteFile, Source
from biopsy.data.download import fetch_source, find_source, needed_bytes
from local_server import QUICK, Disk, data_file, names
from refusals import refuses

SOURCES = ("hcd", "idc", "pcam")


@pytest.fixture
def kagglehub(monkeypatch):
    """A module in kagglehub's place; the test sets what its two functions do."""
    module, exceptions = ModuleType("kagglehub"), ModuleType("kagglehub.exceptions")
    for name in ("BackendError", "CredentialError", "DataCorruptionError", "UnauthenticatedError"):
        setattr(exceptions, name, type(name, (Exception,), {}))
    module.exceptions = exceptions
    monkeypatch.setitem(sys.modules, "kagglehub", module)
    monkeypatch.setitem(sys.modules, "kagglehub.exceptions", exceptions)
    monkeypatch.setenv("KAGGLEHUB_CACHE", "as before")
    return module


def kaggle_source(kind: str = "dataset", files: tuple[RemoteFile, ...] = ()) -> Source:
    return Source("set", "a set", "CC0", "none", files, KaggleData("someone/patches", kind, 1000))


def test_without_kagglehub_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "kagglehub", None)
    with refuses(MissingExtra, "Kaggle", extra="fetch"):
        fetch_source(find_source("idc"), tmp_path / "idc")
    assert not (tmp_path / "idc").exists()


def test_kaggle_puts_the_files_under_their_own_name(server, kagglehub, tmp_path):
    base, _ = server
    asked = []

    def dataset_download(handle):
        asked.append(handle)
        folder = Path(os.environ["KAGGLEHUB_CACHE"]) / "datasets" / "someone" / "patches" / "versions" / "1"
        (folder / "8863").mkdir(parents=True)
        (folder / "8863" / "a.png").write_bytes(b"png")
        return str(folder)

    kagglehub.dataset_download = dataset_download
    source = kaggle_source(files=(data_file(base),))
    result = fetch_source(source, tmp_path, retry=QUICK)
    assert result.path == tmp_path / "patches"
    assert (tmp_path / "patches" / "8863" / "a.png").read_bytes() == b"png"
    assert names(tmp_path) == {"patches", "data.bin"}
    assert fetch_source(source, tmp_path, retry=QUICK).kept == (
        tmp_path / "patches",
        tmp_path / "data.bin",
    )
    assert asked == ["someone/patches"]


def test_what_kaggle_mounts_elsewhere_stays_there(kagglehub, tmp_path):
    mounted = tmp_path / "input"
    mounted.mkdir()
    kagglehub.competition_download = lambda handle: str(mounted)
    result = fetch_source(kaggle_source("competition"), tmp_path / "out")
    assert result.path == mounted and mounted.is_dir()


@pytest.mark.parametrize(
    "failure", ["UnauthenticatedError", "CredentialError", "status 401", "status 403"], ids=str
)
def test_missing_credentials_become_one_clear_line(kagglehub, tmp_path, failure):
    def refuse(handle):
        if not failure.startswith("status"):
            raise getattr(kagglehub.exceptions, failure)("User is\n\nnot authenticated")
        error = OSError("Client Error.\n\nYou don't have permission")
        error.response = type("Response", (), {"status_code": int(failure.split()[1])})
        raise error

    kagglehub.competition_download = refuse
    with refuses(DownloadError, "/rules", "API token", reason="refused") as caught:
        fetch_source(kaggle_source("competition"), tmp_path)
    assert "\n" not in str(caught.value)
    assert os.environ["KAGGLEHUB_CACHE"] == "as before"


def test_another_failure_of_kaggle_keeps_what_came(kagglehub, tmp_path):
    def drop(handle):
        archive = Path(os.environ["KAGGLEHUB_CACHE"]) / "1.archive"
        archive.parent.mkdir(parents=True)
        archive.write_bytes(b"half")
        raise ConnectionError("reset by peer")

    kagglehub.dataset_download = drop
    with refuses(DownloadError, "reset by peer", reason="offline"):
        fetch_source(kaggle_source(), tmp_path)
    assert (tmp_path / ".biopsy-kagglehub" / "1.archive").read_bytes() == b"half"
    assert not (tmp_path / "patches").exists()


@pytest.mark.parametrize(
    ("kind", "arguments", "reason"),
    [
        ("DataCorruptionError", ["wrong hash"], "changed"),
        ("OSError", [errno.ENOSPC, "No space left on device"], "disk"),
        ("OSError", ["404 Client Error"], "missing"),
    ],
)
def test_the_reason_of_a_failure_of_kaggle_is_told(kagglehub, tmp_path, kind, arguments, reason):
    def fail(handle):
        error = getattr(kagglehub.exceptions, kind, OSError)(*arguments)
        if reason == "missing":
            error.response = SimpleNamespace(status_code=404)
        raise error

    kagglehub.dataset_download = fail
    with refuses(DownloadError, arguments[-1], reason=reason):
        fetch_source(kaggle_source(), tmp_path)


def test_kaggle_needs_room_too(kagglehub, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(0, 0, 999))
    with refuses(DownloadError, tmp_path, reason="disk"):
        fetch_source(kaggle_source(), tmp_path)


# The sources themselves


def test_an_unknown_name_gets_the_nearest():
    with refuses(DataError, "'pcan'", "'pcam'"):
        find_source("pcan")


def test_pcam_has_the_nine_published_files():
    subsets, kinds = ("train", "valid", "test"), ("x.h5", "y.h5", "meta.csv")
    expected = {f"camelyonpatch_level_2_split_{subset}_{kind}" for subset in subsets for kind in kinds}
    assert {file.final_name for file in find_source("pcam").files} == expected
    assert all("zenodo.org/records/2546921/" in file.url for file in find_source("pcam").files)
    # 327,680 images of 96 x 96 x 3 bytes, and the largest packed file beside them
    assert 327_680 * 27_648 + 6_421_353_462 < needed_bytes(find_source("pcam"), Path("nowhere")) < 15.6e9


def test_idc_has_the_three_case_lists():
    files = find_source("idc").files
    assert [file.final_name for file in files] == ["cases_train.txt", "cases_val.txt", "cases_test.txt"]


def test_every_checksum_is_one_and_none_is_used_twice():
    checksums = [file.checksum for name in SOURCES for file in find_source(name).files if file.checksum]
    assert len(set(checksums)) == len(checksums) == 9
    assert all(re.fullmatch(r"sha256:[0-9a-f]{64}|md5:[0-9a-f]{32}", checksum) for checksum in checksums)


@pytest.mark.parametrize("name", SOURCES)
def test_licence_credentials_and_room_are_reported_beforehand(name, tmp_path):
    source = find_source(name)
    assert source.terms and source.credentials
    assert 5e9 < needed_bytes(source, tmp_path) < 20e9
    assert ("accepted the competition's rules" in source.credentials) == (name == "hcd")
