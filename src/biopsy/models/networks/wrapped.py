"""A module of somebody else's as a network."""

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from biopsy.core.errors import RunError


class WrappedNetwork(nn.Module):
    """A module whose output is logits, tried out once.

    Args:
        module: Takes ``(B, 3, input_px, input_px)``; gives logits ``(B, n_classes)``, or for two classes one
            logit of the second, ``(B, 1)`` or ``(B,)``; or an object that has such ``logits``.
        n_classes: Number of classes.
        input_px: Side of its input.

    Raises:
        RunError: If it takes no such batch or gives something else.
    """

    def __init__(self, module: nn.Module, n_classes: int, input_px: int) -> None:
        super().__init__()
        self.module = module
        self.n_classes = n_classes
        training = module.training
        module.eval()
        device = next((tensor.device for tensor in module.parameters()), torch.device("cpu"))
        batch = torch.zeros(2, 3, input_px, input_px, device=device)
        try:
            with torch.inference_mode():
                self.forward(batch)
        except (RuntimeError, TypeError, ValueError, AssertionError) as error:
            if isinstance(error, RunError):
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise RunError(
                f"{type(module).__name__} does not take a batch {tuple(batch.shape)} of float32: {reason}"
            ) from error
        finally:
            module.train(training)

    def forward(self, patches: Tensor) -> Tensor:
        """Return logits ``(B, n_classes)``."""
        logits = self.module(patches)
        logits = getattr(logits, "logits", logits)
        if isinstance(logits, Tensor) and self.n_classes == 2 and logits.numel() == len(patches):
            logits = logits.reshape(len(patches), 1)
            logits = torch.cat([-logits / 2, logits / 2], dim=1)
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        if shape != (len(patches), self.n_classes):
            raise RunError(
                f"the module returns {shape} for {len(patches)} patches where logits "
                f"{(len(patches), self.n_classes)} of {self.n_classes} classes are expected: name as many "
                "classes as it has outputs, and return logits alone"
            )
        return logits

    def features(self, patches: Tensor) -> Tensor:
        """Return nothing, ``(B, 0)``: which layer describes a patch is not known."""
        return patches.new_empty(len(patches), 0)


def hash_network(network: nn.Module, arrays: Mapping[str, np.ndarray]) -> bytes:
    """Return a hash over a network's layers and weights, and named arrays."""
    digest = hashlib.sha256(f"{type(network).__module__} {network!r}".encode())
    tensors = {name: tensor for name, tensor in network.state_dict().items() if isinstance(tensor, Tensor)}
    for name, tensor in {
        **tensors,
        **{name: torch.from_numpy(np.array(a)) for name, a in arrays.items()},
    }.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.digest()
