"""Distillation: the loss, the teacher's view of the training patches, and which teachers are refused."""

import json
import logging
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional

from biopsy.core.errors import RecipeError, RunError
from biopsy.core.files import sha256_file, write_json
from biopsy.data.packs import Pack
from biopsy.data.splits import split
from biopsy.models.engine import Engine, make_loss
from biopsy.recipes import load_recipe
from biopsy.training.distillation import check_teachers, identify_teachers, list_teachers, predict_teachers
from biopsy.training.distributed import ALONE
from biopsy.training.probe import check_probe
from biopsy.training.seen_patients import check_start, record_seen
from biopsy.training.train import train
from conftest import draw_patches, write_pack
from refusals import refuses
from tiny_runs import LIVELY, assert_same_run, interrupt_at, train_tiny


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    pack = write_pack(tmp_path_factory.mktemp("distillation"), n_patients=8, patches_per_patient=8)
    split(pack, protocol="folds", folds=4, name="folds")
    return pack


def test_teachers_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert list_teachers("~/runs/a, idc") == [str(tmp_path / "runs" / "a"), "idc"]


def learn(pack, out, *settings, fold=0, **options):
    return train(
        "idc-small", pack, overrides=(*LIVELY, *settings), out=out, split="folds", fold=fold, device="cpu",
        **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def teacher(pack, tmp_path_factory):
    return learn(pack, tmp_path_factory.mktemp("teacher") / "run", "model.tta=d4", "model.context=1")


@pytest.mark.parametrize("outputs", ["softmax", "sigmoid"])
def test_the_loss_by_hand(outputs):
    generator = torch.Generator().manual_seed(0)
    logits, target = torch.randn(6, 3, generator=generator), torch.tensor([0, 1, 2, 2, 1, 0])
    probs = torch.rand(6, 3, generator=generator).softmax(dim=1)
    plain = make_loss(outputs, label_smoothing=0.1)(logits, target)
    options = {"label_smoothing": 0.1, "temperature": 2.0}
    assert torch.equal(
        make_loss(outputs, **options, teacher_weight=0.0)(logits, target, teacher=probs), plain
    )
    if outputs == "softmax":
        soft = -(probs * functional.log_softmax(logits / 2, dim=1)).sum(dim=1).mean() * 4
    else:
        z = logits / 2
        soft = -(probs * functional.logsigmoid(z) + (1 - probs) * functional.logsigmoid(-z)).mean() * 4
    mixed = make_loss(outputs, **options, teacher_weight=0.3)(logits, target, teacher=probs)
    assert torch.isclose(mixed, 0.7 * plain + 0.3 * soft)
    sure = functional.one_hot(target, 3).float()
    alone = make_loss(outputs, teacher_weight=1.0)(logits, target, teacher=sure)
    assert torch.isclose(alone, make_loss(outputs)(logits, target))


def test_teachers_are_averaged_as_they_predict_uncalibrated(pack, teacher, tmp_path):
    other = learn(pack, tmp_path / "other", seed=1)
    rows = np.flatnonzero(teacher.subsets(pack) == "validation")
    options = {"engine": Engine("cpu"), "processes": ALONE, "temperature": 2.0}
    found = predict_teachers(f"{teacher.path}, {other.path}", pack, rows, **options)
    mean = np.zeros((len(rows), 2))
    for run in (teacher, other):
        frame = run.predictions("validation")[0]
        assert frame["patch_id"].tolist() == pack.table["patch_id"].iloc[rows].tolist()
        logits = frame[[f"logit_{name}" for name in pack.class_names]].to_numpy() / 2
        mean += np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True) / 2
    assert np.allclose(found[rows], mean, atol=1e-4)
    assert found.sum() == pytest.approx(len(rows))


def test_a_student_follows_its_teacher(pack, teacher, tmp_path, caplog):
    settings = (f"train.teacher={teacher.path}", "train.teacher_weight=0.9", "train.teacher_temperature=2")
    with caplog.at_level(logging.WARNING):
        run = learn(pack, tmp_path / "run", *settings)
    assert "teacher" not in caplog.text
    assert run.info["inputs"]["teacher"] == identify_teachers(str(teacher.path))
    plain = learn(pack, tmp_path / "plain")
    assert run.info["config_sha256"] != plain.info["config_sha256"]
    assert learn(pack, run.path, *settings).path == run.path
    with pytest.raises(KeyboardInterrupt):
        learn(pack, tmp_path / "cut", *settings, on_epoch=interrupt_at(2))
    assert_same_run(run, train(resume=tmp_path / "cut", device="cpu"))


def test_a_resumed_student_needs_the_teacher_that_it_began_with(pack, teacher, tmp_path):
    copied = shutil.copytree(teacher.path, tmp_path / "teacher")
    with pytest.raises(KeyboardInterrupt):
        learn(pack, tmp_path / "cut", f"train.teacher={copied}", on_epoch=interrupt_at(1))
    shutil.rmtree(copied)
    shutil.copytree(learn(pack, tmp_path / "other", seed=1).path, copied)
    with refuses(RunError, copied, "train.teacher"):
        train(resume=tmp_path / "cut", device="cpu")


