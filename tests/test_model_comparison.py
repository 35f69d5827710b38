"""Comparisons: exact zeros, signs, seeds apart from patients, what turned, and every refusal.

Runs and studies are written by hand with the predictions they would hold: nothing is trained.
"""

import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from scipy.special import expit
from sklearn.metrics import roc_auc_score

import biopsy
from biopsy.core.errors import MetricError, RunError
from biopsy.core.files import MANIFEST, plain, write_json
from biopsy.data.predictions import describe_patches, tabulate_predictions, write_predictions
from biopsy.evaluation.comparison.compare import gather_models
from biopsy.evaluation.comparison.measure import NETWORKS, RECIPES, compare_models
from biopsy.evaluation.comparison.page import ONE_SEED, describe_verdict
from biopsy.statistics.intervals import IntervalMethod
from biopsy.statistics.paired import (
    adjust_holm,
    estimate_differences,
    sample_seeds,
    satterthwaite,
    subtract,
)
from biopsy.statistics.resampling import Interval, Resampler
from biopsy.statistics.weighted_counts import sort_scores
from biopsy.training.metrics import Metrics, Reliability
from biopsy.training.runs import Run
from biopsy.training.study import Study
from command_line import call
from conftest import write_pack
from refusals import refuses
from report_facts import Page
from test_paired import draw_pair

RUN_KEYS = {
    "format": "biopsy-run/1",
    "id": "r",
    "status": "finished",
    "recipe": "cancernet-2020",
    "weights": {"pretrained": False, "sha256": None},
    "epochs": 1,
    "epochs_done": 1,
    "chosen_epoch": 1,
    "seconds": 1.0,
    "started": "2026-01-01T00:00:00+00:00",
    "environment": {},
    "threshold": None,
}
SPLIT_KEYS = {"protocol": "folds", "unit": "patient", "as_published": False, "subsets": {}}


def write_run(path, pack, rows, prob, *, seed=0, fold=None, split="patients", recipe=None, threshold=0.5):
    """Write a run that says ``prob`` (of the positive class, or of each) of some patches of a pack."""
    probs = np.stack([1 - prob, prob], axis=1) if prob.ndim == 1 else prob
    binary = pack.positive_index is not None
    patches = describe_patches(pack, rows, subset="test", fold=fold)
    about = pack.class_names, pack.positive_index, np.log(probs), probs
    frame = tabulate_predictions(patches, *about, threshold=threshold if binary else None)
    about = {"pack_sha256": pack.info.content_sha256, "split": split, "threshold": None}
    write_predictions(path / "predictions" / "test.parquet", frame, about)
    info = {
        **RUN_KEYS,
        "recipe": recipe or RUN_KEYS["recipe"],
        "seed": seed,
        "split": {**SPLIT_KEYS, "name": split, "fold": fold, "patients_overlap": False},
        "pack": {
            "path": str(pack.path),
            "name": pack.path.name,
            "dataset": pack.info.dataset,
            "content_sha256": pack.info.content_sha256,
            "n_patches": len(pack),
            "unit": pack.unit,
        },
    }
    write_json(path / "run.json", info)
    n_groups, none = len(np.unique(pack.group_ids[rows])), Interval(float("nan"))
    reliability = Reliability(ece=none, brier=none, nll=none, ece_floor=0.0, bins=[])
    metrics = Metrics(
        class_names=pack.class_names,
        positive_class=pack.info.positive_class,
        unit=pack.unit,
        n_patches=len(rows),
        n_patients=n_groups,
        threshold=None,
        patch={},
        classification_report=[],
        calibration={"method": "none", "before": reliability, "after": reliability},
        interval=IntervalMethod(pack.unit, 0.95, n_groups, "none"),
        subgroups={},
        subgroup_intervals=None,
        warnings=[],
        evaluated="",
    )
    write_json(path / "evaluation" / "metrics.json", metrics)
    return Run.open(path)


