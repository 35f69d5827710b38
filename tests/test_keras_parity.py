"""The same weights, batches and parameters through Keras and through ours."""

import os

import numpy as np
import pytest
import torch
import torch._dynamo  # PyTorch's optimisers import it late; after TensorFlow's import that crashes
from PIL import Image

from biopsy.learning.augmentation import affine_matrix, warp
from biopsy.learning.engine import Engine, make_loss
from biopsy.learning.networks import build_network, count_parameters
from biopsy.learning.optimisers import learning_rate, make_optimiser, set_learning_rate
from biopsy.learning.preprocessing import Preprocessing

pytestmark = [pytest.mark.peer, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


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


def build_keras_cancernet(keras, dropout=(0.25, 0.5)):
    """The post's network, layer by layer."""
    layers = keras.layers
    model = keras.Sequential([keras.Input((48, 48, 3))])
    for stage in ((32,), (64, 64), (128, 128, 128)):
        for channels in stage:
            model.add(layers.SeparableConv2D(channels, (3, 3), padding="same"))
            model.add(layers.Activation("relu"))
            model.add(layers.BatchNormalization())
        model.add(layers.MaxPooling2D((2, 2)))
        model.add(layers.Dropout(dropout[0]))
    model.add(layers.Flatten())
    model.add(layers.Dense(256))
    model.add(layers.Activation("relu"))
    model.add(layers.BatchNormalization())
    model.add(layers.Dropout(dropout[1]))
    model.add(layers.Dense(2))
    model.add(layers.Activation("softmax"))
    return model


def to_keras(network):
    """Give a network's weights in Keras's order and shapes."""
    weights = []
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            order = (2, 3, 0, 1) if module.groups > 1 else (2, 3, 1, 0)
            weights.append(module.weight.permute(order))
        elif isinstance(module, torch.nn.Linear):
            weights.append(module.weight.t())
        elif isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            weights += [module.weight, module.bias, module.running_mean, module.running_var]
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear) and module.bias is not None:
            weights.append(module.bias)
    return [weight.detach().numpy().copy() for weight in weights]


def randomise(network):
    """Move every weight and statistic off its start, so that none can be left out unnoticed."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=generator) * 0.2
                tensor.add_(noise if "running_var" in name else noise - 0.1)


def test_cancernet_gives_kerass_outputs(keras):
    network = build_network("cancernet", n_classes=2, input_px=48, seed=0).eval()
    randomise(network)
    model = build_keras_cancernet(keras)
    trainable = sum(int(np.prod(weight.shape)) for weight in model.trainable_weights)
    assert count_parameters(network) == (model.count_params(), trainable)
    model.set_weights(to_keras(network))
    patches = np.random.default_rng(0).random((16, 48, 48, 3), dtype=np.float32)
    with torch.inference_mode():
        ours = network(torch.from_numpy(patches).permute(0, 3, 1, 2)).softmax(1).numpy()
    theirs = model.predict(patches, verbose=0)
    assert np.ptp(theirs) > 0.1
    assert np.abs(ours - theirs).max() < 1e-5


LEARNING_RATES = {"adagrad": 1e-3, "adam": 1e-5, "rmsprop": 2e-5, "sgd": 1e-3}


def keras_optimiser(keras, name):
    optimisers, rate = keras.optimizers, LEARNING_RATES[name]
    if name == "adagrad":
        return optimisers.Adagrad(optimisers.schedules.InverseTimeDecay(rate, decay_steps=1, decay_rate=0.05))
    if name == "sgd":
        return optimisers.SGD(rate, momentum=0.9)
    return {"adam": optimisers.Adam, "rmsprop": optimisers.RMSprop}[name](rate)


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


@pytest.mark.parametrize("name", ["adagrad", "adam", "rmsprop", "sgd"])
def test_ten_steps_with_class_weights_follow_keras(keras, double, name):
    """In double precision, in small steps: at the recipe's rate rounding alone drives two trainings apart."""
    network = build_network("cancernet", n_classes=2, input_px=48, seed=0, stage_dropout=0, dense_dropout=0)
    start = to_keras(network.double())
    model = build_keras_cancernet(keras, dropout=(0, 0))
    model.set_weights(start)
    model.compile(loss="categorical_crossentropy", optimizer=keras_optimiser(keras, name))
    lr = LEARNING_RATES[name]
    schedule = {"schedule": "inverse-time", "decay": 0.05} if name == "adagrad" else {}
    optimiser = make_optimiser(name, network.parameters(), lr, momentum=0.9 if name == "sgd" else 0)
    engine, loss_fn = Engine("cpu"), make_loss("softmax", [1.0, 2.5])
    network = engine.place(network).train()
    rng = np.random.default_rng(0)
    for step in range(10):
        patches, target = rng.random((32, 48, 48, 3)), rng.integers(0, 2, 32)
        # reset first: Keras reports the mean loss of all batches since
        model.reset_metrics()
        theirs = model.train_on_batch(patches, np.eye(2)[target], class_weight={0: 1.0, 1: 2.5})
        set_learning_rate(optimiser, learning_rate(step, lr=lr, **schedule))
        batch = torch.from_numpy(patches).permute(0, 3, 1, 2)
        loss, _ = engine.train_step(network, optimiser, batch, torch.from_numpy(target), loss_fn)
        assert loss.item() == pytest.approx(float(np.ravel(theirs)[0]), rel=1e-4), step
    for before, ours, theirs in zip(start, to_keras(network), model.get_weights(), strict=True):
        moved = np.linalg.norm(theirs - before)
        assert moved > 0
        assert np.linalg.norm(ours - theirs) <= 1e-4 * moved, before.shape


def test_affine_augmentation_agrees_on_the_interior(keras):
    from keras.src.legacy.preprocessing.image import apply_affine_transform

    rng = np.random.default_rng(0)
    patches = rng.integers(0, 256, (10, 48, 48, 3)).astype(np.float32)
    names = ("rotation_deg", "shift_x_px", "shift_y_px", "shear_deg")
    drawn = {
        name: rng.uniform(-limit, limit, 10) for name, limit in zip(names, (20, 4.8, 4.8, 10), strict=True)
    }
    drawn |= {name: rng.uniform(0.9, 1.1, 10) for name in ("zoom_x", "zoom_y")}
    matrix = affine_matrix(**{name: torch.from_numpy(values) for name, values in drawn.items()})
    ours = warp(torch.from_numpy(patches / 255).permute(0, 3, 1, 2), matrix).permute(0, 2, 3, 1).numpy() * 255
    keras_names = dict(
        zip((*names, "zoom_x", "zoom_y"), ("theta", "tx", "ty", "shear", "zx", "zy"), strict=True)
    )
    for i, patch in enumerate(patches):
        given = {keras_names[name]: values[i] for name, values in drawn.items()}
        theirs = apply_affine_transform(patch, **given, row_axis=0, col_axis=1, channel_axis=2)
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
