"""The checklist links to sections that are there, and says what is not done."""

import re
from pathlib import Path

import biopsy
from biopsy.reporting.checklist import describe_checklist, load_guidelines
from biopsy.reporting.compose import report_of_run
from biopsy.reporting.document import Section
from biopsy.reporting.html import render_report
from report_facts import make_small_facts


def test_both_guidelines_are_whole():
    tripod_ai, stard_ai = load_guidelines().values()
    # TRIPOD+AI has 27 items (52 with their letters); STARD 2015 has 30, of which four have two letters
    assert len({re.match(r"\d+", item.number)[0] for item in tripod_ai}) == 27 and len(tripod_ai) == 52
    numbered = [item.number for item in stard_ai if item.number]
    assert len({re.match(r"\d+", number)[0] for number in numbered}) == 30 and len(numbered) == 34
    assert len(set(numbered)) == len(numbered)


def test_every_section_that_an_item_names_can_be_in_a_report():
    sources = " ".join(
        path.read_text(encoding="utf-8") for path in Path(biopsy.__file__).parent.rglob("*.py")
    )
    sections = set(re.findall(r'Section\(\s*"([a-z-]+)"', sources))
    named = {section for items in load_guidelines().values() for item in items for section in item.sections}
    assert named - {"answer", "subgroups"} <= sections


def test_items_whose_sections_are_missing_are_not_done():
    checklist = describe_checklist([Section("data", "The data", [])]).blocks[1]
    answers = {item.number: item.sections for item in checklist.items}
    assert answers["12a"] == [("data", "The data")]
    assert answers["12f"] == [] and answers["17"] == [] and answers["14"] == []
    assert answers["1"] == [("answer", "Summary")]


def test_the_item_of_fairness_needs_subgroups():
    patients = [Section("patients", "Patients", [])]
    with_groups = describe_checklist(patients, has_subgroups=True).blocks[1]
    assert {item.number: item.sections for item in with_groups.items}["14"] == [("patients", "Patients")]


def test_the_page_marks_items_not_done_and_links_sections():
    text = render_report(report_of_run(make_small_facts()))
    assert "not done" in text and '<a href="#data">Data</a>' in text
