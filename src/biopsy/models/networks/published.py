"""Networks of published posts and papers: convolutions in sequence, then a dense layer and the classes."""

from collections.abc import Sequence

from torch import nn

from biopsy.core.errors import RecipeError
from biopsy.models.networks.layers import (
    KERAS_EPS,
    KERAS_MOMENTUM,
    BatchNorm1d,
    BatchNorm2d,
    Dropout,
    FlattenChannelsLast,
    OneLogit,
    SeparableConv2d,
    require_size,
)
from biopsy.models.networks.registry import register_network
from biopsy.models.networks.stages import SequentialNetwork


class _Body(dict[str, nn.Module]):
    """Layers by name, and the shape of their output."""

    def __init__(self, size: tuple[int, int], channels: int = 3) -> None:
        super().__init__()
        self.width, self.height = size
        self.channels = channels

    def add_conv(self, name: str, channels: int, *, relu: str, padding: int = 1) -> None:
        """Add a 3x3 convolution and a ReLU."""
        self[name] = nn.Conv2d(self.channels, channels, 3, padding=padding)
        self[relu] = nn.ReLU(inplace=True)
        self.channels = channels
        self.width, self.height = self.width - 2 + 2 * padding, self.height - 2 + 2 * padding

    def add_pool(self, name: str) -> None:
        """Add max-pooling that halves the resolution."""
        self[name] = nn.MaxPool2d(2)
        self.width, self.height = self.width // 2, self.height // 2

    def flatten(self) -> int:
        """Add the flattening of a map and return the number of values."""
        self["flatten"] = FlattenChannelsLast()
        return self.channels * self.width * self.height

    def add_dense(
        self, n_features: int, width: int, *, name: str = "dense", relu: str = "dense_relu"
    ) -> None:
        self[name] = nn.Linear(n_features, width)
        self[relu] = nn.ReLU(inplace=True)


@register_network
def cancernet(
    *,
    n_classes: int,
    input_px: int | tuple[int, int],
    channels: int = 3,
    stage_dropout: float = 0.25,
    dense_dropout: float = 0.5,
) -> SequentialNetwork:
    """CancerNet (PyImageSearch 2019, revised 2020): three stages of separable convolutions, and dense 256.

    Takes any input of 8 px or more a side, any depth and any number of classes.
    """
    body = _Body(require_size("cancernet", input_px, 8), channels)
    for stage, widths in enumerate(((32,), (64, 64), (128, 128, 128)), start=1):
        for block, out_channels in enumerate(widths, start=1):
            body[f"conv{stage}_{block}"] = SeparableConv2d(body.channels, out_channels)
            body[f"relu{stage}_{block}"] = nn.ReLU(inplace=True)
            body[f"norm{stage}_{block}"] = BatchNorm2d(out_channels, eps=KERAS_EPS, momentum=KERAS_MOMENTUM)
            body.channels = out_channels
        body.add_pool(f"pool{stage}")
        body[f"drop{stage}"] = Dropout(stage_dropout)
    body.add_dense(body.flatten(), 256, relu="relu")
    body["norm"] = BatchNorm1d(256, eps=KERAS_EPS, momentum=KERAS_MOMENTUM)
    stages = {"stage1": "conv1_1", "stage2": "conv2_1", "stage3": "conv3_1", "dense": "flatten"}
    return SequentialNetwork(body, stages, nn.Linear(256, n_classes), Dropout(dense_dropout))


