"""Test accuracy of Weight Compander beside plain training, L2, weight norm.

    python -m benchmarks.compander_quality
    python -m benchmarks.compander_quality --settings small --nets plain

Conv nets with dropout, with and without BatchNormalization, learn Fashion-MNIST
(`apt-get install dataset-fashion-mnist`). They train on 1,000 images, on all
60,000, or on 1,000 images of five classes after training on the other five.
Each method gets the same search of its learning rate and its parameters, on
5,000 training images held out. From the best point so far the search goes one
step to either side in each direction, until no neighbor is better. So no rate
is at an end of the range. Then each method trains from each seed. All methods
start from the same weights, and see the same images in the same order.
Differences are paired by seed.

The trained nets are also tested with their kernels rounded to 4 bits, and
pruned to 2:4 by magnitude, without training after it.

b of a fixed pair is no parameter of its own: with u = v / b, a step is
`u <- u + a / b**2 * cos(w / a)**2 * step(w)`, so under SGD it scales the rate
alone. It is set to a, where the slope at zero is 1. Weights that do not fit
into the range at the start are clipped.
"""

import dataclasses
import functools

from benchmarks import harness


@dataclasses.dataclass(frozen=True)
class Setting:
    images: int
    epochs: int
    batch: int
    search_seeds: int
    seeds: int
    fine_tuned: bool = False


SETTINGS = {
    "small": Setting(1_000, 20, 50, 2, 10),
    "fine-tuned": Setting(1_000, 10, 50, 2, 10, fine_tuned=True),
    "full": Setting(60_000, 2, 100, 1, 10),
}
# The start of the search for each parameter, and the factor of a step.
RATE, DECAY, A = ("rate", 0.05, 2), ("decay", 0.016, 4), ("a", 0.5, 2)
METHODS = {
    "plain": (RATE,),
    "L2": (RATE, DECAY),
    "weight norm": (RATE, DECAY),
    "WC fixed": (RATE, DECAY, A),
    # Begins at b = 2 a, as in the paper: 0.5 and 1.
    "WC learnable": (RATE, DECAY, A),
}
NETS = ("plain", "norm")
MEASURES = ("accuracy", "4 bits", "4 bits a channel", "2:4")
HELD_OUT = 5_000
MOMENTUM = 0.9
# So many steps below its beginning a search begins anew for the last time.
LOWEST = -9
# The rate falls linearly, in so many parts of the training.
PARTS = 10


def main():
    args = parse_arguments()
    harness.choose_backend(args.backend)
    report = run(args)
    print_report(report)


def parse_arguments():
    from examples.data.fashion_mnist import FOLDER

    parser = harness.make_parser(__doc__)
    harness.add_backend(parser, "jax")
    for name, choices in (
        ("settings", SETTINGS),
        ("nets", NETS),
        ("methods", METHODS),
    ):
        parser.add_argument(
            f"--{name}", type=harness.subset(choices), default=list(choices)
        )
    parser.add_argument("--data", default=FOLDER, help="the folder of images")
    parser.add_argument(
        "--fresh", action="store_true", help="also make rows that are there"
    )
    harness.add_json(parser, "compander_quality.json")
    return parser.parse_args()


def run(args):
    from examples.data.fashion_mnist import load_fashion_mnist

    settings = {k: dataclasses.asdict(v) for k, v in SETTINGS.items()}
    old = harness.read_json(args.json)
    # Rows of other settings, or of an older form, are not put beside these.
    kept = (
        old
        and not args.fresh
        and without_seeds(old.get("settings", {})) == without_seeds(settings)
    )
    rows = old["rows"] if kept else []
    report = {
        "settings": settings,
        "held_out": HELD_OUT,
        "optimizer": f"SGD, momentum {MOMENTUM}, the rate falls to 0",
        "backend": args.backend,
        "versions": harness.versions(),
        "machine": harness.machine(),
        "rows": rows,
    }
    data = load_fashion_mnist(args.data)
    done = {(row["setting"], row["net"], row["method"]): row for row in rows}
    for setting in args.settings:
        for net in args.nets:
            bench = Bench(net, SETTINGS[setting], data)
            for method in args.methods:
                row = done.get((setting, net, method))
                if row is None:
                    row = {"setting": setting, "net": net, "method": method}
                    row |= {**bench.search(method), "runs": []}
                    rows.append(row)
                if bench.add_runs(row):
                    harness.write_json(args.json, report)
                    print(setting, net, method, row["chosen"], flush=True)
    return report


def without_seeds(settings):
    """Return settings without the number of seeds, which may grow."""
    return {
        name: {k: v for k, v in setting.items() if k != "seeds"}
        for name, setting in settings.items()
    }


