"""Reports of studies: seeds apart from patients, every patient beside the baseline."""

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pandas as pd
import pytest
from report_facts import Page, figures, make_study
from sklearn.metrics import roc_auc_score

from biopsy.sharing.report import render_report
from biopsy.sharing.study import report_of_study, spread_over_seeds


def test_study_report_keeps_seeds_apart_from_patients():
    facts = make_study()
    text = render_report(report_of_study(facts))
    page = Page(text).text
    assert "8865 0.760 0.750 0.770 3 0.650 +0.110" in page
    assert "mean of folds over 3 seeds: 0.750 to 0.770; colour alone, mean of folds: 0.650" in page
    assert f"no interval: {facts.metrics['patch']['auroc']['reason']}" in page
    assert "3 folds, 3 seeds, 9 runs" in page and "8867 2 64 0.820 0.650" in page
    for drawn in figures(text):
        ElementTree.fromstring(drawn)


def test_study_names_every_patient_beside_the_baseline():
    facts = make_study()
    part = facts.predictions[facts.predictions["patient_id"] == "8863"]
    seeds = [roc_auc_score(found["target"], found["prob"]) for _, found in part.groupby("seed")]
    shown = f"8863 64 {np.mean(seeds):.3f} {min(seeds):.3f} to {max(seeds):.3f} 0.650 {np.mean(seeds) - 0.65:+.3f}"
    assert shown in Page(render_report(report_of_study(facts))).text


def test_study_hides_ids_in_folds_too():
    text = render_report(report_of_study(make_study(("TCGA-1", "TCGA-2", "8867")), hide_ids=True))
    assert not re.search("TCGA|8867", re.sub(r"base64,[^\"]*", "", text))
    assert "patient-1" in text and "+0." in text


def test_spread_over_seeds_is_by_fold():
    spread = spread_over_seeds(pd.DataFrame({"fold": [1, 1, 0], "auroc": [0.5, 0.7, 0.9]}))
    assert spread.loc[1].tolist() == pytest.approx([0.6, 0.5, 0.7, 2])
