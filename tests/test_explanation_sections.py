"""Chapters on what the network looks at, on whether that means anything, and on the posts' conjectures."""

import html
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from biopsy.core.files import plain
from biopsy.core.loaders import validate
from biopsy.evaluation.errors.hypotheses.measure import Hypotheses, check_blue_yellow, check_errors
from biopsy.evaluation.explanation.examples import Explained, Illustration
from biopsy.evaluation.explanation.faithfulness import (
    Faithfulness,
    RandomisedStep,
    Settings,
    describe_curves,
    describe_method_result,
)
from biopsy.reporting.compose import report_of_run
from biopsy.reporting.html import render_report
from biopsy.statistics.intervals import describe_method
from report_facts import NAMES, Page, figures, make_facts, make_small_facts


def add_explanations(facts, n=4):
    table = facts.predictions.head(n)
    examples = pd.DataFrame(
        {
            "patch_id": table["patch_id"].to_numpy(),
            "subset": "test",
            "class": [NAMES[index] for index in table["target"]],
            "predicted": "IDC",
            "prob": table["prob"].to_numpy(),
            "kind": ["false negative", "correct"] * (n // 2),
        }
    )
    rng = np.random.default_rng(0)
    parts = [
        Illustration(
            name,
            layer,
            titles,
            [rng.random((len(titles), 50, 50)) for _ in range(n)],
            f"{name}: it shows <what>.",
        )
        for name, layer, titles in (
            ("saliency", None, ["saliency"]),
            ("activations", "stem.2", ["activation 3", "activation 8"]),
        )
    ]
    patches = [rng.integers(0, 255, (50, 50, 3), dtype=np.uint8) for _ in range(n)]
    groups, truth = facts.predictions["patient_id"].to_numpy(), facts.is_positive
    n_all = len(truth)
    names = ("haematoxylin", "eosin", "stain", "heterogeneity")
    properties = pd.DataFrame({name: rng.random(n_all) for name in names})
    shares = pd.DataFrame(
        {f"{c}_{w}": rng.random(n_all) for c in ("blue", "yellow") for w in ("area", "saliency")}
    )
    called, options = facts.predictions["prob"].to_numpy() > 0.5, {"seed": 0, "unit": "patient"}
    hypotheses = Hypotheses(
        format="",
        subset="test",
        n_patches=n_all,
        classifier_sha256="",
        seed=11,
        positive_class="IDC",
        unit="patient",
        n_groups=len(set(groups)),
        n_measured=n_all,
        n_predicted=77,
        threshold=0.5,
        interval=describe_method(len(set(groups)), **options),
        hypotheses=[
            check_errors("less stained", properties, truth, called, groups, **options),
            check_errors("heterogeneous", properties, truth, called, groups, **options),
            check_blue_yellow(
                truth,
                facts.predictions["prob"].to_numpy(),
                {"grey": rng.random(n_all)},
                shares,
                groups,
                **options,
            ),
        ],
    )
    as_read = validate("hypotheses.json", Hypotheses, plain(hypotheses))
    results = {"explanation": Explained(examples, patches, parts), "hypotheses": as_read}
    return replace(facts, results={**facts.results, **results})


IDS = ("10286", "TCGA-A1-A0SK", "12810", "13016", "ann-lee", "15478")


@pytest.fixture(scope="module")
def without():
    """A report without explanations."""
    return render_report(report_of_run(make_small_facts(IDS)))


@pytest.fixture(scope="module")
def facts():
    return add_explanations(make_small_facts(IDS))


@pytest.fixture(scope="module")
def explained(facts):
    """A report with explanations whose faithfulness is not tested."""
    return render_report(report_of_run(facts))


@pytest.fixture(scope="module")
def faithfulness():
    return make_faithfulness()


@pytest.fixture(scope="module")
def hidden(facts, faithfulness):
    """A report with explanations and the test of their faithfulness, with ids hidden."""
    facts = replace(facts, results={**facts.results, "faithfulness": faithfulness})
    return render_report(report_of_run(facts, hide_ids=True))


def test_the_report_shows_saliency_maps_and_hypotheses(without, facts, explained):
    text = explained
    page = Page(text).text
    assert {"explanation", "hypotheses"} <= set(Page(text).sections)
    assert "saliency: it shows <what>." in page and "activation 8" in text
    for entry in facts.results["hypotheses"].hypotheses:
        assert entry.claim in page and entry.answer in page
        for measure in entry.measures:
            assert f"{measure.auroc.value:.3f}" in page
            for name, group in measure.by_group.items():
                assert f"{name} {group['n_chosen']} {group['n_others']} " in page
    difference = facts.results["hypotheses"].hypotheses[2].auroc["grey"]["difference"]
    assert f"{difference.value:.3f} ({difference.low:.3f} to {difference.high:.3f})" in page
    assert "hypotheses about saliency on 77" in page and "(seed 11)" in page
    assert len(figures(text)) - len(figures(without)) == 2
    for name in facts.results["explanation"].examples["patch_id"]:
        assert name in text


def test_ids_are_hidden_in_sheets_and_tables(facts, hidden):
    visible = re.sub(r"base64,[^\"]*", "", hidden)
    for name in (*IDS, *facts.results["explanation"].examples["patch_id"]):
        assert name not in visible and name not in html.unescape(visible)
    assert len(re.findall(r"p 0\.\d\d, patch \d+", hidden)) == 4
    assert "stain, false negatives patient-" in Page(hidden).text


def test_a_report_without_explanations_has_no_such_sections(without):
    assert not {"explanation", "hypotheses"} & set(Page(without).sections)


def test_the_report_shows_the_faithfulness_of_saliency_maps(explained, hidden, faithfulness):
    assert "biopsy explain RUN --faithfulness" in Page(explained).text
    page = Page(hidden).text
    assert "Faithfulness of the saliency maps" in page and "has not been tested" not in page
    for each in faithfulness.methods:
        assert each.answer in page
        for gain in each.gain.values():
            assert f"{gain.value:.3f} ({gain.low:.3f} to {gain.high:.3f})" in page
    assert "grad_cam needs feature maps" in page
    assert "deletion: lower is better" in hidden and "48 patches of 8 patients, predicted IDC" in page


def make_faithfulness():
    rng = np.random.default_rng(0)
    groups, options = np.repeat(np.arange(8), 6).astype(str), {"seed": 0, "unit": "patient"}
    traced = {
        name: tuple(np.sort(rng.random((48, 13)), axis=1)[:, ::step] for step in (-1, 1))
        for name in ("saliency", "occlusion", "random", "edges")
    }
    steps = [RandomisedStep(name, 0.3, 0.2) for name in ("head", "body.conv1_1")]
    return Faithfulness(
        format="",
        subset="test",
        classifier_sha256="",
        seed=3,
        positive_class="IDC",
        unit="patient",
        n_patches=48,
        n_groups=8,
        interval=describe_method(8, **options),
        settings=Settings(cells=12, steps=12, blur=0.1, n_random=4, n_randomised=6),
        prob={"untouched": 0.9, "blurred": 0.2},
        methods=[
            describe_method_result(name, traced, steps, groups, **options)
            for name in ("saliency", "occlusion")
        ],
        baselines=[describe_curves(name, traced, groups, **options) for name in ("random", "edges")],
        refused=[{"name": "grad_cam", "reason": "grad_cam needs feature maps"}],
    )


@pytest.mark.slow
def test_explanations_of_large_patches_stay_small():
    plain, full = make_facts(), add_explanations(make_facts(), n=10)
    big = np.random.default_rng(0)
    patches = [big.integers(0, 255, (96, 96, 3), dtype=np.uint8) for _ in range(10)]
    parts = [
        replace(part, maps=[big.random((len(part.titles), 96, 96)) for _ in range(10)])
        for part in full.results["explanation"].illustrations
    ]
    explained = replace(full.results["explanation"], patches=patches, illustrations=parts)
    full = replace(full, results={**full.results, "explanation": explained})
    sizes = [len(render_report(report_of_run(facts))) for facts in (plain, full)]
    assert sizes[1] - sizes[0] < 1_500_000
