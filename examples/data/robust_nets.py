"""Small nets, and the three checkpoints from which a signature is made.

The recipe is a smaller one of RWS (arXiv 2302.12480). From one pretrained
start, the same training runs on clean and on corrupted images. It uses SGD at
0.01, momentum 0.9 and weight decay 5e-4. The rate is divided by ten after two
fifths and after four fifths of the way.
"""

import numpy as np

from examples.data.corruptions import SEVERITIES, corrupt
from examples.data.digits import load_digits, load_mnist, prepared
from examples.data.fashion_mnist import load_fashion_mnist

# The widest layers are these times 8.
WIDTH = 8
BATCH = 64


def make_vgg():
    """VGG-16 with an eighth of its channels: 13 convolutions, one head."""
    from keras import Input, Model, layers

    x = inputs = Input((16, 16, 1))
    for block, (width, count) in enumerate(
        ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3)), start=1
    ):
        for number in range(1, count + 1):
            x = layers.Conv2D(
                width * WIDTH,
                3,
                padding="same",
                activation="relu",
                kernel_initializer="he_normal",
                name=f"block{block}_conv{number}",
            )(x)
        if block < 5:
            x = layers.MaxPooling2D(name=f"block{block}_pool")(x)
    x = layers.Flatten(name="flatten")(x)
    outputs = layers.Dense(10, name="head")(x)
    return Model(inputs, outputs, name="vgg_like")


def make_resnet():
    """A stem, and four stages of two basic blocks with normalization."""
    from keras import Input, Model, layers

    def conv(x, width, size, stride, name):
        x = layers.Conv2D(
            width,
            size,
            stride,
            padding="same",
            use_bias=False,
            kernel_initializer="he_normal",
            name=f"{name}_conv",
        )(x)
        return layers.BatchNormalization(momentum=0.9, name=f"{name}_norm")(x)

    inputs = Input((16, 16, 1))
    x = layers.ReLU()(conv(inputs, WIDTH, 3, 1, "stem"))
    for stage, width in enumerate((1, 2, 4, 8), start=1):
        for block in (1, 2):
            name = f"stage{stage}_block{block}"
            stride = 2 if stage > 1 and block == 1 else 1
            y = layers.ReLU()(conv(x, width * WIDTH, 3, stride, f"{name}_a"))
            y = conv(y, width * WIDTH, 3, 1, f"{name}_b")
            if x.shape[-1] != y.shape[-1]:
                x = conv(x, width * WIDTH, 1, stride, f"{name}_shortcut")
            x = layers.ReLU()(layers.Add()([x, y]))
    x = layers.GlobalAveragePooling2D()(x)
    outputs = layers.Dense(10, name="head")(x)
    return Model(inputs, outputs, name="resnet_like")


def make_vit():
    """A vision transformer: 16 patches, six blocks 48 wide."""
    import keras
    from keras import Input, Model, layers

    @keras.saving.register_keras_serializable(package="examples")
    class Positions(layers.Layer):
        def build(self, shape):
            self.positions = self.add_weight(
                name="positions", shape=shape[1:], initializer="random_normal"
            )

        def call(self, x):
            return x + self.positions

    width = 6 * WIDTH
    inputs = Input((16, 16, 1))
    x = layers.Conv2D(width, 4, strides=4, name="patches")(inputs)
    x = Positions(name="positions")(layers.Reshape((16, width))(x))
    for block in range(1, 7):
        name = f"block{block}"
        y = layers.LayerNormalization(name=f"{name}_norm1")(x)
        y = layers.MultiHeadAttention(4, width // 4, name=f"{name}_attention")(
            y, y
        )
        x = layers.Add()([x, y])
        y = layers.LayerNormalization(name=f"{name}_norm2")(x)
        y = layers.Dense(4 * width, "gelu", name=f"{name}_up")(y)
        x = layers.Add()([x, layers.Dense(width, name=f"{name}_down")(y)])
    x = layers.GlobalAveragePooling1D()(
        layers.LayerNormalization(name="norm")(x)
    )
    outputs = layers.Dense(10, name="head")(x)
    return Model(inputs, outputs, name="vit_like")


# {name: (how it is made, arguments of `extract`: its shallow part)}
# Of VGG-16 the paper takes seven layers, of ResNet the stem and whole blocks.
NETS = {
    "vgg_like": (make_vgg, {"depth": 7}),
    "resnet_like": (make_resnet, {"targets": r"^(stem|stage1|stage2)_"}),
    "vit_like": (make_vit, {"targets": r"^(patches|positions|block1_)"}),
}
# {name: {other parts to compare: arguments}}
DEPTHS = {
    "vgg_like": {f"{depth} layers": {"depth": depth} for depth in (4, 6, 10)},
    "resnet_like": {
        "7 layers": {"depth": 7, "targets": None},
        "1 stage": {"targets": r"^(stem|stage1)_"},
        "3 stages": {"targets": r"^(stem|stage[123])_"},
    },
    "vit_like": {
        "patches": {"targets": r"^(patches|positions)"},
        "2 blocks": {"targets": r"^(patches|positions|block[12]_)"},
        "4 blocks": {"targets": r"^(patches|positions|block[1-4]_)"},
    },
}


