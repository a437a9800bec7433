"""KerasHub's language models from GGUF files."""

import importlib
import types
import warnings
from typing import Any

import numpy as np

from keras_weightmods.core import keras_compat
from keras_weightmods.core.restored import RestoredOnError
from keras_weightmods.exporting.gguf_families import (
    ATTENTION_FACTOR,
    FAMILIES,
    LONG_FACTORS,
    SCALING_FACTOR,
    Family,
    of_blocks,
    weights_of,
)
from keras_weightmods.exporting.gguf_file import attention_factor, rope_factors
from keras_weightmods.exporting.gguf_header import Header
from keras_weightmods.exporting.gguf_tokenizer import make_preprocessor
from keras_weightmods.utils import checks
from keras_weightmods.utils.progress import Progress

_ROPE_FACTORS = "rope_freqs.weight"
_TABLE, _HEAD = "token_embd.weight", "output.weight"
# Between two roundings of one table there is less, of its norm.
_APART = 0.25
_HEAD_SIZES = (
    "rope.dimension_count",
    "attention.key_length",
    "attention.value_length",
)
# What a file may say of a model beside what a backbone takes.
_KNOWN = {
    *("context_length", "vocab_size", *_HEAD_SIZES),
    *(
        "rope.scaling.type",
        SCALING_FACTOR,
        "rope.scaling.original_context_length",
    ),
}


