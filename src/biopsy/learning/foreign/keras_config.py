"""What a Keras file says about its network: layers by name and class, read as JSON and never built."""

from typing import Any, NamedTuple

from biopsy.core.errors import DataError

_CONTAINERS = ("Sequential", "Functional", "Model")
_ROOTS = ("keras", "tensorflow", "tf_keras")
MAX_INPUT_PX = 512
_WITHOUT_EFFECT = ("InputLayer", "Dropout", "Flatten")
_STEPS = {
    "Conv2D": "convolution",
    "SeparableConv2D": "separable convolution",
    "Dense": "dense layer",
    "MaxPooling2D": "max-pooling",
}


class ConfigLayer(NamedTuple):
    """A layer as the file describes it."""

    name: str
    class_name: str
    settings: dict[str, Any]


def list_config_layers(model: Any) -> list[ConfigLayer]:
    """List the layers of a model's configuration in order, those of models within it in their place.

    Raises:
        DataError: If it is no configuration, or one holds code of its own (``Lambda``, a class that is not
            Keras's), or has channels first.
    """
    try:
        return _walk(model)
    except (KeyError, TypeError, AttributeError, RecursionError):
        raise DataError("holds a configuration that is not one of a Keras model") from None


def _walk(node: Any) -> list[ConfigLayer]:
    class_name, config = str(node["class_name"]), node["config"]
    module, registered = node.get("module") or "keras", node.get("registered_name") or ""
    if class_name == "Lambda" or module.partition(".")[0] not in _ROOTS or ">" in registered:
        named = config.get("name", "") if isinstance(config, dict) else ""
        raise DataError(
            f"holds {named!r}, a {registered or class_name} of {module}: code that comes with a file is "
            "never executed, and without it the network is another"
        )
    if class_name in _CONTAINERS:
        layers = config if isinstance(config, list) else config["layers"]  # a list before Keras 2.2.3
        return [found for layer in layers for found in _walk(layer)]
    if config.get("data_format") == "channels_first":
        raise DataError(f"has channels first in {config['name']!r}; only channels last are read")
    return [ConfigLayer(str(config["name"]), class_name, config)]


def list_steps(layers: list[ConfigLayer]) -> tuple[list[str], str]:
    """Give what happens to a patch, step by step, and what is done to the last numbers.

    Returns:
        Steps such as ``"convolution"`` or ``"relu"``, without what changes nothing in prediction, and
        ``"softmax"``, ``"sigmoid"`` or, where nothing is, ``""``.
    """
    steps: list[str] = []
    for layer in layers:
        settings, class_name = layer.settings, layer.class_name
        activation = settings.get("activation")
        if class_name == "BatchNormalization":
            steps.append(name_normalisation(settings.get("epsilon", 1e-3)))
        elif class_name == "Softmax":
            activation = "softmax"
        elif class_name == "ReLU":
            limits = {key: settings.get(key) for key in ("max_value", "negative_slope", "threshold")}
            changed = ", ".join(f"{key} {value}" for key, value in limits.items() if value)
            activation = f"relu ({changed})" if changed else "relu"
        elif class_name not in (*_WITHOUT_EFFECT, "Activation"):
            steps.append(_STEPS.get(class_name, class_name))
        if activation not in (None, "linear"):
            steps.append(activation if isinstance(activation, str) else f"activation {activation}")
    last = steps.pop() if steps and steps[-1] in ("softmax", "sigmoid") else ""
    return steps, last


def find_input_px(layers: list[ConfigLayer]) -> int | None:
    """Give the side of the square input; None where the file leaves it open.

    Raises:
        DataError: If it is no square of three channels, or larger than any patch.
    """
    settings = layers[0].settings if layers else {}
    shape = settings.get("batch_shape") or settings.get("batch_input_shape")  # the second in Keras 2
    if not isinstance(shape, list) or shape[1:3] == [None, None]:
        return None
    side = shape[1] if len(shape) > 1 else None
    if not isinstance(side, int) or not 0 < side <= MAX_INPUT_PX or shape[1:] != [side, side, 3]:
        raise DataError(f"takes an input of {shape[1:]} where a square of three channels is expected")
    return side


def name_normalisation(epsilon: object) -> str:
    """Name a batch normalisation as a step; its epsilon is no weight, but part of what it does."""
    return f"normalisation with epsilon {epsilon}"