def write_study(
    path, pack, prob_of_seed, *, n_folds=3, recipes=("cancernet-2020",), question="folds and seeds"
):
    """Write a study whose folds share out the patients; ``prob_of_seed[seed]`` is said of all patches."""
    fold_of = pd.factorize(pack.group_ids)[0] % n_folds
    frames = []
    for recipe in recipes:
        for seed, prob in prob_of_seed.items():
            for fold in range(n_folds):
                rows = np.flatnonzero(fold_of == fold)
                place = path / "runs" / f"{recipe}-f{fold}-s{seed}"
                run = write_run(
                    place, pack, rows, prob[rows], seed=seed, fold=fold, split="folds", recipe=recipe
                )
                frames.append(run.predictions("test")[0].assign(recipe=recipe, seed=seed))
    write_predictions(path / "predictions.parquet", pd.concat(frames, ignore_index=True), {})
    pack_info = {"name": pack.path.name, "content_sha256": pack.info.content_sha256}
    kind = {"question": question, "pack": pack_info, "recipes": {}}
    write_json(
        path / "study.json",
        {"format": "biopsy-study/1", "status": "finished", **kind},
    )
    return Study.open(path)


def measure_only(*items):
    """Compare without writing anything."""
    return plain(compare_models(*gather_models(items)))


def draw_prob(pack, seed, gain=1.2):
    """Scores that tell the classes apart, harder in some patients than in others."""
    rng = np.random.default_rng(seed)
    patient = pd.factorize(pack.group_ids)[0]
    hard = np.random.default_rng(99).normal(0, 0.5, patient.max() + 1)[patient]
    return expit(gain * (pack.target * 2 - 1) + hard + rng.normal(0, 1, len(patient)))


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    return write_pack(tmp_path_factory.mktemp("pack"), n_patients=9, patches_per_patient=16)


@pytest.fixture(scope="module")
def pair(pack, tmp_path_factory):
    """Two runs on the same patches of nine patients, the second better, and what each says."""
    place, rows = tmp_path_factory.mktemp("pair"), np.arange(len(pack))
    probs = draw_prob(pack, 1, 0.4), draw_prob(pack, 2, 1.6)
    weak = write_run(place / "weak", pack, rows, probs[0], threshold=0.5)
    strong = write_run(place / "strong", pack, rows[::-1], probs[1][::-1], threshold=0.4, recipe="vgg16-pcam")
    return (weak, strong), probs


@pytest.fixture(scope="module")
def found(pair, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "one"
    return biopsy.compare(pair[0], out=out), out


def test_differences_are_the_models_less_the_references(found, pack, pair):
    document, _ = found
    (weak, strong), (first, second) = pair
    (one,) = document["differences"]
    assert (one["of"], one["to"]) == ("strong", "weak") == (strong.path.name, weak.path.name)
    gain = roc_auc_score(pack.target, second) - roc_auc_score(pack.target, first)
    assert one["metrics"]["auroc"]["value"] == pytest.approx(gain, abs=1e-12)
    expected = estimate_differences(pack.target, second, first, pack.group_ids, thresholds=(0.4, 0.5), seed=0)
    for name, interval in expected.items():
        assert [one["metrics"][name][k] for k in ("low", "high")] == pytest.approx(
            [interval.low, interval.high]
        )
    brier = ((second - pack.target) ** 2).mean() - ((first - pack.target) ** 2).mean()
    assert one["metrics"]["brier"]["value"] == pytest.approx(brier)


def test_p_is_the_paired_t_of_scipy():
    """Accuracy over patients of equal size is a mean over patients: the textbook's paired t test."""
    rng = np.random.default_rng(3)
    groups, target = np.repeat(np.arange(12), 30), rng.integers(0, 2, 360)
    called = [np.where(rng.random(360) < right, target, 1 - target) for right in (0.8, 0.72)]
    scores = [sort_scores(target, c.astype(float), group_ids=groups) for c in called]
    samples = [sample_seeds([one], Resampler(len(one.groups))) for one in scores]
    found = subtract(*samples)["accuracy"]
    by_patient = [(c == target).reshape(12, 30).mean(axis=1) for c in called]
    expected = stats.ttest_rel(*by_patient)
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.interval.low, found.interval.high) == pytest.approx(tuple(expected.confidence_interval()))


