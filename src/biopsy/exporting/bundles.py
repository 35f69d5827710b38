"""Bundles: a classifier as a folder that WSInfer, QuPath's WSInfer extension and ONNX Runtime can run.

A bundle is a classifier folder (``classifier.json``, ``weights.safetensors``, which is what this package
reads back) with the same thing beside it in other forms: ``torchscript_model.pt`` and ``config.json`` for
WSInfer and QuPath, ``model.onnx`` with a script of a few lines, ``openvino/`` with which this package maps
slides without loading PyTorch, a model card, and a report on whether they agree. One that does not agree is
not written.
"""

import io
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from scipy.special import softmax
from torch import nn

from biopsy.core.errors import DataError, MissingExtra, RunError
from biopsy.core.files import create_directory, sha256_file, write_json
from biopsy.data.packs import Pack
from biopsy.exporting.host_network import HostNetwork
from biopsy.exporting.model_card import card_of_run, gather_card
from biopsy.models.classifier import WEIGHTS, Classifier
from biopsy.models.compiling import write_compiled
from biopsy.models.engine import Engine
from biopsy.models.importers.wsinfer import CONFIG, SCRIPT, is_wsinfer, load_script
from biopsy.models.inference import predict_logits
from biopsy.models.openvino_runtime import FOLDER as COMPILED
from biopsy.models.openvino_runtime import CompiledRuntime, read_compiled
from biopsy.training.open_model import open_classifier
from biopsy.training.runs import Run

FORMAT: Final = "biopsy-bundle/1"
PARITY_FORMAT: Final = "biopsy-parity/1"
DOCUMENT, PARITY, ONNX, EXAMPLE, CARD = "bundle.json", "parity.json", "model.onnx", "run_onnx.py", "README.md"
TOLERANCE = 1e-4
"""The largest difference of a probability that counts as the same."""
PARITY_PATCHES = 256
OPSET = 17

RUN_ONNX = '''\
"""Probabilities of patches by ONNX Runtime alone: python run_onnx.py PATCH.png ..."""
import json, sys
from pathlib import Path
import numpy, onnxruntime
from PIL import Image
folder = Path(__file__).parent
config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
session = onnxruntime.InferenceSession(folder / "model.onnx")
for name in sys.argv[1:]:
    patch = Image.open(name).convert("RGB").resize([config["patch_size_pixels"]] * 2)
    pixels = numpy.asarray(patch, numpy.float32).transpose(2, 0, 1)[None] / 255
    scores = numpy.exp(session.run(None, {"patches": pixels})[0][0].astype(float))
    print(name, dict(zip(config["class_names"], (scores / scores.sum()).tolist())))
'''


@dataclass(frozen=True)
class Bundle:
    """What `export` wrote.

    Attributes:
        path: The folder.
        parity: What ``parity.json`` holds.
    """

    path: Path
    parity: dict[str, Any]


