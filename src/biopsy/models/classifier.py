"""Classifiers: network weights with preprocessing, calibration, threshold and reference statistics."""

import copy
import hashlib
import json
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal, Required

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, PositiveInt, ValidationError
from scipy.special import softmax
from typing_extensions import TypedDict

from biopsy.core.errors import DataError, RunError, raising
from biopsy.core.files import (
    create_directory,
    file_state,
    plain,
    read_json,
    sha256_file,
    write_atomic,
    write_json,
)
from biopsy.core.loaders import read_tensors, refusing, validate
from biopsy.core.results import Output
from biopsy.core.version import __version__
from biopsy.data.coordinates import find_slides, has_coordinates
from biopsy.data.pack_files import MAX_PATCH_PX
from biopsy.data.packs import Pack
from biopsy.data.predictions import FixedThreshold, decide, tabulate_predictions
from biopsy.recipes.preprocessing import Preprocessing, Resize
from biopsy.statistics.abstention import ConformalRecord, abstain, predict_sets
from biopsy.statistics.calibrators import Calibrator, CalibratorRecord, calibrator_from_dict

if TYPE_CHECKING:
    from torch import Tensor, nn

logger = logging.getLogger(__name__)

FORMAT: Final = "biopsy-classifier/1"
DOCUMENT, WEIGHTS = "classifier.json", "weights.safetensors"
_EXTRA = "extra."  # prefix of arrays in the weights file that are not weights
MPP_TOLERANCE = 0.05  # scanners of the same magnification differ by less


_Limit = Annotated[FiniteFloat, Field(gt=0)]


KINDS = ("colour", "feature")
"""Distances used to detect out-of-distribution patches."""


class Threshold(FixedThreshold, total=False):
    """A decision threshold, with sensitivity and specificity on the subset where it was chosen."""

    sensitivity: float | None
    specificity: float | None


class OutOfDistribution(TypedDict, total=False):
    """Limits of the distances (`KINDS`) above which a patch is out of distribution."""

    method: str
    quantile: float
    chosen_on: str
    limits: Required[dict[str, _Limit]]


class SinglePatch(TypedDict, total=False):
    """Replacements of the fields of the same names for patches without coordinates."""

    calibrator: CalibratorRecord
    thresholds: list[Threshold]
    conformal: ConformalRecord


class StartWeights(TypedDict, total=False):
    """Record of the initial weights of a run; None for fields that do not apply."""

    pretrained: Required[bool]
    weights: str | None
    file: str | None
    sha256: Required[str | None]
    licence: str | None
    page: str | None
    trainable: str
    note: str | None
    warning: str
    """Where the weights are of a classifier whose training patients are not recorded."""


Tta = Literal["none", "d4"]


def default_thresholds(class_names: Sequence[str]) -> list[Threshold]:
    """Return the thresholds of a model that records none: a probability of 0.5, of two classes."""
    return [{"value": 0.5, "rule": "argmax", "chosen_on": "nothing"}] if len(class_names) == 2 else []


class ClassifierInfo(BaseModel):
    """Content of ``classifier.json``."""

    model_config = ConfigDict(extra="allow")

    format: Literal["biopsy-classifier/1"] = FORMAT
    network: str
    params: dict[str, object] = {}
    class_names: list[str] = Field(min_length=1)
    positive_class: str | None
    patch_px: PositiveInt = Field(le=MAX_PATCH_PX)
    """Side of a patch as cut from the slide."""
    mpp: float | None = Field(gt=0, allow_inf_nan=False)
    """Pixel size of the patches in µm; None if unknown."""
    preprocessing: Preprocessing
    outputs: Literal["softmax", "sigmoid"] = "softmax"
    tta: Tta = "none"
    """``d4``: logits and features are averaged over the eight symmetries of the square."""
    context: float = 0.0
    """Decay length of the weights of neighbouring patches in the mean logits, in patch sides; 0: none."""
    calibrator: CalibratorRecord = {"method": "none"}
    thresholds: list[Threshold] = []
    """The first one is used."""
    conformal: ConformalRecord = {}
    out_of_distribution: OutOfDistribution | None = None
    single_patch: SinglePatch = {}
    """For a classifier with ``context``."""
    description: str = ""
    """Training data and number of patients, in one sentence."""
    citation: str = ""
    """Citation of the training data."""
    licence: str = "as the data it was trained on allow"
    pack: dict[str, str] = {}
    """Name and content hash of the training pack."""
    recipe: str | None = None
    version: str = ""
    weights_sha256: str = ""

    def require_consistent(self) -> "ClassifierInfo":
        """Check that the fields are consistent."""
        names, calibrator, quantiles = self.class_names, self.calibrator, self.conformal.get("quantiles")
        n_knots = len(calibrator.get("prob", []))
        limits = (
            dict.fromkeys(KINDS) if self.out_of_distribution is None else self.out_of_distribution["limits"]
        )
        missing = [kind for kind in KINDS if kind not in limits]
        faults = {
            "class_names: repeated class": len(set(names)) < len(names),
            f"positive_class: {self.positive_class!r} is not a class": self.positive_class
            not in (None, *names),
            "thresholds: there is no positive class": bool(self.thresholds) and self.positive_class is None,
            "conformal: one quantile per class is needed": quantiles is not None
            and len(quantiles) != len(names),
            "calibrator: one intercept per class is needed": len(calibrator.get("intercepts", []))
            not in (0, len(names)),
            "calibrator: isotonic knots are missing": calibrator["method"] == "isotonic"
            and not (len(calibrator.get("calibrated", [])) == n_knots > 0 and len(names) == 2),
            f"out_of_distribution.limits.{' and '.join(missing)}: missing": bool(missing),
        }
        if fault := next((fault for fault, is_so in faults.items() if is_so), None):
            raise DataError(f"{DOCUMENT}: {fault}")
        return self


