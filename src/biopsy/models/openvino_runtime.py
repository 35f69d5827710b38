"""A network compiled by OpenVINO: run, read back, and recognised as made from a classifier."""

import threading
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np

from biopsy.core.errors import RunError
from biopsy.core.files import read_json, sha256_file
from biopsy.models.classifier import Classifier
from biopsy.models.hardware import keep_freed_memory, pick_precision

FORMAT: Final = "biopsy-openvino/1"
FOLDER, DOCUMENT = "openvino", "openvino.json"
MODEL, INT8_MODEL = "network.xml", "network-int8.xml"
_CPU_BATCH, _GPU_BATCH = 16, 1024


class CompiledRuntime:
    """A network compiled by OpenVINO for the processor at hand.

    Every batch has the same size, the last one filled up, so that a patch's logits do not depend on which
    patches come with it.

    Args:
        classifier: Says how patches are brought to size.
        model: OpenVINO's model of its network, as `compiling.convert` gives it.
        precision: ``fp32``, ``bf16``, or ``int8`` for a quantised model: what it does not compute in 8 bits
            is computed in bfloat16 where the processor has it.
        n_threads: Threads that will predict at once.
    """

    in_threads = True

    def __init__(self, classifier: Classifier, model: Any, precision: str, *, n_threads: int) -> None:
        import openvino

        keep_freed_memory()
        self.software = ("openvino", version("openvino"))
        self._preprocessing = classifier.info.preprocessing
        hint = pick_precision("auto", "cpu") if precision == "int8" else precision
        settings = {
            "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[hint],
            "NUM_STREAMS": n_threads,
            "INFERENCE_NUM_THREADS": n_threads,
            "ENABLE_CPU_PINNING": False,
        }
        self._compiled = openvino.Core().compile_model(model, "CPU", settings)
        self._own = threading.local()

    def logits(self, patches: np.ndarray) -> np.ndarray:
        """Return logits ``(n, n_classes)`` of patches, uint8 ``(n, H, W, 3)``."""
        return self._compute(patches, 1)[0]

    def logits_and_features(self, patches: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return logits and the penultimate layer ``(n, n_features)`` of patches."""
        logits, *features = self._compute(patches, len(self._compiled.outputs))
        return logits, features[0] if features else logits[:, :0]

    def _compute(self, patches: np.ndarray, n_outputs: int) -> list[np.ndarray]:
        if not hasattr(self._own, "request"):
            self._own.request = self._compiled.create_infer_request()
            self._own.filled = empty_batch(self._preprocessing.input_px)
        resized, result = self._preprocessing.resize_patches(patches), []
        for start in range(0, max(1, len(resized)), _CPU_BATCH):
            batch = resized[start : start + _CPU_BATCH]
            n = len(batch)
            if n < _CPU_BATCH:
                self._own.filled[:n] = batch
                batch = self._own.filled
            answer = self._own.request.infer([np.ascontiguousarray(batch)], share_inputs=True)
            result.append([answer[output][:n].copy() for output in range(n_outputs)])
        return [np.concatenate(parts) for parts in zip(*result, strict=True)]


def read_compiled(folder: Path, classifier: Classifier, name: str = MODEL) -> Any:
    """Read what `compiling.write_compiled` or, as `INT8_MODEL`, `compiling.write_quantised` wrote.

    Raises:
        RunError: If a file is missing or was altered, or it is the network of another classifier.
    """
    import openvino

    about = read_json(folder / DOCUMENT, format=FORMAT)
    is_whole = all((folder / name).is_file() for name in about["files"]) and all(
        sha256_file(folder / name) == digest for name, digest in about["files"].items()
    )
    if not is_whole or about["made_from"] != describe_origin(classifier):
        raise RunError(f"{folder} is not the whole of the network that was exported: export the bundle again")
    return openvino.Core().read_model(folder / name)


def describe_origin(classifier: Classifier) -> dict[str, object]:
    """Return what a compiled network is made from; another weight or scale makes another network."""
    preprocessing = {key: str(value) for key, value in vars(classifier.info.preprocessing).items()}
    return {"weights_sha256": classifier.info.weights_sha256, "preprocessing": preprocessing}


def empty_batch(input_px: int) -> np.ndarray:
    """Return a batch of the one size that compiled networks take, uint8 ``(16, input_px, input_px, 3)``."""
    return np.zeros((_CPU_BATCH, input_px, input_px, 3), np.uint8)
