"""Mistakes of a run: who is missed, what goes with it by construction, where it lies, what it is like."""

import json

import numpy as np
import pandas as pd
import pytest

import biopsy
from biopsy.core.errors import RunError
from biopsy.core.files import plain, read_json, sha256_file
from biopsy.evaluation.errors import measure as module
from biopsy.evaluation.errors.case_views import draw_views
from biopsy.evaluation.errors.measure import contrast_errors, find_unusual, measure_errors, pick_galleries
from biopsy.evaluation.errors.nearest_training_patches import TrainingReference
from biopsy.evaluation.patch_properties import PROPERTIES
from biopsy.models.engine import Engine
from biopsy.models.inference import predict_with_features
from command_line import call
from refusals import refuses
from tiny_runs import copy_run


def make_sample(n_patients=12, each=80, seed=0, *, pale=0.8):
    """Patches of which pale positives are missed and sharp negatives called, more than the others."""
    rng = np.random.default_rng(seed)
    n = n_patients * each
    table = pd.DataFrame({name: rng.normal(1, 0.3, n) for name in PROPERTIES})
    positive = rng.random(n) < 0.5
    signal = np.where(positive, -pale * (table["stain"] - 1), pale * (table["sharpness"] - 1)) / 0.3
    wrong = signal + rng.normal(0, 1, n) > 1
    kind = np.where(positive, np.where(wrong, "fn", "tp"), np.where(wrong, "fp", "tn"))
    names = [f"p{i}" for i in range(n)]
    return table.assign(kind=kind, patch_id=names), np.repeat([f"{i}" for i in range(n_patients)], each)


def verdicts(found):
    return {(each.errors, each.property): each.verdict for each in found["contrasts"]}


def test_what_goes_with_errors_by_construction_is_found_and_nothing_else():
    found = contrast_errors(*make_sample(seed=1), seed=0, unit="patient")
    said = verdicts(found)
    assert said.pop(("fn", "stain")) == "lower" and said.pop(("fp", "sharpness")) == "higher"
    assert set(said.values()) == {"not different"} and len(said) == 2 * len(PROPERTIES) - 2
    assert found["n_comparisons"] == 2 * len(PROPERTIES)
    assert found["level_each"] == pytest.approx(1 - 0.05 / 16)


@pytest.mark.slow
def test_without_an_effect_all_intervals_together_hold():
    alarms = 0
    for seed in range(100):
        found = contrast_errors(*make_sample(seed=seed, pale=0), seed=0, unit="patient")
        alarms += set(verdicts(found).values()) != {"not different"}
    assert alarms <= 10, "5 % of 100 are 5; more than 10 are chance in 1 of 90"


def test_a_contrast_is_the_mean_of_the_aurocs_within_patients():
    from sklearn.metrics import roc_auc_score

    sample, groups = make_sample(n_patients=6)
    found = contrast_errors(sample, groups, seed=0, unit="patient")
    each = next(one for one in found["contrasts"] if (one.errors, one.property) == ("fn", "eosin"))
    among = sample["kind"].isin(["fn", "tp"]).to_numpy()
    known = {
        name: roc_auc_score(
            sample["kind"][among & (groups == name)] == "fn", sample["eosin"][among & (groups == name)]
        )
        for name in np.unique(groups)
    }
    assert each.within.value == pytest.approx(np.mean(list(known.values())))
    assert {name: one["auroc"] for name, one in each.by_group.items()} == pytest.approx(known)
    assert each.n_chosen == (sample["kind"] == "fn").sum()
    assert each.mean_chosen == pytest.approx(sample["eosin"][sample["kind"] == "fn"].mean())


def test_patients_that_differ_do_not_make_a_contrast():
    """Half the patients are pale and often wrong: within none of them does paleness go with it."""
    rng = np.random.default_rng(0)
    groups = np.repeat([f"{i}" for i in range(16)], 60)
    pale = np.arange(len(groups)) < len(groups) / 2
    table = pd.DataFrame({name: rng.normal(1, 0.1, len(groups)) for name in PROPERTIES})
    table["stain"] -= np.where(pale, 0.3, 0)
    wrong = rng.random(len(groups)) < np.where(pale, 0.6, 0.1)
    found = contrast_errors(table.assign(kind=np.where(wrong, "fn", "tp")), groups, seed=0, unit="patient")
    stain = next(one for one in found["contrasts"] if one.property == "stain")
    assert stain.auroc.high < 0.5, "over all patches it does"
    assert stain.within.low < 0.5 < stain.within.high and stain.verdict == "not different"


