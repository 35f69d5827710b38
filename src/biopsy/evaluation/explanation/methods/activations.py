"""Methods that look at what one layer puts out."""

import torch
from torch import Tensor

from biopsy.evaluation.explanation.methods.layers import (
    check_maps,
    find_first_layer,
    find_last_maps,
    layer_output,
    watch_layer,
)
from biopsy.evaluation.explanation.methods.registry import Question, register_method


@register_method(
    "activations",
    shows="what channels of one layer gave out at each place",
    shows_not="class activation mapping: no class enters it, and a channel that lights up may count for "
    "nothing in the decision",
    find_layer=find_first_layer,
    per_class=False,
)
def activations(asked: Question) -> Tensor:
    """Give the output of a layer, a map for each of its channels."""
    return layer_output(asked.network, asked.batch, str(asked.layer))


@register_method(
    "Grad-CAM",
    shows="where those maps of a late layer are high that raise the score of the class, each weighted by the "
    "mean of its gradient (Selvaraju et al. 2017); what lowers the score is left out",
    shows_not="sharper than that layer's grid, which is coarse and is only blown up to the patch",
    find_layer=find_last_maps,
)
def grad_cam(asked: Question) -> Tensor:
    """Give the layer's maps, weighted by the mean gradient of the class's score, added up and rectified."""
    layer = str(asked.layer)
    with torch.enable_grad(), watch_layer(asked.network, layer) as found:
        score = asked.scores(asked.batch).sum()
        maps = check_maps(found, layer)
        (gradient,) = torch.autograd.grad(score, maps)
    weights = gradient.mean(dim=(2, 3), keepdim=True)
    return (weights * maps.detach()).sum(dim=1, keepdim=True).clamp(min=0)
