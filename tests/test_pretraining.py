"""Self-supervised pre-training: what it reads, positives, loss, resuming, and training from its weights."""

import logging

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from biopsy.core.errors import FileFormatError, RecipeError, RunError, SplitError, UserFileError
from biopsy.core.files import read_json
from biopsy.data.packs import Pack
from biopsy.data.splits import find_split, split
from biopsy.models.weights import make_network
from biopsy.recipes import load_recipe
from biopsy.training.batches import Batches
from biopsy.training.pretraining import (
    COVARIANCE,
    Positives,
    View,
    pretrain,
    select_patches,
    vicreg_loss,
)
from biopsy.training.pretraining_record import DOCUMENT, FORMAT
from biopsy.training.seen_patients import check_start, record_seen
from biopsy.training.train import train
from command_line import call
from conftest import draw_patches
from refusals import refuses
from tiny_runs import interrupt_at

TINY = (
    "preprocessing.input_px=16",
    "model.params.base_channels=4",
    "train.batch_size=8",
    "train.precision=fp32",
)
TEST, VALIDATION = ("8863", "8865"), ("8867",)
TIMING = ("images_per_s", "seconds", "time_left_s")


def write(place, *, images=None, target=None, columns=()):
    """Write a pack of eight patients with a split ``fixed``: two test, one validates."""
    drawn, table = draw_patches(8, 9)
    options = {name: table[name] for name in ("patch_id", "slide_id", "x", "y")} | dict(columns)
    pack = Pack.from_arrays(
        drawn if images is None else images,
        table["target"] if target is None else target,
        table["patient_id"],
        class_names=["non_idc", "idc"],
        columns={name: values for name, values in options.items() if values is not None},
        out=place,
    )
    split(pack, protocol="patients", test_patients=TEST, val_patients=VALIDATION, name="fixed")
    return pack


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    return write(tmp_path_factory.mktemp("pretraining") / "own.pack")


def run(pack, out, *settings, recipe="idc-small", **options):
    given = {"split": "fixed", "epochs": 3} | options
    return pretrain(recipe, pack, overrides=(*TINY, *settings), out=out, device="cpu", **given)


@pytest.fixture(scope="module")
def whole(pack, tmp_path_factory):
    """Three epochs; change only a copy of it."""
    return run(pack, tmp_path_factory.mktemp("whole") / "out")


def log_of(result):
    return [{key: value for key, value in record.items() if key not in TIMING} for record in result["log"]]


def assert_same(one, other):
    assert one.weights.read_bytes() == other.weights.read_bytes()
    assert log_of(one) == log_of(other)


# --- laws


def test_the_same_seed_gives_the_same_weights_and_another_does_not(pack, whole, tmp_path):
    assert_same(whole, run(pack, tmp_path / "again"))
    other = run(pack, tmp_path / "other", seed=1)
    assert other.weights.read_bytes() != whole.weights.read_bytes()


