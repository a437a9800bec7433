"""The command line `keras-weightmods`.

Keras is imported by the commands that need it, once their files are there.
"""

import argparse
import contextlib
import importlib.util
import inspect
import json
import os
import pathlib
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from keras_weightmods.cli import info as info
from keras_weightmods.cli import models as models
from keras_weightmods.cli import patches as patches
from keras_weightmods.cli.command import COMMANDS, MODELS, SET
from keras_weightmods.saving import model_card
from keras_weightmods.saving.atomic_file import check_filepath
from keras_weightmods.utils.checks import cut, printable
from keras_weightmods.version import __version__

_DESCRIPTION = """Look at and change the weights of Keras models.

examples:
  keras-weightmods info model.keras
  keras-weightmods quantize llm.safetensors --data prose.txt \\
      -o rounded.safetensors
  keras-weightmods pack rounded.safetensors -o packed.safetensors
  keras-weightmods generate packed.safetensors "Once upon a time"

Results go to standard output, progress and errors to standard error.

exit codes: 0 done, 1 an error in the files or values given, 2 wrong usage,
130 interrupted
"""
_PATCH = "Extract, apply and remove the changes of a training."
BACKENDS = ("jax", "torch", "tensorflow")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: List of strings, the arguments. Defaults to those of the
            process.

    Returns:
        Int, the exit code: 0 if it is done, 1 for an error in the files or
        values given, 130 for an interrupt. Wrong usage exits with 2.
    """
    try:
        args = _parser().parse_args(argv)
        words = sys.argv[1:] if argv is None else argv
        args.command = shlex.join(["keras-weightmods", *words])
        _check_output(args)
        choose_backend(args.backend)
        # Keras' progress bars are no part of the result.
        with contextlib.redirect_stdout(sys.stderr):
            text, found = args.run(args)
    except (ValueError, TypeError, OSError, EOFError, ImportError) as error:
        sys.stderr.write(f"keras-weightmods: {printable(cut(error, 2000))}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("keras-weightmods: interrupted\n")
        return 130
    print(json.dumps(found, indent=2) if args.json else text)
    return 0


def _check_output(args):
    """Raise an error before any work if the output cannot be written."""
    if not hasattr(args, "output"):
        return
    if os.path.exists(args.output) and not args.overwrite:
        raise FileExistsError(f"{args.output} exists; --overwrite replaces it")
    if not os.path.isdir(args.output):
        check_filepath(args.output)
    # The card of a folder lies in it.
    if "license" in args and pathlib.Path(args.output).suffix in MODELS:
        model_card.check_path(model_card.path_of(args.output), args.overwrite)


def choose_backend(name: str | None) -> None:
    """Set the backend of Keras for this process, before it is imported.

    Args:
        name: String; `None` for the one in KERAS_BACKEND, else in Keras' own
            configuration if it is installed, else any that is.

    Raises:
        ValueError: If Keras runs on another one already.
        ImportError: If it is not installed, or none is.
    """
    if "keras" in sys.modules:
        loaded = sys.modules["keras"].backend.backend()
        if name not in (None, loaded):
            raise ValueError(
                f"Keras runs on {loaded} in this process. Received: "
                f"--backend {name}"
            )
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    wanted = name or os.environ.get("KERAS_BACKEND")
    names = [wanted] if wanted else list(BACKENDS)
    if not wanted:
        home = os.environ.get("KERAS_HOME", os.path.expanduser("~/.keras"))
        # Keras reads the same file, if it exists.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            text = pathlib.Path(home, "keras.json").read_text()
            configured = json.loads(text)["backend"]
            names.sort(key=lambda each: each != configured)
    for each in names:
        if importlib.util.find_spec(each) is not None:
            os.environ["KERAS_BACKEND"] = each
            return
    raise ImportError(
        f"Keras needs a backend, and {' or '.join(dict.fromkeys(names))} is "
        f"not installed. Install with: pip install {names[-1]}"
    )


def _parser():
    parser = argparse.ArgumentParser("keras-weightmods", **_help(_DESCRIPTION))
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    patch = commands.add_parser("patch", help=_PATCH, description=_PATCH)
    groups = {
        "": commands,
        "patch": patch.add_subparsers(required=True, metavar="COMMAND"),
    }
    common: dict[str, dict[str, Any]] = {
        "--json": {**SET, "help": "print the result as JSON"},
        "--backend": {
            "choices": BACKENDS,
            "help": "default: the one in KERAS_BACKEND, or one installed",
        },
    }
    for words, (run, arguments) in COMMANDS.items():
        group_name, _, name = words.rpartition(" ")
        about = _help(run.__doc__)
        command = groups[group_name].add_parser(
            name, help=about["description"], **about
        )
        for name, settings in (arguments | common).items():
            names = ("-o", name) if name == "--output" else (name,)
            parts = [settings.get("help")]
            if settings.get("default"):
                parts.append("default: %(default)s")
            text = "; ".join(filter(None, parts))
            command.add_argument(*names, **{**settings, "help": text})
        command.set_defaults(run=run)
    return parser


def _help(text):
    description, _, epilog = inspect.cleandoc(text).partition("\n\n")
    return {
        "description": description,
        "epilog": epilog,
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }


if __name__ == "__main__":
    sys.exit(main())
