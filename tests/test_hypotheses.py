"""The posts' conjectures: found true where true by construction, not where shuffled, unsaid where few."""

import shutil

import numpy as np
import pandas as pd
import pytest

from biopsy.core.errors import RunError
from biopsy.core.files import plain, read_json
from biopsy.evaluation import stored_results
from biopsy.evaluation.errors.hypotheses import measure as hypotheses
from biopsy.evaluation.errors.hypotheses.measure import (
    ERROR_HYPOTHESES,
    REMOVALS,
    check_blue_yellow,
    check_errors,
    measure_hypotheses,
    share_saliency,
)
from biopsy.evaluation.evaluate import evaluate
from biopsy.slide_io.stain import combine_stains, separate_stains
from refusals import refuses
from tiny_runs import copy_run

OPTIONS = {"seed": 0, "unit": "patient"}


def make_table(n_patients=12, each=60, seed=0, *, effect=True):
    """Patches whose positives are missed where they are pale, and negatives called where they vary."""
    rng = np.random.default_rng(seed)
    n = n_patients * each
    groups = np.repeat([f"{8863 + i}" for i in range(n_patients)], each)
    truth = rng.integers(0, 2, n)
    names = ("haematoxylin", "eosin", "heterogeneity")
    properties = pd.DataFrame({name: rng.normal(0.4, 0.1, n) for name in names})
    properties["stain"] = properties["haematoxylin"] + properties["eosin"]
    stain, spread = (properties[name].to_numpy() for name in ("stain", "heterogeneity"))
    shown = np.where(truth == 1, stain - 0.7, spread - 0.5) + rng.normal(0, 0.05, n)
    called = shown > 0
    return properties, truth, called if effect else called[_shuffle_within(truth, rng)], groups


def _shuffle_within(truth, rng):
    """Shuffle rows within each class, so that as many are missed but not the pale ones."""
    order = np.arange(len(truth))
    for kind in (0, 1):
        rows = np.flatnonzero(truth == kind)
        order[rows] = rng.permutation(rows)
    return order


def test_pale_positives_that_are_missed_are_found_out():
    found = check_errors("less stained", *make_table(), **OPTIONS)
    assert found.verdict == "supported"
    measure = found.measures[0]
    assert measure.auroc.low > 0.7 and measure.difference_sd.low > 0.5
    assert measure.mean_chosen < measure.mean_others
    assert measure.within.value > 0.7 and len(measure.by_group) == 12
    properties, truth, called, _ = make_table()
    missed = (truth == 1) & ~called
    assert measure.n_chosen == missed.sum()
    assert measure.mean_chosen == pytest.approx(properties["stain"][missed].mean())


def test_varied_negatives_that_are_called_are_found_out():
    found = check_errors("heterogeneous", *make_table(), **OPTIONS)
    assert found.verdict == "supported"
    assert found.measures[0].mean_chosen > found.measures[0].mean_others


@pytest.mark.parametrize("name", list(ERROR_HYPOTHESES))
def test_shuffled_calls_show_nothing_but_for_the_one_in_twenty(name):
    tables = [make_table(seed=seed, effect=False) for seed in range(40)]
    verdicts = [check_errors(name, *table, **OPTIONS).verdict for table in tables]
    assert verdicts.count("not supported") >= 35, "more than 5 of 40 at 1 in 20: chance does that in 1 of 70"
    found = check_errors(name, *make_table(effect=False), **OPTIONS)
    assert found.measures[0].auroc.low < 0.5 < found.measures[0].auroc.high


def test_the_opposite_is_called_the_opposite():
    properties, truth, called, groups = make_table()
    found = check_errors("less stained", 1 - properties, truth, called, groups, **OPTIONS)
    assert found.verdict == "contradicted" and found.measures[0].auroc.high < 0.5


def test_three_slides_are_inconclusive():
    found = check_errors("less stained", *make_table(n_patients=3), seed=0, unit="slide")
    assert found.verdict == "inconclusive"
    assert found.measures[0].auroc.reason in found.answer and "3 slides" in found.answer
    assert sorted(found.measures[0].by_group) == ["8863", "8864", "8865"]
    properties, truth, _, groups = make_table()
    none = check_errors("less stained", properties, truth, truth == 1, groups, **OPTIONS)
    assert none.verdict == "inconclusive" and np.isnan(none.measures[0].auroc.value)


# --- colour


def make_shares(n, blue_saliency, rng):
    area = rng.uniform(0.2, 0.4, n)
    return pd.DataFrame(
        {
            "blue_area": area,
            "blue_saliency": area * blue_saliency * rng.uniform(0.9, 1.1, n),
            "yellow_area": 0.0,
            "yellow_saliency": 0.0,
        }
    )


def test_saliency_on_blue_beyond_its_share_is_found_out():
    rng = np.random.default_rng(0)
    truth, groups = rng.integers(0, 2, 240), np.repeat(np.arange(12), 20)
    prob = np.clip(0.3 + 0.4 * truth + rng.normal(0, 0.15, 240), 0, 1)
    without = {"grey": rng.random(240), "eosin only": prob}
    shares = make_shares(240, 1.5, rng)
    found = check_blue_yellow(truth, prob, without, shares, groups, **OPTIONS)
    assert found.verdict == "supported"
    ratio = found.saliency["blue"].ratio
    assert ratio.value == pytest.approx(shares["blue_saliency"].sum() / shares["blue_area"].sum())
    assert ratio.low < 1.5 < ratio.high or ratio.value == pytest.approx(1.5, abs=0.05)
    assert "yellow" in found.answer
    assert found.auroc["grey"]["difference"].high < 0
    assert found.auroc["eosin only"]["difference"].value == 0
    fair = check_blue_yellow(truth, prob, without, make_shares(240, 1.0, rng), groups, **OPTIONS)
    assert fair.verdict == "not supported"
    shunned = check_blue_yellow(truth, prob, without, make_shares(240, 0.6, rng), groups, **OPTIONS)
    assert shunned.verdict == "contradicted"


