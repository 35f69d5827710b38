"""TorchScript with the configuration file of WSInfer and QuPath's extension."""

import io
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch

from biopsy.core.files import write_json
from biopsy.exporting.formats import Exporter, register_exporter
from biopsy.exporting.host_network import HostNetwork, example_batch, host_batches, softmax
from biopsy.models.classifier import Classifier
from biopsy.models.importers.wsinfer import CONFIG, SCRIPT, load_script


def write(classifier: Classifier, folder: Path) -> None:
    """Write the traced network and ``config.json``."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # tracing is deprecated; agreement is tested afterwards
        script = torch.jit.trace(HostNetwork(classifier), example_batch(classifier), check_trace=False)
        _write_script(script, folder / SCRIPT)
    write_json(folder / CONFIG, describe_for_host(classifier))


def predict(classifier: Classifier, folder: Path, patches: np.ndarray) -> np.ndarray:
    """Return the probabilities computed by the script."""
    script = load_script(folder / SCRIPT)
    with torch.inference_mode():
        return softmax(np.concatenate([script(part).numpy() for part in host_batches(patches)]))


def _write_script(script: torch.jit.ScriptModule, path: Path) -> None:
    """Write TorchScript without debugging records, which contain paths of this machine."""
    content = io.BytesIO()
    torch.jit.save(script, content)
    with zipfile.ZipFile(content) as whole, zipfile.ZipFile(path, "w") as kept:
        for name in whole.namelist():
            if not name.endswith(".debug_pkl"):
                kept.writestr(zipfile.ZipInfo(name), whole.read(name))


def describe_for_host(classifier: Classifier) -> dict[str, object]:
    """Return ``config.json`` by the schema of WSInfer 0.6 and QuPath's extension.

    Patches are requested at their own size, since the network resizes them.
    """
    info = classifier.info
    return {
        "spec_version": "1.0",
        "architecture": info.network,
        "num_classes": len(info.class_names),
        "patch_size_pixels": info.patch_px,
        "spacing_um_px": info.mpp,
        "class_names": info.class_names,
        "transform": [{"name": "Resize", "arguments": {"size": info.patch_px}}, {"name": "ToTensor"}],
    }


register_exporter(Exporter("TorchScript", write, predict, code=SCRIPT))