class Bench:
    """All methods on one net in one setting."""

    def __init__(self, net, setting, data):
        self.net, self.setting, self.data = net, setting, data
        self.tested = make_net(net)
        self.pretrained = functools.cache(self.pretrain)
        self.parts = functools.cache(self.split)
        # Each is compiled once, for its rates and seeds.
        self.trainer = functools.lru_cache(32)(self.make_trainer)

    def make_trainer(self, method, **own):
        return Trainer(self.net, method, self.setting.batch, **own)

    def search(self, method):
        """Return the parameters that are best on validation images."""
        import numpy as np

        def validate(rate, **own):
            return np.mean(
                [
                    self.train(
                        self.trainer(method, **own), rate, 100 + seed, True
                    )
                    for seed in range(self.setting.search_seeds)
                ]
            ).item()

        chosen, tried = search(validate, METHODS[method])
        return {"chosen": chosen, "tried": tried}

    def add_runs(self, row):
        """Train from the seeds that are missing; return whether there are."""
        own = {k: v for k, v in row["chosen"].items() if k != "rate"}
        missing = range(len(row["runs"]), self.setting.seeds)
        row["runs"] += [
            self.train(
                self.trainer(row["method"], **own),
                row["chosen"]["rate"],
                seed,
                False,
            )
            for seed in missing
        ]
        return bool(missing)

    def train(self, trainer, rate, seed, validating):
        """Returns the validation accuracy, or all measures on test images."""
        setting = self.setting
        (images, labels), test = self.parts(validating)
        chosen = some(len(images), setting.images, seed)
        start = self.pretrained(seed) if setting.fine_tuned else None
        model = trainer(
            images[chosen], labels[chosen], setting.epochs, rate, seed, start
        )
        weights = plain_weights(model)
        if validating:
            return self.accuracy(weights, *test)
        return {
            name: self.accuracy(changed, *test)
            for name, changed in self.changed(weights).items()
        } | {"peak": peak(weights)}

    def split(self, validating):
        """The images to train with, and those to test on."""
        train, test = self.data["train"], self.data["test"]
        if validating:
            train, test = (
                [a[:-HELD_OUT] for a in train],
                [a[-HELD_OUT:] for a in train],
            )
        if self.setting.fine_tuned:
            return half(train, 0), half(test, 0)
        return train, test

    def pretrain(self, seed):
        """Weights after training on the classes that are not fine-tuned on."""
        images, labels = half(self.data["train"], 1)
        chosen = some(len(images), 10_000, seed)
        trained = self.plain_trainer(
            images[chosen], labels[chosen], 3, 0.05, seed
        )
        return plain_weights(trained)

    @functools.cached_property
    def plain_trainer(self):
        return Trainer(self.net, "plain", self.setting.batch)

    def changed(self, weights):
        """The weights as they are, rounded, and pruned."""
        import keras_weightmods as kwm

        self.tested.set_weights(weights)
        kwm.sparsify(self.tested, "2:4", criterion="magnitude", verbose=0)
        axes = {"4 bits": None, "4 bits a channel": -1}
        return {
            "accuracy": weights,
            **{
                name: [rounded(w, axis) if w.ndim > 1 else w for w in weights]
                for name, axis in axes.items()
            },
            "2:4": self.tested.get_weights(),
        }

    def accuracy(self, weights, images, labels):
        self.tested.set_weights(weights)
        logits = self.tested.predict(images, batch_size=500, verbose=0)
        return float((logits.argmax(-1) == labels).mean())


