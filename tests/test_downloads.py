"""Downloads against a server on this machine that drops, ignores, refuses and lies on request."""

import contextlib
import errno
import gzip
import hashlib
import http.server
import os
import re
import shutil
import sys
import threading
import time
from collections import namedtuple
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from biopsy.data.downloads import (
    SOURCES,
    KaggleData,
    Patience,
    RemoteFile,
    Source,
    describe,
    fetch,
    fetch_source,
    transfer,
)
from biopsy.data.downloads.collection import needed_bytes
from biopsy.errors import DataError, DownloadError, MissingExtra

BODY = np.random.default_rng(0).bytes(3_000_000)
QUICK = Patience(tries=3, backoff_s=0.0, timeout_s=5.0)
Disk = namedtuple("Disk", "total used free")


@dataclass
class Behaviour:
    """What the server holds and how it misbehaves; ``asked`` are the Range headers of every request."""

    bodies: dict[str, bytes] = field(default_factory=lambda: {"/data.bin": BODY})
    ranges: bool = True
    drop_after: list[int] = field(default_factory=list)  # one number of bytes per connection to cut
    answers: list[int] = field(default_factory=list)  # statuses to answer with before behaving
    wrong_range: bool = False
    pause_s: float = 0.0
    lengths: bool = True
    asked: list[str | None] = field(default_factory=list)


