"""KerasHub's language models as GGUF files, which llama.cpp reads."""

import importlib
import math
import os
import pathlib
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from keras import ops

from keras_weightmods.core.reparameterization import Reparameterization
from keras_weightmods.exporting.gguf_families import (
    ATTENTION_FACTOR,
    FAMILIES,
    LONG_FACTORS,
    SCALING_FACTOR,
    Family,
    family_of,
    of_blocks,
    weights_of,
)
from keras_weightmods.native.quantize import round_matrix
from keras_weightmods.saving.model_card import ModelCard
from keras_weightmods.utils import checks
from keras_weightmods.utils.progress import Progress

DTYPES = ("f32", "f16", "bf16", "q8_0", "q4_1", "q4_0")
# Entries of a row that share a scale in the quantized types.
_GROUP = 32
# The grids of `pack` that a quantized type holds: the type of the integers, and
# the inputs that share a scale of fewer than 8 bits.
_GRIDS = {
    "Q4_0": (("int4", 64), ("int4", 32)),
    "Q8_0": (
        *(("int4", 64), ("int4", 32), ("int5", 64), ("int6", 64)),
        ("int8", None),
    ),
}
# Rows of a matrix that are looked at together.
_ROWS = 256


def writer(
    model: Any,
    dtype: str = "f16",
    tokenizer_from: Any = None,
    context_length: int | None = None,
    card: ModelCard | None = None,
) -> Callable[[str, Progress], None]:
    """Return a function that writes a model to a path, once all is checked.

    Matrices that `quantize` or `pack` has rounded to integers keep these in
    q4_0 and q8_0. Others are rounded as `dtype` says, by the package `gguf`. In
    types of 4 bits the embeddings and the head then become q8_0. llama.cpp's
    own program does the same if Q6_K does not take the length of their rows.
    Vectors stay float32.

    Args:
        model: A KerasHub `CausalLM` of a family in `FAMILIES`, or the backbone
            of one, packed or not.
        dtype: String, one of `DTYPES`.
        tokenizer_from: Path of a GGUF file whose tokenizer is copied. By
            default that of the model, a `Llama3Tokenizer`; none without a
            preprocessor.
        context_length: Int, the context length that the file states. By
            default that of the model, and 8192 if its backbone has none.
        card: `ModelCard`, what the file says of the model.

    Raises:
        ValueError: If the model is no such model, or an argument not as above.
    """
    checks.check_choice("dtype", dtype, DTYPES)
    if context_length is not None:
        checks.check_int("context_length", context_length, 1)
    backbone = getattr(model, "backbone", model)
    found = family_of(backbone)
    if found is None:
        kinds = ", ".join(f.names[0] for f in FAMILIES.values())
        expected = f"a KerasHub language model of the kinds {kinds}"
        raise checks.error("model", expected, model)
    architecture, family = found
    if tokenizer_from is not None and not os.path.isfile(tokenizer_from):
        raise checks.error("tokenizer_from", "a GGUF file", tokenizer_from)
    for name, value in of_blocks(family.fixed, backbone.num_layers).items():
        if getattr(backbone, name) != value:
            raise ValueError(
                f"A GGUF file of the architecture {architecture!r} has models "
                f"with {name}={value}. Received: a model with {name}="
                f"{checks.shown(getattr(backbone, name))}"
            )
    for name in ("hidden_dim", "intermediate_dim"):
        size = getattr(backbone, name)
        if dtype.startswith("q") and size % _GROUP:
            raise ValueError(
                f"dtype={dtype!r} takes rows of a multiple of {_GROUP} entries."
                f" Received: a model with {name}={size}. Use dtype='f16'."
            )
    gguf = importlib.import_module("gguf")
    count, add_tokenizer = _tokenizer(gguf, model, tokenizer_from)
    if count not in (None, backbone.vocabulary_size):
        raise ValueError(
            "llama.cpp needs a token for each row of the embeddings. Received: "
            f"a tokenizer of {count} tokens, and a model with vocabulary_size="
            f"{backbone.vocabulary_size}"
        )

    def write(path: str, progress: Progress) -> None:
        file = gguf.GGUFWriter(path, architecture)
        prefix = "ALL" if dtype == "f32" else "MOSTLY"
        types = gguf.LlamaFileType
        file.add_file_type(types[f"{prefix}_{dtype.upper()}"])
        file.add_vocab_size(backbone.vocabulary_size)
        head_size = family.head_size(backbone)
        file.add_rope_dimension_count(head_size)
        as_types: dict[type, Any] = {int: gguf.GGUFValueType.UINT32}
        as_types[float] = gguf.GGUFValueType.FLOAT32
        values: dict[str, Any] = {"context_length": 8192, **family.constants}
        for name, (key, kind, default) in family.fields.items():
            value = kind(getattr(backbone, name))
            if key != SCALING_FACTOR:
                values[key] = value
            elif value != default:
                file.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
                values[key] = value
        if "head_dim" in family.fields:
            values["attention.value_length"] = backbone.head_dim
        if context_length is not None:
            values["context_length"] = int(context_length)
        factors = rope_factors(backbone)
        if LONG_FACTORS.keys() <= factors.keys():
            values[ATTENTION_FACTOR] = attention_factor(backbone)
        for key, value in values.items():
            kind = as_types[type(value)]
            file.add_key_value(f"{architecture}.{key}", value, kind)
        add_tokenizer(file)
        if card is not None:
            if card.license:
                file.add_license(card.license)
            if card.base_model:
                file.add_base_model_count(1)
                file.add_base_model_name(0, card.base_model)
            if card.steps:
                file.add_description("\n".join(card.sentences()))
        named = tensors(family, backbone)
        progress.total += len(named)
        rounded: list[str] = []
        tiny: list[str] = []
        for name, weights in named.items():
            value = tensor_value(family, name, weights, head_size)
            kinds = ["F32" if value.ndim == 1 else dtype.upper()]
            if "q4" in dtype and name in ("token_embd.weight", "output.weight"):
                kinds.append("Q8_0")
            if kinds[0] not in ("F32", "BF16"):
                _check_range(family.variable_paths(name)[0], value)
            for kind_name in kinds:
                data, has_tiny = on_grid(value, kind_name)
                if data is not None:
                    break
            kind = gguf.GGMLQuantizationType[kind_name]
            if has_tiny:
                tiny.append(name)
            if data is None:
                data = gguf.quants.quantize(value, kind)
                if "Q4" in kind_name:
                    rounded.append(name)
            file.add_tensor(name, data, raw_dtype=kind)
            progress.add()
        for name, value in factors.items():
            file.add_tensor(name, value)
        file.write_header_to_file()
        file.write_kv_data_to_file()
        file.write_tensors_to_file()
        file.close()
        paths = [
            [path for name in names for path in family.variable_paths(name)]
            for names in (rounded, tiny)
        ]
        _warn(named, dtype, *paths)

    return write


