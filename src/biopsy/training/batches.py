"""Training batches: resized, on the device, augmented."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from biopsy.core.seeds import derive
from biopsy.data.packs import Pack
from biopsy.recipes import Recipe
from biopsy.recipes.preprocessing import Preprocessing, scale_to_unit, to_unit
from biopsy.recipes.schema import Augmentation
from biopsy.training.augmentation import Transform, apply_transform, augment, cut_out
from biopsy.training.distributed import ALONE, Processes
from biopsy.training.draws import Draws
from biopsy.training.patch_operations import send
from biopsy.training.stain_augmentation import (
    RandStainNA,
    StainTransfer,
    fit_rand_stain_na,
    fit_stain_transfer,
)


@dataclass(frozen=True)
class CachedFeatures:
    """Cached outputs of the frozen stages of a network.

    Attributes:
        values: ``(n, ..., C)`` float32, a memory map; channels last, as they are computed.
        index: Row in ``values`` of each patch of the pack, ``(n_patches,)``.
    """

    values: np.ndarray
    index: np.ndarray

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Return the outputs of patches of the pack, ``(len(rows), ..., C)``."""
        return self.values[self.index[rows]]


@dataclass(frozen=True)
class DevicePatches:
    """Patches on a device.

    Attributes:
        values: ``(n, input_px, input_px, 3)`` uint8.
        index: Row in ``values`` of each patch of the pack, ``(n_patches,)``.
    """

    values: Tensor
    index: np.ndarray

    def take(self, places: np.ndarray) -> Tensor:
        """Return rows of ``values``, ``(len(places), input_px, input_px, 3)``, without synchronising."""
        return self.values.index_select(0, send(torch.from_numpy(places), self.values))


