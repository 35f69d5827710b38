"""The REST interface: equal to ``biopsy predict``, bounded, and unmoved by what hostile clients send."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import cv2
import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient
from filelock import FileLock

import biopsy
from biopsy.app.batching import Batcher, Busy
from biopsy.app.jobs import Jobs
from biopsy.app.service import Limits, make_service
from biopsy.core.errors import DataError, RunError
from biopsy.core.files import LOCK, write_json
from biopsy.models.engine import Engine
from biopsy.slide_io.reader import Slide, open_slide
from biopsy.statistics.abstention import predict_sets
from biopsy.training.open_model import open_classifier
from conftest import encode_png
from refusals import refuses
from slide_maps import make_classifier, save_classifier

LIMITS = Limits(images=20, image_bytes=50_000, predict_bytes=500_000, upload_bytes=5_000_000, waiting_jobs=3)


@pytest.fixture
def images(trained_run, tmp_path):
    """Ten patches as PNG files."""
    pack = trained_run.open_pack(verify=False)
    folder = tmp_path / "images"
    folder.mkdir()
    for row in range(10):
        (folder / f"{row}.png").write_bytes(encode_png(pack.patches[row]))
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def client(trained_run, tmp_path_factory):
    app = make_service(trained_run, out=tmp_path_factory.mktemp("served"), device="cpu", limits=LIMITS)
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def send(client, files, **options):
    parts = [("images", (path.name, path.read_bytes())) for path in files]
    return client.post("/predict", files=parts, **options)


def test_predictions_are_those_of_predict(client, trained_run, images, tmp_path):
    expected = biopsy.predict(trained_run, images, out=tmp_path / "p.csv", device="cpu").frame
    answer = send(client, images).json()
    found = answer["predictions"]
    assert [item["name"] for item in found] == expected["patch_id"].tolist()
    for item, row in zip(found, expected.to_dict("records"), strict=True):
        assert item["prob"] == pytest.approx(row["prob"], abs=1e-5)
        assert item["probs"]["idc"] == pytest.approx(row["prob_idc"], abs=1e-5)
        assert item["pred"] == trained_run.classifier.info.class_names[row["pred"]]
        assert item["ood"]["feature_distance"] == pytest.approx(row["feature_distance"], rel=1e-4)
        assert item["ood"]["out_of_distribution"] == row["out_of_distribution"]
    assert answer["classifier_sha256"] == trained_run.classifier.sha256
    alone = send(client, images[:1]).json()["predictions"][0]
    assert alone["prob"] == pytest.approx(found[0]["prob"], abs=1e-5)


@pytest.mark.parametrize("shipped", ["idc", pytest.param("pcam", marks=pytest.mark.slow)])
def test_a_shipped_classifier_answers_as_predict_does(tmp_path, shipped):
    """In one batch of all images and alone: probability, decision, prediction set, abstention, distances."""
    rng, folder = np.random.default_rng(0), tmp_path / "images"
    folder.mkdir()
    for index in range(24):  # from smooth tissue colours to noise
        colour = rng.uniform((150, 90, 140), (240, 200, 230))
        noise = cv2.GaussianBlur(rng.normal(0, 10 + 8 * index, (50, 50, 3)), (0, 0), 2.0)
        pixels = (colour + noise).clip(0, 255).astype(np.uint8)
        (folder / f"{index:02}.png").write_bytes(encode_png(pixels))
    images = sorted(folder.iterdir())
    classifier = open_classifier(shipped)
    expected = biopsy.predict(classifier, images, out=tmp_path / "p.csv", device="cpu").frame
    limits = replace(LIMITS, images=24)
    with TestClient(make_service(shipped, out=tmp_path / "jobs", device="cpu", limits=limits)) as client:
        [model] = client.get("/models").json()
        together = send(client, images).json()["predictions"]
        alone = [send(client, [path]).json()["predictions"][0] for path in images[::8]]
    assert model["threshold"] == classifier.single_patch().threshold
    assert model["classifier_sha256"] == classifier.sha256
    if shipped == "idc":
        assert model["threshold_with_neighbours"] == classifier.threshold != model["threshold"]
    else:
        assert model["threshold_with_neighbours"] is None
    names, quantiles = model["class_names"], classifier.single_patch().info.conformal.get("quantiles")
    for item, row in zip(together, expected.to_dict("records"), strict=True):
        assert item["name"] == row["patch_id"]
        assert item["prob"] == pytest.approx(row["prob"], abs=1e-6)
        assert (item["pred"] == names[1]) == row["pred"] == (item["prob"] >= model["threshold"])
        assert item["abstained"] == row["abstained"]
        probs = np.array([[row[f"prob_{name}"] for name in names]])
        inside = None if quantiles is None else np.array(names)[predict_sets(probs, quantiles)[0]].tolist()
        assert item["prediction_set"] == inside
        for name in ("colour_distance", "feature_distance"):
            assert item["ood"][name] == pytest.approx(row[name], rel=1e-5, abs=1e-6)
        assert item["ood"]["out_of_distribution"] == row["out_of_distribution"]
    for one, other in zip(alone, together[::8], strict=True):
        assert one["prob"] == pytest.approx(other["prob"], abs=1e-6)
    assert expected["out_of_distribution"].any()


def test_many_clients_at_once_get_their_own_answers(client, images):
    expected = {item["name"]: item["prob"] for item in send(client, images).json()["predictions"]}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: send(client, [images[n % 10], images[(n + 3) % 10]]), range(32)))
    for n, answer in enumerate(answers):
        names = [images[n % 10].stem, images[(n + 3) % 10].stem]
        predictions = answer.json()["predictions"]
        assert [Path(item["name"]).stem for item in predictions] == names
        for item in predictions:
            assert item["prob"] == pytest.approx(expected[item["name"]], abs=1e-6)


def read_count(client, name):
    """Read one of the counters of a server."""
    return float(client.get("/metrics").text.partition(f"{name} ")[2].split("\n")[0])


def test_models_health_metrics_and_description(client, images):
    counts = ('biopsy_patches_total{model="run"}', 'biopsy_requests_total{path="/predict",status="200"}')
    send(client, images[:1])
    before = [read_count(client, name) for name in counts]
    send(client, images[:3])
    [model] = client.get("/models").json()
    assert model["class_names"] == ["non_idc", "idc"] and model["patch_px"] == 16
    assert model["class_titles"] == ["non-IDC", "IDC"]
    assert client.get("/health").json()["status"] == "ok"
    metrics = client.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain")
    assert [read_count(client, name) for name in counts] == [before[0] + 3, before[1] + 1]
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/predict", "/slides", "/slides/{identity}", "/models", "/health", "/metrics"} <= set(paths)


def test_images_of_another_kind_are_named_and_the_others_predicted(client, images, tmp_path):
    large = tmp_path / "large.png"
    large.write_bytes(encode_png(np.zeros((17, 40, 3), np.uint8)))
    text, cut = tmp_path / "text.png", tmp_path / "cut.png"
    text.write_text("no image")
    cut.write_bytes(images[0].read_bytes()[:-30])
    answer = send(client, [images[0], large, text, cut])
    assert answer.status_code == 200
    assert [item["name"] for item in answer.json()["predictions"]] == [images[0].name]
    assert [item["source"] for item in answer.json()["skipped"]] == ["large.png", "text.png", "cut.png"]
    assert send(client, [text]).status_code == 422
    bomb = tmp_path / "bomb.png"
    header = bytearray(encode_png(np.zeros((1, 1, 3), np.uint8)))
    header[16:24] = (100_000).to_bytes(4, "big") * 2
    bomb.write_bytes(header)
    refused = send(client, [bomb])
    assert refused.status_code == 422 and "Traceback" not in refused.text


def test_limits_are_kept(client, images):
    assert send(client, images * 3).status_code == 413
    assert client.post("/predict", content=b"x" * 600_000).status_code == 413
    chunks = (b"x" * 50_000 for _ in range(20))  # without a content-length
    form = {"content-type": "multipart/form-data; boundary=b"}
    assert client.post("/predict", content=chunks, headers=form).status_code in (400, 413)
    assert client.post("/predict").status_code == 422
    assert client.post("/predict?model=other", files=[("images", ("a.png", b"x"))]).status_code == 404
    huge = client.post("/slides", json={"path": "x" * 100_000})
    assert huge.status_code in (413, 422)
    deep = client.post("/slides", content=b"[" * 50_000, headers={"content-type": "application/json"})
    assert deep.status_code in (400, 422) and set(deep.json()) == {"error"}
    assert client.get("/health").status_code == 200


def test_a_full_queue_answers_with_a_time_to_retry(trained_run, images, tmp_path):
    limits = replace(LIMITS, waiting_patches=5)
    app = make_service(trained_run, out=tmp_path / "jobs", device="cpu", limits=limits)
    with TestClient(app, raise_server_exceptions=False) as client:
        refused = send(client, images)
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert send(client, images[:5]).status_code == 200  # and nothing of the refused one is left waiting
        assert app.state.service.batchers["run"].waiting == 0


def test_nothing_accepted_is_lost_when_the_queue_overflows(trained_run):
    classifier, pack = trained_run.classifier, trained_run.open_pack(verify=False)
    batcher = Batcher(classifier, engine=Engine("cpu"), max_waiting=30)
    accepted, refused = [], 0
    for n in range(300):
        try:
            batcher.reserve(1)
        except Busy as busy:
            refused += 1
            assert busy.retry_after_s >= 1
            continue
        accepted.append((n, batcher.submit([str(n)], [np.asarray(pack.patches[n % 10])])))
    answers = [(n, future.result(timeout=60)) for n, future in accepted]
    batcher.close()
    assert refused and len(answers) + refused == 300 and batcher.waiting == 0
    assert all(frame["patch_id"].tolist() == [str(n)] for n, frame in answers)


def test_patches_that_would_wait_too_long_are_refused(trained_run):
    pack = trained_run.open_pack(verify=False)
    batcher = Batcher(trained_run.classifier, engine=Engine("cpu"), max_waiting=10**6, max_wait_s=1e-6)
    batcher.reserve(10)  # nobody waits yet
    with pytest.raises(Busy):
        batcher.reserve(1)
    batcher.submit(list("0123456789"), list(pack.patches[:10])).result(timeout=60)
    batcher.reserve(1)
    batcher.release(1)
    batcher.close()


def test_an_error_in_a_batch_reaches_those_who_wait(trained_run, monkeypatch):
    monkeypatch.setattr("biopsy.app.batching.predict_patches", lambda *args, **options: 1 / 0)
    batcher = Batcher(trained_run.classifier, engine=Engine("cpu"), max_waiting=30)
    batcher.reserve(1)
    with pytest.raises(ZeroDivisionError):
        batcher.submit(["a"], [np.zeros((16, 16, 3), np.uint8)]).result(timeout=60)
    batcher.close()
    assert batcher.waiting == 0


def test_clients_that_have_gone_cost_the_others_nothing(trained_run):
    pack = trained_run.open_pack(verify=False)
    batcher = Batcher(trained_run.classifier, engine=Engine("cpu"), max_waiting=300)
    batcher.reserve(60)
    futures = [batcher.submit([str(n)], [np.asarray(pack.patches[n])]) for n in range(60)]
    gone = [future.cancel() for future in futures[1::2]]
    for n in range(0, 60, 2):
        assert futures[n].result(timeout=60)["patch_id"].tolist() == [str(n)]
    batcher.close()
    assert any(gone) and batcher.waiting == 0


def test_a_token_is_needed_where_there_is_one(trained_run, images, tmp_path):
    app = make_service(trained_run, out=tmp_path / "jobs", device="cpu", token="secret")
    with TestClient(app) as client:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic secret"}):
            refused = client.get("/models", headers=headers)
            assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
        for scheme in ("Bearer", "bearer"):
            assert client.get("/models", headers={"authorization": f"{scheme} secret"}).status_code == 200
        assert client.get("/health").status_code == 200
        assert send(client, images[:1]).status_code == 401


def test_another_machine_needs_a_token_and_a_taken_port_is_named(trained_run, tmp_path, monkeypatch):
    monkeypatch.delenv("BIOPSY_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    with refuses(DataError, "0.0.0.0", "--token"):
        biopsy.serve(trained_run, host="0.0.0.0")
    from biopsy.app.web import bind

    for port in (-1, 65536):
        with refuses(DataError, f"port={port}", 65535):
            bind("127.0.0.1", port, default=8900)
    with bind("127.0.0.1", None, default=8900) as taken:
        with refuses(DataError, taken.getsockname()[1], "--port"):
            bind("127.0.0.1", taken.getsockname()[1], default=8900)
        with refuses(DataError, taken.getsockname()[1], "--port"):
            biopsy.serve(tmp_path / "no_model", port=taken.getsockname()[1])
        with refuses(DataError, taken.getsockname()[1], "--port"):
            biopsy.view(tmp_path / "no_slide", port=taken.getsockname()[1])
        with bind("127.0.0.1", None, default=taken.getsockname()[1]) as free:
            assert free.getsockname()[1] != taken.getsockname()[1]
    with pytest.raises(RunError):
        make_service(tmp_path, out=tmp_path / "jobs")


def test_a_server_that_cannot_start_ends_with_one_reason(tmp_path, monkeypatch):
    monkeypatch.delenv("BIOPSY_TOKEN", raising=False)
    save_classifier(tmp_path / "classifier")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "jobs").mkdir()
    with FileLock(tmp_path / "jobs" / LOCK):
        for out in ("jobs", "file"):
            with refuses(DataError, tmp_path / out, "--out"):
                biopsy.serve(tmp_path / "classifier", port=0, out=tmp_path / out, device="cpu")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.fixture
def slides(make_slide, tmp_path):
    """A service that may read slides below a folder with one slide in it."""
    root = tmp_path / "slides"
    root.mkdir()
    path = make_slide("case.tiff", width=900, height=600)
    path.rename(root / "case.tiff")
    (tmp_path / "secret.tiff").write_bytes(b"secret")
    (root / "link.tiff").symlink_to(tmp_path / "secret.tiff")
    app = make_service(make_classifier(), out=tmp_path / "jobs", root=root, device="cpu", limits=LIMITS)
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client, root / "case.tiff"


def wait_for(client, identity, *, seconds=60):
    for _ in range(seconds * 20):
        job = client.get(f"/slides/{identity}").json()
        if job["status"] in ("done", "failed"):
            return job
        time.sleep(0.05)
    raise AssertionError(job)


def test_a_slide_below_the_root_is_mapped(slides, tmp_path):
    client, path = slides
    answer = client.post("/slides", json={"path": "case.tiff"})
    assert answer.status_code == 202
    job = wait_for(client, answer.json()["id"])
    assert job["status"] == "done" and job["progress"] == 1 and str(tmp_path) not in json.dumps(job)
    regions = client.get(f"/slides/{job['id']}/regions.geojson")
    assert regions.json()["type"] == "FeatureCollection"
    expected = biopsy.slide(make_classifier(), path, device="cpu")
    import io

    import pandas as pd

    frame = pd.read_parquet(io.BytesIO(client.get(f"/slides/{job['id']}/map.parquet").content))
    np.testing.assert_allclose(frame["prob"], expected.to_frame()["prob"], atol=1e-6)
    for name in ("label.png", "macro.png", "job.json", "upload", "..%2fjob.json", "overlay.png"):
        assert client.get(f"/slides/{job['id']}/{name}").status_code == 404
    assert client.delete(f"/slides/{job['id']}").status_code == 200
    assert client.get(f"/slides/{job['id']}").status_code == 404
    assert not (tmp_path / "jobs" / job["id"]).exists()


def test_tiles_of_a_slide_below_the_root_are_its_pixels(slides):
    client, path = slides
    job = client.post("/slides", json={"path": "case.tiff"}).json()["id"]
    about = client.get(f"/slides/{job}/tiles").json()
    assert (about["width"], about["height"], about["levels"], about["tile_px"]) == (900, 600, 2, 512)
    answer = client.get(f"/slides/{job}/tiles/0/1_0.jpg")
    assert answer.headers["content-type"] == "image/jpeg"
    tile = cv2.imdecode(np.frombuffer(answer.content, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    with open_slide(path) as slide:
        expected = slide.read_at(512, 0, 388, 512, mpp=slide.mpp)
    assert tile.shape == expected.shape
    smooth = [cv2.blur(image.astype(np.float32), (9, 9)) for image in (tile, expected)]
    assert np.abs(smooth[0] - smooth[1]).mean() < 2 < np.abs(smooth[0] - np.flip(smooth[1], 1)).mean()
    missing = [
        f"/slides/{job}/tiles/0/2_0.jpg",
        f"/slides/{job}/tiles/2/0_0.jpg",
        "/slides/none/tiles/0/0_0.jpg",
    ]
    assert {client.get(address).status_code for address in missing} <= {404, 422}
    assert wait_for(client, job)["status"] == "done"
    uploaded = client.post("/slides?name=mine.tiff", content=path.read_bytes()).json()["id"]
    wait_for(client, uploaded)
    assert client.get(f"/slides/{uploaded}/tiles").status_code == 404


def test_slides_are_closed_when_others_take_their_place_and_with_the_server(
    make_slide, tmp_path, monkeypatch
):
    closed = []
    close = Slide.close

    def record(slide):
        closed.append(slide.path.name)
        close(slide)

    monkeypatch.setattr(Slide, "close", record)
    monkeypatch.setattr("biopsy.app.service._OPEN_SLIDES", 2)
    monkeypatch.setattr("biopsy.app.jobs.Jobs._map", lambda self, identity: None)  # nobody else opens them
    names = ["a.tiff", "b.tiff", "c.tiff"]
    for name in names:
        make_slide(name, width=300, height=300).rename(tmp_path / name)
    app = make_service(make_classifier(), out=tmp_path / "jobs", root=tmp_path, device="cpu")
    with TestClient(app) as client:
        jobs = [client.post("/slides", json={"path": name}).json()["id"] for name in names]
        for job in [*jobs, jobs[2], jobs[1]]:
            assert client.get(f"/slides/{job}/tiles/0/0_0.jpg").status_code == 200
        assert closed == ["a.tiff"]
    assert sorted(closed) == names


def test_an_uploaded_slide_is_mapped_and_not_kept(slides, tmp_path):
    client, path = slides
    answer = client.post("/slides?name=mine.tiff", content=path.read_bytes())
    job = wait_for(client, answer.json()["id"])
    assert job["status"] == "done" and job["name"] == "mine.tiff"
    assert not list((tmp_path / "jobs").rglob("upload"))


def test_two_servers_do_not_share_a_folder_and_cut_uploads_are_removed(trained_run, tmp_path):
    cut = tmp_path / "jobs" / "0123456789abcdef" / "upload"
    cut.mkdir(parents=True)
    (cut / "slide.svs").write_bytes(b"half")
    (tmp_path / "jobs" / "mine").mkdir()
    with TestClient(make_service(trained_run, out=tmp_path / "jobs", device="cpu")) as client:
        assert not cut.parent.exists() and (tmp_path / "jobs" / "mine").exists()
        assert not client.get("/slides").json()
        with refuses(DataError, tmp_path / "jobs", "server", "--out"):
            TestClient(make_service(trained_run, out=tmp_path / "jobs", device="cpu")).__enter__()


def test_paths_out_of_the_root_are_refused(slides):
    client, _ = slides
    statuses = {
        "../secret.tiff": 403,
        "/etc/passwd": 403,
        "link.tiff": 403,
        "nothing.tiff": 422,
        "case\0.tiff": 422,
        "": 422,
        ".": 422,
        "case.tiff/../../secret.tiff": 403,
    }
    for path, status in statuses.items():
        refused = client.post("/slides", json={"path": path})
        assert refused.status_code == status and set(refused.json()) == {"error"}, path
        assert not client.get("/slides").json()


def test_other_names_and_other_sites_pages_are_refused(trained_run, tmp_path):
    hosts = frozenset({"127.0.0.1", "testserver"})
    with TestClient(make_service(trained_run, out=tmp_path / "jobs", device="cpu", hosts=hosts)) as client:
        assert client.get("/models", headers={"host": "evil.example"}).status_code == 421
        for origin in ("http://evil.example", "null", "http://testserver.evil.example"):
            assert client.post("/slides", json={}, headers={"origin": origin}).status_code == 403
        preflight = {"origin": "http://evil.example", "access-control-request-method": "POST"}
        refused = client.options("/predict", headers=preflight)
        assert refused.status_code == 403 and "access-control-allow-origin" not in refused.headers
        assert client.get("/models", headers={"origin": "http://testserver"}).status_code == 200


def test_head_is_get_without_the_body(client):
    for place in ("/health", "/models", "/openapi.json", "/slides"):
        got, head = client.get(place), client.head(place)
        assert head.status_code == got.status_code == 200 and not head.content
        assert head.headers["content-length"] == got.headers["content-length"]
    assert client.head("/predict").status_code == 405


def test_without_a_root_no_path_is_read(client):
    assert client.post("/slides", json={"path": "case.tiff"}).status_code == 403


def test_bad_uploads_leave_nothing(slides, tmp_path):
    client, _ = slides
    assert client.post("/slides", content=b"x").status_code == 422
    assert client.post("/slides?name=../../evil.sh", content=b"x").status_code == 422
    assert client.post("/slides?name=a.svs", content=b"").status_code == 400
    assert client.post("/slides?name=a.svs", content=b"x" * 6_000_000).status_code == 413
    assert client.post("/slides?name=a.svs&mpp=-1", content=b"x").status_code == 422
    chunks = (b"x" * 500_000 for _ in range(20))
    assert client.post("/slides?name=a.svs", content=chunks).status_code == 413
    assert not client.get("/slides").json() and not list((tmp_path / "jobs").glob("*/"))
    job = wait_for(client, client.post("/slides?name=a.svs", content=b"no slide").json()["id"])
    assert job["status"] == "failed" and job["error"] and str(tmp_path) not in job["error"]


def test_jobs_are_bounded(slides, monkeypatch):
    client, _ = slides
    going = threading.Event()
    monkeypatch.setattr("biopsy.app.jobs.slide", lambda *args, **options: going.wait(30))
    answers = [client.post("/slides", json={"path": "case.tiff"}) for _ in range(6)]
    codes = [answer.status_code for answer in answers]
    going.set()
    assert codes[:3] == [202] * 3 and codes[-1] == 429 and int(answers[-1].headers["retry-after"]) > 0


@contextmanager
def serving(folder, *arguments):
    """Serve in a process of its own, killed at the end; yields the process and its address."""
    code = (
        "import sys, biopsy\n"
        "biopsy.serve(sys.argv[1], port=0, root=sys.argv[2], out=sys.argv[3], device='cpu')"
    )
    command = [sys.executable, "-c", code, *map(str, arguments)]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


@pytest.mark.slow
def test_a_killed_server_finishes_its_slides_when_it_is_back(make_slide, tmp_path):
    root = tmp_path / "slides"
    root.mkdir()
    make_slide("case.tiff", width=6000, height=5000).rename(root / "case.tiff")
    save_classifier(tmp_path / "classifier")
    arguments = (tmp_path / "classifier", root, tmp_path / "jobs")
    with (
        serving(tmp_path, *arguments) as (process, address),
        httpx.Client(base_url=address, timeout=60) as client,
    ):
        identity = client.post("/slides", json={"path": "case.tiff"}).json()["id"]
        while client.get(f"/slides/{identity}").json()["status"] == "queued":
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
    document = json.loads((tmp_path / "jobs" / identity / "job.json").read_text())
    assert document["status"] == "running"
    with (
        serving(tmp_path, *arguments) as (process, address),
        httpx.Client(base_url=address, timeout=60) as client,
    ):
        assert wait_for(client, identity)["status"] == "done"
        process.send_signal(signal.SIGINT)
        process.wait(30)


def test_jobs_that_do_not_fit_are_reported_and_the_next_one_is_mapped(make_slide, tmp_path, caplog):
    first, other, broken = "0" * 16, "1" * 16, "2" * 16
    job = {
        "format": "biopsy-job/1",
        "id": first,
        "model": "tiny",
        "classifier": "",
        "name": "case.tiff",
        "mpp": None,
        "path": None,
        "status": "queued",
        "error": None,
        "created": "",
        "finished": None,
    }
    for name, document in ((first, job), (other, job), (broken, {**job, "status": 1})):
        (tmp_path / "jobs" / name).mkdir(parents=True)
        write_json(tmp_path / "jobs" / name / "job.json", document)
    jobs = Jobs(tmp_path / "jobs", {"tiny": make_classifier()}, root=tmp_path, device="cpu", max_waiting=9)
    try:
        last = jobs.add("tiny", make_slide(), None)["id"]
        while jobs.get(last)["status"] not in ("done", "failed"):
            time.sleep(0.05)
        assert jobs.get(last)["status"] == "done"
        assert jobs.get(first)["status"] == "failed" and "job.json" in jobs.get(first)["error"]
        assert {job["id"] for job in jobs.list()} == {first, last}
    finally:
        jobs.close()
    assert other in caplog.text and broken in caplog.text


def test_headers_that_do_not_come_end_the_connection():
    """Over a real socket: half a request line; and half of a second request on an open connection."""
    code = """if True:
        import biopsy.app.web as web
        from fastapi import FastAPI
        web.HEADERS_S = 0.5
        app = FastAPI()
        app.get("/")(lambda: "here")
        listener = web.bind("127.0.0.1", None, default=8950)
        web.run_server(app, listener, on_start=lambda: print(listener.getsockname()[1], flush=True))"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        try:
            place = "127.0.0.1", int(process.stdout.readline())
            whole, half = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"GET / HTTP/1.1\r\nHos"
            for first in (b"", whole):
                with socket.create_connection(place, timeout=8) as connection:
                    if first:
                        connection.sendall(first)
                        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
                    start = time.monotonic()
                    connection.sendall(half)
                    while connection.recv(1000):
                        pass
                    assert time.monotonic() - start < 5
            assert httpx.get(f"http://127.0.0.1:{place[1]}/").json() == "here"
        finally:
            process.kill()


@pytest.mark.slow
def test_slow_clients_and_cut_uploads_are_let_go(tmp_path):
    """Over a real socket: a body that does not come, and one that ends before its length."""
    save_classifier(tmp_path / "classifier")

    def wait_for_jobs(client, n):
        for _ in range(200):
            if len(client.get("/slides").json()) == n:
                return
            time.sleep(0.05)
        raise AssertionError(client.get("/slides").json())

    with (
        serving(tmp_path, tmp_path / "classifier", tmp_path, tmp_path / "jobs") as (_, address),
        httpx.Client(base_url=address, timeout=60) as client,
    ):
        place = client.base_url.host, client.base_url.port
        head = (
            f"POST /slides?name=a.svs HTTP/1.1\r\nHost: {place[0]}\r\nContent-Length: 1000\r\n\r\n".encode()
        )
        with socket.create_connection(place) as cut, socket.create_connection(place) as slow:
            cut.sendall(head + b"x" * 10)
            slow.sendall(head)
            wait_for_jobs(client, 2)
            assert client.get("/health").status_code == 200
            cut.close()
            wait_for_jobs(client, 1)
        wait_for_jobs(client, 0)
        assert not list((tmp_path / "jobs").glob("*/"))
