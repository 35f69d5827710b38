"""Explanations of patches: saliency maps on the pixels of the patch."""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from biopsy.core.errors import RecipeError, suggest
from biopsy.evaluation.saliency.methods import ExplanationRequest, find_method
from biopsy.evaluation.saliency.methods.layers import find_layer
from biopsy.models.classifier import Classifier
from biopsy.models.engine import Engine

BATCH_SIZE = 32
Channels = Literal["all", "mean"]


@dataclass(frozen=True)
class Explanation:
    """Maps of patches, and how they were computed.

    Attributes:
        layer: The layer used; None for the whole network.
        class_index: The explained class, ``(n,)``.
        probs: Predicted probabilities, ``(n, n_classes)``.
        maps: float32 ``(n, n_maps, H, W)`` on the pixels of the patches; 0 in padding. For ``signed``
            methods, negative values oppose the class.
    """

    method: str
    layer: str | None
    class_index: np.ndarray
    probs: np.ndarray
    maps: np.ndarray


def explain_patches(
    classifier: Classifier,
    patches: np.ndarray,
    sizes: np.ndarray | None = None,
    method: str = "saliency",
    target_class: str | np.ndarray | None = None,
    layer: str | None = None,
    *,
    channels: Channels = "all",
    engine: Engine | None = None,
) -> Explanation:
    """Explain patches.

    Patches go through the classifier's preprocessing. Maps are resized from the network's input (or the grid
    of the layer) to the pixels of each patch by bilinear interpolation.

    Args:
        classifier: The classifier, which is not modified.
        patches: uint8 ``(n, H, W, 3)`` RGB.
        sizes: True ``(width, height)`` of each patch, ``(n, 2)``; None without padding.
        method: One of ``methods.METHODS``.
        target_class: The class to explain, or the class index of each patch, ``(n,)``; by default the
            positive class or, for more than two classes, the predicted class of each patch.
        layer: Name of the layer, for methods that use one; by default the first convolution (after its
            activation, if any), for Grad-CAM the last feature maps before pooling.
        channels: ``all`` maps of a layer, or their ``mean``.
        engine: Device; the arithmetic is always float32.

    Raises:
        RecipeError: If the method, the class or the layer does not exist, or the method takes no layer.
    """
    method_info, classifier = find_method(method), classifier.single_patch()
    if channels not in get_args(Channels):
        raise RecipeError(
            f"channels={channels!r} is not possible; {suggest(channels, get_args(Channels))}", "value"
        )
    if layer is not None and not method_info.takes_layer:
        raise RecipeError(f"layer={layer!r} cannot be chosen: {method} uses the whole network", "conflict")
    requested = _find_classes(classifier, target_class, len(patches))
    engine, stretched = engine or Engine("auto"), classifier.info.preprocessing.resize_mode == "stretch"
    network, preprocessing = engine.place(classifier.base_network), classifier.info.preprocessing
    predictor = engine.place(classifier.network)
    if layer is not None:
        find_layer(network, layer)
    elif method_info.find_layer is not None:
        layer = method_info.find_layer(network, preprocessing.input_px)
    baseline = preprocessing.normalise(torch.ones(1, 3, 1, 1, device=engine.device))[0]
    logits, maps = [], []
    for start in range(0, len(patches), BATCH_SIZE):
        chunk = slice(start, start + BATCH_SIZE)
        size = None if sizes is None else np.asarray(sizes)[chunk]
        widths, heights = (None, None) if size is None else size.T
        batch = preprocessing.prepare(patches[chunk], widths, heights, device=engine.device)
        with torch.no_grad():
            logits.append(predictor(batch).float())
        class_index = logits[-1].argmax(dim=1)
        if requested is not None:
            class_index = torch.as_tensor(requested[chunk], device=class_index.device)
        result = method_info.compute(ExplanationRequest(network, batch, class_index, baseline, layer)).float()
        result = result.mean(dim=1, keepdim=True) if channels == "mean" else result
        maps.append(_to_patches(result, patches.shape[1:3], size, stretched=stretched))
    all_logits = torch.cat(logits).cpu().numpy()
    return Explanation(
        method,
        layer,
        all_logits.argmax(axis=1) if requested is None else requested,
        classifier.probs(all_logits),
        np.concatenate(maps),
    )


def _find_classes(classifier: Classifier, target_class: str | np.ndarray | None, n: int) -> np.ndarray | None:
    """Return the index of the class to explain for each patch; None for the predicted one."""
    if isinstance(target_class, np.ndarray):
        return target_class
    names, index = classifier.info.class_names, classifier.positive_index
    if target_class is not None:
        if target_class not in names:
            raise RecipeError(
                f"the classifier has no class {target_class!r}; {suggest(target_class, names)}", "name"
            )
        index = names.index(target_class)
    return None if index is None else np.full(n, index)


def _to_patches(
    maps: Tensor, patch_shape: tuple[int, ...], sizes: np.ndarray | None, *, stretched: bool
) -> np.ndarray:
    """Resize maps ``(B, n_maps, h, w)`` to the pixels of patches; padding becomes 0."""
    height_px, width_px = patch_shape
    if sizes is None:
        return _resize(maps, height_px, width_px)
    resized = np.zeros((*maps.shape[:2], height_px, width_px), np.float32)
    for width, height in np.unique(sizes, axis=0):
        part = np.flatnonzero((sizes == (width, height)).all(axis=1))
        if stretched:
            resized[part, :, :height, :width] = _resize(maps[part], height, width)
        else:
            resized[part, :, :height, :width] = _resize(maps[part], height_px, width_px)[..., :height, :width]
    return resized


def _resize(maps: Tensor, height: int, width: int) -> np.ndarray:
    if maps.shape[-2:] != (height, width):
        maps = functional.interpolate(maps, (height, width), mode="bilinear", antialias=True)
    return maps.cpu().numpy()
