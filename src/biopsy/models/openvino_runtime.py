"""Networks compiled by OpenVINO: runtime, reading and verification."""

import sys
import threading
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any, Final, cast

import numpy as np
from typing_extensions import TypedDict

from biopsy.core.errors import RunError
from biopsy.core.files import read_json, sha256_file
from biopsy.core.loaders import validate
from biopsy.models.classifier import Classifier
from biopsy.models.hardware import keep_freed_memory, pick_precision

FORMAT: Final = "biopsy-openvino/1"
FOLDER, DOCUMENT = "openvino", "openvino.json"
MODEL, INT8_MODEL = "network.xml", "network-int8.xml"
_CPU_BATCH, _GPU_BATCH = 16, 1024
_IMPORTING = threading.Lock()


class CompiledRuntime:
    """A network compiled by OpenVINO for this CPU.

    The batch size is fixed (the last batch is filled up), so that the logits of a patch do not depend on the
    others.

    Args:
        model: OpenVINO model of its network, output of `compiling.convert`.
        precision: ``fp32``, ``bf16``, or ``int8`` for a quantised model, whose other operations are computed
            in bfloat16 if the CPU supports it.
        n_threads: Number of threads that predict in parallel.
    """

    in_threads = True

    def __init__(self, classifier: Classifier, model: Any, precision: str, *, n_threads: int) -> None:
        openvino = import_openvino()
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
        self._local = threading.local()

    def logits(self, patches: np.ndarray) -> np.ndarray:
        return self._compute(patches, 1)[0]

    def logits_and_features(self, patches: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logits, *features = self._compute(patches, len(self._compiled.outputs))
        return logits, features[0] if features else logits[:, :0]

    def _compute(self, patches: np.ndarray, n_outputs: int) -> list[np.ndarray]:
        if not hasattr(self._local, "request"):
            self._local.request = self._compiled.create_infer_request()
            self._local.filled = empty_batch(self._preprocessing.input_px)
        resized, result = self._preprocessing.resize_patches(patches), []
        for start in range(0, max(1, len(resized)), _CPU_BATCH):
            batch = resized[start : start + _CPU_BATCH]
            n = len(batch)
            if n < _CPU_BATCH:
                self._local.filled[:n] = batch
                batch = self._local.filled
            outputs = self._local.request.infer([np.ascontiguousarray(batch)], share_inputs=True)
            result.append([outputs[output][:n].copy() for output in range(n_outputs)])
        return [np.concatenate(parts) for parts in zip(*result, strict=True)]


def import_openvino() -> Any:
    """Import OpenVINO, ready for use in several threads.

    It is imported without its telemetry, by which it would report every import to its makers. Its tables of
    numpy types are made here, at the first use: if two threads were the first to use them at once, each would
    wait for the other forever, one for the lock of the table, the other for Python's.
    """
    name = "openvino_telemetry"
    with _IMPORTING:
        before = sys.modules.get(name)
        sys.modules[name] = cast(ModuleType, None)  # not to be imported: OpenVINO then has a stub of its own
        try:
            import openvino
        finally:
            sys.modules.pop(name, None)
            if before is not None:
                sys.modules[name] = before
        openvino.Tensor(np.zeros(1, np.uint8), shared_memory=True).element_type.to_dtype()
    return openvino


class CompiledDocument(TypedDict):
    """Hashes of the files of a compiled network, and the `describe_origin` of its classifier."""

    files: dict[str, str]
    made_from: dict[str, object]


def read_compiled(folder: Path, classifier: Classifier, name: str = MODEL) -> Any:
    """Read a network written by `compiling.write_compiled` or `compiling.write_quantised`."""
    openvino = import_openvino()
    document = validate(folder / DOCUMENT, CompiledDocument, read_json(folder / DOCUMENT, format=FORMAT))
    is_complete = all((folder / name).is_file() for name in document["files"]) and all(
        sha256_file(folder / name) == digest for name, digest in document["files"].items()
    )
    if not is_complete or document["made_from"] != describe_origin(classifier):
        raise RunError(f"{folder} is incomplete, altered or of another classifier: export the bundle again")
    return openvino.Core().read_model(folder / name)


def describe_origin(classifier: Classifier) -> dict[str, object]:
    """Return weight hash and preprocessing, which identify a compiled network."""
    preprocessing = {key: str(value) for key, value in vars(classifier.info.preprocessing).items()}
    return {"weights_sha256": classifier.info.weights_sha256, "preprocessing": preprocessing}


def empty_batch(input_px: int) -> np.ndarray:
    """Return an empty batch of the fixed size, uint8 ``(16, input_px, input_px, 3)``."""
    return np.zeros((_CPU_BATCH, input_px, input_px, 3), np.uint8)