def load_gguf(
    filepath: Any,
    dtype: Any = None,
    *,
    tie_weights: bool = False,
    verbose: int = 1,
) -> Any:
    """Load a language model of KerasHub with its tokenizer from a GGUF file.

    | `general.architecture` | classes of KerasHub |
    |---|---|
    | `llama` | `Llama3CausalLM`, or `LlamaCausalLM` with SentencePiece |
    | `qwen2` | `QwenCausalLM` |
    | `qwen3` | `Qwen3CausalLM` |
    | `gemma3` | `Gemma3CausalLM`, for text |
    | `smollm3` | `SmolLM3CausalLM` |
    | `phi3` | `Phi3CausalLM`: Phi 3 mini and medium, 3.5 mini, and 4 |

    The file can have all tensor types that the package `gguf` dequantizes: F32,
    F16, BF16, Q4_0 to Q8_0, Q2_K to Q6_K, and the IQ types. The model has
    floats of the same values. The names, shapes and sizes of all tensors are
    checked before the first is read. Tensors are read one after another, large
    ones in parts, so no second copy of the model is in memory.

    `model.preprocessor` has a tokenizer of KerasHub, and `model.generate` takes
    text. The tokenizer has the `chat_template` of the file, or `None`. Each
    special token in a text becomes one id, as in `tokenizer("<|im_start|>")`.
    Special tokens have the kind CONTROL or USER_DEFINED in the file; the
    unknown token of SentencePiece is not one. `model.generate` stops at the end
    token of the file, and at that of KerasHub's class. The preprocessor adds
    the start token where the file says so. A chat template that writes it too
    doubles it.

    Byte pairs split text as the file says, also after `save_model` and
    `load_model`. In files of Keras, in presets and in a graph of TensorFlow, as
    in `tf.data`, they split it as KerasHub does, which gives other ids. Set
    `model.preprocessor` again there. Saving loses `chat_template`, and an end
    token that is not that of the class.

    Args:
        filepath: String or path of the file. Join a split file first, with
            `llama-gguf-split --merge`.
        dtype: String or `keras.DTypePolicy` of the layers, such as
            `"bfloat16"`. Defaults to `None`, for Keras' global policy.
            KerasHub's SmolLM3 takes that one alone, and it must not be mixed.
        tie_weights: Bool, whether the embedding and the head share the table
            of the head. Many files have it twice, once in fewer bits, though
            the model was trained with one. One table takes half of the memory,
            and `pack` packs it. Defaults to `False`, for what the file has.
        verbose: 0 or 1. 0 shows no progress bar; 1 shows one once it has
            taken two seconds. Defaults to `1`.

    Returns:
        A `keras_hub.models.CausalLM`. Its preprocessor is `None` if the file
        has no tokenizer. It is also `None`, with a warning, if no class of
        KerasHub matches the file's tokenizer.

    Raises:
        ValueError: If the file is not a whole GGUF file, has another
            architecture, or hyperparameters that KerasHub does not support. If
            tensors are missing, unknown or of another shape. The message names
            them. If `tie_weights=True` and the two tables differ by more than
            a quarter, or the class has two. If the class ignores `dtype`.
        ImportError: If `gguf` or `keras_hub` is missing.

    Example:

    ```python
    import os
    import tempfile
    import keras_weightmods as kwm
    from keras_hub import models

    model = models.Llama3CausalLM(
        models.Llama3Backbone(96, 1, 4, 32, 64, 2), preprocessor=None
    )
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.gguf")
        kwm.export(model, path, dtype="f32")
        again = kwm.load_gguf(path)
    assert again.count_params() == model.count_params()
    ```
    """
    checks.check_bool("tie_weights", tie_weights)
    checks.check_verbose(verbose)
    path = checks.check_path("filepath", filepath)
    try:
        importlib.import_module("gguf")
        importlib.import_module("keras_hub")
    except ImportError as error:
        raise checks.not_installed(
            "`load_gguf`", "gguf keras-hub", error
        ) from error
    from keras_hub import models

    with RestoredOnError(), Progress(1, "tensor", verbose) as progress:
        header = Header(path)
        architecture = header.fields.get("general.architecture")
        family = FAMILIES.get(str(architecture))
        if family is None:
            raise ValueError(
                "Expected a GGUF file of one of the architectures "
                f"{', '.join(FAMILIES)}. Received: general.architecture="
                f"{architecture!r}, in filepath={path!r}"
            )
        if tie_weights and {_TABLE, _HEAD} <= header.tensors.keys():
            _tie(header, family)
        is_spm = header.fields.get("tokenizer.ggml.model") == "llama"
        name = family.names[-1 if is_spm else 0]
        arguments = _arguments(header, family)
        with keras_compat.without_values() as pending:
            backbone = getattr(models, f"{name}Backbone")(
                **arguments, dtype=dtype
            )
        policy = backbone.token_embedding.dtype_policy
        is_mixed = policy.compute_dtype != policy.variable_dtype
        if family.computed and (is_mixed or policy != backbone.dtype_policy):
            raise ValueError(
                f"`{name}Backbone` takes Keras' global policy alone, and none "
                f"that is mixed: it would round positions. Received: dtype="
                f"{dtype!r}, and the global policy {policy.name!r}. Leave out "
                "`dtype`, and call `keras.config.set_dtype_policy('bfloat16')` "
                "before."
            )
        variables = _variables(header, family, backbone)
        progress.total = len(variables) + 1
        head_size = family.head_size(backbone)
        # Large ones first: they take most memory while they are read.
        for tensor, parts in sorted(
            variables.items(),
            key=lambda x: -np.prod(header.tensors[x[0]].shape),
        ):
            value = header.read(tensor, parts[0].dtype)
            start = 0
            for variable in parts:
                rows = family.file_shape(tensor, variable.shape)[0]
                part = value[start : start + rows]
                part = family.from_file(tensor, part, variable.shape, head_size)
                keras_compat.restore_value(variable, part)
                start += rows
            del value, part
            progress.add()
        for variable in pending:
            if not keras_compat.has_value(variable):
                keras_compat.initialize(variable)
        keras_compat.list_torch_parameters(backbone)
        preprocessor = make_preprocessor(header.fields, name)
        progress.add()
        return getattr(models, f"{name}CausalLM")(
            backbone=backbone, preprocessor=preprocessor
        )


