"""Explanation of one patch: saliency, out-of-distribution score, nearest training patches."""

import base64
import math
from collections.abc import Mapping

import cv2
import numpy as np

from biopsy.app.pictures import encode_jpeg
from biopsy.app.scenes import Sheet
from biopsy.data.pack_files import pad
from biopsy.evaluation.saliency.maps import explain_patches
from biopsy.models.classifier import Classifier
from biopsy.models.engine import Engine
from biopsy.models.inference import predict_with_features
from biopsy.models.out_of_distribution import out_of_distribution_scores
from biopsy.plotting.patches import scale_maps, superimpose

_SIDE_PX = 240


def explain_patch(classifier: Classifier, pixels: np.ndarray) -> dict[str, object]:
    """Return saliency and out-of-distribution score of a patch.

    Args:
        pixels: uint8 ``(h, w, 3)``.

    Returns:
        ``image`` and ``saliency`` (data addresses), ``class`` whose score is explained, and ``ood``:
        distances as multiples of their limits, None where the classifier has no reference.
    """
    engine = Engine("auto")
    patches = pad(pixels, classifier.info.patch_px)[None]
    sizes = np.array([[pixels.shape[1], pixels.shape[0]]])
    _, features = predict_with_features(classifier, patches, sizes, engine=engine)
    ood_score = out_of_distribution_scores(classifier, patches, sizes, features)
    explanation = explain_patches(classifier, patches, sizes, "saliency", engine=engine)
    saliency = scale_maps(explanation.maps[0, 0, : pixels.shape[0], : pixels.shape[1]])
    return {
        "image": _picture(pixels),
        "saliency": _picture(superimpose(pixels, saliency)),
        "class": classifier.info.class_names[int(explanation.class_index[0])],
        "ood": None if ood_score.empty else _describe_ood(ood_score.iloc[0].to_dict()),
    }


def _describe_ood(row: Mapping[str, float]) -> dict[str, object]:
    """Return the distances of a patch, None where one has no limit to be compared with."""
    return {name: value if math.isfinite(value) else None for name, value in row.items()}


def find_nearest(sheet: Sheet, row: int) -> list[dict[str, object]]:
    """Return the training patches nearest to a patch of a run, with pictures."""
    assert sheet.classifier is not None
    _, features = predict_with_features(
        sheet.classifier, sheet.pack.patches, sheet.pack.sizes, np.array([row]), engine=Engine("auto")
    )
    [nearest] = sheet.training_reference.find_nearest(features)
    rows = sheet.pack.rows_of([item["patch_id"] for item in nearest])
    return [
        {**item, "row": int(index), "image": _picture(sheet.pixels(int(index)))}
        for item, index in zip(nearest, rows, strict=True)
    ]


def _picture(image: np.ndarray) -> str:
    """Return an image, enlarged, as a data address."""
    zoom = _SIDE_PX / max(image.shape[:2])
    size = max(1, round(image.shape[1] * zoom)), max(1, round(image.shape[0] * zoom))
    enlarged = cv2.resize(np.ascontiguousarray(image), size, interpolation=cv2.INTER_LINEAR)
    return "data:image/jpeg;base64," + base64.b64encode(encode_jpeg(enlarged)).decode()
