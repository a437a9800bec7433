"""What a command is: a function, and the names of its arguments.

The types of the arguments look at the files before Keras is imported.
"""

import argparse
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

from keras_weightmods.utils.checks import shown

# What a command returns: text to print, and the same for `--json`.
Result = tuple[str, dict[str, Any]]
# A model without one of these, and in no folder, may be a preset's name.
_FILES = (".keras", ".gguf", ".safetensors", ".h5", ".hdf5", ".npz", ".npy")


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
        raise argparse.ArgumentTypeError(
            f"expected NAME=VALUE, got {shown(text)}"
        )
    try:
        return name, json.loads(value)
    except (RecursionError, ValueError):
        return name, value


def output(endings):
    """Return the type of a path that ends in one of `endings`, if any."""

    def path(text):
        if endings and pathlib.Path(text).suffix not in endings:
            expected = " or ".join(endings)
            raise argparse.ArgumentTypeError(f"{text} must end in {expected}")
        return text

    return path


def number(text):
    """Return an int, or a float where it is written as one."""
    return float(text) if "." in text else int(text)


def names(*known):
    """Return the type of some of these names, with commas between them."""

    def parse(text):
        found = text.split(",")
        if not {*found} <= {*known}:
            expected = f"some of {','.join(known)}, with commas and no spaces"
            raise argparse.ArgumentTypeError(f"{text} must be {expected}")
        return found

    return parse


SET = {"action": "store_true"}
# What `argparse` takes of each argument; a command may have one of its own.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "model": {
        "type": _model,
        "help": "a .keras or .gguf file, a file of `save_model`, or a "
        "KerasHub preset",
    },
    "base": {"type": _model, "help": "the model that MODEL was trained from"},
    "file": {"type": file, "help": "a model, a patch or a preset"},
    "lora": {"type": file, "help": "a LoRA adapter, a folder of peft"},
    "models": {
        "type": file,
        "nargs": "+",
        "help": "models of one architecture, .keras files or files of "
        "`save_model`; or a config of mergekit, .yaml or .json",
    },
    "patch": {"type": file, "help": "a file of `patch extract`"},
    "prompt": {"nargs": "+", "help": "the beginnings of texts"},
    "--base-model": {
        "metavar": "NAME",
        "help": "for the model card: what the model was made from",
    },
    "--license": {"help": "for the model card, such as apache-2.0"},
    "--activations": {"choices": ("int8", "float32")},
    "--base": {"type": file, "help": "what the models were trained from"},
    "--bits": {"type": number, "help": "2 to 6, or a mean: 3.5; default: 4"},
    "--criterion": {
        "default": "magnitude",
        "choices": ("magnitude", "wanda", "sparsegpt"),
        "help": "all but magnitude need --data",
    },
    "--data": {
        "type": file,
        "help": "a text for a language model, or inputs in a .npy file",
    },
    "--depth": {"type": int, "help": "layers of a signature; default: 7"},
    "--dtype": {
        "default": "bfloat16",
        "choices": ("bfloat16", "float32", "exact"),
        "help": "the type of the differences; exact stores the new values "
        "instead, which give the model bit for bit",
    },
    "--force": {**SET, "help": "also on a model that is not the base"},
    "--format": {
        "help": "a format of `kwm.export`; default: by the ending of the "
        "output, or tf_saved_model without one"
    },
    "--init": {"type": file, "help": "for a signature: the common start"},
    "--keep-packed": SET,
    "--length": {"type": int, "default": 256, "help": "tokens in a row"},
    "--max-length": {
        "type": int,
        "default": 64,
        "help": "tokens of a text, the prompt included",
    },
    "--method": {"default": "linear"},
    "--pattern": {"default": "2:4"},
    "--policy": {
        "metavar": "POLICY",
        "help": "the dtype policy of a .gguf file or a preset: bfloat16 takes "
        "half of the memory of float32; default: that of Keras",
    },
    "--quiet": {**SET, "help": "no progress bars"},
    "--rank": {"type": int, "default": 16},
    "--refine": {"type": names("swaps", "blocks"), "help": "swaps,blocks"},
    "--rows": {"type": int, "default": 128, "help": "rows of the data"},
    "--sampler": {
        "default": "greedy",
        "choices": ("greedy", "top_k", "top_p", "random"),
    },
    "--scale": {"type": float, "default": 1.0},
    "--seed": {"type": int, "default": 0},
    "--set": {
        "type": _option,
        "nargs": "+",
        "default": (),
        "metavar": "NAME=VALUE",
        "help": "more arguments of the call",
    },
    "--signature": {
        **SET,
        "help": "extract a robust weight signature, for any model of the "
        "architecture: train MODEL on corrupted data, BASE on clean data",
    },
    "--targets": {"nargs": "+", "help": "regexes for the paths of kernels"},
    "--tie-weights": {
        **SET,
        "help": "load one table where a .gguf file has that of the head twice",
    },
    "--weights": {"type": float, "nargs": "+", "help": "one for each model"},
    "--whole": {
        "nargs": "+",
        "metavar": "REGEX",
        "help": "weights to store whole, such as a new head",
    },
}
DATA = "--data --rows --length"
# How a model is loaded.
LOAD = "--policy --tie-weights"
MODELS = (".keras", ".safetensors")
PATCHES = (".safetensors",)
# Those of commands that write a model, with its card.
CARD = "--base-model --license"


# {words: (function of the parsed arguments, {argument: its settings})}. The
# first line of its docstring is the help, the rest follows the options.
COMMANDS: dict[str, tuple[Callable[..., Result], dict[str, Any]]] = {}


def command(words, names, writes=None, **own):
    """Make a function of the parsed arguments a command.

    Args:
        words: String, the words of the command.
        names: String, the names of its arguments.
        writes: Tuple of the endings of the file that it writes, empty for any.
            Defaults to `None`, for no file.
        **own: Options that are not as in `ARGUMENTS`.
    """
    arguments = {name: ARGUMENTS[name] for name in names.split()}
    arguments |= {f"--{name}": settings for name, settings in own.items()}
    if writes is not None:
        path = {"type": output(writes), "required": True}
        arguments["--output"] = {**path, "help": "the new file"}
        arguments["--overwrite"] = {**SET, "help": "replace an existing file"}

    def register(run):
        COMMANDS[words] = run, arguments
        return run

    return register


def reported(report, output=None, card=None) -> Result:
    """Return the result of a command that has a report, and wrote files."""
    files = {"output": output, "card": card}
    files = {key: path for key, path in files.items() if path is not None}
    lines = report.table(), *(f"Wrote {path}" for path in files.values())
    return "\n".join(lines), report.to_dict() | files