def test_a_recipe_with_several_seeds_does_not_differ_from_itself():
    """Two times three seeds of one recipe: over patients alone one difference in three looks significant."""
    found = []
    for k in range(60):
        rng = np.random.default_rng(k)
        groups, target = np.repeat(np.arange(15), 30), rng.integers(0, 2, 450)
        patient = rng.normal(0, 0.5, 15)[groups]
        noise = rng.normal(0, 1, 450)
        recipes = []
        for _ in range(2):
            gains = rng.normal(1.5, 0.4, 3)  # training seeds differ in how far they part the classes
            probs = [expit(gain * target + patient + noise) for gain in gains]
            scores = [sort_scores(target, prob, group_ids=groups) for prob in probs]
            recipes.append(sample_seeds(scores, Resampler(15), names=["auroc"]))
        found.append(subtract(*recipes)["auroc"])
    over_patients = [one.over_patients.low > 0 or one.over_patients.high < 0 for one in found]
    assert np.mean(over_patients) > 0.3 and np.mean([one.p < 0.05 for one in found]) < 0.12
    assert all((one.p < 0.05) == (one.interval.low > 0 or one.interval.high < 0) for one in found)


def test_variances_add_with_satterthwaites_degrees_of_freedom():
    """Welch's t test: the variances of two means with their own degrees of freedom."""
    rng = np.random.default_rng(0)
    first, second = rng.normal(0, 1, 6), rng.normal(0.5, 3, 9)
    error, freedom = satterthwaite([(np.var(x, ddof=1) / len(x), len(x) - 1) for x in (first, second)])
    welch = stats.ttest_ind(first, second, equal_var=False)
    assert freedom == pytest.approx(welch.df)
    assert (first.mean() - second.mean()) / error == pytest.approx(welch.statistic)


def test_one_seed_a_recipe_speaks_of_trained_networks(pair, tmp_path):
    document = biopsy.compare(pair[0], out=tmp_path / "out")
    [one] = document["differences"]
    verdict = describe_verdict(document.record, document.record.differences[0])
    assert one["compares"] == NETWORKS and ONE_SEED in verdict
    assert ONE_SEED in Page((tmp_path / "out" / "report.html").read_text()).text
    assert one["metrics"]["ece"]["low"] is None and one["metrics"]["ece"]["p"] is None


def test_holm_by_hand():
    """Holm (1979): .005 * 4, then .01 * 3, .03 * 2, and .04 not below what came before."""
    assert adjust_holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert adjust_holm([None, 0.7, 0.9]) == [None, 1.0, 1.0]
    assert adjust_holm([]) == []


def test_a_run_against_a_copy_is_exactly_zero(pair, tmp_path):
    (weak, _), _ = pair
    copied = shutil.copytree(weak.path, tmp_path / weak.path.name)
    document = biopsy.compare([weak, copied], out=tmp_path / "same")
    (one,) = document["differences"]
    assert [model["name"] for model in document["models"]] == ["weak (1)", "weak (2)"]
    for entry in one["metrics"].values():
        assert (entry["value"], entry["p"], entry["p_holm"], entry["low"]) == (0.0, 1.0, 1.0, None)
    assert document["changed"]["turned_wrong"] == document["changed"]["turned_right"] == 0
    assert document["changed"]["mcnemar_p_if_patches_were_independent"] == 1.0
    assert "identical AUROC" in describe_verdict(document.record, document.record.differences[0])
    assert pd.read_csv(tmp_path / "same" / "changed.csv").empty


def test_changed_decisions_are_listed_by_patch(found, pack, pair):
    document, out = found
    _, (first, second) = pair
    right = (first >= 0.5) == (pack.target == 1), (second >= 0.4) == (pack.target == 1)
    changed, counts = pd.read_csv(out / "changed.csv"), document["changed"]
    ids = pack.table["patch_id"].to_numpy(str)
    assert set(changed["patch_id"][changed["turned"] == "wrong"]) == set(ids[right[0] & ~right[1]])
    assert set(changed["patch_id"][changed["turned"] == "right"]) == set(ids[~right[0] & right[1]])
    assert counts["both_right"] == (right[0] & right[1]).sum()
    assert counts["both_wrong"] == (~right[0] & ~right[1]).sum()
    n_wrong, n_right = counts["turned_wrong"], counts["turned_right"]
    assert 0 < n_wrong < n_right and n_wrong + n_right == len(changed)
    expected = 2 * stats.binom.cdf(n_wrong, n_wrong + n_right, 0.5)
    assert counts["mcnemar_p_if_patches_were_independent"] == pytest.approx(expected)
    for key in ("by_class", "by_group"):
        assert sum(entry["turned_wrong"] for entry in counts[key].values()) == n_wrong
        assert sum(entry["n_patches"] for entry in counts[key].values()) == len(pack)
    assert changed["change"].abs().is_monotonic_decreasing
    row, at = changed.iloc[0], int(np.flatnonzero(ids == changed["patch_id"][0])[0])
    truth = pack.target[at]
    assert row["prob_true_after"] == pytest.approx(second[at] if truth else 1 - second[at])
    assert (row["pred_before"], row["target"]) == (
        pack.class_names[int(first[at] >= 0.5)],
        pack.class_names[truth],
    )


