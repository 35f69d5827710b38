"""The same weights, batches and parameters through Keras and through ours."""

import io
import os
import zipfile

import numpy as np
import pytest
import torch
import torch._dynamo  # PyTorch's optimisers import it late; after TensorFlow's import that crashes
from PIL import Image

from biopsy.models.engine import Engine, make_loss, outputs_of
from biopsy.models.importers.keras import import_keras
from biopsy.models.inference import predict_logits
from biopsy.models.networks import build_network, count_parameters, network_parameters
from biopsy.models.networks.stages import freeze
from biopsy.recipes import load_recipe
from biopsy.recipes.preprocessing import Preprocessing
from biopsy.training.optimisers import learning_rate, make_optimiser, set_learning_rate
from biopsy.training.patch_operations import affine_matrix, warp
from keras_files import keras_layers

pytestmark = [pytest.mark.peer, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

# recipe -> parameters as Keras counts them, all and trainable
PARAMETERS = {
    "cancernet-2020": (1_235_133, 1_233_533),
    "baruah-2019": (2_010_946, 2_010_946),
    "dabydeen-hedges": (526_786, 526_786),
    "dabydeen-hedges-baseline": (518_338, 518_338),
    "vgg16-pcam": (15_894_849, 8_259_585),
}


@pytest.fixture(scope="module")
def keras():
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    return pytest.importorskip("keras")


@pytest.fixture
def double(keras):
    for setting in (keras.config.set_floatx, keras.config.set_dtype_policy):
        setting("float64")
    yield
    for setting in (keras.config.set_floatx, keras.config.set_dtype_policy):
        setting("float32")


def build_keras(keras, recipe, *, input_px=None, dropout=True):
    """The network of a post, layer by layer; VGG16's convolutions are Keras's own, block 5 trained."""
    layers, rate = keras.layers, 1.0 if dropout else 0.0
    px = input_px or load_recipe(recipe).preprocessing.input_px
    model = keras.Sequential([keras.Input((px, px, 3))])
    if recipe.startswith("cancernet"):
        for stage in ((32,), (64, 64), (128, 128, 128)):
            for channels in stage:
                model.add(layers.SeparableConv2D(channels, (3, 3), padding="same"))
                model.add(layers.Activation("relu"))
                model.add(layers.BatchNormalization(momentum=np.float64(0.99), epsilon=np.float64(1e-3)))
            model.add(layers.MaxPooling2D((2, 2)))
            model.add(layers.Dropout(0.25 * rate))
        model.add(layers.Flatten())
        model.add(layers.Dense(256))
        model.add(layers.Activation("relu"))
        model.add(layers.BatchNormalization(momentum=np.float64(0.99), epsilon=np.float64(1e-3)))
        model.add(layers.Dropout(0.5 * rate))
        model.add(layers.Dense(2))
        model.add(layers.Activation("softmax"))
    elif recipe == "baruah-2019":
        for channels in (32, 64, 128, 256):
            model.add(layers.Conv2D(channels, (3, 3), activation="relu"))
            if channels < 128:
                model.add(layers.MaxPooling2D((2, 2)))
        model.add(layers.Flatten())
        for _ in range(2):
            model.add(layers.Dropout(0.5 * rate))
            model.add(layers.Dense(128, activation="relu"))
        model.add(layers.Dense(2, activation="sigmoid"))
    elif recipe.startswith("dabydeen-hedges"):
        for channels in (64, 128, 128) if recipe.endswith("baseline") else (64, 128, 128, 128, 128):
            model.add(layers.Conv2D(channels, (3, 3), padding="same", activation="relu"))
            model.add(layers.MaxPooling2D((2, 2)))
        model.add(layers.Flatten())
        model.add(layers.Dense(64, activation="relu"))
        model.add(layers.Dropout(0.5 * rate))
        model.add(layers.Dense(2, activation="softmax"))
    else:
        base = keras.applications.VGG16(weights=None, include_top=False, input_shape=(px, px, 3))
        for layer in base.layers:
            layer.trainable = layer.name.startswith("block5")
        model.add(base)
        model.add(layers.Flatten())
        model.add(layers.Dense(256, activation="relu"))
        model.add(layers.Dense(1, activation="sigmoid"))
    return model


def shake(model):
    """Draw every weight and statistic, kernels so large that patches differ behind 13 convolutions."""
    rng = np.random.default_rng(0)
    for variable in model.weights:
        shape = tuple(variable.shape)
        if "variance" in variable.path:
            value = rng.uniform(0.1, 0.2, shape)
        elif len(shape) == 1:
            value = ("gamma" in variable.path) + rng.uniform(-0.1, 0.1, shape)
        else:
            value = rng.uniform(-1, 1, shape) * np.sqrt(12 / np.prod(shape[:-2]) / sum(shape[-2:]))
        variable.assign(value.astype(np.float32))


def to_keras(network):
    """Return a network's weights in Keras's order and shapes."""
    return [weight for _, weights in keras_layers(network) for weight in weights]


def read_real_patches(data_dir, dataset, n_patches):
    """Read some patches of the real data as uint8 ``(n, px, px, 3)``."""
    name = {"idc": "idc/idc_kaggle_subset.zip", "hcd": "pcam/pcam_train_valid.zip"}[dataset]
    with zipfile.ZipFile(data_dir / name) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith((".png", ".jpg")))
        opened = (
            Image.open(io.BytesIO(archive.read(name))) for name in names[:: len(names) // 2 // n_patches]
        )
        side = 50 if dataset == "idc" else 96
        patches = [np.asarray(image.convert("RGB")) for image in opened if image.size == (side, side)]
    return np.stack(patches[:n_patches])


def compare_outputs(keras, recipe, patches, folder, suffixes):
    """Import what Keras saves of a model, and compare what comes out with ``Keras.predict``."""
    model = build_keras(keras, recipe)
    shake(model)
    total, trainable = (
        sum(int(np.prod(weight.shape)) for weight in weights)
        for weights in (model.weights, model.trainable_weights)
    )
    assert (total, trainable) == PARAMETERS[recipe]
    preprocessing = load_recipe(recipe).preprocessing.fixed()
    theirs = model.predict(preprocessing.prepare(patches).permute(0, 2, 3, 1).numpy(), verbose=0)
    theirs = np.hstack([1 - theirs, theirs]) if theirs.shape[1] == 1 else theirs
    for suffix in suffixes:
        file = folder / f"model{suffix}"
        model.save_weights(file) if suffix == ".weights.h5" else model.save(file)
        classifier = import_keras(file, model=recipe, out=folder / f"imported{suffix}")
        network = classifier.network
        logits = predict_logits(network, classifier.info.preprocessing, patches, engine=Engine("cpu"))
        ours = classifier.probs(logits)
        assert np.ptp(logits[:, 1] - logits[:, 0]) > 0.05 and (np.abs(ours - 0.5) < 0.499).all()
        assert np.abs(ours - theirs / theirs.sum(axis=1, keepdims=True)).max() < 1e-5
        freeze(network, load_recipe(recipe).model.trainable)
        assert count_parameters(network) == PARAMETERS[recipe]


@pytest.mark.parametrize("recipe", PARAMETERS)
def test_an_imported_model_gives_kerass_outputs(keras, recipe, tmp_path):
    px = load_recipe(recipe).preprocessing.input_px
    patches = np.random.default_rng(0).integers(0, 256, (8, px, px, 3), dtype=np.uint8)
    patches[4:] //= 2  # noise of one kind looks alike to a deep network
    compare_outputs(keras, recipe, patches, tmp_path, (".h5", ".weights.h5", ".keras"))


@pytest.mark.data
@pytest.mark.parametrize("recipe", PARAMETERS)
def test_an_imported_model_gives_kerass_outputs_on_real_patches(keras, recipe, tmp_path, data_dir):
    patches = read_real_patches(data_dir, load_recipe(recipe).origin.dataset, 8)
    compare_outputs(keras, recipe, patches, tmp_path, (".keras",))


def keras_optimiser(keras, name, lr, decay=0.0):
    """Return Keras's optimiser; of Python's own numbers it would keep float32's digits alone."""
    optimisers, lr = keras.optimizers, np.float64(lr)
    if name == "adagrad":
        schedule = optimisers.schedules.InverseTimeDecay(lr, decay_steps=1, decay_rate=np.float64(decay))
        return optimisers.Adagrad(schedule, initial_accumulator_value=np.float64(0.1))
    if name == "adam":
        return optimisers.Adam(lr, beta_1=np.float64(0.9), beta_2=np.float64(0.999))
    if name == "rmsprop":
        return optimisers.RMSprop(lr, rho=np.float64(0.9))
    return optimisers.SGD(lr, momentum=np.float64(0.9))


def start_both(keras, recipe, px):
    """Build one network twice: equal weights, double precision, no dropout, what is frozen frozen."""
    asked = load_recipe(recipe)
    params = asked.model.params | {
        name: 0
        for name in ("stage_dropout", "dense_dropout", "dropout")
        if name in network_parameters(asked.model.name)
    }
    network = build_network(asked.model.name, n_classes=2, input_px=px, seed=0, **params).double()
    freeze(network, asked.model.trainable)
    model = build_keras(keras, recipe, input_px=px, dropout=False)
    model.set_weights(to_keras(network))
    return model, Engine("cpu").place(network).train()


def batches(px, batch_size=8):
    """Yield ten small batches of patches and targets."""
    rng = np.random.default_rng(0)
    for _ in range(10):
        yield rng.random((batch_size, px, px, 3)), rng.integers(0, 2, batch_size)


def compare_weights(start, network, model):
    """Compare how far each weight has moved, and give the number of those that have."""
    n_moved = 0
    for before, ours, theirs in zip(start, to_keras(network), model.get_weights(), strict=True):
        moved = np.linalg.norm(theirs - before)
        n_moved += moved > 0
        assert np.linalg.norm(ours - theirs) <= 1e-4 * moved, before.shape
    return n_moved


@pytest.mark.parametrize(
    ("keras_loss", "outputs"), [("categorical_crossentropy", "softmax"), ("binary_crossentropy", "sigmoid")]
)
def test_losses_with_class_weights_are_kerass(keras, keras_loss, outputs):
    """Two softmax outputs under binary cross-entropy are another loss in the Keras of today.

    It keeps the logits beside its softmax and takes them for a sigmoid's. In the Keras of the posts, which
    did not, that loss was the cross-entropy of our "softmax".
    """
    logits, target = np.random.default_rng(0).normal(size=(32, 2)).astype(np.float32), np.arange(32) % 2
    model = keras.Sequential([keras.Input((2,)), keras.layers.Activation("softmax")])
    model.compile(loss=keras_loss, optimizer="sgd")
    theirs = model.train_on_batch(logits, np.eye(2)[target], class_weight={0: 1.0, 1: 2.5})
    ours = make_loss(outputs, [1.0, 2.5])(torch.from_numpy(logits), torch.from_numpy(target))
    assert ours.item() == pytest.approx(float(np.ravel(theirs)[0]), rel=1e-5)


@pytest.mark.parametrize(
    ("recipe", "name", "lr"),
    [
        ("cancernet-2020", "adagrad", 1e-2),
        ("baruah-2019", "adam", 1e-5),
        ("dabydeen-hedges", "adam", 1e-3),
        ("vgg16-pcam", "rmsprop", 2e-5),
        ("dabydeen-hedges-baseline", "sgd", 1e-2),
    ],
)
def test_ten_steps_follow_keras(keras, double, recipe, name, lr):
    """At the rates and class weights of the recipes; in double precision, since ten steps magnify rounding.

    Keras is given the loss that the Keras of the posts computed: see the test above.
    """
    train = load_recipe(recipe).train
    optimiser_name = train.optimiser.removesuffix("-keras2")  # Keras 2's formulas are tested by hand
    assert name == "sgd" or (optimiser_name, train.lr) == (name, lr)
    px, one_output = (
        (32, True) if recipe == "vgg16-pcam" else (load_recipe(recipe).preprocessing.input_px, False)
    )
    weights = [1.0, 2.5] if train.class_weights != "none" else None
    loss_name = "binary" if one_output or outputs_of(train.loss) == "sigmoid" else "categorical"
    model, network = start_both(keras, recipe, px)
    start = model.get_weights()
    model.compile(loss=f"{loss_name}_crossentropy", optimizer=keras_optimiser(keras, name, lr, train.decay))
    engine, loss_fn = Engine("cpu"), make_loss(outputs_of(train.loss), weights)
    optimiser = make_optimiser(name, network.parameters(), lr, momentum=0.9 if name == "sgd" else 0)
    for step, (patches, target) in enumerate(batches(px, 2 if one_output else 8)):
        wanted = target[:, None] if one_output else np.eye(2)[target]
        # reset first: Keras reports the mean loss of all batches since
        model.reset_metrics()
        theirs = model.train_on_batch(patches, wanted, class_weight=weights and dict(enumerate(weights)))
        set_learning_rate(optimiser, learning_rate(step, lr=lr, schedule=train.schedule, decay=train.decay))
        batch = torch.from_numpy(patches).permute(0, 3, 1, 2)
        loss, _ = engine.train_step(network, optimiser, batch, torch.from_numpy(target), loss_fn)
        assert loss.item() == pytest.approx(float(np.ravel(theirs)[0]), rel=1e-4), step
    assert compare_weights(start, network, model) == (10 if recipe == "vgg16-pcam" else len(start))


def test_ten_steps_of_keras_2s_adagrad_worked_by_hand(keras, double):
    """Keras 2.2, optimizers.Adagrad: the accumulator starts at 0, the epsilon stands beside its root."""
    import tensorflow

    train = load_recipe("cancernet-2019").train
    assert train.optimiser == "adagrad-keras2"
    model, network = start_both(keras, "cancernet-2019", 48)
    start = model.get_weights()
    accumulators = [np.zeros(variable.shape) for variable in model.trainable_variables]
    optimiser = make_optimiser(train.optimiser, network.parameters(), train.lr)
    for step, (patches, target) in enumerate(batches(48)):
        with tensorflow.GradientTape() as tape:
            probs = model(patches, training=True)
            loss = -tensorflow.reduce_mean(
                tensorflow.math.log(tensorflow.reduce_sum(probs * np.eye(2)[target], 1))
            )
        rate = train.lr / (1 + train.decay * step)
        trained = [variable.value for variable in model.trainable_variables]
        gradients = tape.gradient(loss, trained)
        for variable, gradient, total in zip(model.trainable_variables, gradients, accumulators, strict=True):
            total += gradient.numpy() ** 2
            variable.assign(np.asarray(variable) - rate * gradient.numpy() / (np.sqrt(total) + 1e-7))
        set_learning_rate(
            optimiser, learning_rate(step, lr=train.lr, schedule=train.schedule, decay=train.decay)
        )
        batch = torch.from_numpy(patches).permute(0, 3, 1, 2)
        ours, _ = Engine("cpu").train_step(
            network, optimiser, batch, torch.from_numpy(target), make_loss("softmax")
        )
        assert ours.item() == pytest.approx(float(loss), rel=1e-4), step
    assert compare_weights(start, network, model) == len(start)


@pytest.mark.parametrize("recipe", ["cancernet-2020", "baruah-2019", "dabydeen-hedges"])
def test_affine_augmentation_agrees_on_the_interior(keras, recipe):
    from keras.src.legacy.preprocessing.image import ImageDataGenerator

    augmentation = load_recipe(recipe).augmentation
    rng = np.random.default_rng(0)
    patches = rng.integers(0, 256, (20, 48, 48, 3)).astype(np.float32)
    shift_px = augmentation.shift * 48
    limits = {
        "rotation_deg": augmentation.rotation_deg,
        "shift_x_px": shift_px,
        "shift_y_px": shift_px,
        "shear_deg": augmentation.shear_deg,
        "zoom_x": augmentation.zoom,
        "zoom_y": augmentation.zoom,
    }
    drawn = {
        name: ("zoom" in name) + rng.uniform(-limit, limit, len(patches)) for name, limit in limits.items()
    }
    matrix = affine_matrix(**{name: torch.from_numpy(values) for name, values in drawn.items()})
    ours = warp(torch.from_numpy(patches / 255).permute(0, 3, 1, 2), matrix).permute(0, 2, 3, 1).numpy() * 255
    generator = ImageDataGenerator(fill_mode="nearest", data_format="channels_last")
    keras_names = dict(zip(limits, ("theta", "tx", "ty", "shear", "zx", "zy"), strict=True))
    for i, patch in enumerate(patches):
        theirs = generator.apply_transform(
            patch, {keras_names[name]: values[i] for name, values in drawn.items()}
        )
        assert np.abs(ours[i] - theirs)[4:-4, 4:-4].max() < 1


def test_patches_are_resized_as_flow_from_directory_does(keras, tmp_path):
    from keras.src.legacy.preprocessing.image import ImageDataGenerator

    rng = np.random.default_rng(0)
    sizes = [(50, 35), (41, 50), (50, 49), (12, 50), (50, 50)]
    (tmp_path / "0").mkdir()
    kept = np.zeros((len(sizes), 50, 50, 3), np.uint8)
    for i, (width, height) in enumerate(sizes):
        kept[i, :height, :width] = rng.integers(0, 256, (height, width, 3))
        Image.fromarray(kept[i, :height, :width]).save(tmp_path / "0" / f"{i}.png")
    flow = ImageDataGenerator(rescale=1 / 255).flow_from_directory(
        tmp_path, target_size=(48, 48), batch_size=len(sizes), shuffle=False, class_mode=None
    )
    widths, heights = np.array(sizes).T
    ours = Preprocessing(input_px=48).prepare(kept, widths, heights).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(ours, next(flow))
