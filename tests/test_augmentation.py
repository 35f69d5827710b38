import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.nn import functional

from biopsy.core.errors import RecipeError
from biopsy.recipes import load_recipe
from biopsy.recipes.schema import Augmentation
from biopsy.slide_io.stain import combine_stains, separate_stains
from biopsy.training.augmentation import _draw_matrix, augment, cut_out
from biopsy.training.batches import Batches
from biopsy.training.draws import Draws
from biopsy.training.patch_operations import (
    affine_matrix,
    blur,
    change_stain,
    move_matrices,
    move_pixels,
    warp,
)
from refusals import refuses

POST = Augmentation(
    rotation_deg=20, zoom=0.05, shift=0.1, shear_deg=0.05, flip_horizontal=True, flip_vertical=True
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draws(n, seed=0):
    return Draws(generator(seed), n)


def make_batch(n=6, height=12, width=12):
    return torch.rand(n, 3, height, width, generator=generator(99)).contiguous(
        memory_format=torch.channels_last
    )


def draw_parameters(n, seed=0):
    rng = np.random.default_rng(seed)
    ranges = {"rotation_deg": 20, "shift_x_px": 4.8, "shift_y_px": 4.8, "shear_deg": 10}
    drawn = {name: torch.from_numpy(rng.uniform(-limit, limit, n)) for name, limit in ranges.items()}
    return drawn | {name: torch.from_numpy(rng.uniform(0.8, 1.2, n)) for name in ("zoom_x", "zoom_y")}


def test_everything_off_is_the_identity_bit_for_bit():
    batch = make_batch()
    assert torch.equal(augment(Augmentation(), batch, draws(len(batch))), batch)


@pytest.mark.parametrize(
    "settings",
    [
        POST,
        Augmentation(rot90=True),
        Augmentation(hed_jitter=0.2, hed_offset=0.2),
        Augmentation(blur_px=2),
        Augmentation(rand_augment_n=3),
    ],
)
def test_the_same_generator_gives_the_same_batch_and_another_gives_another(settings):
    batch = make_batch(16)
    first, same, other = (augment(settings, batch, draws(len(batch), seed)) for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert first.dtype == batch.dtype and first.shape == batch.shape


@pytest.mark.parametrize("settings", [POST, Augmentation(hed_jitter=0.2), Augmentation(blur_px=2)])
def test_each_patch_draws_for_itself(settings):
    batch = make_batch(1).expand(8, -1, -1, -1)
    changed = augment(settings, batch, draws(len(batch)))
    for i in range(8):
        assert sum(torch.equal(changed[i], other) for other in changed) == 1


def test_global_randomness_is_left_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    augment(POST, make_batch(), draws(6))
    assert torch.equal(before, torch.get_rng_state())


def test_quarter_turns_and_flips_only_move_pixels():
    batch = make_batch(200, 9, 9)
    settings = Augmentation(rot90=True, flip_horizontal=True, flip_vertical=True)
    moved = augment(settings, batch, draws(len(batch)))
    assert moved.is_contiguous(memory_format=torch.channels_last)
    seen = set()
    for before, after in zip(batch, moved, strict=True):
        possible = [torch.rot90(b, k, (1, 2)) for b in (before, before.flip(2)) for k in range(4)]
        matches = [i for i, candidate in enumerate(possible) if torch.equal(candidate, after)]
        assert len(matches) == 1
        seen.add(matches[0])
    assert seen == set(range(8))


@pytest.mark.parametrize(("settings", "dim"), [({"flip_horizontal": True}, 3), ({"flip_vertical": True}, 2)])
def test_a_flip_mirrors_half_of_the_patches_of_any_shape(settings, dim):
    batch = make_batch(400, 6, 8)
    moved = augment(Augmentation(**settings), batch, draws(len(batch)))
    mirrored = batch.flip(dim)
    flipped = [torch.equal(a, b) for a, b in zip(moved, mirrored, strict=True)]
    kept = [torch.equal(a, b) for a, b in zip(moved, batch, strict=True)]
    assert sum(flipped) + sum(kept) == 400
    assert 160 < sum(flipped) < 240


@pytest.mark.parametrize("move", range(16))
def test_a_move_by_matrix_is_the_move_by_pixels(move):
    """The warp composes flips and turns as matrices; alone they must give what moving the pixels gives."""
    batch, moves = make_batch(2, 10, 10), torch.tensor([move, move])
    matrix = torch.cat([move_matrices()[moves], torch.zeros(2, 2, 1, dtype=torch.float64)], dim=2)
    assert torch.allclose(warp(batch, matrix), move_pixels(batch, moves), atol=1e-5)


def test_pixels_are_resampled_where_pytorchs_affine_grid_says():
    generator = torch.Generator().manual_seed(3)
    batch, matrix = torch.rand(5, 3, 37, 23, generator=generator), torch.randn(5, 2, 3, generator=generator)
    to_unit = torch.tensor([[23 / 2], [37 / 2]])
    theta = torch.cat([matrix[:, :, :2] * to_unit.T / to_unit, matrix[:, :, 2:] / to_unit], dim=2)
    grid = functional.affine_grid(theta, [5, 3, 37, 23], align_corners=False)
    expected = functional.grid_sample(batch, grid, padding_mode="border", align_corners=False)
    assert torch.allclose(warp(batch, matrix), expected, atol=1e-5)


def test_interior_agrees_with_scipy():
    """An independent resampler, given the matrix written out by hand for each patch."""
    n, side = 12, 48
    smooth = ndimage.gaussian_filter(np.random.default_rng(0).random((n, side, side, 3)), (0, 1, 1, 0))
    parameters = draw_parameters(n)
    ours = warp(torch.from_numpy(smooth).permute(0, 3, 1, 2).float(), affine_matrix(**parameters))
    centre = np.array([side / 2 - 0.5] * 2)
    for i in range(n):
        p = {name: float(values[i]) for name, values in parameters.items()}
        a, s = math.radians(p["rotation_deg"]), math.radians(p["shear_deg"])
        rotation = np.array([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]])
        linear = rotation @ [[1, -math.sin(s)], [0, math.cos(s)]] @ np.diag([p["zoom_x"], p["zoom_y"]])
        shift = rotation @ [p["shift_x_px"], p["shift_y_px"]]
        rows_first, shift = linear[::-1, ::-1], shift[::-1]  # scipy counts rows before columns
        offset = centre + shift - rows_first @ centre
        for channel in range(3):
            wanted = ndimage.affine_transform(
                smooth[i, ..., channel], rows_first, offset, order=1, mode="nearest"
            )
            assert np.abs(ours[i, channel].numpy() - wanted).max() < 1 / 255


def test_directions_by_hand():
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    still = {"rotation_deg": zero, "shift_x_px": zero, "shift_y_px": zero, "shear_deg": zero}
    still |= {"zoom_x": one, "zoom_y": one}
    batch = make_batch(1, 8, 10)
    assert torch.allclose(warp(batch, affine_matrix(**still)), batch, atol=1e-6)
    right = warp(batch, affine_matrix(**still | {"shift_x_px": one * 2}))
    assert torch.allclose(right[..., :8], batch[..., 2:], atol=1e-5)
    assert torch.allclose(right[..., 8:], batch[..., 9:].expand(-1, -1, -1, 2), atol=1e-5)  # nearest fill
    down = warp(batch, affine_matrix(**still | {"shift_y_px": one * -3}))
    assert torch.allclose(down[:, :, 3:], batch[:, :, :5], atol=1e-5)
    square = make_batch(1, 9, 9)
    turned = warp(square, affine_matrix(**still | {"rotation_deg": one * 90}))
    assert torch.allclose(turned, torch.rot90(square, 1, (2, 3)), atol=1e-5)
    halved = affine_matrix(**still | {"zoom_x": one * 0.5})
    assert torch.allclose(halved[0], torch.tensor([[0.5, 0, 0], [0, 1, 0]], dtype=torch.float64))


def test_draws_stay_within_their_ranges_and_use_them():
    batch = make_batch(4000, 4, 4)
    matrix = _draw_matrix(POST, batch.shape[2:], draws(len(batch)))
    angle = torch.rad2deg(torch.atan2(matrix[:, 1, 0], matrix[:, 0, 0]))
    assert 19 < angle.max() <= 20 and -20 <= angle.min() < -19
    assert angle.std().item() == pytest.approx(20 / 3**0.5, rel=0.05)
    zoom = matrix[:, :, 0].norm(dim=1)
    assert 0.95 <= zoom.min() < 0.955 and 1.045 < zoom.max() <= 1.05
    shift = matrix[:, :, 2].norm(dim=1)
    assert 0.5 < shift.max() <= 0.4 * 2**0.5
    assert matrix[:, :, 2].mean().abs() < 0.02


def test_values_stay_within_those_of_the_patch():
    batch = make_batch(32)
    warped = augment(POST, batch, draws(len(batch)))
    assert (warped.amax((1, 2, 3)) <= batch.amax((1, 2, 3)) + 1e-6).all()
    assert (warped.amin((1, 2, 3)) >= batch.amin((1, 2, 3)) - 1e-6).all()


def test_stain_jitter_changes_the_amounts_as_told():
    rng = np.random.default_rng(0)
    amounts = rng.uniform(0.1, 0.5, (3, 8, 8, 3)) * [1, 1, 0.05]
    patches = combine_stains(amounts.reshape(-1, 8, 3)).reshape(3, 8, 8, 3)
    scale = torch.tensor([[1.0, 1.0], [1.3, 0.8], [0.9, 1.2]])
    offset = torch.tensor([[0.0, 0.0], [0.02, -0.01], [0.0, 0.03]])
    batch = torch.from_numpy(patches / 255).float().permute(0, 3, 1, 2)
    changed = change_stain(batch, scale=scale, offset=offset)
    assert torch.allclose(changed[0], batch[0], atol=1e-5)
    as_uint8 = (changed * 255).round().byte().permute(0, 2, 3, 1).numpy()
    before, after = separate_stains(patches), separate_stains(as_uint8)
    wanted = before[..., :2] * scale.numpy()[:, None, None] + offset.numpy()[:, None, None]
    assert np.abs(after[..., :2] - wanted).max() < 0.02  # one grey level of a dark pixel
    assert np.abs(after[..., 2] - before[..., 2]).max() < 0.02


def test_stain_jitter_keeps_colours_possible():
    batch = torch.stack(
        [torch.zeros(3, 8, 8), torch.ones(3, 8, 8), torch.rand(3, 8, 8, generator=generator())]
    )
    changed = augment(Augmentation(hed_jitter=0.5, hed_offset=0.5), batch, draws(len(batch)))
    assert changed.isfinite().all() and changed.min() >= 0 and changed.max() <= 1


def test_jitter_of_stain_leaves_glass_white_and_an_offset_colours_it():
    glass = torch.ones(4, 3, 8, 8)
    assert (augment(Augmentation(hed_jitter=0.5), glass, draws(len(glass))) - 1).abs().max() < 1e-5
    offset = augment(Augmentation(hed_offset=0.2), glass, draws(len(glass)))
    assert len(offset[:, :, 0, 0].unique(dim=0)) > 1 and offset.min() < 0.95


def test_blur_agrees_with_scipy_away_from_the_border_and_keeps_constants():
    batch, sigma = torch.rand(3, 3, 40, 36, generator=generator()), torch.tensor([0.0, 0.7, 2.0])
    blurred = blur(batch, sigma)
    assert torch.equal(blurred[0], batch[0])
    for i in (1, 2):
        wanted = ndimage.gaussian_filter(batch[i].numpy(), (0, *[float(sigma[i])] * 2), truncate=8)
        inner = (slice(None), slice(12, -12), slice(12, -12))
        assert np.abs(blurred[i].numpy() - wanted)[inner].max() < 1e-4
    constant = torch.full((3, 3, 9, 7), 0.3)
    assert torch.allclose(blur(constant, sigma), constant, atol=1e-6)


def test_blur_draws_up_to_its_maximum():
    impulse = torch.zeros(500, 3, 41, 41)
    impulse[:, :, 20, 20] = 1
    blurred = augment(Augmentation(blur_px=3), impulse, draws(len(impulse)))
    square = (torch.arange(41) - 20.0) ** 2
    sigma = (blurred[:, 0].sum(1) * square).sum(1).sqrt()
    assert 2.9 < sigma.max() < 3 and sigma.min() < 0.1
    assert sigma.mean().item() == pytest.approx(1.5, abs=0.1)


@pytest.mark.parametrize("side", [20, 21])
def test_cutout_sets_one_square_of_every_patch_to_zero(side):
    batch = torch.rand(300, 3, side, side, generator=generator()) + 0.1
    covered = cut_out(Augmentation(cutout=0.4), batch, draws(len(batch)))
    hidden = covered == 0
    assert torch.equal(covered[~hidden], batch[~hidden])
    assert torch.equal(hidden[:, 0], hidden[:, 2])
    rows, columns = hidden[:, 0].any(2), hidden[:, 0].any(1)
    assert torch.equal(hidden[:, 0], rows[:, :, None] & columns[:, None, :])  # one rectangle
    heights = rows.sum(1)
    assert heights.max() in (8, 9) and heights.min() >= 4  # parts may lie beyond the border
    assert (heights >= 8).float().mean() > 0.5
    assert hidden.any(0).all()  # every place can be hidden


def test_cutout_off_is_the_identity_and_whole_hides_most():
    batch = make_batch()
    assert cut_out(Augmentation(), batch, draws(len(batch))) is batch
    assert (cut_out(Augmentation(cutout=1), batch, draws(len(batch))) == 0).float().mean() > 0.25


@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_cutout_shows_the_mean_colour_to_the_network(order):
    from biopsy.recipes.preprocessing import Preprocessing

    patches = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
    batches = Batches(
        patches=patches,
        target=np.zeros(4, int),
        preprocessing=Preprocessing(
            input_px=16, channel_order=order, mean=(0.5, 0.3, 0.2), std=(0.2, 0.3, 0.4)
        ),
        augmentation=Augmentation(cutout=0.5),
        batch_size=4,
    )
    batch, _ = batches.load(np.arange(4), 0, epoch=1)
    whole = batches.preprocessing.prepare(patches)
    assert (batch == 0).all(1).sum((1, 2)).min() >= 16
    assert torch.equal(batch[batch != 0], whole[batch != 0])


@pytest.mark.parametrize(
    "setting",
    [
        "blur_px=-1",
        "cutout=1.1",
        "rand_augment_n=-1",
        "rand_augment_magnitude=11",
        "rand_stain_na=1.1",
        "rotation_deg=181",
        "shear_deg=91",
        "shift=-0.1",
        "zoom=1",
        "fill=reflect",
        "hed_jitter=2",
        "hed_offset=-1",
        "tilt=1",
    ],
)
def test_settings_out_of_range_or_unknown_are_refused(setting):
    with pytest.raises(RecipeError):
        load_recipe("idc-small", [f"augmentation.{setting}"])


def test_quarter_turns_of_a_patch_that_is_not_square_are_refused():
    with refuses(RecipeError, "square"):
        augment(Augmentation(rot90=True), make_batch(2, 6, 8), draws(2))