@pytest.mark.parametrize("epoch", [1, 2])
def test_an_interrupted_one_ends_as_if_it_had_not_been(epoch, pack, whole, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(pack, tmp_path / "cut", on_epoch=interrupt_at(epoch))
    stopped = read_json(tmp_path / "cut" / DOCUMENT, format=FORMAT)
    assert stopped["status"] == "running" and len(stopped["log"]) == epoch
    epochs = []
    assert_same(whole, run(pack, tmp_path / "cut", on_epoch=lambda record: epochs.append(record["epoch"])))
    assert epochs == [*range(epoch + 1, 4)]


def test_a_finished_one_is_returned_as_it_is(pack, whole):
    again = run(pack, whole.path, on_epoch=interrupt_at(1))
    assert again.document == whole.document


def test_held_out_pixels_and_labels_make_no_difference(whole, tmp_path):
    """Batches hold no patch of a held-out patient, and no label changes what is learned."""
    images, table = draw_patches(8, 9)
    is_held_out = table["patient_id"].isin([*TEST, *VALIDATION]).to_numpy()
    images[is_held_out] = 255 - images[is_held_out]
    target = np.random.default_rng(0).permutation(table["target"])
    assert_same(whole, run(write(tmp_path / "p", images=images, target=target), tmp_path / "out"))
    images[np.flatnonzero(~is_held_out)[0]] = 0
    other = run(write(tmp_path / "q", images=images), tmp_path / "changed")
    assert other.weights.read_bytes() != whole.weights.read_bytes()


def test_no_row_of_a_held_out_patient_is_gathered(pack, tmp_path, monkeypatch):
    seen, gather = set(), Batches._gather

    def note(self, order, number):
        seen.update(order.tolist())
        return gather(self, order, number)

    monkeypatch.setattr(Batches, "_gather", note)
    result = run(pack, tmp_path / "out", epochs=1)
    patients = set(pack.group_ids[sorted(seen)])
    assert patients == set(result["patients"]) == set(pack.group_ids) - {*TEST, *VALIDATION}


def test_stain_transfer_which_needs_labels_is_left_out(pack, whole, tmp_path):
    assert_same(whole, run(pack, tmp_path / "out", "augmentation.stain_transfer=0.5"))


# --- patches


def test_patients_in_no_subset_are_used_and_unknown_ones_are_not(pack):
    patients = pd.Series(pack.group_ids)
    subsets = split(
        pack, protocol="patients", test_patients=TEST, val_patients=VALIDATION, save=False
    ).subsets(pack)
    train_rows = np.flatnonzero(subsets == "train")
    assert select_patches(pack, subsets).tolist() == train_rows.tolist()
    left_out = subsets.copy()
    left_out[(patients == "8877").to_numpy()] = ""
    left_out[np.flatnonzero(patients == "8863")[:3]] = ""  # of a test patient
    assert select_patches(pack, left_out).tolist() == train_rows.tolist()
    unknown = Pack(pack.path, pack.info, pack.patches, pack.table.copy())
    unknown.table.loc[patients == "8877", ["patient_id", "slide_id"]] = None
    rest = select_patches(unknown, left_out)
    assert rest.tolist() == [row for row in train_rows if patients[row] != "8877"]


def test_training_patches_of_a_test_patient_are_left_out(pack):
    subsets = np.where(pack.group_ids == "8877", "test", "train")
    subsets[np.flatnonzero(subsets == "test")[0]] = "train"  # as in published splits by patch
    assert "8877" not in pack.group_ids[select_patches(pack, subsets)]
    subsets[:] = "test"
    with refuses(SplitError, "patient", "biopsy split"):
        select_patches(pack, subsets)


# --- positives


def grid(slide="a", step=50):
    y, x = (axis.ravel() for axis in np.mgrid[:3, :3])
    return pd.DataFrame({"x": x * step, "y": y * step, "slide_id": slide, "patient_id": None})


def test_positives_are_neighbours_at_one_step_of_the_same_slide():
    table = pd.concat([grid(), grid("b")], ignore_index=True).astype({"x": "Int64", "y": "Int64"})
    positives = Positives.find(table, 1.0)
    neighbours = np.split(positives.neighbours, positives.start[1:-1])
    assert [part.tolist() for part in neighbours[:5]] == [
        [1, 3, 4],
        [0, 2, 3, 4, 5],
        [1, 4, 5],
        [0, 1, 4, 6, 7],
        [0, 1, 2, 3, 5, 6, 7, 8],
    ]
    assert [(part - 9).tolist() for part in neighbours[9:]] == [part.tolist() for part in neighbours[:9]]
    order = np.random.default_rng(0).permutation(18)
    for epoch in range(20):
        drawn = positives.draw(order, np.random.default_rng(epoch))
        assert all(second in neighbours[first] for first, second in zip(order, drawn, strict=True))


def test_the_probability_of_a_neighbour_is_the_stated_one():
    order = np.tile(np.arange(9), 2000)
    drawn = Positives.find(grid(), 0.25).draw(order, np.random.default_rng(0))
    assert np.mean(drawn != order) == pytest.approx(0.25, abs=0.01)
    centre = drawn[(order == 4) & (drawn != 4)]
    assert np.bincount(centre, minlength=9) / len(centre) == pytest.approx(
        [0.125] * 4 + [0] + [0.125] * 4, abs=0.05
    )
    none = Positives.find(grid(), 0.0)
    assert none.n_with_neighbours == 0
    assert (none.draw(order, np.random.default_rng(0)) == order).all()


def test_patches_alone_or_without_coordinates_are_their_own_positives():
    table = grid().astype({"x": "Int64", "y": "Int64"})
    table.loc[:3, "x"] = pd.NA
    positives = Positives.find(table, 1.0)
    assert positives.n_with_neighbours == 5
    assert positives.draw(np.arange(9), np.random.default_rng(0))[:4].tolist() == [0, 1, 2, 3]
    assert Positives.find(table.iloc[:4], 1.0).n_with_neighbours == 0


def test_a_pack_without_coordinates_takes_the_same_patch_and_reports_it(tmp_path, caplog):
    pack = write(tmp_path / "p", columns={"x": None, "y": None})
    with caplog.at_level(logging.WARNING, "biopsy"):
        result = run(pack, tmp_path / "out", epochs=1)
    assert "same patch" in caplog.text
    assert (result["positives"], result["n_with_neighbours"]) == ("same patch", 0)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "biopsy"):
        alone = run(pack, tmp_path / "zero", epochs=1, neighbours=0)
    assert "same patch" not in caplog.text
    assert alone.weights.read_bytes() == result.weights.read_bytes()


