"""Checkpoints: the state of a training after an epoch, in one atomic file.

Tensors are in a safetensors file, other values (epoch, history, optimiser counters) as JSON in its header,
with a hash of both; altered checkpoints are refused. The weights of the best epoch are in a file named by the
epoch, to which the last checkpoint refers, so that the files are consistent after any interruption.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt
from safetensors.torch import save

from biopsy.core.errors import FileFormatError, RunError
from biopsy.core.files import write_atomic
from biopsy.core.loaders import parse_json, read_tensors, validate
from biopsy.training.runs import EpochRecord
from biopsy.training.weight_averaging import WeightAverage

FORMAT = "biopsy-checkpoint/3"
LAST = "last.safetensors"


@dataclass
class Progress:
    """Training state between epochs, besides weights and optimiser."""

    epoch: int = 0
    """Epochs finished."""
    step: int = 0
    """Optimiser updates made."""
    best_epoch: int | None = None
    best_value: float | None = None
    history: list[EpochRecord] = field(default_factory=list)
    """The log, one record per epoch."""


class _Past(BaseModel):
    model_config = ConfigDict(extra="allow")

    epoch: PositiveInt
    val_loss: float | None = None


class _Progress(BaseModel):
    epoch: NonNegativeInt
    step: NonNegativeInt
    best_epoch: PositiveInt | None
    best_value: float | None
    history: list[_Past]


class _Header(BaseModel):
    """Header of a checkpoint."""

    progress: _Progress
    optimiser: dict[NonNegativeInt, dict[str, float | int | bool]]
    groups: list[dict[str, float | int]]


def save_checkpoint(
    folder: Path,
    network: torch.nn.Module,
    optimiser: torch.optim.Optimizer,
    progress: Progress,
    average: WeightAverage | None = None,
) -> None:
    """Write the state after an epoch, and the (averaged) weights if it is the best so far."""
    weights = _to_cpu(network.state_dict())
    averaged = {} if average is None else _to_cpu(average.state)
    if progress.best_epoch == progress.epoch:
        _write(folder / _best_name(progress.epoch), averaged or weights, {"epoch": progress.epoch})
    tensors = {f"network.{name}": tensor for name, tensor in weights.items()}
    tensors |= {f"average.{name}": tensor for name, tensor in averaged.items()}
    scalars: dict[str, dict[str, object]] = {}
    document = optimiser.state_dict()
    for index, state in document["state"].items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimiser.{index}.{name}"] = value.detach().cpu().contiguous()
            elif value is not None:
                scalars.setdefault(str(index), {})[name] = value
    groups = [
        {name: value for name, value in group.items() if _is_number(value)}
        for group in document["param_groups"]
    ]
    _write(folder / LAST, tensors, {"progress": vars(progress), "optimiser": scalars, "groups": groups})
    _remove_superseded(folder, progress.best_epoch)


def load_checkpoint(
    folder: Path,
    network: torch.nn.Module,
    optimiser: torch.optim.Optimizer,
    device: torch.device,
    average: WeightAverage | None = None,
) -> Progress:
    """Restore network, optimiser and average from the last checkpoint, if there is one.

    Weights of other epochs than its best one, left by an interruption while it was written, are removed.
    """
    if not (folder / LAST).exists():
        return Progress()
    tensors, header = _read(folder / LAST)
    try:
        parsed = validate(folder / LAST, _Header, header)
    except FileFormatError as error:
        raise RunError(f"{error}: start a new run") from None
    _fill(network, _tensors_of(tensors, "network"), folder / LAST)
    try:
        if average is not None:
            for name, value in _tensors_of(tensors, "average").items():
                average.state[name].copy_(value)
        _fill_optimiser(optimiser, parsed, _tensors_of(tensors, "optimiser"), device)
    except (RuntimeError, ValueError, KeyError, TypeError, IndexError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RunError(
            f"{folder / LAST} does not fit the recipe of the run ({reason}): start a new run"
        ) from None
    stored = header["progress"]
    assert isinstance(stored, dict)
    progress = Progress(**{name: stored[name] for name in vars(Progress())})
    _remove_superseded(folder, progress.best_epoch)
    return progress


def _remove_superseded(folder: Path, best_epoch: int | None) -> None:
    """Remove the weights of epochs that are no longer the best."""
    for path in folder.glob("best-*.safetensors"):
        if best_epoch is None or path.name != _best_name(best_epoch):
            path.unlink()


def _fill_optimiser(
    optimiser: torch.optim.Optimizer,
    header: _Header,
    tensors: dict[str, torch.Tensor],
    device: torch.device,
) -> None:
    """Restore the state of an optimiser from a checkpoint."""
    weights = [weight for group in optimiser.param_groups for weight in group["params"]]
    state: dict[int, dict[str, object]] = {index: dict(values) for index, values in header.optimiser.items()}
    for name, value in tensors.items():
        index, _, key = name.partition(".")
        if value.ndim and value.shape != weights[int(index)].shape:
            raise ValueError(f"{name} has the shape {tuple(value.shape)}")
        state.setdefault(int(index), {})[key] = value if key == "step" else value.to(device)
    document = optimiser.state_dict()
    document["state"] = state
    for group, values in zip(document["param_groups"], header.groups, strict=True):
        group |= {name: value for name, value in values.items() if name != "params"}
    optimiser.load_state_dict(document)
    _lay_out_like_weights(optimiser)


def _lay_out_like_weights(optimiser: torch.optim.Optimizer) -> None:
    """Store moments in the memory format of their weights, as needed by PyTorch's fused steps."""
    for weight, state in optimiser.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == weight.shape:
                state[name] = torch.empty_like(weight).copy_(value)


def load_weights(folder: Path, network: torch.nn.Module, epoch: int | None) -> None:
    """Load the (averaged) weights of the best epoch, or of the last (None)."""
    path = folder / (LAST if epoch is None else _best_name(epoch))
    tensors, _ = _read(path)
    if epoch is None:
        tensors = _tensors_of(tensors, "average") or _tensors_of(tensors, "network")
    _fill(network, tensors, path)


def _tensors_of(tensors: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    prefix = f"{kind}."
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _fill(network: torch.nn.Module, weights: dict[str, torch.Tensor], path: Path) -> None:
    try:
        network.load_state_dict(weights)
    except RuntimeError:
        raise RunError(f"{path} is of another network than the recipe of the run: start a new run") from None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _best_name(epoch: int) -> str:
    return f"best-{epoch:04d}.safetensors"


def _to_cpu(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def _write(path: Path, tensors: dict[str, torch.Tensor], header: Mapping[str, object]) -> None:
    document = {"format": FORMAT, **header}
    document["sha256"] = _hash(tensors, document)
    # safetensors writes several metadata in a random order: with one, equal checkpoints are equal files
    write_atomic(path, save(tensors, metadata={"biopsy": json.dumps(document)}))


def _hash(tensors: dict[str, torch.Tensor], document: Mapping[str, object]) -> str:
    digest = hashlib.sha256(json.dumps(document).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    try:
        tensors, texts = read_tensors(path, framework="pt")
        header = parse_json(texts.get("biopsy", "null"), path, allow_nan=True)
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            raise FileFormatError(path, "format", f"is not a checkpoint of format {FORMAT!r}")
        if header.pop("sha256", None) != _hash(tensors, header):
            raise FileFormatError(path, "altered", "was changed since it was written")
    except FileFormatError as error:
        raise RunError(f"{error}: start a new run") from None
    return tensors, header