def test_teachers_of_tested_patients_are_refused(pack, teacher, tmp_path, caplog):
    setting = f"train.teacher={teacher.path}"
    with refuses(RunError, teacher.path, "tested", "split"):
        learn(pack, tmp_path / "two", setting, fold=2)  # which the teacher trained on
    with refuses(RunError, teacher.path, "tested"):
        learn(pack, tmp_path / "one", setting, fold=1)  # on which it was validated
    split(pack, protocol="patients", name="swapped", test_patients=list_tested(pack, teacher))
    with caplog.at_level(logging.WARNING):
        learn_swapped = train(
            "idc-small", pack, overrides=(*LIVELY, setting), split="swapped", out=tmp_path / "three",
            device="cpu",
        )  # fmt: skip
    warned = [record for record in caplog.records if "validation patients" in record.getMessage()]
    trained = pack.group_ids[teacher.subsets(pack) == "train"]
    validated = pack.group_ids[learn_swapped.subsets(pack) == "validation"]
    assert bool(warned) == bool(np.isin(validated, trained).any())


def test_a_patient_who_trains_and_tests_is_known_by_patch(pack, teacher):
    subsets = teacher.subsets(pack)
    divided = subsets.copy()
    divided[np.flatnonzero(subsets == "train")[0]] = "test"  # as published splits by patch have it
    with refuses(RunError, teacher.path, "tested"):
        check_teachers(str(teacher.path), pack, divided)
    divided = subsets.copy()
    divided[np.flatnonzero(subsets == "test")[0]] = "train"
    assert check_teachers(str(teacher.path), pack, divided) is None


def test_equal_pixels_of_two_patients_are_no_reason_to_refuse(tmp_path):
    images, table = draw_patches(8, 8)
    patients = sorted(set(table["patient_id"]))
    blank = table["patient_id"].map(patients.index).to_numpy() * 8 == np.arange(64)  # one of each patient
    images[blank] = 255
    names = {"class_names": ["non_idc", "idc"], "columns": {"patch_id": table["patch_id"]}}
    pack = Pack.from_arrays(images, table["target"], table["patient_id"], out=tmp_path / "p", **names)
    assert pack.table["sha256"].duplicated().sum() == 7
    split(pack, protocol="folds", folds=4, name="folds")
    run = learn(pack, tmp_path / "run", "train.epochs=1")
    assert check_teachers(str(run.path), pack, run.subsets(pack)) is None


def list_tested(pack, run):
    return sorted(set(pack.group_ids[run.subsets(pack) == "test"]))


def test_teachers_without_a_record_of_their_patients(pack, teacher, tmp_path):
    folder = shutil.copytree(teacher.path / "classifier", tmp_path / "classifier")
    with refuses(RunError, folder, "name its run"):
        learn(pack, tmp_path / "same", f"train.teacher={folder}")
    other = write_pack(tmp_path, "other.pack", n_patients=8, patches_per_patient=8, seed=1)
    run = train_tiny(other, tmp_path / "run", f"train.teacher={folder}")
    assert str(folder) in run.info["inputs"]["teacher"]["warning"]
    assert run.info["inputs"]["teacher"]["warning"] in run.info["warnings"]
    # the classifier in the folder of its run is that of the run
    with refuses(RunError, "tested"):
        learn(pack, tmp_path / "inside", f"train.teacher={teacher.path / 'classifier'}", fold=2)


def test_initial_weights_of_tested_patients_are_refused_as_teachers_are(pack, teacher, tmp_path):
    setting = f"model.weights={teacher.path / 'classifier' / 'weights.safetensors'}"
    for fold in (2, 1):  # on which it was trained, and validated
        with refuses(RunError, teacher.path, "tested", "split"):
            learn(pack, tmp_path / "run", setting, fold=fold)
    assert not (tmp_path / "run").exists()
    assert "warning" not in learn(pack, tmp_path / "run", setting, "train.epochs=1").info["weights"]


@pytest.mark.parametrize("part", ["", "classifier"])
def test_initial_weights_by_the_folder_of_a_run_or_classifier(pack, teacher, tmp_path, part):
    folder = teacher.path / part
    setting, weights = f"model.weights={folder}", teacher.path / "classifier" / "weights.safetensors"
    with refuses(RunError, teacher.path, "tested", "split"):
        learn(pack, tmp_path / "run", setting, fold=2)
    record = learn(pack, tmp_path / "run", setting, "train.epochs=1").info["weights"]
    assert "warning" not in record and record["sha256"] == sha256_file(weights)
    assert record["file"] == weights.name
    assert record["weights"] == weights.relative_to(folder.parent).as_posix()


