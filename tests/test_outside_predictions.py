"""Predictions of other programs: the numbers against scikit-learn, tables by their columns, and refusals."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn import metrics as sk

import biopsy
from biopsy.core.errors import DataError, MetricError, RunError
from biopsy.data.predictions import write_predictions
from command_line import call
from refusals import refuses
from report_facts import Page

GROUPS = np.repeat([f"p{k}" for k in range(10)], 20)


def draw(n_classes=2, seed=0):
    rng = np.random.default_rng(seed)
    target = rng.integers(0, n_classes, 200)
    scores = np.exp(rng.normal(size=(200, n_classes)) + 1.5 * np.eye(n_classes)[target])
    return target, scores / scores.sum(axis=1, keepdims=True)


def test_two_classes_equal_scikit_learn():
    target, probs = draw()
    found = biopsy.evaluate_predictions(target, probs[:, 1], GROUPS, threshold=0.4)
    values = found.to_frame()["value"]
    assert values["auroc"] == pytest.approx(sk.roc_auc_score(target, probs[:, 1]), abs=1e-12)
    called = probs[:, 1] >= 0.4
    assert values["sensitivity"] == pytest.approx(sk.recall_score(target, called), abs=1e-12)
    assert found["threshold"]["value"] == 0.4 and found["positive_class"] == "1"
    assert (found["n_patients"], found["unit"], found["interval"]["method"]) == (10, "patient", "jackknife-t")
    tn, fp, fn, tp = sk.confusion_matrix(target, called).ravel().tolist()
    assert found["confusion"] == {"tp": tp, "fp": fp, "fn": fn, "tn": tn}
    assert found.confusion_matrix().to_numpy().tolist() == [[tn, fp], [fn, tp]]
    assert found["operating_points"][0]["achieved"]["sensitivity"]["value"] == values["sensitivity"]
    assert found["calibration"]["after"]["brier"]["value"] == values["brier"]


def test_more_classes_by_their_names():
    target, probs = draw(3)
    names = ["benign", "in situ", "invasive"]
    found = biopsy.evaluate_predictions(np.array(names)[target], probs, GROUPS)
    assert found.class_names == names and found["threshold"] is None
    values = found.to_frame()["value"]
    assert values["accuracy"] == pytest.approx(sk.accuracy_score(target, probs.argmax(axis=1)))
    assert values["auroc"] == pytest.approx(sk.roc_auc_score(target, probs, multi_class="ovr"))
    report = found.classification_report()
    assert report.index.tolist() == [*names, "macro average", "weighted average", "micro average"]
    for draw_curve in (found.plot_roc, found.plot_precision_recall):
        with refuses(MetricError, "two classes", 3):
            draw_curve()


def test_the_same_classes_whatever_their_form():
    """Numbers, names, booleans, one probability or two, positive first or second: one answer."""
    target, probs = draw()
    plain = biopsy.evaluate_predictions(target, probs[:, 1], GROUPS).to_frame()
    names = np.array(["normal", "tumour"])[target]
    same = [
        biopsy.evaluate_predictions(target.astype(bool), probs, GROUPS),
        biopsy.evaluate_predictions(target.astype(float), probs, GROUPS),
        biopsy.evaluate_predictions(
            pd.Series(target, dtype="Int64"), pd.Series(probs[:, 1]), pd.Series(GROUPS)
        ),
        biopsy.evaluate_predictions(names, probs[:, 1], GROUPS, positive_class="tumour"),
        biopsy.evaluate_predictions(names, probs, GROUPS, positive_class="tumour"),
        biopsy.evaluate_predictions(
            names, probs[:, ::-1], GROUPS, class_names=["tumour", "normal"], positive_class="tumour"
        ),
        biopsy.evaluate_predictions(
            names, probs[:, 1], GROUPS, class_names=["tumour", "normal"], positive_class="tumour"
        ),
    ]
    for found in same:
        pd.testing.assert_frame_equal(found.to_frame(), plain, check_exact=False, atol=1e-12)


def test_tensors_are_taken_with_gradients_or_without():
    target, probs = draw()
    plain = biopsy.evaluate_predictions(target, probs[:, 1], GROUPS).to_frame()
    found = biopsy.evaluate_predictions(
        torch.tensor(target), torch.tensor(probs[:, 1], requires_grad=True), GROUPS
    )
    pd.testing.assert_frame_equal(found.to_frame(), plain, check_exact=False, atol=1e-12)


def test_numbers_that_are_no_probabilities_are_refused():
    target, probs = draw()
    with refuses(MetricError, "y_prob"):
        biopsy.evaluate_predictions(target, probs[:, 1].astype(complex), GROUPS)


def test_an_index_in_another_order_is_refused():
    """Rows are taken by position: the probability of another patch would be judged."""
    target, probs = draw()
    y_true, y_prob, groups = pd.Series(target), pd.Series(probs[:, 1]), pd.Series(GROUPS)
    for name, values in (
        ("y_prob", (y_true, y_prob[::-1], groups)),
        ("groups", (y_true, y_prob, groups[::-1])),
    ):
        with refuses(MetricError, name, "order"):
            biopsy.evaluate_predictions(*values)
    other = y_prob.set_axis([f"patch {index}" for index in range(200)])
    assert biopsy.evaluate_predictions(y_true, other, groups)["n_patients"] == 10


def test_names_that_are_numbers_are_names():
    found = biopsy.evaluate_predictions(
        [1, 2, 2, 1], [0.1, 0.9, 0.8, 0.3], list("aabb"), class_names=["1", "2"]
    )
    assert found["positive_class"] == "2" and found["patch"]["accuracy"]["value"] == 1


def test_subgroups_and_prevalence():
    target, probs = draw()
    site = np.where(np.arange(200) % 3 == 0, "north", "south")
    found = biopsy.evaluate_predictions(target, probs, GROUPS, subgroups={"site": site}, prevalence=0.02)
    chosen = site == "north"
    north = found["subgroups"]["site"]["north"]
    assert found["subgroup_intervals"] == {"level": 0.95, "n_subgroups": 2, "corrected": False}
    assert north["n_patches"] == chosen.sum()
    assert north["patch"]["auroc"]["value"] == pytest.approx(
        sk.roc_auc_score(target[chosen], probs[chosen, 1])
    )
    assert found["at_prevalence"]["prevalence"] == 0.02


def test_without_groups_no_interval_is_over_patients(caplog):
    target, probs = draw()
    found = biopsy.evaluate_predictions(target, probs)
    assert found["unit"] == "patch" and found["n_patients"] == 200 and found["patient"] is None
    assert "independent" in caplog.text


def test_an_evaluation_is_json_a_table_html_and_figures():
    target, probs = draw()
    found = biopsy.evaluate_predictions(target, probs, GROUPS, class_names=["<normal>", "tumour"])
    document = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert document == found and document["format"] == "biopsy-metrics/1"
    assert set(found.to_frame().columns) == {"value", "low", "high", "reason"}
    assert "AUROC" in repr(found) and "10 patients" in repr(found)
    Page(found._repr_html_())
    assert "<normal>" not in found._repr_html_()
    for name in ("plot_roc", "plot_precision_recall", "plot_calibration", "plot_confusion"):
        assert getattr(found, name)().axes


@pytest.mark.parametrize("n_classes", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_a_report_of_predictions(n_classes, tmp_path):
    target, probs = draw(n_classes)
    found = biopsy.evaluate_predictions(
        target, probs, GROUPS, subgroups={"site": GROUPS > "p4"}, class_names=list("abcd")[:n_classes]
    )
    (path,) = biopsy.report(found, out=tmp_path / "page.html")
    text = Page(path.read_text()).text
    auroc = found["patch"]["auroc"]
    assert f"{auroc['value']:.3f} 95 % interval {auroc['low']:.3f} to {auroc['high']:.3f}" in text
    assert "200 patches of 10 patients" in text and "macro average" in text and "Subgroups" in text
    assert "None" not in text and "ledger" not in text
    (hidden,) = biopsy.report(found, out=tmp_path / "hidden.html", hide_ids=True)
    assert "p9" in path.read_text() and "p9" not in Page(hidden.read_text()).text


PROBS = [0.2, 0.9, 0.4, 0.3]
REFUSED = {
    "lengths": (([0, 1, 1], PROBS), {}, ["y_true", "3 patches", "y_prob 4"]),
    "groups": (([0, 1, 1, 0], PROBS, ["a"]), {}, ["groups", "1 values", "4 patches"]),
    "no patch": (([], []), {}, ["no patches"]),
    "logits": (([0, 1, 1, 0], [-2.1, 3.0, 0.4, 5.0]), {}, ["y_prob", "logits"]),
    "percent": (([0, 1, 1, 0], [2.0, 93.0, 40.0, 5.0]), {}, ["y_prob", "percentages"]),
    "sums": (
        ([0, 1, 2], np.full((3, 3), 0.9)),
        {},
        ["3 rows", "y_prob", "row 0", "2.7"],
    ),
    "NaN": (([0, 1, 1, 0], [0.2, np.nan, 0.4, 0.3]), {}, ["y_prob", "1 rows", "row 1"]),
    "text": (([0, 1, 1, 0], ["a", "b", "c", "d"]), {}, ["y_prob", "numbers"]),
    "missing label": (([0, 1, np.nan, 0], PROBS), {}, ["y_true", "1 rows", "row 2"]),
    "missing group": (([0, 1, 1, 0], PROBS, ["a", None, "b", "b"]), {}, ["groups", "1 rows", "row 1"]),
    "one class": (([1, 1, 1, 1], PROBS), {}, ["4 patches", "'1'", "two classes"]),
    "unknown class": (([0, 1, 2, 0], PROBS), {}, ["'2'", "row 2"]),
    "half a class": (([0, 1, 0.5, 0], PROBS), {}, ["'0.5'", "row 2"]),
    "unknown name": (
        (["a", "b", "c", "a"], PROBS),
        {"class_names": ["a", "b"]},
        ["'c'", "row 2", "a, b"],
    ),
    "too many names": ((["a", "b", "c", "a"], PROBS), {}, ["class_names"]),
    "which is positive": ((["a", "b", "b", "a"], PROBS), {}, ["a and b", "positive_class"]),
    "positive": (([0, 1, 1, 0], PROBS), {"positive_class": "idc"}, ["positive_class='idc'"]),
    "class names": (([0, 1, 1, 0], PROBS), {"class_names": ["a", "a"]}, ["['a', 'a']", "2 classes"]),
    "one column": (([0, 1], np.ones((2, 1, 1))), {}, ["y_prob", "shape"]),
    "one-hot": ((np.eye(2), np.eye(2)), {}, ["y_true", "(2, 2)"]),
    "ids twice": (
        ([0, 1, 1, 0], PROBS),
        {"patch_ids": ["a", "b", "a", "c"]},
        ["1 ", "'a'"],
    ),
    "threshold": (([0, 1, 1, 0], PROBS), {"threshold": 40}, ["threshold=40"]),
    "threshold of three": (([0, 1, 2], np.eye(3)), {"threshold": 0.5}, ["threshold=0.5", "two classes"]),
    "prevalence": (([0, 1, 1, 0], PROBS), {"prevalence": 2}, ["prevalence", "2", "0.02"]),
    "subgroup": (([0, 1, 1, 0], PROBS), {"subgroups": {"site": ["x"]}}, ["site", "1 values", "4 patches"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_predictions_that_cannot_be_evaluated_are_refused(case):
    arguments, options, facts = REFUSED[case]
    with refuses(MetricError, *facts):
        biopsy.evaluate_predictions(*arguments, **options)


def write(path, **columns):
    pd.DataFrame(columns).to_csv(path, index=False)
    return path


def test_a_csv_of_another_program(tmp_path):
    target, probs = draw()
    path = write(
        tmp_path / "theirs.csv", Image=np.arange(200), Label=target, Probability=probs[:, 1], Patient=GROUPS
    )
    found = biopsy.evaluate(path)
    theirs = biopsy.evaluate_predictions(target, probs[:, 1], GROUPS)
    assert found.to_json() == theirs.to_json() | {"evaluated": found["evaluated"]}
    assert found.predictions["patient_id"].tolist() == GROUPS.tolist()


def test_a_csv_with_a_probability_per_class(tmp_path):
    target, probs = draw(3)
    names = np.array(["b", "a", "c"])
    path = write(
        tmp_path / "theirs.csv",
        y_true=names[target],
        prob_b=probs[:, 0],
        prob_a=probs[:, 1],
        prob_c=probs[:, 2],
        slide_id=GROUPS,
    )
    found = biopsy.evaluate(path)
    assert found.class_names == ["b", "a", "c"] and found["unit"] == "slide"
    right = probs.argmax(axis=1) == target
    assert found["patch"]["accuracy"]["value"] == pytest.approx(right.mean())


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_our_own_predictions_give_the_numbers_of_the_run(trained_run, tmp_path, suffix):
    from tiny_runs import copy_run

    run = copy_run(trained_run, tmp_path)
    theirs = biopsy.evaluate(run)
    path = tmp_path / f"predictions{suffix}"
    frame, about = run.predictions("test")
    write_predictions(path, frame, about)
    ours = biopsy.evaluate(path)
    assert ours["positive_class"] == theirs["positive_class"]
    assert ours["threshold"]["value"] == theirs["threshold"]["value"]
    for name, estimate in theirs["patch"].items():
        assert ours["patch"][name] == pytest.approx(estimate, abs=1e-9), name


def test_a_table_that_is_not_understood(tmp_path):
    path = write(tmp_path / "a.csv", truth=[0, 1], thing=[0.1, 0.2])
    with refuses(DataError, "truth, thing", "prob_<class>"):
        biopsy.evaluate(path)
    with refuses(DataError, "none.csv", reason="missing"):
        biopsy.evaluate(tmp_path / "none.csv")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with refuses(DataError, "bad.parquet", "Parquet"):
        biopsy.evaluate(tmp_path / "bad.parquet")
    good = write(tmp_path / "b.csv", y_true=[0, 1], prob=[0.1, 0.2], site=["x", "y"])
    with refuses(DataError, "'sight'", "'site'"):
        biopsy.evaluate(good, subgroups=["sight"])
    with refuses(DataError, "subset='validation'", "table"):
        biopsy.evaluate(good, subset="validation")
    with refuses(DataError, "threshold=0.5", "run"):
        biopsy.evaluate(tmp_path / "run", threshold=0.5)


@pytest.mark.parametrize(
    ("renamed", "close"),
    [
        ({"y_true": "y-true"}, "y_true"),
        ({"y_true": "labels"}, "label"),
        ({"prob": "probabilty"}, "probability"),
        ({"prob": "Y Score"}, "y_score"),
        ({"patient_id": "patientid"}, "patient_id"),
        ({"patient_id": "Patient ID"}, "patient_id"),
        ({"patient_id": "PatientID"}, "patient_id"),
        ({"patient_id": "slides"}, "slide"),
        ({"patch_id": "image-id"}, "image_id"),
    ],
)
def test_a_heading_that_is_nearly_a_documented_one_is_refused(tmp_path, renamed, close):
    table = {
        "y_true": [0, 1, 0, 1],
        "prob": [0.2, 0.9, 0.3, 0.6],
        "patient_id": list("abab"),
        "patch_id": list("wxyz"),
    }
    (new,) = renamed.values()
    path = write(tmp_path / "a.csv", **{renamed.get(name, name): values for name, values in table.items()})
    with pytest.raises(DataError) as refused:
        biopsy.evaluate(path)
    assert repr(new) in str(refused.value) and repr(close) in str(refused.value)


@pytest.mark.parametrize("name", ["patient_age", "stain", "subgroup", "scored_by", "labelled_at", "casein"])
def test_other_columns_are_left_alone(tmp_path, name):
    path = write(tmp_path / "a.csv", y_true=[0, 1, 0, 1], prob=[0.2, 0.9, 0.3, 0.6], **{name: list("abab")})
    assert biopsy.evaluate(path)["unit"] == "patch"


def test_a_column_of_subgroups_may_have_any_name(tmp_path):
    path = write(tmp_path / "a.csv", y_true=[0, 1, 0, 1], prob=[0.2, 0.9, 0.3, 0.6], patients=list("aabb"))
    assert biopsy.evaluate(path, subgroups=["patients"])["subgroups"]["patients"].keys() == {"a", "b"}


def test_our_own_csv_changed_since(trained_run, tmp_path, caplog):
    path = tmp_path / "predictions.csv"
    frame, about = trained_run.predictions("validation")
    write_predictions(path, frame, about)
    biopsy.evaluate(path)
    assert "was changed" not in caplog.text
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    biopsy.evaluate(path)
    assert "was changed" in caplog.text


def test_the_command(tmp_path):
    target, probs = draw(3)
    path = write(
        tmp_path / "theirs.csv",
        target=target,
        prob_a=probs[:, 0],
        prob_b=probs[:, 1],
        prob_c=probs[:, 2],
        groups=GROUPS,
        site=np.where(GROUPS > "p4", "x", "y"),
    )
    page = tmp_path / "page.html"
    done = call("evaluate", str(path), "--subgroups", "site", "--report", str(page))
    assert done.exit_code == 0 and page.is_file()
    accuracy = (probs.argmax(axis=1) == target).mean()
    assert (
        f"{accuracy:.3f}" in done.stdout
        and "weighted average" in done.stdout
        and "200 patches" in done.stdout
    )
    done = call("evaluate", str(path), "--json")
    assert json.loads(done.stdout)["patch"]["accuracy"]["value"] == pytest.approx(accuracy)
    write(path, target=target, prob=probs[:, 1] * 9)
    refused = call("evaluate", str(path))
    assert refused.exit_code == 1 and refused.stderr.count("\n") == 1 and "logits" in refused.stderr


def test_a_report_of_predictions_goes_where_it_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with refuses(RunError, "out="):
        biopsy.report(biopsy.evaluate_predictions([0, 1], [0.1, 0.9]))
    assert not list(tmp_path.iterdir())


def test_a_warning_where_a_few_patients_hold_most_patches():
    """Twelve patients, two of them with 200 of 250 patches."""
    sizes = np.array([100, 100, *[5] * 10])
    groups = np.repeat([f"p{k}" for k in range(12)], sizes)
    rng = np.random.default_rng(0)
    target = rng.integers(0, 2, len(groups))
    prob = np.clip(0.3 * target + rng.random(len(groups)) * 0.7, 0, 1)
    [warning] = biopsy.evaluate_predictions(target, prob, groups)["warnings"]
    assert f" {sizes.sum() ** 2 / (sizes**2).sum():.1f}: " in warning
    even = np.repeat([f"p{k}" for k in range(10)], 25)
    assert biopsy.evaluate_predictions(target, prob, even)["warnings"] == []


def write_table(tmp_path, **columns):
    target, probs = draw()
    table = pd.DataFrame({"patient_id": GROUPS} | {n: make(target, probs) for n, make in columns.items()})
    table.to_csv(tmp_path / "theirs.csv", index=False)
    return tmp_path / "theirs.csv"


def name_labels(target, probs):
    return np.array(["normal", "tumour"])[target]


@pytest.mark.parametrize(
    ("rows", "facts"),
    [
        (["1;0,75", "0;0,5", "1;1"], ["column prob", "decimal commas", "0,75"]),
        (["1;0.75", "0;n/a", "1;1"], ["column prob", "'n/a'"]),
        (["yes;0.75", "no;0.5"], ["no and yes", "--positive"]),
        ([], ["no rows"]),
    ],
)
def test_cells_of_spreadsheets_are_named(tmp_path, rows, facts):
    path = tmp_path / "table.csv"
    path.write_text("\ufefftarget;prob\r\n" + "".join(f"{row}\r\n" for row in rows), encoding="utf-8")
    with refuses(DataError, path, *facts):
        biopsy.evaluate(path)


@pytest.mark.parametrize("order", [("normal", "tumour"), ("tumour", "normal")])
def test_the_positive_class_of_two_columns_is_found_by_its_name(tmp_path, order):
    columns = {f"prob_{name}": lambda t, p, name=name: p[:, int(name == "tumour")] for name in order}
    found = biopsy.evaluate(write_table(tmp_path, label=name_labels, **columns))
    target, probs = draw()
    assert found["positive_class"] == "tumour"
    assert found["patch"]["sensitivity"]["value"] == pytest.approx(
        sk.recall_score(target, probs[:, 1] >= 0.5), abs=1e-12
    )


def test_columns_whose_classes_are_not_certain_are_refused(tmp_path):
    """A number as label counts the columns: where tumour is the first, 1 would be normal."""
    columns = {"prob_tumour": lambda t, p: p[:, 1], "prob_normal": lambda t, p: p[:, 0]}
    with refuses(DataError, "label", "tumour"):
        biopsy.evaluate(write_table(tmp_path, label=lambda t, p: t, **columns))
    columns = {"prob_a": lambda t, p: p[:, 0], "prob_b": lambda t, p: p[:, 1]}
    with refuses(DataError, "positive"):
        biopsy.evaluate(write_table(tmp_path, label=lambda t, p: np.array(["a", "b"])[t], **columns))


DOUBTFUL = {
    "labels that differ": {"target": lambda t, p: t, "label": lambda t, p: t * (p[:, 0] > 0.1)},
    "two scores": {"target": lambda t, p: t, "score": lambda t, p: p[:, 0]},
    "neither class": {
        "target": lambda t, p: t,
        "prob_0": lambda t, p: p[:, 0],
        "prob_1": lambda t, p: p[:, 1],
        "prob": lambda t, p: p[:, 1] ** 2,
    },
    "confidences": {"target": lambda t, p: t, "prob": lambda t, p: p.max(axis=1)},
}


@pytest.mark.parametrize("name", DOUBTFUL)
def test_columns_of_doubtful_meaning_are_named(tmp_path, caplog, name):
    biopsy.evaluate(write_table(tmp_path, **({"prob": lambda t, p: p[:, 1]} | DOUBTFUL[name])))
    assert [record for record in caplog.records if record.levelname == "WARNING"]


def test_labels_that_are_the_same_in_other_words_are_not_named(tmp_path, caplog):
    columns = {"target": lambda t, p: t, "label": name_labels, "prob": lambda t, p: p[:, 1]}
    biopsy.evaluate(write_table(tmp_path, **columns))
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
