"""Occlusion: the change of the score when parts of a patch are hidden."""

import torch
from torch import Tensor

from biopsy.evaluation.saliency.methods import ExplanationRequest, register_method

WINDOWS = 8  # per side of a patch
BATCH_SIZE = 256


@register_method(
    "occlusion",
    shows="the decrease of the class score when a window, an eighth of the patch wide, is replaced by the "
    "mean colour of the patch (Zeiler and Fergus 2014)",
    caveat="Windows are replaced one at a time: of two that carry the same information neither may matter",
    signed=True,
)
def occlusion(request: ExplanationRequest) -> Tensor:
    """Return for each pixel the mean decrease of the score over the windows that hide it."""
    window = max(1, request.batch.shape[-1] // WINDOWS)
    hidden = request.batch.mean(dim=(2, 3), keepdim=True)
    return occlude(request, hidden, window, max(1, window // 2))


def occlude(request: ExplanationRequest, hidden: Tensor, window: int, stride: int) -> Tensor:
    """Return the occlusion map for a window size and stride, in pixels of the network's input.

    Args:
        hidden: Replacement of the window, ``(B, 3, 1, 1)`` or ``(B, 3, S, S)``.
        window: Side of the window; cut off at the right and lower edges.
        stride: Step between windows.

    Returns:
        ``(B, 1, S, S)``.
    """
    side = request.batch.shape[-1]
    starts = range(0, stride * -(-max(side - window, 0) // stride) + 1, stride)
    masks = torch.zeros(len(starts) ** 2, 1, side, side, dtype=torch.bool, device=request.batch.device)
    for number, mask in enumerate(masks):
        top, left = starts[number // len(starts)], starts[number % len(starts)]
        mask[:, top : top + window, left : left + window] = True
    weight = masks.to(request.batch.dtype)
    maps = []
    with torch.no_grad():
        scores = request.scores(request.batch)
        for patch, fill, index, score in zip(request.batch, hidden, request.class_index, scores, strict=True):
            versions = (
                torch.where(part, fill, patch).contiguous(memory_format=torch.channels_last)
                for part in masks.split(BATCH_SIZE)
            )
            occluded = torch.cat([request.network(version)[:, index] for version in versions])
            maps.append(torch.einsum("m,mchw->chw", score - occluded, weight) / weight.sum(dim=0))
    return torch.stack(maps)
