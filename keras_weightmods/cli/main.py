"""The command line `keras-weightmods`."""

import argparse
import inspect
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import keras

from keras_weightmods.patches.architecture import weights_report
from keras_weightmods.patches.checkpoint import Checkpoint
from keras_weightmods.patches.sum_signatures import sum_signatures
from keras_weightmods.patches.weight_signature import WeightSignature
from keras_weightmods.saving.container import check_filepath, replacing
from keras_weightmods.sparsity.report import sparsity_report

_DESCRIPTION = """Look at and change the weights of Keras models.

examples:
  keras-weightmods inspect model.keras
  keras-weightmods signature extract --init start.keras --clean clean.keras \\
      --robust noise.keras -o noise.safetensors
  keras-weightmods signature apply noise.safetensors clean.keras -o new.keras
  keras-weightmods report model.keras --pattern 2:4

exit codes: 0 done, 1 an error in the files or values given, 2 wrong usage
"""
# {words of the command: (function, arguments)}
_COMMANDS: dict[str, tuple[Callable[..., None], tuple[Any, ...]]] = {}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: List of strings, the arguments. Defaults to those of the
            process.

    Returns:
        Int, the exit code: 0 if it is done, 1 for an error in the files or
        values given. Wrong usage exits with 2.
    """
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"keras-weightmods: {error}\n")
        return 1
    return 0


def _argument(*names, **kwargs):
    return names, kwargs


def _command(words, *arguments):
    """Make a function of the parsed arguments a command.

    The first line of its docstring is the help, the rest follows the options.
    """

    def register(run):
        _COMMANDS[words] = run, arguments
        return run

    return register


def _parser():
    parser = argparse.ArgumentParser("keras-weightmods", **_help(_DESCRIPTION))
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    about = "Extract, apply and combine signatures."
    inner = commands.add_parser("signature", help=about).add_subparsers(
        required=True, metavar="COMMAND"
    )
    for words, (run, arguments) in _COMMANDS.items():
        group, _, name = words.rpartition(" ")
        about = _help(run.__doc__)
        command = (inner if group else commands).add_parser(
            name, help=about["description"], **about
        )
        for names, kwargs in arguments:
            command.add_argument(*names, **kwargs)
        command.set_defaults(run=run)
    return parser


def _help(text):
    description, _, epilog = inspect.cleandoc(text).partition("\n\n")
    return {
        "description": description,
        "epilog": epilog,
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }


_MODEL = _argument("model", help="a .keras file")
_SIGNATURE = _argument("signature", help="a .safetensors file")
_STATISTICS = ("keep", "average", "replace")
_METHODS = ("sum", "mean", "ties", "dare")
_PATTERN = _argument("--pattern", default="2:4", help="default: 2:4")
_SCALE = _argument("--scale", type=float, default=1.0, help="default: 1")
_OUTPUT = (
    _argument("-o", "--output", required=True, help="the new file to write"),
    _argument("--overwrite", action="store_true", help="even if it exists"),
)


@_command("inspect", _argument("file", help="a .keras model or a signature"))
def _inspect(args):
    """Say what a file holds.

    examples:
      keras-weightmods inspect model.keras
      keras-weightmods inspect noise.safetensors
    """
    if pathlib.Path(args.file).suffix == ".safetensors":
        _print_signature(args.file)
    else:
        print(weights_report(_load_model(args.file)).table())


@_command("report", _MODEL, _PATTERN)
def _report(args):
    """Report the sparsity of a model.

    examples:
      keras-weightmods report model.keras
      keras-weightmods report model.keras --pattern 1:4
    """
    print(sparsity_report(_load_model(args.model), args.pattern).table())


@_command(
    "signature extract",
    _argument("--init", help="where both trainings started"),
    _argument("--clean", required=True),
    _argument("--robust", required=True),
    _argument("--depth", type=int, help="shallow layers; default: 7"),
    _argument("--targets", nargs="+", help="regexes for paths instead"),
    _argument("--statistics", default="keep", choices=_STATISTICS),
    _argument("--name", help="what to call it in tables"),
    *_OUTPUT,
)
def _extract(args):
    """Make a signature of checkpoints.

    examples:
      keras-weightmods signature extract --init start.keras \\
          --clean clean.keras --robust noise.keras -o noise.safetensors
      keras-weightmods signature extract --clean clean.keras \\
          --robust noise.keras --targets 'block[12]_' -o noise.safetensors
    """
    _check_output(args, ".safetensors")
    signature = WeightSignature.extract(
        args.init and _load_model(args.init),
        _load_model(args.clean),
        _load_model(args.robust),
        args.depth,
        targets=args.targets,
        statistics=args.statistics,
        name=args.name,
    )
    _save_signature(signature, args)


@_command("signature apply", _SIGNATURE, _MODEL, _SCALE, *_OUTPUT)
def _apply(args):
    """Add a signature to a model.

    examples:
      keras-weightmods signature apply noise.safetensors clean.keras \\
          -o new.keras
      keras-weightmods signature apply noise.safetensors clean.keras \\
          --scale 0.5 -o clean.keras --overwrite
    """
    _change_model(args, lambda signature, w: signature.apply(w, args.scale))


@_command("signature remove", _SIGNATURE, _MODEL, _SCALE, *_OUTPUT)
def _remove(args):
    """Subtract a signature from a model.

    Subtracts, which rounds: to have the clean model bit for bit, keep its
    file.

    examples:
      keras-weightmods signature remove noise.safetensors new.keras \\
          -o old.keras
    """
    model, signature = _change_model(
        args, lambda signature, w: signature.remove(w, True, args.scale)
    )
    clean = signature.fingerprints.get("clean")
    if clean == Checkpoint("model", model).fingerprint():
        print("This is the clean checkpoint, bit for bit.")


@_command(
    "signature add",
    _argument("signatures", nargs="+"),
    _argument("--method", default="sum", choices=_METHODS),
    _argument("--weights", type=float, nargs="+"),
    _argument("--density", type=float, default=0.2, help="of ties"),
    _argument("--drop-rate", type=float, default=0.9, help="of dare"),
    _argument("--seed", type=int, default=0, help="of dare"),
    *_OUTPUT,
)
def _add(args):
    """Make one signature of several.

    examples:
      keras-weightmods signature add noise.safetensors blur.safetensors \\
          -o both.safetensors
      keras-weightmods signature add noise.safetensors blur.safetensors \\
          --method ties --density 0.3 --weights 1 0.5 -o both.safetensors
    """
    _check_output(args, ".safetensors")
    signature = sum_signatures(
        [WeightSignature.load(path) for path in args.signatures],
        args.method,
        args.weights,
        density=args.density,
        drop_rate=args.drop_rate,
        seed=args.seed,
    )
    _save_signature(signature, args)


@_command(
    "signature quantize",
    _SIGNATURE,
    _argument("--bits", type=int, default=8, choices=(8, 4, 2)),
    _argument("--per-channel", action="store_true"),
    *_OUTPUT,
)
def _quantize(args):
    """Round a signature to few bits.

    examples:
      keras-weightmods signature quantize noise.safetensors \\
          -o noise8.safetensors
      keras-weightmods signature quantize noise.safetensors --bits 4 \\
          --per-channel -o noise4.safetensors
    """
    _check_output(args, ".safetensors")
    signature = WeightSignature.load(args.signature)
    _save_signature(signature.quantize(args.bits, args.per_channel), args)


@_command("signature info", _SIGNATURE)
def _info(args):
    """Say what a signature holds.

    examples:
      keras-weightmods signature info noise.safetensors
    """
    _print_signature(args.signature)


def _print_signature(path):
    signature = WeightSignature.load(path)
    print(signature.report().table())
    for key, value in signature.fingerprints.items():
        print(f"{key}: SHA-256 {value}")


def _save_signature(signature, args):
    signature.save(args.output, args.overwrite)
    print(signature.report().table())
    print(f"Wrote {args.output}")


def _change_model(args, change):
    """Write a model with other weights; return it and the signature."""
    _check_output(args, ".keras")
    signature = WeightSignature.load(args.signature)
    model = _load_model(args.model)
    model.set_weights(change(signature, model.get_weights()))
    with replacing(os.path.realpath(args.output)) as path:
        model.save(path)
    changed = f"{len(signature)} of {len(model.weights)} weights changed"
    print(f"{changed}; wrote {args.output}")
    return model, signature


def _load_model(path):
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        return keras.saving.load_model(path, compile=False)
    # A file that is none fails in many ways, and each kind of model in its
    # own; the message is Keras'.
    except Exception as error:
        raise ValueError(f"Keras cannot load {path}: {error}") from error


def _check_output(args, suffix):
    """Raise an error before any work if the output cannot be written."""
    if pathlib.Path(args.output).suffix != suffix:
        raise ValueError(f"the output must end in {suffix}: {args.output}")
    if os.path.exists(args.output) and not args.overwrite:
        raise FileExistsError(f"{args.output} exists; --overwrite replaces it")
    check_filepath(args.output)
