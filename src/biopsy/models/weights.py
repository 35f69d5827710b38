"""Locating and verifying pretrained weights, and networks initialised with them.

Nothing is downloaded. The file of a tag is searched in ``$BIOPSY_WEIGHTS`` (default
``~/.cache/biopsy/weights``), in the caches of torch, Keras and Hugging Face, and in the Python package that
contains it.
"""

import hashlib
import logging
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Required

from torch import nn
from typing_extensions import TypedDict

from biopsy.core.errors import DataError, RecipeError
from biopsy.core.files import sha256_file
from biopsy.models.known_weights import KNOWN_WEIGHTS, NOT_STATED, Feed, Weights, find_weights
from biopsy.models.networks import build_network, count_parameters
from biopsy.models.networks.encoders import PREFIX, find_encoder
from biopsy.models.networks.stages import freeze
from biopsy.models.shipped import FOLDER as SHIPPED
from biopsy.models.weight_files import SUFFIXES, fill_network
from biopsy.recipes import Recipe, list_recipes, load_recipe

logger = logging.getLogger(__name__)

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


class StartWeights(TypedDict, total=False):
    """Record of the initial weights of a run; None for fields that do not apply."""

    pretrained: Required[bool]
    weights: str | None
    file: str | None
    sha256: Required[str | None]
    licence: str | None
    page: str | None
    trainable: str
    note: str | None


def make_network(
    recipe: Recipe, n_classes: int, seed: int, *, load: bool = True
) -> tuple[nn.Module, StartWeights]:
    """Build the network of a recipe, with its initial weights and its frozen stages.

    Args:
        recipe: Recipe with tables ``model`` and ``preprocessing``.
        n_classes: Number of logits.
        load: Whether to load pretrained weights; False if a checkpoint is loaded afterwards.

    Returns:
        The network, and the record of its initial weights.

    Raises:
        RecipeError: If network, weights or stage are unknown, the file is missing, or its licence was not
            accepted.
        DataError: If the hash of the file is wrong, or it does not fit the network.
    """
    model = recipe.model
    network = build_network(
        model.name, n_classes=n_classes, input_px=recipe.preprocessing.input_px, seed=seed, **model.params
    )
    record = StartWeights(
        pretrained=model.pretrained,
        weights=None,
        file=None,
        sha256=None,
        licence=None,
        page=None,
        trainable=model.trainable,
        note=None,
    )
    notes: list[str] = []
    if model.pretrained and load:
        path, weights = choose_weights(recipe)
        record["weights"] = weights.tag if weights else path.name
        record["file"], record["sha256"] = path.name, sha256_file(path)
        record["licence"] = weights.licence if weights else NOT_STATED
        record["page"] = weights.page if weights else None
        name = weights.tag if weights and weights.tag.startswith("timm:") else model.name
        if not fill_network(network, name, path):
            notes.append("the head is random")
        notes += _compare_feed(recipe, weights)
    elif not model.pretrained:
        notes += _note_random_weights(recipe)
    freeze(network, model.trainable)
    record["note"] = "; ".join(notes) or None
    return network, record


def feed_as_encoder(recipe: Recipe, patch_px: int, mpp: float | None) -> Recipe:
    """Return a recipe with ``preprocessing.feed = "encoder"`` resolved, any other unchanged.

    The input size is set to match the encoder's um/px, and channel order, scale, mean and std to those with
    which its weights were trained.

    Args:
        patch_px: Side of a patch in pixels.
        mpp: Pixel size of the patches in µm; None if unknown.
    """
    if recipe.preprocessing.feed == "recipe":
        return recipe
    name, feed = recipe.model.name, _known_feed(recipe)
    changes: dict[str, Any] = {f"preprocessing.{key}": value for key, value in (feed or {}).items()}
    if name.startswith(PREFIX):
        encoder = find_encoder(name)
        changes["model.name"] = encoder.tag
        input_px = encoder.fit_input(None if mpp is None else patch_px * mpp)
        changes["preprocessing.input_px"] = input_px
        logger.info("%s", _describe_resolution(patch_px, mpp, input_px, encoder.mpp))
    if name.startswith("torchvision:squeezenet"):
        changes["model.params"] = {**recipe.model.params, "head": "linear"}
    return load_recipe(recipe, {**changes, "preprocessing.feed": "recipe"})


