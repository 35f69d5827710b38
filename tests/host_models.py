"""Small classifiers, and what a host that knows Resize, ToTensor and softmax makes of an exported one."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from biopsy.models.classifier import Classifier, ClassifierInfo
from biopsy.models.engine import Engine
from biopsy.models.inference import predict_logits
from biopsy.models.networks import build_network, list_networks
from biopsy.recipes.preprocessing import Preprocessing


def list_network_cases(*others, slow=("vgg16",)):
    """Return the networks, and others, as parameters of a test; some are slow."""
    names = [*list_networks(), *others]
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in names]


def ask_host(network, patches):
    """Do with patches what WSInfer does: Resize, ToTensor, the network, softmax."""
    steps = transforms.Compose([transforms.Resize(patches.shape[1]), transforms.ToTensor()])
    batch = torch.stack([steps(Image.fromarray(patch)) for patch in patches])
    with torch.inference_mode():
        return torch.softmax(network(batch), dim=1).numpy()


def make_classifier(network="cancernet", patch_px=20, n_classes=2, calibrator=None, **preprocessing):
    settings = {"input_px": 18, **preprocessing}
    names = ["benign", "malignant", "stroma", "fat"][:n_classes]
    info = ClassifierInfo(
        network=network,
        class_names=names,
        positive_class="malignant" if n_classes == 2 else None,
        patch_px=patch_px,
        mpp=1.0,
        preprocessing=Preprocessing(**{k: v for k, v in settings.items() if k != "outputs"}),
        outputs=settings.get("outputs", "softmax"),
    )
    if calibrator is not None:
        info.calibrator = calibrator.to_dict()
    return Classifier(
        info, build_network(network, n_classes=n_classes, input_px=settings["input_px"], seed=0)
    )


def draw(n, patch_px, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, patch_px, patch_px, 3), dtype=np.uint8)


def our_probs(classifier, patches):
    info = classifier.info
    return classifier.probs(
        predict_logits(classifier.network, info.preprocessing, patches, engine=Engine("cpu"))
    )