@pytest.mark.parametrize("kinds", ["fn", "tp", "tn"])
def test_nothing_to_compare_reports_it(kinds):
    sample, groups = make_sample(n_patients=5, each=10)
    found = contrast_errors(sample.assign(kind=kinds), groups, seed=0, unit="patient")
    assert found["n_comparisons"] == 0
    assert {one.verdict for one in found["contrasts"]} == {"inconclusive"}
    assert all("undefined: no" in one.auroc.reason for one in found["contrasts"])


def test_few_patients_get_a_reason_and_patches_no_within():
    sample, groups = make_sample(n_patients=3, each=30, pale=5)
    few = contrast_errors(sample, groups, seed=0, unit="patient")["contrasts"][0]
    assert few.verdict == "inconclusive" and "an interval needs 5" in few.within.reason
    patches = contrast_errors(sample, sample["patch_id"].to_numpy(str), seed=0, unit="patch")["contrasts"]
    assert all(one.within is None and one.by_group == {} for one in patches)
    assert {one.verdict for one in patches if one.property == "stain" and one.errors == "fn"} == {"lower"}
    lonely = contrast_errors(sample, sample["patch_id"].to_numpy(str), seed=0, unit="patient")["contrasts"]
    assert np.isnan(lonely[0].within.value) and lonely[0].verdict == "inconclusive"


def test_a_property_that_was_not_measured_is_left_out():
    sample, groups = make_sample()
    found = contrast_errors(sample.assign(nuclear_density=np.nan), groups, seed=0, unit="patient")
    assert found["n_comparisons"] == 14
    assert "nuclear_density" not in {one.property for one in found["contrasts"]}


def test_galleries_are_the_surest_and_the_nearest_to_the_threshold():
    table = pd.DataFrame(
        {"patch_id": list("abcdef"), "prob": [0.1, 0.3, 0.3, 0.9, 0.6, 0.41]},
    ).assign(kind=["fn", "fn", "fn", "fp", "fp", "tp"])
    found = pick_galleries(table, 0.4, 2)
    assert found == {"fn": [0, 1], "fp": [3, 4], "uncertain": [5, 1]}
    assert pick_galleries(table.assign(kind="tp"), 0.4, 2)["fn"] == []


def test_unusual_is_reported_of_the_ends_only():
    n = 101
    sample = pd.DataFrame({name: np.arange(n, dtype=float) for name in PROPERTIES})
    sample = sample.assign(kind="tp", patch_id=[f"p{i}" for i in range(n)])
    row = pd.Series({name: 50.0 for name in PROPERTIES} | {"kind": "fn", "patch_id": "x"})
    assert find_unusual(row, sample) == []
    row["eosin"], row["sharpness"], row["stain"] = -1.0, 200.0, 95.0
    found = find_unusual(row, sample)
    assert [(one["property"], one["rank"]) for one in found] == [("eosin", 0.0), ("sharpness", 1.0)]
    assert find_unusual(row, sample.head(9)) == [], "too few to call anything unusual"
    ordinary = row.where(~row.index.isin(["eosin", "sharpness", "stain"]), 50.0)
    assert find_unusual(ordinary.where(row.index != "nuclear_density", np.nan), sample) == []


# --- a run


@pytest.fixture(scope="module")
def judged(trained_run, tmp_path_factory):
    run = copy_run(trained_run, tmp_path_factory.mktemp("mistaken"))
    biopsy.evaluate(run)
    return biopsy.Run.open(run.path)


@pytest.fixture(scope="module")
def found(judged):
    return measure_errors(judged, n=5, device="cpu")


def test_counts_and_kinds_are_those_of_the_evaluation(judged, found):
    confusion = vars(judged.metrics().confusion)
    assert found.document["counts"] == {kind: confusion[kind] for kind in ("fn", "fp", "tp", "tn")}
    frame, _ = judged.predictions("test")
    assert found.table["patch_id"].tolist() == frame["patch_id"].tolist()
    wrong = frame["pred"] != frame["target"]
    assert found.table["kind"].isin(["fn", "fp"]).tolist() == wrong.tolist()
    assert found.table["sampled"].all() and found.table["haematoxylin"].notna().all()
    zones = found.document["zones"]
    assert sum(part.fn + part.fp for part in zones.values()) == wrong.sum()


