"""How fast the page of `biopsy view` is in Chromium: first tile, a map of 100,000 patches, panning.

Command::

    python benchmarks/viewer_speed.py [--turns 5] [--work DIR]

A phantom slide of 10,000 x 10,000 pixels (0.5 um/px) is mapped by an untrained network on patches of
`PATCH_PX` px. The server is a process of its own and has been asked nothing before the first turn; each turn
opens a new browser context of 1280 x 800 px (Playwright, headless, no GPU), without a cache.

* ``first tile``: from the start of the navigation until the first tile of the slide has arrived;
* ``map shown``: from the start of the navigation until the page is ready, with the map's layer loaded;
* ``frame, median`` and ``frame, 95 %``: time between two frames while the slide is dragged at its own
  resolution for `PAN_S` seconds, with the map over it.

Rows (median, least and greatest of the turns) go to ``results/viewer-speed.csv``.
"""

import argparse
import csv
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import pandas as pd
import torch
from playwright.sync_api import Browser, sync_playwright
from torch import nn

import biopsy
from biopsy.phantom.slides import make_phantom_slide

RESULTS = Path(__file__).parent / "results" / "viewer-speed.csv"
SLIDE_PX, MPP, PATCH_PX, PAN_S = 10_000, 0.5, 23, 3.0
ARRIVALS = """(part) => performance.getEntriesByType("resource")
    .filter(entry => entry.name.includes(part)).map(entry => entry.responseEnd)"""
COUNT_FRAMES = """() => { window.frames_at = []; const tick = now => { window.frames_at.push(now);
    requestAnimationFrame(tick); }; requestAnimationFrame(tick); }"""


def make_map(folder: Path) -> tuple[Path, int]:
    """Write the slide and its map; return the folder of the map and its number of patches."""
    path = folder / "slides" / "phantom.tiff"
    path.parent.mkdir(exist_ok=True)
    if not path.exists():
        make_phantom_slide(path, seed=0, width=SLIDE_PX, height=SLIDE_PX, mpp=MPP)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 5, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    module = nn.Sequential(network, nn.Linear(4, 2))
    classifier = biopsy.Classifier.wrap(module, class_names=["normal", "tumour"], input_px=PATCH_PX, mpp=MPP)
    biopsy.slide(classifier, [path], out=folder / "maps", device="cpu")
    return folder / "maps", len(pd.read_parquet(folder / "maps" / "phantom" / "map.parquet", columns=["x"]))


def measure(browser: Browser, address: str) -> dict[str, float]:
    """Open the page once, and drag the slide."""
    context = browser.new_context(viewport={"width": 1280, "height": 800}, bypass_csp=True)
    page = context.new_page()
    page.goto(address, wait_until="commit")
    page.wait_for_function("document.body?.dataset.ready === 'yes'")
    ready = max(page.evaluate("performance.now()"), *page.evaluate(ARRIVALS, "/layer"))
    page.wait_for_function("performance.getEntriesByType('resource').some(e => e.name.includes('/tiles/'))")
    first = min(page.evaluate(ARRIVALS, "/tiles/"))
    key = page.evaluate("location.hash.slice(1).split('/')[0]")
    page.evaluate(f"location.hash = '{key}/{SLIDE_PX // 2}/{SLIDE_PX // 2}/1'")
    page.wait_for_timeout(1500)
    box = page.locator("#canvas").bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.evaluate(COUNT_FRAMES)
    start, step = time.monotonic(), 0
    while time.monotonic() - start < PAN_S:
        step += 1
        page.mouse.move(x - (7 * step) % 500, y - (5 * step) % 300)
    times = page.evaluate("window.frames_at")
    page.mouse.up()
    context.close()
    frames = sorted(after - before for before, after in pairwise(times))
    return {
        "first tile": first,
        "map shown": ready,
        "frame, median": statistics.median(frames),
        "frame, 95 %": frames[int(0.95 * len(frames))],
    }


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "viewer-speed")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    maps, n_patches = make_map(args.work)
    code = "import sys, biopsy; biopsy.view(sys.argv[1:], port=0, no_browser=True)"
    server = subprocess.Popen([sys.executable, "-c", code, str(maps)], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    address = server.stdout.readline().strip()
    try:
        with sync_playwright() as running:
            options = ["--no-sandbox", "--disable-gpu"]
            browser = running.chromium.launch(executable_path=shutil.which("chromium"), args=options)
            turns = [measure(browser, address) for _ in range(args.turns)]
    finally:
        server.kill()
    with open(RESULTS, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["measure", "median_ms", "least_ms", "greatest_ms", "turns", "patches", "slide_px"])
        for name in turns[0]:
            values = [turn[name] for turn in turns]
            figures = [f"{value:.0f}" for value in (statistics.median(values), min(values), max(values))]
            writer.writerow([name, *figures, args.turns, n_patches, SLIDE_PX])
    print(RESULTS.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