def test_the_written_files_of_a_comparison(found):
    _, out = found
    names = ["changed.csv", "comparison.csv", "comparison.json", "figure.svg", "report.html"]
    assert sorted(path.name for path in out.iterdir()) == [MANIFEST, *names]
    kept = json.loads((out / "comparison.json").read_text())
    assert kept["format"] == "biopsy-comparison/1" and kept["n_patients"] == 9
    table = pd.read_csv(out / "comparison.csv")
    assert table["metric"].is_unique and set(table["reference"]) == {"weak"}
    row = table.set_index("metric").loc["auroc"]
    assert row["difference"] == pytest.approx(row["value"] - row["reference_value"])
    page = (out / "report.html").read_text()
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)
    assert page.count("data:image/png") >= 6 and "8863" in page


def test_three_are_corrected_and_have_no_table_of_changes(pair, pack, tmp_path):
    (weak, strong), _ = pair
    third = write_run(tmp_path / "third", pack, np.arange(len(pack)), draw_prob(pack, 3, 0.9))
    document = biopsy.compare([weak, third, strong], out=tmp_path / "out")
    p, holm = ([one["metrics"]["auroc"][key] for one in document["differences"]] for key in ("p", "p_holm"))
    assert holm == adjust_holm(p) and holm != p
    assert document["changed"] is None and not (tmp_path / "out" / "changed.csv").exists()
    assert "Adjusted p: Holm over 2 comparisons" in (tmp_path / "out" / "report.html").read_text()


def test_studies_pool_their_folds_and_keep_seeds_apart(pack, tmp_path):
    one = write_study(tmp_path / "one", pack, {s: draw_prob(pack, s, 0.8) for s in (0, 1, 2)}, n_folds=2)
    other = write_study(
        tmp_path / "other", pack, {s: draw_prob(pack, 10 + s, 1.4) for s in (0, 1, 2)}, n_folds=2
    )
    document = measure_only(one, other.path)
    seeds = [
        [roc_auc_score(pack.target, draw_prob(pack, s + start, gain)) for s in (0, 1, 2)]
        for start, gain in ((0, 0.8), (10, 1.4))
    ]
    difference = np.subtract(seeds[1], seeds[0])
    entry = document["differences"][0]["metrics"]["auroc"]
    assert entry["value"] == pytest.approx(difference.mean()) and entry["low"] < entry["value"]
    assert document["differences"][0]["compares"] == RECIPES
    assert entry["high"] - entry["low"] > entry["over_patients"]["high"] - entry["over_patients"]["low"]
    expected = {"mean": difference.mean(), "sd": difference.std(ddof=1), "min": difference.min()}
    assert {key: entry["over_seeds"][key] for key in expected} == pytest.approx(expected)
    assert entry["over_seeds"]["n"] == 3 and entry["over_seeds"]["paired"] is True
    own = document["models"][0]["over_seeds"]["auroc"]
    spread = {"mean": np.mean(seeds[0]), "sd": np.std(seeds[0], ddof=1)}
    assert own == pytest.approx(spread | {"min": min(seeds[0]), "max": max(seeds[0])})
    assert len(document["by_group"]) == 9
    first = document["by_group"][0]
    rows = pack.group_ids == first["group"]
    mean = np.mean([roc_auc_score(pack.target[rows], draw_prob(pack, s, 0.8)[rows]) for s in (0, 1, 2)])
    assert first["values"]["one"]["auroc"] == pytest.approx(mean)