@register_network
def dabydeen_hedges(
    *,
    n_classes: int,
    input_px: int | tuple[int, int],
    widths: Sequence[int] = (64, 128, 128, 128, 128),
    dense: int = 64,
    dropout: float = 0.5,
) -> SequentialNetwork:
    """The network of Dabydeen and Hedges: stages of one convolution and a pooling, and a small dense layer.

    Args:
        widths: Filters of each stage; the authors' first network had three stages.
        dropout: Fraction of it that is dropped; not stated in the post.
    """
    if not widths:
        raise RecipeError(
            "dabydeen_hedges with widths=[] has no stage: give the filters of one or more", "value"
        )
    body = _Body(require_size("dabydeen_hedges", input_px, 2 ** len(widths)))
    for number, out_channels in enumerate(widths, start=1):
        body.add_conv(f"conv{number}", out_channels, relu=f"relu{number}")
        body.add_pool(f"pool{number}")
    body.add_dense(body.flatten(), dense)
    stages = {f"stage{number}": f"conv{number}" for number in range(1, len(widths) + 1)}
    head = nn.Linear(dense, n_classes)
    return SequentialNetwork(body, stages | {"dense": "flatten"}, head, Dropout(dropout))


@register_network
def vgg16(*, n_classes: int, input_px: int | tuple[int, int], dense: int = 256) -> SequentialNetwork:
    """VGG16's convolutions (Simonyan & Zisserman 2015), named as in Keras, with the top of the PCam post.

    Two classes have one logit between them. The stage ``head`` is all layers after the convolutions, for
    which there are weights: flatten, dense layer and logits.
    """
    body = _Body(require_size("vgg16", input_px, 32))
    blocks = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))  # convolutions, channels
    for block, (n_convolutions, channels) in enumerate(blocks, start=1):
        for number in range(1, n_convolutions + 1):
            body.add_conv(f"block{block}_conv{number}", channels, relu=f"block{block}_relu{number}")
        body.add_pool(f"block{block}_pool")
    body.add_dense(body.flatten(), dense)
    stages = {f"block{block}": f"block{block}_conv1" for block in range(1, len(blocks) + 1)}
    head = OneLogit(dense) if n_classes == 2 else nn.Linear(dense, n_classes)
    return SequentialNetwork(body, stages | {"head": "flatten"}, head)


N_POOLED = 2  # a pooling follows each of Baruah's first two convolutions


@register_network
def baruah(
    *,
    n_classes: int,
    input_px: int | tuple[int, int],
    filters: int = 32,
    n_convolutions: int = 4,
    dense: int = 128,
    n_dense: int = 2,
    dropout: float = 0.5,
    dropout_last: bool = False,
) -> SequentialNetwork:
    """Baruah's network (2019): convolutions without padding, then dense layers of equal width.

    Each convolution has twice the filters of the previous one. Numbers that the post does not state are
    parameters. A dropout precedes each dense layer, as in the code of the post. (The post has a sigmoid per
    class; logits are those before it.)

    Args:
        input_px: As in `build_network`; 50 in the post.
        dropout_last: Also add a dropout after the last dense layer, as in the text of the post.
    """
    if n_convolutions < N_POOLED or n_dense < 1:
        raise RecipeError(
            f"baruah with n_convolutions={n_convolutions!r} and n_dense={n_dense!r}: "
            f"it needs at least {N_POOLED} convolutions and 1 dense layer",
            "value",
        )
    body = _Body(require_size("baruah", input_px, 10 + 8 * (n_convolutions - N_POOLED)))
    for number in range(1, n_convolutions + 1):
        body.add_conv(f"conv{number}", filters * 2 ** (number - 1), relu=f"relu{number}", padding=0)
        if number <= N_POOLED:
            body.add_pool(f"pool{number}")
    n_features = body.flatten()
    for number in range(1, n_dense + 1):
        body[f"drop{number}"] = Dropout(dropout)
        body.add_dense(n_features, dense, name=f"dense{number}", relu=f"dense{number}_relu")
        n_features = dense
    if dropout_last:
        body[f"drop{n_dense + 1}"] = Dropout(dropout)
    stages = {f"stage{number}": f"conv{number}" for number in range(1, n_convolutions + 1)}
    return SequentialNetwork(body, stages | {"dense": "flatten"}, nn.Linear(dense, n_classes))
