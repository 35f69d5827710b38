"""RandAugment for H&E: its operations against Pillow and OpenCV, its draws, its ranges."""

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from biopsy.recipes.schema import Augmentation
from biopsy.training import rand_augment as module
from biopsy.training.augmentation import augment
from biopsy.training.draws import Draws
from biopsy.training.patch_operations import change_stain
from biopsy.training.rand_augment import OPERATIONS, rand_augment

PILLOW = {"brightness": "Brightness", "contrast": "Contrast", "colour": "Color", "sharpness": "Sharpness"}
MOVES = ("translate_x", "translate_y", "shear_x", "shear_y", "rotate")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draws(n, seed=0):
    return Draws(generator(seed), n)


@pytest.fixture
def patches():
    """Pink patches with purple dots, ``(4, 3, 32, 32)`` of whole grey levels."""
    rng = np.random.default_rng(0)
    images = np.full((4, 32, 32, 3), (226, 165, 196), np.uint8)
    for image in images:
        for x, y in rng.integers(0, 32, (12, 2)):
            cv2.circle(image, (int(x), int(y)), 3, (96, 62, 138), -1)
    images = np.clip(images + rng.integers(-20, 21, images.shape), 0, 255).astype(np.uint8)
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


def change(name, patches, level, draws=(1.0, 1.0, 1.0, 1.0)):
    n = len(patches)
    return OPERATIONS[name](patches, torch.full((n,), float(level)), torch.tensor([draws] * n))


def as_images(patches):
    return [
        Image.fromarray(p) for p in (patches * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
    ]


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != "equalise"])
def test_level_0_changes_nothing(name, patches):
    assert torch.allclose(change(name, patches, 0), patches, atol=1e-5)


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_highest_level_keeps_colours_possible(name, patches):
    for sign in (-1, 1):
        changed = change(name, patches, 10, (sign,) * 4)
        assert changed.shape == patches.shape and changed.dtype == patches.dtype
        assert changed.isfinite().all() and changed.min() >= 0 and changed.max() <= 1 + 1e-6
        assert torch.equal(changed, patches) == (name == "identity")


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("name", PILLOW)
def test_enhancement_is_pillows(name, sign, patches):
    changed = change(name, patches, 6, (sign, 0, 0, 0)) * 255
    for image, ours in zip(as_images(patches), changed, strict=True):
        enhanced = getattr(ImageEnhance, PILLOW[name])(image).enhance(1 + sign * 0.54)
        difference = np.abs(np.asarray(enhanced, float) - ours.permute(1, 2, 0).numpy())
        assert difference[1:-1, 1:-1].max() < 2  # Pillow rounds greys, and leaves the border unsharpened


def test_equalisation_is_pillows(patches):
    for image, ours in zip(as_images(patches), as_images(change("equalise", patches, 3)), strict=True):
        assert np.array_equal(np.asarray(ImageOps.equalize(image)), np.asarray(ours))


@pytest.mark.parametrize("saturation", [-1.0, 1.0])
def test_hue_and_saturation_move_by_three_hundredths_a_level(saturation, patches):
    def hsv(batch):
        image = batch.permute(0, 2, 3, 1).reshape(1, -1, 3).contiguous().numpy()
        return torch.from_numpy(cv2.cvtColor(image, cv2.COLOR_RGB2HSV)[0] / [360, 1, 1])

    before, after = hsv(patches), hsv(change("hsv", patches, 10, (-0.5, saturation, 0, 0)))
    turn = (after[:, 0] - before[:, 0] + 0.15 + 0.5) % 1 - 0.5
    assert turn.abs().max() < 1e-3
    more = 0.3 * (1 - before[:, 1]) if saturation > 0 else torch.tensor(-0.3)
    assert torch.allclose(after[:, 1], before[:, 1] * (1 + more), atol=1e-4)
    assert torch.allclose(after[:, 2], before[:, 2], atol=1e-5)


def test_stains_move_by_three_hundredths_a_level(patches):
    changed = change("hed", patches, 5, (1.0, -1.0, 0.2, -0.2))
    scale, offset = torch.tensor([[1.15, 0.85]] * 4), torch.tensor([[0.03, -0.03]] * 4)
    assert torch.allclose(changed, change_stain(patches, scale=scale, offset=offset), atol=1e-6)


@pytest.mark.parametrize("name", MOVES)
def test_moves_are_in_pixels_of_the_source(name):
    """A patch whose channels are the coordinates shows where each pixel comes from, about the centre."""
    side, level = 64, 10
    x = (torch.arange(side) + 0.5 - side / 2).expand(side, side)
    place = torch.stack([x, x.T, x * 0])[None]
    moved = change(name, place, level)[0, :2, 24:40, 24:40]
    x, y = x[24:40, 24:40], x.T[24:40, 24:40]
    angle = np.radians(30)
    wanted = {
        "translate_x": (x + 5, y),
        "translate_y": (x, y + 5),
        "shear_x": (x + 0.3 * y, y),
        "shear_y": (x, y + 0.3 * x),
        "rotate": (np.cos(angle) * x - np.sin(angle) * y, np.sin(angle) * x + np.cos(angle) * y),
    }[name]
    assert torch.allclose(moved, torch.stack(wanted), atol=1e-3)


def test_operations_are_drawn_equally_often_and_levels_up_to_the_magnitude(monkeypatch):
    names = list(OPERATIONS)
    marks = {
        name: lambda patches, level, draws, mark=mark: patches + 100 * mark + level.view(-1, 1, 1, 1)
        for mark, name in enumerate(names)
    }
    monkeypatch.setattr(module, "OPERATIONS", marks)
    settings = Augmentation(rand_augment_n=1, rand_augment_magnitude=4)
    changed = rand_augment(settings, torch.zeros(6500, 3, 1, 1), draws(6500))[:, 0, 0, 0]
    counts = torch.bincount((changed / 100).long(), minlength=len(names))
    assert len(counts) == len(names) == 13 and counts.min() > 420 and counts.max() < 580
    level = changed % 100
    assert 3.95 < level.max() <= 4 and level.min() < 0.05
    assert level.mean().item() == pytest.approx(2, abs=0.1)


def test_as_many_operations_as_requested_each_on_the_result_of_the_last(monkeypatch):
    monkeypatch.setattr(module, "OPERATIONS", {"double": lambda patches, level, draws: 2 * patches})
    settings = Augmentation(rand_augment_n=3)
    assert torch.equal(
        augment(settings, torch.ones(4, 3, 2, 2), draws(4)),
        torch.full((4, 3, 2, 2), 8.0),
    )


def test_off_leaves_other_draws_as_they_are(patches):
    settings = {"hed_jitter": 0.2, "flip_vertical": True}
    plain = augment(Augmentation(**settings), patches, draws(len(patches)))
    idle = augment(Augmentation(**settings, rand_augment_magnitude=9), patches, draws(len(patches)))
    assert torch.equal(plain, idle)


@pytest.mark.parametrize("part", [slice(0, 1), slice(1, 4)])
def test_a_part_of_a_batch_gets_what_it_gets_in_the_whole(part, patches):
    settings = Augmentation(rand_augment_n=3, rand_augment_magnitude=10)
    whole = augment(settings, patches, draws(len(patches)))
    own = augment(settings, patches[part], Draws(generator(), 4, part))
    assert torch.allclose(own, whole[part], atol=1e-5)
