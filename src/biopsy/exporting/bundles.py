"""Bundles: a classifier as a folder that WSInfer, QuPath's WSInfer extension and ONNX Runtime can run.

A bundle is a classifier folder (``classifier.json``, ``weights.safetensors``) with the same network in other
formats: ``torchscript_model.pt`` and ``config.json`` for WSInfer and QuPath, ``model.onnx`` with a short
script, ``openvino/`` for slide maps without PyTorch, a model card, and a parity report. Networks that do not
agree are not written.
"""

from dataclasses import dataclass
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import Final

import cv2
import numpy as np

from biopsy.core.errors import BiopsyError, DataError, RunError, first_line
from biopsy.core.files import create_directory, hash_files, write_json
from biopsy.core.results import Output, Table
from biopsy.core.text import count
from biopsy.data.packs import Pack
from biopsy.data.predictions import decide
from biopsy.exporting.formats import FORMATS
from biopsy.exporting.hub import CARD, DOCUMENT, FORMAT
from biopsy.exporting.model_card import Int8Difference, Parity, card_of_run, gather_card, metadata_of_run
from biopsy.models.classifier import WEIGHTS, Classifier
from biopsy.models.compiling import write_quantised
from biopsy.models.engine import Engine
from biopsy.models.importers.wsinfer import is_wsinfer
from biopsy.models.inference import predict_logits
from biopsy.models.openvino_runtime import FOLDER, INT8_MODEL, MODEL, CompiledRuntime, read_compiled
from biopsy.phantom.cohort import iter_patches
from biopsy.training.open_model import open_classifier, open_run
from biopsy.training.runs import Run

PARITY_FORMAT: Final = "biopsy-parity/1"
PARITY = "parity.json"
TOLERANCE = 1e-4
"""Tolerance of probabilities."""
PARITY_PATCHES = 256
INT8_PATCHES = 512
"""Patches for the ranges of activations, and as many others on which the difference is measured."""


@dataclass(frozen=True)
class Bundle(Output):
    """Result of `export`.

    Attributes:
        parity: The content of ``parity.json``.
    """

    path: Path
    parity: Parity

    def blocks(self) -> list[str | Table]:
        parity = self.parity
        differences = parity["largest_difference"].items()
        table = Table(
            ["formats", "largest difference of a probability"],
            [[pair, f"{difference['probs']:.1e}"] for pair, difference in differences],
            note=f"On {parity['n_patches']:,} patches; tolerance {parity['tolerance']:g}.",
        )
        if "int8" not in parity:
            return [str(self.path), table]
        int8 = parity["int8"]
        measured = f"int8 on {count(int8['n_patches'], 'other patch')}"
        changed = f"{int8['changed_predictions']:.1%} of predicted classes change"
        return [str(self.path), table, f"{measured}: largest difference {int8['largest']:.3f}, {changed}"]

    def to_json(self) -> dict[str, object]:
        return {"path": self.path, **self.parity}


def export(
    model: Run | Classifier | Path | str,
    out: Path | str,
    *,
    data: Pack | Path | str | None = None,
    mpp: float | None = None,
    int8: bool = False,
) -> Bundle:
    """Write a bundle: a folder that WSInfer, QuPath's WSInfer extension and ONNX Runtime run.

    The exported networks return calibrated scores, so that the softmax of these programs returns the
    probabilities of the classifier. Their agreement is tested on patches of a pack before the output folder
    is created.

    Args:
        model: Finished run, classifier, or name of a shipped classifier.
        out: Output folder; must not exist.
        data: Pack on whose patches agreement is tested (default: the run's own; of a classifier, synthetic
            patches). Labels are not read.
        mpp: Pixel size of the patches in µm. Required if the classifier does not record it.
        int8: Also write a network with 8-bit weights and activations for ``--precision int8``; the ranges of
            activations come from patches of the pack, and ``parity.json`` records the differences.

    Raises:
        RunError: If the model is not finished, ``out`` exists, the exported networks return other
            probabilities, or the pixel size is unknown.
        DataError: If the pack does not match the classifier, or is missing.
        MissingExtra: If onnx, onnxruntime or, for ``int8``, nncf is not installed.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out} exists already: name a folder that does not")
    model_folder = None if isinstance(model, Run | Classifier) else Path(model)
    if model_folder is not None and is_wsinfer(model_folder) and not (model_folder / WEIGHTS).is_file():
        raise RunError(f"{model} is a WSInfer model already: use its folder in other programs")
    classifier = _with_mpp(open_classifier(model), mpp, model)
    run = open_run(model)
    pack = _find_pack(run, data)
    if pack is None:
        if int8:
            raise DataError("quantisation needs patches like those to be predicted: pass --data PACK")
        patches = draw_patches(classifier.info.patch_px)
    else:
        classifier.check_pack(pack)
        patches = _choose_patches(pack, classifier.info.patch_px, PARITY_PATCHES)
        if int8 and len(patches) < 2:
            raise DataError(
                f"{pack.path} has one whole patch of {classifier.info.patch_px} px; quantisation needs at "
                "least 2: one for the ranges of activations, another to measure the difference"
            )
    with create_directory(out) as folder:
        classifier.save(folder)
        write_networks(classifier, folder)
        parity = measure_parity(classifier, folder, patches)
        parity["pack"] = {
            "name": "synthetic patches" if pack is None else pack.path.name,
            "content_sha256": None if pack is None else pack.info.content_sha256,
        }
        _require_parity(parity)
        if int8 and pack is not None:
            chosen = _choose_patches(pack, classifier.info.patch_px, 2 * INT8_PATCHES)
            write_quantised(classifier, folder, chosen[::2])
            parity["int8"] = measure_int8(classifier, folder, chosen[1::2])
        write_json(folder / PARITY, parity)
        facts = gather_card(classifier, run, parity)
        (folder / CARD).write_text(metadata_of_run(facts) + "\n" + card_of_run(facts), encoding="utf-8")
        write_json(folder / DOCUMENT, _describe(classifier, hash_files(folder)))
    return Bundle(out, parity)


def write_networks(classifier: Classifier, folder: Path) -> None:
    """Write a network in every registered format into its classifier's folder."""
    for form in FORMATS.values():
        try:
            form.write(classifier, folder)
        except RuntimeError as error:
            if isinstance(error, BiopsyError):
                raise
            reason = first_line(error)
            raise RunError(f"the network {classifier.info.network} cannot be exported: {reason}") from error


