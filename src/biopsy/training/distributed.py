"""One training over several processes, by PyTorch's distributed data parallel.

torchrun or SLURM starts the same command once per process. Each takes its part of every batch, so the batch
size of the recipe is kept, and the weighted mean of the gradients is that of one process. Rank 0 alone
writes: it begins or continues the run, holds its lock, logs, saves checkpoints and makes the classifier.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, distributed, nn

from biopsy.core.errors import RecipeError, RunError
from biopsy.core.launch import read_launch
from biopsy.models.hardware import torch_device

PORT = "29500"  # torchrun's
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Processes:
    """Rank of this process, and communication with the other processes of a training (default: none).

    Parts are contiguous, of two patches or more (batch normalisation needs a spread), and no patch is in two.
    Where there are too few patches for that, the last processes repeat the part of rank 0 with a weight of
    zero, so that all call the network equally often.

    Example:
        >>> [Processes(rank, 3).part(8) for rank in range(3)]
        [slice(0, 2, None), slice(2, 5, None), slice(5, 8, None)]
    """

    rank: int = 0
    world_size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def part(self, n: int) -> slice:
        """Return which of the ``n`` patches of a batch are this process's part."""
        n_parts = self._count_parts(n)
        index = self.rank if self.rank < n_parts else 0
        return slice(n * index // n_parts, n * (index + 1) // n_parts)

    def count(self, n: int) -> int:
        """Return how many of ``n`` patches count here: those of the part, or 0 if it repeats another."""
        part = self.part(n)
        return part.stop - part.start if self.rank < self._count_parts(n) else 0

    def weight(self, n: int) -> float:
        """Return the factor of the mean loss of a part; the mean over processes is that of ``n`` patches."""
        return self.count(n) * self.world_size / n

    def _count_parts(self, n: int) -> int:
        return max(1, min(self.world_size, n // 2))

    def mean(self, values: Tensor) -> Tensor:
        return self.sum(values) / self.world_size if self.world_size > 1 else values

    def sum(self, values: Tensor) -> Tensor:
        if self.world_size > 1:
            values = values.clone()
            distributed.all_reduce(values)
        return values

    def gather(self, values: np.ndarray, n: int) -> np.ndarray:
        """Return the values of all ``n`` patches in order, in every process, given those of its part."""
        if self.world_size == 1:
            return values
        parts: list[np.ndarray] = [values] * self.world_size
        distributed.all_gather_object(parts, values[: self.count(n)])
        return np.concatenate(parts)

    def broadcast(self, value: _Value) -> _Value:
        """Return rank 0's value."""
        box = [value]
        if self.world_size > 1:
            distributed.broadcast_object_list(box)
        return box[0]

    def do_first(self, function: Callable[[], _Value]) -> _Value | None:
        """Call a function in rank 0 while the others wait; in those, return None.

        Raises:
            RunError: In the others, if it raises an error in rank 0.
        """
        result, succeeded = None, False
        try:
            if self.is_first:
                result, succeeded = function(), True
        finally:
            succeeded = self.broadcast(succeeded)
        if not succeeded:
            raise RunError(f"process {self.rank + 1} of {self.world_size} ends: the first one failed")
        return result

    def wrap(self, network: nn.Module) -> nn.Module:
        """Return a network whose gradients, once computed, are the mean over the processes."""
        if self.world_size == 1:
            return network
        return nn.parallel.DistributedDataParallel(network, static_graph=True)

    def copy_state(self, network: nn.Module) -> None:
        """Copy weights and buffers of a network from rank 0."""
        if self.world_size > 1:
            for tensor in network.state_dict().values():
                distributed.broadcast(tensor, 0)

    def leave(self) -> None:
        """End the communication; rank 0 continues without the others."""
        if self.world_size > 1 and distributed.is_initialized():
            distributed.destroy_process_group()


ALONE = Processes()


@contextlib.contextmanager
def join_processes(device: str) -> Iterator[tuple[Processes, str]]:
    """Connect the processes of a training; yield them and the device of this one.

    Raises:
        RunError: If another process ends early.
    """
    rank, world_size, local_rank = read_launch()
    if world_size == 1:
        yield ALONE, str(torch_device(device))
        return
    os.environ.setdefault("MASTER_PORT", PORT)
    device = _own_device(device, local_rank)
    if device != "cpu":
        torch.cuda.set_device(device)
    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
    processes = Processes(rank, world_size)
    try:
        distributed.init_process_group(backend, rank=rank, world_size=world_size)
        yield processes, device
    except RuntimeError as error:
        if type(error) is not RuntimeError or "gloo" not in str(error):
            if not isinstance(error, distributed.DistError):
                raise
        raise RunError(
            f"process {rank + 1} of {world_size} lost the others: one of them ended; its own message says why"
        ) from error
    finally:
        processes.leave()


def _own_device(device: str, local_rank: int) -> str:
    """Return the device of one of several processes: each has a GPU of its own, or all use the CPU."""
    if device.startswith("cuda:"):
        raise RecipeError(
            f"device={device!r} is one GPU for all processes: use cuda, and each takes its own", "conflict"
        )
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        return f"cuda:{local_rank % max(1, torch.cuda.device_count())}"  # of SLURM a task may see one
    return str(torch_device(device))
