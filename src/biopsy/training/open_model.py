"""Opening what a user names as a model: a run, a classifier, a bundle, a model of WSInfer's."""

from pathlib import Path

from biopsy.core.errors import RunError
from biopsy.models.classifier import DOCUMENT, Classifier
from biopsy.training.runs import Run


def open_classifier(model: Run | Classifier | Path | str, *, trust_model: str | None = None) -> Classifier:
    """Give the classifier of a run, of a folder, of a bundle, of a WSInfer model, or the one given.

    Args:
        model: A finished run, a classifier, a bundle (its classifier is read, its TorchScript is not), or the
            folder of a WSInfer model.
        trust_model: SHA-256 of a WSInfer model's TorchScript, which runs only if this is named.

    Raises:
        RunError: If it is none of these, or not finished, altered or not trusted.
    """
    if isinstance(model, Classifier):
        return model
    if not isinstance(model, Run):
        if (Path(model) / DOCUMENT).is_file():
            return Classifier.load(model)
        from biopsy.models.importers.wsinfer import is_wsinfer, open_wsinfer

        if is_wsinfer(model):
            return open_wsinfer(model, trust_model=trust_model)
    try:
        return Run.open(model).classifier
    except RunError as error:
        if isinstance(model, Run) or (Path(model) / "run.json").exists():
            raise
        raise RunError(f"{model} is neither a run nor a classifier nor a bundle") from error
