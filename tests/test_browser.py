"""Reports in a real browser: what is seen on a laptop, a phone and paper, without a network."""

import re
import shutil
from dataclasses import replace

import numpy as np
import pytest

from biopsy.reporting.compose import report_of_run
from biopsy.reporting.document import Case, Cases, Section
from biopsy.reporting.html import render_report
from report_facts import make_facts, make_predictions

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
CHROMIUM = next(
    (path for name in ("chromium", "google-chrome", "chrome") if (path := shutil.which(name))), None
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.peer,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
]
WIDTHS = {"laptop": (1280, 800), "phone": (390, 844)}
MOST_PAGES = 12  # in print, of a report on five patients


def noise(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (50, 50, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def report_path(tmp_path_factory):
    """A report on five patients, with pictures of 5,000 patches that hardly compress."""
    patients = [f"patient_with_a_long_name_{10000 + n}" for n in range(5)]
    facts = make_facts(patients, predictions=make_predictions(patients, patches_per_patient=1024))
    document = report_of_run(replace(facts, get_patch=lambda patch_id: noise()))
    picture = b"\x89PNG\r\n\x1a\n"  # broken: only its place counts
    case = Case([(picture, "patch"), (picture, "saliency")], ["0.950", "patch_a", "false negative"])
    shown = Section("cases", "Cases", [Cases("False negatives", [("patient 1", [case] * 9)])])
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render_report(replace(document, sections=[*document.sections, shown])))
    return path


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=WIDTHS.values(), ids=WIDTHS)
def page(browser, report_path, request):
    width, height = request.param
    page = browser.new_page(viewport={"width": width, "height": height})
    page.failures = []
    page.on("pageerror", lambda error: page.failures.append(str(error)))
    page.on("console", lambda message: page.failures.append(message.text))
    page.on("request", lambda request: page.failures.append(request.url) if is_outside(request.url) else None)
    page.goto(report_path.as_uri())
    yield page
    page.close()


def is_outside(url):
    return not url.startswith(("file:", "data:"))


def test_nothing_runs_off_the_page_and_nothing_is_asked_of_a_network(page):
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    outside = page.evaluate(
        "[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, svg') &&"
        " e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"
    )
    assert outside == [] and page.failures == []


def test_a_table_that_scrolls_reports_it(page):
    tables = page.evaluate(
        "[...document.querySelectorAll('.scroll')].filter(e => e.checkVisibility()).map(e =>"
        " [e.scrollWidth > e.clientWidth + 1, !e.previousElementSibling.hidden, e.tabIndex === 0])"
    )
    assert tables and all(scrolls == cue == focus for scrolls, cue, focus in tables)
    assert any(scrolls for scrolls, *_ in tables) == (page.viewport_size["width"] == 390)


def test_the_verdict_is_on_the_first_screen_and_the_contents_lead_to_each_section(page):
    box = page.locator(".verdict").bounding_box()
    assert box["y"] + box["height"] < page.viewport_size["height"]
    contents = page.locator("nav details")
    if page.viewport_size["width"] == 390:
        assert not contents.evaluate("e => e.open")
        contents.locator("summary").click()
    page.locator("nav a", has_text="Per-patient results").click()
    assert page.evaluate("location.hash") == "#patients"


def test_a_table_is_sorted_and_filtered(page):
    table = page.locator("#patients table").first
    column = "[...document.querySelector('#patients table').tBodies[0].rows].map(r => r.cells[3].textContent)"
    page.locator("#patients th button", has_text="AUROC").first.click()
    ascending = page.evaluate(column)
    known = [float(value) for value in ascending if value != "-"]
    assert known == sorted(known) and ascending[-1] == "-"
    page.locator("#patients th button", has_text="AUROC").first.click()
    descending = page.evaluate(column)
    assert [float(value) for value in descending[:-1]] == known[::-1] and descending[-1] == "-"
    assert table.locator("th[aria-sort=descending]").count() == 1
    page.locator("#numbers input[type=search]").first.fill("specificity at")
    assert page.locator("#numbers table").first.locator("tbody tr:visible").count() == 2


def test_a_picture_is_enlarged_by_mouse_and_keyboard(page):
    picture = page.locator("#slides figure > svg").first
    before = picture.bounding_box()["width"]
    picture.focus()
    page.keyboard.press("Enter")
    assert page.locator("dialog[open] svg").bounding_box()["width"] > 0.9 * before
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Escape")
    assert page.locator("dialog[open]").count() == 0
    page.locator("#cases figure img").first.click()
    assert "false negative" in page.locator("dialog figcaption").inner_text()


def test_every_picture_and_control_has_a_name(page):
    assert page.evaluate("[...document.images].filter(e => !e.alt).length") == 0
    assert page.evaluate("[...document.querySelectorAll('svg[role=button]:not([aria-label])')].length") == 0
    assert page.evaluate("document.documentElement.lang") == "en"


def test_texts_stand_out_from_their_background(page):
    """WCAG 2.2 AA: a ratio of luminances of at least 4.5."""
    colours = page.evaluate(
        "[...document.querySelectorAll('main p, main td, main th, main figcaption, nav a, summary')].map(e =>"
        " [getComputedStyle(e).color, getComputedStyle(e).backgroundColor])"
    )
    for text, ground in {tuple(pair) for pair in colours}:
        ground = "rgb(255, 255, 255)" if "0)" in ground and "rgba" in ground else ground
        assert contrast(text, ground) >= 4.5, (text, ground)


def contrast(first, second):
    lights = []
    for colour in (first, second):
        linear = [
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
            for c in (int(part) / 255 for part in re.findall(r"\d+", colour)[:3])
        ]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(lights) + 0.05) / (min(lights) + 0.05)


def test_five_patients_are_printed_on_twelve_pages(browser, report_path):
    page = browser.new_page()
    page.goto(report_path.as_uri())
    printed = page.pdf(format="A4", print_background=True)
    page.close()
    assert 1 < len(re.findall(rb"/Type /Page\b", printed)) <= MOST_PAGES


def test_only_its_own_script_runs(browser, report_path, tmp_path):
    altered = tmp_path / "altered.html"
    script = "<script>document.body.innerHTML = ''</script>"
    altered.write_text(report_path.read_text().replace("</body>", f"{script}</body>"))
    page = browser.new_page()
    page.goto(altered.as_uri())
    assert page.locator("main h1").count() == 1
    page.close()


def test_it_is_read_without_its_script_as_well(browser, report_path):
    page = browser.new_page(java_script_enabled=False)
    page.goto(report_path.as_uri())
    assert page.locator("nav a").first.is_visible() and page.locator("#patients table").first.is_visible()
    page.close()


def test_it_is_small_for_five_thousand_patches(report_path):
    assert report_path.stat().st_size < 5_000_000
