"""What a recipe may say, with types and limits."""

from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)

from biopsy.statistics.thresholds import parse_rule

FORMAT: Final = "biopsy-recipe/1"
DEFINING_TABLES = ("preprocessing", "model", "augmentation", "train", "decision", "as_published")
"""The tables whose values define a result; the others describe where the recipe comes from."""


def _check_rule(rule: str) -> str:
    parse_rule(rule)
    return rule


Channels = Field(min_length=3, max_length=3)
Rule = Annotated[str, AfterValidator(_check_rule)]
Calibration = Literal["platt", "intercept", "temperature", "isotonic", "none"]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Origin(_Table):
    """Who published the method, what they claimed, what is wrong with the claim."""

    authors: str = ""
    title: str = ""
    year: int | None = None
    dataset: str = ""
    """The data set of the publication: ``idc`` or ``hcd``; empty for recipes of no publication."""
    updates: NonNegativeInt = 0
    """Optimiser updates of the published training; 0 where it is not stated."""
    claim: dict[str, float] = {}
    """What the publication reports, on its own split."""
    corrected: dict[str, float] = {}
    """The same result with the positive class named, worked out from its confusion matrix."""
    confusion: dict[str, int] = {}
    flaws: list[str] = []
    not_stated: list[str] = []
    cost: str = ""


class Preprocessing(_Table):
    """How pixels become the network's input."""

    input_px: PositiveInt = 48
    resize: Literal["nearest", "bilinear", "bicubic"] = "nearest"
    resize_mode: Literal["stretch", "pad"] = "stretch"
    """``stretch`` crops a padded patch back to its true size and stretches it; ``pad`` keeps the padding."""
    channel_order: Literal["rgb", "bgr"] = "rgb"
    scale: PositiveFloat = 1 / 255
    mean: Annotated[list[float], Channels] = [0.0, 0.0, 0.0]
    std: Annotated[list[PositiveFloat], Channels] = [1.0, 1.0, 1.0]
    standardise: Literal["none", "featurewise"] = "none"
    """``featurewise`` replaces mean and std by those of the training patches."""
    feed: Literal["recipe", "encoder"] = "recipe"
    """``encoder``: input size, channel order, scale, mean and std are not those above but the ones of the
    pretrained weights, and patches are resized to the encoder's um/px."""


class Model(_Table):
    """Which network, and its parameters."""

    name: str
    """A network of this package, or any of ``timm:NAME``, ``torchvision:NAME`` and ``hf-hub:ORG/NAME``."""
    params: dict[str, Any] = {}
    pretrained: bool = False
    """Start from ``weights`` rather than from random ones."""
    weights: str = ""
    """A tag of ``biopsy list models``, or the path of a file."""
    weights_sha256: str = ""
    """Refuse a file with another hash; empty takes any."""
    trainable: str = "all"
    """``all``, ``head``, or the first stage that is trained: it and those after it; the rest is frozen."""
    tta: Literal["none", "d4"] = "none"
    """Test-time augmentation. ``d4``: predicts the mean logits over the eight symmetries of a patch."""
    context: NonNegativeFloat = 0.0
    """Average the predicted logits over neighbouring patches of a slide; needs coordinates.

    A neighbour's weight falls by 1/e over so many patch sides; 0 takes each patch by itself.
    """


class Augmentation(_Table):
    """Random changes of each training patch; everything off by default."""

    rotation_deg: float = Field(default=0.0, ge=0, le=180)
    zoom: float = Field(default=0.0, ge=0, lt=1)
    """Each side is scaled within 1 plus or minus this."""
    shift: float = Field(default=0.0, ge=0, lt=1)
    """Largest shift in either axis, as a share of the side."""
    shear_deg: float = Field(default=0.0, ge=0, le=90)
    flip_horizontal: bool = False
    flip_vertical: bool = False
    fill: Literal["nearest"] = "nearest"
    rot90: bool = False
    """Turn by 0, 90, 180 or 270 degrees, pixel by pixel; patches must be square."""
    hed_jitter: float = Field(default=0.0, ge=0, le=1)
    """How far the haematoxylin and eosin amounts of a patch may be scaled, up or down, and offset, as a share
    (Tellez et al. 2018)."""
    stain_transfer: float = Field(default=0.0, ge=0, le=1)
    """Probability that a patch is given the stain that its class has in another training patient."""


