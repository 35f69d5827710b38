"""Where pretrained weights may lie, what is checked before they are used, and a network made with them.

Nothing is downloaded. A tag is looked up by its file's name in ``$BIOPSY_WEIGHTS`` (by default
``~/.cache/biopsy/weights``), where torch, Keras and Hugging Face keep what they fetched, and in the Python
package that brings it along.
"""

import hashlib
import logging
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypedDict

from torch import nn

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
MOST_RESIZED = 2.5  # factor between the um/px of patches and of an encoder from which that is said
OPEN_LICENCES = ("apache-2.0", "bsd-2-clause", "bsd-3-clause", "cc-by-4.0", "cc0-1.0", "mit", NOT_STATED)


def locate(weights: Weights) -> Path | None:
    """Return the file of some weights if it is on this machine."""
    import torch

    package = find_spec(weights.package) if weights.package else None
    folders = (
        SHIPPED / weights.tag,
        weights_folder(),
        Path(torch.hub.get_dir()) / "checkpoints",
        Path("~/.keras/models").expanduser(),
        *(Path(place) / "models" for place in (package and package.submodule_search_locations) or ()),
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
    """Return the folder in which people put weights."""
    return Path(os.environ.get(FOLDER_VARIABLE) or "~/.cache/biopsy/weights").expanduser()


class StartWeights(TypedDict):
    """What a network begins with, as a run records it; None for what does not apply."""

    pretrained: bool
    weights: str | None
    file: str | None
    sha256: str | None
    licence: str | None
    page: str | None
    trainable: str
    note: str | None


def make_network(
    recipe: Recipe, n_classes: int, seed: int, *, load: bool = True
) -> tuple[nn.Module, StartWeights]:
    """Build the network of a recipe, with its initial weights and its frozen stages.

    Args:
        recipe: Whose tables ``model`` and ``preprocessing`` count.
        n_classes: Number of logits.
        load: False where other weights are about to be loaded over them, those of a checkpoint say.

    Returns:
        The network, and what it begins with.

    Raises:
        RecipeError: If network, weights or stage are unknown, the file is not there, or its licence was not
            accepted.
        DataError: If the file has another hash than it should, or does not fit the network.
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
        path, known = choose_weights(recipe)
        record["weights"] = known.tag if known else path.name
        record["file"], record["sha256"] = path.name, sha256_file(path)
        record["licence"] = known.licence if known else NOT_STATED
        record["page"] = known.page if known else None
        name = known.tag if known and known.tag.startswith("timm:") else model.name
        if not fill_network(network, name, path):
            notes.append("the head is random")
        notes += _compare_feed(recipe, known)
    elif not model.pretrained:
        notes += _note_missing(recipe)
    freeze(network, model.trainable)
    record["note"] = "; ".join(notes) or None
    return network, record


def feed_as_encoder(recipe: Recipe, patch_px: int, mpp: float | None) -> Recipe:
    """Return a recipe with ``preprocessing.feed = "encoder"`` worked out, any other as it is.

    Args:
        recipe: Gets the input size at which patches are nearest to the encoder's um/px, and the channel
            order, scale, mean and std that its weights were trained with.
        patch_px: Side of a patch.
        mpp: Micrometres per pixel of the patches; None where unknown.
    """
    if recipe.preprocessing.feed == "recipe":
        return recipe
    name, known = recipe.model.name, _known_feed(recipe)
    changes: dict[str, Any] = {f"preprocessing.{key}": value for key, value in (known or {}).items()}
    if name.startswith(PREFIX):
        encoder = find_encoder(name)
        changes["model.name"] = encoder.tag
        input_px = encoder.fit_input(None if mpp is None else patch_px * mpp)
        changes["preprocessing.input_px"] = input_px
        logger.info("%s", _say_resolution(patch_px, mpp, input_px, encoder.mpp))
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


def _say_resolution(patch_px: int, mpp: float | None, input_px: int, encoder_mpp: float) -> str:
    """Say how patches are brought to an encoder's um/px, and how far that is from what it was trained on."""
    resized = f"patches of {patch_px} px are resized to {input_px} px"
    if mpp is None:
        return f"{resized}; their um/px is unknown, the encoder was trained at {encoder_mpp:g} um/px"
    text = (
        f"{resized}, {patch_px * mpp / input_px:.3g} um/px; the encoder was trained at {encoder_mpp:g} um/px"
    )
    factor = mpp / encoder_mpp
    if factor > MOST_RESIZED:
        text += f". At {mpp:g} um/px they lack the detail that it was trained on: expect less of it"
    elif factor < 1 / MOST_RESIZED:
        text += f". At {mpp:g} um/px they show a smaller field than it was trained on: expect less of it"
    return text


def describe_weights(network: nn.Module, record: StartWeights) -> str:
    """Say in a line what a network begins with and how much of it is trained."""
    total, trainable = count_parameters(network)
    begins = (
        f"weights {record['weights']}, licence {record['licence']}"
        if record["pretrained"]
        else "random weights"
    )
    note = f" ({record['note']})" if record["note"] else ""
    return f"{begins}{note}; {total:,} parameters, {trainable:,} trainable, {total - trainable:,} frozen"


def choose_weights(recipe: Recipe) -> tuple[Path, Weights | None]:
    """Return the file of a recipe's weights and what is known about it.

    Raises:
        RecipeError: If there is none, they are of another network, or their licence was not accepted.
        DataError: If the file's hash is another one.
    """
    model = recipe.model
    path = Path(model.weights).expanduser()
    is_path = not model.weights.startswith(PREFIX) and (
        path.suffix.lower() in SUFFIXES or len(path.parts) > 1
    )
    if is_path:
        known = next((weights for weights in KNOWN_WEIGHTS if weights.file == path.name), None)
        if model.name.startswith(PREFIX):
            known = find_weights(model.name)
            require_licence(known)
        if not path.is_file():
            raise RecipeError(f"there is no file {model.weights!r} for model.weights; {_say_without()}")
    else:
        known = _find_default(recipe) if not model.weights else find_weights(model.weights)
        if not {model.name, model.name.partition(".")[0]} & {*known.networks}:
            raise RecipeError(
                f"the weights {known.tag!r} are of {' or '.join(known.networks)}, the recipe's network is "
                f"{model.name!r}"
            )
        require_licence(known)
        result = locate(known)
        if result is None:
            raise RecipeError(
                f"the weights {known.tag!r} are not on this machine: get {known.file} from {known.page} and "
                f"put it into {weights_folder()} (${FOLDER_VARIABLE} can name another folder), or point "
                f"at it with --set model.weights=PATH; {_say_without()}"
            )
        path = result
        require_digest(path, known.digest)
    require_digest(path, f"sha256:{model.weights_sha256}" if model.weights_sha256 else "")
    return path, known


def _find_default(recipe: Recipe) -> Weights:
    name = recipe.model.name
    if ":" in name:
        return find_weights(name)
    fitting = [weights.tag for weights in KNOWN_WEIGHTS if name in weights.networks]
    raise RecipeError(
        f"model.pretrained needs model.weights: for {name!r} "
        f"{'known are ' + ', '.join(fitting) if fitting else 'no tag is known'}, or give the path of a file"
    )


def _say_without() -> str:
    return "or go on without, from random weights: --set model.pretrained=false"


def require_digest(path: Path, digest: str) -> None:
    """Refuse a file whose hash does not begin with ``ALGORITHM:HEX``; an empty digest takes any file.

    Raises:
        DataError: Saying both hashes.
    """
    if not digest:
        return
    algorithm, _, wanted = digest.partition(":")
    with path.open("rb") as file:
        result = hashlib.file_digest(file, algorithm).hexdigest()
    if not result.startswith(wanted.lower()):
        raise DataError(
            f"{path} has the {algorithm} {result}, expected was {wanted}: it is another file, or was cut "
            "short; get it again"
        )


def require_licence(weights: Weights) -> None:
    """Refuse weights whose licence restricts their use, unless it was accepted by name.

    Raises:
        RecipeError: Naming the licence, where it stands and how to accept it.
    """
    accepted = [name.strip().lower() for name in os.environ.get(LICENCE_VARIABLE, "").split(",")]
    if weights.licence not in (*OPEN_LICENCES, *accepted):
        raise RecipeError(
            f"the weights {weights.tag!r} have the licence {weights.licence!r}, which restricts their use: "
            f"read it at {weights.page}, and if you accept it begin the command with "
            f"`biopsy --accept-licence {weights.licence}` or set {LICENCE_VARIABLE}={weights.licence}"
        )


def _compare_feed(recipe: Recipe, known: Weights | None) -> list[str]:
    """Return where a recipe feeds pretrained weights otherwise than they were trained."""
    if known is None:
        return []
    settings = recipe.preprocessing.model_dump()
    differing = [
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in known.feed.items()
        if settings[key] != value
    ]
    return [f"they were trained with {', '.join(differing)}, the recipe feeds otherwise"] if differing else []


def _note_missing(recipe: Recipe) -> list[str]:
    """Say that pretrained weights were switched off, and that frozen stages are random."""
    notes = []
    if recipe.name in list_recipes() and (shipped := load_recipe(recipe.name).model).pretrained:
        notes.append(f"the recipe starts from {shipped.weights}, this run did not (model.pretrained=false)")
    if recipe.model.trainable != "all":
        notes.append("what is frozen is random too")
    return notes
