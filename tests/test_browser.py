"""The report in a real browser: it asks nothing of a network and runs without scripts."""

import json
import shutil
import subprocess
from dataclasses import replace

import cv2
import numpy as np
import pytest

from biopsy.reporting.compose import report_of_run
from biopsy.reporting.html import render_report
from report_facts import make_facts, make_predictions

CHROMIUM = next(
    (path for name in ("chromium", "google-chrome", "chrome") if (path := shutil.which(name))), None
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
]
NOBODY = "not an origin"
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-quic", "--disable-default-apps",
)  # fmt: skip


def browse(page, folder, *flags):
    """Open a page, and give what it looks like."""
    shot = folder / f"{len(list(folder.glob('*.png')))}.png"
    flags = (
        f"--user-data-dir={folder / 'profile'}",
        f"--screenshot={shot}",
        "--window-size=1200,4000",
        *flags,
    )
    command = [CHROMIUM, *QUIET, *flags, page.as_uri()]
    subprocess.run(command, capture_output=True, timeout=120, check=True)
    return cv2.imread(str(shot))


def requests_of(log):
    """List the addresses a page asked for; what the browser itself asks has no origin in its net log."""
    events = json.loads(log.read_text(encoding="utf-8", errors="replace"))["events"]
    asked = [event.get("params", {}) for event in events]
    return {item["url"] for item in asked if "url" in item and item.get("initiator", NOBODY) != NOBODY}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    patients = [str(10000 + n) for n in range(50)]
    facts = make_facts(patients, predictions=make_predictions(patients, patches_per_patient=100))
    assert len(facts.predictions) == 5000
    noise = np.random.default_rng(0).integers(0, 256, (50, 50, 3), dtype=np.uint8)  # the worst to compress
    path.write_text(render_report(report_of_run(replace(facts, get_patch=lambda patch_id: noise))))
    return path


def test_no_request_leaves_the_page(page, tmp_path):
    log = tmp_path / "net.json"
    browse(page, tmp_path, f"--log-net-log={log}")
    assert not {url for url in requests_of(log) if not url.startswith(("file:", "data:"))}


def test_a_page_that_does_ask_is_caught(tmp_path):
    page, log = tmp_path / "asks.html", tmp_path / "net.json"
    page.write_text('<img src="http://127.0.0.1:9/picture.png">')
    browse(page, tmp_path, f"--log-net-log={log}")
    assert any(url.startswith("http://127.0.0.1:9/") for url in requests_of(log))


def test_it_is_small_for_five_thousand_patches(page):
    assert page.stat().st_size < 5_000_000


def test_it_is_seen_whole_while_no_script_may_run(page, tmp_path):
    """Its own policy forbids scripts: one that would empty the page changes nothing."""
    script = "<script>document.body.innerHTML = ''</script>"
    text, altered, allowed = page.read_text(), tmp_path / "altered.html", tmp_path / "allowed.html"
    altered.write_text(text.replace("</body>", f"{script}</body>"))
    allowed.write_text(altered.read_text().replace("Content-Security-Policy", "X-None"))
    seen = browse(page, tmp_path)
    assert (browse(altered, tmp_path) == seen).all() and seen.std() > 20
    assert browse(allowed, tmp_path).std() == 0
