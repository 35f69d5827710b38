"""Methods that look at what one layer puts out."""

import torch
from torch import Tensor

from biopsy.evaluation.explanation.methods import ExplanationRequest, register_method
from biopsy.evaluation.explanation.methods.layers import (
    check_maps,
    find_first_layer,
    find_last_maps,
    layer_output,
    watch_layer,
)


@register_method(
    "activations",
    shows="the output of single channels of one layer",
    caveat="It does not depend on a class, and an active channel need not influence the prediction",
    find_layer=find_first_layer,
    per_class=False,
)
def activations(request: ExplanationRequest) -> Tensor:
    """Return the output of a layer, a map for each of its channels."""
    return layer_output(request.network, request.batch, str(request.layer))


@register_method(
    "Grad-CAM",
    shows="the channels of a late layer, weighted by the mean gradient of the class score and summed; "
    "negative values are set to 0 (Selvaraju et al. 2017)",
    caveat="Its resolution is that of the layer, which is coarse; it is enlarged to the size of the patch",
    find_layer=find_last_maps,
)
def grad_cam(request: ExplanationRequest) -> Tensor:
    """Return the layer's maps, weighted by the mean gradient of the class's score, added up and rectified."""
    layer = str(request.layer)
    with torch.enable_grad(), watch_layer(request.network, layer) as result:
        score = request.scores(request.batch).sum()
        maps = check_maps(result, layer)
        (gradient,) = torch.autograd.grad(score, maps)
    weights = gradient.mean(dim=(2, 3), keepdim=True)
    return (weights * maps.detach()).sum(dim=1, keepdim=True).clamp(min=0)
