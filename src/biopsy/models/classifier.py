"""The Classifier: weights, how to feed them, and how to read what comes out."""

import copy
import hashlib
import json
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Required

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, PositiveInt
from typing_extensions import TypedDict

from biopsy.core.errors import DataError, RunError
from biopsy.core.files import create_directory, plain, read_json, sha256_file, write_atomic, write_json
from biopsy.core.loaders import read_tensors, refusing, validate
from biopsy.data.packs import MAX_PATCH_PX, Pack
from biopsy.data.predictions import FrozenThreshold, decide
from biopsy.models.context import average_neighbours, has_coordinates
from biopsy.models.preprocessing import Preprocessing, Resize
from biopsy.statistics.calibrators import Calibrator, Method, calibrator_from_dict
from biopsy.statistics.conformal import abstain, predict_sets

if TYPE_CHECKING:
    from torch import Tensor, nn

logger = logging.getLogger(__name__)

FORMAT: Final = "biopsy-classifier/1"
DOCUMENT, WEIGHTS = "classifier.json", "weights.safetensors"
_EXTRA = "extra."  # what names in the file of weights begin with that are none
MPP_TOLERANCE = 0.05  # scanners of one nominal magnification differ by less


_Shares = list[Annotated[FiniteFloat, Field(ge=0, le=1)]]
_Limit = Annotated[FiniteFloat, Field(gt=0)]


KINDS = ("colour", "feature")
"""Of the distances by which patches out of distribution are found."""


class Threshold(FrozenThreshold, total=False):
    """A decision threshold, and what it achieved where it was chosen."""

    sensitivity: float | None
    specificity: float | None


class CalibratorRecord(TypedDict, total=False):
    """How scores become calibrated (see ``statistics.calibrators``), and on what that was fitted."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    method: Required[Method]
    slope: FiniteFloat
    intercepts: list[FiniteFloat]
    positive_index: Literal[0, 1]
    prob: _Shares
    calibrated: _Shares
    prior: str | None
    reason: str
    asked: str
    fitted_on: str
    n_patches: int
    n_patients: int
    unit: str
    warning: str | None


class ConformalRecord(TypedDict, total=False):
    """Quantiles of the sets that say which patches get no answer, or why there are none."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    method: str
    alpha: float
    guarantee: str
    quantiles: list[FiniteFloat] | None
    n_patients: int
    n_patches: int
    unit: str
    reason: str | None
    chosen_on: str
    per_patch_quantiles: list[float] | None


class OutOfDistribution(TypedDict, total=False):
    """Limits of the distances (`KINDS`) beyond which a patch is out of distribution."""

    method: str
    quantile: float
    chosen_on: str
    limits: Required[dict[str, _Limit]]


class SinglePatch(TypedDict, total=False):
    """What replaces the parts of the same names for patches without coordinates."""

    calibrator: CalibratorRecord
    thresholds: list[Threshold]
    conformal: ConformalRecord


Tta = Literal["none", "d4"]


class ClassifierInfo(BaseModel):
    """What ``classifier.json`` holds."""

    model_config = ConfigDict(extra="allow")

    format: Literal["biopsy-classifier/1"] = FORMAT
    network: str
    params: dict[str, object] = {}
    class_names: list[str] = Field(min_length=1)
    positive_class: str | None
    patch_px: PositiveInt = Field(le=MAX_PATCH_PX)
    """Side of a patch as cut from the slide."""
    mpp: float | None = Field(gt=0, allow_inf_nan=False)
    """Micrometres per pixel at which patches were cut; None where the data did not say."""
    preprocessing: Preprocessing
    outputs: Literal["softmax", "sigmoid"] = "softmax"
    tta: Tta = "none"
    """``d4``: logits and features are means over the eight symmetries of the patch."""
    context: float = 0.0
    """Decay length of the weights of neighbouring patches in the mean logits, in patch sides; 0: none."""
    calibrator: CalibratorRecord = {"method": "none"}
    thresholds: list[Threshold] = []
    """The first one is used."""
    conformal: ConformalRecord = {}
    out_of_distribution: OutOfDistribution | None = None
    single_patch: SinglePatch = {}
    """Of a classifier with ``context``."""
    description: str = ""
    """On which data and how many patients it stands, in one sentence."""
    citation: str = ""
    """Of the data."""
    licence: str = "as the data it was trained on allow"
    pack: dict[str, str] = {}
    """Name and content hash of the pack it learned from."""
    recipe: str | None = None
    version: str = ""
    weights_sha256: str = ""

    def require_consistent(self) -> "ClassifierInfo":
        """Refuse parts that do not fit each other.

        Raises:
            DataError: Naming the part.
        """
        names, calibrator, quantiles = self.class_names, self.calibrator, self.conformal.get("quantiles")
        n_knots = len(calibrator.get("prob", []))
        limits = (
            dict.fromkeys(KINDS) if self.out_of_distribution is None else self.out_of_distribution["limits"]
        )
        missing = [kind for kind in KINDS if kind not in limits]
        faults = {
            "class_names: a class stands twice": len(set(names)) < len(names),
            f"positive_class: {self.positive_class!r} is no class": self.positive_class not in (None, *names),
            "thresholds: there is no positive class": bool(self.thresholds) and self.positive_class is None,
            "conformal: one quantile a class is needed": quantiles is not None
            and len(quantiles) != len(names),
            "calibrator: one intercept a class is needed": len(calibrator.get("intercepts", []))
            not in (0, len(names)),
            "calibrator: isotonic knots are missing": calibrator["method"] == "isotonic"
            and not (len(calibrator.get("calibrated", [])) == n_knots > 0 and len(names) == 2),
            f"out_of_distribution.limits.{' and '.join(missing)}: missing": bool(missing),
        }
        if fault := next((fault for fault, is_so in faults.items() if is_so), None):
            raise DataError(f"{DOCUMENT}: {fault}")
        return self


