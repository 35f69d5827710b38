"""Schema of recipes, with types and limits."""

from typing import Annotated, Final, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
)

from biopsy.recipes.preprocessing import Preprocessing
from biopsy.statistics.decisions import parse_rule

FORMAT: Final = "biopsy-recipe/1"
DEFINING_TABLES = ("preprocessing", "model", "augmentation", "train", "decision", "as_published")
"""Tables that define a result; the others describe the origin of the recipe."""


def _check_rule(rule: str) -> str:
    parse_rule(rule)
    return rule


Rule = Annotated[str, AfterValidator(_check_rule)]
Calibration = Literal["platt", "intercept", "temperature", "isotonic", "none"]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Origin(_Table):
    """Publication of the method, its reported results and their flaws."""

    authors: str = ""
    title: str = ""
    year: int | None = None
    dataset: str = ""
    """Data set of the publication: ``idc`` or ``hcd``; empty without a publication."""
    updates: NonNegativeInt = 0
    """Optimiser updates of the published training; 0 if not stated."""
    claim: dict[str, float] = {}
    """Reported results, on the published split."""
    corrected: dict[str, float] = {}
    """Reported results recomputed from the confusion matrix with the right positive class."""
    confusion: dict[str, int] = {}
    flaws: list[str] = []
    not_stated: list[str] = []
    cost: str = ""


class RecipePreprocessing(Preprocessing):
    """Preprocessing of patches, with what is fitted or looked up before training."""

    standardise: Literal["none", "featurewise"] = "none"
    """``featurewise`` replaces mean and std by those of the training patches."""
    feed: Literal["recipe", "encoder"] = "recipe"
    """``encoder``: input size, channel order, scale, mean and std are those of the pretrained weights, and
    patches are resized to the encoder's um/px."""

    def fixed(self, **values: object) -> Preprocessing:
        """Return the preprocessing of a classifier, with some values replaced."""
        settings = self.model_dump(include=set(Preprocessing.model_fields))
        return Preprocessing.model_validate(settings | values)


class Model(_Table):
    """Network and its parameters."""

    name: str
    """A network of this package, or any of ``timm:NAME``, ``torchvision:NAME`` and ``hf-hub:ORG/NAME``."""
    params: dict[str, object] = {}
    pretrained: bool = False
    """Whether to start from ``weights`` instead of random weights."""
    weights: str = ""
    """A tag of ``biopsy list models``, a file, or the folder of a run, classifier or pre-training."""
    weights_sha256: str = ""
    """Required hash of the file; empty accepts any file."""
    trainable: str = "all"
    """``all``, ``head``, or the first trainable stage; earlier stages are frozen."""
    lora_rank: NonNegativeInt = 0
    """Rank of adapters (LoRA, Hu et al. 2021) of a frozen vision transformer, merged into the classifier's
    weights; 0: none. Needs ``trainable="head"``."""
    tta: Literal["none", "d4"] = "none"
    """Test-time augmentation. ``d4``: mean logits over the eight symmetries of a patch."""
    context: NonNegativeFloat = 0.0
    """Average the predicted logits over neighbouring patches of a slide; needs coordinates.

    The value is the decay length in patch sides; 0: no averaging.
    """

    @field_validator("lora_rank")
    @classmethod
    def _freezes_the_rest(cls, rank: int, info: ValidationInfo) -> int:
        if rank and info.data.get("trainable") != "head":
            raise ValueError("adapters need model.trainable=head, the weights below them being frozen")
        return rank


class Augmentation(_Table):
    """Data augmentation; all off by default."""

    rotation_deg: float = Field(default=0.0, ge=0, le=180)
    zoom: float = Field(default=0.0, ge=0, lt=1)
    """Each axis is scaled by a factor within 1 plus or minus this."""
    shift: float = Field(default=0.0, ge=0, lt=1)
    """Maximum shift per axis, as a fraction of the side."""
    shear_deg: float = Field(default=0.0, ge=0, le=90)
    flip_horizontal: bool = False
    flip_vertical: bool = False
    fill: Literal["nearest"] = "nearest"
    rot90: bool = False
    """Rotation by 0, 90, 180 or 270 degrees; patches must be square."""
    hed_jitter: float = Field(default=0.0, ge=0, le=1)
    """Maximum relative change of the amounts of haematoxylin and eosin (Tellez et al. 2018)."""
    hed_offset: float = Field(default=0.0, ge=0, le=1)
    """Maximum addition to these amounts, in decades of optical density; changes the background too."""
    stain_transfer: float = Field(default=0.0, ge=0, le=1)
    """Probability of transferring the stain of the same class in another training patient."""
    rand_stain_na: float = Field(default=0.0, ge=0, le=1)
    """Probability of matching the patch's colours to a template drawn from training (Shen et al. 2022)."""
    rand_augment_n: NonNegativeInt = 0
    """Number of operations on each patch drawn by RandAugment (Faryna et al. 2021); 0: none."""
    rand_augment_magnitude: float = Field(default=5.0, ge=0, le=10)
    """Maximum level of these operations, 0-10; see `biopsy.training.rand_augment` for their ranges."""
    blur_px: NonNegativeFloat = 0.0
    """Maximum standard deviation of a Gaussian blur, in pixels of the input."""
    cutout: float = Field(default=0.0, ge=0, le=1)
    """Side of a square set to the mean of the preprocessing, over the patch's (DeVries & Taylor 2017)."""