class Trainer:
    """Trains one net by one method, compiled once for all rates and seeds."""

    def __init__(self, net, method, batch, decay=None, a=None):
        import keras

        import keras_weightmods as kwm

        self.net, self.method, self.batch, self.a = net, method, batch, a
        self.model = self.make(0)
        optimizer = keras.optimizers.SGD(
            0.1, momentum=MOMENTUM, weight_decay=decay
        )
        optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
        if a is not None:
            optimizer = kwm.CompanderOptimizer(optimizer)
        optimizer.build(self.model.trainable_variables)
        self.model.compile(
            optimizer,
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        self.fresh = [v.numpy().copy() for v in optimizer.variables]

    def make(self, seed, start=None):
        import keras

        import keras_weightmods as kwm

        keras.utils.set_random_seed(seed)
        model = make_net(self.net)
        if start is not None:
            # The head is for other classes.
            head = model.layers[-1].get_weights()
            model.set_weights(start[: -len(head)] + head)
        if self.method == "weight norm":
            kwm.attach_weight_norm(model, verbose=0)
        if self.a is not None:
            learnable = self.method == "WC learnable"
            b = 2 * self.a if learnable else self.a
            # With "raise_a" the fixed a would depend on the seed, and it is
            # a constant in what has been compiled.
            kwm.attach_compander(
                model,
                a=self.a,
                b=b,
                learnable=learnable,
                out_of_range="clip",
                verbose=0,
            )
        return model

    def __call__(self, images, labels, epochs, rate, seed, start=None):
        """Returns the model, trained from this seed."""
        import numpy as np

        # Not only the weights: dropout has a state too.
        pairs = zip(self.model.variables, self.make(seed, start).variables)
        for variable, value in pairs:
            variable.assign(value)
        optimizer = self.model.optimizer
        for variable, value in zip(optimizer.variables, self.fresh):
            variable.assign(value)
        random = np.random.default_rng(seed)
        order = np.concatenate(
            [random.permutation(len(images)) for _ in range(epochs)]
        )
        for part, chosen in enumerate(np.split(order, PARTS)):
            optimizer.learning_rate = rate * (1 - part / PARTS)
            self.model.fit(
                images[chosen],
                labels[chosen],
                batch_size=self.batch,
                shuffle=False,
                verbose=0,
            )
        return self.model


def make_net(net):
    from keras import Input, Sequential, layers

    norm = net == "norm"
    stack = [Input((28, 28, 1))]
    for filters in (8, 16, 32):
        stack.append(
            layers.Conv2D(
                filters, 3, strides=2, padding="same", use_bias=not norm
            )
        )
        if norm:
            stack.append(layers.BatchNormalization(momentum=0.9))
        stack.append(layers.ReLU())
    stack += [layers.Flatten(), layers.Dense(64, activation="relu")]
    return Sequential([*stack, layers.Dropout(0.3), layers.Dense(10)])


def search(measure, parameters):
    """Climb from the start of the parameters to a point without better ones.

    Args:
        measure: Function of the parameters, by name, to what is to be large.
        parameters: Triples of a name, the value to begin at, and the factor
            of a step.

    Returns:
        A pair: the best parameters as a dict, and a list of all that was
        tried, with its `"value"`. Of each parameter the next lower and the
        next higher value were tried with the best of the others. Where all of
        these are equal, as where nothing learns, it begins anew lower on the
        first axis.
    """
    names, starts, factors = zip(*parameters)

    def values(steps):
        found = zip(names, starts, factors, steps)
        return {name: start * by**step for name, start, by, step in found}

    @functools.cache
    def value(steps):
        return measure(**values(steps))

    best, tried = None, [(0,) * len(names)]
    while best != tried[0]:
        best = tried[0]
        for axis in range(len(names)):
            for step in (-1, 1):
                near = list(best)
                near[axis] += step
                if tuple(near) not in tried:
                    tried.append(tuple(near))
        # `max` keeps the first of equals.
        tried.sort(key=value, reverse=True)
        if value(best) == value(tried[0]):
            tried.remove(best)
            tried.insert(0, best)
        if value(tried[-1]) == value(best) and best[0] > LOWEST:
            tried.insert(0, (best[0] - 3, *best[1:]))
    return values(best), [{**values(s), "value": value(s)} for s in tried]


def some(total, count, seed):
    """Indices of `count` of `total` images; other ones for each seed."""
    import numpy as np

    return np.random.default_rng(seed).permutation(total)[:count]


def half(pair, rest):
    """The images of the even classes or of the odd ones, labels from 0 to 4."""
    images, labels = pair
    chosen = labels % 2 == rest
    return images[chosen], labels[chosen] // 2


def plain_weights(model):
    """The weights of the plain model that computes what this one does."""
    import keras

    weights = []
    for layer in model.layers:
        if hasattr(layer, "kernel"):
            weights.append(keras.ops.convert_to_numpy(layer.kernel))
            weights += [layer.bias.numpy()] if layer.use_bias else []
        else:
            weights += layer.get_weights()
    return weights


def rounded(kernel, axis):
    """The kernel in 15 levels, of one scale, or of one for each of an axis."""
    import numpy as np

    sizes = np.abs(kernel)
    if axis is None:
        largest = sizes.max()
    else:
        largest = sizes.reshape(-1, kernel.shape[axis]).max(0)
    scale = np.where(largest > 0, largest, 1) / 7
    return (np.round(kernel / scale) * scale).astype(kernel.dtype)


def peak(weights):
    """The largest weight over the root mean square, mean of the kernels."""
    import numpy as np

    kernels = [w for w in weights if w.ndim > 1]
    return float(
        np.mean([np.abs(w).max() / np.sqrt(np.mean(w**2)) for w in kernels])
    )


def effect(runs, others, measure):
    """The mean difference in points, paired by seed, and its interval."""
    pairs = zip(runs, others, strict=True)
    return harness.interval(
        [100 * (run[measure] - other[measure]) for run, other in pairs]
    )


def effects_of(row, rows, measure):
    """The effects of a row over plain training and over L2, by their names."""
    return {
        other["method"]: effect(row["runs"], other["runs"], measure)
        for other in rows
        if other["method"] in ("plain", "L2")
        and other["method"] != row["method"]
        and (other["setting"], other["net"]) == (row["setting"], row["net"])
    }


def print_report(report):
    # Not above: the page takes from here what it shows.
    from benchmarks.pages import tuning

    harness.print_all(tuning.compander_quality(report), width=250)


if __name__ == "__main__":
    main()
