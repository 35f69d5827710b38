"""Reports of runs: every number is the metrics', nothing leaves the page, no id or markup gets through."""

import base64
import hashlib
import html
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from biopsy.data.packs import known_groups
from biopsy.evaluation.evaluate import measure
from biopsy.evaluation.provenance_sections import describe_data
from biopsy.evaluation.scored import ScoredPatches
from biopsy.models.shipped import describe_shipped
from biopsy.recipes.schema import Origin
from biopsy.reporting.compose import report_of_run, state_verdict
from biopsy.reporting.document import (
    Bullets,
    Gallery,
    Listing,
    Patch,
    Picture,
    Pictures,
    ReportDocument,
    Section,
    Summary,
    Table,
    Text,
    number,
)
from biopsy.reporting.elements import LONG_TABLE, describe_openings, make_table
from biopsy.reporting.html import render_report
from biopsy.statistics.resampling import Interval
from biopsy.training.metrics import SplitUse
from report_facts import (
    RECIPE,
    Page,
    figures,
    make_facts,
    make_metrics,
    make_predictions,
    make_small_facts,
)

PATCH = np.zeros((50, 50, 3), np.uint8)


@pytest.fixture(scope="module")
def report():
    return render_report(report_of_run(make_facts()))


@pytest.fixture
def summaries_alone(monkeypatch):
    """Compose reports without sections, which most of the time of a report goes into."""
    monkeypatch.setattr("biopsy.reporting.compose.list_sections", list)