def _arguments(header: Header, family: Family) -> dict[str, Any]:
    """Return the arguments of the backbone, from the fields of a file."""
    architecture = header.fields["general.architecture"]
    prefix = f"{architecture}."
    found = {
        key.removeprefix(prefix): value
        for key, value in header.fields.items()
        if key.startswith(prefix)
    }
    if found.get("rope.scaling.type") == "none":
        # llama.cpp scales nothing then.
        found.pop(SCALING_FACTOR, None)
    arguments: dict[str, Any] = {}
    problems = []
    for argument, (key, kind, default) in family.fields.items():
        value = found.get(key, default)
        least = 1 if kind is int else 0
        is_kind = type(value) is int or (kind is float and type(value) is float)
        if value is None:
            problems.append(f"{prefix}{key} is missing")
        elif not is_kind or not least <= value < 2**31:
            expected = "an int" if kind is int else "a float"
            problems.append(
                f"{prefix}{key} must be {expected} >= {least}. Received: "
                f"{checks.shown(value)}"
            )
        # The shortest float that is the same in 32 bits.
        elif kind is float:
            value = float(str(np.float32(value)))
        arguments[argument] = value
    known = {key for key, _, _ in family.fields.values()}
    wanted = dict(family.constants)
    if SCALING_FACTOR not in known:
        wanted[SCALING_FACTOR] = 1.0
    problems += [
        f"{prefix}{key} is {found[key]}, and KerasHub has {value} alone"
        for key, value in wanted.items()
        if found.get(key, value) != value
    ]
    if found.get("rope.scaling.type", "none") not in ("none", "linear"):
        problems.append(
            f"{prefix}rope.scaling.type is {found['rope.scaling.type']!r}, "
            "which is not read"
        )
    heads: Any = [found.get(f"attention.head_count{x}") for x in ("", "_kv")]
    if not problems and heads[0] % heads[1]:
        problems.append(
            f"{prefix}attention.head_count is {heads[0]}, no multiple of "
            f"head_count_kv={heads[1]}"
        )
    summary = f"{header.filepath!r} has hyperparameters that do not fit:"
    checks.raise_all(summary, problems)
    blocks = arguments["num_layers"]
    if blocks > len(header.tensors):
        raise header.error(f"{prefix}block_count is {blocks}")
    arguments |= of_blocks({**family.unused, **family.fixed}, blocks)
    if architecture == "phi3":
        arguments |= _phi3_arguments(header, arguments, found)
    others = sorted(found.keys() - known - _KNOWN - wanted.keys())
    if others:
        warnings.warn(
            f"{header.filepath!r} says more of the model than KerasHub's class "
            f"takes: {checks.cut(', '.join(prefix + x for x in others))}. "
            "These settings are ignored, and outputs may differ.",
            # The line that calls `load_gguf`.
            stacklevel=3,
        )
    table = header.tensors.get(_TABLE)
    if table is None or len(table.shape) != 2:
        raise header.error(f"it has no matrix {_TABLE}")
    tokens = header.fields.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) != table.shape[0]:
        raise header.error(
            f"it has {len(tokens)} tokens, and {_TABLE} {table.shape[0]} rows"
        )
    arguments["vocabulary_size"] = table.shape[0]
    if _HEAD in family.tensors and not family.is_untied:
        arguments["tie_word_embeddings"] = _HEAD not in header.tensors
    if _ROPE_FACTORS in header.tensors and architecture == "llama":
        arguments |= _rope_arguments(header, arguments)
    return arguments


def _tie(header: Header, family: Family) -> None:
    """Leave the head's table alone, as the one that is looked up, too."""
    if family.is_untied:
        raise ValueError(
            "`tie_weights=True` expects a model that can have one table. "
            f"Received: filepath={header.filepath!r}, a file for `"
            f"{family.names[0]}CausalLM`, which has two. Leave it out."
        )
    apart: Any = np.inf
    if header.tensors[_TABLE].shape == header.tensors[_HEAD].shape:
        table, head = (header.read(name, "float32") for name in (_TABLE, _HEAD))
        table -= head
        apart = np.linalg.norm(table) / np.linalg.norm(head)
    if not apart < _APART:
        raise ValueError(
            "`tie_weights=True` expects a file that has one table twice. "
            f"Received: {_TABLE} and {_HEAD} that differ by {apart:.0%}, in "
            f"filepath={header.filepath!r}. Leave `tie_weights` out."
        )
    header.tensors[_TABLE] = header.tensors.pop(_HEAD)