# --- views and loss


def test_a_view_is_a_crop_of_at_least_the_stated_area():
    ramp = torch.arange(40.0).expand(300, 1, 40, 40)
    batch = torch.cat([ramp, ramp.transpose(2, 3), torch.zeros_like(ramp)], dim=1) / 40
    torch.manual_seed(0)
    views = View(0.2)(batch)
    assert views.shape == batch.shape and float(views.min()) >= 0 and float(views.max()) <= 1
    is_grey = (views[:, :1] == views).flatten(1).all(dim=1)
    assert float(is_grey.float().mean()) == pytest.approx(0.2, abs=0.06)
    coloured = views[~is_grey]
    width, height = (
        coloured[:, axis].flatten(1).amax(1) - coloured[:, axis].flatten(1).amin(1) for axis in (0, 1)
    )
    area = width * height
    assert 0.17 < float(area.min()) < 0.3 and float(area.max()) > 0.85
    ratio = (width / height)[area < 0.5]
    assert 0.7 < float(ratio.min()) < 0.8 and 1.25 < float(ratio.max()) < 1.4
    torch.testing.assert_close(View(0.2)(torch.ones(4, 3, 8, 8)), torch.ones(4, 3, 8, 8))


def test_the_loss_is_that_of_the_paper():
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, 12, 5)) * [0.2, 0.5, 1, 2, 3]
    expected = np.square(one - other).mean()
    for view in (one, other):
        expected += np.maximum(0, 1 - np.sqrt(view.var(axis=0, ddof=1) + 1e-4)).mean() / 2
        covariance = np.cov(view.T)
        expected += COVARIANCE * np.square(covariance[~np.eye(5, dtype=bool)]).sum() / 5
    loss = vicreg_loss(torch.from_numpy(np.concatenate([one, other])))
    assert float(loss) == pytest.approx(expected, rel=1e-9)


def test_equal_decorrelated_views_cost_nothing_and_collapsed_ones_do():
    corners = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    assert float(vicreg_loss(torch.cat([corners, corners]))) == 0
    assert float(vicreg_loss(torch.ones(8, 2))) == pytest.approx(0.99)


def test_a_collapse_is_recognised(pack, whole, tmp_path, caplog):
    settings = ("train.weight_decay=4", "train.lr=0.3", "train.momentum=0", "train.nesterov=false")
    for _ in range(2):  # as well where it has finished already
        caplog.clear()
        with caplog.at_level(logging.WARNING, "biopsy"):
            result = run(pack, tmp_path / "out", *settings)
        assert "collapsed" in caplog.text
    assert result["log"][-1]["spread"] < 0.1 < whole["log"][-1]["spread"]
    assert len(result["warnings"]) == 1 and whole["warnings"] == []


# --- results