class Handler(http.server.BaseHTTPRequestHandler):
    behaviour: Behaviour

    def do_GET(self) -> None:
        does = self.behaviour
        wanted = self.headers.get("Range")
        does.asked.append(wanted)
        body = does.bodies.get(self.path.partition("?")[0])
        if does.answers or body is None:
            self.send_error(does.answers.pop(0) if does.answers else 404)
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and does.ranges else 0
        if start >= len(body):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(body)}")
            self.end_headers()
            return
        self.send_response(206 if wanted and does.ranges else 200)
        if wanted and does.ranges:
            first = start + 7 if does.wrong_range else start
            self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
        if does.lengths:
            self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self._send(body[start:])

    def _send(self, rest: bytes) -> None:
        does = self.behaviour
        rest = rest[: does.drop_after.pop(0)] if does.drop_after else rest
        step = len(rest) // 5 + 1 if does.pause_s else len(rest) + 1
        with contextlib.suppress(ConnectionError):  # the client may leave first
            for at in range(0, len(rest), step):
                self.wfile.write(rest[at : at + step])
                self.wfile.flush()
                time.sleep(does.pause_s)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch):
    """A server on the loopback address; gives its base address and its behaviour."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    behaviour = Behaviour()
    handler = type("BoundHandler", (Handler,), {"behaviour": behaviour})
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}", behaviour
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def sha256(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


def data_file(base: str, **changes: object) -> RemoteFile:
    return RemoteFile(
        **{"url": f"{base}/data.bin", "size_bytes": len(BODY), "checksum": sha256(BODY), **changes}
    )


def get(file: RemoteFile, out: Path, **options: object):
    source = Source("test", "a test", "none", "none", files=(file,))
    return fetch_source(source, out, **{"patience": QUICK, **options})


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_file_arrives_whole(server, tmp_path):
    base, does = server
    result = get(data_file(base), tmp_path / "new" / "folder")
    assert result.fetched == (tmp_path / "new" / "folder" / "data.bin",)
    assert result.fetched[0].read_bytes() == BODY
    assert names(result.path) == {"data.bin"}
    assert does.asked == [None]


def test_what_is_there_is_not_fetched_again(server, tmp_path):
    base, does = server
    get(data_file(base), tmp_path)
    again = get(data_file(base), tmp_path)
    assert again.fetched == () and again.kept == (tmp_path / "data.bin",)
    assert len(does.asked) == 1


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("known", [True, False], ids=["size known", "size unknown"])
def test_dropped_connections_equal_one_go(server, tmp_path, ranges, known):
    base, does = server
    does.ranges = ranges
    does.drop_after = [1_000_000, 1_500_000]
    file = data_file(base) if known else data_file(base, size_bytes=None, checksum=None)
    get(file, tmp_path)
    assert (tmp_path / "data.bin").read_bytes() == BODY
    assert names(tmp_path) == {"data.bin"}
    assert does.asked[:2] == [None, "bytes=1000000-"]
    assert does.asked[2] == ("bytes=2500000-" if ranges else "bytes=1500000-")


def test_interrupted_and_fetched_again_equals_one_go(server, tmp_path):
    base, does = server

    def interrupt(progress):
        if progress.done_bytes:
            raise KeyboardInterrupt

    does.drop_after = [2_000_000]
    with pytest.raises(KeyboardInterrupt):
        get(data_file(base), tmp_path, on_progress=interrupt)
    assert names(tmp_path) == {"data.bin.partial"}
    reached = (tmp_path / "data.bin.partial").stat().st_size
    assert 0 < reached <= 2_000_000
    get(data_file(base), tmp_path)
    assert does.asked == [None, f"bytes={reached}-"]
    assert (tmp_path / "data.bin").read_bytes() == BODY
    assert names(tmp_path) == {"data.bin"}


def test_more_drops_than_tries_are_fine_while_bytes_arrive(server, tmp_path):
    base, does = server
    does.drop_after = [400_000] * 6
    get(data_file(base), tmp_path)
    assert (tmp_path / "data.bin").read_bytes() == BODY
    assert len(does.asked) == 7 > QUICK.tries


def test_drops_at_the_same_byte_end(server, tmp_path):
    base, does = server
    does.ranges = False
    does.drop_after = [1_000_000] * 9
    with pytest.raises(DownloadError, match=r"closed after 1,000,000 of 3,000,000 bytes, 3 times in a row"):
        get(data_file(base), tmp_path)
    assert len(does.asked) == QUICK.tries
    assert names(tmp_path) == {"data.bin.partial"}


def test_pauses_double(server, tmp_path, monkeypatch):
    base, does = server
    pauses: list[float] = []
    monkeypatch.setattr(transfer.time, "sleep", lambda s: pauses.append(s) if s else None)
    does.answers = [503, 500, 429]
    get(data_file(base), tmp_path, patience=Patience(tries=4, backoff_s=2.0))
    assert pauses == [2.0, 4.0, 8.0]
    assert (tmp_path / "data.bin").read_bytes() == BODY


@pytest.mark.parametrize("status", [404, 403, 410])
def test_a_refusal_is_final(server, tmp_path, status):
    base, does = server
    does.answers = [status]
    with pytest.raises(DownloadError, match=f"answered {status}.*may have moved"):
        get(data_file(base), tmp_path)
    assert len(does.asked) == 1
    assert names(tmp_path) == set()


def test_no_server_at_all(server, tmp_path):
    with pytest.raises(DownloadError, match=r"no connection .*3 times in a row"):
        get(RemoteFile("http://127.0.0.1:9/data.bin"), tmp_path)


def test_silence_counts_as_dropped(server, tmp_path):
    base, does = server
    does.pause_s = 0.5
    with pytest.raises(DownloadError, match="connection lost"):
        get(data_file(base), tmp_path, patience=Patience(tries=1, backoff_s=0.0, timeout_s=0.1))


def test_wrong_checksum_leaves_nothing(server, tmp_path):
    base, _ = server
    with pytest.raises(DownloadError, match=r"data\.bin has sha256 .* published is .*fetch again"):
        get(data_file(base, checksum=sha256(b"something else")), tmp_path)
    assert names(tmp_path) == set()


def test_md5_is_checked_too(server, tmp_path):
    base, _ = server
    get(data_file(base, checksum="md5:" + hashlib.md5(BODY).hexdigest()), tmp_path / "right")
    with pytest.raises(DownloadError, match="has md5"):
        get(data_file(base, checksum="md5:" + "0" * 32), tmp_path / "wrong")


def test_another_length_is_refused_before_a_byte_is_kept(server, tmp_path):
    base, _ = server
    with pytest.raises(DownloadError, match="3,000,000 bytes long where 2,999,999 were published"):
        get(data_file(base, size_bytes=2_999_999), tmp_path)
    assert names(tmp_path) == set()


def test_a_server_that_states_no_length(server, tmp_path):
    base, does = server
    does.lengths = False
    does.drop_after = [1_000_000]
    get(data_file(base), tmp_path)
    assert (tmp_path / "data.bin").read_bytes() == BODY
    assert len(does.asked) == 2


def test_a_finished_partial_file_is_only_renamed(server, tmp_path):
    base, does = server
    (tmp_path / "data.bin.partial").write_bytes(BODY)
    get(data_file(base), tmp_path)
    assert does.asked == []
    (tmp_path / "data.bin").rename(tmp_path / "data.bin.partial")
    get(data_file(base, size_bytes=None), tmp_path)  # size unknown: the server's 416 says that it is whole
    assert does.asked == ["bytes=3000000-"]
    assert (tmp_path / "data.bin").read_bytes() == BODY


@pytest.mark.parametrize("known", [True, False], ids=["size known", "size unknown"])
def test_a_partial_file_longer_than_the_file_starts_again(server, tmp_path, known):
    base, _ = server
    (tmp_path / "data.bin.partial").write_bytes(BODY + b"more")
    get(data_file(base) if known else data_file(base, size_bytes=None), tmp_path)
    assert (tmp_path / "data.bin").read_bytes() == BODY


def test_another_part_than_asked_for_is_refused(server, tmp_path):
    base, does = server
    does.wrong_range = True
    (tmp_path / "data.bin.partial").write_bytes(BODY[:1000])
    with pytest.raises(DownloadError, match="another part"):
        get(data_file(base), tmp_path)
    assert (tmp_path / "data.bin.partial").read_bytes() == BODY[:1000]


def test_a_foreign_beginning_is_found_out(server, tmp_path):
    base, _ = server
    (tmp_path / "data.bin.partial").write_bytes(b"x" * 1000)
    with pytest.raises(DownloadError, match="discarded"):
        get(data_file(base), tmp_path)
    get(data_file(base), tmp_path)
    assert (tmp_path / "data.bin").read_bytes() == BODY


def test_too_little_room_is_said_before_anything_starts(server, tmp_path, monkeypatch):
    base, does = server
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(10**9, 10**9, 2_999_999))
    with pytest.raises(DownloadError, match=r"test needs 0\.0 GB in .*choose another folder"):
        get(data_file(base), tmp_path)
    assert does.asked == []
    with pytest.raises(DownloadError, match=r"data\.bin needs"):  # size known only once the server says it
        get(data_file(base, size_bytes=None), tmp_path)
    assert len(does.asked) == 1 and names(tmp_path) == set()


def test_room_for_what_is_missing_is_enough(server, tmp_path, monkeypatch):
    base, _ = server
    (tmp_path / "data.bin.partial").write_bytes(BODY[:2_500_000])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(10**9, 10**9, 500_000))
    get(data_file(base), tmp_path)
    assert (tmp_path / "data.bin").read_bytes() == BODY


def test_a_disk_that_fills_up_is_no_dropped_connection(server, tmp_path, monkeypatch):
    base, does = server

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(transfer.os, "fsync", full)
    with pytest.raises(DownloadError, match=r"No space left on device.*fetch again to go on"):
        get(data_file(base), tmp_path)
    assert len(does.asked) == 1
    assert names(tmp_path) == {"data.bin.partial"}


def test_the_folder_is_a_file(server, tmp_path):
    base, _ = server
    (tmp_path / "taken").write_text("")
    with pytest.raises(DownloadError, match="cannot be used as a folder"):
        get(data_file(base), tmp_path / "taken")


def test_progress_goes_up_to_the_end(server, tmp_path, monkeypatch):
    base, does = server
    monkeypatch.setattr(transfer, "REPORT_EVERY_S", 0.0)
    does.pause_s = 0.02
    (tmp_path / "data.bin.partial").write_bytes(BODY[:1_000_000])
    seen = []
    get(data_file(base), tmp_path, on_progress=seen.append)
    done = [progress.done_bytes for progress in seen]
    assert done == sorted(done) and done[0] > 1_000_000 and done[-1] == len(BODY)
    assert len(done) >= 4
    assert {(p.file, p.step, p.total_bytes) for p in seen} == {("data.bin", "download", len(BODY))}
    # 2 MB came in five steps with pauses of 20 ms between: between 0.1 and 40 MB/s, the kept 1 MB not counted
    assert 1e5 < seen[-1].bytes_per_s < 2_000_000 / (4 * 0.02)


def test_a_packed_file_is_checked_unpacked_and_removed(server, tmp_path):
    base, does = server
    packed = gzip.compress(BODY)
    does.bodies = {"/x.h5.gz": packed}
    seen = []
    file = RemoteFile(f"{base}/x.h5.gz?download=1", len(packed), sha256(packed), len(BODY))
    result = get(file, tmp_path, on_progress=seen.append)
    assert result.fetched == (tmp_path / "x.h5",)
    assert (tmp_path / "x.h5").read_bytes() == BODY
    assert names(tmp_path) == {"x.h5"}
    assert seen[-1].step == "unpack" and seen[-1].done_bytes == seen[-1].total_bytes == len(packed)
    assert get(file, tmp_path).kept == (tmp_path / "x.h5",)


def test_a_packed_file_fetched_by_hand_is_used(server, tmp_path):
    base, does = server
    packed = gzip.compress(BODY)
    (tmp_path / "x.h5.gz").write_bytes(packed)
    get(RemoteFile(f"{base}/x.h5.gz", len(packed), sha256(packed), len(BODY)), tmp_path)
    assert names(tmp_path) == {"x.h5"} and does.asked == []
    (tmp_path / "y.h5.gz").write_bytes(packed[:-1] + b"?")
    with pytest.raises(DownloadError, match=r"y\.h5\.gz away and fetch again"):
        get(RemoteFile(f"{base}/y.h5.gz", len(packed), sha256(packed), len(BODY)), tmp_path)
    assert names(tmp_path) == {"x.h5", "y.h5.gz"}


def test_a_broken_packed_file_leaves_nothing_unpacked(server, tmp_path):
    base, does = server
    does.bodies = {"/x.h5.gz": gzip.compress(BODY)[:-1000]}
    with pytest.raises(DownloadError, match=r"cannot be unpacked .*delete it and fetch again"):
        get(RemoteFile(f"{base}/x.h5.gz", unpacked_bytes=len(BODY)), tmp_path)
    assert names(tmp_path) == {"x.h5.gz"}


def test_room_counts_packed_and_unpacked(server, tmp_path, monkeypatch):
    base, does = server
    packed = gzip.compress(BODY)
    file = RemoteFile(f"{base}/x.h5.gz", len(packed), sha256(packed), len(BODY))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(0, 0, len(packed) + len(BODY) - 1))
    with pytest.raises(DownloadError, match="test needs"):
        get(file, tmp_path)
    assert does.asked == []


# Kaggle, with a stand-in for its client


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
    with pytest.raises(MissingExtra, match="Kaggle needs the extra 'fetch'"):
        fetch("idc", tmp_path / "idc")
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
    result = fetch_source(source, tmp_path, patience=QUICK)
    assert result.path == tmp_path / "patches"
    assert (tmp_path / "patches" / "8863" / "a.png").read_bytes() == b"png"
    assert names(tmp_path) == {"patches", "data.bin"}
    assert fetch_source(source, tmp_path, patience=QUICK).kept == (
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
    with pytest.raises(DownloadError, match=r"refused .*accept the rules at .*/rules.*API token") as caught:
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
    with pytest.raises(DownloadError, match=r"reset by peer\); fetch again to go on, or download it by hand"):
        fetch_source(kaggle_source(), tmp_path)
    assert (tmp_path / ".kagglehub" / "1.archive").read_bytes() == b"half"
    assert not (tmp_path / "patches").exists()


def test_kaggle_needs_room_too(kagglehub, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(0, 0, 999))
    with pytest.raises(DownloadError, match="set needs"):
        fetch_source(kaggle_source(), tmp_path)


# The sources themselves


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(DataError, match="no data set 'pcan' to fetch; did you mean 'pcam'"):
        fetch("pcan", "unused")


def test_pcam_has_the_nine_published_files():
    sides, kinds = ("train", "valid", "test"), ("x.h5", "y.h5", "meta.csv")
    expected = {f"camelyonpatch_level_2_split_{side}_{kind}" for side in sides for kind in kinds}
    assert {file.final_name for file in SOURCES["pcam"].files} == expected
    assert all("zenodo.org/records/2546921/" in file.url for file in SOURCES["pcam"].files)
    # 327,680 images of 96 x 96 x 3 bytes, and the largest packed file beside them
    assert 327_680 * 27_648 + 6_421_353_462 < needed_bytes(SOURCES["pcam"], Path("nowhere")) < 15.6e9


def test_idc_has_the_three_case_lists():
    files = SOURCES["idc"].files
    assert [file.final_name for file in files] == ["cases_train.txt", "cases_val.txt", "cases_test.txt"]


def test_every_checksum_is_one_and_none_is_used_twice():
    checksums = [file.checksum for source in SOURCES.values() for file in source.files if file.checksum]
    assert len(set(checksums)) == len(checksums) == 9
    assert all(re.fullmatch(r"sha256:[0-9a-f]{64}|md5:[0-9a-f]{32}", checksum) for checksum in checksums)


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_licence_credentials_and_room_are_said_beforehand(name):
    text = describe(name)
    assert "licence: " in text and "credentials: " in text
    assert 5 < float(re.search(r"room needed: ([\d.]+) GB", text)[1]) < 20
    assert ("accepted the competition's rules" in text) == (name == "hcd")
