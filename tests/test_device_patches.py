"""Training patches that lie on the device: the same batches and runs, and what is sent in a step."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from biopsy.models.engine import Engine, make_loss
from biopsy.models.networks import build_network
from biopsy.recipes.preprocessing import Preprocessing
from biopsy.recipes.schema import Augmentation
from biopsy.training import device_patches
from biopsy.training.batches import Batches, DevicePatches
from biopsy.training.device_patches import SHARE, place_patches
from biopsy.training.distributed import Processes
from biopsy.training.optimisers import make_optimiser
from biopsy.training.stain_augmentation import RandStainNA
from biopsy.training.train import train
from conftest import write_pack
from tiny_runs import assert_same_run, interrupt_at, train_tiny

ROWS = np.array([3, 17, 4, 0, 11, 8, 19, 2, 5, 6, 7])
NORMALISED = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}


@pytest.fixture
def free_bytes(monkeypatch):
    """Let every device have memory of its own, of the size in the list."""
    size = [1 << 30]
    monkeypatch.setattr(device_patches, "count_free_bytes", lambda device: size[0])
    monkeypatch.setattr(device_patches, "CHUNK", 4)
    return size


def make_batches(**settings):
    rng = np.random.default_rng(0)
    widths = np.full(20, 50)
    widths[[4, 11]] = 31
    given = {
        "patches": rng.integers(0, 256, (20, 50, 50, 3), np.uint8),
        "target": np.arange(20) % 2,
        "widths": widths,
        "heights": np.full(20, 50),
        "preprocessing": Preprocessing(input_px=48, resize="bilinear", **NORMALISED),
        "augmentation": Augmentation(rotation_deg=20, flip_vertical=True, hed_jitter=0.1, cutout=0.2),
        "batch_size": 4,
        "seed": 3,
    }
    return Batches(**given | settings)


@pytest.mark.parametrize("resize", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("input_px", [50, 32])
@pytest.mark.parametrize("processes", [Processes(), Processes(1, 2)])
def test_batches_are_the_same_bit_for_bit(free_bytes, resize, input_px, processes):
    preprocessing = Preprocessing(input_px=input_px, resize=resize, **NORMALISED)
    sent = make_batches(preprocessing=preprocessing, processes=processes)
    placed = place_patches(sent, ROWS, n_visits=100)
    assert placed.placed is not None and placed.placed.values.shape == (11, input_px, input_px, 3)
    for order in (ROWS, ROWS[::-1]):
        pairs = list(zip(sent.iterate(order, epoch=2), placed.iterate(order, epoch=2), strict=True))
        assert len(pairs) == 3
        for (batch, target), (other, other_target) in pairs:
            assert torch.equal(batch, other) and torch.equal(target, other_target)
            assert batch.stride() == other.stride()


def test_patches_stay_where_they_are_if_placing_them_does_not_pay(free_bytes):
    batches = make_batches()
    n_bytes = len(ROWS) * 48 * 48 * 3
    assert place_patches(batches, ROWS, n_visits=len(ROWS)) is batches
    free_bytes[0] = int(n_bytes / SHARE) - 1
    assert place_patches(batches, ROWS, n_visits=100) is batches
    free_bytes[0] += 1
    assert place_patches(batches, ROWS, n_visits=100).placed is not None
    free_bytes[0] = None
    assert place_patches(batches, ROWS, n_visits=100) is batches


def test_a_processor_has_no_memory_of_its_own():
    assert device_patches.count_free_bytes(torch.device("cpu")) is None


def test_a_run_is_the_same_and_resumes(free_bytes, tmp_path, monkeypatch):
    pack, settings = write_pack(tmp_path, n_patients=6, patches_per_patient=6), ("augmentation.rot90=true",)
    n_taken, take = [], DevicePatches.take
    monkeypatch.setattr(DevicePatches, "take", lambda *args: n_taken.append(1) or take(*args))
    placed = train_tiny(pack, tmp_path / "placed", *settings)
    assert len(n_taken) == placed.log()[-1]["step"]
    with pytest.raises(KeyboardInterrupt):
        train_tiny(pack, tmp_path / "cut", *settings, on_epoch=interrupt_at(1))
    free_bytes[0] = None
    assert_same_run(placed, train(resume=tmp_path / "cut", device="cpu"))
    assert_same_run(placed, train_tiny(pack, tmp_path / "sent", *settings))


class Sent(TorchDispatchMode):
    """Notes the bytes of every copy from the processor to another device."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and args[0].device != result.device:
            self.sizes.append(args[0].nbytes)
        return result


@pytest.mark.parametrize("outputs", [pytest.param("softmax", marks=pytest.mark.slow), "sigmoid"])
def test_a_step_reads_no_value_from_the_device_and_sends_it_no_pixels(outputs):
    """A tensor of the meta device has no values: whatever needs one raises an error."""
    augmentation = Augmentation(
        rotation_deg=20, flip_vertical=True, hed_jitter=0.1, rand_augment_n=9, blur_px=1, cutout=0.2
    )
    turns = Augmentation(rot90=True, flip_horizontal=True)
    values = torch.empty((20, 48, 48, 3), dtype=torch.uint8, device="meta")
    batches = replace(
        make_batches(device="meta", placed=DevicePatches(values, np.arange(20)), batch_size=16),
        rand_stain_na=RandStainNA(torch.ones(2, 3), torch.ones(2, 3), probability=0.9),
    )
    network = build_network("cancernet", n_classes=2, input_px=48, seed=0).to("meta").train()
    optimiser = make_optimiser("rmsprop", network.parameters(), 1e-2)
    engine, loss_fn = Engine("cpu"), make_loss(outputs, [1.0, 2.0], device="meta")
    for settings in (augmentation, turns):
        changed = replace(batches, augmentation=settings)
        list(changed.iterate(ROWS))  # constants are sent once
        with Sent() as sent:
            for batch, target in changed.iterate(ROWS, epoch=1):
                loss, _ = engine.train_step(network, optimiser, batch, target, loss_fn)
        assert loss.device.type == "meta"
        assert sent.sizes and max(sent.sizes) < len(ROWS) * 48 * 48 / 8
