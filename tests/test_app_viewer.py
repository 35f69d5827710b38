"""The addresses of the viewer's page: what they answer, what they refuse, what annotations become."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from fastapi.testclient import TestClient

import biopsy
from biopsy.app.explaining import explain_patch
from biopsy.app.viewer import make_viewer
from biopsy.core.errors import DataError, SlideError, UserFileError
from biopsy.core.files import read_json, write_json
from biopsy.data.packs import Pack
from biopsy.slide_io.pyramids import write_pyramid
from biopsy.slides.cohorts import slide
from biopsy.slides.maps import SlideMap
from conftest import draw_slide
from refusals import refuses
from slide_maps import make_classifier, make_map
from tiny_runs import copy_run


def open_page(*paths, **options):
    return TestClient(make_viewer([*paths], **options), raise_server_exceptions=False)


def first_slide(client):
    return client.get("/api/state").json()["slides"][0]["key"]


def decode(response):
    assert response.status_code == 200 and response.headers["content-type"] == "image/jpeg"
    return cv2.imdecode(np.frombuffer(response.content, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]


def map_slide(place):
    """Write a slide and the folder of its map."""
    path = place / "case.tiff"
    write_pyramid(path, draw_slide(1400, 900), width=1400, height=900, mpp=0.5, tile_px=64)
    slide(make_classifier(), [path], out=place / "maps", device="cpu", precision="fp32")
    return path, place / "maps"


@pytest.fixture(scope="module")
def mapped(tmp_path_factory):
    """A slide, and the folder of its map, for all tests."""
    return map_slide(tmp_path_factory.mktemp("mapped"))


@pytest.fixture
def run(trained_run, tmp_path):
    return copy_run(trained_run, tmp_path)


def test_the_page_needs_nothing_of_others(make_slide):
    client = open_page(make_slide())
    page = client.get("/")
    assert page.status_code == 200 and "default-src 'none'" in page.headers["content-security-policy"]
    for name in ("page.js", "deepzoom.js", "style.css"):
        text = client.get(f"/static/{name}").text
        assert text and "http://" not in text and "https://" not in text
    assert "http" not in page.text


def test_tiles_are_the_slide(make_slide, tmp_path):
    path = make_slide(width=1400, height=900)
    client = open_page(path)
    key = first_slide(client)
    about = client.get(f"/api/slides/{key}").json()
    assert (about["width"], about["height"], about["mpp"], about["levels"]) == (1400, 900, 0.5, 3)
    from biopsy.slide_io.reader import open_slide

    with open_slide(path) as opened:
        for level, column, row in [(0, 1, 0), (0, 2, 1), (1, 0, 0), (2, 0, 0)]:
            tile = decode(client.get(f"/api/slides/{key}/tiles/{level}/{column}_{row}.jpg"))
            step = 512 * 2**level
            width, height = (
                min(512, -(-(side - at * step) // 2**level)) for side, at in ((1400, column), (900, row))
            )
            assert tile.shape[:2] == (height, width)
            wanted = opened.read_at(column * step, row * step, width, height, mpp=0.5 * 2**level)
            assert np.abs(tile.astype(int) - wanted).mean() < 7
    for place in ("0/3_0", "3/0_0", "-1/0_0", "0/0_-1"):
        refused = client.get(f"/api/slides/{key}/tiles/{place}.jpg")
        assert refused.status_code == 422 and set(refused.json()) == {"error"}


def test_a_map_finds_its_slide_and_a_click_names_its_probability(mapped):
    _, maps = mapped
    client = open_page(maps)
    [entry] = client.get("/api/state").json()["slides"]
    summary = json.loads((maps / "case" / "summary.json").read_text())
    assert entry["name"] == "case" and entry["positive_mm2"] == summary["positive"]["area_mm2"]
    frame = pd.read_parquet(maps / "case" / "map.parquet")
    about = client.get(f"/api/slides/{entry['key']}").json()
    assert not about["notes"] and about["grid"]["predicted"]
    for row in frame.sample(20, random_state=0).itertuples():
        patch = client.get(f"/api/slides/{entry['key']}/patch?x={row.x + 20}&y={row.y + 7}").json()
        assert (patch["x"], patch["y"]) == (row.x, row.y)
        assert patch["probs"]["idc"] == pytest.approx(row.prob, abs=1e-7)
        assert patch["pred"] == ("idc" if row.prob >= 0.5 else "non_idc")
    assert client.get(f"/api/slides/{entry['key']}/patch?x=1&y=1").status_code == 404
    tile = decode(client.get(f"/api/slides/{entry['key']}/tiles/0/1_0.jpg"))
    assert tile.std() > 5  # the slide, not white


def test_the_layer_is_the_map(mapped):
    _, maps = mapped
    client = open_page(maps)
    key = first_slide(client)
    grid = client.get(f"/api/slides/{key}").json()["grid"]
    content = client.get(f"/api/slides/{key}/layer").content
    size = grid["rows"] * grid["columns"]
    planes = np.frombuffer(content[: 8 * size], "<f4").reshape(2, grid["rows"], grid["columns"])
    flags = np.frombuffer(content[8 * size :], np.uint8).reshape(grid["rows"], grid["columns"])
    slide_map = SlideMap.from_parquet(maps / "case" / "map.parquet")
    np.testing.assert_array_equal(planes[1], slide_map.cells()[..., 1])
    assert (flags & 1).sum() == len(slide_map)
    regions = client.get(f"/api/slides/{key}/regions").json()
    written = json.loads((maps / "case" / "regions.geojson").read_text())["features"]
    assert len(regions) == len(written) > 0
    assert {region["class"] for region in regions} == {
        feature["properties"]["classification"]["name"] for feature in written
    }


def test_abstained_and_out_of_distribution_patches_are_flagged(tmp_path):
    cells = np.array([[0.2, 0.8], [np.nan, 0.5]])
    abstained = np.array([[True, False], [False, False]])
    make_map(cells, abstained=abstained, ood=np.array([0, 1, np.nan])).to_parquet(tmp_path / "a.parquet")
    client = open_page(tmp_path / "a.parquet")
    key = first_slide(client)
    flags = np.frombuffer(client.get(f"/api/slides/{key}/layer").content[-4:], np.uint8)
    assert flags.tolist() == [3, 5, 0, 1]
    assert client.get(f"/api/slides/{key}").json()["notes"]  # the slide is not there, and that is said
    assert client.get(f"/api/slides/{key}/patch?x=25&y=5").json()["ood"] is True


def test_regions_name_their_share_of_out_of_distribution_patches(tmp_path):
    cells = np.array([[0.9, 0.8, np.nan, 0.9], [0.2, 0.1, np.nan, 0.8]])
    ood = np.array([1, 0, np.nan, np.nan, 1, np.nan])  # of the cells with a patch, row by row
    make_map(cells, ood=ood).to_parquet(tmp_path / "a.parquet")
    client = open_page(tmp_path / "a.parquet")
    regions = client.get(f"/api/slides/{first_slide(client)}/regions").json()
    assert [(region["class"], region["ood_share"]) for region in regions] == [
        ("normal", 1.0),
        ("tumour", 0.5),
        ("tumour", None),
    ]
    make_map(cells).to_parquet(tmp_path / "b.parquet")
    client = open_page(tmp_path / "b.parquet")
    regions = client.get(f"/api/slides/{first_slide(client)}/regions").json()
    assert {region["ood_share"] for region in regions} == {None}


def test_slides_unlike_training_have_a_warning_in_the_list(tmp_path):
    _, maps = map_slide(tmp_path)
    (item,) = open_page(maps).get("/api/state").json()["slides"]
    assert item["warning"] is None
    set_share(maps / "case", 0.6)
    (item,) = open_page(maps).get("/api/state").json()["slides"]
    assert "60%" in item["warning"] and "not to be relied on" in item["warning"]


def set_share(folder, share):
    """Write a share of out-of-distribution patches into the summary of a map."""
    summary = read_json(folder / "summary.json")
    summary["out_of_distribution"] = {"n_checked": 100, "share": share, "quantile": 0.99}
    write_json(folder / "summary.json", summary)


def test_a_map_of_another_slide_is_not_laid_over_it(make_slide, tmp_path):
    path, maps = map_slide(tmp_path)
    path.unlink()
    other = make_slide("case.tiff", width=1400, height=900, seed=1)
    client = open_page(maps, other)
    about = [
        client.get(f"/api/slides/{item['key']}").json() for item in client.get("/api/state").json()["slides"]
    ]
    [map_alone] = [item for item in about if item["grid"]]
    assert "its content differs" in map_alone["notes"][0]
    tile = decode(client.get(f"/api/slides/{map_alone['key']}/tiles/0/0_0.jpg"))
    assert (tile == 255).all()


def test_a_slide_that_vanished_is_named(make_slide):
    path = make_slide()
    client = open_page(path)
    key = first_slide(client)
    path.unlink()
    refused = client.get(f"/api/slides/{key}")
    assert refused.status_code == 422 and path.name in refused.json()["error"]


def test_a_run_shows_stitched_slides_with_truth_and_a_sheet(run):
    (run.path / "report.html").write_text("<h1>the report</h1>")
    client = open_page(run.path)
    state = client.get("/api/state").json()
    pack = run.open_pack(verify=False)
    assert len(state["slides"]) == pack.table["slide_id"].nunique() and state["report"]
    assert client.get("/report").headers["content-security-policy"].startswith("sandbox")
    frame, _ = run.predictions("validation")
    row = frame.iloc[3]
    entry = next(item for item in state["slides"] if item["name"] == row["slide_id"])
    labels = client.get(f"/api/slides/{entry['key']}").json()["labels"]
    assert labels["names"] == ["non_idc", "idc"] and labels["titles"] == ["non-IDC", "IDC"]
    assert entry["positive"] == "predicted IDC"
    patch = client.get(f"/api/slides/{entry['key']}/patch?x={row['x'] + 2}&y={row['y'] + 2}").json()
    assert patch["probs"]["idc"] == pytest.approx(row["prob"], abs=1e-6)
    assert patch["patch_id"] == row["patch_id"] and patch["label"] == pack.class_names[row["target"]]
    tile = decode(client.get(f"/api/slides/{entry['key']}/tiles/0/0_0.jpg"))
    index = int(pack.rows_of([row["patch_id"]])[0])
    x, y = int(row["x"]), int(row["y"])
    shown = tile[y : y + 16, x : x + 16].astype(int)
    assert np.abs(shown - pack.patches[index]).mean() < 12
    [sheet] = state["sheets"]
    page = client.get(f"/api/sheets/{sheet['key']}?sort=prob&descending=true").json()
    probs = [item["prob"] for item in page["patches"] if item["prob"] is not None]
    assert probs == sorted(probs, reverse=True) and page["total"] == len(pack)
    subsets = dict(zip(pack.table["patch_id"], run.subsets(pack), strict=True))
    first = client.get(f"/api/sheets/{sheet['key']}").json()["patches"]
    tested = [name for name, subset in subsets.items() if subset == run.evaluated_subset][: len(first)]
    assert [patch["patch_id"] for patch in first][: len(tested)] == tested
    assert all(patch["prob"] is not None for patch in first[: len(tested)])
    errors = client.get(f"/api/sheets/{sheet['key']}?column=error&value=True").json()
    assert errors["total"] == int((frame["pred"] != frame["target"]).sum())
    image = decode(client.get(f"/api/sheets/{sheet['key']}/patches/{index}.jpg"))
    assert image.shape == (16, 16, 3)
    detail = client.get(f"/api/sheets/{sheet['key']}/patches/{index}").json()
    assert detail["on_slide"] == {"key": entry["key"], "box": [x, y, 16]}


def test_a_patch_is_explained(run):
    client = open_page(run.path)
    [sheet] = client.get("/api/state").json()["sheets"]
    response = client.get(f"/api/sheets/{sheet['key']}/explain/0")
    assert response.status_code == 200, response.text
    found = response.json()
    assert found["saliency"].startswith("data:image/jpeg;base64,")
    nearest = client.get(found["nearest"]).json()
    trained = run.open_pack(verify=False).table["patch_id"][
        run.subsets(run.open_pack(verify=False)) == "train"
    ]
    assert len(nearest) == 3 and {item["patch_id"] for item in nearest} <= set(trained)
    assert found["ood"]["feature_distance"] > 0


def test_a_patch_is_explained_where_a_distance_has_no_limit(trained_run):
    """A network whose features do not vary has the limit 0, and JSON no infinity."""
    classifier = trained_run.classifier
    classifier.info.out_of_distribution["limits"]["feature"] = 0.0
    with np.errstate(divide="ignore"):
        ood = explain_patch(classifier, trained_run.open_pack(verify=False).pixels(0).copy())["ood"]
    assert ood["feature_distance"] is None and ood["colour_distance"] > 0


def test_a_slide_that_vanishes_is_named_and_seen_again_when_it_is_back(make_slide, monkeypatch):
    path = make_slide(width=1400, height=900)
    client = open_page(path)
    tile = f"/api/slides/{first_slide(client)}/tiles/0/1_0.jpg"
    assert client.get(tile).status_code == 200

    def fail(*args, **options):
        raise SlideError("damaged")

    with monkeypatch.context() as patched:
        patched.setattr("biopsy.slide_io.reader.Slide.read_at", fail)
        assert client.get(tile).json() == {"error": "damaged"}
        moved = path.rename(path.with_suffix(".moved"))
        for _ in range(2):  # read from the open slide, then opened anew
            answer = client.get(tile)
            assert answer.status_code == 422 and str(path) in answer.json()["error"]
    moved.rename(path)
    assert client.get(tile).status_code == 200


def test_a_pack_without_coordinates_shows_its_patches(make_pack, tmp_path):
    pack = make_pack()
    images = [np.asarray(patch) for patch in pack.patches]
    labels = [pack.class_names[index] for index in pack.target]
    Pack.from_arrays(np.stack(images), labels, out=tmp_path / "plain.pack")
    client = open_page(tmp_path / "plain.pack", pack.path)
    state = client.get("/api/state").json()
    assert [sheet["name"] for sheet in state["sheets"]] == ["plain.pack", pack.path.name]
    page = client.get(f"/api/sheets/{state['sheets'][0]['key']}").json()
    assert page["total"] == len(pack)
    assert {item["sheet"] for item in state["slides"]} == {state["sheets"][1]["key"]}


def test_the_area_of_a_stitched_slide_is_that_of_its_positive_patches(make_pack):
    pack = make_pack()
    slides = open_page(pack.path).get("/api/state").json()["slides"]
    for item in slides:
        of_slide = (pack.table["slide_id"] == item["name"]).to_numpy()
        expected = (pack.target[of_slide] == pack.positive_index).sum() * (16 * pack.info.mpp / 1000) ** 2
        assert item["positive_mm2"] == pytest.approx(expected)
        assert item["positive"] == "annotated IDC"


def post(client, **said):
    return client.post("/api/annotations", json={"who": "ada", **said})


def test_labels_go_from_the_page_through_prepare(make_idc_zip, tmp_path):
    source = make_idc_zip()
    pack = biopsy.prepare(source, tmp_path / "idc.pack")
    client = open_page(tmp_path / "idc.pack")
    [sheet] = client.get("/api/state").json()["sheets"]
    for row, verdict in enumerate(["right", "wrong", "wrong", "unsure"]):
        assert post(client, place=sheet["key"], patch=row, verdict=verdict).status_code == 200
    post(client, place=sheet["key"], patch=2, verdict="removed")
    post(client, place=sheet["key"], patch=5, label=pack.class_names[1 - pack.target[5]])
    content = client.get(f"/api/export/{sheet['key']}.csv").content
    (tmp_path / "labels.csv").write_bytes(content)
    again = biopsy.prepare(source, tmp_path / "again.pack", labels=tmp_path / "labels.csv")
    changed = np.flatnonzero(again.target != pack.target)
    assert changed.tolist() == [1, 5]
    assert again.table["label_by"].iloc[1] == "ada"
    reloaded = open_page(tmp_path / "idc.pack").get("/api/annotations").json()["annotations"]
    assert [item["verdict"] for item in reloaded] == ["right", "wrong", "unsure", "wrong"]


def test_a_region_gives_its_class_to_the_patches_inside(make_pack):
    pack = make_pack()
    client = open_page(pack.path)
    [sheet], [entry, *_] = (
        client.get("/api/state").json()["sheets"],
        client.get("/api/state").json()["slides"],
    )
    rows = np.flatnonzero(pack.table["slide_id"] == entry["name"])
    x = pack.table["x"].iloc[rows].to_numpy(int)
    right = int(np.median(x)) + 8
    polygon = [[0, 0], [right, 0], [right, 10_000], [0, 10_000]]
    said = post(client, place=entry["key"], region="region-1", polygon=polygon, label="idc")
    assert said.json()["annotations"][0]["label"] == "idc"
    text = client.get(f"/api/export/{sheet['key']}.csv").text
    named = [line.split(",")[0] for line in text.splitlines()[1:]]
    assert sorted(named) == sorted(pack.table["patch_id"].iloc[rows[x + 8 < right]])
    post(client, place=entry["key"], region="region-1", verdict="removed")
    assert len(client.get(f"/api/export/{sheet['key']}.csv").text.splitlines()) == 1


def test_corrections_of_a_slide_become_labels_of_patches_cut_from_it(mapped, tmp_path):
    """GeoJSON from the page, as QuPath has it, is what ``prepare`` cuts labelled patches by."""
    path, maps = mapped
    client = open_page(maps)
    key = first_slide(client)
    post(
        client,
        place=key,
        region="region-a",
        polygon=[[700, 200], [1000, 200], [1000, 600], [700, 600]],
        label="idc",
    )
    post(
        client,
        place=key,
        region="region-b",
        polygon=[[300, 200], [600, 200], [600, 600], [300, 600]],
        label="non_idc",
    )
    frame = pd.read_parquet(maps / "case" / "map.parquet")
    patch = client.get(f"/api/slides/{key}/patch?x={frame.x[0]}&y={frame.y[0]}").json()
    post(client, place=key, patch=patch["patch"], verdict="unsure")
    response = client.get(f"/api/export/{key}.geojson")
    names = [item["properties"]["classification"]["name"] for item in response.json()["features"]]
    assert names == ["idc", "non_idc", "unsure*"]
    folder = tmp_path / "annotations"
    folder.mkdir()
    (folder / "case.geojson").write_bytes(response.content)
    pack = biopsy.prepare(path, tmp_path / "cut.pack", annotations=folder, patch_px=16, mpp=1.0)
    assert set(pack.class_names) == {"idc", "non_idc"}
    classes = np.array(pack.class_names)[pack.target]
    x = pack.table["x"].to_numpy(float)  # at 1 um/px, half of level 0's
    assert (classes[x >= 350] == "idc").all() and (classes[x + 16 <= 300] == "non_idc").all()


def test_two_reviewers_disagree(make_pack):
    pack = make_pack()
    one, other = open_page(pack.path, who="ada"), open_page(pack.path, who="bob")
    [sheet] = one.get("/api/state").json()["sheets"]
    post(one, place=sheet["key"], patch=0, verdict="right")
    post(other, place=sheet["key"], patch=0, verdict="wrong", who="bob")
    [said] = one.get("/api/annotations").json()["annotations"]
    assert said["disagree"] and said["who"] == ["ada", "bob"] and said["label"] is None
    post(one, place=sheet["key"], patch=0, verdict="wrong")
    [said] = other.get("/api/annotations").json()["annotations"]
    assert not said["disagree"] and said["label"] == pack.class_names[1 - pack.target[0]]


def test_two_pages_that_annotate_at_once_lose_nothing(make_pack):
    pack = make_pack()
    pages = [open_page(pack.path), open_page(pack.path)]
    [sheet] = pages[0].get("/api/state").json()["sheets"]

    def annotate(n):
        post(pages[n % 2], place=sheet["key"], patch=n // 2, verdict="right", who=["ada", "bob"][n % 2])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(annotate, range(40)))
    for page in pages:
        result = page.get("/api/annotations").json()["annotations"]
        assert len(result) == 20 and all(set(item["who"]) == {"ada", "bob"} for item in result)


def test_a_line_cut_off_by_a_crash_costs_only_itself(make_pack, tmp_path):
    pack = make_pack()
    client = open_page(pack.path)
    [sheet] = client.get("/api/state").json()["sheets"]
    post(client, place=sheet["key"], patch=0, verdict="right")
    post(client, place=sheet["key"], patch=1, verdict="wrong")
    file = Path(client.get("/api/state").json()["annotations"])
    file.write_bytes(file.read_bytes()[:-20])
    again = open_page(pack.path)
    assert len(again.get("/api/annotations").json()["annotations"]) == 1
    post(again, place=sheet["key"], patch=2, verdict="unsure")
    last = open_page(pack.path).get("/api/annotations").json()["annotations"]
    assert [item["verdict"] for item in last] == ["right", "unsure"]


def test_another_file_is_no_file_of_annotations(make_pack, tmp_path):
    (tmp_path / "mine.txt").write_text("my notes\n")
    with pytest.raises(UserFileError):
        make_viewer(make_pack().path, annotations=tmp_path / "mine.txt")
    assert (tmp_path / "mine.txt").read_text() == "my notes\n"


def test_where_nothing_can_be_written_it_is_reported(make_pack, tmp_path):
    pack = make_pack()
    client = open_page(pack.path, annotations=tmp_path / "missing" / "a.jsonl")
    [sheet] = client.get("/api/state").json()["sheets"]
    assert client.get("/api/state").json()["writable"] is False
    refused = post(client, place=sheet["key"], patch=0, verdict="right")
    assert refused.status_code == 422 and "cannot be written" in refused.json()["error"]


@pytest.mark.parametrize(
    "said",
    [
        {"patch": 0},
        {"patch": 10**6, "verdict": "right"},
        {"patch": -1, "verdict": "right"},
        {"patch": 0, "verdict": "perhaps"},
        {"patch": 0, "label": "no such class"},
        {"patch": 0, "verdict": "right", "label": "idc"},
        {"region": "region-1", "polygon": [[0, 0], [1, 1]], "verdict": "right"},
        {"region": "../etc", "polygon": [[0, 0], [1, 1], [2, 0]], "verdict": "right"},
    ],
)
def test_invalid_annotations_are_refused(make_pack, said):
    client = open_page(make_pack().path)
    [sheet] = client.get("/api/state").json()["sheets"]
    refused = post(client, place=sheet["key"], **said)
    assert refused.status_code in (404, 422) and set(refused.json()) == {"error"}
    assert not client.get("/api/annotations").json()["annotations"]


def test_other_sites_and_other_names_are_refused(make_pack):
    client = open_page(make_pack().path)
    assert client.get("/api/state", headers={"host": "evil.example"}).status_code == 421
    headers = {"origin": "http://evil.example"}
    assert client.get("/api/state", headers=headers).status_code == 403
    assert client.post("/api/annotations", json={}, headers=headers).status_code == 403
    assert client.post("/api/annotations", json={}, headers={"origin": "null"}).status_code == 403
    big = client.post("/api/annotations", content=b"x" * 2_000_000)
    assert big.status_code == 413
    for path in ("/static/../viewer.py", "/static/%2e%2e/viewer.py", "/static//etc/passwd"):
        assert client.get(path).status_code == 404


def test_paths_that_cannot_be_viewed_are_refused(tmp_path):
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(DataError):
            make_viewer(path)


def test_slides_that_cannot_be_opened_are_refused_or_named(make_slide, tmp_path, caplog):
    broken = tmp_path / "broken.svs"
    shutil.copy(__file__, broken)
    for paths in ([broken], [broken, shutil.copy(broken, tmp_path / "second.svs")]):
        with refuses(SlideError, broken):
            make_viewer(paths)
    client = open_page(broken, make_slide())
    assert "broken.svs" in caplog.text and "slide.tiff" not in caplog.text
    [first, second] = [entry["key"] for entry in client.get("/api/state").json()["slides"]]
    refused = client.get(f"/api/slides/{first}")
    assert refused.status_code == 422 and "Traceback" not in refused.text
    assert client.get(f"/api/slides/{second}").status_code == 200


def test_a_map_that_cannot_be_opened_is_refused(tmp_path):
    (tmp_path / "map.parquet").write_bytes(b"PAR1")
    with refuses(DataError, "map.parquet"):
        make_viewer(tmp_path)


def test_a_defect_gives_no_traceback(make_pack, monkeypatch):
    client = open_page(make_pack().path)
    monkeypatch.setattr("biopsy.app.annotations.Annotations.current", lambda self: 1 / 0)
    answer = client.get("/api/annotations")
    assert answer.status_code == 500 and answer.json() == {
        "error": "internal error; the server's log names it"
    }