def test_the_document_records_the_patients_learned_from(pack, whole):
    document = read_json(whole.path / DOCUMENT, format=FORMAT)
    assert document["status"] == "finished"
    assert document["pack"]["content_sha256"] == pack.info.content_sha256
    assert document["split"] == {"name": "fixed", "protocol": "patients", "unit": "patient", "fold": None}
    assert (document["seed"], document["epochs"], document["neighbours"], document["crop"]) == (
        0,
        3,
        0.5,
        0.2,
    )
    assert document["patients"] == ["8869", "8871", "8873", "8875", "8877"]
    assert (document["n_patches"], document["n_with_neighbours"]) == (45, 45)
    assert [record["step"] for record in document["log"]] == [5, 10, 15]
    assert document["environment"]["biopsy"]
    assert whole.to_frame()["loss"].tolist() == [record["loss"] for record in document["log"]]
    assert load_recipe(whole.path / "recipe.toml").train.batch_size == 8


def test_training_starts_from_the_weights_with_a_head_of_its_own(pack, whole, tmp_path):
    recipe = load_recipe("idc-small", [*TINY, f"model.weights={whole.weights}"])
    learned = load_file(whole.weights)
    networks = [make_network(recipe, 2, seed)[0].state_dict() for seed in (0, 1)]
    for name, tensor in learned.items():
        assert torch.equal(networks[0][name], tensor) and torch.equal(networks[1][name], tensor)
    assert networks[0].keys() - learned.keys() == {"head.weight", "head.bias"}
    assert not torch.equal(networks[0]["head.weight"], networks[1]["head.weight"])
    settings = (*TINY, "train.epochs=1", f"model.weights={whole.weights}")
    trained = train("idc-small", pack, split="fixed", overrides=settings, out=tmp_path / "r", device="cpu")
    assert trained.info["weights"]["pretrained"]
    assert trained.info["weights"]["sha256"] == whole["weights_sha256"]


def test_weights_that_have_seen_a_test_patient_are_refused(pack, whole, tmp_path):
    split(pack, protocol="patients", test_patients=["8869"], val_patients=VALIDATION, name="other")
    options = {"overrides": (*TINY, f"model.weights={whole.weights}", "train.epochs=1"), "device": "cpu"}
    with refuses(SplitError, whole.weights, "8869"):
        train("idc-small", pack, split="other", out=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()
    other = write(tmp_path / "p", target=1 - pack.target)  # another pack, whose ids may be of other people
    split(other, protocol="patients", test_patients=["8869"], val_patients=VALIDATION, name="other")
    train("idc-small", other, split="other", out=tmp_path / "run", **options)


def test_pre_training_does_not_start_from_weights_that_have_seen_a_test_patient(pack, whole, tmp_path):
    split(pack, protocol="patients", test_patients=["8871"], val_patients=VALIDATION, name="third")
    with refuses(SplitError, whole.weights, "8871"):
        run(pack, tmp_path / "out", f"model.weights={whole.weights}", split="third")
    run(pack, tmp_path / "same", f"model.weights={whole.path}", epochs=1)


def test_weights_that_learned_from_some_that_have_seen_a_test_patient_are_refused(pack, whole, tmp_path):
    images, table = draw_patches(8, 9, seed=1)
    patients, names = "other " + table["patient_id"], {"class_names": pack.class_names}
    other = Pack.from_arrays(images, table["target"], patients, out=tmp_path / "other", **names)
    split(other, protocol="patients", name="fixed")
    later = run(other, tmp_path / "later", f"model.weights={whole.path}", epochs=1)
    assert [record["train"] for record in later["seen"]] == [whole["patients"]]
    split(pack, protocol="patients", test_patients=["8869"], val_patients=VALIDATION, name="fourth")
    settings = (*TINY, f"model.weights={later.path}")
    with refuses(RunError, later.path, whole.path, "8869"):
        train("idc-small", pack, split="fourth", overrides=settings, out=tmp_path / "run", device="cpu")
    recipe, split_subsets = load_recipe("idc-small", settings), find_split(pack, "fixed").subsets(pack)
    assert check_start(recipe, pack, split_subsets) is None
    seen = record_seen([], recipe, pack, split_subsets)
    assert [record["model"] for record in seen] == [str(later.path), str(whole.path)]


def test_without_ids_weights_are_of_one_split_and_fold(tmp_path):
    images, table = draw_patches(8, 9)
    names = {"class_names": ["non_idc", "idc"], "out": tmp_path / "p"}
    pack = Pack.from_arrays(images, table["target"], **names)
    assert pack.unit == "patch"
    split(pack, protocol="folds", folds=4, name="folds")
    weights = run(pack, tmp_path / "out", split="folds", fold=1, epochs=1).weights
    settings = (*TINY, f"model.weights={weights}", "model.context=0", "train.epochs=1")
    options = {"split": "folds", "overrides": settings, "device": "cpu"}
    with refuses(SplitError, weights, "'folds'", "fold 1"):
        train("idc-small", pack, fold=2, out=tmp_path / "two", **options)
    trained = train("idc-small", pack, fold=1, out=tmp_path / "one", **options)
    subsets, later = trained.subsets(pack), load_recipe("idc-small", [f"model.weights={trained.path}"])
    assert check_start(later, pack, subsets) is None


@pytest.mark.slow
def test_a_network_of_a_library_is_pre_trained_too(pack, tmp_path):
    settings = ("model.name=timm:resnet10t", "model.params={}", "train.batch_size=16")
    out = run(pack, tmp_path / "out", *settings, "preprocessing.input_px=32", epochs=1)
    recipe = load_recipe("idc-small", ["model.name=timm:resnet10t", f"model.weights={out.weights}"])
    network = make_network(recipe, 2, 0)[0]
    learned = load_file(out.weights)
    assert learned and all(name.startswith("body.") for name in learned)
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in learned.items())


