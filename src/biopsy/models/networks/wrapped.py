"""Networks that contain a network: test-time augmentation, and any PyTorch module with checked outputs."""

import hashlib
from collections.abc import Mapping
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from biopsy.core.errors import RecipeError, RunError, first_line
from biopsy.models.networks.registry import Network


class WrappedNetwork(nn.Module):
    """A module whose output is logits, checked by a forward pass.

    Args:
        module: Maps ``(B, 3, input_px, input_px)`` to logits ``(B, n_classes)``, or for two classes the
            second logit, ``(B, 1)`` or ``(B,)``; or to an object with such ``logits``.

    Raises:
        RunError: If it does not accept such a batch, or returns another shape.
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
            reason = first_line(error)
            raise RunError(
                f"{type(module).__name__} does not accept a float32 batch {tuple(batch.shape)}: {reason}"
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
                f"the module returns {shape} for {len(patches)} patches; expected logits "
                f"{(len(patches), self.n_classes)}: set class_names to the outputs of the module"
            )
        return logits

    def features(self, patches: Tensor) -> Tensor:
        """Return an empty tensor ``(B, 0)``, since the penultimate layer is unknown."""
        return patches.new_empty(len(patches), 0)


def hash_network(network: nn.Module, arrays: Mapping[str, np.ndarray]) -> bytes:
    """Return a hash of the layers and weights of a network, and of named arrays."""
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


N_VIEWS = 8


class SymmetryAveraged(nn.Module):
    """A network averaged over the eight rotations and reflections of each patch.

    Its logits and features are invariant to them. Weights are shared with the network.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, patches: Tensor) -> Tensor:
        """Return logits ``(B, n_classes)``."""
        return _mean(self.network(symmetric_views(patches)))

    def features(self, patches: Tensor) -> Tensor:
        """Return the penultimate layer, ``(B, F)``."""
        return _mean(cast(Network, self.network).features(symmetric_views(patches)))


def symmetric_views(patches: Tensor) -> Tensor:
    """Return the eight views of each patch, ``(8 * B, C, H, W)``, grouped by view."""
    if patches.shape[2] != patches.shape[3]:
        raise RecipeError(
            f"tta='d4' needs square patches, these are {tuple(patches.shape[2:])}: set model.tta=none", "data"
        )
    mirrored = [patches, patches.flip(3), patches.flip(2), patches.flip(2, 3)]
    return torch.cat([*mirrored, *(view.transpose(2, 3) for view in mirrored)])


def _mean(values: Tensor) -> Tensor:
    return values.unflatten(0, (N_VIEWS, -1)).mean(dim=0)