def test_other_seeds_are_set_against_each_other(pack, tmp_path):
    one = write_study(tmp_path / "one", pack, {s: draw_prob(pack, s) for s in (0, 1)}, n_folds=1)
    other = write_study(tmp_path / "other", pack, {s: draw_prob(pack, s) for s in (5, 6, 7)}, n_folds=1)
    spread = measure_only(one, other)["differences"][0]["metrics"]["auroc"]["over_seeds"]
    values = [
        [roc_auc_score(pack.target, draw_prob(pack, s)) for s in group] for group in ((0, 1), (5, 6, 7))
    ]
    assert spread["n"] == 6 and spread["paired"] is False
    assert spread["sd"] == pytest.approx(np.hypot(*(np.std(group, ddof=1) for group in values)))
    assert spread["max"] == pytest.approx(max(values[1]) - min(values[0]))


def test_three_slides_are_shown_one_by_one_without_an_interval(tmp_path):
    pack = write_pack(tmp_path, n_patients=3, patches_per_patient=16)
    studies = [
        write_study(tmp_path / name, pack, {s: draw_prob(pack, s + start, gain) for s in (0, 1)})
        for name, start, gain in (("one", 0, 0.5), ("other", 20, 1.5))
    ]
    done = call("compare", *(str(s.path) for s in studies), "--out", str(tmp_path / "out"))
    assert done.exit_code == 0 and done.stdout.endswith(f"comparison {tmp_path / 'out'}\n")
    assert "only 3 patients with positive patches: an interval needs 5" in done.stdout
    for patient in ("8863", "8865", "8867"):
        row = rf"^ *{patient} +16 +0\.\d+ +0\.\d+ +\+0\.\d+ +0\.\d+ +[+-]0\.\d+ to \+0\.\d+"
        assert re.search(row, done.stdout, re.MULTILINE)
    document = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert all(entry["low"] is None for entry in document["differences"][0]["metrics"].values())
    assert "8865" in (tmp_path / "out" / "report.html").read_text()


def test_a_study_of_two_recipes_stands_for_both(pack, tmp_path):
    made = write_study(tmp_path / "both", pack, {0: draw_prob(pack, 0)}, recipes=("a", "b"))
    document = measure_only(made)
    assert [model["name"] for model in document["models"]] == ["both/a", "both/b"]


def test_more_than_two_classes_are_compared_by_their_own_registrations(tmp_path):
    pack = write_pack(tmp_path, n_patients=6, patches_per_patient=15, n_classes=3)
    rng = np.random.default_rng(0)
    logits = [rng.normal(0, 1, (len(pack), 3)) + gain * np.eye(3)[pack.target] for gain in (0.5, 2.0)]
    probs = [np.exp(one) / np.exp(one).sum(axis=1, keepdims=True) for one in logits]
    runs = [write_run(tmp_path / f"run{i}", pack, np.arange(len(pack)), p) for i, p in enumerate(probs)]
    found = biopsy.compare(runs, metric="accuracy", out=tmp_path / "out")
    entries = found["differences"][0]["metrics"]
    macro = [roc_auc_score(pack.target, p, multi_class="ovr") for p in probs]
    assert entries["auroc"]["value"] == pytest.approx(macro[1] - macro[0]) and entries["auroc"]["low"] > 0
    right = [(p.argmax(axis=1) == pack.target).mean() for p in probs]
    assert entries["accuracy"]["value"] == pytest.approx(right[1] - right[0])
    assert found["models"][1]["patch"]["accuracy"]["low"] is not None
    assert "accuracy of run1" in (tmp_path / "out" / "report.html").read_text()
    with refuses(MetricError, "'sensitivity'"):
        biopsy.compare(runs, metric="sensitivity")


def test_ids_can_be_hidden_everywhere(pair, tmp_path):
    biopsy.compare(pair[0], out=tmp_path / "out", hide_ids=True)
    for path in (tmp_path / "out").glob("*.[cjh]*"):
        text = re.sub(r"base64,[^\"]*", "", path.read_text())
        assert not re.search(r"(?<![\d.])88(63|65|67|69|71|73|75|77|79)(?!\d)", text), path.name
    assert "idx5" not in (tmp_path / "out" / "changed.csv").read_text()


def test_how_many_patients_a_pair_and_a_run_call_for(pair):
    (weak, strong), _ = pair
    alone, both = biopsy.compare(weak, plan=True), biopsy.compare(pair[0], plan=True, difference=0.1)
    assert [need["assumed"] for need in alone["needs"]] == [f"correlation {r}" for r in ("0", "0.5", "0.8")]
    counts = [need["n_patients"] for need in alone["needs"]]
    assert counts[0] > counts[1] > counts[2] and alone["n_patients_at_hand"] == 9
    assert alone["needs"][0]["sd"] == pytest.approx(alone["needs"][1]["sd"] * np.sqrt(2))
    assert both["needs"][0]["low"] <= both["needs"][0]["n_patients"] <= both["needs"][0]["high"]
    assert -1 <= both["correlation"] <= 1
    done = call("compare", "--plan", str(strong.path), "--difference", "0.05")
    assert done.exit_code == 0 and "0.05 in auroc" in done.stdout


