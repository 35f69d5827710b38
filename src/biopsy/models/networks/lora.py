"""Low-rank adaptation (LoRA, Hu et al. 2021) of vision transformers of timm."""

import re

import torch
from torch import Tensor, nn
from torch.nn import functional

from biopsy.core.errors import RecipeError
from biopsy.core.seeds import derive
from biopsy.models.networks.libraries import LibraryNetwork

_ADAPTED = re.compile(r"blocks\.\d+\.(attn|mlp)\.\w+")


class LoraLinear(nn.Module):
    """A frozen linear layer plus a trainable product of two matrices, which is zero at first.

    Args:
        rank: Rank of the product; its scale ``alpha / rank`` is 1.
    """

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear
        self.down = nn.Parameter(torch.randn(rank, linear.in_features) / linear.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + functional.linear(functional.linear(x, self.down), self.up)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """Return the linear layer with the product added to its weight."""
        self.linear.weight += self.up @ self.down
        return self.linear


def add_lora(network: nn.Module, rank: int, seed: int) -> None:
    """Add adapters to the linear layers of attention and MLP; only they and the head are trained.

    Raises:
        RecipeError: If the network is no vision transformer of timm, or the rank is not below its width.
    """
    layers = [
        (vit, name, layer)
        for vit in network.modules()
        if _is_transformer(vit)
        for name, layer in vit.named_modules()
        if isinstance(layer, nn.Linear) and _ADAPTED.fullmatch(name)
    ]
    if not layers or not isinstance(network, LibraryNetwork):
        raise RecipeError(
            f"model.lora_rank={rank} needs a vision transformer of timm, found a network without its blocks: "
            "set model.name=hf-hub:ORG/NAME or timm:vit_..., or model.lora_rank=0",
            "network",
        )
    width = min(min(layer.in_features, layer.out_features) for _, _, layer in layers)
    if rank >= width:
        raise RecipeError(
            f"model.lora_rank must be below the width of the network, {width}, found {rank}", "value"
        )
    network.freeze_front(0)  # nothing of its outputs can be cached
    network.body.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "adapters"))
        for vit, name, layer in layers:
            vit.set_submodule(name, LoraLinear(layer, rank))


def _is_transformer(module: nn.Module) -> bool:
    """Return whether a module is a vision transformer whose attention calls its linear layers.

    DINOv3's class, Eva, reads their weights instead where queries have a bias, which DINOv3 has not.
    """
    from timm.models.eva import Eva, EvaAttention
    from timm.models.vision_transformer import VisionTransformer

    if not isinstance(module, Eva):
        return isinstance(module, VisionTransformer)
    return all(part.q_bias is None for part in module.modules() if isinstance(part, EvaAttention))


def merge_lora(network: nn.Module) -> None:
    """Replace adapted layers by plain ones with the same outputs."""
    adapted = [(name, layer) for name, layer in network.named_modules() if isinstance(layer, LoraLinear)]
    for name, layer in adapted:
        network.set_submodule(name, layer.merged())