def measure_parity(classifier: Classifier, folder: Path, patches: np.ndarray) -> Parity:
    """Compare the predictions of the classifier and of the exported networks."""
    info, single = classifier.info, classifier.single_patch()
    logits = predict_logits(single.network, info.preprocessing, patches, engine=Engine("cpu"))
    probs = {"PyTorch": single.probs(logits)}
    versions = {"torch": version("torch")}
    for name, form in FORMATS.items():
        result = form.predict(single, folder, patches)
        if result is not None:
            probs[name] = result
            versions |= {package: version(package) for package in form.packages}
    differences = {
        f"{first} and {second}": {"probs": float(np.abs(probs[first] - probs[second]).max())}
        for first, second in combinations(probs, 2)
    }
    return Parity(
        format=PARITY_FORMAT,
        n_patches=len(patches),
        tolerance=TOLERANCE,
        largest_difference=differences,
        versions=versions,
    )


def measure_int8(classifier: Classifier, folder: Path, patches: np.ndarray) -> Int8Difference:
    """Compare the quantised network in a folder with the network in float32."""
    single = classifier.single_patch()
    probs, preds = [], []
    for precision, name in (("fp32", MODEL), ("int8", INT8_MODEL)):
        model = read_compiled(folder / FOLDER, classifier, name)
        runtime = CompiledRuntime(classifier, model, precision, n_threads=1)
        probs.append(single.probs(runtime.logits(patches)))
        preds.append(decide(probs[-1], single.positive_index, single.threshold))
    difference = np.abs(probs[0] - probs[1]).max(axis=1)
    return Int8Difference(
        n_patches=len(patches),
        largest=float(difference.max()),
        median=float(np.median(difference)),
        changed_predictions=float((preds[0] != preds[1]).mean()),
        nncf=version("nncf"),
    )


def _require_parity(parity: Parity) -> None:
    """Check that differences are within the tolerance and not NaN."""
    for pair, values in parity["largest_difference"].items():
        if not values["probs"] <= parity["tolerance"]:
            raise RunError(
                f"{pair} differ by {values['probs']:.2g} in a probability on {parity['n_patches']} patches "
                f"where at most {parity['tolerance']:g} is allowed: no bundle was written"
            )


def _describe(classifier: Classifier, files: dict[str, str]) -> dict[str, object]:
    info = classifier.info
    return {
        "format": FORMAT,
        "class_names": info.class_names,
        "positive_class": info.positive_class,
        "patch_px": info.patch_px,
        "mpp": info.mpp,
        "threshold": info.thresholds[0] if info.thresholds else None,
        "classifier_sha256": classifier.sha256,
        "version": info.version,
        "files": files,
    }


def _with_mpp(classifier: Classifier, mpp: float | None, model: object) -> Classifier:
    """Return a copy of a classifier with a known pixel size."""
    recorded = classifier.info.mpp
    if mpp is not None and not 0 < mpp < 1000:
        raise RunError(f"mpp is {mpp}; it must be between 0 and 1000 um/px")
    if mpp is not None and recorded is not None and mpp != recorded:
        raise RunError(f"the classifier was trained at {recorded} um/px: omit --mpp {mpp}")
    if mpp is None and recorded is None:
        raise RunError(
            f"{model} does not record the pixel size of its patches, which slides require: pass --mpp (um/px)"
        )
    info = classifier.info.model_copy(update={"mpp": recorded if mpp is None else mpp})
    return type(classifier)(info, classifier.base_network, classifier.extras)


def _find_pack(run: Run | None, data: Pack | Path | str | None) -> Pack | None:
    if data is not None:
        return Pack.open(data)
    return None if run is None else run.open_pack(verify=False)


def draw_patches(patch_px: int) -> np.ndarray:
    """Return synthetic patches, uint8 ``(n, patch_px, patch_px, 3)``."""
    images = [patch.image for patch in iter_patches(n_patients=1, patches_per_patient=PARITY_PATCHES)]
    return np.stack([cv2.resize(image, (patch_px, patch_px)) for image in images])


def _choose_patches(pack: Pack, patch_px: int, most: int) -> np.ndarray:
    """Return full-size patches, evenly spaced in the pack, uint8 ``(n, patch_px, patch_px, 3)``."""
    full_size = np.flatnonzero((pack.sizes == patch_px).all(axis=1))
    if not len(full_size):
        raise DataError(f"{pack.path} has no whole patch of {patch_px} px: agreement cannot be tested on it")
    rows = full_size[np.unique(np.linspace(0, len(full_size) - 1, min(most, len(full_size))).astype(int))]
    return np.array(pack.patches[rows, :patch_px, :patch_px])