class Train(_Table):
    """Optimisation."""

    loss: Literal["cross-entropy", "binary-cross-entropy"] = "cross-entropy"
    """``binary-cross-entropy``: one sigmoid output per class, with averaged losses."""
    optimiser: Literal[
        "adagrad-keras2",
        "adagrad",
        "adam",
        "adamw",
        "sgd",
        "muon",
        "rmsprop",
        "rmsprop-keras2",
        "logistic-regression",
    ] = "adam"
    """``...-keras2``: with the accumulator and epsilon of Keras 2. ``logistic-regression`` fits the head on
    features of the frozen network, with an L2 penalty chosen by cross-validation over training patients.
    ``muon`` (Jordan et al. 2024): orthogonalised momentum for matrices and convolutions at the update size of
    AdamW (Liu et al. 2025), which updates the rest; needs ``momentum``, such as 0.95."""
    lr: PositiveFloat = 1e-3
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """Of ``sgd`` and ``muon``."""
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
    """Whether to drop the last incomplete batch of an epoch."""
    steps_per_epoch: NonNegativeInt = 0
    """Updates between validations; 0: one pass over the training patches."""
    fraction: float = Field(default=1.0, gt=0, le=1)
    """Fraction of the training patches that is used, a stratified sample."""
    class_weights: Literal["none", "largest", "balanced"] = "none"
    """``largest`` is max(count) / count; ``balanced`` is total / (n_classes * count)."""
    sampling: Literal["none", "undersample", "oversample", "within-patient"] = "none"
    """Number of patches per class as in the rarest (drawn once) or the most frequent class (per epoch).

    ``within-patient``: as many as there are, the classes of each patient equally often, no patch more than 16
    times an epoch in expectation."""
    single_class_weight: float = Field(default=0.25, gt=0, le=1)
    """Of ``within-patient``: factor on patients with patches of one class only."""
    patch_weights: str = ""
    """Path of a csv file with the weight of each patch in the loss (``patch_id``, ``weight``), such as
    ``weights.csv`` of ``biopsy label-issues``; patches that it does not list weigh 1."""
    teacher: str = ""
    """Runs, classifiers or names of shipped ones, separated by commas, whose mean probabilities of the
    training patches are learned beside the labels (Hinton et al. 2015)."""
    teacher_weight: float = Field(default=0.5, ge=0, le=1)
    """Weight of the cross-entropy with the teacher's probabilities; that with the labels has the rest."""
    teacher_temperature: PositiveFloat = 1.0
    """Divides the logits of teacher and student in that cross-entropy, which is multiplied by its square."""
    early_stopping_patience: NonNegativeInt = 0
    """Epochs without improvement of the monitored value before stopping; 0 never stops early."""
    monitor: Literal["val_loss", "val_auroc"] = "val_auroc"
    ema_decay: float = Field(default=0.0, ge=0, lt=1)
    """Decay of the exponential moving average of the weights, per update; 0 keeps none."""
    checkpoint: Literal["best", "last"] = "best"
    """Weights of the classifier: of the best epoch on validation, or of the last.

    With ``ema_decay`` these are the averaged weights, in validation too."""
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    """``auto``: ``bf16`` if the device computes it in hardware, else ``fp32``; a run keeps the one used."""

    @field_validator("teacher")
    @classmethod
    def _names_models(cls, teachers: str) -> str:
        if teachers and not teachers.replace(",", " ").strip():
            raise ValueError("names no run and no classifier")
        return teachers


class Decision(_Table):
    """Calibration, decision thresholds and abstention."""

    threshold: Rule = "youden"
    """``youden``, ``sensitivity=0.95``, ``specificity=0.95``, ``cost=5`` or ``argmax``, on validation."""
    calibration: Calibration = "platt"
    """Fitted on validation patients before the threshold; with fewer than five, ``platt`` fits the intercept
    only. ``isotonic`` is for two classes."""
    operating_points: list[Rule] = ["youden", "sensitivity=0.95", "specificity=0.90", "cost=5"]
    """Rules of further thresholds, fitted on validation."""
    prevalence: float = Field(default=0.0, ge=0, lt=1)
    """Share of positive patches where the classifier is used, for which probabilities are corrected; 0: as in
    validation. Two classes, and not with ``calibration="none"``."""
    abstention_error: float = Field(default=0.1, gt=0, lt=1)
    """Miscoverage rate of the conformal prediction sets; lower values abstain more."""
    abstention_guarantee: Literal["class-conditional", "marginal"] = "class-conditional"
    """Whether coverage is guaranteed per class or marginally."""


class AsPublished(_Table):
    """Settings for the published split."""

    split: dict[str, object] = {}
    standardise: Literal["", "none", "featurewise"] = ""
    """Overrides ``preprocessing.standardise``, unless empty."""
    checkpoint: Literal["best", "last"] = "last"
    threshold: Rule = "argmax"
    calibration: Calibration = "none"


class Recipe(_Table):
    """Everything that defines a training result.

    See the fields of each table for units and defaults.
    """

    format: Literal["biopsy-recipe/1"] = FORMAT
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name, also used in folder names."""
    title: str = ""
    origin: Origin = Origin()
    preprocessing: RecipePreprocessing = RecipePreprocessing()
    model: Model
    augmentation: Augmentation = Augmentation()
    train: Train = Train()
    decision: Decision = Decision()
    as_published: AsPublished = AsPublished()
    sources: dict[str, str] = {}
    """Source of the value by dotted setting."""
