"""Where and how the arithmetic runs: device, precision, memory layout; one training step; the losses."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from biopsy.core.errors import RecipeError, suggest
from biopsy.models.hardware import keep_freed_memory, torch_device

Precision = Literal["fp32", "bf16", "int8"]
LossFunction = Callable[[Tensor, Tensor], Tensor]


class Engine:
    """A device with its settings; networks are placed on it, trained and asked through it.

    Args:
        device: ``auto`` (a GPU where there is one), ``cpu``, ``cuda``, ``cuda:1`` ...
        precision: ``fp32``, ``bf16`` for mixed precision, or ``int8``: prediction by the quantised network of
            a bundle, and float32 for everything else.

    Raises:
        RecipeError: If the device or the precision does not exist here.
    """

    def __init__(self, device: str = "auto", precision: Precision = "fp32") -> None:
        if precision not in get_args(Precision):
            raise RecipeError(
                f"precision={precision!r} is not possible; {suggest(precision, get_args(Precision))}"
            )
        self.device = torch_device(device)
        self.precision = precision
        if self.device.type == "cpu":
            keep_freed_memory()

    def place(self, network: nn.Module) -> nn.Module:
        """Put a network on the device, in channels-last memory."""
        return network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def train_step(
        self,
        network: nn.Module,
        optimiser: Optimizer,
        batch: Tensor,
        target: Tensor,
        loss_fn: LossFunction,
    ) -> tuple[Tensor, Tensor]:
        """Do one update; nothing in it waits for the device.

        Args:
            network: In training mode, on this device.
            batch: ``(B, 3, H, W)`` float, as ``Preprocessing`` gives it.
            target: ``(B,)`` class indices.
            loss_fn: ``(logits, target) -> scalar``, see :func:`make_loss`.

        Returns:
            The loss before the update, a scalar, and the logits ``(B, n_classes)``; both on the device
            (``.item()`` waits for them).
        """
        optimiser.zero_grad(set_to_none=True)
        with self.autocast():
            logits = network(batch)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = loss_fn(logits, target)
        loss.backward()
        optimiser.step()
        return loss.detach(), logits.detach()

    def predict(self, network: nn.Module, batch: Tensor) -> Tensor:
        """Return float32 logits ``(B, n_classes)`` of a network in evaluation mode, without gradients."""
        with torch.inference_mode(), self.autocast():
            return network(batch).float()

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Return the context in which the network is called."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")


def outputs_of(loss: str) -> Literal["softmax", "sigmoid"]:
    """Return how the outputs of a network trained with a recipe's loss are read."""
    return "sigmoid" if loss == "binary-cross-entropy" else "softmax"


def make_loss(
    outputs: str, class_weights: Sequence[float] | None = None, *, label_smoothing: float = 0.0
) -> LossFunction:
    """Return the loss of a network with one output per class.

    The weight of a class multiplies its patches' losses and the sum is divided by the number of patches, as
    Keras does (not by the sum of the weights, as PyTorch would).

    Args:
        outputs: ``softmax``: cross-entropy; for two classes this is Keras's binary cross-entropy over two
            softmax outputs. ``sigmoid``: binary cross-entropy of each output by itself, averaged.
        class_weights: One per class; None counts all alike.
        label_smoothing: Share of the target that is spread evenly over the classes (Szegedy et al. 2016).

    Raises:
        RecipeError: If ``outputs`` is neither.
    """
    if outputs not in ("softmax", "sigmoid"):
        raise RecipeError(f"outputs={outputs!r} is not possible; {suggest(outputs, ('softmax', 'sigmoid'))}")

    def loss_fn(logits: Tensor, target: Tensor) -> Tensor:
        if outputs == "softmax":
            losses = functional.cross_entropy(
                logits, target, reduction="none", label_smoothing=label_smoothing
            )
        else:
            wanted = functional.one_hot(target, logits.shape[1]).to(logits.dtype)
            wanted = wanted * (1 - label_smoothing) + label_smoothing / logits.shape[1]
            losses = functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(dim=1)
        if class_weights is not None:
            losses = losses * weights.to(logits.device)[target]
        return losses.mean()

    weights = torch.tensor(class_weights if class_weights is not None else [], dtype=torch.float32)
    return loss_fn


def count_correct(logits: Tensor, target: Tensor, outputs: str) -> dict[str, Tensor]:
    """Count what is right in a batch, on its device.

    Args:
        logits: ``(B, n_classes)``.
        target: ``(B,)`` class indices.
        outputs: ``softmax`` or ``sigmoid``.

    Returns:
        ``accuracy``: patches right by arg-max. Of sigmoids also ``binary_accuracy``, as Keras counted until
        2020: each output by itself at .5, a patch counting by the share of its outputs that are right.
    """
    correct = {"accuracy": (logits.argmax(dim=1) == target).sum()}
    if outputs == "sigmoid":
        wanted = functional.one_hot(target, logits.shape[1]).bool()
        correct["binary_accuracy"] = ((logits > 0) == wanted).double().mean(dim=1).sum()
    return correct
