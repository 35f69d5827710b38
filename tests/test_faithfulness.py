"""Tests of the tests of maps: methods that are right must win, maps that know nothing must not."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from scipy.stats import spearmanr
from torch import nn

import biopsy
from biopsy.core.errors import DataError, RecipeError, RunError
from biopsy.core.files import plain, read_json
from biopsy.evaluation.explanation.faithfulness import (
    CELLS,
    STEPS,
    AreaUnderCurve,
    MethodResult,
    RandomisedStep,
    all_deletion_insertion_curves,
    area_under,
    blur_patches,
    compare_randomised,
    deletion_insertion_curves,
    describe_gain,
    describe_method_result,
    draw_patches,
    explain_all,
    find_edges,
    measure_faithfulness,
    randomise_cascading,
    rank_cells,
    rank_correlation,
    read_faithfulness,
    structural_similarity,
)
from biopsy.models.engine import Engine
from biopsy.models.inference import predict_logits
from biopsy.phantom.cohort import iter_patches
from biopsy.statistics.resampling import Interval
from pointing import find_tumour_cells, judge_pointing, point_at
from refusals import refuses
from test_explanation import draw_patches as draw_noise
from test_explanation import make_classifier
from tiny_runs import copy_run

CPU = Engine("cpu")
SIDE = 24
CORNER = np.s_[:, 4:10, 4:10]


class Corner(nn.Module):
    """Calls a patch positive for what stands in one corner, and for nothing else."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3, padding=1)
        self.pool = nn.Flatten()
        self.head = nn.Linear(2 * SIDE**2, 2)
        weight = torch.zeros(2, 3, 3, 3)
        weight[0, :, 1, 1] = -1.0  # darkness
        corner = torch.zeros(2, 2, SIDE, SIDE)
        corner[1, 0, 4:10, 4:10] = 0.2
        with torch.no_grad():
            self.conv.weight.copy_(weight)
            self.conv.bias.copy_(torch.tensor([3.0, 0.0]))
            self.head.weight.copy_(corner.flatten(1))
            self.head.bias.copy_(torch.tensor([0.0, -15.0]))

    def forward(self, batch):
        return self.head(self.pool(torch.relu(self.conv(batch))))


def draw_corners(n, seed=0):
    """Patches with a dark speckled square in the corner that counts, and louder stripes elsewhere."""
    rng = np.random.default_rng(seed)
    patches = np.full((n, SIDE, SIDE, 3), 210, np.uint8)
    patches[:, 14:22, 2:22] = np.where(np.arange(20) % 4 < 2, 30, 230)[None, None, :, None]
    patches[CORNER] = rng.integers(0, 60, (n, 6, 6, 1))
    return patches


def ask_of(classifier):
    def ask(patches):
        logits = predict_logits(classifier.network, classifier.info.preprocessing, patches, engine=CPU)
        return classifier.probs(logits)[:, 1]

    return ask


@pytest.fixture(scope="module")
def corner():
    classifier, patches = make_classifier(Corner(), input_px=SIDE), draw_corners(16)
    maps, layers, refused = explain_all(classifier, patches, np.ones(16, int), (), None, CPU)
    assert refused == [] and layers["grad_cam"] == "conv"
    return classifier, patches, maps, all_deletion_insertion_curves(ask_of(classifier), patches, maps, seed=0)


GROUPS = np.repeat(np.arange(8), 2).astype(str)


def judge(name, traced, groups=GROUPS):
    return describe_method_result(name, traced, [], groups, seed=0, unit="patient")


# --- a network whose decision is known


def test_the_patches_ask_the_right_question(corner):
    classifier, patches, _, traced = corner
    assert traced["edges"][0][:, 0].mean() > 0.95 and traced["edges"][0][:, -1].mean() < 0.4
    spoiled = patches.copy()
    spoiled[CORNER] = 210
    assert ask_of(classifier)(spoiled).max() < 0.1, "the corner is all that counts"
    assert find_edges(patches)[:, 14:22, 2:22].mean() > 1.5 * find_edges(patches)[CORNER].mean()


