"""Networks by name, one file per family.

To add one, write a file here with a function under ``@register_network``; it takes ``n_classes``,
``input_px`` and further keyword parameters and returns a module with

* ``forward(patches)``: ``(B, 3, H, W)`` float -> logits ``(B, n_classes)``, no softmax,
* ``features(patches)``: the penultimate layer, ``(B, F)``.
"""

from biopsy.models.networks.registry import (
    LayerRow,
    Network,
    build_network,
    count_parameters,
    describe,
    list_networks,
    network_parameters,
    register_network,
)

__all__ = [
    "LayerRow",
    "Network",
    "build_network",
    "count_parameters",
    "describe",
    "list_networks",
    "network_parameters",
    "register_network",
]
