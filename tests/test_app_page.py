"""The page in a real browser: tiles arrive, the slider recolours, clicks and keys do what they say."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import biopsy
from biopsy.core.files import read_json, write_json
from biopsy.phantom.slides import make_phantom_slide
from biopsy.slides.maps import SlideMap
from slide_maps import make_classifier

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
CHROMIUM = next((path for name in ("chromium", "google-chrome") if (path := shutil.which(name))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
    pytest.mark.filterwarnings("default"),
]
READY = "body[data-ready=yes]"
COUNT_TISSUE = """() => {
    const canvas = document.getElementById("canvas");
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    let tissue = 0;
    for (let at = 0; at < data.length; at += 4) tissue += data[at] - data[at + 1] > 25;
    return tissue / (data.length / 4);
}"""
PICTURE = "() => document.getElementById('canvas').toDataURL()"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def show(browser):
    """``show(*paths, width=1280)`` serves the paths and opens the page; returns it and its address."""
    servers, failures = [], []

    def show_paths(*paths, width=1280):
        code = "import sys, biopsy; biopsy.view(sys.argv[1:], port=0, no_browser=True)"
        server = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, paths)], stdout=subprocess.PIPE, text=True
        )
        servers.append(server)
        address = server.stdout.readline().strip()
        page = browser.new_page(viewport={"width": width, "height": 800})
        page.on("pageerror", lambda error: failures.append(str(error)))
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        page.wait_for_selector(READY, timeout=60_000)
        page.wait_for_timeout(1000)
        assert all(url.startswith((address, "data:", "blob:")) for url in asked)
        return page

    yield show_paths
    for server in servers:
        server.kill()
        server.communicate()
    assert not failures, f"the page failed: {failures}"


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    """A phantom slide and its map by an untrained classifier."""
    place = tmp_path_factory.mktemp("phantom")
    path = place / "phantom.tiff"
    make_phantom_slide(path, seed=0, width=2400, height=1800, mpp=2.0)
    biopsy.slide(make_classifier(mpp=2.0), [path], out=place / "maps", device="cpu", precision="fp32")
    return path, place / "maps"


def place_on_screen(page, x, y):
    """Return where a place of the slide is on the screen, by the address: key/x/y/scale of the centre."""
    _, centre_x, centre_y, scale = page.evaluate("location.hash.slice(1).split('/')")
    box = page.locator("#canvas").bounding_box()
    scale = float(scale)
    return (
        box["x"] + box["width"] / 2 + (x - float(centre_x)) * scale,
        box["y"] + box["height"] / 2 + (y - float(centre_y)) * scale,
    )


def facts_of(page):
    names, values = page.locator("#facts dt").all_inner_texts(), page.locator("#facts dd").all_inner_texts()
    return dict(zip(names, values, strict=True))


def test_a_phantom_slide_is_seen_mapped_and_corrected(show, phantom):
    _, maps = phantom
    page = show(maps)
    page.select_option("#layer", "none")
    page.wait_for_timeout(300)
    assert page.evaluate(COUNT_TISSUE) > 0.02
    page.select_option("#layer", "prob")
    before = page.evaluate(PICTURE)
    requests = []
    page.on("request", lambda request: requests.append(request.url))
    page.locator("#only-positive").check()
    page.evaluate("""() => { const slider = document.getElementById("threshold"); slider.value = 0.9;
        slider.dispatchEvent(new Event("input")); }""")
    page.wait_for_timeout(200)
    assert page.evaluate(PICTURE) != before and not requests  # recoloured without a round trip
    assert page.locator("#threshold-value").inner_text() == "0.900"
    frame = pd.read_parquet(maps / "phantom" / "map.parquet")
    for row in frame.sample(3, random_state=1).itertuples():
        page.mouse.click(*place_on_screen(page, row.x + 8, row.y + 8))
        page.wait_for_timeout(400)
        facts = facts_of(page)
        assert facts["x, y (px)"] == f"{row.x}, {row.y}"
        assert float(facts["P(IDC)"]) == pytest.approx(row.prob, abs=6e-5)
    page.keyboard.press("w")
    page.wait_for_timeout(400)
    assert page.locator("#annotation-count").inner_text() == "0 right, 1 wrong, 0 unsure"
    page.reload()
    page.wait_for_selector(READY)
    page.wait_for_timeout(500)
    assert page.locator("#annotation-count").inner_text() == "0 right, 1 wrong, 0 unsure"
    assert page.locator("#scale-text").inner_text().endswith(("µm", "mm"))


def test_areas_unlike_training_are_marked_in_list_line_and_outlines(show, phantom, tmp_path):
    maps = shutil.copytree(phantom[1], tmp_path / "maps")
    page = show(maps)
    assert "relied" not in page.locator("main").inner_text()
    summary = read_json(maps / "phantom" / "summary.json")
    summary["out_of_distribution"] = {"n_checked": 100, "share": 0.6, "quantile": 0.99}
    write_json(maps / "phantom" / "summary.json", summary)
    slide_map = SlideMap.from_parquet(maps / "phantom" / "map.parquet")
    outlines = []
    for share in (0, 1):
        ood = np.full(len(slide_map), share, np.float32)
        replace(slide_map, ood=ood).to_parquet(maps / "phantom" / "map.parquet")
        page = show(maps)
        assert "mm² predicted IDC (not to be relied on)" in page.locator("#slides").inner_text()
        assert "60%" in page.locator("#area-warning").inner_text()
        page.locator("#show-ood").uncheck() if share else None
        page.select_option("#layer", "none")
        page.locator("#show-regions").check()
        page.wait_for_timeout(500)
        assert page.locator("#region-warning").is_visible() == bool(share)
        assert ("dashed" in page.locator("#region-classes").inner_text()) == bool(share)
        outlines.append(page.evaluate(PICTURE))
    assert outlines[0] != outlines[1]


def test_regions_are_drawn_and_named_by_a_key(show, phantom):
    _, maps = phantom
    page = show(maps)
    page.locator("#canvas").focus()
    page.keyboard.press("d")
    box = page.locator("#canvas").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 60, y - 60)
    page.mouse.down()
    for dx, dy in [(60, -60), (60, 60), (-60, 60), (-60, -50)]:
        page.mouse.move(x + dx, y + dy, steps=5)
    page.mouse.up()
    page.wait_for_timeout(400)
    page.keyboard.press("2")
    page.wait_for_timeout(400)
    with page.expect_download() as download:
        page.locator("#export-geojson").click()
    assert download.value.suggested_filename == "phantom.geojson"
    assert '"idc"' in Path(download.value.path()).read_text(encoding="utf-8")


def test_wheel_drag_keys_and_pinch_move_the_slide(show, phantom):
    page = show(*phantom)
    scale = lambda: float(page.evaluate("location.hash.split('/')[3]"))  # noqa: E731
    start = scale()
    box = page.locator("#canvas").bounding_box()
    page.mouse.move(box["x"] + 200, box["y"] + 200)
    page.mouse.wheel(0, -600)
    page.wait_for_timeout(300)
    zoomed = scale()
    assert zoomed > 2 * start
    before = page.evaluate("location.hash")
    page.mouse.down()
    page.mouse.move(box["x"] + 260, box["y"] + 240, steps=4)
    page.mouse.up()
    page.wait_for_timeout(200)
    assert page.evaluate("location.hash") != before and scale() == zoomed
    page.keyboard.press("0")
    page.wait_for_timeout(200)
    assert scale() == pytest.approx(start, rel=1e-3)


def test_labels_of_a_stitched_slide_go_through_prepare(show, make_idc_zip, tmp_path):
    source = make_idc_zip()
    pack = biopsy.prepare(source, tmp_path / "idc.pack")
    page = show(tmp_path / "idc.pack")
    assert page.evaluate(COUNT_TISSUE) > 0.02
    slide = page.locator("#slides button[aria-current=true]").inner_text().splitlines()[0]
    [row, *_] = np.flatnonzero(pack.table["slide_id"] == slide)
    x, y = (int(pack.table[axis].iloc[row]) for axis in "xy")
    page.mouse.click(*place_on_screen(page, x + 4, y + 4))
    page.wait_for_timeout(400)
    assert facts_of(page)["patch"] == pack.table["patch_id"].iloc[row]
    page.keyboard.press("w")
    page.wait_for_timeout(400)
    page.locator("#show-sheet").click()
    page.wait_for_selector(".patch.wrong")
    with page.expect_download() as download:
        page.locator("#export-labels").click()
    again = biopsy.prepare(source, tmp_path / "again.pack", labels=download.value.path())
    assert np.flatnonzero(again.target != pack.target).tolist() == [row]


def test_colours_are_named_beside_the_slide(show, phantom):
    page = show(phantom[1])
    assert "P(IDC)" in page.locator("#legend").inner_text()
    page.select_option("#class", "0")
    assert "P(non-IDC)" in page.locator("#legend").inner_text()
    page.select_option("#layer", "pred")
    shown = page.locator("#legend span").all_inner_texts()
    assert shown[:2] == ["predicted non-IDC", "predicted IDC"]
    colours = [
        page.locator("#legend .swatch").nth(index).evaluate("one => one.style.backgroundColor")
        for index in range(2)
    ]
    assert colours == ["rgb(0, 114, 178)", "rgb(213, 94, 0)"]
    page.select_option("#layer", "none")
    assert not page.locator("#legend").is_visible()


def test_a_filter_changed_while_patches_load_shows_only_what_it_names(show, make_idc_zip, tmp_path):
    pack = biopsy.prepare(make_idc_zip(), tmp_path / "idc.pack")
    page = show(pack.path)
    page.locator("#show-sheet").click()
    page.wait_for_selector(".patch")
    page.evaluate("""() => { for (const value of ["non", "", "idc"]) {
        const field = document.getElementById("filter-value");
        field.value = value;
        field.dispatchEvent(new Event("change")); } }""")
    n_idc = int((pack.target == 1).sum())
    playwright.expect(page.locator(".patch")).to_have_count(n_idc)
    page.wait_for_timeout(800)
    assert page.locator(".patch span").all_inner_texts() == ["IDC"] * n_idc
    page.fill("#filter-value", "nobody")
    page.press("#filter-value", "Enter")
    page.wait_for_timeout(500)
    assert "nobody" in page.locator("#sheet-help").inner_text() and not page.locator(".patch").count()


def test_a_narrow_screen_shows_the_slide_and_opens_its_panels(show, phantom):
    page = show(phantom[1], width=390)
    assert page.locator("#canvas").bounding_box()["width"] >= 380
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert not page.locator("#panel").is_visible()
    page.locator("#show-panel").click()
    assert page.locator("#opacity").is_visible()
    page.locator("#show-list").click()
    assert page.locator("#slides").is_visible() and not page.locator("#opacity").is_visible()
    page.locator("#show-list").click()
    row = pd.read_parquet(phantom[1] / "phantom" / "map.parquet").iloc[0]
    page.mouse.click(*place_on_screen(page, row.x + 8, row.y + 8))
    page.wait_for_timeout(500)
    probability = page.locator("#facts dd").nth(1).bounding_box()
    panel = page.locator("#panel").bounding_box()
    assert panel["y"] <= probability["y"] <= panel["y"] + panel["height"]


def test_a_slide_that_cannot_be_opened_is_named_and_the_next_one_shown(show, phantom, tmp_path):
    slide, _ = phantom
    (tmp_path / "a-broken.tiff").write_bytes(b"II*\0 not a slide")
    for name in ("b-sound.tiff", "c-removed.tiff"):
        shutil.copy(slide, tmp_path / name)
    page = show(tmp_path)
    note = page.locator("#note")
    assert "a-broken.tiff" in note.inner_text() and "b-sound" in page.inner_text("#title")
    assert page.evaluate(COUNT_TISSUE) > 0.1
    (tmp_path / "c-removed.tiff").unlink()
    page.get_by_role("button", name="c-removed").click()
    note.filter(has_text="c-removed.tiff").wait_for()
    assert "b-sound" in page.inner_text("#title") and page.evaluate(COUNT_TISSUE) > 0.1
    page.get_by_role("button", name="b-sound").click()
    note.wait_for(state="hidden")
