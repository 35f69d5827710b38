"""Opening of models: run, classifier, bundle, shipped name, hub name or WSInfer model."""

from pathlib import Path

from biopsy.core.errors import RunError, suggest
from biopsy.models.classifier import DOCUMENT, Classifier, Tta
from biopsy.models.hub import is_on_hub, open_from_hub
from biopsy.models.shipped import is_shipped, list_shipped, open_shipped
from biopsy.training.runs import DOCUMENT as RUN
from biopsy.training.runs import Run


def open_classifier(
    model: Run | Classifier | Path | str, *, trust_model: str | None = None, tta: Tta | None = None
) -> Classifier:
    """Return the classifier of a run, folder, bundle or WSInfer model, or the one that ships by that name.

    Args:
        model: A finished run, a classifier, a bundle (its classifier is read, its TorchScript is not), the
            folder of a WSInfer model, or a name of `biopsy.models.shipped.list_shipped`, which a local model
            of the same name hides; or ``hf:ORG/NAME[@REVISION]`` on the Hugging Face hub.
        trust_model: SHA-256 of a WSInfer model's TorchScript, which runs only if this is named.

    Raises:
        RunError: If it is none of these, or not finished, altered or not trusted.
        HubError: If the hub does not give it.
    """
    return _open(model, trust_model).with_tta(tta)


def open_run(model: Run | Classifier | Path | str) -> Run | None:
    """Return the run that a model is, None if it is something else."""
    if isinstance(model, Classifier):
        return None
    return Run.open(model) if isinstance(model, Run) or (Path(model) / RUN).is_file() else None


def _open(model: Run | Classifier | Path | str, trust_model: str | None) -> Classifier:
    if isinstance(model, Classifier):
        return model
    if not isinstance(model, Run):
        if is_on_hub(model):
            return open_from_hub(model)
        if is_shipped(model):
            return open_shipped(model)
        if (Path(model) / DOCUMENT).is_file():
            return Classifier.load(model)
        from biopsy.models.importers.wsinfer import is_wsinfer, open_wsinfer

        if is_wsinfer(model):
            return open_wsinfer(model, trust_model=trust_model)
    try:
        return Run.open(model).classifier
    except RunError as error:
        if isinstance(model, Run) or (Path(model) / RUN).exists():
            raise
        raise RunError(
            f"{model} is neither a run, a classifier, a bundle nor a classifier that ships: "
            f"{suggest(str(model), list_shipped())}"
        ) from error