def export(
    model: Run | Classifier | Path | str,
    out: Path | str,
    *,
    data: Pack | Path | str | None = None,
    mpp: float | None = None,
) -> Bundle:
    """Write a bundle: a folder that WSInfer, QuPath's WSInfer extension and ONNX Runtime run as it is.

    The exported networks give calibrated scores, so that the softmax these programs apply gives the
    classifier's own probabilities. That is tried out on patches of the pack before anything is left at
    ``out``.

    Args:
        model: A finished run, or a classifier.
        out: The bundle's folder; it must not exist.
        data: The pack on whose patches parity is tried; by default the one the run was trained on. Labels are
            not looked at.
        mpp: Micrometres per pixel of the patches, where the classifier does not know.

    Raises:
        RunError: If the model is not finished, there is something at ``out``, the exported networks give
            other probabilities, or the micrometres per pixel are not known.
        DataError: If the pack does not fit the classifier, or is missing.
        MissingExtra: If onnx or onnxruntime is not installed.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out} exists already: name a folder that does not")
    place = None if isinstance(model, Run | Classifier) else Path(model)
    if place is not None and is_wsinfer(place) and not (place / WEIGHTS).is_file():
        raise RunError(f"{model} is a model in WSInfer's form already: give it to other programs as it is")
    classifier = _with_mpp(open_classifier(model), mpp, model)
    run = _find_run(model)
    pack = _find_pack(run, data, model)
    classifier.check_pack(pack)
    patches = _choose_patches(pack, classifier.info.patch_px)
    with create_directory(out) as folder:
        classifier.save(folder)
        write_networks(classifier, folder)
        (folder / EXAMPLE).write_text(RUN_ONNX, encoding="utf-8")
        parity = measure_parity(classifier, folder, patches)
        parity["pack"] = {"name": pack.path.name, "content_sha256": pack.info.content_sha256}
        _require_parity(parity)
        write_json(folder / PARITY, parity)
        (folder / CARD).write_text(card_of_run(gather_card(classifier, run, parity)), encoding="utf-8")
        files = {
            path.relative_to(folder).as_posix(): sha256_file(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        write_json(folder / DOCUMENT, _describe(classifier, files))
    return Bundle(out, parity)


def write_networks(classifier: Classifier, folder: Path) -> None:
    """Write TorchScript, its configuration, ONNX and OpenVINO's form into a classifier's folder.

    Raises:
        RunError: If the network cannot be traced.
        MissingExtra: If onnx is not installed.
    """
    network = HostNetwork(classifier)
    size = [classifier.info.patch_px] * 2
    example = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is deprecated and talks; parity judges what comes out
        try:
            with torch.no_grad():
                script = torch.jit.trace(network, example, check_trace=False)
            _write_script(script, folder / SCRIPT)
            _write_onnx(network, example, folder / ONNX)
        except RuntimeError as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise RunError(f"the network {classifier.info.network} cannot be exported: {reason}") from error
    write_json(folder / CONFIG, describe_for_host(classifier))
    write_compiled(classifier, folder)


def _write_script(script: torch.jit.ScriptModule, path: Path) -> None:
    """Write TorchScript without its debugging records, which name the folders of this machine."""
    content = io.BytesIO()
    torch.jit.save(script, content)
    with zipfile.ZipFile(content) as whole, zipfile.ZipFile(path, "w") as kept:
        for name in whole.namelist():
            if not name.endswith(".debug_pkl"):
                kept.writestr(zipfile.ZipInfo(name), whole.read(name))


def _write_onnx(network: nn.Module, example: torch.Tensor, path: Path) -> None:
    try:
        import onnx  # noqa: F401  (torch needs it)
    except ImportError:
        raise MissingExtra("export", "writing ONNX") from None
    torch.onnx.export(
        network,
        (example,),
        str(path),
        dynamo=False,  # the newer exporter takes 20 to 100 times as long for the same graph
        opset_version=OPSET,
        input_names=["patches"],
        output_names=["scores"],
        dynamic_axes={"patches": {0: "n_patches"}, "scores": {0: "n_patches"}},
    )


def describe_for_host(classifier: Classifier) -> dict[str, Any]:
    """Give ``config.json`` as WSInfer 0.6's schema and QuPath's extension want it.

    The patch is asked for at its own size: all further resizing is inside the network, by its own filter.
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


