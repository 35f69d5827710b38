"""Reports of studies: seeds apart from patients, every patient beside the baseline."""

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from biopsy.evaluation.study_tables import measure_folds
from biopsy.experiments.study_page import name_folds, report_of_study
from biopsy.reporting.html import render_report
from biopsy.training.metrics import FoldMean
from report_facts import Page, figures, make_study


def test_study_report_keeps_seeds_apart_from_patients():
    facts = make_study()
    text = render_report(report_of_study(facts))
    page = Page(text).text
    assert "8865 0.760 0.750 0.770 3 0.650 +0.110" in page
    assert (
        "mean of folds: 0.760 (0.750 to 0.770 over 3 seeds); colour-only baseline, mean of folds: 0.650"
        in page
    )
    assert "a mean AUROC of 0.760 (3 folds and 3 seeds); a colour-only baseline reaches 0.650." in page
    assert f"no interval: {facts.metrics.patch['auroc'].reason}" in page
    assert "3 folds, 3 seeds, 9 runs" in page and "8867 2 64 0.820 0.650" in page
    for drawn in figures(text):
        ElementTree.fromstring(drawn)


def test_study_names_every_patient_beside_the_baseline():
    facts = make_study()
    part = facts.predictions[facts.predictions["patient_id"] == "8863"]
    seeds = [roc_auc_score(found["target"], found["prob"]) for _, found in part.groupby("seed")]
    mean, spread = np.mean(seeds), f"{min(seeds):.3f} to {max(seeds):.3f}"
    assert (
        f"8863 64 {mean:.3f} {spread} 0.650 {mean - 0.65:+.3f}"
        in Page(render_report(report_of_study(facts))).text
    )


def test_study_hides_ids_in_folds_too():
    text = render_report(report_of_study(make_study(("TCGA-1", "TCGA-2", "8867")), hide_ids=True))
    assert not re.search("TCGA|8867", re.sub(r"base64,[^\"]*", "", text))
    assert "patient-1" in text and "+0." in text


def test_folds_without_an_auroc_show_their_accuracy():
    """Of eight classes no fold may test all: the page then has no macro AUROC within folds to show."""
    facts = make_study()
    accuracy = [0.5, 0.6, 0.7] * 3
    runs = facts.table.assign(auroc=np.nan, accuracy=accuracy)
    text = render_report(report_of_study(with_runs(facts, runs)))
    page = Page(text).text
    assert "a mean accuracy of 0.600 (3 folds and 3 seeds)." in page
    assert "Accuracy by fold" in page and "AUROC by fold" not in page
    assert "nan" not in page and "of -" not in page and "dotted line" not in page


def test_folds_are_named_by_their_test_patients():
    table = pd.DataFrame({"fold": [0, 1], "tested": ["8863", " ".join(["8865"] * 9)]})
    assert name_folds(table) == ["8863", "1"] and name_folds(table[["fold"]]) == ["0", "1"]
    facts = make_study()
    runs = facts.table.assign(tested=facts.table["fold"], fold=range(9))
    page = Page(render_report(report_of_study(with_runs(facts, runs), hide_ids=True))).text
    assert "patient-1" in page and not re.search("8863|8865|8867", page)


def test_folds_with_equally_many_test_patients_are_distinct():
    """Two folds of 24 patients each, two seeds: today's page must say two folds, not one with four seeds."""
    table = pd.DataFrame({"fold": [0, 1, 0, 1], "tested": ["24 patients"] * 4, "seed": [0, 0, 1, 1]})
    assert name_folds(table) == ["0 (24 patients)", "1 (24 patients)"] * 2
    facts = make_study()
    runs = facts.table.assign(tested="24 patients", fold=[0, 1, 2] * 3, seed=[0, 0, 0, 1, 1, 1, 2, 2, 2])
    page = Page(render_report(report_of_study(with_runs(facts, runs)))).text
    assert "3 folds, 3 seeds, 9 runs" in page
    results = measure_folds(runs)
    assert results.by_fold["n_seeds"].tolist() == [3, 3, 3] and results.n_seeds == 3


def test_pooled_metrics_are_shown_beside_means_within_folds():
    facts = make_study()
    within = {"auroc": FoldMean(0.925, 0.893, 0.951, 3)}
    page = Page(render_report(report_of_study(replace(facts, within_folds=within))))
    assert "mean within folds" in page.text and "0.925 0.893 0.951" in page.text
    alone = {"auroc": FoldMean(0.9, 0.9, 0.9, 1)}
    page = Page(render_report(report_of_study(replace(facts, within_folds=alone))))
    assert "mean within folds" not in page.text


def test_folds_are_measured_over_seeds():
    runs = pd.DataFrame(
        {
            "fold": [1, 1, 0],
            "seed": [0, 1, 0],
            "auroc": [0.5, 0.7, 0.9],
            "baseline_auroc": [0.55, 0.55, 0.65],
        }
    )
    results = measure_folds(runs)
    spread = results.by_fold.set_index("fold")
    assert spread.loc[1, ["mean", "min", "max", "n_seeds"]].tolist() == pytest.approx([0.6, 0.5, 0.7, 2])
    assert spread["gain"].to_dict() == pytest.approx({1: 0.05, 0: 0.25})
    assert results.metric == "auroc" and results.baseline_auroc == pytest.approx(0.6)
    seeds = results.over_seeds
    assert results.n_seeds == 2 and [seeds.mean, seeds.min, seeds.max] == pytest.approx([0.7, 0.7, 0.7])


def with_runs(facts, runs):
    return replace(facts, table=runs, fold_results=measure_folds(runs))
