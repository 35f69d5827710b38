"""RandStainNA: colours matched to templates drawn from those of training patches."""

import numpy as np
import pytest
import torch

from biopsy.recipes import load_recipe
from biopsy.recipes.preprocessing import Preprocessing
from biopsy.training.batches import Batches
from biopsy.training.colour_spaces import lab_to_rgb, rgb_to_lab
from biopsy.training.draws import Draws
from biopsy.training.stain_augmentation import fit_rand_stain_na
from biopsy.training.train import train
from tiny_runs import assert_same_run, interrupt_at, train_tiny

MEAN = np.array([[60, 10, -10], [70, 20, -5], [65, 15, 0]])  # L*, a* and b* of each patient
N_PATCHES = 12


@pytest.fixture
def pack(make_pack):
    """Three patients of their own colours; all patches have the same standard deviations."""
    rng = np.random.default_rng(0)
    pack = make_pack(n_patients=3, patches_per_patient=N_PATCHES)
    lab = MEAN[patient_of(pack)][:, :, None, None] + rng.normal(0, 2, (len(pack.target), 3, 24, 24))
    rgb = lab_to_rgb(torch.from_numpy(lab).float()).permute(0, 2, 3, 1)
    object.__setattr__(pack, "patches", (rgb * 255).round().byte().numpy())
    object.__setattr__(pack, "sizes", np.full((len(pack.target), 2), 24))
    return pack


def patient_of(pack):
    return np.unique(pack.group_ids, return_inverse=True)[1]


def as_batch(pack):
    return torch.from_numpy(pack.patches).permute(0, 3, 1, 2).float() / 255


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draws(n, seed=0):
    return Draws(generator(seed), n)


def fit(pack, probability=1.0, rows=None):
    return fit_rand_stain_na(pack, np.arange(len(pack.target)) if rows is None else rows, probability, 0)


def test_the_distribution_is_that_of_the_patches(pack):
    fitted = fit(pack)
    assert np.abs(fitted.centre[0].numpy() - MEAN.mean(0)).max() < 0.3
    assert np.abs(fitted.spread[0].numpy() - MEAN.std(0)).max() < 0.3
    assert (fitted.centre[1] - 2).abs().max() < 0.3 and fitted.spread[1].max() < 0.2


def test_patients_weigh_the_same_whatever_their_number_of_patches(pack):
    patient = patient_of(pack)
    few = np.concatenate([np.flatnonzero(patient == 0), *(np.flatnonzero(patient == p)[:2] for p in (1, 2))])
    assert np.abs(fit(pack, rows=few).centre[0].numpy() - MEAN.mean(0)).max() < 0.3


def test_only_training_patches_are_measured(pack):
    fitted = fit(pack, rows=np.flatnonzero(patient_of(pack) == 1))
    assert np.abs(fitted.centre[0].numpy() - MEAN[1]).max() < 0.3
    assert fitted.spread[0].max() < 0.3


def test_patches_get_the_statistics_of_templates(pack):
    fitted = fit(pack)
    batch = as_batch(pack)[:1].expand(600, -1, -1, -1)
    lab = rgb_to_lab(fitted.apply(batch, draws(len(batch))))
    sd, mean = torch.std_mean(lab, (2, 3))
    for statistic, centre, spread in zip((mean, sd), fitted.centre, fitted.spread, strict=True):
        assert torch.allclose(statistic.mean(0), centre, atol=0.5)
        assert torch.allclose(statistic.std(0), spread, atol=0.5)
    assert torch.corrcoef(mean.T)[0, 1].abs() < 0.15  # each number is drawn by itself


def test_structure_stays(pack):
    changed = fit(pack).apply(as_batch(pack), draws(len(as_batch(pack))))
    for before, after in zip(rgb_to_lab(as_batch(pack)), rgb_to_lab(changed), strict=True):
        assert torch.corrcoef(torch.stack([before[0].flatten(), after[0].flatten()]))[0, 1] > 0.99


def test_glass_is_not_stretched_to_noise(pack):
    glass = torch.full((4, 3, 24, 24), 0.95)
    glass[:, :, ::2] += 1 / 255
    changed = fit(pack).apply(glass, draws(len(glass)))
    assert (changed.amax((2, 3)) - changed.amin((2, 3))).max() < 0.05


def test_the_probability_is_that_of_a_change_and_none_is_no_fit(pack):
    assert fit(pack, 0.0) is None
    batch = as_batch(pack)[:1].expand(500, -1, -1, -1)
    changed = fit(pack, 0.3).apply(batch, draws(len(batch)))
    moved = (changed != batch).flatten(1).any(1)
    assert moved.float().mean().item() == pytest.approx(0.3, abs=0.06)
    assert torch.equal(fit(pack, 1e-9).apply(batch, draws(len(batch))), batch)


@pytest.mark.parametrize("part", [slice(0, 5), slice(5, 36)])
def test_a_part_of_a_batch_gets_what_it_gets_in_the_whole(pack, part):
    fitted, batch = fit(pack, 0.5), as_batch(pack)
    whole = fitted.apply(batch, draws(len(batch)))
    own = fitted.apply(batch[part], Draws(generator(), len(batch), part))
    assert torch.allclose(own, whole[part], atol=1e-5)


def test_a_recipe_switches_it_on_and_the_seed_and_epoch_decide_it(pack):
    recipe = load_recipe("idc-small", ["augmentation.rand_stain_na=0.5", "preprocessing.input_px=24"])
    rows = np.arange(len(pack.target))

    def load(epoch, seed=0):
        batches = Batches.from_pack(pack, recipe, rows, Preprocessing(input_px=24), seed=seed)
        return batches.load(rows, 0, epoch=epoch)[0]

    assert torch.equal(load(1), load(1))
    assert not torch.equal(load(1), load(2)) and not torch.equal(load(1), load(1, seed=1))


def test_a_run_with_random_colours_and_squares_resumes(make_pack, tmp_path):
    pack = make_pack(n_patients=6, patches_per_patient=8)
    options = ("rand_stain_na=0.5", "rand_augment_n=2", "blur_px=1", "cutout=0.3")
    settings = tuple(f"augmentation.{option}" for option in options)
    whole = train_tiny(pack, tmp_path / "whole", *settings)
    with pytest.raises(KeyboardInterrupt):
        train_tiny(pack, tmp_path / "cut", *settings, on_epoch=interrupt_at(1))
    assert_same_run(whole, train(resume=tmp_path / "cut", device="cpu"))