def test_initial_weights_without_a_record_of_their_patients(pack, teacher, tmp_path):
    folder = shutil.copytree(teacher.path / "classifier", tmp_path / "classifier")
    setting = f"model.weights={folder / 'weights.safetensors'}"
    with refuses(RunError, folder, pack.path.name):
        learn(pack, tmp_path / "same", setting)
    other = write_pack(tmp_path, "other.pack", n_patients=8, patches_per_patient=8, seed=1)
    recipe = load_recipe("idc-small", (*LIVELY, setting))
    subsets = np.repeat(["train", "validation", "test", "train"], len(other) // 4)
    assert str(folder) in check_start(recipe, other, subsets)
    assert "idc" in check_start(load_recipe("idc-small", ["model.weights=idc"]), other, subsets)
    loose = shutil.copy(folder / "weights.safetensors", tmp_path)
    assert check_start(load_recipe(recipe, [f"model.weights={loose}"]), other, subsets) is None


SHORT = (*LIVELY, "train.epochs=1")


@pytest.fixture(scope="module")
def earliest(pack, tmp_path_factory):
    """A run that trains on all patients of the pack but the first two."""
    patients = sorted(set(pack.group_ids))
    split(pack, protocol="patients", name="first", test_patients=patients[:1], val_patients=patients[1:2])
    out = tmp_path_factory.mktemp("earliest") / "run"
    return train("idc-small", pack, overrides=SHORT, split="first", out=out, device="cpu")


def learn_elsewhere(place, *settings):
    """Train on a pack of other patients."""
    patients = "other " + draw_patches(4, 8, seed=1)[1]["patient_id"]
    other = write_pack(place, n_patients=4, patches_per_patient=8, seed=1, columns={"patient_id": patients})
    split(other, protocol="folds", folds=4, name="folds")
    return learn(other, place / "later", "train.epochs=1", *settings)


@pytest.mark.parametrize("setting", ["model.weights", "train.teacher"])
def test_models_that_learned_from_one_of_tested_patients_are_refused(
    pack, earliest, tmp_path, setting, caplog
):
    copied = shutil.copytree(earliest.path, tmp_path / "earliest")
    later = learn_elsewhere(tmp_path, f"{setting}={copied}")
    subsets, trained = earliest.subsets(pack), sorted(set(pack.group_ids))[2:]
    swapped = np.where(pack.group_ids == trained[0], "test", subsets)
    recipe = load_recipe("idc-small", (*SHORT, f"model.weights={later.path}"))
    seen = record_seen([str(later.path)], recipe, pack, subsets)
    assert [record["model"] for record in seen] == [str(later.path), str(copied)]
    assert [record["train"] == trained for record in seen] == [False, True]
    caplog.clear()
    assert check_start(recipe, pack, subsets) is check_teachers(str(later.path), pack, subsets) is None
    assert not caplog.records
    shutil.rmtree(copied)
    for check in (partial(check_start, recipe), partial(check_teachers, str(later.path))):
        with refuses(RunError, later.path, copied, f"1 tested patient, first {trained[0]}"):
            check(pack, swapped)


def test_earlier_models_of_runs_that_do_not_record_them(pack, earliest, tmp_path):
    copied = shutil.copytree(earliest.path, tmp_path / "earliest")
    later = learn_elsewhere(tmp_path, f"model.weights={copied}")
    document = json.loads((later.path / "run.json").read_text())
    del document["seen"]
    write_json(later.path / "run.json", document)
    swapped = np.where(earliest.subsets(pack) == "train", "test", "train")
    recipe = load_recipe("idc-small", (*SHORT, f"model.weights={later.path}"))
    with refuses(RunError, later.path, copied, "tested"):
        check_start(recipe, pack, swapped)
    shutil.copy(later.path / "classifier" / "weights.safetensors", copied / "classifier")
    assert check_start(recipe, pack, swapped) is None  # another model is there now


def test_earlier_models_that_do_not_record_their_patients(pack, earliest, tmp_path):
    folder = shutil.copytree(earliest.path / "classifier", tmp_path / "classifier")
    later = learn_elsewhere(tmp_path, f"model.weights={folder}")
    recipe = load_recipe("idc-small", (*SHORT, f"model.weights={later.path}"))
    with refuses(RunError, later.path, folder, pack.path.name):
        check_start(recipe, pack, earliest.subsets(pack))
    third = write_pack(tmp_path, "third.pack", n_patients=8, patches_per_patient=8, seed=2)
    assert str(later.path) in check_start(recipe, third, earliest.subsets(pack))


def test_teachers_that_cannot_teach_are_refused(pack, teacher, tmp_path):
    with refuses(RunError, "nowhere"):
        learn(pack, tmp_path / "a", "train.teacher=nowhere")
    with refuses(RecipeError, "train.teacher", "','", reason="value"):
        load_recipe("idc-small", ["train.teacher=','"])
    three = write_pack(tmp_path, "three.pack", n_patients=8, n_classes=3)
    with refuses(RunError, teacher.path, "classes"):
        train_tiny(three, tmp_path / "b", f"train.teacher={teacher.path}")
    with refuses(RecipeError, "train.teacher"):
        check_probe(load_recipe("probe", ["train.teacher=idc"]))
    assert not [path for path in tmp_path.iterdir() if path.name in "ab"]