def test_the_record_is_written_once_and_gives_its_numbers_again(judged, found, monkeypatch):
    place = judged.path / "errors"
    about = read_json(place / "errors.json")
    assert about.pop("table_sha256") == sha256_file(place / "errors.parquet")
    assert plain(found.document) == about
    table = pd.read_parquet(place / "errors.parquet")
    pd.testing.assert_frame_equal(table, found.table)
    again = contrast_errors(
        table, table["patient_id"].to_numpy(str), seed=judged.info["seed"], unit="patient"
    )
    assert plain(again) == {key: about[key] for key in again}
    other = measure_errors(judged, n=2, device="cpu")
    assert len(other.document["galleries"]["uncertain"]) == 2
    (place / "errors.json").unlink()
    assert plain(measure_errors(judged, n=5, device="cpu").document) == about, "the same twice"
    monkeypatch.setattr(module, "_measure", None)  # from here on it may only be read
    assert plain(measure_errors(judged, n=5).document) == about


def test_the_nearest_patches_are_of_training_and_a_training_patch_is_its_own(judged):
    pack, classifier = judged.open_pack(), judged.classifier
    subsets = judged.subsets(pack)
    rows = np.concatenate([np.flatnonzero(subsets == "train")[:3], np.flatnonzero(subsets == "test")[:3]])
    reference = TrainingReference.from_run(judged, pack, classifier, engine=Engine("cpu"))
    _, features = predict_with_features(classifier, pack.patches, pack.sizes, rows, engine=Engine("cpu"))
    subset_of = dict(zip(pack.table["patch_id"], subsets, strict=True))
    for row, nearest in zip(rows, reference.find_nearest(features), strict=True):
        assert len(nearest) == 3 and {subset_of[one["patch_id"]] for one in nearest} == {"train"}
        distances = [one["distance"] for one in nearest]
        assert distances == sorted(distances) and distances[0] >= 0
        if subsets[row] == "train":
            assert nearest[0]["patch_id"] == pack.table["patch_id"].iloc[row]
            assert nearest[0]["distance"] == pytest.approx(0, abs=1e-5)
    assert reference.description["n"] == (subsets == "train").sum()


def test_closeups_show_every_patch_of_the_galleries(judged, found):
    drawn = draw_views(judged, found, device="cpu")
    names = {one["patch_id"] for part in found.document["galleries"].values() for one in part}
    assert set(drawn.views) == names
    for case_view in drawn.views.values():
        assert case_view.patch.shape == case_view.overlay.shape == (16, 16, 3)
        assert case_view.overview is not None and len(case_view.nearest) == 3
    assert "does not" in drawn.caption


def test_the_verb_writes_a_table_and_pictures(judged, found, tmp_path):
    called = call("errors", str(judged.path), "--n", "5", "--out", str(tmp_path / "m"))
    assert called.exit_code == 0, called.output
    listed = pd.read_csv(tmp_path / "m" / "errors.csv", dtype={"patient_id": str})
    wrong = found.table[found.table["kind"].isin(["fn", "fp"])]
    assert set(listed["patch_id"]) == set(wrong["patch_id"])
    for picture in listed["picture"].dropna():
        assert (tmp_path / "m" / picture).is_file()
    assert (listed["picture"].notna() == listed["nearest_training"].notna()).all()
    assert len(list((tmp_path / "m" / "uncertain").iterdir())) == 5
    assert "false negatives" in called.stdout and "errors.csv" in called.stdout
    as_json = call("errors", str(judged.path), "--n", "5", "--json")
    assert json.loads(as_json.stdout) == plain(found.document)


def test_patches_without_coordinates_or_patients_have_no_zone(trained_run, tmp_path, monkeypatch):
    run = copy_run(trained_run, tmp_path)
    pack = run.open_pack()
    monkeypatch.setattr(biopsy.Run, "open_pack", lambda self, verify=True: pack)
    pack.table = pack.table.assign(x=pd.array([None] * len(pack), "Int64"), patient_id=None, slide_id=None)
    found = measure_errors(run, n=3, device="cpu")
    assert (
        found.document["subset"] == "validation"
        and found.document["zones"] == {}
        and found.document["unit"] == "patch"
    )
    assert all(one.within is None for one in found.document["contrasts"])
    drawn = draw_views(run, found, device="cpu")
    assert all(case_view.overview is None for case_view in drawn.views.values())
    assert not (run.path / "predictions" / "test.parquet").exists(), "nothing is opened"


def test_refusals(judged, trained_run, tmp_path, monkeypatch):
    with refuses(RunError, "n=0", "1"):
        measure_errors(judged, n=0)
    with refuses(RunError, "test.parquet", "biopsy evaluate"):
        measure_errors(copy_run(trained_run, tmp_path), subset="test")
    frame = pd.DataFrame({"patch_id": ["a"]})
    monkeypatch.setattr(biopsy.Run, "predictions", lambda self, subset: (frame, {"classifier_sha256": ""}))
    with refuses(RunError, "two classes"):
        measure_errors(judged)
