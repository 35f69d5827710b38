"""Checkpoints: the state of a training run after a whole epoch, in one file that is written atomically.

Tensors lie in a safetensors file; what is no tensor (epoch, history, optimiser counters) is JSON in its
header. The best epoch's weights have the epoch in their name, and the last checkpoint says which they are:
whatever moment a process is stopped at, the last checkpoint and the file it names belong together.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from biopsy.core.errors import RunError
from biopsy.core.files import write_atomic
from biopsy.training.weight_averaging import WeightAverage

FORMAT = "biopsy-checkpoint/1"
LAST = "last.safetensors"


@dataclass
class Progress:
    """What training must remember between epochs, beside weights and optimiser."""

    epoch: int = 0
    """Epochs finished."""
    step: int = 0
    """Optimiser updates made."""
    best_epoch: int | None = None
    best_value: float | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    """The log, one record an epoch."""


def save_checkpoint(
    folder: Path,
    network: torch.nn.Module,
    optimiser: torch.optim.Optimizer,
    progress: Progress,
    average: WeightAverage | None = None,
) -> None:
    """Write the state after an epoch; the (averaged) weights apart too, when it is the best so far."""
    weights = _to_cpu(network.state_dict())
    averaged = {} if average is None else _to_cpu(average.state)
    if progress.best_epoch == progress.epoch:
        _write(folder / _best_name(progress.epoch), averaged or weights, {"epoch": progress.epoch})
    tensors = {f"network.{name}": tensor for name, tensor in weights.items()}
    tensors |= {f"average.{name}": tensor for name, tensor in averaged.items()}
    scalars: dict[str, dict[str, Any]] = {}
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
    for path in folder.glob("best-*.safetensors"):
        if progress.best_epoch is None or path.name != _best_name(progress.best_epoch):
            path.unlink()


def load_checkpoint(
    folder: Path,
    network: torch.nn.Module,
    optimiser: torch.optim.Optimizer,
    device: torch.device,
    average: WeightAverage | None = None,
) -> Progress:
    """Put network, optimiser and average back to the last checkpoint; a fresh start where there is none."""
    if not (folder / LAST).exists():
        return Progress()
    tensors, header = _read(folder / LAST)
    _fill(network, _tensors_of(tensors, "network"), folder / LAST)
    if average is not None:
        for name, value in _tensors_of(tensors, "average").items():
            average.state[name].copy_(value)
    state: dict[int, dict[str, Any]] = {
        int(index): dict(values) for index, values in header["optimiser"].items()
    }
    for name, value in tensors.items():
        if name.startswith("optimiser."):
            _, index, key = name.split(".", 2)
            state.setdefault(int(index), {})[key] = value if key == "step" else value.to(device)
    document = optimiser.state_dict()
    document["state"] = state
    for group, values in zip(document["param_groups"], header["groups"], strict=True):
        group |= values
    optimiser.load_state_dict(document)
    _lay_out_like_weights(optimiser)
    return Progress(**header["progress"])


def _lay_out_like_weights(optimiser: torch.optim.Optimizer) -> None:
    """Store moments in the order in memory of their weights: PyTorch's fused steps walk both as one."""
    for weight, state in optimiser.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == weight.shape:
                state[name] = torch.empty_like(weight).copy_(value)


def load_weights(folder: Path, network: torch.nn.Module, epoch: int | None) -> None:
    """Put the (averaged) weights of the best epoch, or for None of the last, into the network."""
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
        raise RunError(f"{path} holds another network than the recipe beside it: train anew") from None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _best_name(epoch: int) -> str:
    return f"best-{epoch:04d}.safetensors"


def _to_cpu(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def _write(path: Path, tensors: dict[str, torch.Tensor], header: dict[str, Any]) -> None:
    write_atomic(path, save(tensors, metadata={"biopsy": json.dumps({"format": FORMAT, **header})}))


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["biopsy"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise RunError(f"{path} is not a readable checkpoint ({error}): train anew") from None
    if header.get("format") != FORMAT:
        raise RunError(f"{path} has format {header.get('format')!r} where {FORMAT!r} was expected")
    return tensors, header