def tensors(family: Family, backbone: Any) -> dict[str, list[Any]]:
    """Return {name of a GGUF tensor: weights that it has} of a backbone.

    A weight is a variable, or the `Reparameterization` of one that is packed.
    """
    weights = weights_of(backbone)
    is_tied = backbone.token_embedding.tie_weights
    return {
        name: [weights[path] for path in family.variable_paths(name)]
        for name in family.tensor_names(backbone.num_layers, is_tied)
    }


def tensor_value(
    family: Family, name: str, weights: list[Any], head_size: int
) -> Any:
    """Return the float32 array that GGUF keeps of one of `tensors`."""
    values = []
    for weight in weights:
        is_packed = isinstance(weight, Reparameterization)
        value = weight.exact() if is_packed else weight.value
        value = ops.convert_to_numpy(ops.cast(value, "float32"))
        values.append(family.to_file(name, value, head_size))
    return np.concatenate(values) if len(values) > 1 else values[0]


def on_grid(value: Any, kind: str) -> tuple[Any, bool]:
    """Return the blocks of a matrix whose integers `pack` finds again.

    Scales are rounded to fp16: those of fewer bits, of bfloat16's precision,
    without loss from 2^-14 on, and those of int8 by 2^-11 of them at most.

    Args:
        value: float32 array of shape `(N, K)`, K the contraction.
        kind: String, the name of a type of GGUF.

    Returns:
        Pair of a uint8 array, a row of blocks for each row, and whether a scale
        lies below fp16's normal range and is not exact in it. `(None, False)`
        if the matrix lies on no grid that the type holds.
    """
    for grid in _GRIDS.get(kind, ()):
        parts, has_tiny = [], False
        for start in range(0, len(value), _ROWS):
            part = value[start : start + _ROWS]
            integers, scales = (x.T for x in round_matrix(part.T, *grid))
            integers = integers.reshape(len(part), -1, _GROUP)
            count = integers.shape[1]
            scales = scales.astype("float32")
            scales = scales.repeat(-(-count // scales.shape[1]), axis=1)
            scales = scales[:, :count, None]
            exact = part.reshape(integers.shape)
            # The scale of int8, found again, may differ in the last bit.
            if not np.allclose(integers * scales, exact, rtol=1e-6, atol=0):
                break
            d = scales.astype("float16")
            has_tiny |= bool(((np.abs(scales) < 2**-14) & (d != scales)).any())
            if kind == "Q4_0":
                low, high = np.split((integers + 8).view("uint8"), 2, axis=-1)
                integers = low | high << 4
            block = np.concatenate(
                [d.view("uint8"), integers.view("uint8")], -1
            )
            parts.append(block.reshape(len(part), -1))
        else:
            return np.concatenate(parts), has_tiny
    return None, False


def rope_factors(backbone: Any) -> dict[str, Any]:
    """Return {name: tensor} of what llama.cpp divides the frequencies by.

    Those of Llama 3.1 and later: low ones by the factor, high ones not at all,
    those between by something between. Phi 3 has them for long texts and for
    others. Other models have none.
    """
    if getattr(backbone, "rope_scaling_type", None) == "su":
        return {
            name: np.array(getattr(backbone, argument), "float32")
            for name, argument in LONG_FACTORS.items()
        }
    factor = getattr(backbone, "rope_frequency_adjustment_factor", None)
    if factor is None:
        return {}
    size = backbone.hidden_dim // backbone.num_query_heads
    exponents = np.arange(0, size, 2) / size
    turns = backbone.rope_pretraining_sequence_length / (
        2 * np.pi * float(backbone.rope_max_wavelength) ** exponents
    )
    low, high = backbone.rope_low_freq_factor, backbone.rope_high_freq_factor
    share = np.clip((turns - low) / (high - low), 0, 1)
    factors = (1 / ((1 - share) / factor + share)).astype("float32")
    return {"rope_freqs.weight": factors}


def attention_factor(backbone: Any) -> float:
    """Return what Phi 3 with two sets of factors scales rotations by."""
    trained = backbone.pretraining_sequence_length
    ratio = max(1.0, backbone.max_sequence_length / trained)
    return math.sqrt(1 + math.log(ratio) / math.log(trained))


def _check_range(path: str, value: Any) -> None:
    """Raise ValueError unless fp16 has all values in its range."""
    largest = np.abs(value).max()
    if not largest <= np.finfo("float16").max:
        raise ValueError(
            "The types f16 and q... take finite weights of at most 65,504, as "
            "fp16 does. Received: a largest absolute value of "
            f"{largest} in {path!r}. Use dtype='f32'."
        )


def _warn(named: Any, dtype: str, rounded: Any, tiny: Any) -> None:
    """Warn about weights whose form or values differ in the file."""
    packed = [
        weight
        for weights in named.values()
        for weight in weights
        if isinstance(weight, Reparameterization)
        and (weight.pattern or dtype.upper() not in _GRIDS)
    ]
    texts = []
    if packed:
        texts.append(
            f"{len(packed)} packed weights are exported in dense form. "
            "`kwm.save_model` keeps them packed, and dtype='q4_0' or 'q8_0' "
            "the integers of int4 or int8."
        )
    if rounded:
        texts.append(
            f"{len(rounded)} matrices were rounded to nearest for dtype="
            f"{dtype!r}, {rounded[0]!r} first, which costs "
            "quality. Round them by `kwm.quantize(model, data)` before, which "
            "costs less: dtype='q4_0' keeps its integers."
        )
    if tiny:
        texts.append(
            f"{len(tiny)} matrices, {tiny[0]!r} first, have "
            "scales below fp16's normal range. They were rounded to it, which "
            "changes weights by at most 4e-6."
        )
    for text in texts:
        # The line that calls `export`.
        warnings.warn(text, stacklevel=4)


def _tokenizer(gguf: Any, model: Any, tokenizer_from: Any) -> Any:
    """Return how many tokens a tokenizer has, and what adds it to a file."""
    if tokenizer_from is not None:
        fields = gguf.GGUFReader(pathlib.Path(tokenizer_from)).fields
        tokens = fields.get("tokenizer.ggml.tokens")

        def copy(file: Any) -> None:
            for name, field in fields.items():
                if name.startswith("tokenizer."):
                    kind, *inner = field.types
                    inner = inner[0] if inner else None
                    value = field.contents()
                    file.add_key_value(name, value, kind, sub_type=inner)

        return len(tokens.contents()) if tokens else 0, copy

    import keras_hub

    preprocessor = getattr(model, "preprocessor", None)
    if preprocessor is None:
        return None, lambda file: file.add_tokenizer_model("none")
    tokenizer = preprocessor.tokenizer
    if not isinstance(tokenizer, keras_hub.tokenizers.Llama3Tokenizer):
        raise ValueError(
            "The tokenizer that can be written is a `Llama3Tokenizer`. "
            f"Received: a {type(tokenizer).__name__}. Pass `tokenizer_from=`, "
            "a GGUF file that has the model's tokenizer, or export "
            "`model.backbone` for prompts of token ids."
        )

    def add(file: Any) -> None:
        tokens = tokenizer.vocabulary
        if isinstance(tokens, dict):
            tokens = sorted(tokens, key=tokens.__getitem__)
        special = {*tokenizer.special_tokens, *tokenizer.unsplittable_tokens}
        kinds = gguf.TokenType
        file.add_tokenizer_model("gpt2")
        # How text is split before the merges: as Llama 3 does.
        file.add_tokenizer_pre("llama-bpe")
        file.add_token_list(tokens)
        file.add_token_types(
            [kinds.CONTROL if t in special else kinds.NORMAL for t in tokens]
        )
        file.add_token_merges([*tokenizer.merges])
        file.add_bos_token_id(tokenizer.start_token_id)
        file.add_eos_token_id(tokenizer.end_token_id)
        file.add_add_bos_token(preprocessor.add_start_token)
        # `load_gguf` puts it there.
        template = getattr(tokenizer, "chat_template", None)
        if template:
            file.add_chat_template(template)

    return tokenizer.vocabulary_size(), add
