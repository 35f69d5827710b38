"""ONNX, with a script that runs it and refuses the same images as `predict`."""

import warnings
from pathlib import Path

import numpy as np
import torch

from biopsy.core.errors import MissingExtra
from biopsy.exporting.formats import Exporter, register_exporter
from biopsy.exporting.host_network import HostNetwork, example_batch, host_batches, softmax
from biopsy.models.classifier import Classifier

ONNX, EXAMPLE = "model.onnx", "run_onnx.py"
OPSET = 17

RUN_ONNX = '''\
"""Probabilities of patches by ONNX Runtime alone: python run_onnx.py PATCH.png ..."""
import io, json, sys
from pathlib import Path
import numpy, onnxruntime
from PIL import Image
folder = Path(__file__).parent
config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
session = onnxruntime.InferenceSession(folder / "model.onnx")
side = config["patch_size_pixels"]
def read(name):
    data = Path(name).read_bytes()
    image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "TIFF", "BMP", "WEBP"))
    if image.size != (side, side):
        raise ValueError(f"is {image.width}x{image.height} px, the classifier takes {side}x{side}")
    if image.mode not in ("RGB", "L") or getattr(image, "n_frames", 1) > 1 or "transparency" in image.info:
        raise ValueError(f"is of mode {image.mode} or has several frames; save it as 8-bit RGB")
    depths = [data[24]] if image.format == "PNG" else getattr(image, "tag_v2", {}).get(258, [8])
    if max(depths) > 8:
        raise ValueError(f"has {max(depths)} bits per channel; save it as 8-bit RGB")
    return image.convert("RGB")
skipped = 0
for name in sys.argv[1:]:
    try:
        pixels = numpy.asarray(read(name), numpy.float32).transpose(2, 0, 1)[None] / 255
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        print(f"skipped: {name}: {error}", file=sys.stderr)
        skipped += 1
        continue
    scores = numpy.exp(session.run(None, {"patches": pixels})[0][0].astype(float))
    print(name, dict(zip(config["class_names"], (scores / scores.sum()).tolist())))
sys.exit(3 if skipped else 0)
'''


def write(classifier: Classifier, folder: Path) -> None:
    """Write ``model.onnx`` and ``run_onnx.py``."""
    try:
        import onnx  # noqa: F401  (torch needs it)
    except ImportError:
        raise MissingExtra("export", "writing ONNX") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing; agreement is tested afterwards
        torch.onnx.export(
            HostNetwork(classifier),
            (example_batch(classifier),),
            str(folder / ONNX),
            dynamo=False,  # the newer exporter takes 20 to 100 times as long for the same graph
            opset_version=OPSET,
            input_names=["patches"],
            output_names=["scores"],
            dynamic_axes={"patches": {0: "n_patches"}, "scores": {0: "n_patches"}},
        )
    (folder / EXAMPLE).write_text(RUN_ONNX, encoding="utf-8")


def predict(classifier: Classifier, folder: Path, patches: np.ndarray) -> np.ndarray:
    """Return the probabilities computed by ONNX Runtime."""
    try:
        import onnxruntime
    except ImportError:
        raise MissingExtra("export", "comparing ONNX with PyTorch") from None
    session = onnxruntime.InferenceSession(str(folder / ONNX), providers=["CPUExecutionProvider"])
    result = [session.run(None, {"patches": part.numpy()})[0] for part in host_batches(patches)]
    return softmax(np.concatenate(result))


register_exporter(Exporter("ONNX Runtime", write, predict, ("onnxruntime",)))