@pytest.mark.parametrize("name", ["saliency", "smoothgrad", "integrated_gradients", "occlusion", "grad_cam"])
def test_faithful_methods_find_the_corner_and_beat_both_baselines(corner, name):
    _, patches, maps, traced = corner
    truth = np.zeros(patches.shape[:3], bool)
    truth[CORNER] = True
    found = judge(name, traced)
    assert found.verdict == {"random": "higher", "edges": "higher"}
    assert found.gain["random"].value > 0.1 and found.n_better["random"] == 16
    pointing = judge_pointing(maps[name], truth, GROUPS, seed=0, unit="patient")
    assert pointing["mass"]["value"] > 2 * pointing["area"]["value"]
    if name not in ("occlusion", "grad_cam"):  # windows reach beyond, and a channel's weight has no place
        assert pointing["hit"]["value"] == 1 and pointing["mass"]["value"] > 0.5
    assert pointing["area"]["value"] == pytest.approx(36 / SIDE**2)


def test_maps_that_know_nothing_do_not_win(corner):
    classifier, patches = corner[:2]
    rng = np.random.default_rng(5)
    others = {"saliency": rng.random(patches.shape[:3]), "occlusion": find_edges(patches)}
    again = all_deletion_insertion_curves(ask_of(classifier), patches, others, seed=1)
    drawn = judge("saliency", again)
    assert drawn.verdict["random"] != "higher" and abs(drawn.gain["random"].value) < 0.1
    edges = judge("occlusion", again)
    assert edges.gain["edges"].value == 0 and edges.verdict["edges"] == "inconclusive"
    wrong = judge(
        "saliency",
        all_deletion_insertion_curves(ask_of(classifier), patches, {"saliency": -traced_map(corner)}, seed=0),
    )
    assert wrong.verdict["random"] == "lower" and "is worse than random maps by 0." in wrong.answer


def traced_map(corner):
    return corner[2]["integrated_gradients"]


def test_randomised_weights_change_saliency_maps_and_not_an_edge_detector(corner):
    classifier, patches, maps, _ = corner
    index = np.ones(4, int)
    layers = dict.fromkeys(maps) | {"grad_cam": "conv"}
    found = compare_randomised(classifier, patches[:4], index, maps, layers, CPU, seed=0)
    for steps in found.values():
        assert [step.from_layer for step in steps] == ["head", "conv"]
        assert abs(steps[-1].rank_correlation) < 0.5 and steps[-1].ssim < 0.9
    edges = find_edges(patches)
    assert rank_correlation(edges, edges).min() == pytest.approx(1)


def test_weights_are_drawn_anew_from_the_last_layer_on_and_the_network_is_left_alone():
    network = Corner()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    changed = []
    for name, other in randomise_cascading(network, seed=3):
        changed.append((name, [n for n, v in other.state_dict().items() if not torch.equal(v, before[n])]))
    assert [name for name, _ in changed] == ["head", "conv"]
    assert set(changed[0][1]) == {"head.weight", "head.bias"}
    assert {"conv.weight", "head.weight"} <= set(changed[1][1])
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    once, twice = (
        [
            {k: v.clone() for k, v in other.state_dict().items()}
            for _, other in randomise_cascading(network, seed=3)
        ]
        for _ in "ab"
    )
    assert all(torch.equal(once[1][name], twice[1][name]) for name in before)
    for name in ("conv.weight", "head.weight"):  # the spread is kept; a draw of few weights varies
        assert 0.6 < once[1][name].std() / before[name].std() < 1.6


# --- curves and cells