class Train(_Table):
    """Optimisation."""

    loss: Literal["cross-entropy", "binary-cross-entropy"] = "cross-entropy"
    """``binary-cross-entropy``: every class has a sigmoid of its own, and their losses are averaged."""
    optimiser: Literal[
        "adagrad-keras2",
        "adagrad",
        "adam",
        "adamw",
        "sgd",
        "rmsprop",
        "rmsprop-keras2",
        "logistic-regression",
    ] = "adam"
    """``...-keras2``: as Keras 2 had it, where accumulator or epsilon were others than in Keras 3.
    ``logistic-regression`` fits the head alone, on the frozen network's features, with the L2 penalty that
    serves best on training patients left out in turn."""
    lr: PositiveFloat = 1e-3
    momentum: float = Field(default=0.0, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: NonNegativeFloat = 0.0
    """Not applied to biases and to the weights of normalisation layers."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    schedule: Literal["constant", "inverse-time", "cosine", "one-cycle", "plateau"] = "constant"
    """``one-cycle``: up from a 25th of the rate over the first 30 %, then down to 0, both along a cosine;
    ``plateau``: a tenth of the rate after every three epochs without a lower validation loss."""
    decay: NonNegativeFloat = 0.0
    """Of ``inverse-time``: lr / (1 + decay * step), counted in optimiser updates."""
    warmup_epochs: NonNegativeInt = 0
    epochs: PositiveInt = 10
    batch_size: PositiveInt = 32
    drop_last: bool = False
    """Leave out the last patches of an epoch that do not fill a batch."""
    steps_per_epoch: NonNegativeInt = 0
    """Updates after which validation looks; 0 is one pass over the training patches."""
    fraction: float = Field(default=1.0, gt=0, le=1)
    """Share of the training patches that is used, drawn once, of each class alike."""
    class_weights: Literal["none", "largest", "balanced"] = "none"
    """``largest`` is max(count) / count; ``balanced`` is total / (n_classes * count)."""
    sampling: Literal["none", "undersample", "oversample"] = "none"
    """Every class gets as many patches as the rarest (drawn once) or the commonest (drawn for each epoch)."""
    early_stopping_patience: NonNegativeInt = 0
    """Epochs without improvement of the monitored value before stopping; 0 never stops early."""
    monitor: Literal["val_loss", "val_auroc"] = "val_auroc"
    ema_decay: float = Field(default=0.0, ge=0, lt=1)
    """Decay of the exponential moving average of the weights, per update; 0 keeps none."""
    checkpoint: Literal["best", "last"] = "best"
    """Which epoch's weights become the classifier: the best on validation, or the last.

    With ``ema_decay`` these are the averaged weights, in validation too."""
    precision: Literal["fp32", "bf16"] = "fp32"


class Decision(_Table):
    """How probabilities become a class."""

    threshold: Rule = "youden"
    """``youden``, ``sensitivity=0.95``, ``specificity=0.95``, ``cost=5`` or ``argmax``, on validation."""
    calibration: Calibration = "platt"
    """Fitted on validation patients before the threshold is chosen; below five ``platt`` is the intercept
    alone. ``isotonic`` is for two classes."""
    operating_points: list[Rule] = ["youden", "sensitivity=0.95", "specificity=0.90", "cost=5"]
    """Rules of further thresholds, frozen on validation beside the one that decides."""
    abstention_error: float = Field(default=0.1, gt=0, lt=1)
    """Share of a new patient's patches whose conformal set may miss their class; smaller abstains more."""
    abstention_guarantee: Literal["class-conditional", "marginal"] = "class-conditional"
    """Whether that is promised of the patches of each class, or of all patches together."""


class AsPublished(_Table):
    """What differs when the recipe is run on the split of its publication."""

    split: dict[str, Any] = {}
    standardise: Literal["", "none", "featurewise"] = ""
    """Replaces ``preprocessing.standardise``; empty leaves it."""
    checkpoint: Literal["best", "last"] = "last"
    threshold: Rule = "argmax"
    calibration: Calibration = "none"


class Recipe(_Table):
    """Everything that defines a training result.

    See the fields of each table for units and defaults.
    """

    format: Literal["biopsy-recipe/1"] = FORMAT
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Also part of the names of folders."""
    title: str = ""
    origin: Origin = Origin()
    preprocessing: Preprocessing = Preprocessing()
    model: Model
    augmentation: Augmentation = Augmentation()
    train: Train = Train()
    decision: Decision = Decision()
    as_published: AsPublished = AsPublished()
    sources: dict[str, str] = {}
    """Dotted setting -> where its value comes from."""

    @property
    def heading(self) -> str:
        """The title, in which the encoder's name stands for "a frozen encoder"; without a title the name."""
        family, _, weights = self.model.name.rpartition(":")
        encoder = weights if family else self.model.weights or self.model.name
        return self.title.replace("a frozen encoder", f"`{encoder}`") or self.name
