"""The forest plot and the words of a comparison, without runs."""

import math
import re

import pytest

from biopsy.core.errors import MetricError
from biopsy.evaluation.comparison.measure import (
    NETWORKS,
    ComparisonDocument,
    MetricDifference,
    ModelDifference,
    PairedIntervals,
    SeedSpread,
)
from biopsy.evaluation.comparison.page import ONE_SEED, SHOWN, describe_verdict, draw_differences
from biopsy.plotting.style import svg
from biopsy.statistics.resampling import Interval
from refusals import refuses


def entry(value, low=None, high=None, reason=None, p=None, p_holm=None, **seeds):
    spread = {"mean": value, "min": value, "max": value, "n": 1, "paired": True} | seeds
    interval = Interval(value, low, high, reason)
    return MetricDifference(
        **vars(interval), p=p, p_holm=p_holm, over_patients=interval, over_seeds=SeedSpread(**spread)
    )


def document(*entries, unit="patient", compares="recipes"):
    return ComparisonDocument(
        reference="old",
        metric="auroc",
        pack={},
        class_names=["normal", "tumour"],
        positive_class="tumour",
        unit=unit,
        n_patches=64,
        n_patients=8,
        interval=PairedIntervals(0.95, "paired"),
        models=[],
        differences=[
            ModelDifference(f"new {place}", "old", compares, dict.fromkeys(SHOWN, found))
            for place, found in enumerate(entries)
        ],
        by_group=[],
    )


def test_the_figure_has_a_row_a_metric_and_a_hollow_dot_without_interval():
    made = document(entry(0.03, 0.01, 0.05), entry(-0.02, reason="only 3 patients", n=3, min=-0.05, max=0.02))
    figure = draw_differences(made.differences)
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == list(SHOWN.values())
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    assert [dot.get_xdata()[0] for dot in dots] == [0.03] * len(SHOWN) + [-0.02] * len(SHOWN)
    assert {dot.get_markerfacecolor() for dot in dots[len(SHOWN) :]} == {"white"}
    low, high = axes.get_xlim()
    assert low < -0.05 and high > 0.05
    assert svg(figure) == svg(draw_differences(made.differences))
    with refuses(MetricError, "difference"):
        draw_differences([])


def test_an_undefined_difference_is_left_out_of_the_figure():
    made = document(entry(math.nan, reason="undefined: no positive patches"))
    assert not [line for line in draw_differences(made.differences).axes[0].lines if line.get_marker() == "o"]
    assert "cannot be compared: undefined: no positive patches." in describe_verdict(
        made, made.differences[0]
    )


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (
            entry(0.03, 0.01, 0.05, p=0.004, p_holm=0.008),
            r"0\.030 above .*p 0\.008 after Holm.*: significant",
        ),
        (
            entry(-0.03, -0.07, 0.01, p=0.03, p_holm=0.06),
            r"0\.030 below .*no significant difference; equivalence is not established",
        ),
        (
            entry(0.03, reason="only 3 patients with patches"),
            r"above .*does not generalise to other patients",
        ),
        (entry(0.0, reason="no spread", p=1.0, p_holm=1.0), "identical AUROC"),
    ],
)
def test_the_verdict_follows_from_the_intervals(found, said):
    made = document(found, found)
    assert re.search(said, describe_verdict(made, made.differences[0]))


def test_a_single_seed_gives_no_verdict_on_recipes():
    made = document(entry(0.03, 0.01, 0.05, p=0.004, p_holm=0.008), compares=NETWORKS)
    verdict = describe_verdict(made, made.differences[0])
    assert "for these two trained networks" in verdict and ONE_SEED in verdict