def test_curves_by_hand():
    patches = np.zeros((1, 12, 12, 3), np.uint8)
    patches[0, 0, 0] = 255  # one cell holds all there is
    values = np.zeros((1, 12, 12))
    values[0, 0, 0] = 1
    ask = lambda versions: versions[:, 0, 0, 0] / 255.0  # noqa: E731
    deleted, inserted = deletion_insertion_curves(ask, patches, np.zeros_like(patches), rank_cells(values))
    assert deleted.tolist() == [[1.0] + [0.0] * STEPS] and inserted.tolist() == [[0.0] + [1.0] * STEPS]
    assert area_under(deleted)[0] == pytest.approx(0.5 / STEPS)
    deleted, inserted = deletion_insertion_curves(ask, patches, np.zeros_like(patches), rank_cells(-values))
    assert deleted.tolist() == [[1.0] * STEPS + [0.0]] and inserted.tolist() == [[0.0] * STEPS + [1.0]]


@pytest.mark.parametrize("side", [12, 50, 96])
def test_every_pixel_has_the_rank_of_its_cell(side):
    ranks = rank_cells(np.random.default_rng(0).random((2, side, side)))
    cell = np.arange(side) * CELLS // side
    for each in ranks:
        assert sorted(set(each.ravel())) == list(range(CELLS**2))
        for index in (0, 5, CELLS - 1):
            assert len(set(each[cell == index][:, cell == 3].ravel())) == 1
    np.testing.assert_array_equal(rank_cells(np.zeros((1, side, side)))[0, 0], cell)


def test_a_blurred_patch_keeps_low_frequencies_only():
    patches = draw_noise(2)
    blurred = blur_patches(patches)
    assert blurred.std() < 0.2 * patches.std()
    assert np.abs(blurred.mean() - patches.mean()) < 3
    np.testing.assert_array_equal(blur_patches(np.full((1, 9, 9, 3), 77, np.uint8)), 77)


# --- likeness


def test_rank_correlation_is_scipys():
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 5, (3, 7, 7)), rng.integers(0, 5, (3, 7, 7))
    wanted = [spearmanr(a.ravel(), b.ravel()).statistic for a, b in zip(first, second, strict=True)]
    np.testing.assert_allclose(rank_correlation(first, second), wanted, atol=1e-12)
    assert rank_correlation(np.ones((1, 4, 4)), first[:1, :4, :4]) == 0


def test_structural_similarity_of_same_scaled_and_other_maps():
    rng = np.random.default_rng(0)
    maps = rng.random((2, 30, 30))
    np.testing.assert_allclose(structural_similarity(maps, maps), 1)
    np.testing.assert_allclose(structural_similarity(maps, 7 * maps), 1)
    assert structural_similarity(maps, rng.random((2, 30, 30))).max() < 0.9
    first, second = (each / each.max() for each in rng.random((2, 25, 25)))
    mean = partial(gaussian_filter, sigma=1.5, radius=5, mode="mirror")
    a, b = mean(first), mean(second)
    spread = mean(first**2) - a**2 + mean(second**2) - b**2 + 0.03**2
    wanted = (
        (2 * a * b + 0.01**2)
        * (2 * (mean(first * second) - a * b) + 0.03**2)
        / (a**2 + b**2 + 0.01**2)
        / spread
    )
    assert structural_similarity(first[None], second[None])[0] == pytest.approx(wanted.mean(), abs=1e-9)


# --- pointing


def test_pointing_by_hand():
    maps, truth = np.zeros((3, 2, 2)), np.zeros((3, 2, 2), bool)
    truth[:, 0, 0] = True
    maps[0] = [[5, 1], [-9, 4]]
    maps[1] = [[3, 3], [0, 0]]
    found = point_at(maps, truth)
    assert found["hit"].tolist() == [1, 0.5, 0.25] and found["area"].tolist() == [0.25] * 3
    assert found["mass"].tolist() == [0.5, 0.5, 0.25], "an empty map is spread evenly"
    with refuses(DataError, "patches"):
        point_at(maps, truth[:2])


