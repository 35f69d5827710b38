"""Downloads against a server on this machine that drops, ignores, refuses and lies on request."""

import errno
import gzip
import hashlib
import itertools
import shutil
from types import SimpleNamespace

import pytest

from biopsy.core.errors import DownloadError
from biopsy.data import download as transfer
from biopsy.data.datasets.base import RemoteFile
from biopsy.data.download import RetryPolicy
from local_server import BODY, QUICK, Disk, data_file, get, names, sha256
from refusals import refuses


def test_a_file_arrives_whole(server, tmp_path):
    base, does = server
    result = get(data_file(base), tmp_path / "new" / "folder")
    assert result.fetched == (tmp_path / "new" / "folder" / "data.bin",)
    assert result.fetched[0].read_bytes() == BODY
    assert names(result.path) == {"data.bin"}
    assert does.asked == [None]


def test_existing_files_are_not_downloaded_again(server, tmp_path):
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
    assert names(tmp_path) == {"data.bin.biopsy-partial"}
    reached = (tmp_path / "data.bin.biopsy-partial").stat().st_size
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
    with refuses(DownloadError, "1,000,000 of 3,000,000 bytes, 3 times", reason="offline"):
        get(data_file(base), tmp_path)
    assert len(does.asked) == QUICK.tries
    assert names(tmp_path) == {"data.bin.biopsy-partial"}


def test_pauses_double(server, tmp_path, monkeypatch):
    base, does = server
    pauses: list[float] = []
    monkeypatch.setattr(transfer.time, "sleep", lambda s: pauses.append(s) if s else None)
    does.answers = [503, 500, 429]
    get(data_file(base), tmp_path, retry=RetryPolicy(tries=4, backoff_s=2.0))
    assert pauses == [2.0, 4.0, 8.0]
    assert (tmp_path / "data.bin").read_bytes() == BODY


@pytest.mark.parametrize(("status", "reason"), [(404, "missing"), (403, "refused"), (410, "missing")])
def test_a_refusal_is_final(server, tmp_path, status, reason):
    base, does = server
    does.answers = [status]
    with refuses(DownloadError, status, reason=reason):
        get(data_file(base), tmp_path)
    assert len(does.asked) == 1
    assert names(tmp_path) == set()


def test_no_server_at_all(server, tmp_path):
    with refuses(DownloadError, "http://127.0.0.1:9/data.bin", "3 times", reason="offline"):
        get(RemoteFile("http://127.0.0.1:9/data.bin"), tmp_path)


def test_silence_counts_as_dropped(server, tmp_path):
    base, does = server
    does.pause_s = 0.5
    with refuses(DownloadError, "1 times", reason="offline"):
        get(data_file(base), tmp_path, retry=RetryPolicy(tries=1, backoff_s=0.0, timeout_s=0.1))


def test_wrong_checksum_leaves_nothing(server, tmp_path):
    base, _ = server
    with refuses(DownloadError, "data.bin", "sha256", reason="changed"):
        get(data_file(base, checksum=sha256(b"something else")), tmp_path)
    assert names(tmp_path) == set()


def test_md5_is_checked_too(server, tmp_path):
    base, _ = server
    get(data_file(base, checksum="md5:" + hashlib.md5(BODY).hexdigest()), tmp_path / "right")
    with refuses(DownloadError, "md5", reason="changed"):
        get(data_file(base, checksum="md5:" + "0" * 32), tmp_path / "wrong")


def test_another_length_is_refused_before_a_byte_is_kept(server, tmp_path):
    base, _ = server
    with refuses(DownloadError, "3,000,000", "2,999,999", reason="changed"):
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
    (tmp_path / "data.bin.biopsy-partial").write_bytes(BODY)
    get(data_file(base), tmp_path)
    assert does.asked == []
    (tmp_path / "data.bin").rename(tmp_path / "data.bin.biopsy-partial")
    get(data_file(base, size_bytes=None), tmp_path)  # size unknown: the server's 416 says that it is whole
    assert does.asked == ["bytes=3000000-"]
    assert (tmp_path / "data.bin").read_bytes() == BODY


@pytest.mark.parametrize("known", [True, False], ids=["size known", "size unknown"])
def test_a_partial_file_longer_than_the_file_starts_again(server, tmp_path, known):
    base, _ = server
    (tmp_path / "data.bin.biopsy-partial").write_bytes(BODY + b"more")
    get(data_file(base) if known else data_file(base, size_bytes=None), tmp_path)
    assert (tmp_path / "data.bin").read_bytes() == BODY


def test_another_part_than_requested_is_refused(server, tmp_path):
    base, does = server
    does.wrong_range = True
    (tmp_path / "data.bin.biopsy-partial").write_bytes(BODY[:1000])
    with refuses(DownloadError, "range", ".biopsy-partial", reason="changed"):
        get(data_file(base), tmp_path)
    assert (tmp_path / "data.bin.biopsy-partial").read_bytes() == BODY[:1000]


