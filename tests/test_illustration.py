"""`biopsy explain`: which patches, what is written, what is refused; and the report's chapters of it."""

import json
import shutil

import cv2
import numpy as np
import pandas as pd
import pytest

import biopsy
from biopsy.core.errors import DataError, RecipeError, RunError
from biopsy.core.files import read_json
from biopsy.evaluation.errors.hypotheses.measure import measure_hypotheses
from biopsy.evaluation.explanation.explain import Selection, choose_from_run, explain_chosen
from biopsy.evaluation.saliency.methods import find_method
from biopsy.experiments.reports import gather_run
from command_line import call
from refusals import refuses
from report_facts import Page
from tiny_runs import copy_run, train_tiny


@pytest.fixture(scope="module")
def judged(trained_run, tmp_path_factory):
    run = copy_run(trained_run, tmp_path_factory.mktemp("explained"))
    biopsy.evaluate(run)
    return run


@pytest.fixture
def unopened(trained_run, tmp_path):
    return copy_run(trained_run, tmp_path)


# --- which patches


def explain_examples(run, selection):
    return explain_chosen(run.classifier, choose_from_run(run, selection), device="cpu")


def test_errors_are_the_surest_and_right_ones_of_each_class(judged):
    frame, _ = judged.predictions("test")
    wrong = frame[frame["pred"] != frame["target"]]
    examples = explain_examples(judged, Selection(errors=3)).examples
    assert (examples["subset"] == "test").all()
    right = examples[examples["kind"] == "correct"]
    assert len(right) == 3 and len(examples) == 3 + min(3, len(wrong))
    assert set(right["class"]) == set(frame["target"].map(dict(enumerate(["non_idc", "idc"]))))
    assert (right["class"] == right["predicted"]).all()
    shown = frame.set_index("patch_id").loc[examples["patch_id"]]
    np.testing.assert_allclose(examples["prob"], shown["prob"], atol=1e-5)
    again = explain_examples(judged, Selection(errors=3)).examples
    pd.testing.assert_frame_equal(examples, again)


def test_errors_alternate_between_kinds_most_confident_first(judged, monkeypatch):
    frame, about = judged.predictions("test")
    rng = np.random.default_rng(0)
    prob = rng.random(len(frame))
    frame = frame.assign(
        prob=prob,
        prob_idc=prob,
        prob_non_idc=1 - prob,
        pred=(prob >= judged.info["threshold"]["value"]).astype(int),
    )
    monkeypatch.setattr(biopsy.Run, "predictions", lambda self, subset: (frame, about))
    shown = explain_examples(judged, Selection(errors=4)).examples["patch_id"][:4].tolist()
    wrong = frame[frame["pred"] != frame["target"]]
    missed = wrong[wrong["target"] == 1].sort_values("prob")["patch_id"].tolist()
    alarms = wrong[wrong["target"] == 0].sort_values("prob", ascending=False)["patch_id"].tolist()
    assert sorted(shown) == sorted([*missed[:2], *alarms[:2]])
    assert [name for name in shown if name in missed] == missed[:2]
    assert [name for name in shown if name in alarms] == alarms[:2]


def test_the_test_subset_is_not_explained_before_its_evaluation(unopened):
    written = biopsy.explain(unopened, errors=2, method="saliency", device="cpu")
    assert {entry["subset"] for entry in written["patches"]} == {"validation"}
    assert not (unopened.path / "predictions" / "test.parquet").exists()
    pack = unopened.open_pack()
    of_test = pack.table["patch_id"][unopened.subsets(pack) == "test"].iloc[0]
    with refuses(RunError, f"'{of_test}'", f"biopsy evaluate {unopened.path}"):
        biopsy.explain(unopened, patch=[of_test], device="cpu")
    of_train = pack.table["patch_id"][unopened.subsets(pack) == "train"].iloc[0]
    named = biopsy.explain(unopened, patch=[of_train, of_train], method="saliency", device="cpu")
    assert [entry["patch_id"] for entry in named["patches"]] == [of_train]


@pytest.mark.slow
def test_three_classes_are_explained_by_the_most_probable_class(make_pack, tmp_path):
    pack = make_pack(
        n_patients=6, patches_per_patient=9, n_classes=3, official_subsets=("train", "validation", "test")
    )
    run = train_tiny(pack, tmp_path / "run", "train.epochs=1")
    written = biopsy.explain(run, errors=2, method="saliency", device="cpu")
    assert {entry["kind"] for entry in written["patches"]} <= {"misclassified", "correct"}
    assert {entry["kind"] == "correct" for entry in written["patches"]} == {True, False}
    for entry in written["patches"]:
        assert (entry["class"] == entry["predicted"]) == (entry["kind"] == "correct") and entry[
            "prob"
        ] >= 1 / 3
    biopsy.evaluate(run)
    page = Page(biopsy.report(run, complete=True)[0].read_text()).text
    assert "p: probability of the predicted class" in page
    assert "Published hypotheses" not in page and not (run.path / "explain" / "hypotheses.json").exists()


