"""A transform of one's own: what it is given, that it is seeded, and what it may not change."""

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from biopsy.core.errors import RecipeError, RunError
from biopsy.training.augmentation import apply_transform, check_transform, describe_transform
from biopsy.training.train import train
from refusals import refuses
from tiny_runs import assert_same_run, interrupt_at, train_tiny, weights

BATCH = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def darken(batch):
    return batch * 0.5


def test_a_function_takes_the_whole_batch_and_a_v2_transform_each_patch():
    shapes = []
    apply_transform(lambda batch: shapes.append(batch.shape) or batch, BATCH, seed=0)
    assert shapes == [(6, 3, 8, 8)]
    flipped = apply_transform(v2.RandomHorizontalFlip(0.5), BATCH, seed=1)
    same = [torch.equal(one, other) for one, other in zip(flipped, BATCH, strict=True)]
    turned = [torch.equal(one, other.flip(-1)) for one, other in zip(flipped, BATCH, strict=True)]
    assert any(same) and any(turned) and all(np.logical_or(same, turned))


def test_random_numbers_are_those_of_the_seed_and_the_global_state_is_left():
    def noisy(batch):
        return batch + 0.1 * torch.rand_like(batch)

    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, again, other = (apply_transform(noisy, BATCH, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "transform",
    [
        lambda batch: batch[..., :4],
        lambda batch: batch[:1],
        lambda batch: batch.double(),
        lambda batch: batch.numpy(),
        lambda batch: None,
        v2.Resize(4),
        v2.ToDtype(torch.uint8, scale=True),
    ],
    ids=["cropped", "fewer", "double", "numpy", "nothing", "resized", "uint8"],
)
def test_a_change_of_shape_or_type_is_refused_before_training(transform, make_pack, tmp_path):
    with refuses(RecipeError, reason="transform"):
        check_transform(transform, 8)
    with refuses(RecipeError, reason="transform"):
        train_tiny(make_pack(), tmp_path / "run", transform=transform)
    assert not (tmp_path / "run").exists()


def test_what_a_run_records():
    assert describe_transform(darken) == "test_transforms.darken"
    made = v2.Compose([v2.RandomHorizontalFlip(), v2.ColorJitter(brightness=0.1)])
    assert describe_transform(made) == describe_transform(
        v2.Compose([v2.RandomHorizontalFlip(), v2.ColorJitter(brightness=0.1)])
    )
    assert "brightness" in describe_transform(made)


def test_training_sees_the_transform_and_validation_does_not(make_pack, tmp_path):
    pack = make_pack(n_patients=9, patches_per_patient=6)
    seen = []

    def note(batch):
        seen.append(len(batch))
        return batch

    plain = train_tiny(pack, tmp_path / "plain")
    noted = train_tiny(pack, tmp_path / "noted", transform=note)
    used = plain.info["split"]["used"]["patches"]
    assert seen[0] == 2 and sum(seen[1:]) == 2 * (
        used - used % 8
    )  # tried out on two; two epochs of whole batches
    assert all(torch.equal(weights(plain)[name], tensor) for name, tensor in weights(noted).items())
    changed = train_tiny(pack, tmp_path / "changed", transform=darken)
    assert any(not torch.equal(weights(plain)[name], tensor) for name, tensor in weights(changed).items())
    assert changed.info["transform"] == "test_transforms.darken"


def test_a_run_with_a_transform_answers_no_other_call(make_pack, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pack = make_pack()
    options = {"overrides": {"preprocessing.input_px": 8, "train.epochs": 1}, "device": "cpu"}
    first = train("cancernet-2020", pack, transform=darken, **options)
    plain = train("cancernet-2020", pack, **options)
    again = train("cancernet-2020", pack, transform=darken, **options)
    assert len({first.path, plain.path, again.path}) == 3


def test_resuming_needs_the_same_transform_and_gives_the_same_run(make_pack, tmp_path):
    pack, jitter = make_pack(), v2.ColorJitter(brightness=0.3)
    whole = train_tiny(pack, tmp_path / "whole", transform=jitter)
    with pytest.raises(KeyboardInterrupt):
        train_tiny(pack, tmp_path / "run", transform=jitter, on_epoch=interrupt_at(1))
    with refuses(RunError, "transform"):
        train(resume=tmp_path / "run")
    assert_same_run(train(resume=tmp_path / "run", transform=jitter), whole)
