from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from biopsy.data.packs import Pack
from biopsy.data.prepare import prepare
from biopsy.data.splits import split as make_split
from biopsy.evaluation import colour_baseline as baseline
from biopsy.evaluation.colour_baseline import colour_baseline
from biopsy.slide_io.stain import FEATURE_NAMES

MakePack = Callable[..., Pack]


def test_baseline_scores_the_named_subset(make_pack: MakePack) -> None:
    pack = make_pack(n_patients=8, noise=2)
    subsets = make_split(pack, protocol="patients", save=False).subsets(pack)
    for subset in ("validation", "test"):
        found, probs = colour_baseline(pack, subsets, subset=subset)
        np.testing.assert_allclose(probs.sum(axis=1), 1)
        assert found.auroc == roc_auc_score(pack.target[subsets == subset], probs[:, 1])
    assert found.auroc is not None and found.auroc > 0.9  # more dark dots, more haematoxylin
    assert found.features == list(FEATURE_NAMES)


def test_shuffled_labels_score_about_chance(make_pack: MakePack) -> None:
    target = np.random.default_rng(0).integers(0, 2, 480)
    pack = make_pack(n_patients=40, columns={"target": target})
    subsets = np.where(np.arange(480) < 240, "train", "test")
    assert colour_baseline(pack, subsets)[0].auroc == pytest.approx(0.5, abs=0.1)


def test_three_classes_are_scored_one_against_rest(make_pack: MakePack) -> None:
    pack = make_pack(n_patients=6, n_classes=3)
    subsets = np.where(pack.group_ids < "8869", "train", "test")
    found, probs = colour_baseline(pack, subsets)
    target = np.eye(3)[pack.target[subsets == "test"]]
    assert found.auroc == pytest.approx(roc_auc_score(target, probs, average="macro"))
    subsets[(subsets == "test") & (pack.target == 2)] = ""
    found, _ = colour_baseline(pack, subsets)  # as the model's own macro AUROC
    assert found.auroc is None and found.reason == "the scored subset lacks a class"


def test_no_score_without_two_classes(make_pack: MakePack) -> None:
    pack = make_pack(n_patients=4)
    subsets = np.where(pack.target == 0, "train", "test")
    assert colour_baseline(pack, subsets)[0].reason == "train has 1 classes and test 24 patches"
    subsets = np.where((pack.target == 0) & (pack.group_ids == "8863"), "test", "train")
    found, probs = colour_baseline(pack, subsets)
    assert found.auroc is None and found.reason == "the scored subset lacks a class"
    assert len(probs) == 6


def test_learns_from_a_draw_of_very_many(make_pack: MakePack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baseline, "MAX_TRAIN_PATCHES", 20)
    pack = make_pack(n_patients=6)
    subsets = np.where(pack.group_ids < "8869", "train", "test")
    first, again, other = (colour_baseline(pack, subsets, seed=seed) for seed in (0, 0, 1))
    assert first[0].n_train == 20
    np.testing.assert_array_equal(first[1], again[1])
    assert not np.array_equal(first[1], other[1])


@pytest.mark.data
def test_whole_idc_slides_leave_one_out(idc_pack: Pack) -> None:
    pack = idc_pack
    for slide, expected in (("8863", 0.93), ("8865", 0.93), ("8867", 0.94)):
        subsets = np.where(pack.group_ids == slide, "test", "train")
        assert colour_baseline(pack, subsets)[0].auroc == pytest.approx(expected, abs=0.02)


@pytest.fixture
def idc_pack(data_dir: Path, tmp_path: Path) -> Pack:
    return prepare(data_dir / "idc" / "idc_kaggle_subset.zip", tmp_path / "idc.pack")
