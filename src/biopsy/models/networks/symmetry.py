"""Test-time augmentation over the eight symmetries of the square (the dihedral group D4)."""

from typing import cast

import torch
from torch import Tensor, nn

from biopsy.core.errors import RecipeError
from biopsy.models.networks.registry import Network

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
    """Return the eight views of each patch, ``(8 * B, C, H, W)``, grouped by view.

    Raises:
        RecipeError: If the patches are not square.
    """
    if patches.shape[2] != patches.shape[3]:
        raise RecipeError(
            f"tta='d4' needs square patches, these are {tuple(patches.shape[2:])}: set model.tta=none"
        )
    mirrored = [patches, patches.flip(3), patches.flip(2), patches.flip(2, 3)]
    return torch.cat([*mirrored, *(view.transpose(2, 3) for view in mirrored)])


def _mean(values: Tensor) -> Tensor:
    return values.unflatten(0, (N_VIEWS, -1)).mean(dim=0)
