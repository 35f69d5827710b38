"""Device, precision and memory layout; training step and losses.

PyTorch is imported where it is used: commands that may need no network import this module.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, get_args

from biopsy.core.errors import RecipeError, suggest
from biopsy.models.hardware import Precision, keep_freed_memory, pick_precision, torch_device

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.optim import Optimizer

LossFunction = Callable[..., "Tensor"]


class Engine:
    """A device and precision, with training step and prediction of networks.

    Args:
        device: ``auto`` (GPU if available), ``cpu``, ``cuda``, ``cuda:1`` ...
        precision: ``fp32``, ``bf16`` for mixed precision, ``auto`` for the one of them that `pick_precision`
            chooses, or ``int8`` for prediction by the quantised network of a bundle, with float32 for
            everything else.

    Attributes:
        precision: ``fp32``, ``bf16`` or ``int8``.

    Raises:
        RecipeError: If the device or the precision is not available.
    """

    def __init__(self, device: str = "auto", precision: Precision = "fp32") -> None:
        if precision not in get_args(Precision):
            raise RecipeError(
                f"precision={precision!r} is not possible; {suggest(precision, get_args(Precision))}", "value"
            )
        self.device = torch_device(device)
        self.precision = pick_precision(precision, str(self.device))
        if self.device.type == "cpu":
            keep_freed_memory()

    def place(self, network: "nn.Module") -> "nn.Module":
        """Move a network to the device, in channels-last memory format."""
        import torch

        return network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def train_step(
        self,
        network: "nn.Module",
        optimiser: "Optimizer",
        batch: "Tensor",
        target: "Tensor",
        loss_fn: LossFunction,
        *,
        weight: float = 1.0,
    ) -> "tuple[Tensor, Tensor]":
        """Do one optimiser step, without synchronising with the device.

        Returns:
            The loss before the update, a scalar, and the logits ``(B, n_classes)``, on the device.
        """
        import torch

        optimiser.zero_grad(set_to_none=True)
        with self.autocast():
            logits = network(batch)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = loss_fn(logits, target)
        if weight != 1:
            loss = loss * weight
        loss.backward()
        optimiser.step()
        return loss.detach(), logits.detach()

    def predict(self, network: "nn.Module", batch: "Tensor") -> "Tensor":
        """Return float32 logits ``(B, n_classes)`` of a network in evaluation mode, without gradients."""
        import torch

        with torch.inference_mode(), self.autocast():
            return network(batch).float()

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Return the autocast context of the precision."""
        import torch

        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")


def outputs_of(loss: str) -> Literal["softmax", "sigmoid"]:
    """Return the output activation of a network trained with a loss."""
    return "sigmoid" if loss == "binary-cross-entropy" else "softmax"


def make_loss(
    outputs: str,
    class_weights: Sequence[float] | None = None,
    *,
    label_smoothing: float = 0.0,
    device: "torch.device | str" = "cpu",
    teacher_weight: float = 0.0,
    temperature: float = 1.0,
) -> LossFunction:
    """Return the loss of a network with one output per class.

    The function takes logits ``(B, n_classes)``, target ``(B,)``, and optionally ``sample_weight`` ``(B,)``
    and ``teacher``, probabilities ``(B, n_classes)``. Weights of classes and of patches multiply the losses
    of patches; the sum is divided by the number of patches as in Keras (not by the sum of weights as in
    PyTorch).

    Args:
        outputs: ``softmax``: cross-entropy; for two classes this is Keras's binary cross-entropy over two
            softmax outputs. ``sigmoid``: mean binary cross-entropy of the outputs.
        label_smoothing: Label smoothing factor (Szegedy et al. 2016).
        device: Of the logits; the class weights are sent there once.
        teacher_weight: Weight of the loss with the teacher's probabilities in place of the labels; that with
            the labels has the rest.
        temperature: Divides the logits in the teacher's loss, which is multiplied by its square, so that
            gradients keep their size (Hinton et al. 2015).
    """
    import torch
    from torch.nn import functional

    if outputs not in ("softmax", "sigmoid"):
        raise RecipeError(
            f"outputs={outputs!r} is not possible; {suggest(outputs, ('softmax', 'sigmoid'))}", "value"
        )

    def loss_fn(
        logits: "Tensor",
        target: "Tensor",
        sample_weight: "Tensor | None" = None,
        teacher: "Tensor | None" = None,
    ) -> "Tensor":
        if outputs == "softmax":
            losses = functional.cross_entropy(
                logits, target, reduction="none", label_smoothing=label_smoothing
            )
        else:
            one_hot = functional.one_hot(target, logits.shape[1]).to(logits.dtype)
            one_hot = one_hot * (1 - label_smoothing) + label_smoothing / logits.shape[1]
            losses = functional.binary_cross_entropy_with_logits(logits, one_hot, reduction="none").mean(
                dim=1
            )
        if teacher is not None:
            soft = soft_losses(logits / temperature, teacher) * temperature**2
            losses = (1 - teacher_weight) * losses + teacher_weight * soft
        if class_weights is not None:
            losses = losses * weights[target]
        if sample_weight is not None:
            losses = losses * sample_weight
        return losses.mean()

    def soft_losses(logits: "Tensor", probs: "Tensor") -> "Tensor":
        if outputs == "softmax":
            return functional.cross_entropy(logits, probs, reduction="none")
        return functional.binary_cross_entropy_with_logits(logits, probs, reduction="none").mean(dim=1)

    weights = torch.tensor(
        class_weights if class_weights is not None else [], dtype=torch.float32, device=device
    )
    return loss_fn


def count_correct(logits: "Tensor", target: "Tensor", outputs: str) -> "dict[str, Tensor]":
    """Count correct predictions in a batch, on its device.

    Returns:
        ``accuracy``: number of patches correct by argmax. For sigmoid also ``binary_accuracy``, as in
        Keras until 2020: sum over patches of the fraction of outputs correct at .5.
    """
    from torch.nn import functional

    correct = {"accuracy": (logits.argmax(dim=1) == target).sum()}
    if outputs == "sigmoid":
        one_hot = functional.one_hot(target, logits.shape[1]).bool()
        correct["binary_accuracy"] = ((logits > 0) == one_hot).double().mean(dim=1).sum()
    return correct
