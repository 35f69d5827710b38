"""A classifier from a file that another library saved: its weights, fed and read as a recipe says."""

from collections.abc import Sequence
from pathlib import Path

from biopsy.core.errors import RecipeError, RunError, suggest
from biopsy.core.files import sha256_file
from biopsy.data.datasets import hcd, idc
from biopsy.learning.classifiers import Classifier, ClassifierInfo
from biopsy.learning.engine import outputs_of
from biopsy.learning.foreign.keras import carry, compare_steps
from biopsy.learning.foreign.keras_files import read_keras
from biopsy.learning.networks import build_network
from biopsy.learning.networks.layers import OneLogit
from biopsy.learning.preprocessing import Preprocessing
from biopsy.learning.recipes import Recipe, list_recipes, load_recipe

# of the data set a recipe was published on: names and positive class, um/px, side of a patch
_DATASETS = {
    "idc": (idc.CLASS_NAMES, idc.MPP, 50),
    "hcd": (hcd.CLASS_NAMES, hcd.MPP, 96),
}


def import_keras(
    file: Path | str,
    *,
    model: str | Path,
    out: Path | str,
    class_names: Sequence[str] | None = None,
    positive: str | None = None,
    mpp: float | None = None,
    patch_px: int | None = None,
) -> Classifier:
    """Make a classifier of a model that was trained in Keras, from its file alone.

    The probabilities are Keras's own (two sigmoids become ``p1 / (p0 + p1)``). Nothing is calibrated: the
    likeliest class is called. What the training patches were like is not in the file, so predictions say
    nothing on patches unlike them.

    Args:
        file: ``.h5``, ``.weights.h5`` or ``.keras``; read as data, no code in it is executed.
        model: A recipe, shipped or a TOML file, or the network of a shipped one: says which network it is and
            how patches are resized, scaled and ordered. The input's side is the file's, where it says it.
        out: The classifier's folder; it must not exist.
        class_names: In the order of the outputs; by default those of the recipe's data set.
        positive: Of two classes the one whose recall is called sensitivity; by default the second.
        mpp: Micrometres per pixel of the patches it was trained on; by default the data set's.
        patch_px: Side of a patch as cut from the slide; by default the data set's.

    Raises:
        DataError: If the file cannot be read, holds code, or is of another architecture.
        RecipeError: If there is no such model, or what its recipe leaves open was not said.
        RunError: If there is something at ``out``.
    """
    recipe = _find_recipe(model)
    names, default_mpp, default_px = _DATASETS.get(recipe.origin.dataset, ([], None, None))
    names = list(names if class_names is None else class_names)
    patch_px = default_px if patch_px is None else patch_px
    if len(names) < 2 or len(set(names)) < len(names) or patch_px is None or patch_px < 1:
        raise RecipeError(
            f"{recipe.name} with class_names={names} and patch_px={patch_px}: give two or more different "
            "names in the order of the outputs, and the side of a patch in pixels"
        )
    if positive is not None and (positive not in names or len(names) > 2):
        raise RecipeError(f"positive={positive!r} is none of two classes; there are {', '.join(names)}")
    if Path(out).exists():
        raise RunError(f"{out} exists already: name a folder that does not")
    read = read_keras(file)
    settings = recipe.preprocessing.model_dump(exclude={"standardise"})
    settings["input_px"] = read.input_px or settings["input_px"]
    network = build_network(
        recipe.model.name, n_classes=len(names), input_px=settings["input_px"], **recipe.model.params
    )
    said = compare_steps(read, network, recipe.model.name)
    carry(read, network, recipe.model.name)
    outputs = outputs_of(recipe.train.loss)
    if said == "softmax" or any(isinstance(module, OneLogit) for module in network.modules()):
        outputs = "softmax"
    elif said == "sigmoid":
        outputs = "sigmoid"
    info = ClassifierInfo(
        network=recipe.model.name,
        params=recipe.model.params,
        class_names=names,
        positive_class=(positive or names[1]) if len(names) == 2 else None,
        patch_px=patch_px,
        mpp=default_mpp if mpp is None else mpp,
        preprocessing=Preprocessing(**settings),
        outputs=outputs,
        thresholds=[{"value": 0.5, "rule": "argmax", "chosen_on": "nothing"}] if len(names) == 2 else [],
        recipe=recipe.name,
    )
    origin = {"library": "keras", "format": read.format, "file": read.path.name, "sha256": sha256_file(file)}
    classifier = Classifier(info.model_copy(update={"imported": origin}), network)
    classifier.save(out)
    return classifier


def _find_recipe(model: str | Path) -> Recipe:
    """Give the recipe of that name, or the first shipped one whose network has that name."""
    recipes = list_recipes()
    if Path(model).suffix == ".toml" or str(model) in recipes:
        return load_recipe(model)
    shipped = [load_recipe(name) for name in recipes]
    networks = {recipe.model.name: recipe for recipe in reversed(shipped) if not recipe.model.params}
    if str(model) not in networks:
        known = [*recipes, *sorted(networks)]
        raise RecipeError(f"no recipe or network is called {str(model)!r}: {suggest(str(model), known)}")
    return networks[str(model)]