def test_pointing_is_asked_where_it_can_be_right_or_wrong():
    truth = np.zeros((6, 10, 10), bool)
    truth[1] = True
    truth[2:, :5] = True
    found = judge_pointing(truth.astype(float), truth, np.arange(6).astype(str), seed=0, unit="patient")
    assert found["n_patches"] == 4 and found["hit"]["value"] == 1 and found["area"]["value"] == 0.5
    assert "an interval needs 5" in found["hit"]["reason"]
    nothing = judge_pointing(truth[:2] * 1.0, truth[:2], np.array(["a", "b"]), seed=0, unit="patient")
    assert nothing == {"n_patches": 0}


def test_tumour_cells_of_phantom_lie_in_the_tumour_and_are_darker():
    patches = list(iter_patches(2, 30, seed=1))
    places = [(patch.patient_id, patch.x, patch.y) for patch in patches]
    masks = find_tumour_cells(places, n_patients=2, patches_per_patient=30, seed=1)
    share = np.array([patch.tumour_frac for patch in patches])
    assert masks.shape == (len(patches), 50, 50) and masks[share == 0].mean() < 1e-3
    within = [
        (p.image[m].mean(), p.image[~m].mean()) for p, m in zip(patches, masks, strict=True) if m.mean() > 0.1
    ]
    assert len(within) >= 5 and np.mean([inside < outside for inside, outside in within]) > 0.8
    again = find_tumour_cells(places[-1:], n_patients=2, patches_per_patient=30, seed=1)
    np.testing.assert_array_equal(again[0], masks[-1])
    with refuses(ValueError, "'8863'", "90001"):
        find_tumour_cells([("8863", 1, 1)], n_patients=2, patches_per_patient=30, seed=1)


# --- verdicts in words


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(0.1, 0.2, "higher"), (-0.2, -0.1, "lower"), (-0.1, 0.1, "not different")]
)
def test_a_gain_is_classified_by_its_interval(low, high, verdict):
    assert Interval(0.0, low, high).compare(0.0) == verdict
    assert Interval(0.0).compare(0.0) == "inconclusive"


def test_answers_are_plain_sentences():
    area = AreaUnderCurve(0.5, curve=[])
    record = MethodResult(
        name="grad_cam",
        deletion=area,
        insertion=area,
        title="Grad-CAM",
        gain={"random": Interval(0.12, 0.05, 0.19), "edges": Interval(-0.02, -0.06, 0.02)},
        n_better={},
        verdict={"random": "higher", "edges": "not different"},
        randomised=[RandomisedStep("head", 0.1, 0.2), RandomisedStep("conv", 0.71, 0.2)],
    )
    assert describe_gain(record, 12, "patient") == (
        "Grad-CAM is better than random maps by 0.12 (0.05 to 0.19) and is not better than edges (-0.02, "
        "-0.06 to 0.02); its map hardly changes when all weights are random (rank correlation 0.71)."
    )
    worse = replace(
        record,
        verdict={"random": "lower", "edges": "lower"},
        randomised=[],
        gain=dict.fromkeys(("random", "edges"), Interval(-0.2, -0.3, -0.1)),
    )
    assert describe_gain(worse, 12, "patient") == (
        "Grad-CAM is worse than random maps by 0.20 (0.10 to 0.30) and is worse than edges by 0.20 (0.10 to "
        "0.30)."
    )
    none = Interval(0.1, reason="only 1 patient")
    few = replace(
        record,
        verdict={"random": "inconclusive", "edges": "inconclusive"},
        gain={"random": none, "edges": none},
    )
    assert describe_gain(few, 1, "patient").startswith(
        "Grad-CAM: inconclusive with 1 patient (only 1 patient)"
    )


# --- a run


@pytest.fixture(scope="module")
def judged(trained_run, tmp_path_factory):
    run = copy_run(trained_run, tmp_path_factory.mktemp("faithful"))
    biopsy.evaluate(run)
    return run


