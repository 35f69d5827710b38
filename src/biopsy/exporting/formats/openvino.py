"""OpenVINO, with which slides are mapped without PyTorch; omitted if the network cannot be converted."""

from pathlib import Path

import numpy as np

from biopsy.exporting.formats import Exporter, register_exporter
from biopsy.models.classifier import Classifier
from biopsy.models.compiling import write_compiled
from biopsy.models.openvino_runtime import FOLDER, CompiledRuntime, read_compiled


def predict(classifier: Classifier, folder: Path, patches: np.ndarray) -> np.ndarray | None:
    """Return the probabilities computed by OpenVINO."""
    if not (folder / FOLDER).is_dir():
        return None
    runtime = CompiledRuntime(classifier, read_compiled(folder / FOLDER, classifier), "fp32", n_threads=1)
    return classifier.probs(runtime.logits(patches))


register_exporter(Exporter("OpenVINO", write_compiled, predict, ("openvino",)))