# --- a classifier and other patches


def test_a_classifier_is_explained_on_a_pack(judged, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pack = judged.open_pack()
    place = judged.path / "classifier"
    written = biopsy.explain(place, data=pack.path, errors=2, method="grad_cam", device="cpu")
    assert (tmp_path / "explain" / "grad_cam.png").is_file()
    assert {entry["subset"] for entry in written["patches"]} == {""}
    assert {entry["kind"] for entry in written["patches"]} <= {"false negative", "false positive", "correct"}
    right = [entry for entry in written["patches"] if entry["kind"] == "correct"]
    assert len(right) == 2 and {entry["class"] for entry in right} == {"non_idc", "idc"}
    named = pack.table["patch_id"].iloc[[3, 1]].tolist()
    again = biopsy.explain(place, data=pack.path, patch=named, method="saliency", out="two", device="cpu")
    assert [entry["patch_id"] for entry in again["patches"]] == named
    assert [entry["class"] for entry in again["patches"]] == [
        pack.class_names[i] for i in pack.target[[3, 1]]
    ]


def test_a_pack_with_other_classes_has_no_labels(judged, make_pack, tmp_path):
    pack = make_pack("other.pack", n_patients=3, patches_per_patient=9, n_classes=3)
    options = {"data": pack.path, "method": "saliency", "out": tmp_path / "out", "device": "cpu"}
    written = biopsy.explain(judged.path / "classifier", errors=2, **options)
    assert len({entry["patch_id"] for entry in written["patches"]}) == 4
    assert {(entry["kind"], entry["class"]) for entry in written["patches"]} == {("no label", "")}


def test_a_classifier_is_explained_on_images(judged, tmp_path):
    pack, place = judged.open_pack(), judged.path / "classifier"
    (tmp_path / "images").mkdir()
    for row, name in ((0, "a.png"), (9, "b.png"), (5, "c.png")):
        cv2.imwrite(str(tmp_path / "images" / name), pack.patches[row][:12, :, ::-1])
    asked = {"method": "saliency", "out": tmp_path / "out", "device": "cpu"}
    written = biopsy.explain(place, data=tmp_path / "images", errors=1, **asked)
    assert [entry["patch_id"] for entry in written["patches"]] == ["a.png", "b.png"]
    assert {(entry["kind"], entry["class"]) for entry in written["patches"]} == {("no label", "")}
    one = biopsy.explain(judged.classifier, data=tmp_path / "images" / "c.png", **asked)
    assert [entry["patch_id"] for entry in one["patches"]] == ["c.png"]
    picture = cv2.imread(str(tmp_path / "out" / one["patches"][0]["picture"]))
    assert picture.shape[0] * 4 // 3 == (picture.shape[1] - 8) // 2, "16 x 12 px, as it was"
    done = call(
        "explain", place, "--data", tmp_path / "images", "--patch", "b.png", "--out", tmp_path / "cli"
    )
    assert done.exit_code == 0 and done.stdout.splitlines()[1].startswith("no label")


@pytest.mark.parametrize(
    ("asked", "error", "facts"),
    [
        ({}, RunError, ["data="]),
        ({"data": "pack", "faithfulness": True}, RunError, ["run"]),
        ({"data": "nowhere"}, DataError, ["nowhere"]),
        ({"data": "big.png"}, DataError, ["big.png", "40x40", "16x16"]),
        ({"data": "text.png"}, DataError, ["text.png"]),
        ({"data": "pack", "patch": ["nobody"]}, DataError, ["'nobody'"]),
        ({"data": "pack", "errors": 0}, RunError, ["errors=0"]),
    ],
)
def test_what_a_classifier_cannot_be_explained_on_is_refused(judged, tmp_path, asked, error, facts):
    cv2.imwrite(str(tmp_path / "big.png"), np.zeros((40, 40, 3), np.uint8))
    (tmp_path / "text.png").write_text("no image")
    if "data" in asked:
        pack = judged.open_pack().path
        asked = {**asked, "data": pack if asked["data"] == "pack" else tmp_path / asked["data"]}
    with refuses(error, *facts):
        biopsy.explain(judged.path / "classifier", out=tmp_path / "out", device="cpu", **asked)
    assert not (tmp_path / "out").exists()


# --- what is written


def test_sheets_pictures_and_table_are_written(judged, tmp_path):
    written = biopsy.explain(judged, errors=2, out=tmp_path / "maps", device="cpu")
    assert written == read_json(tmp_path / "maps" / "explain.json")
    assert written["format"] == "biopsy-explain/2"
    assert written["classifier_sha256"] == judged.classifier.sha256
    names = ["saliency.png", "grad_cam.png", "activations.png"]
    assert [sheet["picture"] for sheet in written["sheets"]] == names
    assert [sheet["layer"] for sheet in written["sheets"]] == [None, "blocks.2", "stem.2"]
    assert (
        find_method("saliency").caveat in written["sheets"][0]["caption"]
        and "The class is IDC" in written["sheets"][0]["caption"]
    )
    for entry in [*written["sheets"], *written["patches"]]:
        assert cv2.imread(str(tmp_path / "maps" / entry["picture"])).shape[1] > 50
    entry = written["patches"][0]
    assert {"patch_id", "subset", "class", "predicted", "prob", "kind", "method", "layer", "picture"} == set(
        entry
    )
    picture = cv2.imread(str(tmp_path / "maps" / entry["picture"]))
    assert picture.shape == (288, 2 * 288 + 8, 3), "the patch of 16 px and one map, each 18 times as large"


def test_another_method_joins_and_the_same_one_replaces(judged, tmp_path):
    biopsy.explain(judged, errors=3, method="saliency", out=tmp_path, device="cpu")
    ids = judged.predictions("test")[0]["patch_id"].tolist()[:2]
    biopsy.explain(judged, patch=ids, layer="blocks.0.conv1", out=tmp_path, device="cpu")
    written = biopsy.explain(judged, patch=ids[:1], method="saliency", out=tmp_path, device="cpu")
    assert [sheet["picture"] for sheet in written["sheets"]] == [
        "activations-blocks.0.conv1.png",
        "saliency.png",
    ]
    assert [entry["method"] for entry in written["patches"]] == ["activations", "activations", "saliency"]
    assert len(list((tmp_path / "saliency").iterdir())) == 1


def test_several_layers_in_one_call(judged, tmp_path):
    layers = ["stem.2", "blocks.0.conv1"]
    written = biopsy.explain(
        judged,
        errors=1,
        method=["saliency", "activations"],
        layer=layers,
        out=tmp_path / "maps",
        device="cpu",
    )
    assert [(sheet["method"], sheet["layer"]) for sheet in written["sheets"]] == [
        ("saliency", None),
        *(("activations", layer) for layer in layers),
    ]
    pictures = [tmp_path / "maps" / entry["picture"] for entry in written["patches"]]
    assert len(set(pictures)) == len(pictures) == 3 * len({e["patch_id"] for e in written["patches"]})
    assert all(picture.is_file() for picture in pictures)
    done = call(
        *("explain", judged.path, "--random", 1, "--layer", layers[0], "--layer", layers[1]),
        *("--out", tmp_path / "cli", "--device", "cpu", "--json"),
    )
    assert done.exit_code == 0, done.stderr
    assert [sheet["layer"] for sheet in json.loads(done.stdout)["sheets"]] == layers


@pytest.mark.slow
def test_patches_are_drawn_at_random_by_the_seed(judged, tmp_path):
    frame, _ = judged.predictions("test")

    def draw(**asked):
        options = {"method": "saliency", "device": "cpu", "out": tmp_path / "maps", **asked}
        written = biopsy.explain(options.pop("model", judged), **options)
        return [entry["patch_id"] for entry in written["patches"]]

    kept = judged.path / "explain" / "examples.safetensors"
    before = kept.read_bytes() if kept.exists() else None
    first = draw(random=6)
    assert len(set(first)) == 6 and set(first) <= set(frame["patch_id"])
    assert first == draw(random=6) == draw(random=9)[:6]
    assert first != draw(random=6, seed=1)
    assert len(draw(random=10_000)) == len(frame)
    assert (kept.read_bytes() if kept.exists() else None) == before  # the report's examples are others
    pack, place = judged.open_pack(), judged.path / "classifier"
    of_pack = draw(model=place, data=pack.path, random=4)
    assert of_pack == draw(model=place, data=pack.path, random=4)
    (tmp_path / "images").mkdir()
    for row in range(8):
        cv2.imwrite(str(tmp_path / "images" / f"{row}.png"), pack.patches[row][..., ::-1])
    drawn = [draw(model=place, data=tmp_path / "images", random=3, seed=seed) for seed in range(4)]
    assert all(len(set(names)) == 3 for names in drawn) and len(set(map(tuple, drawn))) > 1


def test_names_of_patches_never_become_paths(judged, tmp_path, monkeypatch):
    pack = judged.open_pack()
    bad = "../../a/b c.png"
    row = pack.table.index[judged.subsets(pack) == "test"][0]
    pack.table.loc[row, "patch_id"] = bad
    subsets = judged.subsets(judged.open_pack())
    monkeypatch.setattr(biopsy.Run, "open_pack", lambda self, verify=True: pack)
    monkeypatch.setattr(biopsy.Run, "subsets", lambda self, pack: subsets)
    written = biopsy.explain(judged, patch=[bad], method="saliency", out=tmp_path / "x", device="cpu")
    assert written["patches"][0]["patch_id"] == bad
    assert written["patches"][0]["picture"] == "saliency/01-.._.._a_b_c.png.png"
    assert {path.name for path in tmp_path.iterdir()} == {"x"}


@pytest.mark.parametrize(
    ("asked", "error", "reason", "facts"),
    [
        ({"patch": ["nobody"]}, DataError, "", ["'nobody'"]),
        ({"data": "images"}, RunError, "", ["'images'"]),
        ({"method": ["saliency", "gradcam"]}, RecipeError, "name", ["'gradcam'", "'grad_cam'"]),
        ({"errors": 0}, RunError, "", ["errors=0"]),
        ({"random": -1}, RunError, "", ["random=-1"]),
        ({"random": 2, "patch": ["nobody"]}, RunError, "", ["patch", "random"]),
        ({"layer": ["stem.0", "stem.2"], "faithfulness": True}, RecipeError, "conflict", ["stem.0, stem.2"]),
        ({"method": "gradcam"}, RecipeError, "name", ["'gradcam'"]),
        ({"layer": "stem.9"}, RecipeError, "name", ["'stem.9'", "stem."]),
        ({"method": "saliency", "layer": "stem.0"}, RecipeError, "conflict", ["'stem.0'", "saliency"]),
        ({"device": "cuda:99"}, RecipeError, "value", ["'cuda:99'"]),
    ],
)
def test_what_cannot_be_shown_is_refused_and_nothing_written(judged, tmp_path, asked, error, reason, facts):
    with refuses(error, *facts, reason=reason):
        biopsy.explain(judged, out=tmp_path / "maps", **{"device": "cpu", **asked})
    assert not (tmp_path / "maps").exists()


def test_the_command_prints_a_table_and_the_sheets(judged, tmp_path):
    done = call("explain", judged.path, "--errors", 2, "--out", tmp_path / "maps", "--device", "cpu")
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["kind", "class", "predicted", "prob", "patch_id"]
    assert lines[-3:] == [
        str(tmp_path / "maps" / f"{name}.png") for name in ("saliency", "grad_cam", "activations")
    ]
    ids = judged.predictions("test")[0]["patch_id"].tolist()[:2]
    arguments = [part for name in ids for part in ("--patch", name)]
    methods = ("--method", "smoothgrad", "--method", "grad_cam", "--layer", "stem.0")
    done = call("explain", judged.path, *arguments, *methods, "--out", tmp_path / "two", "--json")
    assert [entry["patch_id"] for entry in json.loads(done.stdout)["patches"]] == [*ids, *ids]
    assert {path.name for path in (tmp_path / "two").glob("*.png")} == {
        "smoothgrad.png",
        "grad_cam-stem.0.png",
    }
    done = call("explain", judged.path, "--method", "salience")
    assert done.exit_code == 1 and "did you mean 'saliency'?" in done.stderr


# --- in the report


def test_a_report_computes_nothing_and_lists_missing_results(judged):
    for folder in ("explain", "errors"):
        shutil.rmtree(judged.path / folder, ignore_errors=True)
    (path,) = biopsy.report(judged)
    page = Page(path.read_text())
    assert not (judged.path / "explain").exists() and not (judged.path / "errors").exists()
    assert not {"explanation", "errors"} & set(page.sections) and "missing" in page.sections
    for command in ("biopsy explain", "biopsy errors"):
        assert f"{command} {judged.path}" in page.text


@pytest.mark.slow
def test_a_complete_report_computes_missing_results_once(judged):
    shutil.rmtree(judged.path / "explain", ignore_errors=True)
    measure_hypotheses(judged)
    (path,) = biopsy.report(judged, complete=True)
    page = Page(path.read_text()).text
    assert {"explanation", "hypotheses"} <= set(Page(path.read_text()).sections)
    made = {file.name for file in (judged.path / "explain").iterdir()}
    assert {"explain.json", "hypotheses.json", "saliency.png", "activations.png"} <= made
    before = (judged.path / "explain" / "explain.json").stat().st_mtime_ns
    assert str(judged.predictions("test")[0]["patient_id"].iloc[0]) in page
    gather_run(judged)
    assert (judged.path / "explain" / "explain.json").stat().st_mtime_ns == before