def test_refusals(pack, pair, tmp_path):
    (weak, strong), (first, _) = pair
    half = np.arange(len(pack) // 2 + 8)
    part = write_run(tmp_path / "part", pack, half, first[half], split="folds", fold=1)
    with refuses(RunError, "weak", "144", "split patients", "part", "split folds, fold 1", "share 80"):
        biopsy.compare([weak, part])
    other = write_pack(tmp_path, "other.pack", n_patients=9, patches_per_patient=16, seed=5)
    stranger = write_run(tmp_path / "stranger", other, np.arange(len(other)), first)
    with refuses(RunError, "weak", "tiny.pack", "stranger", "other.pack"):
        biopsy.compare([weak, stranger])
    with refuses(RunError, "two", "runs or studies"):
        biopsy.compare(weak)
    with refuses(RunError, "nothing"):
        biopsy.compare([])
    with refuses(MetricError, "'auc'", "'auroc'"):
        biopsy.compare([weak, strong], metric="auc")
    copied = shutil.copytree(weak.path, tmp_path / "copied")
    with refuses(RunError, "found 3"):
        biopsy.compare([weak, strong, copied], plan=True)
    with refuses(MetricError, "vary"):
        biopsy.compare([weak, copied], plan=True)
    (strong.path / "predictions" / "test.parquet").rename(tmp_path / "away.parquet")
    with refuses(RunError, "test.parquet", "biopsy evaluate"):
        biopsy.compare([weak, strong])
    (tmp_path / "away.parquet").rename(strong.path / "predictions" / "test.parquet")
    with refuses(RunError, tmp_path / "nothing"):
        biopsy.compare([weak, tmp_path / "nothing"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    with refuses(RunError, tmp_path / "full", "--out"):
        biopsy.compare([weak, strong], out=tmp_path / "full")
    done = call("compare", str(weak.path), str(part.path))
    assert done.exit_code == 1 and done.stderr.count("\n") == 1 and not done.stdout
    few = write_run(tmp_path / "few", pack, half[:64], first[:64])
    with refuses(MetricError, "4 patients with positive patches"):
        biopsy.compare(few, plan=True)


@pytest.mark.parametrize("plan", [False, True])
def test_a_run_that_is_given_twice_is_refused(pair, tmp_path, monkeypatch, plan):
    (weak, strong), _ = pair
    (tmp_path / "link").symlink_to(weak.path)
    monkeypatch.chdir(weak.path.parent)
    for again in (weak, weak.path, "weak", "./strong/../weak/", tmp_path / "link"):
        with refuses(RunError, weak.path, "twice"):
            biopsy.compare([weak, strong, again], out=tmp_path / "out", plan=plan)
    assert not (tmp_path / "out").exists()


def test_a_sweep_or_reproduction_is_refused_with_its_runs_named(pack, tmp_path):
    made = write_study(tmp_path / "sweep", pack, {0: draw_prob(pack, 0)}, question="a grid of settings")
    (made.path / "predictions.parquet").unlink()
    with refuses(RunError, "f0-s0", "grid"):
        biopsy.compare([made, write_study(tmp_path / "other", pack, {0: draw_prob(pack, 0)})])


def test_a_difference_there_is_is_found_and_reported():
    target, first, second, groups = draw_pair(np.random.default_rng(8), 30, gain=2.0)
    scores = [sort_scores(target, p, group_ids=groups) for p in (first, second)]
    samples = [sample_seeds([one], Resampler(len(one.groups))) for one in scores]
    found = subtract(*samples)["auroc"]
    assert found.p < 0.001 and found.interval.low > 0
    assert subtract(samples[1], samples[0])["auroc"].p == pytest.approx(found.p)
    with refuses(MetricError, "same patients"):
        alone = sort_scores(target[:50], first[:50])
        subtract(samples[0], sample_seeds([alone], Resampler(50), names=["auroc"]))
