"""Training settings: epochs of so many updates, a share of the data, sigmoids, what differs as published."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

import biopsy.training.fit as fitting
from biopsy.core.errors import FileFormatError, PackError, RecipeError, RunError
from biopsy.core.files import read_json
from biopsy.evaluation.evaluate import evaluate
from biopsy.models import hardware
from biopsy.models.engine import Engine
from biopsy.recipes import load_recipe
from biopsy.training.batches import Batches
from biopsy.training.patch_weights import read_patch_weights
from biopsy.training.probe import check_probe
from biopsy.training.train import train
from conftest import write_pack
from refusals import refuses
from tiny_runs import LIVELY, assert_same_run, interrupt_at, train_tiny

THREE = "train.epochs=3"


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    return write_pack(tmp_path_factory.mktemp("training"), n_patients=8, patches_per_patient=8)


@pytest.fixture(scope="module")
def whole(pack, tmp_path_factory):
    """Three epochs of one pass each; change only a copy of it."""
    return train_tiny(pack, tmp_path_factory.mktemp("whole") / "run", THREE)


def test_an_epoch_may_be_a_number_of_updates(pack, tmp_path):
    whole = train_tiny(pack, tmp_path / "whole", "train.epochs=4", "train.steps_per_epoch=3")
    assert [record["step"] for record in whole.log()] == [3, 6, 9, 12]
    with pytest.raises(KeyboardInterrupt):
        train_tiny(
            pack, tmp_path / "cut", "train.epochs=4", "train.steps_per_epoch=3", on_epoch=interrupt_at(3)
        )
    assert_same_run(whole, train(resume=tmp_path / "cut", device="cpu"))


def test_epochs_of_as_many_updates_as_a_pass_has_are_passes(pack, whole, tmp_path):
    steps = whole.log()[0]["step"]
    assert_same_run(whole, train_tiny(pack, tmp_path / "run", THREE, f"train.steps_per_epoch={steps}"))


def test_updates_go_through_shuffled_passes(pack, tmp_path, monkeypatch):
    seen = []
    load = Batches._gather

    def note(self, order, number):
        seen.extend(order[number * self.batch_size : (number + 1) * self.batch_size])
        return load(self, order, number)

    monkeypatch.setattr(Batches, "_gather", note)
    options = ("train.steps_per_epoch=5", "train.batch_size=6", "train.drop_last=false")
    run = train_tiny(pack, tmp_path / "run", "train.epochs=5", *options)
    rows = np.flatnonzero(run.subsets(pack) == "train")
    passes = [seen[start : start + len(rows)] for start in range(0, len(seen), len(rows))]
    assert len(passes) == 4 and [sorted(each) for each in passes[:3]] == [rows.tolist()] * 3
    assert passes[0] != passes[1] != passes[2]


def test_a_fraction_of_the_training_patches_is_drawn_once(pack, tmp_path):
    options = ("train.fraction=0.4", "train.drop_last=false", "preprocessing.standardise=featurewise")
    run = train_tiny(pack, tmp_path / "run", *options)
    subsets = run.info["split"]["subsets"]["train"]
    assert subsets["per_class"] == {"non_idc": 24, "idc": 24}
    assert run.info["split"]["used"]["per_class"] == {"non_idc": 10, "idc": 10}
    assert [record["step"] for record in run.log()] == [3, 6]  # 20 patches in batches of 8
    mean = run.classifier.info.preprocessing.mean
    everything = pack.patches[run.subsets(pack) == "train"].reshape(-1, 3).mean(axis=0) / 255
    assert not np.allclose(mean, everything, rtol=1e-6)
    halved = train_tiny(pack, tmp_path / "halved", *options, "train.epochs=1", "train.sampling=undersample")
    assert halved.info["split"]["used"]["patches"] == 20


SIGMOID = ("train.loss=binary-cross-entropy", "train.monitor=val_loss", "decision.calibration=none")


def test_patches_are_sampled_within_patients(make_pack, tmp_path):
    columns = {"target": np.arange(64) % 8 // 6}  # a quarter of each patient's
    pack = make_pack(n_patients=8, patches_per_patient=8, columns=columns)
    setting = "train.sampling=within-patient"
    run = train_tiny(pack, tmp_path / "run", setting)
    assert run.info["split"]["class_shares"] == pytest.approx({"non_idc": 0.5, "idc": 0.5})
    assert run.info["split"]["used"] == run.info["split"]["subsets"]["train"]
    assert run.log()[-1]["step"] == 2 * -(-run.info["split"]["used"]["patches"] // 8)
    columns |= {"patient_id": None, "slide_id": None}
    without = make_pack(name="without.pack", n_patients=8, patches_per_patient=8, columns=columns)
    split = train_tiny(without, tmp_path / "without", setting).info["split"]
    assert "class_shares" not in split  # every patch is drawn once


def write_weights(pack, path, weights, rows=None):
    ids = pack.table["patch_id"] if rows is None else pack.table["patch_id"].iloc[rows]
    pd.DataFrame({"patch_id": ids, "weight": weights}).to_csv(path, index=False)
    return f"train.patch_weights={path}"


def test_patch_weights_scale_to_a_mean_of_one_over_training(pack, tmp_path):
    train = np.arange(48)
    write_weights(pack, tmp_path / "w.csv", [0.5, 0, 2], rows=[0, 1, 60])
    weights = read_patch_weights(tmp_path / "w.csv", pack, train)
    assert weights[train].mean() == pytest.approx(1)
    assert weights[[0, 1, 2, 60]] / weights[2] == pytest.approx([0.5, 0, 1, 2])


def test_equal_patch_weights_change_nothing_and_zero_weights_leave_out(pack, whole, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_weights(pack, tmp_path / "equal.csv", 0.25)
    equal = train_tiny(pack, tmp_path / "equal", THREE, "train.patch_weights=~/equal.csv")
    assert_same_run(whole, equal)
    chosen = np.flatnonzero(whole.subsets(pack) == "train")
    kept = chosen[np.arange(len(chosen)) % 2 == 0]
    setting = write_weights(pack, tmp_path / "half.csv", np.isin(chosen, kept).astype(int), rows=chosen)
    run = train_tiny(pack, tmp_path / "half", THREE, setting)
    assert run.info["inputs"]["patch_weights"]["source"] == str(tmp_path / "half.csv")
    counts = np.bincount(pack.target[kept])
    assert list(run.info["split"]["class_shares"].values()) == pytest.approx((counts / counts.sum()).tolist())
    again = write_weights(pack, tmp_path / "copy.csv", np.isin(chosen, kept).astype(int), rows=chosen)
    same = train_tiny(pack, tmp_path / "same", THREE, again)
    assert same.info["config_sha256"] == run.info["config_sha256"] != whole.info["config_sha256"]
    assert_same_run(run, same)


def test_a_resumed_run_needs_the_weights_that_it_began_with(pack, tmp_path):
    setting = write_weights(pack, tmp_path / "w.csv", np.linspace(0.1, 1, len(pack)))
    whole = train_tiny(pack, tmp_path / "whole", THREE, setting)
    with pytest.raises(KeyboardInterrupt):
        train_tiny(pack, tmp_path / "cut", THREE, setting, on_epoch=interrupt_at(2))
    content = (tmp_path / "w.csv").read_text()
    (tmp_path / "w.csv").write_text(content.replace(",0.1\n", ",0.2\n"))
    with refuses(RunError, "w.csv", "train.patch_weights"):
        train(resume=tmp_path / "cut", device="cpu")
    (tmp_path / "w.csv").write_text(content)
    assert_same_run(whole, train(resume=tmp_path / "cut", device="cpu"))


@pytest.mark.parametrize(
    ("weights", "rows", "facts"),
    [
        ([1, -0.5], [0, 1], ["-0.5"]),
        ([1, None], [0, 1], ["weight"]),
        ([1, np.inf], [0, 1], ["inf"]),
        ([1, 1], [0, 0], ["twice"]),
        ([1], [63], ["no training patch"]),
        (0, None, ["weight 0"]),
    ],
)
def test_patch_weights_that_cannot_be_used_are_refused(pack, tmp_path, weights, rows, facts):
    write_weights(pack, tmp_path / "w.csv", weights, rows)
    with refuses(FileFormatError, "w.csv", *facts):
        read_patch_weights(tmp_path / "w.csv", pack, np.arange(48))


def test_weights_of_unknown_patches_or_of_a_probe_are_refused(pack, tmp_path):
    (tmp_path / "w.csv").write_text("patch_id,weight\nelsewhere,1\n")
    with refuses(PackError, "elsewhere"):
        read_patch_weights(tmp_path / "w.csv", pack, np.arange(48))
    with refuses(RecipeError, "train.patch_weights"):
        check_probe(load_recipe("probe", ["train.patch_weights=w.csv", "model.weights=imagenet"]))
    with refuses(FileFormatError, "nowhere.csv"):
        train_tiny(pack, tmp_path / "run", "train.patch_weights=nowhere.csv")
    assert not (tmp_path / "run").exists()


def test_sigmoid_outputs_from_loss_to_classifier(pack, tmp_path, monkeypatch):
    monkeypatch.setattr("biopsy.training.batch_norm.MOST_DISAGREEMENT", np.inf)  # the log's statistics stay
    run = train_tiny(pack, tmp_path / "run", *LIVELY, *SIGMOID, recipe="idc-small")
    classifier = run.classifier
    assert classifier.info.outputs == "sigmoid"
    frame, _ = run.predictions("validation")
    logits = frame[["logit_non_idc", "logit_idc"]].to_numpy(np.float64)
    target, positive = frame["target"].to_numpy(), frame["prob_idc"].to_numpy()
    sigmoid = 1 / (1 + np.exp(-logits))
    np.testing.assert_allclose(positive, sigmoid[:, 1] / sigmoid.sum(axis=1), rtol=1e-5)
    record = run.log()[run.info["chosen_epoch"] - 1]
    wanted = np.eye(2)[target]
    loss = -(wanted * np.log(sigmoid) + (1 - wanted) * np.log(1 - sigmoid)).mean()
    assert record["val_loss"] == pytest.approx(loss, rel=1e-4)
    assert record["val_auroc"] == pytest.approx(roc_auc_score(target, positive), abs=1e-9)
    assert record["val_accuracy"] == pytest.approx((logits.argmax(axis=1) == target).mean())
    assert record["val_binary_accuracy"] == pytest.approx(((sigmoid > 0.5) == wanted).mean())
    assert 0 <= record["binary_accuracy"] <= 1


def test_sigmoids_are_ranked_by_their_common_probability(pack, tmp_path, monkeypatch):
    def answer(network, preprocessing, patches, sizes, rows, *, engine):
        return np.random.default_rng(len(rows)).normal(0, 4, (len(rows), 2)).astype(np.float32)

    monkeypatch.setattr(fitting, "predict_logits", answer)
    run = train_tiny(pack, tmp_path / "run", *SIGMOID)
    val = run.subsets(pack) == "validation"
    logits = answer(None, None, None, None, np.flatnonzero(val), engine=None).astype(np.float64)
    sigmoid = 1 / (1 + np.exp(-logits))
    wanted = roc_auc_score(pack.target[val], sigmoid[:, 1] / sigmoid.sum(axis=1))
    assert run.log()[0]["val_auroc"] == pytest.approx(wanted)
    assert wanted != pytest.approx(roc_auc_score(pack.target[val], logits[:, 1] - logits[:, 0]))


def test_softmax_runs_have_no_accuracy_per_output(whole):
    assert not [name for name in whole.log()[0] if "binary" in name]
    assert whole.classifier.info.outputs == "softmax"


def test_the_lowest_validation_loss_stops_and_is_kept(pack, tmp_path):
    options = ("train.monitor=val_loss", "train.early_stopping_patience=1", "train.epochs=30")
    run = train_tiny(pack, tmp_path / "run", *LIVELY, *options, "train.lr=0.05", recipe="idc-small")
    losses = [record["val_loss"] for record in run.log()]
    assert run.info["chosen_epoch"] == 1 + int(np.argmin(losses)) == len(losses) - 1 < 29
    assert losses == sorted(losses[:-1], reverse=True) + losses[-1:] and losses[-1] >= losses[-2]


BARUAH = (
    'as_published.split={method = "first-files", count = 60, test = 0.3, undersample = ["train", "test"], '
    "test_is_validation = true, seed = 0}"
)


def test_a_test_subset_that_validates_as_published(pack, tmp_path):
    options = (BARUAH, "as_published.checkpoint=best", "train.monitor=val_loss")
    run = train_tiny(pack, tmp_path / "run", *options, split="as-published")
    split = run.info["split"]
    assert split["test_is_validation"] is True and split["subsets"]["validation"]["patches"] == 0
    n_test = split["subsets"]["test"]["patches"]
    assert 0 < n_test < 18 and len(set(split["subsets"]["test"]["per_class"].values())) == 1
    frame, _ = run.predictions("validation")
    subsets = run.subsets(pack)
    assert sorted(frame["patch_id"]) == sorted(pack.table["patch_id"][subsets == "test"])
    assert set(frame["subset"]) == {"test"}
    assert run.info["threshold"] == {"value": 0.5, "rule": "argmax", "chosen_on": "test"}
    assert run.info["chosen_epoch"] == 1 + int(np.argmin([r["val_loss"] for r in run.log()]))
    assert train_tiny(pack, tmp_path / "apart").info["split"]["test_is_validation"] is False


def test_standardisation_may_differ_as_published(pack, tmp_path):
    options = ("preprocessing.standardise=featurewise", "as_published.standardise=none", "train.epochs=1")
    apart = train_tiny(pack, tmp_path / "apart", *options)
    published = train_tiny(pack, tmp_path / "published", *options, split="as-published")
    unsaid = train_tiny(pack, tmp_path / "unsaid", options[0], options[2], split="as-published")
    means = [run.classifier.info.preprocessing.mean for run in (apart, published, unsaid)]
    assert means[1] == (0, 0, 0) and min(means[0]) > 0.1 and min(means[2]) > 0.1


@pytest.mark.parametrize("has_bf16", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_run_keeps_the_precision_that_auto_chose(pack, tmp_path, monkeypatch, has_bf16):
    precision, auto = ("bf16" if has_bf16 else "fp32"), "train.precision=auto"
    monkeypatch.setattr(hardware, "_supports_bf16", lambda: has_bf16)
    whole = train_tiny(pack, tmp_path / "whole", f"train.precision={precision}")
    with pytest.raises(KeyboardInterrupt):
        train_tiny(pack, tmp_path / "cut", auto, on_epoch=interrupt_at(1))
    monkeypatch.setattr(hardware, "_supports_bf16", lambda: not has_bf16)
    resumed = train(resume=tmp_path / "cut", device="cpu")
    assert_same_run(whole, resumed)
    assert resumed.info["precision"] == resumed.recipe.train.precision == precision
    assert resumed.info["config_sha256"] == whole.info["config_sha256"]
    used = []
    monkeypatch.setattr("biopsy.evaluation.evaluate.Engine", lambda *a: used.append(a) or Engine(*a))
    evaluate(resumed)
    assert used == [("auto", precision)]
    other = train_tiny(pack, tmp_path / "other", auto, "train.epochs=1")
    assert read_json(other.path / "run.json")["precision"] != precision


@pytest.mark.parametrize("name", ["idc", "idc-small", "pcam-small", "probe"])
def test_recipes_in_bfloat16_ask_for_it_where_the_device_has_it(name):
    assert load_recipe(name).train.precision == "auto"
