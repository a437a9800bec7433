"""Models and data in files, of any kind that the library reads."""

import os
import pathlib
from typing import Any

import numpy as np

import keras_weightmods as kwm
from keras_weightmods.cli.command import Result, reported
from keras_weightmods.saving import model_card
from keras_weightmods.saving.atomic_file import replacing
from keras_weightmods.saving.bounded_json import parse_json
from keras_weightmods.saving.file_kinds import kind_of
from keras_weightmods.utils import checks
from keras_weightmods.utils.checks import cut


def load_model(path, policy=None, tie_weights=False):
    """Load a model from a file or preset of any kind.

    Args:
        path: String: a `.keras` file, a file of `save_model`, a GGUF file, the
            folder of a KerasHub preset, or the name of one.
        policy: String, the dtype policy of a GGUF file or preset. Other files
            have their own. Defaults to `None`, for Keras' global policy.
        tie_weights: Bool, as of `load_gguf`. Defaults to `False`.
    """
    kind, reader = kind_of(path) if os.path.exists(path) else ("a preset", "")
    if reader == "`keras_weightmods.load_gguf`":
        return kwm.load_gguf(path, policy, tie_weights=tie_weights)
    if tie_weights:
        raise ValueError(
            "`--tie-weights` needs a .gguf file. Received: --tie-weights with "
            f"{path}, {kind}. Leave it out."
        )
    if kind == "a preset":
        return _load_preset(path, policy)
    if policy is not None:
        raise ValueError(
            "`--policy` needs a .gguf file or a preset. Received: --policy "
            f"{policy} with {path}, {kind}, whose layers have their own. Leave "
            "it out."
        )
    if reader == "`keras_weightmods.load_model`":
        return kwm.load_model(path)
    if reader and kind not in ("a .keras file", "an HDF5 file"):
        raise ValueError(f"{path} is no model: {kind}, which {reader} reads")
    from keras_weightmods.saving.model import load_keras_file

    _ = kwm.load_model  # Keras then knows the classes of this package.
    return load_keras_file(path)


def _load_preset(path, policy):
    try:
        from keras_hub import models
    except ImportError as error:
        what = f"A preset, such as {path},"
        raise checks.not_installed(what, "keras-hub", error) from error
    task = pathlib.Path(path, "task.json")
    cls: Any = models.CausalLM
    try:
        if task.is_file():
            name = parse_json(task.read_bytes())["class_name"]
            cls = getattr(models, name)
            if not issubclass(cls, models.Task):
                raise TypeError
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{task} must be JSON with the `class_name` of a task of KerasHub"
        ) from error
    try:
        return cls.from_preset(path, dtype=policy)
    # A damaged file fails in many ways.
    except Exception as error:
        raise ValueError(
            f"KerasHub cannot load {path}: {cut(error)}"
        ) from error


def written(model, report, args) -> Result:
    """Write a model, to a file of the kind that its ending says, and its card.

    Returns:
        The result of the command that changed it, with the report on that.
    """
    output, card = args.output, card_of(args, report)
    if pathlib.Path(output).suffix == ".safetensors":
        kwm.save_model(model, output, card=card)
    else:
        with replacing(os.path.realpath(output)) as path:
            model.save(path)
        size = os.path.getsize(output)
        model_card.write(card, output, size, model, "keras")
    return reported(report, output, model_card.path_of(output))


def card_of(args, *reports):
    """Return the `ModelCard` of what a command writes.

    What the card of the file that it reads has comes first.
    """
    old = kwm.ModelCard(command="")
    if "model" in args:
        old = model_card.read(args.model)
    return kwm.ModelCard(
        base_model=args.base_model or old.base_model,
        license=args.license or old.license,
        steps=[*old.steps, *reports],
        command=f"{old.command}\n{args.command}".strip(),
    )


def read_data(model, args):
    """Return what a model is calibrated on, or None.

    For a language model of KerasHub a text, cut into rows of tokens that begin
    as the model's do; for any other model the array in a `.npy` file.
    """
    path = args.data
    if path is None:
        return None
    try:
        if path.endswith(".npy"):
            with open(path, "rb") as file:
                return np.lib.format.read_array(file)[: args.rows]
        text = pathlib.Path(path).read_text("utf-8")
    except ValueError as error:
        expected = f"a text in UTF-8, or an array in a .npy file ({error})"
        raise checks.error("data", expected, path) from error
    from keras_weightmods.evaluation import perplexity

    checks.check_int("length", args.length, 2)
    tokens = perplexity.tokenize(model, text)
    start = perplexity.start_token(model)
    size = args.length
    if start is not None:
        tokens, size = tokens[1:], size - 1
    rows = tokens[: len(tokens) // size * size].reshape(-1, size)[: args.rows]
    if not len(rows):
        expected = f"a text of at least {args.length} tokens"
        raise checks.error("data", expected, path)
    return rows if start is None else np.insert(rows, 0, start, axis=1)
