"""Stain transfer: patches recoloured with the stain their class has in another patient."""

import numpy as np
import pytest
import torch

from biopsy.training.batches import Batches
from biopsy.training.draws import Draws
from biopsy.training.stain_augmentation import density, fit_stain_transfer

STAINS = {"a": 0.3, "b": 0.5, "c": 0.9}  # optical density of each patient's patches
CLASSES = {"a": (0, 1), "b": (0, 1), "c": (1,)}


@pytest.fixture
def pack(make_pack):
    """Patients a and b have both classes, c one; the class adds to the density, the patient decides it."""
    rng = np.random.default_rng(0)
    pack = make_pack(n_patients=3, patches_per_patient=32)
    patients = sorted(set(pack.table["patient_id"]))
    pixels, target = np.array(pack.patches), np.array(pack.target)
    for patient, name in zip(patients, STAINS, strict=True):
        rows = np.flatnonzero(pack.table["patient_id"] == patient)
        target[rows] = np.resize(CLASSES[name], len(rows))
        for row in rows:
            od = rng.normal(STAINS[name] + 0.2 * target[row], 0.05, pixels[row].shape)
            pixels[row] = np.clip(np.rint(256 * np.exp(-od) - 1), 0, 255)
    object.__setattr__(pack, "patches", pixels)
    object.__setattr__(pack, "target", target)
    return pack


def recolour(pack, probability=1.0, seed=0):
    rows = np.arange(len(pack.target))
    transfer = fit_stain_transfer(pack, rows, probability, 0)
    batch = torch.from_numpy(pack.patches).permute(0, 3, 1, 2).float() / 255
    target = torch.from_numpy(pack.target).long()
    draws = Draws(torch.Generator().manual_seed(seed), len(rows))
    return transfer, batch, transfer.apply(batch, rows, target, draws)


def test_each_class_takes_the_density_it_has_in_a_patient_with_both(pack):
    transfer, _, changed = recolour(pack)
    means = density(changed).mean((1, 2, 3)).numpy()
    for label in (0, 1):
        expected = [STAINS["a"] + 0.2 * label, STAINS["b"] + 0.2 * label]
        nearest = np.abs(means[pack.target == label][:, None] - expected)
        assert nearest.min(1).max() < 0.02
        assert set(nearest.argmin(1)) == {0, 1}
    assert [len(lenders) for lenders in transfer.lenders] == [2, 2]


def test_no_probability_no_transfer_and_some_changes_some(pack):
    assert fit_stain_transfer(pack, np.arange(len(pack.target)), 0.0, 0) is None
    _, batch, changed = recolour(pack, 0.4)
    moved = (changed - batch).abs().amax((1, 2, 3)) > 0.01
    assert 0.1 < moved.float().mean() < 0.5


def test_only_training_patches_are_measured(pack):
    rows = np.flatnonzero(pack.table["patient_id"] != sorted(set(pack.table["patient_id"]))[0])
    assert fit_stain_transfer(pack, rows, 1.0, 0) is None


def test_the_same_seed_gives_the_same_batch_and_the_epoch_another(pack):
    transfer, *_ = recolour(pack)
    from biopsy.recipes.preprocessing import Preprocessing

    side = pack.patches.shape[1]
    batches = Batches(
        patches=pack.patches,
        target=pack.target,
        preprocessing=Preprocessing(input_px=side),
        batch_size=8,
        stain_transfer=transfer,
    )
    order = np.arange(16)
    first, again = batches.load(order, 1, epoch=1), batches.load(order, 1, epoch=1)
    assert torch.equal(first[0], again[0]) and first[1].tolist() == pack.target[8:16].tolist()
    assert not torch.equal(first[0], batches.load(order, 1, epoch=2)[0])
