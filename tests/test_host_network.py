"""The network that hosts run: what lies before and after the classifier's own is inside it."""

import numpy as np
import pytest
import torch

from biopsy.exporting.bundles import measure_parity, write_networks
from biopsy.exporting.host_network import HostNetwork, make_resize
from biopsy.models.classifier import Classifier
from biopsy.recipes.preprocessing import Preprocessing
from biopsy.statistics.calibrators import Isotonic, Scaling
from host_models import draw, make_classifier


@pytest.mark.parametrize(("patch_px", "input_px"), [(50, 48), (20, 50), (33, 16), (24, 24), (7, 20)])
@pytest.mark.parametrize("resize", ["nearest", "bilinear", "bicubic"])
def test_resizing_inside_the_network_is_the_preprocessings(patch_px, input_px, resize):
    patches = draw(20, patch_px)
    settings = Preprocessing(input_px=input_px, resize=resize)
    batch = torch.from_numpy(patches).permute(0, 3, 1, 2).float() / 255
    found = (make_resize(settings, patch_px)(batch) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    wanted = settings.resize_patches(patches)
    differing = found != wanted
    assert differing.mean() < (1e-4 if resize == "bicubic" else 1e-12)
    assert np.abs(found.astype(int) - wanted).max() <= 1


CALIBRATORS = {
    "none": None,
    "temperature": Scaling("temperature", 0.3, (0.0, 0.0)),
    "platt": Scaling("platt", 1.7, (0.4, -0.4)),
    "isotonic": Isotonic(1, (0.0, 0.2, 0.3, 0.5, 0.999999), (0.05, 0.05, 0.4, 0.45, 1.0)),
    "isotonic-first": Isotonic(0, (0.1, 0.6, 1.0), (0.0, 0.7, 0.9)),
    "isotonic, other prevalence": Isotonic(1, (0.1, 0.6), (0.2, 0.7), intercepts=(0.0, -1.5)),
}


@pytest.mark.parametrize("name", CALIBRATORS)
@pytest.mark.parametrize("outputs", ["softmax", "sigmoid"])
def test_calibration_is_inside(name, outputs):
    classifier = make_classifier(calibrator=CALIBRATORS[name], outputs=outputs)
    head = list(classifier.network.parameters())[-1]
    logits = torch.from_numpy(np.random.default_rng(1).normal(0, 6, (400, 2))).float()
    classifier.network.forward = lambda batch: logits
    assert head is not None
    with torch.inference_mode():
        scores = HostNetwork(classifier)(torch.zeros(400, 3, 20, 20))
    wanted = classifier.probs(logits.numpy())
    np.testing.assert_allclose(torch.softmax(scores, 1).numpy(), wanted, atol=2e-6)


def test_isotonic_steps_near_one_keep_their_digits():
    table = Isotonic(1, (0.5, 1 - 3e-8, 1 - 1e-8), (0.2, 0.5, 0.9))
    classifier = make_classifier(calibrator=table)
    prob = 1 - np.array([3e-8, 2e-8, 1.5e-8, 1e-8])
    logit = np.log(prob) - np.log1p(-prob)
    logits = torch.from_numpy(np.stack([0 * logit, logit], axis=1)).float()
    classifier.network.forward = lambda batch: logits
    scores = HostNetwork(classifier)(torch.zeros(4, 3, 20, 20))
    np.testing.assert_allclose(torch.softmax(scores, 1)[:, 1].detach(), [0.5, 0.7, 0.8, 0.9], atol=1e-5)


class Brightness(torch.nn.Module):
    """Logits that say how bright a patch is, from -24 to 24."""

    def forward(self, patches):
        z = 48 * (patches.mean(dim=(1, 2, 3)) - 0.5)
        return torch.stack([-z / 2, z / 2], dim=1)


@pytest.mark.parametrize("name", CALIBRATORS)
def test_every_form_of_the_network_calibrates_alike(name, tmp_path):
    classifier = make_classifier(calibrator=CALIBRATORS[name])
    classifier = Classifier(classifier.info, Brightness())
    if name == "isotonic":
        steep = 1 / (1 + np.exp(-np.linspace(-20, 20, 41)))
        classifier.info.calibrator = Isotonic(1, tuple(steep), tuple(np.linspace(0, 1, 41))).to_dict()
    write_networks(classifier, tmp_path)
    patches = np.repeat(np.arange(256, dtype=np.uint8), 20 * 20 * 3).reshape(256, 20, 20, 3)
    parity = measure_parity(classifier, tmp_path, patches)
    assert max(known["probs"] for known in parity["largest_difference"].values()) < 1e-5
