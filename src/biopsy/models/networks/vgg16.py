"""VGG16's convolutions (Simonyan & Zisserman 2015) with the small top that the PCam post put on them."""

from torch import nn

from biopsy.models.networks.layers import FlattenChannelsLast, OneLogit, require_size
from biopsy.models.networks.registry import register_network
from biopsy.models.networks.stages import SequentialNetwork

# per block: convolutions, channels
BLOCKS = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))


@register_network
def vgg16(*, n_classes: int, input_px: int | tuple[int, int], dense: int = 256) -> SequentialNetwork:
    """Thirteen convolutions in five blocks, named as Keras names them, then a dense layer and the head.

    Two classes have one logit between them. The stage ``head`` is all that lies on top of the convolutions,
    for which there are weights: flatten, dense layer and logits.
    """
    width, height = require_size("vgg16", input_px, 32)
    layers: dict[str, nn.Module] = {}
    channels = 3
    for block, (n_convolutions, out_channels) in enumerate(BLOCKS, start=1):
        for number in range(1, n_convolutions + 1):
            layers[f"block{block}_conv{number}"] = nn.Conv2d(channels, out_channels, 3, padding=1)
            layers[f"block{block}_relu{number}"] = nn.ReLU(inplace=True)
            channels = out_channels
        layers[f"block{block}_pool"] = nn.MaxPool2d(2)
        width, height = width // 2, height // 2
    layers["flatten"] = FlattenChannelsLast()
    layers["dense"] = nn.Linear(channels * width * height, dense)
    layers["dense_relu"] = nn.ReLU(inplace=True)
    stages = {f"block{block}": f"block{block}_conv1" for block in range(1, len(BLOCKS) + 1)}
    head = OneLogit(dense) if n_classes == 2 else nn.Linear(dense, n_classes)
    return SequentialNetwork(layers, stages | {"head": "flatten"}, head)
