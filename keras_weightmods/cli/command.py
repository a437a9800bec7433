"""What a command is: a function, with its arguments beside it."""

from collections.abc import Callable
from typing import Any

# What a command returns: text to print, and the same for `--json`.
Result = tuple[str, dict[str, Any]]
# {words of the command: (function of the parsed arguments, its arguments)}
COMMANDS: dict[str, tuple[Callable[..., Result], tuple[Any, ...]]] = {}


def argument(*names, **kwargs):
    """Return what `argparse` takes as an argument."""
    return names, kwargs


def command(words, *arguments):
    """Make a function of the parsed arguments a command.

    The first line of its docstring is the help, the rest follows the options.
    """

    def register(run):
        COMMANDS[words] = run, arguments
        return run

    return register


MODEL = argument(
    "model",
    help="a .keras file, one of `save_model`, or a KerasHub preset",
)
PATTERN = argument("--pattern", default="2:4", help="default: 2:4")
TARGETS = argument(
    "--targets", nargs="+", help="regexes for the paths of kernels"
)
SCALE = argument("--scale", type=float, default=1.0, help="default: 1")
OUTPUT = (
    argument("-o", "--output", required=True, help="the new file to write"),
    argument("--overwrite", action="store_true", help="even if it exists"),
)
QUIET = argument("--quiet", action="store_true", help="no progress bars")
DATA = (
    argument(
        "--data",
        help="a text, or tokens in a .npy file, for a language model; else "
        "inputs in a .npy file, or x and y in a .npz file",
    ),
    argument("--rows", type=int, default=128, help="rows of it; default: 128"),
    argument(
        "--length", type=int, default=256, help="tokens in one; default: 256"
    ),
)


def reported(report, output=None) -> Result:
    """Return the result of a command that has a report, and wrote a file."""
    text, found = report.table(), report.to_dict()
    if output is None:
        return text, found
    return f"{text}\nWrote {output}", {**found, "output": output}
