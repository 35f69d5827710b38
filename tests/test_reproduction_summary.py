"""Sums of a reproduction: whole seeds only, pairs only, and what a row is worth."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from biopsy.experiments.reproduction_summary import COMPARED, CONTRASTS, summarise
from biopsy.training.metrics import Spread

BASELINE = {"published_updates": 100, "method_only": False, "missing": {}, "claim": {}, "corrected": {}}


def test_spread_of_some_values():
    assert Spread.of([]) == Spread()
    assert Spread.of([0.5]) == Spread(mean=0.5, sd=None, min=0.5, max=0.5)
    assert Spread.of([0.5, 1.0]).sd == pytest.approx(np.sqrt(0.125))
    assert Spread.of([0.5, float("nan")]).mean is None


def run_row(condition, place, seed, auroc, **more):
    values = {name: 0.5 for name in COMPARED} | {"auroc": auroc}
    shared = {"n_train": 9, "n_patches": 4, "baseline_auroc": 0.6, "seconds": 60, "updates": 50}
    return {
        "recipe": "p",
        "condition": condition,
        "tested": str(place),
        "place": place,
        "seed": seed,
        "run": "r",
    } | (values | shared | {"test_is_validation": False} | more)


METRICS = SimpleNamespace(positive_class="idc", unit="patient", class_names=["non_idc", "idc"])


def test_a_seed_that_lacks_a_slide_is_in_no_mean():
    rows = [run_row("leak-with", p, s, 0.9) for p in (0, 1) for s in (0, 1)]
    rows += [run_row("leak-apart", p, s, a) for p, s, a in ((0, 0, 0.8), (1, 0, 0.6), (0, 1, 0.1))]
    leak = summarise({"p": BASELINE}, pd.DataFrame(rows), {}, METRICS).papers["p"].leak
    assert leak.seeds == [0] and leak.auroc.mean == pytest.approx(0.2)
    assert leak.reference == "leak-apart"  # there is no placebo
    assert [slide.seeds for slide in leak.slides] == [[0, 1], [0]]


def test_each_condition_is_compared_with_its_reference_on_the_same_patches():
    scores = {"apart": 0.5, "with": 0.9, "placebo": 0.6, "blocked-with": 0.7, "blocked-placebo": 0.65}
    rows = [
        run_row(f"leak-{condition}", 0, seed, auroc) for condition, auroc in scores.items() for seed in (0, 1)
    ]
    entry = summarise({"p": BASELINE}, pd.DataFrame(rows), {}, METRICS).papers["p"]
    wanted = {"leak": 0.3, "blocked_leak": 0.05, "placebo": 0.1, "leak_and_placebo": 0.4}
    for name, (condition, reference) in CONTRASTS.items():
        found = getattr(entry, name)
        assert (found.condition, found.reference, found.seeds) == (condition, reference, [0, 1])
        assert found.auroc.mean == pytest.approx(wanted[name])
        assert found.slides[0].auroc.values == pytest.approx([wanted[name]] * 2)


@pytest.mark.parametrize(
    ("updates", "published", "method_only", "label"),
    [
        (99, 1000, False, "smoke"),
        (100, 1000, False, ""),
        (100, 0, False, "published length unknown"),
        (99, 1000, True, "smoke, method only"),
    ],
)
def test_the_level_of_evidence_of_a_row_is_reported(updates, published, method_only, label):
    paper = BASELINE | {"published_updates": published, "method_only": method_only}
    rows = [run_row("published", None, 0, 0.9, updates=updates)]
    assert summarise({"p": paper}, pd.DataFrame(rows), {}, METRICS).papers["p"].label == label
