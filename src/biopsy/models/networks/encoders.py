"""Published encoders (patch to feature vector), listed in ``encoders.toml``.

To add one, call `register_encoder` in a module of the entry point group ``biopsy.encoders``. It is used by
``model.name = "hf-hub:ORG/NAME"``. Nothing is downloaded here.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from biopsy.core.errors import RecipeError, suggest
from biopsy.core.loaders import load_toml
from biopsy.core.plugins import Registry
from biopsy.models.networks.layers import size_of
from biopsy.models.networks.libraries import LibraryNetwork

PREFIX = "hf-hub:"
FEEDS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "h-optimus": ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517)),
    "hibou": ((0.7068, 0.5755, 0.722), (0.195, 0.2316, 0.1816)),
    "lunit": ((0.70322989, 0.53606487, 0.66096631), (0.21716536, 0.26081574, 0.20723464)),
}
"""Mean and standard deviation per RGB channel of values in 0-1."""
_LAYERS = ("mlp_layer", "act_layer")  # arguments that name a class of timm or PyTorch


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """A published encoder.

    Attributes:
        name: Short name.
        hub: ``ORG/NAME`` on Hugging Face.
        file: File name of the weights.
        architecture: Name of the vision transformer in timm.
        arguments: Constructor arguments that differ from timm's.
        pooling: ``cls``: the class token; ``cls+mean``: the class token and the mean of the patch tokens.
        n_features: Length of the feature vector.
        millions: Number of parameters in millions.
        feed: ``(mean, std)`` per RGB channel of values in 0-1.
        mpp: Pixel size of the training patches in µm, the usual one of several; None for natural images.
        input_px: Input size in pixels.
        licence: Short name, lower case.
        is_gated: Whether its terms must be accepted on Hugging Face.
        keys: Naming of the tensors: as in timm and DINOv2, or as in ``transformers``.
        unchecked: Fields that are assumed and not documented by the publisher.
    """

    name: str
    hub: str
    architecture: str
    n_features: int
    millions: float
    licence: str
    is_gated: bool
    feed: tuple[tuple[float, ...], tuple[float, ...]] = FEEDS["imagenet"]
    arguments: Mapping[str, object] = field(default_factory=dict)
    pooling: Literal["cls", "cls+mean"] = "cls"
    mpp: float | None = 0.5
    input_px: int = 224
    file: str = "model.safetensors"
    keys: Literal["timm", "transformers"] = "timm"
    unchecked: str = ""

    @property
    def tag(self) -> str:
        """Name in recipes: ``hf-hub:ORG/NAME``."""
        return PREFIX + self.hub

    @property
    def page(self) -> str:
        """Address of its page, with a note if it is gated."""
        gate = " (gated: accept its terms there, then `hf auth login`)" if self.is_gated else ""
        return f"https://huggingface.co/{self.hub}{gate}"

    @property
    def token_px(self) -> int:
        """Side of a token in pixels."""
        match = re.search(r"patch(\d+)", self.architecture)
        assert match is not None, self.architecture
        return int(match.group(1))

    def fit_input(self, patch_um: float | None) -> int:
        """Return the input size at which a patch is closest to the encoder's um/px.

        It is a multiple of `token_px` between half and twice `input_px`; without one of both, `input_px`.
        """
        if patch_um is None or self.mpp is None:
            return self.input_px
        target_px = min(max(patch_um / self.mpp, self.input_px / 2), self.input_px * 2)
        return max(round(target_px / self.token_px), 1) * self.token_px

    def build(self, input_px: int, **arguments: Any) -> "PooledTokens":
        """Return the network without a head, with random weights: patches to ``(B, n_features)``."""
        import timm

        settings: dict[str, Any] = {
            "global_pool": "token",
            **self.arguments,
            **arguments,
            "img_size": input_px,
        }
        settings |= {name: _layer(settings[name]) for name in _LAYERS if name in settings}
        return PooledTokens(timm.create_model(self.architecture, num_classes=0, **settings), self.pooling)


class PooledTokens(nn.Module):
    """A vision transformer with pooled tokens."""

    def __init__(self, vit: nn.Module, pooling: str) -> None:
        super().__init__()
        self.vit = vit
        self.pooling = pooling
        self.n_features = cast(int, vit.num_features) * (1 if pooling == "cls" else 2)

    def forward(self, patches: Tensor) -> Tensor:
        tokens = self.vit.forward_features(patches)  # type: ignore[operator]
        if self.pooling == "cls":
            return tokens[:, 0]
        mean = tokens[:, self.vit.num_prefix_tokens :].mean(dim=1)
        return torch.cat([tokens[:, 0], mean], dim=1)


class EncoderNetwork(LibraryNetwork):
    """An encoder with a linear head; its stages are those of the vision transformer."""

    @property
    def trunk(self) -> nn.Module:
        """The vision transformer."""
        return self.body.vit  # type: ignore[return-value]


ENCODERS: Registry[Encoder] = Registry("biopsy.encoders")


def register_encoder(encoder: Encoder, function: Callable[..., object] = Encoder.build) -> Encoder:
    """Register an encoder under its ``ORG/NAME``.

    Args:
        function: Any function of the registering module, if it is not this one.
    """
    ENCODERS.add(encoder.hub, encoder, function)
    return encoder


def list_encoders() -> list[Encoder]:
    return sorted(ENCODERS.values(), key=lambda encoder: encoder.name)


def find_encoder(name: str) -> Encoder:
    """Return an encoder by short name, ``ORG/NAME`` or ``hf-hub:ORG/NAME``."""
    plain = name.removeprefix(PREFIX)
    for encoder in ENCODERS.values():
        if plain in (encoder.name, encoder.hub):
            return encoder
    names = [alias for encoder in ENCODERS.values() for alias in (encoder.name, encoder.hub)]
    raise RecipeError(
        f"unknown encoder {name!r}: {suggest(plain, names)}; use model.name=timm:NETWORK with "
        "model.weights=FILE for other weights, or add an encoder by register_encoder",
        "name",
    )


def build_encoder(
    name: str, *, n_classes: int, input_px: int | tuple[int, int], **arguments: Any
) -> EncoderNetwork:
    """Build an encoder with a linear head."""
    encoder, (width, height) = find_encoder(name), size_of(input_px)
    if width != height or width % encoder.token_px:
        raise RecipeError(
            f"{name} needs a square input whose side is a multiple of {encoder.token_px} px, such as "
            f"{encoder.input_px}; found {width}x{height}",
            "value",
        )
    body = encoder.build(width, **arguments)
    if body.n_features != encoder.n_features:
        raise RecipeError(
            f"encoder {encoder.name} is registered with n_features={encoder.n_features}, but "
            f"{encoder.architecture} with its arguments and pooling={encoder.pooling!r} returns "
            f"{body.n_features} features: correct n_features, arguments or pooling where it is registered",
            "network",
        )
    head = nn.Linear(encoder.n_features, n_classes)
    return EncoderNetwork(body, head, (width, height)).train()


def fill_encoder(network: LibraryNetwork, name: str, tensors: dict[str, Tensor]) -> None:
    """Load published tensors into an encoder; position embeddings are resampled to its input size."""
    from timm.models.vision_transformer import checkpoint_filter_fn

    vit: Any = network.body.vit
    if find_encoder(name).keys == "transformers":
        tensors = rename_transformers(tensors)
    tensors = checkpoint_filter_fn(tensors, vit)
    vit.load_state_dict({key: value for key, value in tensors.items() if not key.startswith("head.")})


_RENAMED = (
    ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.", ""),  # cls_token, mask_token, register_tokens
    ("encoder.layer.", "blocks."),
    ("attention.output.dense.", "attn.proj."),
    ("layernorm_before.", "norm1."),
    ("layernorm_after.", "norm2."),
    ("layer_scale1.lambda1", "ls1.gamma"),
    ("layer_scale2.lambda1", "ls2.gamma"),
    ("intermediate.dense.", "mlp.fc1."),
    ("mlp.weights_in.", "mlp.w12."),
    ("mlp.weights_out.", "mlp.w3."),
    ("layernorm.", "norm."),
)


def rename_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of transformers' ``ViTModel`` or ``Dinov2Model`` to the names in timm and DINOv2."""
    renamed: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        key = re.sub(r"^(vit|dinov2)\.", "", key)
        if key.startswith(("pooler.", "classifier.")):
            continue
        for old, new in _RENAMED:
            key = key.replace(old, new, 1)
        key = re.sub(r"^(blocks\.\d+\.)output\.dense\.", r"\1mlp.fc2.", key)
        if match := re.match(r"(blocks\.\d+\.)attention\.attention\.(query|key|value)\.(weight|bias)$", key):
            parts.setdefault(f"{match[1]}attn.qkv.{match[3]}", {})[match[2]] = tensor
        else:
            renamed[key] = tensor
    return renamed | {
        key: torch.cat([part[name] for name in ("query", "key", "value")]) for key, part in parts.items()
    }


def _layer(name: str) -> Any:
    if name == "SiLU":
        return nn.SiLU
    import timm.layers

    return getattr(timm.layers, name)


for _name, _row in load_toml(Path(__file__).with_suffix(".toml")).items():
    assert isinstance(_row, dict)
    _row["feed"] = FEEDS[_row.get("feed", "imagenet")]
    if _row.get("mpp") == "none":
        _row["mpp"] = None
    register_encoder(Encoder(name=_name, **_row))
