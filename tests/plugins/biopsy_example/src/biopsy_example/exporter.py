"""An exporter: the network by PyTorch's own exported program."""

from pathlib import Path

import numpy as np
import torch

from biopsy.exporting.formats import Exporter, register_exporter
from biopsy.exporting.host_network import HostNetwork, example_batch, host_batches, softmax
from biopsy.models.classifier import Classifier

FILE = "model.pt2"


def write(classifier: Classifier, folder: Path) -> None:
    n_patches = {0: torch.export.Dim("n_patches")}
    network = HostNetwork(classifier).eval()
    program = torch.export.export(network, (example_batch(classifier),), dynamic_shapes=(n_patches,))
    torch.export.save(program, folder / FILE)


def predict(classifier: Classifier, folder: Path, patches: np.ndarray) -> np.ndarray:
    network = torch.export.load(folder / FILE).module()
    with torch.inference_mode():
        return softmax(np.concatenate([network(part).numpy() for part in host_batches(patches)]))


register_exporter(Exporter("exported program", write, predict))
