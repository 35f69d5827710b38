import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from biopsy.core.errors import DataError
from biopsy.recipes import load_recipe
from biopsy.recipes.preprocessing import Preprocessing, to_unit
from refusals import refuses

RNG = np.random.default_rng(0)
ODD = [(50, 35), (41, 50), (50, 49), (12, 50), (31, 50), (32, 50), (50, 50), (1, 1), (3, 47)]  # width, height


def padded(width, height, patch_px=50):
    patch = RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)
    pad = ((0, patch_px - height), (0, patch_px - width), (0, 0))
    return patch, np.pad(patch, pad, mode="edge")[None]


@pytest.mark.parametrize("input_px", [48, 50, 32, 96, 224])
@pytest.mark.parametrize(("width", "height"), ODD)
def test_nearest_is_pillows(width, height, input_px):
    patch, kept = padded(width, height)
    preprocessing = Preprocessing(input_px=input_px)
    resized = preprocessing.resize_patches(kept, np.array([width]), np.array([height]))
    wanted = Image.fromarray(patch).resize((input_px, input_px), Image.Resampling.NEAREST)
    assert np.array_equal(resized[0], np.asarray(wanted))


def test_nearest_is_pillows_from_every_size():
    for source_px in range(1, 130):
        line = np.arange(source_px, dtype=np.uint8)[None, None, :, None].repeat(3, 3)
        for target_px in (1, 7, 48, 100):
            resized = Preprocessing(input_px=target_px).resize_patches(line)
            wanted = Image.fromarray(line[0]).resize((target_px, target_px), Image.Resampling.NEAREST)
            assert np.array_equal(resized[0], np.asarray(wanted)), (source_px, target_px)


@pytest.mark.parametrize(("name", "flag"), [("bilinear", cv2.INTER_LINEAR), ("bicubic", cv2.INTER_CUBIC)])
@pytest.mark.parametrize(("width", "height"), ODD)
def test_other_filters_are_opencvs(name, flag, width, height):
    patch, kept = padded(width, height)
    resized = Preprocessing(input_px=48, resize=name).resize_patches(
        kept, np.array([width]), np.array([height])
    )
    assert np.array_equal(resized[0], cv2.resize(patch, (48, 48), interpolation=flag))


def test_padding_is_kept_on_request():
    _, kept = padded(12, 50)
    preprocessing = Preprocessing(input_px=50, resize_mode="pad")
    assert np.array_equal(preprocessing.resize_patches(kept, np.array([12]), np.array([50])), kept)


def test_the_packs_own_pixels_are_never_written_to():
    kept = np.concatenate([padded(50, 50)[1], padded(12, 50)[1]])
    before = kept.copy()
    kept.flags.writeable = False
    Preprocessing(input_px=50).prepare(kept, np.array([50, 12]), np.array([50, 50]))
    assert np.array_equal(kept, before)


def test_numbers_fed_to_the_network():
    patches = RNG.integers(0, 256, (4, 10, 10, 3), dtype=np.uint8)
    plain = Preprocessing(input_px=10).prepare(patches)
    assert plain.shape == (4, 3, 10, 10) and plain.dtype == torch.float32
    assert plain.is_contiguous(memory_format=torch.channels_last)
    # Keras: x *= 1 / 255, in float32
    assert np.array_equal(plain.permute(0, 2, 3, 1).numpy(), patches.astype(np.float32) * (1 / 255))
    caffe = Preprocessing(
        input_px=10, channel_order="bgr", scale=1.0, mean=(103.9, 116.8, 123.7), std=(1, 2, 4)
    )
    wanted = (patches[..., ::-1].astype(np.float64) - [103.9, 116.8, 123.7]) / [1, 2, 4]
    assert np.allclose(caffe.prepare(patches).permute(0, 2, 3, 1).numpy(), wanted, atol=1e-4)


def test_training_and_prediction_see_the_same_numbers():
    patches = RNG.integers(0, 256, (4, 50, 50, 3), dtype=np.uint8)
    spec = Preprocessing(input_px=48, resize="bicubic", mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2))
    together = spec.normalise(to_unit(spec.resize_patches(patches)))
    alone = torch.cat([spec.prepare(patches[i : i + 1]) for i in range(4)])
    assert torch.equal(together, alone)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("resize", "bicubik"),
        ("resize_mode", "crop"),
        ("channel_order", "rbg"),
        ("input_px", 0),
        ("std", (1, 0, 1)),
        ("mean", (0.5,)),
        ("mean", (0.5, float("nan"), 0.5)),
        ("scale", 0),
        ("resise", "nearest"),
    ],
)
def test_values_that_are_refused_and_where(name, value):
    with pytest.raises(ValidationError) as refused:
        Preprocessing(**{"input_px": 48, name: value})
    assert {error["loc"][0] for error in refused.value.errors()} == {name}


def test_the_recipes_preprocessing_runs_and_gives_that_of_a_classifier():
    patches = RNG.integers(0, 256, (2, 50, 50, 3), dtype=np.uint8)
    recipe = load_recipe("baruah-2019", {"preprocessing.input_px": 40})
    fixed = recipe.preprocessing.fixed(mean=(0.5, 0.4, 0.3))
    assert type(fixed) is Preprocessing and fixed.input_px == 40 and fixed.mean == (0.5, 0.4, 0.3)
    assert torch.equal(recipe.preprocessing.prepare(patches), recipe.preprocessing.fixed().prepare(patches))


def test_patches_of_another_shape_or_size_are_refused():
    spec = Preprocessing(input_px=48)
    with refuses(DataError, "float32", "uint8 (N, H, W, 3)"):
        spec.resize_patches(np.zeros((1, 50, 50, 3), np.float32))
    with refuses(DataError, "patch 1"):
        spec.resize_patches(np.zeros((2, 50, 50, 3), np.uint8), np.array([50, 51]), np.array([50, 50]))