@pytest.mark.slow
def test_the_record_of_a_run_is_kept_and_the_same_twice(judged):
    options = {"methods": ["saliency", "grad_cam"], "n_patches": 6, "device": "cpu"}
    found = measure_faithfulness(judged, **options)
    path = judged.path / "explain" / "faithfulness.json"
    assert plain(found) == read_json(path) == plain(read_faithfulness(judged))
    n_called = int((judged.predictions("test")[0]["pred"] == 1).sum())
    assert (found.subset, found.n_patches, found.positive_class) == ("test", min(6, n_called), "idc")
    assert [each.name for each in found.methods] == ["saliency", "grad_cam"]
    assert [each.name for each in found.baselines] == ["random", "edges"]
    for each in [*found.methods, *found.baselines]:
        for area in (each.deletion, each.insertion):
            assert len(area.curve) == STEPS + 1 and 0 <= area.value <= 1
        assert each.deletion.curve[0] == pytest.approx(found.prob["untouched"], abs=1e-6)
        assert each.insertion.curve[0] == pytest.approx(found.prob["blurred"], abs=1e-6)
    grad_cam = found.methods[1]
    assert grad_cam.layer and grad_cam.randomised
    assert grad_cam.answer.startswith("Grad-CAM")
    assert plain(measure_faithfulness(judged, **options)) == plain(found)


def test_patches_are_called_positive_and_taken_from_patients_in_turn(judged):
    pack = judged.open_pack()
    frame, _ = judged.predictions("test")
    called = set(frame.loc[frame["pred"] == 1, "patch_id"])
    rows = draw_patches(judged, pack, 10, seed=0)
    assert set(pack.table["patch_id"].iloc[rows]) <= called
    assert len(set(pack.group_ids[rows[:4]])) == min(4, len(set(pack.group_ids[rows])))
    np.testing.assert_array_equal(rows[:5], draw_patches(judged, pack, 5, seed=0))


def test_the_verb_measures_with_the_flag_and_the_report_shows_it(judged, monkeypatch):
    monkeypatch.setattr("biopsy.evaluation.explanation.faithfulness.MAX_PATCHES", 4)
    monkeypatch.setattr("biopsy.evaluation.explanation.faithfulness.MIN_PATCHES", 4)
    written = biopsy.explain(judged, method="saliency", errors=1, faithfulness=True, device="cpu")
    assert written["faithfulness"]["methods"][0]["name"] == "saliency"
    assert "faithfulness" not in json.loads((judged.path / "explain" / "explain.json").read_text())


@pytest.mark.parametrize(
    ("asked", "fact", "reason"),
    [
        ({"methods": ["activations"]}, "activations", "conflict"),
        ({"methods": ["gradcam"]}, "'gradcam'", "name"),
        ({"methods": ["grad_cam"], "layer": "nowhere"}, "'nowhere'", "name"),
    ],
)
def test_explanations_that_cannot_be_tested_are_refused(judged, asked, fact, reason):
    with refuses(RecipeError, fact, reason=reason):
        measure_faithfulness(judged, n_patches=2, device="cpu", **asked)


def test_a_network_without_convolutions_is_tested_by_the_rest_and_nothing_called_is_refused(
    judged, monkeypatch
):
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 2))
    classifier, patches = make_classifier(network, input_px=8), draw_noise(2, 8)
    maps, _, refused = explain_all(classifier, patches, np.array([0, 1]), (), None, CPU)
    assert "grad_cam" not in maps and len(maps) == 4
    assert refused[0]["name"] == "grad_cam" and "integrated_gradients" in refused[0]["reason"]
    frame, about = judged.predictions("test")
    monkeypatch.setattr(biopsy.Run, "predictions", lambda self, subset: (frame.assign(pred=0), about))
    with refuses(RunError, "test", "IDC"):
        measure_faithfulness(judged, device="cpu")
