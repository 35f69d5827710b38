"""Exponential moving average (EMA) of a network's weights and batch-norm statistics."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class WeightAverage:
    """The average ``w <- d * w + (1 - d) * current`` after each update.

    The decay ``d`` is ``min(decay, (1 + step) / (10 + step))``, so that the initial weights do not linger in
    a short training. Running batch-norm statistics are averaged like weights; counters are copied.

    Args:
        network: The network to follow; its weights as they are now begin the average.
        decay: Upper limit of the decay, in 0-1.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network = network
        self.decay = decay
        self.state = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        averaged: list[Tensor] = []
        current: list[Tensor] = []
        for name, tensor in self.network.state_dict().items():
            if tensor.dtype.is_floating_point:
                averaged.append(self.state[name])
                current.append(tensor)
            else:
                self.state[name].copy_(tensor)
        torch._foreach_lerp_(averaged, current, 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Context manager in which the network has the averaged weights."""
        current = {name: tensor.detach().clone() for name, tensor in self.network.state_dict().items()}
        self.network.load_state_dict(self.state)
        try:
            yield
        finally:
            self.network.load_state_dict(current)