def test_one_class_alone_has_no_auroc_but_a_share():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(6), 5)
    found = check_blue_yellow(
        np.ones(30, int),
        rng.random(30),
        {"grey": rng.random(30)},
        make_shares(30, 1.5, rng),
        groups,
        **OPTIONS,
    )
    assert np.isnan(found.auroc["grey"]["auroc"].value) and "AUROC" not in found.answer
    assert found.verdict == "supported"


def test_colours_are_taken_out():
    rng = np.random.default_rng(0)
    amounts = np.zeros((2, 6, 6, 3))
    amounts[..., :2] = rng.uniform(0.1, 0.5, (2, 6, 6, 2))
    patches = combine_stains(amounts)
    grey = REMOVALS["grey"](patches)
    assert grey.shape == patches.shape and (np.ptp(grey.astype(int), axis=3) == 0).all()
    np.testing.assert_allclose(grey[..., 0], patches @ [0.299, 0.587, 0.114], atol=1)
    for stain, name in enumerate(("haematoxylin only", "eosin only")):
        left = separate_stains(REMOVALS[name](patches))
        np.testing.assert_allclose(left[..., stain], amounts[..., stain], atol=0.02)
        assert np.abs(np.delete(left, stain, axis=3)).max() < 0.02


def test_saliency_is_counted_by_colour_within_true_sizes():
    patches = np.full((2, 4, 4, 3), 255, np.uint8)
    patches[:, :2, :2] = (80, 60, 160)  # blue
    patches[:, 3, :] = (230, 210, 60)  # yellow, padding in the second patch
    maps = np.ones((2, 4, 4))
    maps[:, 0, 0] = 5
    shares = share_saliency(patches, maps, np.array([[4, 4], [4, 3]]))
    assert shares["blue_area"].tolist() == [4 / 16, 4 / 12]
    assert shares["blue_saliency"].tolist() == [8 / 20, 8 / 16]
    assert shares["yellow_area"].tolist() == [4 / 16, 0]
    assert shares["yellow_saliency"].tolist() == [4 / 20, 0]
    blind = share_saliency(patches, np.zeros((2, 4, 4)))
    assert blind["blue_saliency"].isna().all() and blind["blue_area"][1] == 0.25


# --- a run


@pytest.fixture(scope="module")
def judged(trained_run, tmp_path_factory):
    run = copy_run(trained_run, tmp_path_factory.mktemp("judged"))
    evaluate(run)
    return run.path


def test_a_run_is_measured_once_and_read_again(judged, monkeypatch):
    found = measure_hypotheses(judged, device="cpu")
    assert found.format == "biopsy-hypotheses/2" and found.subset == "test"
    assert (found.n_measured, found.n_predicted, found.n_groups) == (40, 40, 5)
    assert [entry.name for entry in found.hypotheses] == [
        "less stained",
        "heterogeneous",
        "blue and yellow",
    ]
    for entry in found.hypotheses:
        assert entry.verdict in ("supported", "contradicted", "not supported", "inconclusive")
        assert entry.answer.endswith(".")
    assert plain(found) == read_json(judged / "explain" / "hypotheses.json")
    (judged / "explain" / "hypotheses.json").unlink()
    assert plain(measure_hypotheses(judged, device="cpu")) == plain(found), "the same twice"
    monkeypatch.setattr(hypotheses, "_measure", None)  # from here on it may only be read
    assert plain(measure_hypotheses(judged)) == plain(found)


def test_the_network_is_asked_about_few_patches_where_it_is_slow(judged, monkeypatch):
    from biopsy.models.networks import build_network

    counts = [
        stored_results.affordable_patches(build_network(name, n_classes=2, input_px=px), px)
        for name, px in (("cancernet", 48), ("vgg16", 96))
    ]
    assert counts[0] == stored_results.MAX_PREDICTED and 100 <= counts[1] < 300
    monkeypatch.setattr(hypotheses, "MAX_MEASURED", 15)
    monkeypatch.setattr(hypotheses, "affordable_patches", lambda network, input_px: 10)
    (judged / "explain" / "hypotheses.json").unlink(missing_ok=True)
    found = measure_hypotheses(judged, device="cpu")
    assert (found.n_patches, found.n_measured, found.n_predicted) == (40, 15, 10)
    (judged / "explain" / "hypotheses.json").unlink()


def test_a_test_subset_that_is_closed_stays_closed(trained_run, tmp_path):
    shutil.copytree(trained_run.path, tmp_path / "run")
    found = measure_hypotheses(tmp_path / "run", device="cpu")
    assert found.subset == "validation" and not (tmp_path / "run" / "predictions" / "test.parquet").exists()


def test_more_than_two_classes_are_refused(trained_run, tmp_path, monkeypatch):
    from biopsy.training.runs import Run

    run = Run(tmp_path, trained_run.info)
    frame = pd.DataFrame({"patch_id": ["a"]})
    monkeypatch.setattr(Run, "predictions", lambda self, subset: (frame, {"classifier_sha256": ""}))
    with refuses(RunError, "two classes"):
        measure_hypotheses(run)
