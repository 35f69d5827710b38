"""Inputs and outputs by URL: results of local files, bounded copies, nothing left, nothing else asked."""

import functools
import http.server
import shutil
import threading
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest

from biopsy.core import storage
from biopsy.core.errors import DataError, DownloadError, MissingExtra
from biopsy.core.files import LOCK
from biopsy.core.storage import identify, list_files, parse_url, show_url, stage, staged, uploaded
from biopsy.data.inspection import inspect
from biopsy.data.ledger import count_openings, record_opening
from biopsy.slides.cohorts import slide
from biopsy.slides.sources import list_sources
from biopsy.training.train import open_data
from conftest import write_pack
from refusals import refuses
from slide_maps import save_classifier

fsspec = pytest.importorskip("fsspec")


@pytest.fixture(autouse=True)
def staging(tmp_path, monkeypatch):
    """Copies lie in a folder of this test, and are gone when it ends."""
    folder = tmp_path / "staging"
    monkeypatch.setenv("BIOPSY_STAGING", str(folder))
    yield folder
    storage._kept.close()
    assert not folder.exists() or not list(folder.iterdir())


@pytest.fixture
def memory():
    """An fsspec file system in memory, empty."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
    return fs


@pytest.fixture
def web(tmp_path):
    """A folder, its address on a server, and the paths that were requested."""
    folder, requested = tmp_path / "web", []
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            requested.append(self.path)

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}", requested
    server.shutdown()
    server.server_close()


@pytest.fixture
def s3(monkeypatch):
    """An empty bucket on an S3-compatible server that runs here: its address, and a file system."""
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    fs = fsspec.filesystem("s3", skip_instance_cache=True)
    fs.makedirs("bucket", exist_ok=True)  # the server's state outlives it in one process
    yield "s3://bucket", fs
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    server.stop()


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != LOCK)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("s3://bucket/x.svs", "s3://bucket/x.svs"),
        ("s3:/bucket/x.svs", "s3://bucket/x.svs"),
        ("https:/host/x?a=b", "https://host/x?a=b"),
        ("slides/x.svs", None),
        ("C:/slides", None),
        ("file:///etc/passwd", None),
        ("github://a:b@c/d", None),
        ("simplecache::s3://bucket/x", None),
        ("s3:bucket", None),
        ("x/http://host/y", None),
    ],
)
def test_only_listed_schemes_are_urls(text, url):
    assert parse_url(text) == url


def test_secrets_of_a_url_are_not_shown():
    assert show_url("https://me:pw@host/x.svs?token=abc") == "https://host/x.svs"


def test_a_folder_is_copied_whole_and_removed(memory, staging):
    memory.pipe({"/a/x.pack/one": b"1", "/a/x.pack/deep/two": b"22"})
    with staged("memory://a/x.pack") as path:
        assert path.name == "x.pack" and contents(path) == {"one": b"1", "deep/two": b"22"}
    assert not list(staging.iterdir())
    assert stage("memory://a/x.pack/one").read_bytes() == b"1"
    assert stage("x.pack") == "x.pack"


def test_copies_are_bounded(memory, staging, monkeypatch):
    memory.pipe({"/a": bytes(3000), "/b": bytes(3000)})
    monkeypatch.setenv("BIOPSY_STAGING_GB", "5e-6")
    with staged("memory://a"), refuses(DataError, "BIOPSY_STAGING_GB"), staged("memory://b"):
        pass
    with staged("memory://b"):
        pass
    monkeypatch.setenv("BIOPSY_STAGING_GB", "many")
    with refuses(DataError, "BIOPSY_STAGING_GB", "many"), staged("memory://a"):
        pass


def test_missing_files_and_paths_outside_are_refused(memory, monkeypatch):
    with refuses(DownloadError, "memory://nothing", reason="missing"), staged("memory://nothing"):
        pass
    memory.pipe({"/f/x": b""})
    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "find", Mock(side_effect=PermissionError("Access Denied")))
        with refuses(DownloadError, "memory://f", "Access Denied", reason="refused"):
            list_files("memory://f")
    monkeypatch.setattr(type(memory), "find", lambda *_, **__: {"/f/../../x": {"size": 1}})
    with refuses(DataError, "../../x"):
        list_files("memory://f")


def test_a_missing_package_is_named(monkeypatch):
    def fail(url):
        raise ImportError("no s3fs")

    monkeypatch.setattr("fsspec.core.url_to_fs", fail)
    with refuses(MissingExtra, extra="storage"), staged("s3://bucket/x"):
        pass


def test_a_new_version_of_a_file_has_another_identity(memory):
    memory.pipe("/a", b"1")
    first = identify("memory://a")
    assert identify("memory://a") == first
    memory.pipe("/a", b"22")
    assert identify("memory://a") != first


def test_outputs_are_uploaded_also_when_the_command_fails(memory):
    memory.pipe({"/out/old": b"old", "/out/gone": b"gone"})
    with pytest.raises(KeyboardInterrupt), uploaded("memory://out") as folder:
        assert (folder / "old").read_bytes() == b"old"
        (folder / "gone").unlink()
        (folder / "deep").mkdir()
        (folder / "deep" / "new").write_bytes(b"new")
        raise KeyboardInterrupt
    left = {name: memory.cat_file(name) for name in memory.find("/out")}
    assert left == {"/out/old": b"old", "/out/deep/new": b"new"}


def test_a_folder_that_is_not_there_yet_is_made(memory):
    with uploaded("memory://new/maps") as folder:
        assert folder.name == "maps" and not list(folder.iterdir())
        (folder / "map").write_bytes(b"1")
    assert memory.cat_file("/new/maps/map") == b"1"


def test_copies_of_unknown_sizes_are_bounded_together(memory, staging, monkeypatch):
    memory.pipe({f"/a/{name}": bytes(2000) for name in "xyz"})
    files = {name: replace(file, size=None) for name, file in list_files("memory://a").items()}
    monkeypatch.setattr(storage, "list_files", lambda url: files)
    monkeypatch.setenv("BIOPSY_STAGING_GB", "5e-6")
    with refuses(DataError, "BIOPSY_STAGING_GB"), staged("memory://a"):
        pass
    assert not list(staging.iterdir())
    monkeypatch.setenv("BIOPSY_STAGING_GB", "7e-6")
    with staged("memory://a") as path:
        assert contents(path) == {name: bytes(2000) for name in "xyz"}


def test_pages_of_links_are_folders(web):
    folder, address, _ = web
    (folder / "deep").mkdir()
    for name in ("a.tiff", "deep/b.tiff"):
        (folder / name).write_bytes(b"1")
    for root in (address, f"{address}/"):
        assert list_files(root).keys() == {"a.tiff", "deep/b.tiff"}
    assert list_files(f"{address}/deep/").keys() == {"b.tiff"}
    assert list_files(f"{address}/a.tiff").keys() == {""}


def test_a_pack_by_url_is_the_pack(memory, tmp_path):
    pack = write_pack(tmp_path)
    memory.put(str(pack.path), "/data/x.pack", recursive=True)
    remote = open_data("memory://data/x.pack")
    assert remote.info.content_sha256 == pack.info.content_sha256
    np.testing.assert_array_equal(np.asarray(remote.patches), np.asarray(pack.patches))
    assert (
        inspect("memory:/data/x.pack", out=tmp_path / "seen")["blocking_issues"]
        == (inspect(pack, out=tmp_path / "seen-too")["blocking_issues"])
    )


def test_evaluations_of_a_pack_by_url_are_counted_with_the_run(memory, tmp_path):
    pack = write_pack(tmp_path)
    memory.put(str(pack.path), "/data/x.pack", recursive=True)
    remote = open_data("memory://data/x.pack")
    (tmp_path / "run").mkdir()
    entry = {"run": "r", "recipe": "c", "seed": 0, "split": "s", "fold": None, "subset": "test"}
    assert record_opening(remote, tmp_path / "run", entry).parent == tmp_path / "run"
    counted = count_openings(remote, split="s", run_dir=tmp_path / "run")
    assert (counted["times"], counted["kept_with"]) == (1, "run")
    assert record_opening(pack, tmp_path / "run", entry).parent == pack.path


@pytest.mark.slow
def test_slides_on_a_web_server_are_mapped_as_local_ones(web, make_slide, tmp_path, staging):
    folder, address, requested = web
    for seed in range(3):
        shutil.move(make_slide(f"{seed}.tiff", seed=seed), folder)
    (folder / "notes.txt").write_text("no slide")
    model = save_classifier(tmp_path / "c")
    whole = slide(model, folder, out=tmp_path / "whole", device="cpu")
    cohort = slide(model, f"{address}/", out=tmp_path / "out", device="cpu")
    assert cohort.status["source"].tolist() == [f"{address}/{seed}.tiff" for seed in range(3)]
    for one, other in zip(whole, cohort, strict=True):
        np.testing.assert_array_equal(one.probs, other.probs)
    n_requests = sum(path == "/0.tiff" for path in requested)
    slide(model, f"{address}/", out=tmp_path / "out", device="cpu")
    assert sum(path == "/0.tiff" for path in requested) <= n_requests + 2  # looked at, not read again
    assert not list(staging.iterdir())
    single = slide(model, f"{address}/1.tiff?token=secret", device="cpu")
    np.testing.assert_array_equal(single.probs, list(whole)[1].probs)


def test_a_slide_that_goes_away_is_set_aside(web, make_slide, tmp_path):
    folder, address, _ = web
    for name in ("a.tiff", "b.tiff"):
        shutil.move(make_slide(name), folder)
    sources = [f"{address}/a.tiff", f"{address}/b.tiff"]
    list_sources(sources, None)
    cohort_out = tmp_path / "out"
    original = storage.staged

    def lose(url):
        if url.endswith("a.tiff"):
            (folder / "a.tiff").unlink(missing_ok=True)
        return original(url)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("biopsy.slides.inference.staged", lose)
        cohort = slide(save_classifier(tmp_path / "c"), sources, out=cohort_out, device="cpu")
    assert cohort.status["status"].tolist() == ["failed", "done"]


def test_no_request_is_made_for_a_value_of_a_table(web, make_slide, tmp_path, monkeypatch):
    folder, address, requested = web
    shutil.move(make_slide("x.tiff"), folder)
    monkeypatch.chdir(tmp_path)
    pd.DataFrame({"slide": [f"{address}/x.tiff"]}).to_csv("list.csv", index=False)
    with pytest.raises(DataError):
        slide(save_classifier(tmp_path / "c"), "list.csv", out=tmp_path / "out", device="cpu")
    assert requested == []


def test_addresses_that_several_processes_cannot_share_are_refused(make_slide, tmp_path):
    model, source = save_classifier(tmp_path / "c"), make_slide()
    with refuses(DataError, "memory://maps", "out=DIR"):
        slide(model, source, out="memory://maps", shard="1/2")
    with refuses(DataError, "http://127.0.0.1:9/maps"):
        slide(model, source, out="http://127.0.0.1:9/maps")


@pytest.mark.slow
def test_slides_and_maps_on_s3_are_those_of_local_folders(s3, make_slide, tmp_path, staging):
    address, fs = s3
    local = tmp_path / "slides"
    local.mkdir()
    for seed in range(3):
        shutil.move(make_slide(f"{seed}.tiff", seed=seed), local)
    fs.put(str(local), "bucket/slides", recursive=True)
    model = save_classifier(tmp_path / "c")
    whole = slide(model, local, out=tmp_path / "whole", device="cpu")
    slide(model, f"{address}/slides", out=f"{address}/maps", device="cpu")
    storage._kept.close()
    fs.invalidate_cache()
    fs.get("bucket/maps", str(tmp_path / "maps"), recursive=True)
    found = contents(tmp_path / "maps")
    assert found.keys() == contents(tmp_path / "whole").keys()
    for name in ("0", "1", "2"):
        assert found[f"{name}/overlay.png"] == (tmp_path / "whole" / name / "overlay.png").read_bytes()
    modified = {name: fs.info(name)["LastModified"] for name in fs.find("bucket/maps")}
    fs.rm("bucket/maps/1/summary.json")
    again = slide(model, f"{address}/slides", out=f"{address}/maps", device="cpu")
    assert again.status["status"].tolist() == ["done"] * 3 == whole.status["status"].tolist()
    fs.invalidate_cache()
    assert fs.exists("bucket/maps/1/summary.json")
    assert fs.info("bucket/maps/0/summary.json")["LastModified"] == modified["bucket/maps/0/summary.json"]
    with refuses(DownloadError, "nothing.tiff", reason="missing"):
        slide(model, f"{address}/nothing.tiff", device="cpu")


@pytest.mark.slow
def test_a_pack_on_s3_is_the_pack(s3, tmp_path):
    address, fs = s3
    pack = write_pack(tmp_path)
    fs.put(str(pack.path), "bucket/x.pack", recursive=True)
    assert open_data(f"{address}/x.pack").info.content_sha256 == pack.info.content_sha256