def test_another_beginning_is_detected(server, tmp_path):
    base, _ = server
    (tmp_path / "data.bin.biopsy-partial").write_bytes(b"x" * 1000)
    with refuses(DownloadError, "sha256", "discarded", reason="changed"):
        get(data_file(base), tmp_path)
    get(data_file(base), tmp_path)
    assert (tmp_path / "data.bin").read_bytes() == BODY


def test_too_little_room_is_reported_before_anything_starts(server, tmp_path, monkeypatch):
    base, does = server
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(10**9, 10**9, 2_999_999))
    with refuses(DownloadError, "0.0 GB", tmp_path, reason="disk"):
        get(data_file(base), tmp_path)
    assert does.asked == []
    with refuses(
        DownloadError, "data.bin", tmp_path, reason="disk"
    ):  # size known only once the server says it
        get(data_file(base, size_bytes=None), tmp_path)
    assert len(does.asked) == 1 and names(tmp_path) == set()


def test_room_for_what_is_missing_is_enough(server, tmp_path, monkeypatch):
    base, _ = server
    (tmp_path / "data.bin.biopsy-partial").write_bytes(BODY[:2_500_000])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(10**9, 10**9, 500_000))
    get(data_file(base), tmp_path)
    assert (tmp_path / "data.bin").read_bytes() == BODY


def test_a_disk_that_fills_up_is_no_dropped_connection(server, tmp_path, monkeypatch):
    base, does = server

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(transfer.os, "fsync", full)
    with refuses(DownloadError, "No space left on", reason="disk"):
        get(data_file(base), tmp_path)
    assert len(does.asked) == 1
    assert names(tmp_path) == {"data.bin.biopsy-partial"}


def test_the_folder_is_a_file(server, tmp_path):
    base, _ = server
    (tmp_path / "taken").write_text("")
    with refuses(DownloadError, "taken", reason="disk"):
        get(data_file(base), tmp_path / "taken")


def test_progress_goes_up_to_the_end(server, tmp_path, monkeypatch):
    base, does = server
    monkeypatch.setattr(transfer, "REPORT_EVERY_S", 0.0)
    seconds = itertools.count()  # a clock on which every report takes one second
    monkeypatch.setattr(transfer, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    does.pause_s = 0.02
    (tmp_path / "data.bin.biopsy-partial").write_bytes(BODY[:1_000_000])
    seen = []
    get(data_file(base), tmp_path, on_progress=seen.append)
    done = [progress.done_bytes for progress in seen]
    assert done == sorted(done) and done[0] > 1_000_000 and done[-1] == len(BODY)
    assert len(done) >= 4
    assert {(p.file, p.step, p.total_bytes) for p in seen} == {("data.bin", "download", len(BODY))}
    assert seen[-1].bytes_per_s == (len(BODY) - 1_000_000) / len(seen)  # the kept 1 MB is not counted


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


def test_a_packed_file_fetched_by_hand_is_used_and_kept(server, tmp_path):
    base, does = server
    packed = gzip.compress(BODY)
    (tmp_path / "x.h5.gz").write_bytes(packed)
    get(RemoteFile(f"{base}/x.h5.gz", len(packed), sha256(packed), len(BODY)), tmp_path)
    assert names(tmp_path) == {"x.h5", "x.h5.gz"} and does.asked == []
    (tmp_path / "y.h5.gz").write_bytes(packed[:-1] + b"?")
    with refuses(DownloadError, "y.h5.gz", reason="changed"):
        get(RemoteFile(f"{base}/y.h5.gz", len(packed), sha256(packed), len(BODY)), tmp_path)
    assert names(tmp_path) == {"x.h5", "x.h5.gz", "y.h5.gz"}


def test_a_broken_packed_file_leaves_nothing_unpacked(server, tmp_path):
    base, does = server
    does.bodies = {"/x.h5.gz": gzip.compress(BODY)[:-1000]}
    with refuses(DownloadError, "x.h5.gz", reason="changed"):
        get(RemoteFile(f"{base}/x.h5.gz", unpacked_bytes=len(BODY)), tmp_path)
    assert names(tmp_path) == {"x.h5.gz.biopsy-packed"}


def test_room_counts_packed_and_unpacked(server, tmp_path, monkeypatch):
    base, does = server
    packed = gzip.compress(BODY)
    file = RemoteFile(f"{base}/x.h5.gz", len(packed), sha256(packed), len(BODY))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(0, 0, len(packed) + len(BODY) - 1))
    with refuses(DownloadError, "test ", tmp_path, reason="disk"):
        get(file, tmp_path)
    assert does.asked == []