def test_the_page_is_self_contained_and_runs_only_its_own_script(report):
    page = Page(report)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert not {"link", "iframe", "object", "embed", "form"} & {tag for tag, _ in page.tags}
    (script,) = re.findall(r"<script>(.*?)</script>", report, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = (a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a)
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "srcset", "data"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/", "#")), (tag, name, value[:80])
            if value and value.startswith("#"):
                assert value[1:] in ids
    assert "@import" not in report and not re.search(r"url\((?!#)", report)


def test_every_figure_is_valid_xml_and_has_a_caption_or_title(report):
    drawn = figures(report)
    assert len(drawn) > 20
    for text in drawn:
        ElementTree.fromstring(text)


def test_summary_numbers_are_the_metrics(report):
    metrics = make_facts().metrics.patch
    page = Page(report).text
    for label, name in (("AUROC", "auroc"), ("Sensitivity", "sensitivity"), ("Specificity", "specificity")):
        found = metrics[name]
        interval = f"{found.low:.3f} to {found.high:.3f}"
        shown = f"{label} {found.value:.3f} 95 % interval {interval}, over patients"
        assert shown in page
    assert "colour-only baseline: 0.612" in page and "Research use only" in page
    assert "On 6 patients not seen in training, the model distinguishes IDC from not IDC" in page
    assert "Test patients (6): 10286, 11053, 12810, 13016, 14038, 15478." in page
    assert "evaluated 4 times, by 2 runs" in page


def test_tables_hold_what_was_measured(report):
    page, facts = Page(report).text, make_facts()
    c = facts.metrics.confusion
    recall, precision = c.tp / (c.tp + c.fn), c.tp / (c.tp + c.fp)
    f1 = 2 * precision * recall / (precision + recall)
    assert f"IDC {precision:.3f} {recall:.3f} {f1:.3f} {c.tp + c.fn}" in page
    recall0, precision0 = c.tn / (c.tn + c.fp), c.tn / (c.tn + c.fn)
    assert f"not IDC {precision0:.3f} {recall0:.3f}" in page
    for name, found in facts.metrics.patch.items():
        interval = "none" if found.low is None else f"{found.low:.3f} to {found.high:.3f}"
        assert f"{found.value:.3f} {interval}" in page and (found.low is None) == (name == "ece"), name
    assert "scanner A & B 9 2 0.777" in page
    assert "accuracy 0.837 - " + f"{facts.metrics.patch['accuracy'].value:.3f}" in page
    assert "15478 64 0 - - " in page, "a patient with one class has no AUROC"
    assert "padded 8" in page and "patches divided" in page and "1,235,133" in page
    for heading in (
        "Predictions on the slides",
        "Training and architecture",
        "Reproducibility",
    ):
        assert heading in page


def test_four_slides_are_reassembled(report):
    text = Page(report).text
    shown = re.findall(r"Slide (\d+)-slide: 64 patches, (\d+) IDC", text)
    assert len(shown) == 4 and all(count != "0" for _, count in shown)
    assert "2 more are not shown" in text and "200 µm" in text


def with_auroc(facts, value, low, high, gain=None):
    auroc = Interval(value, low, high, None if low else "only 3 patients")
    baseline = facts.metrics.baseline
    baseline = gain and replace(baseline, auroc=0.6, interval=None, gain=Interval(value - 0.6, *gain))
    patch = {**facts.metrics.patch, "auroc": auroc}
    return replace(facts, metrics=replace(facts.metrics, patch=patch, baseline=baseline))


@pytest.mark.parametrize(
    ("auroc", "gain", "words"),
    [
        ((0.8, 0.7, 0.9), None, "better than chance (AUROC 0.800, 95 % interval 0.700 to 0.900)."),
        ((0.8, 0.7, 0.9), (0.1, 0.3), "and better than a colour-only baseline (0.600)."),
        ((0.8, 0.7, 0.9), (-0.1, 0.3), "not shown to be better than a colour-only baseline (0.600)."),
        ((0.8, 0.7, 0.9), (-0.3, -0.1), "but worse than a colour-only baseline (0.600)."),
        ((0.6, 0.4, 0.8), None, "not shown to distinguish IDC from not IDC patches better than chance"),
        ((0.9, None, None), None, "cannot be generalised to other patients (only 3 patients)."),
        ((np.nan, None, None), None, "AUROC is not defined: only 3 patients."),
    ],
)
def test_the_verdict_follows_from_the_intervals(auroc, gain, words):
    assert words in state_verdict(with_auroc(make_small_facts(), *auroc, gain))


@pytest.mark.parametrize("names", [("0", "1"), ("non_idc", "idc")])
def test_class_names_are_readable(names):
    facts = make_small_facts()
    old = list(facts.class_names)
    renamed = {f"prob_{before}": f"prob_{name}" for before, name in zip(old, names, strict=True)}
    facts = replace(
        facts,
        class_names=names,
        positive_class=names[1],
        predictions=facts.predictions.rename(columns=renamed),
    )
    shown = {"1": "class 1 from class 0", "idc": "IDC from non-IDC"}[names[1]]
    assert shown in state_verdict(facts)
    assert facts.positive_index == 1 and facts.is_positive.tolist() == facts.predictions["target"].tolist()


SHIPPED = {"pretrained": True, "weights": "idc", "file": "weights.safetensors", "licence": "apache-2.0"}


@pytest.mark.parametrize(
    ("trainable", "weights", "words"),
    [
        ("all", {}, ["all layers", "random weights"]),
        (
            "head",
            SHIPPED,
            ["only the last layer", "classifier idc", "ships with biopsy", describe_shipped("idc")],
        ),
        ("all", {**SHIPPED, "file": "idc"}, ["all layers", "Training began with weights idc."]),
        ("block5", {**SHIPPED, "weights": "keras-vgg16", "file": "v.h5"}, ["from block5 on", "keras-vgg16"]),
    ],
)
@pytest.mark.usefixtures("summaries_alone")
def test_the_summary_names_trained_layers_and_initial_weights(trainable, weights, words):
    facts = make_small_facts()
    recipe = facts.recipe.model_copy(
        update={"model": facts.recipe.model.model_copy(update={"trainable": trainable})}
    )
    run = {**facts.run, "weights": {**facts.run["weights"], **weights}}
    trained = report_of_run(replace(facts, recipe=recipe, run=run)).summary.findings[0]
    assert all(word in trained for word in [*words, "on 4,321 patches of 9 patients."])


@pytest.mark.usefixtures("summaries_alone")
def test_predictions_from_outside_have_no_description_of_training():
    facts = replace(make_small_facts(), run=None, recipe=None)
    assert not any(text.startswith("Trained") for text in report_of_run(facts).summary.findings)


@pytest.mark.usefixtures("summaries_alone")
def test_synthetic_data_are_named_in_the_verdict():
    facts = make_small_facts()
    drawn = replace(facts, metrics=replace(facts.metrics, synthetic=True))
    told = report_of_run(drawn).summary.verdict.removeprefix(report_of_run(facts).summary.verdict)
    assert "synthetic" in told and "synthetic" not in report_of_run(facts).summary.verdict


def test_overlap_and_other_warnings_come_first():
    facts = make_small_facts()
    metrics = replace(
        facts.metrics,
        split=SplitUse("as-published", patients_overlap=True, test_is_validation=True),
        baseline=replace(facts.metrics.baseline, auroc=0.999, interval=None),
    )
    text = Page(render_report(report_of_run(replace(facts, metrics=metrics)))).text
    body = text[text.index("Reproducibility") :]  # after the contents
    assert body.index("no result for new patients") < body.index("Patient overlap between subsets")
    assert body.index("Patient overlap between subsets") < body.index("Research use only")
    assert (
        "the test subset is also the validation subset" in body
        and "A colour-only baseline reaches AUROC 0.999" in body
    )
    assert "not seen in training" not in text


def test_the_classes_of_the_subsets_are_drawn(report):
    assert "Patches of each subset of the split, by class." not in report  # its classes are not known
    facts = make_facts()
    subsets = {
        "train": {"patches": 4321, "groups": 3, "per_class": {facts.class_names[1]: 1321, "x": 3000}},
        "validation": {"patches": 0, "groups": 0, "per_class": dict.fromkeys(facts.class_names, 0)},
        "left out": {"patches": 99, "groups": 1, "per_class": dict.fromkeys(facts.class_names, 49)},
    }
    run = {**facts.run, "split": {**facts.run["split"], "subsets": subsets}}
    blocks = [describe_data(each).blocks for each in (facts, replace(facts, run=run))]
    plain, drawn = ([p for b in part if isinstance(b, Pictures) for p in b.items] for part in blocks)
    captions, text = {picture.caption for picture in drawn}, "".join(picture.svg for picture in drawn)
    assert "Patches of each subset of the split, by class." in captions and ">1,321 (100%)<" in text
    assert len(drawn) == len(plain) + 1 and ">49 (" not in text


def test_missing_intervals_and_values_have_a_reason():
    facts = make_small_facts(("8863", "8865", "8867"))
    patch = {**facts.metrics.patch, "auroc": Interval(np.nan, reason="one class only")}
    changed = replace(facts, metrics=replace(facts.metrics, patch=patch))
    text = Page(render_report(report_of_run(changed))).text
    assert "AUROC not defined no interval: one class only" in text
    reason = facts.metrics.patch["sensitivity"].reason
    assert reason and f"no interval: {reason}" in text, "on the reader's page"
    assert f" {reason}." in text and "none (b)" in text, "under the table"


def test_names_of_users_are_escaped():
    bad = ["<script>alert(1)</script>", "a&b\"'$x_{$", "{{ 7*7 }}"]
    facts = make_facts(
        (*bad, "d4", "e5", "f6"),
        recipe=RECIPE.model_copy(update={"title": bad[0], "origin": Origin(flaws=bad)}),
    )
    text = render_report(report_of_run(facts))
    page = Page(text)
    assert "<script>alert" not in text
    assert all(name in page.text for name in bad)
    for drawn in figures(text):
        ElementTree.fromstring(drawn)


HIDDEN_IDS = ("10286", "TCGA-A1-A0SK", "12810", "13016", "ann-lee", "15478")


@pytest.fixture(scope="module")
def hidden():
    return render_report(report_of_run(make_facts(HIDDEN_IDS), hide_ids=True))


def test_hidden_ids_are_nowhere(report, hidden):
    facts, text = make_facts(HIDDEN_IDS), hidden
    visible = re.sub(r"base64,[^\"]*", "", text)
    for name in HIDDEN_IDS:
        assert name not in visible
        assert name not in html.unescape(visible)
    for column in ("patch_id", "slide_id"):
        assert not [name for name in facts.predictions[column] if name in visible]
    page = Page(text).text
    assert "replaced by numbers" in page and "/home/" not in page
    assert "--test-patients (hidden)" in page and "tried on patient-" in page
    assert "replaced by numbers" not in Page(report).text


def test_hidden_ids_change_no_number_and_stay_distinct(hidden):
    facts, page = make_facts(HIDDEN_IDS), Page(hidden).text
    for name in ("auroc", "sensitivity", "specificity"):
        assert f"{facts.metrics.patch[name].value:.3f}" in page
    rows = re.findall(r"(?<=\s)([1-6]) 64 (?:\d+) (?:-|0\.\d+|1\.000)", page)
    assert sorted(rows) == list("123456")


def test_a_report_without_ids():
    table = make_predictions(("a", "b")).assign(patient_id=None, slide_id=None, x=np.nan, y=np.nan)
    metrics = make_metrics(table.assign(patient_id=np.arange(len(table)) // 10))
    interval = replace(metrics.interval, unit="patch")
    metrics = replace(metrics, patient=None, groups=[], interval=interval, subgroups={})
    facts = make_small_facts(predictions=table, metrics=metrics, get_patch=lambda _: PATCH)
    for hide_ids in (False, True):
        text = Page(render_report(report_of_run(facts, hide_ids=hide_ids))).text
        assert (
            "The data have neither patient nor slide ids" in text and "patches not seen in training" in text
        )
        assert "Predictions on the slides" not in text and "Metrics of each" not in text


def test_three_classes_are_reported_under_their_usual_names():
    names = ["in situ", "benign", "invasive"]
    table = make_predictions(("a1", "b2", "c3", "d4", "e5", "f6")).drop(columns="prob")
    table["target"] = np.arange(len(table)) % 3
    table["pred"] = table["target"].where(np.arange(len(table)) % 5 > 0, 0)
    probs = 0.1 + 0.7 * np.eye(3)[table["pred"].to_numpy()]
    for k, name in enumerate(names):
        table[f"prob_{name}"] = probs[:, k]
    scored = ScoredPatches.of_predictions(table, names, None, "patient")
    metrics = measure(scored, pd.DataFrame(index=table.index), [], groups=known_groups(table, "patient"))
    facts = make_small_facts(predictions=table, metrics=metrics, positive_class=None, class_names=names)
    text = Page(render_report(report_of_run(facts))).text
    shown = {name: metrics.patch[name] for name in ("accuracy", "balanced_accuracy")}
    for label, entry in zip(("Accuracy", "Balanced accuracy"), shown.values(), strict=True):
        interval = f"{number(entry.low)} to {number(entry.high)}"
        assert f"{label} {number(entry.value)} 95 % interval {interval}" in text
    one = metrics.one_vs_rest["in situ"]["auroc"]
    assert f"in situ {number(one.value)} ({number(one.low)} to {number(one.high)})" in text
    assert "macro average" in text and "3 classes" in text and "highest probability" in text
    first = metrics.groups[0]
    assert f"{first.id} in situ (22), benign (21), invasive (21) 64 {first.n_correct}" in text


@pytest.mark.slow
def test_five_thousand_patches_stay_under_five_megabytes():
    noise = np.random.default_rng(0)
    table = make_predictions([f"p{i:02d}" for i in range(20)], 256)
    facts = make_facts(
        [f"p{i:02d}" for i in range(20)],
        predictions=table,
        patch_px=96,
        get_patch=lambda _: noise.integers(0, 256, (96, 96, 3), dtype=np.uint8),
    )
    assert len(table) > 5000 and len(render_report(report_of_run(facts)).encode()) < 5_000_000


def test_every_kind_of_block_is_written():
    blocks = [
        Text("a <b> note", "note"),
        Bullets(["one", "two"]),
        Table(["who", "n"], [["<i>x</i>", "3"]], caption="counts", fold="long table"),
        Pictures([Picture("a photo", image=b"\x89PNG...")], across=1, caption="row"),
        Gallery("missed", [("patient 1", [Patch(b"\xff\xd8...", ["0.9", "a_b"])])], note="small print"),
        Listing("x = <1>", fold="settings"),
    ]
    summary = Summary("Asked?", [], unit="patient")
    page = Page(render_report(ReportDocument("t", "s", summary, [Section("one", "One", blocks)])))
    for words in (
        "a <b> note",
        "<i>x</i> 3",
        "long table",
        "a photo",
        "missed patient 1",
        "small print",
        "x = <1>",
    ):
        assert words in page.text
    kinds = [attributes["src"][:15] for tag, attributes in page.tags if tag == "img"]
    assert kinds == ["data:image/png;", "data:image/jpeg"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (8151, "8,151"),
        (np.int64(5), "5"),
        (0.8427, "0.843"),
        (np.nan, "-"),
        (None, "-"),
        (True, "yes"),
        ("x", "x"),
    ],
)
def test_numbers_are_formatted(value, shown):
    assert number(value) == shown


def test_tables_format_values_and_number_reasons():
    few, wide = Interval(0.5, reason="only 3 patients"), Interval(0.8423, 0.79, 0.891)
    rows = [["a", 8151, wide], ["b", None, few], ["c", np.float64("nan"), few]]
    table = make_table(["name", "n", "AUROC"], rows, caption="Table", note="Note.", fold_long=True)
    assert table.rows == [
        ["a", "8,151", "0.842 (0.790 to 0.891)"],
        ["b", "-", "0.500 (a)"],
        ["c", "-", "0.500 (a)"],
    ]
    assert table.note.startswith("Note. (a)") and table.note.count(few.reason) == 1
    assert (table.caption, table.fold) == ("Table", "")
    long = make_table(["n"], [[1]] * (LONG_TABLE + 1), caption="Table", fold_long=True)
    assert (long.caption, long.fold) == ("", "Table")


def test_evaluations_of_the_test_subset_are_reported():
    assert describe_openings({"times": 1, "runs": 1, "kept_with": "pack"}).startswith(
        "This test subset has been evaluated 1 time, by 1 run"
    )
    assert "read-only" in describe_openings({"times": 2, "runs": 1, "kept_with": "run"})
    assert "not in the ledger" in describe_openings(None)