class Classifier(Output):
    """A network with its weights, preprocessing and postprocessing.

    Attributes:
        info: Content of ``classifier.json``.
        extras: Named float arrays stored with the weights (reference statistics of the training data).
        path: The folder it was read from, None if it was created in memory.
        source: ``hf:ORG/NAME@COMMIT`` if it is from the Hugging Face hub, else None.
    """

    def __init__(
        self,
        info: ClassifierInfo,
        base_network: "nn.Module | None",
        extras: dict[str, np.ndarray] | None = None,
        path: Path | None = None,
    ) -> None:
        in_memory = path is None and base_network is not None
        self.info = info.model_copy(update={"weights_sha256": ""}) if in_memory else info
        self.extras = extras or {}
        self.path = path
        self.source: str | None = None
        self._base_network = None if base_network is None else base_network.eval()
        self._weights_state: tuple[int, int, int] | None = None  # when their hash was compared

    def blocks(self) -> list[str]:
        return [str(self.path)]

    def to_json(self) -> dict[str, object]:
        return {"path": self.path, "sha256": self.sha256}

    @classmethod
    def load(cls, path: Path | str) -> "Classifier":
        """Read a classifier folder.

        Raises:
            RunError: If it is missing, of a newer format, or its weights were altered.
        """
        path = Path(path)
        try:
            remedy = "restore it, or train again"
            document = read_json(path / DOCUMENT, format=FORMAT, remedy=remedy, may_lack_hash=True)
            info = validate(path / DOCUMENT, ClassifierInfo, document)
            info.require_consistent().model_copy(update=dict(info.single_patch)).require_consistent()
        except DataError as error:
            raise RunError(f"{path} is not a classifier: {error}") from None
        weights = path / WEIGHTS
        state = file_state(weights)
        with raising(RunError):
            if sha256_file(weights) != info.weights_sha256:
                raise RunError(f"{weights} was altered since the classifier was saved: {remedy}")
            tensors, _ = read_tensors(weights, keep=_is_extra)
        extras = {name.removeprefix(_EXTRA): tensor.astype(np.float64) for name, tensor in tensors.items()}
        parts = ("mean", "spread", "precision")
        needed = {f"{kind}_{part}" for kind in KINDS for part in parts}
        if info.out_of_distribution is not None and not needed <= extras.keys():
            raise RunError(f"{weights} lacks the reference statistics of the training data: {remedy}")
        classifier = cls(info, None, extras, path)
        classifier._weights_state = state
        return classifier

    @classmethod
    def wrap(
        cls,
        module: "nn.Module",
        *,
        class_names: Sequence[str],
        input_px: int,
        mpp: float | None,
        mean: tuple[float, float, float] = (0.0, 0.0, 0.0),
        std: tuple[float, float, float] = (1.0, 1.0, 1.0),
        patch_px: int | None = None,
        positive_class: str | None = None,
        threshold: float = 0.5,
        resize: Resize = "bilinear",
        licence: str = "not stated",
    ) -> "Classifier":
        """Return a classifier of any PyTorch module, for `predict`, `evaluate`, `slide`, ...

        Args:
            module: Maps a batch ``(B, 3, input_px, input_px)``, float32 RGB in 0-1 normalised by ``mean`` and
                ``std``, to logits ``(B, n_classes)``, or for two classes the second logit, ``(B, 1)``.
            class_names: Class names in the order of the logits.
            input_px: Input size in pixels.
            mpp: Pixel size of the patches in µm; None if unknown (slides cannot be mapped).
            mean: Mean per channel, of values in 0-1.
            std: Standard deviation per channel.
            patch_px: Side of a patch at ``mpp``, resized to ``input_px`` (default: ``input_px``).
            positive_class: Positive class of two (default: the second).
            threshold: For two classes, the decision threshold on the positive probability.
            resize: ``"nearest"``, ``"bilinear"`` or ``"bicubic"``.
            licence: Licence of the weights.

        Raises:
            RunError: If a value is invalid, the module does not accept such a batch, or its output does not
                fit the classes.
        """
        from torch import nn

        from biopsy.models.networks.wrapped import WrappedNetwork

        if not isinstance(module, nn.Module):
            raise RunError(f"module is of {type(module).__name__}: pass a torch.nn.Module")
        names = [str(name) for name in class_names]
        binary = len(names) == 2
        if len(set(names)) != len(names) or len(names) < 2:
            raise RunError(f"class_names={names}: pass two or more distinct names")
        if positive_class is not None and (not binary or positive_class not in names):
            raise RunError(f"positive_class={positive_class!r} is not one of two classes {names}")
        if binary and not 0 <= threshold <= 1:
            raise RunError(f"threshold={threshold!r} is not a probability")
        given = Threshold(value=float(threshold), rule="given", chosen_on=None)
        try:
            info = ClassifierInfo(
                network=f"wrapped:{type(module).__module__}.{type(module).__qualname__}",
                class_names=names,
                positive_class=(positive_class or names[1]) if binary else None,
                patch_px=input_px if patch_px is None else patch_px,
                mpp=mpp,
                preprocessing=Preprocessing(input_px=input_px, resize=resize, mean=mean, std=std),
                thresholds=[given] if binary else [],
                conformal={"reason": "a wrapped module is not calibrated"},
                licence=licence,
            )
        except ValidationError as error:
            fault = error.errors(include_url=False)[0]
            raise RunError(f"{fault['loc'][0]}={fault['input']!r}: {fault['msg']}") from None
        return cls(info, WrappedNetwork(module, len(names), input_px))

    @property
    def network(self) -> "nn.Module":
        """The network in evaluation mode, including test-time augmentation."""
        if self.info.tta == "none":
            return self.base_network
        from biopsy.models.networks.wrapped import SymmetryAveraged

        return SymmetryAveraged(self.base_network).eval()

    @property
    def base_network(self) -> "nn.Module":
        """The network without test-time augmentation, loaded on first use."""
        if self._base_network is None:
            self._base_network = self._read_network()
        return self._base_network

    def _read_network(self) -> "nn.Module":
        import torch

        from biopsy.models.networks import build_network

        assert self.path is not None
        info, weights = self.info, self.path / WEIGHTS
        if info.network.startswith("wrapped:"):
            raise RunError(
                f"{self.path} was made of the module {info.network.removeprefix('wrapped:')}, whose code is "
                "not stored: wrap the module again with Classifier.wrap"
            )
        tensors, _ = read_tensors(weights, framework="pt", keep=lambda name: not _is_extra(name))
        n_classes, input_px = len(info.class_names), info.preprocessing.input_px
        build = partial(
            build_network, info.network, n_classes=n_classes, input_px=input_px, seed=None, **info.params
        )
        with refusing(self.path / DOCUMENT, "a network"):
            with torch.device("meta"):  # no memory is taken for a network larger than the weights
                shapes = {name: tensor.shape for name, tensor in build().state_dict().items()}
        if shapes != {name: tensor.shape for name, tensor in tensors.items()}:
            raise RunError(f"{weights} does not fit the network {info.network!r} that {DOCUMENT} names")
        network = build()
        network.load_state_dict(tensors)
        if file_state(weights) != self._weights_state and sha256_file(weights) != info.weights_sha256:
            raise RunError(f"{weights} was altered since the classifier was opened")
        return network.eval()

    def save(self, path: Path | str, *, precision: Literal["fp32", "fp16"] = "fp32") -> None:
        """Write the classifier folder atomically; the files of an existing classifier are replaced.

        Args:
            path: Output folder.
            precision: ``"fp16"`` stores kernels and matrices in half precision, but not biases and
                batch-norm statistics; they are loaded as float32.

        Raises:
            UserFileError: If the folder is not empty and not a classifier.
        """
        import torch
        from safetensors.torch import save

        tensors = {
            name: tensor.detach().cpu().contiguous().clone()
            for name, tensor in self.base_network.state_dict().items()
        }
        tensors |= {_EXTRA + name: torch.from_numpy(np.array(array)) for name, array in self.extras.items()}
        if precision == "fp16":
            tensors = {name: _halve(name, tensor) for name, tensor in tensors.items()}
        path, content = Path(path), save(tensors)
        digest = hashlib.sha256(content).hexdigest()
        self.info = self.info.model_copy(update={"weights_sha256": digest, "version": __version__})
        if (path / DOCUMENT).is_file():
            read_json(path / DOCUMENT, format=FORMAT, may_lack_hash=True)
            self._write(path, content)
        else:
            with create_directory(path) as partial:
                self._write(partial, content)

    def _write(self, folder: Path, weights: bytes) -> None:
        if not (folder / WEIGHTS).is_file() or sha256_file(folder / WEIGHTS) != self.info.weights_sha256:
            write_atomic(folder / WEIGHTS, weights)
        write_json(folder / DOCUMENT, self.info.model_dump())

    @property
    def positive_index(self) -> int | None:
        """Index of the positive class, None for more than two classes."""
        positive = self.info.positive_class
        return None if positive is None else self.info.class_names.index(positive)

    def with_tta(self, tta: Tta | None) -> "Classifier":
        """Return the classifier with another test-time augmentation (None: unchanged).

        Calibration and thresholds are kept, which is logged. Since the distribution of features changes,
        out-of-distribution patches are then detected by colour only.
        """
        if tta is None or tta == self.info.tta:
            return self
        logger.warning(
            "tta=%s: calibration and thresholds were fitted with tta=%s; out-of-distribution patches are "
            "detected by colour only",
            tta,
            self.info.tta,
        )
        other, reference = copy.copy(self), self.info.out_of_distribution
        if reference is not None:
            limits = {kind: limit for kind, limit in reference["limits"].items() if kind != "feature"}
            reference = OutOfDistribution(**{**reference, "limits": limits})
        other.info = self.info.model_copy(update={"tta": tta, "out_of_distribution": reference})
        other._base_network = self.base_network
        other.path = None  # the compiled network there has the other augmentation
        return other

    def single_patch(self) -> "Classifier":
        """Return the classifier without context."""
        if not self.info.context:
            return self
        single = copy.copy(self)
        changes: dict[str, object] = {"context": 0.0, "single_patch": {}, **self.info.single_patch}
        single.info = self.info.model_copy(update=changes)
        return single

    def for_patches(self, table: pd.DataFrame) -> "Classifier":
        """Return this classifier, or the one without context if no patch has coordinates (logged)."""
        if not self.info.context or has_coordinates(table):
            return self
        logger.warning("no coordinates: patches are predicted without their neighbours on the slide")
        return self.single_patch()

    def add_context(self, logits: np.ndarray, table: pd.DataFrame) -> np.ndarray:
        """Return logits averaged over neighbouring patches if the classifier uses context."""
        if not self.info.context:
            return logits
        return average_neighbours(logits, table, patch_px=self.info.patch_px, length=self.info.context)

    def check_pack(self, pack: Pack) -> None:
        """Check that the resolution and size of a pack's patches match those of the training patches."""
        theirs, ours = pack.info, self.info
        if theirs.mpp and ours.mpp and abs(theirs.mpp / ours.mpp - 1) > MPP_TOLERANCE:
            raise DataError(
                f"{pack.path} has {theirs.mpp} um/px, the classifier was trained at {ours.mpp}: "
                "prepare the patches at that resolution"
            )
        if theirs.patch_px > ours.patch_px:
            raise DataError(
                f"{pack.path} has patches of {theirs.patch_px} px, the classifier needs at most "
                f"{ours.patch_px} px: cut them to that size"
            )

    @property
    def sha256(self) -> str:
        """Hash of the metadata (without fields at their defaults) and the weights."""
        content = plain(self.info.model_dump(mode="json", exclude_defaults=True))
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
        if not self.info.weights_sha256:  # not saved yet
            from biopsy.models.networks.wrapped import hash_network

            digest.update(hash_network(self.base_network, self.extras))
        return digest.hexdigest()

    @property
    def calibrator(self) -> Calibrator:
        """Calibrator of the scores."""
        return calibrator_from_dict(self.info.calibrator)

    def calibrated_scores(self, logits: np.ndarray) -> np.ndarray:
        """Return scores ``(N, n_classes)`` whose softmax is the calibrated probabilities.

        These are the outputs of exported models; for temperature and Platt ``slope * scores + intercepts``.
        """
        return self.calibrator.scale(score_classes(logits, self.info.outputs))

    def probs(self, logits: np.ndarray) -> np.ndarray:
        """Return calibrated probabilities ``(N, n_classes)`` of logits, summing to one.

        Two sigmoid outputs are normalised as p1 / (p0 + p1), which preserves the argmax.
        """
        return np.asarray(softmax(self.calibrated_scores(logits), axis=1))

    @property
    def threshold(self) -> float | None:
        """Decision threshold on the positive probability; None for the most probable class."""
        return self.info.thresholds[0]["value"] if self.info.thresholds else None

    def abstains(self, probs: np.ndarray) -> np.ndarray | None:
        """Return a mask of abstentions, bool ``(N,)``; None without conformal quantiles."""
        quantiles = self.info.conformal.get("quantiles")
        if quantiles is None:
            return None
        return abstain(predict_sets(probs, quantiles), decide(probs, self.positive_index, self.threshold))

    def tabulate(self, patches: pd.DataFrame, logits: np.ndarray) -> pd.DataFrame:
        """Return the predictions of patches from their logits, with context; see `tabulate_predictions`."""
        probs = self.probs(logits)
        return tabulate_predictions(
            patches,
            self.info.class_names,
            self.positive_index,
            logits,
            probs,
            threshold=self.threshold,
            abstained=self.abstains(probs),
        )

    def prediction_sets(self, probs: np.ndarray) -> list[list[str]] | None:
        """Return the classes of each patch's conformal set; None without conformal quantiles."""
        quantiles = self.info.conformal.get("quantiles")
        if quantiles is None:
            return None
        names = np.array(self.info.class_names)
        return [names[inside].tolist() for inside in predict_sets(probs, quantiles)]

    @property
    def decision_threshold(self) -> FixedThreshold | None:
        """The decision threshold with its rule and subset; None if there is none."""
        return fix_threshold(self.info.thresholds[0]) if self.info.thresholds else None


