"""What runs a network that is only asked: OpenVINO on a processor; PyTorch on a GPU, or where that cannot.

Both take patches as bytes and give logits. Compiled by OpenVINO a small network answers on a CPU about twice
as fast as PyTorch does: its normalisations and activations disappear into the convolutions. A bundle holds
the network as OpenVINO reads it, so that PyTorch, whose loading takes seconds, need not be there at all.
OpenVINO's own converter, which reports its use to its makers, is never called.
"""

import contextlib
import threading
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

import numpy as np

from biopsy.core.errors import RunError
from biopsy.core.files import read_json, sha256_file
from biopsy.learning.classifiers import Classifier
from biopsy.learning.hardware import keep_freed_memory

if TYPE_CHECKING:
    from biopsy.learning.engine import Engine

FORMAT: Final = "biopsy-openvino/1"
FOLDER, DOCUMENT, MODEL = "openvino", "openvino.json", "network.xml"
_CPU_BATCH, _GPU_BATCH = 16, 1024


class Runtime(Protocol):
    """A network with its preprocessing, ready to be asked from any thread.

    Attributes:
        software: What runs it: name and version.
        in_threads: Whether many threads should ask at once, or one of them with all there is.
    """

    software: tuple[str, str]
    in_threads: bool

    def ask(self, patches: np.ndarray) -> np.ndarray:
        """Give logits ``(n, n_classes)`` of patches, uint8 ``(n, H, W, 3)``."""

    def features(self, patches: np.ndarray) -> np.ndarray:
        """Give the penultimate layer ``(n, n_features)`` of patches."""


def list_runtimes() -> dict[str, str]:
    """Give what could run a network here, with versions; another one gives other last digits."""
    return {name: version(name) for name in ("openvino", "torch") if find_spec(name)}


@contextlib.contextmanager
def open_runtime(
    classifier: Classifier, device: str, precision: Literal["fp32", "bf16"], *, n_threads: int
) -> Iterator[Runtime]:
    """Give the fastest runtime there is for a classifier on a device.

    Args:
        classifier: What is asked.
        device: ``cpu``, ``cuda``, ``cuda:1`` ...
        precision: Of the arithmetic.
        n_threads: How many threads will ask.

    Raises:
        RunError: If the classifier lies in a bundle whose compiled network is damaged, or that of another.
    """
    model = _find_model(classifier) if device == "cpu" and find_spec("openvino") else None
    if model is not None:
        yield CompiledRuntime(classifier, model, precision, n_threads=n_threads)
        return
    import torch

    from biopsy.learning.engine import Engine

    before = torch.get_num_threads()
    if device == "cpu":
        torch.set_num_threads(1)  # every call runs in the thread that makes it
    try:
        yield TorchRuntime(classifier, Engine(device, precision))
    finally:
        torch.set_num_threads(before)


class TorchRuntime:
    """A network as PyTorch runs it."""

    def __init__(self, classifier: Classifier, engine: "Engine") -> None:
        self.software = ("torch", version("torch"))
        self.in_threads = engine.device.type == "cpu"
        self._network = engine.place(classifier.network.eval())
        self._preprocessing = classifier.info.preprocessing
        self._engine = engine

    def ask(self, patches: np.ndarray) -> np.ndarray:
        """Give logits ``(n, n_classes)`` of patches, uint8 ``(n, H, W, 3)``."""
        return self._compute(self._network, patches)

    def features(self, patches: np.ndarray) -> np.ndarray:
        """Give the penultimate layer ``(n, n_features)`` of patches."""
        return self._compute(self._network.features, patches)

    def _compute(self, function: Any, patches: np.ndarray) -> np.ndarray:
        size = _CPU_BATCH if self.in_threads else _GPU_BATCH
        parts = [
            self._engine.predict(
                function,
                self._preprocessing.prepare(patches[start : start + size], device=self._engine.device),
            )
            for start in range(0, len(patches), size)
        ]
        return np.concatenate([part.cpu().numpy() for part in parts])


class CompiledRuntime:
    """A network compiled by OpenVINO for the processor at hand.

    Every batch has the same size, the last one filled up, so that a patch's logits do not depend on which
    patches come with it.

    Args:
        classifier: Says how patches are brought to size.
        model: OpenVINO's model of its network, as `compiling.convert` gives it.
        precision: ``fp32`` or ``bf16``.
        n_threads: How many threads will ask.
    """

    in_threads = True

    def __init__(self, classifier: Classifier, model: Any, precision: str, *, n_threads: int) -> None:
        import openvino

        keep_freed_memory()
        self.software = ("openvino", version("openvino"))
        self._preprocessing = classifier.info.preprocessing
        settings = {
            "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision],
            "NUM_STREAMS": n_threads,
            "INFERENCE_NUM_THREADS": n_threads,
            "ENABLE_CPU_PINNING": False,
        }
        self._compiled = openvino.Core().compile_model(model, "CPU", settings)
        self._own = threading.local()

    def ask(self, patches: np.ndarray) -> np.ndarray:
        """Give logits ``(n, n_classes)`` of patches, uint8 ``(n, H, W, 3)``."""
        return self._compute(0, patches)

    def features(self, patches: np.ndarray) -> np.ndarray:
        """Give the penultimate layer ``(n, n_features)`` of patches."""
        return self._compute(1, patches)

    def _compute(self, output: int, patches: np.ndarray) -> np.ndarray:
        if not hasattr(self._own, "request"):
            self._own.request = self._compiled.create_infer_request()
            self._own.filled = empty_batch(self._preprocessing.input_px)
        resized, found = self._preprocessing.resize_patches(patches), []
        for start in range(0, len(resized), _CPU_BATCH):
            batch = resized[start : start + _CPU_BATCH]
            n = len(batch)
            if n < _CPU_BATCH:
                self._own.filled[:n] = batch
                batch = self._own.filled
            answer = self._own.request.infer([np.ascontiguousarray(batch)], share_inputs=True)
            found.append(answer[output][:n].copy())
        return np.concatenate(found)


def _find_model(classifier: Classifier) -> Any:
    """Give OpenVINO's model that lies beside a classifier, or one made now; None where it cannot be had."""
    kept = None if classifier.path is None else classifier.path / FOLDER
    if kept is not None and kept.is_dir():
        return read_compiled(kept, classifier)
    from biopsy.learning.compiling import try_to_convert

    return try_to_convert(classifier)


def read_compiled(folder: Path, classifier: Classifier) -> Any:
    """Read what `compiling.write_compiled` wrote.

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
    return openvino.Core().read_model(folder / MODEL)


def describe_origin(classifier: Classifier) -> dict[str, Any]:
    """Give what a compiled network is made from; another weight or scale makes another network."""
    preprocessing = {key: str(value) for key, value in vars(classifier.info.preprocessing).items()}
    return {"weights_sha256": classifier.info.weights_sha256, "preprocessing": preprocessing}


def empty_batch(input_px: int) -> np.ndarray:
    """Give a batch of the one size that compiled networks take, uint8 ``(16, input_px, input_px, 3)``."""
    return np.zeros((_CPU_BATCH, input_px, input_px, 3), np.uint8)
