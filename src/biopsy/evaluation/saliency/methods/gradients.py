"""Gradient-based explanation methods."""

import logging
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from biopsy.evaluation.saliency.methods import ExplanationRequest, register_method

logger = logging.getLogger(__name__)

# Smilkov et al. 2017, SmoothGrad, sec. 3.2: 10 to 20 % of the input's range; gains end at about 50 draws
NOISE, DRAWS, NOISE_SEED = 0.15, 25, 0

MIN_STEPS, MAX_STEPS = 32, 256
COMPLETE_WITHIN = 0.02  # tolerance relative to the difference of the two logits, or to 1 if that is larger


def input_gradient(network: nn.Module, batch: Tensor, class_index: Tensor) -> Tensor:
    """Return the gradient of each patch's class score, before softmax or sigmoid, ``(B, 3, S, S)``.

    Frozen weights are included; no gradient of a weight is changed.
    """
    with torch.enable_grad():
        batch = batch.detach().requires_grad_(True)
        scores = network(batch).gather(1, class_index[:, None])
        (gradient,) = torch.autograd.grad(scores.sum(), batch)
    return gradient


@register_method(
    "saliency",
    shows="the absolute gradient of the class score (before the softmax) with respect to each pixel, the "
    "largest of its three colour channels (Simonyan et al. 2014)",
    caveat="It does not show what was recognised, nor whether a pixel supports or opposes the class",
)
def saliency(request: ExplanationRequest) -> Tensor:
    """Return the absolute input gradient, the largest over channels."""
    gradient = input_gradient(request.network, request.batch, request.class_index)
    return gradient.abs().amax(dim=1, keepdim=True)


@register_method(
    "SmoothGrad",
    shows="the absolute value of the input gradient averaged over noisy copies of the patch (Smilkov et al. "
    "2017)",
    caveat="It does not show what was recognised; a smoother map need not be more faithful",
)
def smoothgrad(request: ExplanationRequest) -> Tensor:
    """Return the saliency of the gradient averaged over noisy copies, with fixed noise."""
    batch, generator = request.batch, torch.Generator().manual_seed(NOISE_SEED)
    spread = NOISE * (batch.amax(dim=(1, 2, 3), keepdim=True) - batch.amin(dim=(1, 2, 3), keepdim=True))
    total = torch.zeros_like(batch)
    for _ in range(DRAWS):
        noise = torch.randn(batch.shape[1:], generator=generator).to(batch.device)
        total += input_gradient(request.network, batch + spread * noise, request.class_index)
    return (total / DRAWS).abs().amax(dim=1, keepdim=True)


@register_method(
    "integrated gradients",
    shows="the contribution of each pixel to the difference between the class score of the patch and that of "
    "a white image (Sundararajan et al. 2017)",
    caveat="It is not the effect of removing a single pixel, and depends on the choice of the white baseline",
    signed=True,
)
def integrated_gradients(request: ExplanationRequest) -> Tensor:
    """Return the integral of the gradients along the line from white, summed over channels.

    Steps are doubled, per patch, until the values add up to the difference of the scores
    (`COMPLETE_WITHIN`) or `MAX_STEPS` is reached.
    """
    with torch.no_grad():
        white = request.baseline.expand_as(request.batch)
        difference = request.scores(request.batch) - request.scores(white)
    allowed = COMPLETE_WITHIN * difference.abs().clamp(min=1.0)
    total = torch.zeros_like(request.batch)
    open_rows = torch.arange(len(request.batch), device=request.batch.device)
    n_steps, gap = MIN_STEPS, difference
    while len(open_rows) and n_steps <= MAX_STEPS:
        part = replace(request, batch=request.batch[open_rows], class_index=request.class_index[open_rows])
        total[open_rows] = integrate_gradients(part, n_steps)
        gap = (total[open_rows].sum(dim=(1, 2, 3)) - difference[open_rows]).abs()
        wrong = gap > allowed[open_rows]
        open_rows, gap, n_steps = open_rows[wrong], gap[wrong], 2 * n_steps
    if len(open_rows):
        logger.info(
            "integrated gradients of %d patches miss the difference of scores by up to %.3g after %d steps",
            *(len(open_rows), float(gap.max()), MAX_STEPS),
        )
    return total.sum(dim=1, keepdim=True)


def integrate_gradients(request: ExplanationRequest, n_steps: int) -> Tensor:
    """Return integrated gradients, ``(B, 3, S, S)``, by Gauss-Legendre quadrature with ``n_steps`` nodes."""
    nodes, weights = np.polynomial.legendre.leggauss(n_steps)
    path, total = request.batch - request.baseline, torch.zeros_like(request.batch)
    for node, weight in zip((1 + nodes) / 2, weights / 2, strict=True):
        total += float(weight) * input_gradient(
            request.network, request.baseline + float(node) * path, request.class_index
        )
    return path * total