def measure_parity(classifier: Classifier, folder: Path, patches: np.ndarray) -> dict[str, Any]:
    """Compare what the classifier, its TorchScript and its ONNX say of the same patches.

    Args:
        classifier: On the CPU.
        folder: Holds what `write_networks` wrote.
        patches: uint8 ``(n, patch_px, patch_px, 3)``.

    Returns:
        ``parity.json``: for each of them, the largest difference of a probability from the classifier's.
    """
    try:
        import onnxruntime
    except ImportError:
        raise MissingExtra("export", "comparing ONNX with PyTorch") from None
    info, classifier = classifier.info, classifier.single_patch()
    logits = predict_logits(classifier.network, info.preprocessing, patches, engine=Engine("cpu"))
    batch = torch.from_numpy(patches).permute(0, 3, 1, 2).float().div(255).contiguous()
    session = onnxruntime.InferenceSession(str(folder / ONNX), providers=["CPUExecutionProvider"])
    script = load_script(folder / SCRIPT)
    first, rest = batch[:1], batch[1:]  # a batch of one and one of another size: neither may be baked in
    parts = [part for part in (first, *rest.split(64)) if len(part)]
    with torch.inference_mode():
        scripted = np.concatenate([script(part).numpy() for part in parts])
    scores = np.concatenate([session.run(None, {"patches": part.numpy()})[0] for part in parts])
    probs = {
        "PyTorch": classifier.probs(logits),
        "TorchScript": softmax(scripted.astype(np.float64), axis=1),
        "ONNX Runtime": softmax(scores.astype(np.float64), axis=1),
    }
    pairs = [("PyTorch", "TorchScript"), ("PyTorch", "ONNX Runtime"), ("TorchScript", "ONNX Runtime")]
    versions = {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__, "opset": OPSET}
    if (folder / COMPILED).is_dir():
        model = read_compiled(folder / COMPILED, classifier)
        compiled = CompiledRuntime(classifier, model, "fp32", n_threads=1)
        probs["OpenVINO"] = classifier.probs(compiled.ask(patches))
        pairs.append(("PyTorch", "OpenVINO"))
        versions |= dict([compiled.software])
    differences = {
        f"{one} and {other}": {"probs": float(np.abs(probs[one] - probs[other]).max())}
        for one, other in pairs
    }
    return {
        "format": PARITY_FORMAT,
        "n_patches": len(patches),
        "tolerance": TOLERANCE,
        "largest_difference": differences,
        "versions": versions,
    }


def _require_parity(parity: dict[str, Any]) -> None:
    """Refuse what does not say the same; NaN is refused as well."""
    for pair, values in parity["largest_difference"].items():
        if not values["probs"] <= parity["tolerance"]:
            raise RunError(
                f"{pair} differ by {values['probs']:.2g} in a probability on {parity['n_patches']} patches "
                f"where at most {parity['tolerance']:g} is allowed: no bundle was written"
            )


def _describe(classifier: Classifier, files: dict[str, str]) -> dict[str, Any]:
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
    """Give a classifier that can be saved again without changing the one it came from, and knows its mpp."""
    known = classifier.info.mpp
    if mpp is not None and not 0 < mpp < 1000:
        raise RunError(f"mpp is {mpp}; micrometres a pixel lie between 0 and 1000")
    if mpp is not None and known is not None and mpp != known:
        raise RunError(
            f"the classifier was trained at {known} um/px: --mpp {mpp} is for one that does not know"
        )
    if mpp is None and known is None:
        raise RunError(
            f"{model} does not know at how many um/px its patches were cut, and no slide can be read "
            "without that: pass --mpp"
        )
    info = classifier.info.model_copy(update={"mpp": known if mpp is None else mpp})
    return type(classifier)(info, classifier.base_network, classifier.extras)


def _find_run(model: Run | Classifier | Path | str) -> Run | None:
    if isinstance(model, Run):
        return model
    return (
        None if isinstance(model, Classifier) or not (Path(model) / "run.json").is_file() else Run.open(model)
    )


def _find_pack(run: Run | None, data: Pack | Path | str | None, model: object) -> Pack:
    if data is not None:
        return Pack.open(data)
    if run is None:
        raise DataError(f"parity is tried on real patches, and {model} names no pack: pass --data PACK")
    return run.open_pack(verify=False)


def _choose_patches(pack: Pack, patch_px: int) -> np.ndarray:
    """Give whole patches from all over the pack, uint8 ``(n, patch_px, patch_px, 3)``."""
    whole = np.flatnonzero((pack.sizes == patch_px).all(axis=1))
    if not len(whole):
        raise DataError(f"{pack.path} has no whole patch of {patch_px} px: parity cannot be tried on it")
    rows = whole[np.unique(np.linspace(0, len(whole) - 1, min(PARITY_PATCHES, len(whole))).astype(int))]
    return np.array(pack.patches[rows, :patch_px, :patch_px])
