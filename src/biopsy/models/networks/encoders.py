"""Published pathology encoders (patch to feature vector).

To add one, call `register_encoder` in a module of the entry point group ``biopsy.encoders``. It is used by
``model.name = "hf-hub:ORG/NAME"``. Nothing is downloaded here.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from biopsy.core.errors import RecipeError, suggest
from biopsy.core.plugins import Registry
from biopsy.models.networks.layers import size_of
from biopsy.models.networks.libraries import LibraryNetwork

PREFIX = "hf-hub:"
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
H_OPTIMUS = ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517))
HIBOU = ((0.7068, 0.5755, 0.722), (0.195, 0.2316, 0.1816))
LUNIT = ((0.70322989, 0.53606487, 0.66096631), (0.21716536, 0.26081574, 0.20723464))
SWIGLU = {"mlp_layer": "SwiGLUPacked", "act_layer": "SiLU"}


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
        mpp: Pixel size of the training patches in µm; the usual one of several.
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
    feed: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET
    arguments: Mapping[str, object] = field(default_factory=dict)
    pooling: Literal["cls", "cls+mean"] = "cls"
    mpp: float = 0.5
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

        It is a multiple of `token_px` between half and twice `input_px`.
        """
        if patch_um is None:
            return self.input_px
        target_px = min(max(patch_um / self.mpp, self.input_px / 2), self.input_px * 2)
        return max(round(target_px / self.token_px), 1) * self.token_px

    def build(self, input_px: int, **arguments: Any) -> nn.Module:
        """Return the network without a head, with random weights: patches to ``(B, n_features)``."""
        import timm

        settings: dict[str, Any] = {
            "global_pool": "token",
            **self.arguments,
            **arguments,
            "img_size": input_px,
        }
        settings |= {name: _layer(settings[name]) for name in SWIGLU if name in settings}
        return PooledTokens(timm.create_model(self.architecture, num_classes=0, **settings), self.pooling)


class PooledTokens(nn.Module):
    """A vision transformer with pooled tokens."""

    def __init__(self, vit: nn.Module, pooling: str) -> None:
        super().__init__()
        self.vit = vit
        self.pooling = pooling

    def forward(self, patches: Tensor) -> Tensor:
        tokens = self.vit.forward_features(patches)  # type: ignore[operator]
        if self.pooling == "cls":
            return tokens[:, 0]
        mean = tokens[:, self.vit.num_prefix_tokens :].mean(dim=1)
        return torch.cat([tokens[:, 0], mean], dim=1)


ENCODERS: Registry[Encoder] = Registry("biopsy.encoders")


def register_encoder(encoder: Encoder, function: Callable[..., object] = Encoder.build) -> Encoder:
    """Register an encoder under its ``ORG/NAME``.

    Args:
        function: Any function of the registering module, if it is not this one.
    """
    ENCODERS.add(encoder.hub, encoder, function)
    return encoder


def list_encoders() -> list[Encoder]:
    """Return all encoders, by name."""
    return sorted(ENCODERS.values(), key=lambda encoder: encoder.name)


def find_encoder(name: str) -> Encoder:
    """Return an encoder by short name, ``ORG/NAME`` or ``hf-hub:ORG/NAME``.

    Raises:
        RecipeError: If the name is unknown; with the closest name.
    """
    plain = name.removeprefix(PREFIX)
    for encoder in ENCODERS.values():
        if plain in (encoder.name, encoder.hub):
            return encoder
    names = [alias for encoder in ENCODERS.values() for alias in (encoder.name, encoder.hub)]
    raise RecipeError(
        f"unknown encoder {name!r}: {suggest(plain, names)}; use model.name=timm:NETWORK with "
        "model.weights=FILE for other weights, or add an encoder by register_encoder"
    )


def build_encoder(
    name: str, *, n_classes: int, input_px: int | tuple[int, int], **arguments: Any
) -> LibraryNetwork:
    """Build an encoder with a linear head.

    Raises:
        RecipeError: If the name is unknown, or the input size is invalid.
    """
    encoder, (width, height) = find_encoder(name), size_of(input_px)
    if width != height or width % encoder.token_px:
        raise RecipeError(
            f"{name} needs a square input whose side is a multiple of {encoder.token_px} px, such as "
            f"{encoder.input_px}; found {width}x{height}"
        )
    head = nn.Linear(encoder.n_features, n_classes)
    return LibraryNetwork(encoder.build(width, **arguments), head, (width, height)).train()


def fill_encoder(network: LibraryNetwork, name: str, tensors: dict[str, Tensor]) -> None:
    """Load published tensors into an encoder; position embeddings are resampled to its input size.

    Raises:
        RuntimeError: If names or shapes do not fit.
    """
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


