"""Random numbers of the patches of a batch."""

from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor


@dataclass(frozen=True)
class Draws:
    """Random numbers of the patches of a batch, from a CPU generator: the same ones on every device.

    Attributes:
        generator: A CPU generator; the same state gives the same numbers.
        n: Number of patches of the batch over all processes, each of which draws for all of them.
        part: The patches of this process, whose numbers are returned.
    """

    generator: Generator
    n: int
    part: slice = field(default_factory=lambda: slice(None))

    def uniform(self, *shape: int) -> Tensor:
        """Return numbers between 0 and 1, ``(B, *shape)``."""
        return torch.rand(self.n, *shape, generator=self.generator)[self.part]

    def uniform_sets(self, n_sets: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return several sets of numbers between 0 and 1, drawn in turn, ``(n_sets, B, *shape)``."""
        return torch.rand(n_sets, self.n, *shape, generator=self.generator, dtype=dtype)[:, self.part]

    def normal_sets(self, n_sets: int, *shape: int) -> Tensor:
        """Return several sets of standard normal numbers, ``(n_sets, B, *shape)``."""
        return torch.randn(n_sets, self.n, *shape, generator=self.generator)[:, self.part]

    def integers(self, below: int) -> Tensor:
        """Return integers from 0 to below ``below``, int64 ``(B,)``."""
        return torch.randint(below, (self.n,), generator=self.generator)[self.part]