def _fashion(size):
    images, labels = load_fashion_mnist()["train"]
    return prepared(images[:9000, ..., 0], labels[:9000], size)


# {name: (loader, images to pretrain with, to fine-tune with, to test on)}
SOURCES = {
    "mnist": (load_mnist, 2000, 2000, 1000),
    "digits": (load_digits, 900, 500, 397),
    "fashion": (_fashion, 4000, 4000, 1000),
}


def load_data(seed, names=("mnist", "digits")):
    """Images for pretraining, fine-tuning and tests.

    Args:
        seed: Int. Says which images fine-tuning and tests get; those for
            pretraining are fixed.
        names: Of `SOURCES`.

    Returns:
        Dict from `"pretrain"` to a pair of images and labels, of all sources
        together, and from each name to a dict with the pairs `"train"` and
        `"test"`. No image is in two of them.
    """
    data, pretrain = {}, []
    for name in names:
        load, start, train, test = SOURCES[name]
        images, labels = load(16)
        pretrain.append((images[:start], labels[:start]))
        rest = start + np.random.default_rng(seed).permutation(train + test)
        parts = {"train": rest[:train], "test": rest[train:]}
        data[name] = {
            part: (images[chosen], labels[chosen])
            for part, chosen in parts.items()
        }
    data["pretrain"] = tuple(map(np.concatenate, zip(*pretrain)))
    return data


def pretrain(model, data, epochs, seed=0):
    """Trains from scratch on all sources, each image also moved a little."""
    import keras

    images, labels = data["pretrain"]
    # To the end of the way: what moves on in fine-tuning would otherwise be
    # mostly the rest of pretraining.
    rate = keras.optimizers.schedules.CosineDecay(
        2e-3, 2 * len(images) // BATCH * epochs
    )
    shifts = np.random.default_rng(seed).integers(-2, 3, (len(images), 2))
    moved = np.stack(
        [np.roll(image, shift, (0, 1)) for image, shift in zip(images, shifts)]
    )
    _fit(
        model,
        np.concatenate([images, moved]),
        np.concatenate([labels, labels]),
        epochs,
        keras.optimizers.Adam(rate),
    )


def fine_tune(model, start, images, labels, epochs, corruption, seed):
    """Trains on from the weights `start`; returns the weights that it ends at.

    Each image is corrupted once, at one of the severities; `None` leaves them
    clean.
    """
    import keras

    steps = len(images) // BATCH * epochs
    rate = keras.optimizers.schedules.PiecewiseConstantDecay(
        [2 * steps // 5, 4 * steps // 5], [1e-2, 1e-3, 1e-4]
    )
    if corruption is not None:
        severity = np.random.default_rng(seed).choice(SEVERITIES, len(images))
        images = corrupt(images, corruption, severity, seed)
    model.set_weights(start)
    keras.utils.set_random_seed(seed)
    _fit(
        model,
        images,
        labels,
        epochs,
        # Clipped: a net without normalization does not survive the shock of
        # the first corrupted batches at this rate.
        keras.optimizers.SGD(
            rate, momentum=0.9, weight_decay=5e-4, global_clipnorm=1.0
        ),
    )
    return model.get_weights()


def _fit(model, images, labels, epochs, optimizer):
    import keras

    model.compile(
        optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    model.fit(images, labels, batch_size=BATCH, epochs=epochs, verbose=0)


class Tests:
    """Clean and corrupted test images, made once for all models.

    Args:
        images, labels: The clean test set.
        corruptions: Names of corruptions; each is taken at all severities.
        seed: Int.
        most: Int, how many of the images are corrupted, at each severity.
            Defaults to all.
    """

    def __init__(self, images, labels, corruptions, seed, most=None):
        self.labels = labels
        first = images[:most]
        self.images = {
            None: images,
            **{
                name: np.concatenate(
                    [corrupt(first, name, s, seed + s) for s in SEVERITIES]
                )
                for name in corruptions
            },
        }

    def accuracy(self, model, weights, corruption=None):
        """Float in [0, 1]; of a corruption, the mean over the severities."""
        model.set_weights(weights)
        logits = model.predict(
            self.images[corruption], batch_size=500, verbose=0
        )
        found = logits.argmax(-1)
        if corruption is not None:
            found = found.reshape(len(SEVERITIES), -1)
        return float((found == self.labels[: found.shape[-1]]).mean())