def _register_known() -> None:
    """Register published encoders, as of November 2026."""
    nc_nd = "cc-by-nc-nd-4.0"
    virchow = {"init_values": 1e-5, "mlp_ratio": 5.3375, **SWIGLU}
    giant = {"init_values": 1e-5}
    glu = {"mlp_ratio": 2.66667 * 2, **SWIGLU}
    small = {"architecture": "vit_small_patch16_224", "n_features": 384, "millions": 21.7}
    rows: list[dict[str, Any]] = [
        {"name": "h-optimus-0", "hub": "bioptimus/H-optimus-0", "licence": "apache-2.0", "is_gated": False}
        | {"architecture": "vit_giant_patch14_reg4_dinov2", "arguments": giant, "n_features": 1536}
        | {"millions": 1134.8, "feed": H_OPTIMUS, "file": "pytorch_model.bin"},
        {"name": "h0-mini", "hub": "bioptimus/H0-mini", "licence": nc_nd, "is_gated": True}
        | {"architecture": "vit_base_patch14_reg4_dinov2", "arguments": giant | glu, "n_features": 768}
        | {"millions": 85.7, "feed": H_OPTIMUS},
        {"name": "uni2-h", "hub": "MahmoodLab/UNI2-h", "licence": nc_nd, "is_gated": True}
        | {"architecture": "vit_giant_patch14_224", "n_features": 1536, "millions": 681.4}
        | {"file": "pytorch_model.bin"}
        | {
            "arguments": giant
            | glu
            | {"depth": 24, "num_heads": 24, "embed_dim": 1536, "reg_tokens": 8, "no_embed_class": True}
        },
        {"name": "virchow", "hub": "paige-ai/Virchow", "licence": "apache-2.0", "is_gated": True}
        | {"architecture": "vit_huge_patch14_224", "arguments": virchow, "n_features": 2560}
        | {"millions": 631.2, "pooling": "cls+mean", "file": "pytorch_model.bin"},
        {"name": "virchow2", "hub": "paige-ai/Virchow2", "licence": nc_nd, "is_gated": True}
        | {"architecture": "vit_huge_patch14_224", "arguments": virchow | {"reg_tokens": 4}}
        | {"n_features": 2560, "millions": 631.2, "pooling": "cls+mean"},
        {"name": "hibou-b", "hub": "histai/hibou-b", "licence": "apache-2.0", "is_gated": True}
        | {"architecture": "vit_base_patch14_reg4_dinov2", "arguments": glu, "n_features": 768}
        | {"millions": 85.7, "feed": HIBOU, "keys": "transformers"},
        {"name": "hibou-l", "hub": "histai/hibou-L", "licence": "apache-2.0", "is_gated": True}
        | {"architecture": "vit_large_patch14_reg4_dinov2", "n_features": 1024}
        | {"arguments": glu | {"mlp_ratio": 5.34375}, "millions": 303.6}  # 2736 hidden units, twice
        | {"feed": HIBOU, "keys": "transformers", "unchecked": "SwiGLU as in hibou-b"},
        {"name": "midnight-12k", "hub": "kaiko-ai/midnight", "licence": "mit", "is_gated": False}
        | {"architecture": "vit_giant_patch14_dinov2", "n_features": 3072, "millions": 1134.8}
        | {"feed": HALF, "pooling": "cls+mean", "keys": "transformers"},
        {"name": "openmidnight", "hub": "SophontAI/OpenMidnight", "licence": "apache-2.0", "is_gated": True}
        | {"architecture": "vit_giant_patch14_reg4_dinov2", "n_features": 1536, "millions": 1134.8}
        | {"file": "teacher_checkpoint_load.pt", "unchecked": "mean, std, name of the file"},
        {"name": "gigapath-flash", "hub": "prov-gigapath/prov-gigapath-flash", "licence": "apache-2.0"}
        | small
        | {"is_gated": True, "unchecked": "architecture, mean, std"},
        {"name": "lunit-s8", "hub": "1aurent/vit_small_patch8_224.lunit_dino", "licence": "lunit-nc"}
        | {"architecture": "vit_small_patch8_224", "n_features": 384, "millions": 21.7}
        | {"is_gated": False, "feed": LUNIT},
        {"name": "lunit-s16", "hub": "1aurent/vit_small_patch16_224.lunit_dino", "licence": "lunit-nc"}
        | small
        | {"is_gated": False, "feed": LUNIT},
        {"name": "phikon", "hub": "owkin/phikon", "licence": "owkin-nc", "is_gated": False}
        | {"architecture": "vit_base_patch16_224", "n_features": 768, "millions": 85.8}
        | {"keys": "transformers"},
        {"name": "phikon-v2", "hub": "owkin/phikon-v2", "licence": "owkin-nc", "is_gated": False}
        | {"architecture": "vit_large_patch16_224", "arguments": {"init_values": 1.0}, "n_features": 1024}
        | {"millions": 303.4, "keys": "transformers"},
    ]
    for size, n_features, millions in (("small", 384, 21.7), ("base", 768, 85.8)):
        for token in (8, 16):
            hub = f"1aurent/vit_{size}_patch{token}_224.kaiko_ai_towards_large_pathology_fms"
            rows.append(
                {"name": f"kaiko-{size[0]}{token}", "hub": hub, "licence": "kaiko-nc", "is_gated": False}
                | {"architecture": f"vit_{size}_patch{token}_224", "n_features": n_features}
                | {"millions": millions, "feed": HALF}
            )
    for start, feed in (("KS16", HALF), ("IS16", IMAGENET)):
        for teacher in ("HOpt0", "Virchow2", "UNI2h"):
            is_open = (start, teacher) == ("IS16", "HOpt0")
            rows.append(
                {"name": f"distillpath-{start}-{teacher}".lower(), "feed": feed, "is_gated": False}
                | {"hub": f"RamonK/DistillPath-{start}-{teacher}"}
                | small
                | {"licence": "apache-2.0" if is_open else "non-commercial", "unchecked": "licence"}
            )
    for row in rows:
        register_encoder(Encoder(**row))


_register_known()
