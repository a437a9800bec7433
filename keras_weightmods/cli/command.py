"""What a command is: a function, with its arguments beside it.

The types of the arguments look at the files before Keras is imported.
"""

import argparse
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

# What a command returns: text to print, and the same for `--json`.
Result = tuple[str, dict[str, Any]]
# {words of the command: (function of the parsed arguments, its arguments)}
COMMANDS: dict[str, tuple[Callable[..., Result], tuple[Any, ...]]] = {}
# A model without one of these, and in no folder, may be a preset's name.
_FILES = (".keras", ".safetensors", ".h5", ".hdf5", ".npz", ".npy")


def command(words, *arguments):
    """Make a function of the parsed arguments a command.

    The first line of its docstring is the help, the rest follows the options.
    """

    def register(run):
        COMMANDS[words] = run, arguments
        return run

    return register


def argument(*names, **kwargs):
    """Return what `argparse` takes as an argument."""
    return names, kwargs


def file(path):
    """Return the path of a file that exists."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"there is no file {path}")
    return path


def _model(name):
    is_path = name.endswith(_FILES) or os.path.dirname(name)
    return file(name) if is_path and "://" not in name else name


def _option(text):
    """Return the pair of `NAME=VALUE`, a value in JSON or else a string."""
    name, sign, value = text.partition("=")
    if not sign:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def output(*endings):
    """Return the arguments of a command that writes a file."""

    def path(text):
        if endings and pathlib.Path(text).suffix not in endings:
            expected = " or ".join(endings)
            raise argparse.ArgumentTypeError(f"{text} must end in {expected}")
        return text

    return (
        argument(
            "-o", "--output", required=True, type=path, help="the new file"
        ),
        argument("--overwrite", action="store_true", help="even if it exists"),
    )


MODEL = argument(
    "model",
    type=_model,
    help="a .keras file, one of `save_model`, or a KerasHub preset",
)
BASE = argument("base", type=_model, help="the model that it started from")
PATTERN = argument("--pattern", default="2:4", help="default: 2:4")
TARGETS = argument(
    "--targets", nargs="+", help="regexes for the paths of kernels"
)
SCALE = argument("--scale", type=float, default=1.0, help="default: 1")
FORCE = argument(
    "--force", action="store_true", help="also on a model that is another one"
)
OPTIONS = argument(
    "--set",
    type=_option,
    nargs="+",
    default=[],
    metavar="NAME=VALUE",
    help="more arguments of the call",
)
QUIET = argument("--quiet", action="store_true", help="no progress bars")
DATA = (
    argument(
        "--data",
        type=file,
        help="a text for a language model, or inputs in a .npy file",
    ),
    argument("--rows", type=int, default=128, help="rows of it; default: 128"),
    argument(
        "--length", type=int, default=256, help="tokens in one; default: 256"
    ),
)
MODEL_OUTPUT = output(".keras", ".safetensors")


def reported(report, output=None) -> Result:
    """Return the result of a command that has a report, and wrote a file."""
    text, found = report.table(), report.to_dict()
    if output is None:
        return text, found
    return f"{text}\nWrote {output}", {**found, "output": output}