def fix_threshold(threshold: Threshold) -> FixedThreshold:
    """Return a threshold without the rates where it was chosen."""
    return FixedThreshold(value=threshold["value"], rule=threshold["rule"], chosen_on=threshold["chosen_on"])


def _is_extra(name: str) -> bool:
    return name.startswith(_EXTRA)


def _halve(name: str, tensor: "Tensor") -> "Tensor":
    """Return kernels, matrices and the feature precision matrix in half precision, extras in float32."""
    if _is_extra(name) and name != f"{_EXTRA}feature_precision":
        return tensor.float()
    return tensor.half() if tensor.is_floating_point() and tensor.ndim > 1 else tensor


def score_classes(logits: np.ndarray, outputs: str) -> np.ndarray:
    """Return scores ``(N, n_classes)`` whose softmax is the probabilities: for sigmoid, their logarithms."""
    logits = logits.astype(np.float64)
    return -np.logaddexp(0, -logits) if outputs == "sigmoid" else logits


CELLS = 4
"""Grid cells per patch side; distances are exact for strides of 1, 1/2 and 1/4 patch."""
REACH = 5
"""Radius in decay lengths, at which the weight is below 1 %."""


def average_neighbours(
    logits: np.ndarray, table: pd.DataFrame, *, patch_px: int, length: float
) -> np.ndarray:
    """Return the logits averaged over the neighbourhood of each patch.

    Args:
        logits: ``(n, n_classes)``, of *all* patches of a slide.
        table: ``x`` and ``y`` in pixels, ``slide_id`` and ``patient_id``. Patches without coordinates or
            slide keep their logits.
        length: Decay length in patch sides.
    """
    averaged = logits.astype(np.float64)
    for rows, coordinates in find_slides(table):
        averaged[rows] = _average_slide(averaged[rows], coordinates / patch_px, length)
    return averaged.astype(logits.dtype)


def _average_slide(logits: np.ndarray, coordinates: np.ndarray, length: float) -> np.ndarray:
    """Return averaged logits of one slide; ``coordinates`` are in patch sides."""
    from scipy.signal import fftconvolve  # slow import

    cells = np.rint((coordinates - coordinates.min(axis=0)) * CELLS).astype(int)
    column, row = cells.T
    shape = (row.max() + 1, column.max() + 1)
    radius = int(np.ceil(REACH * length * CELLS))
    offset = np.arange(-radius, radius + 1) / CELLS
    distance = np.hypot(offset[:, None], offset)
    kernel = np.exp(-distance / length) * (distance <= REACH * length)
    sums = []
    for values in (np.ones(len(logits)), *logits.T):
        grid = np.zeros(shape)
        np.add.at(grid, (row, column), values)
        sums.append(fftconvolve(grid, kernel, mode="same")[row, column])
    return np.stack(sums[1:], axis=1) / sums[0][:, None]