@dataclass(frozen=True, kw_only=True)
class Batches:
    """Patches and targets with preprocessing and augmentation.

    Attributes:
        patches: ``(N, H, W, 3)`` uint8, an array or a memory map.
        target: ``(N,)`` class indices.
        widths: True width of each patch, ``(N,)``; None where none is padded.
        heights: True height of each.
        stain_transfer: Applied first, after resizing; None for validation.
        rand_stain_na: Applied second; None for validation.
        augmentation: Applied third, its cutout after normalisation; None for validation.
        transform: Applied fourth, before normalisation; see `augmentation.apply_transform`.
        drop_last: Leave out a last batch that is not full.
        cached_features: Outputs of the frozen stages for these patches, used unchanged in their place.
        placed: These patches on the device, resized; batches are gathered from them.
        processes: Processes of the training, which divide every batch. Random numbers of a patch do not
            depend on their number, except those of ``transform``.
    """

    patches: np.ndarray
    target: np.ndarray
    preprocessing: Preprocessing
    batch_size: int
    widths: np.ndarray | None = None
    heights: np.ndarray | None = None
    stain_transfer: StainTransfer | None = None
    rand_stain_na: RandStainNA | None = None
    augmentation: Augmentation | None = None
    transform: Transform | None = None
    drop_last: bool = False
    device: torch.device | str = "cpu"
    seed: int = 0
    cached_features: CachedFeatures | None = None
    placed: DevicePatches | None = None
    processes: Processes = ALONE

    @classmethod
    def from_pack(
        cls,
        pack: Pack,
        recipe: Recipe,
        rows: np.ndarray,
        preprocessing: Preprocessing,
        *,
        drop_last: bool = True,
        transform: Transform | None = None,
        device: torch.device | str = "cpu",
        seed: int = 0,
        processes: Processes = ALONE,
    ) -> "Batches":
        """Return the batches in which a recipe trains on some rows of a pack; options as the attributes."""
        return cls(
            patches=pack.patches,
            target=pack.target,
            widths=pack.sizes[:, 0],
            heights=pack.sizes[:, 1],
            preprocessing=preprocessing,
            stain_transfer=fit_stain_transfer(pack, rows, recipe.augmentation.stain_transfer, seed),
            rand_stain_na=fit_rand_stain_na(pack, rows, recipe.augmentation.rand_stain_na, seed),
            augmentation=recipe.augmentation,
            transform=transform,
            batch_size=recipe.train.batch_size,
            drop_last=drop_last,
            device=device,
            seed=seed,
            processes=processes,
        )

    def size(self, n_patches: int, number: int) -> int:
        """Return the number of patches of a batch, over all processes, of a pass over ``n_patches``."""
        return min(self.batch_size, n_patches - number * self.batch_size)

    def rows(self, order: np.ndarray, number: int) -> np.ndarray:
        """Return the rows of this process's part of a batch."""
        whole = np.asarray(order[number * self.batch_size : (number + 1) * self.batch_size])
        return whole[self.processes.part(len(whole))]

    def count(self, n_patches: int) -> int:
        return n_patches // self.batch_size if self.drop_last else -(-n_patches // self.batch_size)

    def iterate(
        self, order: np.ndarray, *, epoch: int = 0, start: int = 0, stop: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ``(batch, target)`` over patches in the given order, with prefetching.

        Each of several processes yields its part of every batch (see `Processes.part`).

        A batch depends on the order, the seed, the epoch and its own number only, so starting at batch
        ``start`` gives exactly the batches that an uninterrupted pass would have given from there.

        Args:
            stop: Number of the batch to stop before; None for all.
        """
        numbers = range(start, self.count(len(order)) if stop is None else stop)
        # the worker does numpy's part only: a second thread inside PyTorch would fight the first for cores
        with ThreadPoolExecutor(1, thread_name_prefix="biopsy-batches") as worker:
            ahead = deque(worker.submit(self._gather, order, number) for number in numbers[:1])
            for number in numbers:
                if number + 1 in numbers:
                    ahead.append(worker.submit(self._gather, order, number + 1))
                yield self._finish(*ahead.popleft().result(), number, epoch)

    def load(self, order: np.ndarray, number: int, *, epoch: int = 0) -> tuple[Tensor, Tensor]:
        """Return one batch ``(B, 3, input_px, input_px)`` float and its targets ``(B,)`` by its number."""
        return self._finish(*self._gather(order, number), number, epoch)

    def _gather(self, order: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray, int]:
        chosen, n = self.rows(order, number), self.size(len(order), number)
        if self.cached_features is not None:
            return self.cached_features.take(chosen), chosen, n
        if self.placed is not None:
            return self.placed.index[chosen], chosen, n
        return self.resize(chosen), chosen, n

    def resize(self, rows: np.ndarray) -> np.ndarray:
        """Return patches by row, resized, ``(len(rows), input_px, input_px, 3)`` uint8."""
        widths = None if self.widths is None else self.widths[rows]
        heights = None if self.heights is None else self.heights[rows]
        return self.preprocessing.resize_patches(self.patches[rows], widths, heights)

    def _finish(
        self, patches: np.ndarray, chosen: np.ndarray, n: int, number: int, epoch: int
    ) -> tuple[Tensor, Tensor]:
        """Return the batch of what `_gather` returned: pixels, cached features, or places on the device."""
        target = labels = torch.from_numpy(np.asarray(self.target[chosen], dtype=np.int64))
        if torch.device(self.device).type == "cuda":
            target = target.pin_memory()
        target = target.to(self.device, non_blocking=True)
        if self.cached_features is not None:
            return to_batch(patches, self.device), target
        if self.placed is not None:
            batch = scale_to_unit(self.placed.take(patches))
        else:
            batch = to_unit(patches, self.device)

        def draws(purpose: str) -> Draws:
            generator = torch.Generator().manual_seed(derive(self.seed, purpose, epoch, number))
            return Draws(generator, n, self.processes.part(n))

        if self.stain_transfer is not None:
            batch = self.stain_transfer.apply(batch, chosen, labels, draws("stain-transfer"))
        if self.rand_stain_na is not None:
            batch = self.rand_stain_na.apply(batch, draws("rand-stain-na"))
        if self.augmentation is not None:
            batch = augment(self.augmentation, batch, draws("augmentation"))
        if self.transform is not None:
            seed = derive(self.seed, "transform", epoch, number) + self.processes.rank
            batch = apply_transform(self.transform, batch, seed)
        batch = self.preprocessing.normalise(batch)
        if self.augmentation is not None:
            batch = cut_out(self.augmentation, batch, draws("cutout"))
        return batch, target


def to_batch(outputs: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """Convert outputs ``(B, ..., C)`` to a batch ``(B, C, ...)`` on a device, channels-last."""
    batch = torch.from_numpy(outputs)
    if torch.device(device).type == "cuda":
        batch = batch.pin_memory().to(device, non_blocking=True)
    return batch.movedim(-1, 1)
