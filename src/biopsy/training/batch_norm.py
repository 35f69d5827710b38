"""Batch-norm statistics: convergence of the running statistics, and their re-estimation.

Running statistics follow the weights with a lag and carry their initial values for ``1 / momentum`` updates
and more; a short training, or one at a high rate, then predicts otherwise than it learned. "Precise"
statistics over the training patches, with the weights as they are, repair that (Wu and Johnson 2021,
Rethinking "batch" in BatchNorm, sec. 3).
"""

from copy import deepcopy

import numpy as np
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from biopsy.core.seeds import make_rng
from biopsy.data.packs import Pack
from biopsy.models.engine import Engine
from biopsy.models.inference import BATCH_SIZE
from biopsy.recipes.preprocessing import Preprocessing
from biopsy.training.runs import NormalisationRecord

N_CHECKED = 1024
"""Training patches on which running and batch statistics are compared."""
MOST_DISAGREEMENT = 0.3
"""Mean square between scores by running and by batch statistics, in variances of the latter."""


def reestimate_batch_norm(
    network: torch.nn.Module,
    preprocessing: Preprocessing,
    pack: Pack,
    rows: np.ndarray,
    *,
    engine: Engine,
    seed: int,
    reestimate: bool = True,
) -> NormalisationRecord | None:
    """Re-estimate the running statistics of a trained network on training patches, if not converged.

    Settled statistics predict about what the statistics of each batch do. The pass is over the training
    patches once, without augmentation and dropout, in an order that depends on the seed alone.

    Args:
        network: Placed on the engine's device; gets the new statistics and comes back in evaluation mode.
        seed: Of the order.
        reestimate: Whether unsettled statistics are replaced, or only recorded.

    Returns:
        None where no batch normalisation was trained, or on one patch.
    """
    network.train()
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm) and module.training]
    network.eval()
    if not norms or len(rows) < 2:
        return None
    order = make_rng(seed, "batch norm").permutation(rows)
    state = deepcopy(network.state_dict())
    checked = order[:N_CHECKED]
    running = _pass_over(network, [], preprocessing, pack, checked, engine)
    by_batch = _pass_over(network, norms, preprocessing, pack, checked, engine)
    network.load_state_dict(state)
    spread = np.square(by_batch - by_batch.mean(axis=0)).mean()
    disagreement = float(np.square(running - by_batch).mean() / spread) if spread > 0 else 0.0
    settled = disagreement <= MOST_DISAGREEMENT
    if not settled and reestimate:
        _pass_over(network, norms, preprocessing, pack, order, engine)
    return {
        "settled": settled,
        "disagreement": disagreement,
        "reestimated": not settled and reestimate,
        "n_patches": len(rows),
    }


def _pass_over(
    network: torch.nn.Module,
    norms: list[_BatchNorm],
    preprocessing: Preprocessing,
    pack: Pack,
    rows: np.ndarray,
    engine: Engine,
) -> np.ndarray:
    """Return centred scores ``(n, n_classes)``; ``norms`` use each batch's statistics and average them."""
    momenta, scores = [norm.momentum for norm in norms], []
    for norm in norms:
        norm.train()
    for number, batch in enumerate(np.array_split(rows, -(-len(rows) // BATCH_SIZE)), start=1):
        for norm in norms:
            norm.momentum = 1 / number
        widths, heights = pack.sizes[batch].T
        patches = preprocessing.prepare(pack.patches[batch], widths, heights, device=engine.device)
        scores.append(engine.predict(network, patches).cpu().numpy().astype(np.float64))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
    logits = np.concatenate(scores)
    return logits - logits.mean(axis=1, keepdims=True)