class Classifier:
    """A network with its weights, and everything needed to use it.

    Attributes:
        info: What ``classifier.json`` says.
        extras: Named float arrays stored beside the weights (the reference of the unlike-training check).
        path: The folder it was read from, None if it was not.
        source: Of one from the Hugging Face hub, ``hf:ORG/NAME@COMMIT``; None of others.
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

    @classmethod
    def load(cls, path: Path | str) -> "Classifier":
        """Read a classifier folder.

        Raises:
            RunError: If it is missing, of a newer format, or its weights are not those that were saved.
        """
        path = Path(path)
        try:
            remedy = "bring it back, or train again"
            document = read_json(path / DOCUMENT, format=FORMAT, remedy=remedy, may_lack_hash=True)
            info = validate(path / DOCUMENT, ClassifierInfo, document)
            info.require_consistent().model_copy(update=dict(info.single_patch)).require_consistent()
        except DataError as error:
            raise RunError(f"{path} is not a classifier: {error}") from None
        weights = path / WEIGHTS
        try:
            if sha256_file(weights) != info.weights_sha256:
                raise RunError(f"{weights} was altered since the classifier was saved: {remedy}")
            tensors, _ = read_tensors(weights, keep=_is_extra)
        except DataError as error:
            raise RunError(str(error)) from None
        extras = {name.removeprefix(_EXTRA): tensor.astype(np.float64) for name, tensor in tensors.items()}
        parts = ("mean", "spread", "precision")
        needed = {f"{kind}_{part}" for kind in KINDS for part in parts}
        if info.out_of_distribution is not None and not needed <= extras.keys():
            raise RunError(f"{weights} lacks what training patches are like: {remedy}")
        return cls(info, None, extras, path)

    @classmethod
    def wrap(
        cls,
        module: "nn.Module",
        *,
        class_names: Sequence[str],
        input_px: int,
        mpp: float | None,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
        patch_px: int | None = None,
        positive_class: str | None = None,
        threshold: float = 0.5,
        resize: Resize = "bilinear",
        licence: str = "not stated",
    ) -> "Classifier":
        """Return a classifier that predicts with any PyTorch module, for `predict`, `evaluate`, `slide`, ...

        Args:
            module: Takes a batch ``(B, 3, input_px, input_px)``, float32 RGB in 0-1 less ``mean`` over
                ``std``; returns logits ``(B, n_classes)``, or for two classes the second's alone, ``(B, 1)``.
            class_names: In the order of the logits.
            input_px: Side of the square the module takes.
            mpp: Micrometres per pixel at which patches are cut; None where unknown (no slide can be mapped).
            mean: Per channel, of values in 0-1.
            std: Per channel.
            patch_px: Side of a patch at ``mpp``, resized to ``input_px``; the same by default.
            positive_class: Of two classes, the one whose probability decides; by default the second.
            threshold: For two classes, from which probability a patch is predicted positive.
            resize: ``"nearest"``, ``"bilinear"`` or ``"bicubic"``.
            licence: Of the weights.

        Raises:
            RunError: If the module does not take such a batch, or its output does not fit the classes.
        """
        from biopsy.models.networks.wrapped import WrappedNetwork

        names = [str(name) for name in class_names]
        binary = len(names) == 2
        if len(set(names)) != len(names) or len(names) < 2:
            raise RunError(f"class_names={names}: give two or more names, each once")
        if positive_class is not None and (not binary or positive_class not in names):
            raise RunError(f"positive_class={positive_class!r} is none of two classes {names}")
        if binary and not 0 <= threshold <= 1:
            raise RunError(f"threshold={threshold!r} is no probability")
        frozen = Threshold(value=float(threshold), rule="given", chosen_on=None)
        info = ClassifierInfo(
            network=f"wrapped:{type(module).__module__}.{type(module).__qualname__}",
            class_names=names,
            positive_class=(positive_class or names[1]) if binary else None,
            patch_px=patch_px or input_px,
            mpp=mpp,
            preprocessing=Preprocessing(input_px=input_px, resize=resize, mean=mean, std=std),
            thresholds=[frozen] if binary else [],
            conformal={"reason": "a wrapped module was calibrated on no patients"},
            licence=licence,
        )
        return cls(info, WrappedNetwork(module, len(names), input_px))

    @property
    def network(self) -> "nn.Module":
        """The network that predicts, in evaluation mode: with ``tta``, the mean over symmetries.

        Raises:
            RunError: If the weights do not fit it.
        """
        if self.info.tta == "none":
            return self.base_network
        from biopsy.models.networks.symmetry import SymmetryAveraged

        return SymmetryAveraged(self.base_network).eval()

    @property
    def base_network(self) -> "nn.Module":
        """The network that sees one view of a patch; on the CPU until moved, read when it is first used."""
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
                f"{self.path} was made of the module {info.network.removeprefix('wrapped:')}, whose code it "
                "does not hold: wrap the module again with Classifier.wrap"
            )
        tensors, _ = read_tensors(weights, framework="pt", keep=lambda name: not _is_extra(name))
        n_classes, input_px = len(info.class_names), info.preprocessing.input_px
        parameters: Any = info.params
        build = partial(build_network, info.network, n_classes=n_classes, input_px=input_px, **parameters)
        with refusing(self.path / DOCUMENT, "a network"):
            with torch.device("meta"):  # no memory is taken for a network larger than the weights
                shapes = {name: tensor.shape for name, tensor in build().state_dict().items()}
        if shapes != {name: tensor.shape for name, tensor in tensors.items()}:
            raise RunError(f"{weights} does not fit the network {info.network!r} that {DOCUMENT} names")
        network = build()
        network.load_state_dict(tensors)
        return network.eval()

    def save(self, path: Path | str, *, precision: Literal["fp32", "fp16"] = "fp32") -> None:
        """Write the classifier folder, whole or not at all; of one that is there, replace its two files.

        Args:
            path: The folder.
            precision: ``"fp16"`` halves the file: kernels and matrices are rounded to half precision, biases
                and batch-norm statistics are not. It is read back as float32.

        Raises:
            UserFileError: If the folder holds something, and no classifier.
        """
        import torch
        from safetensors.torch import save

        from biopsy import __version__

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
        """Return the classifier with another test-time augmentation (None: its own).

        Calibration and thresholds stay those that were fitted with its own, and that is logged. Features have
        another distribution: out-of-distribution patches are then found by their colours alone.
        """
        if tta is None or tta == self.info.tta:
            return self
        logger.warning(
            "tta=%s: calibration and thresholds were fitted with tta=%s; out-of-distribution patches are "
            "found by colour alone",
            tta,
            self.info.tta,
        )
        other, reference = copy.copy(self), self.info.out_of_distribution
        if reference is not None:
            limits = {kind: limit for kind, limit in reference["limits"].items() if kind != "feature"}
            reference = OutOfDistribution(**{**reference, "limits": limits})
        other.info = self.info.model_copy(update={"tta": tta, "out_of_distribution": reference})
        other._base_network = self.base_network
        other.path = None  # a compiled network that lies there has the other augmentation
        return other

    def single_patch(self) -> "Classifier":
        """Return the classifier that takes each patch by itself: this one, where it uses no context."""
        if not self.info.context:
            return self
        single = copy.copy(self)
        changes: dict[str, object] = {"context": 0.0, "single_patch": {}, **self.info.single_patch}
        single.info = self.info.model_copy(update=changes)
        return single

    def for_patches(self, table: pd.DataFrame) -> "Classifier":
        """Return this classifier, or the one for single patches (and say so) where no patch has coordinates.

        Args:
            table: ``x``, ``y``, ``slide_id`` and ``patient_id`` of each patch.
        """
        if not self.info.context or has_coordinates(table):
            return self
        logger.warning(
            "no coordinates: each patch is predicted by itself, without its neighbours on the slide"
        )
        return self.single_patch()

    def add_context(self, logits: np.ndarray, table: pd.DataFrame) -> np.ndarray:
        """Return logits averaged over neighbouring patches, where the classifier uses context.

        Args:
            logits: ``(n, n_classes)``.
            table: ``x``, ``y``, ``slide_id`` and ``patient_id`` of each patch.
        """
        if not self.info.context:
            return logits
        return average_neighbours(logits, table, patch_px=self.info.patch_px, length=self.info.context)

    def check_pack(self, pack: Pack) -> None:
        """Refuse a pack whose patches were cut at another resolution, or are larger than those learned from.

        Raises:
            DataError: Saying both resolutions or sizes.
        """
        theirs, ours = pack.info, self.info
        if theirs.mpp and ours.mpp and abs(theirs.mpp / ours.mpp - 1) > MPP_TOLERANCE:
            raise DataError(
                f"{pack.path} has {theirs.mpp} um/px, the classifier was trained at {ours.mpp}: "
                "prepare the patches at that resolution"
            )
        if theirs.patch_px > ours.patch_px:
            raise DataError(
                f"{pack.path} has patches of {theirs.patch_px} px, the classifier takes patches of "
                f"{ours.patch_px} px: cut them to that size"
            )

    @property
    def sha256(self) -> str:
        """A hash over the document, without fields at their defaults, and over the weights."""
        known = plain(self.info.model_dump(mode="json", exclude_defaults=True))
        digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode())
        if not self.info.weights_sha256:  # it was never saved
            from biopsy.models.networks.wrapped import hash_network

            digest.update(hash_network(self.base_network, self.extras))
        return digest.hexdigest()

    @property
    def calibrator(self) -> Calibrator:
        """What stands between scores and probabilities; nothing in classifiers made before there was one."""
        return calibrator_from_dict(self.info.calibrator)

    def calibrated_scores(self, logits: np.ndarray) -> np.ndarray:
        """Turn logits into scores ``(N, n_classes)`` whose softmax are the calibrated probabilities.

        An exported model puts these out: of temperature and Platt ``slope * scores + intercepts``.
        """
        return self.calibrator.scale(score_classes(logits, self.info.outputs))

    def probs(self, logits: np.ndarray) -> np.ndarray:
        """Turn logits into calibrated probabilities ``(N, n_classes)``, summing to one.

        Two sigmoid outputs become one probability as p1 / (p0 + p1), which keeps the arg-max.
        """
        scores = self.calibrated_scores(logits)
        exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
        return exponentials / exponentials.sum(axis=1, keepdims=True)

    @property
    def threshold(self) -> float | None:
        """The frozen threshold on the positive class's probability; None takes the likeliest class."""
        return self.info.thresholds[0]["value"] if self.info.thresholds else None

    def abstains(self, probs: np.ndarray) -> np.ndarray | None:
        """Say which patches get no answer, bool ``(N,)``; None where the classifier can guarantee nothing.

        Args:
            probs: Calibrated probabilities, ``(N, n_classes)``.
        """
        quantiles = self.info.conformal.get("quantiles")
        if quantiles is None:
            return None
        return abstain(predict_sets(probs, quantiles), decide(probs, self.positive_index, self.threshold))

    @property
    def frozen(self) -> FrozenThreshold | None:
        """The threshold that decides; None where there is none."""
        if not self.info.thresholds:
            return None
        first = self.info.thresholds[0]
        return FrozenThreshold(value=first["value"], rule=first["rule"], chosen_on=first["chosen_on"])


def _is_extra(name: str) -> bool:
    return name.startswith(_EXTRA)


def _halve(name: str, tensor: "Tensor") -> "Tensor":
    """Round kernels, matrices and the features' precision matrix to half precision, what else describes
    training patches to single precision."""
    if _is_extra(name) and name != f"{_EXTRA}feature_precision":
        return tensor.float()
    return tensor.half() if tensor.is_floating_point() and tensor.ndim > 1 else tensor


def score_classes(logits: np.ndarray, outputs: str) -> np.ndarray:
    """Return scores ``(N, n_classes)`` whose softmax are the probabilities: of sigmoids, their logarithms."""
    logits = logits.astype(np.float64)
    return -np.logaddexp(0, -logits) if outputs == "sigmoid" else logits