def _rope_arguments(header: Header, arguments: Any) -> dict[str, Any]:
    """Return the arguments that give the factors of Llama 3.1 and later.

    A file has no others: the two bounds and the length are those of Meta.
    """
    factors = header.read(_ROPE_FACTORS, "float32")
    del header.tensors[_ROPE_FACTORS]
    factor = float(factors.max())
    if factor == 1:
        return {}
    found = {
        "rope_frequency_adjustment_factor": factor,
        "rope_low_freq_factor": 1.0,
        "rope_high_freq_factor": 4.0,
        "rope_pretraining_sequence_length": 8192,
    }
    backbone = types.SimpleNamespace(**arguments, **found)
    expected = rope_factors(backbone)[_ROPE_FACTORS]
    is_same = factors.shape == expected.shape
    if not (is_same and np.allclose(factors, expected, rtol=1e-4)):
        raise header.error(
            f"its {_ROPE_FACTORS} are not those of Llama 3.1 to 3.3, with a "
            f"factor of {factor:g} for texts longer than 8192"
        )
    return found


def _phi3_arguments(header: Header, arguments: Any, found: Any) -> Any:
    """Return the arguments that give the two sets of factors of Phi 3.

    What needs no warning leaves `found`.
    """
    length = arguments["max_sequence_length"]
    # llama.cpp ignores it too. One as long as all texts, or of 0, is none.
    window = found.get("attention.sliding_window")
    if type(window) is int and not 0 < window < length:
        del found["attention.sliding_window"]
    if not LONG_FACTORS.keys() & header.tensors.keys():
        return {}
    size = arguments["hidden_dim"] // arguments["num_query_heads"]
    factors: dict[str, Any] = {"rope_scaling_type": "su"}
    for name, argument in LONG_FACTORS.items():
        if name not in header.tensors:
            raise header.error(f"it has no {name}")
        shape = header.tensors[name].shape
        if shape != (size // 2,):
            raise header.error(
                f"its {name} has shape {shape}, and KerasHub rotates all of a "
                f"head: expected {(size // 2,)}"
            )
        values = header.read(name, "float32")
        factors[argument] = [float(str(value)) for value in values]
        del header.tensors[name]
    trained = "rope.scaling.original_context_length"
    if trained not in found:
        raise header.error(f"it has factors, and no phi3.{trained}")
    factor = found.pop(ATTENTION_FACTOR, 1.0)
    expected = attention_factor(types.SimpleNamespace(**arguments))
    if type(factor) is not float or abs(factor - expected) > 1e-4:
        raise header.error(
            f"phi3.{ATTENTION_FACTOR} is {factor}, and KerasHub has "
            f"{expected:g} for phi3.context_length={length} and "
            f"phi3.{trained}={found[trained]}"
        )
    return factors


def _variables(header: Header, family: Family, backbone: Any) -> dict[str, Any]:
    """Return {name of a tensor: its variables}, compared with the file."""
    by_path = weights_of(backbone)
    is_tied = backbone.token_embedding.tie_weights
    variables = {
        name: [by_path.pop(path) for path in family.variable_paths(name)]
        for name in family.tensor_names(backbone.num_layers, is_tied)
    }
    problems = [
        f"{name} is missing, for {family.variable_paths(name)[0]!r}"
        for name in variables.keys() - header.tensors.keys()
    ]
    problems += [
        f"{name} is not one of this architecture in KerasHub"
        for name in header.tensors.keys() - variables.keys()
    ]
    for name in variables.keys() & header.tensors.keys():
        parts = [family.file_shape(name, x.shape) for x in variables[name]]
        expected = sum(part[0] for part in parts), *parts[0][1:]
        shape = header.tensors[name].shape
        if shape != expected:
            problems.append(f"{name} has shape {shape}, expected {expected}")
    # A quantized policy makes others.
    problems += [
        f"{path!r} is in no file"
        for path in by_path
        if not path.endswith(family.computed)
    ]
    size = family.head_size(backbone)
    for name in _HEAD_SIZES:
        key = f"{header.fields['general.architecture']}.{name}"
        if header.fields.get(key, size) != size:
            problems.append(f"{key} is {header.fields[key]}, a head has {size}")
    summary = f"{header.filepath!r} does not fit `{type(backbone).__name__}`:"
    checks.raise_all(summary, sorted(problems))
    return variables
