"""Runtimes for prediction: OpenVINO on a CPU; PyTorch on a GPU, or if OpenVINO cannot run the network.

Both map uint8 patches to logits. OpenVINO fuses normalisations and activations into convolutions, and on a
CPU is about twice as fast as PyTorch for small networks. A bundle contains the converted network, so
that PyTorch (seconds to import) is not needed. OpenVINO's own converter, which sends telemetry, is not used.
"""

import contextlib
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from biopsy.core.errors import RunError
from biopsy.models.classifier import Classifier
from biopsy.models.openvino_runtime import (
    _CPU_BATCH,
    _GPU_BATCH,
    FOLDER,
    INT8_MODEL,
    CompiledRuntime,
    read_compiled,
)

if TYPE_CHECKING:
    from biopsy.models.engine import Engine
    from biopsy.recipes.preprocessing import Preprocessing

MIN_PATCHES_TO_CONVERT = 1024
"""Number of patches from which OpenVINO is faster, including the conversion."""


class Runtime(Protocol):
    """A network with its preprocessing, ready to predict from any thread.

    Attributes:
        in_threads: Whether to predict in several threads, or in one with all cores.
    """

    software: tuple[str, str]
    in_threads: bool

    def logits(self, patches: np.ndarray) -> np.ndarray:
        """Return logits ``(n, n_classes)`` of patches, uint8 ``(n, H, W, 3)``."""

    def logits_and_features(self, patches: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return logits and the penultimate layer ``(n, n_features)`` of patches."""


def list_runtimes() -> dict[str, str]:
    """Return the installed runtimes with versions, on which the last digits of outputs depend."""
    return {name: version(name) for name in ("openvino", "torch") if find_spec(name)}


@contextlib.contextmanager
def open_runtime(
    classifier: Classifier,
    device: str,
    precision: Literal["fp32", "bf16", "int8"],
    *,
    n_threads: int,
    n_patches: int | None = None,
) -> Iterator[Runtime]:
    """Return the fastest available runtime for a classifier on a device.

    Args:
        precision: ``int8`` for the quantised network of a bundle, on the CPU.
        n_patches: Number of patches to predict; None for a whole slide.

    Raises:
        RunError: If the compiled network in the classifier's bundle is damaged or of another classifier, or
            for ``int8``, there is no quantised network.
    """
    if precision == "int8":
        yield CompiledRuntime(classifier, _read_quantised(classifier, device), precision, n_threads=n_threads)
        return
    is_possible = device == "cpu" and find_spec("openvino") is not None
    model = _find_model(classifier, n_patches) if is_possible else None
    if model is not None:
        yield CompiledRuntime(classifier, model, precision, n_threads=n_threads)
        return
    import torch

    from biopsy.models.engine import Engine

    before = torch.get_num_threads()
    if device == "cpu":
        torch.set_num_threads(1)  # calls are made from several threads
    try:
        yield TorchRuntime(
            classifier.network,
            classifier.info.preprocessing,
            Engine(device, precision),
            in_threads=device == "cpu",
        )
    finally:
        torch.set_num_threads(before)


class TorchRuntime:
    """A network in evaluation mode, run by PyTorch."""

    def __init__(
        self, network: Any, preprocessing: "Preprocessing", engine: "Engine", *, in_threads: bool = False
    ) -> None:
        from biopsy.models.networks.wrapped import N_VIEWS, SymmetryAveraged

        self.software = ("torch", version("torch"))
        self.in_threads = in_threads
        self._network = engine.place(network)
        self._preprocessing = preprocessing
        self._engine = engine
        size = _CPU_BATCH if in_threads else _GPU_BATCH
        self._batch_size = size // N_VIEWS if isinstance(network, SymmetryAveraged) else size

    def logits(self, patches: np.ndarray) -> np.ndarray:
        return self._compute(self._network, patches)

    def logits_and_features(self, patches: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.logits(patches), self._compute(self._network.features, patches)

    def _compute(self, function: Any, patches: np.ndarray) -> np.ndarray:
        size = self._batch_size
        parts = [
            self._engine.predict(
                function,
                self._preprocessing.prepare(patches[start : start + size], device=self._engine.device),
            )
            for start in range(0, max(1, len(patches)), size)
        ]
        return np.concatenate([part.cpu().numpy() for part in parts])


def _read_quantised(classifier: Classifier, device: str) -> Any:
    """Return the quantised network of a classifier's bundle."""
    folder = None if classifier.path is None else classifier.path / FOLDER
    if device != "cpu" or folder is None or not (folder / INT8_MODEL).is_file():
        raise RunError(
            "precision int8 runs the quantised network of a bundle on the processor, with its own tta; "
            f"{classifier.source or 'this classifier'} has none for {device}: write a bundle with "
            "`biopsy export MODEL OUT --int8 --data PACK`"
        )
    return read_compiled(folder, classifier, INT8_MODEL)


def _find_model(classifier: Classifier, n_patches: int | None) -> Any:
    """Return the OpenVINO model in the classifier's folder, or a new one; None if not available."""
    if n_patches is not None and n_patches < MIN_PATCHES_TO_CONVERT:
        return None
    folder = None if classifier.path is None else classifier.path / FOLDER
    if folder is not None and folder.is_dir():
        return read_compiled(folder, classifier)
    from biopsy.models.compiling import try_to_convert

    return try_to_convert(classifier)