def _known_feed(recipe: Recipe) -> Feed | None:
    name, tag = recipe.model.name, recipe.model.weights
    if not recipe.model.pretrained and not name.startswith(PREFIX):
        return None
    by_file = [weights for weights in KNOWN_WEIGHTS if tag and weights.file == Path(tag).name]
    if by_file:
        return by_file[0].feed
    is_tag = bool(tag) and Path(tag).suffix.lower() not in SUFFIXES and "/" not in tag
    return find_weights(tag if is_tag else name).feed if is_tag or ":" in name else None


def _describe_resolution(patch_px: int, mpp: float | None, input_px: int, encoder_mpp: float) -> str:
    """Return a sentence on the resolution of resized patches and that of the encoder's training data."""
    resized = f"patches of {patch_px} px are resized to {input_px} px"
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


def describe_weights(network: nn.Module, record: StartWeights) -> str:
    """Return one line on the initial weights and the number of trainable parameters."""
    total, trainable = count_parameters(network)
    start = (
        f"weights {record['weights']}, licence {record['licence']}"
        if record["pretrained"]
        else "random weights"
    )
    note = f" ({record['note']})" if record["note"] else ""
    return f"{start}{note}; {total:,} parameters, {trainable:,} trainable, {total - trainable:,} frozen"


def choose_weights(recipe: Recipe) -> tuple[Path, Weights | None]:
    """Return the file of a recipe's weights and its entry among the known weights, if any.

    Raises:
        RecipeError: If it is missing, of another network, or its licence was not accepted.
        DataError: If the hash of the file is wrong.
    """
    model = recipe.model
    path = Path(model.weights).expanduser()
    is_path = not model.weights.startswith(PREFIX) and (
        path.suffix.lower() in SUFFIXES or len(path.parts) > 1
    )
    if is_path:
        weights = next((weights for weights in KNOWN_WEIGHTS if weights.file == path.name), None)
        if model.name.startswith(PREFIX):
            weights = find_weights(model.name)
            require_licence(weights)
        if not path.is_file():
            raise RecipeError(f"model.weights: no file {model.weights!r}; {_random_weights_hint()}")
    else:
        weights = _find_default(recipe) if not model.weights else find_weights(model.weights)
        if not {model.name, model.name.partition(".")[0]} & {*weights.networks}:
            raise RecipeError(
                f"the weights {weights.tag!r} are of {' or '.join(weights.networks)}, the recipe's network "
                f"is {model.name!r}"
            )
        require_licence(weights)
        located = locate(weights)
        if located is None:
            raise RecipeError(
                f"the weights {weights.tag!r} are not on this machine: download {weights.file} from "
                f"{weights.page} to {weights_folder()} (or the folder ${FOLDER_VARIABLE}), or use "
                f"--set model.weights=PATH; {_random_weights_hint()}"
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
        f"{'known are ' + ', '.join(fitting) if fitting else 'no tag is known'}, or give the path of a file"
    )


def _random_weights_hint() -> str:
    return "or use random weights: --set model.pretrained=false"


def require_digest(path: Path, digest: str) -> None:
    """Verify that the hash of a file starts with ``ALGORITHM:HEX``; an empty digest accepts any file.

    Raises:
        DataError: With both hashes.
    """
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
    """Refuse weights with a restrictive licence that was not accepted.

    Raises:
        RecipeError: With the licence, its page and how to accept it.
    """
    accepted = [name.strip().lower() for name in os.environ.get(LICENCE_VARIABLE, "").split(",")]
    if weights.licence not in (*OPEN_LICENCES, *accepted):
        raise RecipeError(
            f"the weights {weights.tag!r} have the licence {weights.licence!r}, which restricts their use: "
            f"read it at {weights.page}, and if you accept it begin the command with "
            f"`biopsy --accept-licence {weights.licence}` or set {LICENCE_VARIABLE}={weights.licence}"
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
