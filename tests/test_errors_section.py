"""The chapter on mistakes: the surest are shown and named, tables hold the record, ids can be hidden."""

from dataclasses import replace

import numpy as np
import pytest

from biopsy.evaluation.errors.case_views import hide_errors
from biopsy.evaluation.errors.hypotheses.measure import Hypotheses, Hypothesis
from biopsy.evaluation.errors.section import describe_errors
from biopsy.reporting.compose import report_of_run
from biopsy.reporting.document import ReportDocument, Summary
from biopsy.reporting.facts import hide_run
from biopsy.reporting.html import render_report
from biopsy.statistics.intervals import describe_method
from error_facts import TRAINED, draw_case_views, make_error_facts, make_mistakes
from report_facts import THRESHOLD, Page, make_facts, make_predictions

IDS = ("10286", "11053", "12810", "13016", "14038", "15478")


@pytest.fixture(scope="module")
def facts():
    return make_error_facts(IDS, network=(), log=())


@pytest.fixture(scope="module")
def page(facts):
    return render_chapter(facts)


def render_chapter(facts):
    summary = Summary("Asked?", [], unit="patient")
    return Page(render_report(ReportDocument("t", "s", summary, [describe_errors(facts)])))


def test_the_most_confident_errors_are_shown_with_their_ids(page, facts):
    table = facts.predictions
    missed = table[(table["target"] == 1) & (table["prob"] < THRESHOLD)].sort_values("prob")
    alarms = table[(table["target"] == 0) & (table["prob"] >= THRESHOLD)].sort_values("prob", ascending=False)
    unsure = table.assign(far=(table["prob"] - THRESHOLD).abs()).sort_values("far")
    captions = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    shown = [rows.head(4) for rows in (missed, alarms, unsure)]
    for rows in shown:
        for patch_id, prob in zip(rows["patch_id"], rows["prob"], strict=True):
            assert any(caption.startswith(f"patch, {prob:.3f}, {patch_id}") for caption in captions)
    assert len(captions) == 6 * sum(map(len, shown)), "patch, map, place and three training patches each"
    assert f"(4 of {len(missed)}, most confident first)" in page.text
    assert f"{len(missed)} of {int(table['target'].sum())} IDC patches are false negatives" in page.text
    assert f"IDC {TRAINED} 1.50" in page.text and "Saliency shows this; it is not that." in page.text


def test_the_table_holds_the_record(facts):
    text, about = render_chapter(facts).text, facts.results["errors"].document
    for found in about["contrasts"]:
        assert f"{found.mean_chosen:.3f} {found.mean_others:.3f} {found.within.value:.3f}" in text
    assert "False negatives have lower stain than true positives." in text
    assert "No property is significantly associated with false positives." in text
    assert "simultaneous over 16 comparisons (99.69% each)" in text
    zones = about["zones"]
    wrong = {name: part.fn + part.fp for name, part in zones.items()}
    assert f"{wrong['border'] / sum(wrong.values()):.0%} of the errors, but" in text
    deep = zones["deep"]
    rates = [level[name] for level in (deep.patch, deep.patient) for name in ("sensitivity", "specificity")]
    shown = " ".join(f"{rate.value:.3f} ({rate.low:.3f} to {rate.high:.3f})" for rate in rates)
    assert f"deep {deep.n_patches} {deep.fn} {deep.fp} {shown}" in text
    for name, group in about["contrasts"][0].by_group.items():
        assert f"{name} {group['n_chosen']} {group['n_others']} " in text


def test_the_hypotheses_are_tested_by_name(facts):
    names = ("less stained", "heterogeneous", "blue and yellow")
    answer = {"source": "the VGG16 post", "among": "", "verdict": "", "note": ""}
    tested = [
        Hypothesis(name=name, claim=f"{name}.", answer=f"Held here: {name}.", **answer) for name in names
    ]
    found = Hypotheses(
        format="",
        subset="test",
        n_patches=9,
        classifier_sha256="",
        seed=0,
        positive_class="IDC",
        unit="patient",
        n_groups=6,
        n_measured=9,
        n_predicted=9,
        threshold=0.5,
        interval=describe_method(6, seed=0, unit="patient"),
        hypotheses=tested,
    )
    text = render_chapter(replace(facts, results={**facts.results, "hypotheses": found})).text
    assert "The VGG16 post: “less stained.” Held here: less stained." in text
    assert "“heterogeneous.”" in text and "blue and yellow" not in text


def test_missing_patients_and_coordinates_are_stated():
    table = make_predictions(("a", "b")).assign(patient_id=None, slide_id=None, x=np.nan, y=np.nan)
    mistakes = make_mistakes(table, unit="patch")
    changes = {"results": {"errors": draw_case_views(mistakes, overview=False)}}
    facts = replace(make_facts(get_patch=None), predictions=table, **changes)
    text = render_chapter(facts).text
    assert "no coordinates; errors at annotated borders cannot be counted" in text
    assert (
        "the unit is the patch, and intervals are too narrow" in text
        and "on the slide" not in text.split("False negatives:")[1]
    )


def test_few_patients_and_no_errors_are_stated():
    table = make_predictions(IDS[:2])
    few = render_chapter(make_error_facts(IDS[:2], predictions=table)).text
    assert "Inconclusive: too few false negatives" in few
    right = table.assign(prob=np.where(table["target"] == 1, 0.9, 0.1))
    none = render_chapter(make_error_facts(IDS[:2], predictions=right)).text
    assert "0 of 128 patches are misclassified" in none and "No comparison:" in none
    assert none.count(": none.") == 2 and "Least certain" in none
    negative = table.assign(target=0)
    empty = render_chapter(make_error_facts(IDS[:2], predictions=negative)).text
    assert "0 of 0 IDC patches are false negatives" in empty


def test_names_of_users_are_escaped():
    bad = ["<script>alert(1)</script>", "a&b\"'$x_{$", "c", "d", "e", "f"]
    page = render_chapter(make_error_facts(bad))
    assert len([tag for tag, _ in page.tags if tag == "script"]) == 1  # the page's own
    assert f"patient {bad[0]}" in page.text or f"patient {bad[1]}" in page.text


def test_a_run_without_error_analysis_has_no_section():
    assert describe_errors(make_facts(get_patch=None)) is None


def test_hidden_ids_of_evaluated_and_training_patients_are_nowhere(facts):
    hidden = hide_run(facts, {"errors": hide_errors})
    document = ReportDocument("t", "s", Summary("?", [], unit="patient"), [describe_errors(hidden)])
    text = render_report(document)
    assert "Error analysis" in text and "IDC 1.50" in text
    for name in (*IDS, TRAINED):
        assert name not in text, name
    page = Page(text)
    captions = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    assert len(captions) == 6 * 12 and "hidden" not in page.text.split("Error analysis")[1][:9000]


@pytest.mark.slow
def test_five_thousand_patches_of_noise_stay_under_seven_megabytes():
    """Noise compresses worst; pictures of up to 96 px are kept whole, so that they can be enlarged."""
    ids = [f"p{i:02d}" for i in range(20)]
    noise = np.random.default_rng(0)
    facts = make_error_facts(
        ids,
        predictions=make_predictions(ids, 256),
        n=12,
        patch_px=96,
        get_patch=lambda _: noise.integers(0, 256, (96, 96, 3), dtype=np.uint8),
    )
    assert len(render_report(report_of_run(facts)).encode()) < 7_000_000