def test_the_command_prints_epochs_and_the_result(pack, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = [word for setting in TINY for word in ("--set", setting)]
    words = ("pretrain", "idc-small", "--data", pack.path, "--split", "fixed", "--epochs", "2", *settings)
    result = call(*words, "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    weights = tmp_path / "pretrained" / "idc-small-fixed-s0" / "weights.safetensors"
    assert weights.is_file() and f"model.weights={weights.relative_to(tmp_path)}" in result.stdout
    assert [line.split()[1] for line in result.stderr.splitlines() if line.startswith("epoch")] == ["1", "2"]


# --- bad input


def test_the_split_must_be_named_and_exist(pack, tmp_path):
    assert call("pretrain", "idc-small", "--data", pack.path).exit_code == 2
    with refuses(SplitError, "'fixd'", "fixed"):
        run(pack, tmp_path / "out", split="fixd")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "settings", "facts"),
    [
        ({"epochs": 0}, (), ["epochs=0"]),
        ({"neighbours": 1.5}, (), ["neighbours=1.5", "between 0 and 1"]),
        ({"neighbours": float("nan")}, (), ["neighbours=nan"]),
        ({"crop": 0}, (), ["crop=0"]),
        ({"crop": 1.1}, (), ["crop=1.1"]),
        ({}, ("train.batch_size=1",), ["train.batch_size"]),
        ({}, ("model.trainable=head",), ["idc-small", "model.trainable=all"]),
        ({"recipe": "vgg16-pcam"}, ("model.params={}",), ["vgg16-pcam", "block5"]),
        ({}, ("train.optimiser=logistic-regression",), ["idc-small"]),
    ],
)
def test_impossible_settings_are_refused(options, settings, facts, pack, tmp_path):
    with refuses(RecipeError, *facts):
        run(pack, tmp_path / "out", *settings, **options)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_refused(pack, whole, tmp_path):
    for options in ({"seed": 1}, {"epochs": 4}, {"crop": 0.3}, {"neighbours": 0.4}):
        with refuses(RunError, whole.path, "--out"):
            run(pack, whole.path, **options)
    with refuses(RunError, whole.path):
        run(pack, whole.path, "augmentation.hed_jitter=0.4")
    (tmp_path / "notes.txt").write_text("mine")
    with refuses(UserFileError, tmp_path, reason="not-empty"):
        run(pack, tmp_path)


def test_altered_weights_are_refused(pack, tmp_path):
    result = run(pack, tmp_path / "out", epochs=1)
    result.weights.write_bytes(result.weights.read_bytes()[:-1] + b"\1")
    with refuses(FileFormatError, result.weights, reason="altered"):
        run(pack, tmp_path / "out", epochs=1)
