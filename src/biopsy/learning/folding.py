"""The same network in fewer passes over memory, for asking only.

The layers at the input cost most of the time of a small network on a CPU, and what they cost is memory more
than arithmetic. `fold` rearranges them; what comes out differs by rounding alone.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from biopsy.learning.networks.layers import SeparableConv2d
from biopsy.learning.networks.stages import SequentialNetwork

_FEW_CHANNELS = 4  # a depthwise convolution of so few is all memory, a dense one in its place almost free


def fold(network: nn.Module) -> nn.Module:
    """Give a network in evaluation mode that computes the same logits faster; it shares its weights.

    * A separable convolution of the image itself becomes one dense convolution: the products of both weights.
    * A normalisation before a pooling of maxima comes after it, on a quarter of the values, where all its
      factors are positive: the largest of scaled values is the largest value scaled.
    * Under autocast the first layer still computes in float32. Pixels in 0-1 have 8 bits, as many as bfloat16
      has, but not the same ones: rounding them would make half of all the error.

    A network that is no row of layers is given back as it is.
    """
    if not isinstance(network, SequentialNetwork):
        return network
    rest = [layer for layer in (*network.body, network.head) if not isinstance(layer, nn.Dropout)]
    layers: list[nn.Module] = []
    while rest:
        layer = rest.pop(0)
        if isinstance(layer, SeparableConv2d) and layer.depthwise.in_channels <= _FEW_CHANNELS:
            layer = _merge(layer)
        elif isinstance(layer, nn.BatchNorm2d) and rest and _can_swap(layer, rest[0]):
            rest.pop(0)
            layers.append(_MaxOfFour())
        layers.append(layer)
    return nn.Sequential(_Exact(layers[0]), *layers[1:]).eval()


def _merge(layer: SeparableConv2d) -> nn.Conv2d:
    pointwise, depthwise = layer.pointwise, layer.depthwise
    merged = nn.Conv2d(depthwise.in_channels, pointwise.out_channels, 3, padding=1)
    with torch.no_grad():
        merged.weight.copy_(pointwise.weight * depthwise.weight.transpose(0, 1))
        assert pointwise.bias is not None and merged.bias is not None
        merged.bias.copy_(pointwise.bias)
    return merged


def _can_swap(normalisation: nn.BatchNorm2d, next_layer: nn.Module) -> bool:
    if not isinstance(next_layer, nn.MaxPool2d) or next_layer.kernel_size != 2 or next_layer.padding:
        return False
    return next_layer.stride == 2 and next_layer.dilation == 1 and bool((normalisation.weight > 0).all())


class _Exact(nn.Module):
    """Computes in float32 under autocast too, and hands on what autocast computes in."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        if not torch.is_autocast_enabled(device):
            return self.layer(x)
        with torch.autocast(device, enabled=False):
            return self.layer(x.float()).to(torch.get_autocast_dtype(device))


class _MaxOfFour(nn.Module):
    """Pools 2 x 2 by comparing whole images, which needs no search within windows."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] % 2 or x.shape[3] % 2:
            return functional.max_pool2d(x, 2)
        upper = torch.maximum(x[:, :, ::2, ::2], x[:, :, ::2, 1::2])
        return torch.maximum(upper, torch.maximum(x[:, :, 1::2, ::2], x[:, :, 1::2, 1::2]))
