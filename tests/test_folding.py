"""Folded networks say what the networks say that they were made of."""

import pytest
import torch

from biopsy.learning.folding import fold
from biopsy.learning.networks import build_network
from biopsy.learning.networks.layers import initialise


@pytest.fixture(params=[(48, 1.0), (30, 1.0), (48, -1.0)], ids=["even", "odd", "negative factors"])
def cancernet(request):
    """A network whose normalisations do something; at 30 px a side of 15 is pooled."""
    input_px, sign = request.param
    network = build_network("cancernet", n_classes=3, input_px=input_px).eval()
    initialise(network, 1)
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            size = module.num_features
            module.weight.data = sign * (0.5 + torch.rand(size, generator=generator))
            module.bias.data = torch.randn(size, generator=generator)
            module.running_mean = torch.rand(size, generator=generator) / 4
            module.running_var = 0.1 + torch.rand(size, generator=generator)
    return network, torch.rand(5, 3, input_px, input_px, generator=generator)


def test_logits_are_the_same(cancernet):
    network, batch = cancernet
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with torch.inference_mode():
        wanted, found = network(batch), fold(network)(batch)
    assert found.numpy() == pytest.approx(wanted.numpy(), rel=1e-4, abs=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_networks_that_are_no_row_stay_as_they_are():
    network = build_network("residual", n_classes=2, input_px=32)
    assert fold(network) is network
