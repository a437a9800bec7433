"""`generate` of KerasHub's language models without Keras' work for each op."""

import dataclasses

import keras

from keras_weightmods.core import keras_compat
from keras_weightmods.generation.generate_function import GenerateFunction
from keras_weightmods.utils import checks
from keras_weightmods.utils.report import Report, Table

_HOOK = "make_generate_function"


@dataclasses.dataclass(frozen=True)
class GenerateReport(Report):
    """What `compile_generate` did.

    Attributes:
        model: String, the name of the model.
        backend: String.
    """

    model: str
    backend: str

    def tables(self) -> list[Table]:
        return [
            Table(f"generate of {self.model!r} on {self.backend} is compiled")
        ]


def compile_generate(model: keras.Model, verbose: int = 1) -> GenerateReport:
    """Have `generate` of a KerasHub language model run faster, in place.

    On torch most of the time of `generate` at batch 1 is Keras' own work for
    each op, and copies of the cache of keys and values. From now on the
    model's step is recorded at its first use as a flat list of torch's
    operations, which writes into the cache in place, and replayed for each
    token. On TensorFlow XLA compiles all of `generate`, which Keras runs op by
    op on a CPU unless told otherwise. On JAX, where KerasHub compiles all of
    it, the cache stays in parts, one for each layer, in place of being stacked
    anew for each token. On JAX and torch a compiled kernel is the attention,
    on a CPU in float32: it reads each key and value that is seen once, for all
    heads that share it, and of a prompt only what each token sees. On all
    three, only as many tokens are read at first as the shortest prompt has.

    `model.generate` takes and returns what it did: strings or tokens,
    `max_length`, stop tokens, any sampler of KerasHub that goes through the
    tokens once (greedy, top-k, top-p, random, your own `get_next_token`). The
    numbers are rounded in other places, at 1e-6 of the logits in float32. Where
    two tokens are about equally probable the text can then go another way, and
    sooner with int8 activations (`pack` has them by default with int8
    weights), which make steps of some percent out of any rounding. Samplers
    draw the same random numbers on torch and JAX; on TensorFlow XLA draws
    others from the same seed.

    Shapes are compiled when they first occur: the batch size, `max_length`
    and the length of the shortest prompt, rounded up to a multiple of 16 (by
    a quarter where it is long). On torch that takes some seconds, and the
    first step of each batch size and length is compared with the model's own.
    Elsewhere it takes as long as XLA does; `max_length` is rounded up too, to
    a multiple of 64, and other stop tokens or samplers are compiled anew.

    New numbers in the weights are seen (`fit`, `set_weights`, `load_weights`).
    After a change of the model's variables or layers (`pack`, `enable_lora`,
    `fold`, `quantize`) all is compiled anew by itself. After any other change
    of what the layers compute, an attribute for example, call this again.

    Where `generate` cannot be done so it runs as before, and a warning says
    why: with beam search and other samplers that keep several caches, with a
    model that has a cache for each layer (Gemma 3) or does what cannot be
    repeated, and with images.

    Nothing of it is saved with the model: call it again after loading.

    Args:
        model: A `keras_hub.models.CausalLM`. It is changed; see
            `uncompile_generate`.
        verbose: 0 or 1. 1 shows the seconds where a shape is compiled for
            longer than two, in `generate`; 0 shows nothing. Defaults to `1`.

    Returns:
        A `GenerateReport`: print it.

    Raises:
        ValueError: If the model is no `keras_hub.models.CausalLM`, or
            `verbose` is neither.

    Example:

    ```python
    import keras_hub
    import keras_weightmods as kwm
    import numpy as np

    backbone = keras_hub.models.LlamaBackbone(
        vocabulary_size=20, num_layers=1, num_query_heads=2,
        num_key_value_heads=1, hidden_dim=8, intermediate_dim=16,
    )
    model = keras_hub.models.LlamaCausalLM(backbone)
    model.compile(sampler="greedy")
    print(kwm.compile_generate(model))

    prompt = {
        "token_ids": np.array([[3, 5, 0, 0, 0, 0]]),
        "padding_mask": np.array([[1, 1, 0, 0, 0, 0]]),
    }
    tokens = model.generate(prompt, stop_token_ids=None)["token_ids"]
    kwm.uncompile_generate(model)
    ```
    """
    _check_causal_lm(model)
    checks.check_verbose(verbose)
    function = GenerateFunction(model, verbose)
    keras_compat.attributes(model)[_HOOK] = function
    return GenerateReport(model.name, keras.backend.backend())


def uncompile_generate(model: keras.Model) -> None:
    """Undo `compile_generate`; nothing happens where it was not called.

    Args:
        model: The model. It is changed.

    Raises:
        ValueError: If the model is no `keras_hub.models.CausalLM`.

    Example:

    ```python
    import keras_hub
    import keras_weightmods as kwm

    backbone = keras_hub.models.GPT2Backbone(20, 1, 2, 8, 16)
    model = keras_hub.models.GPT2CausalLM(backbone)
    kwm.compile_generate(model)
    kwm.uncompile_generate(model)
    ```
    """
    _check_causal_lm(model)
    keras_compat.attributes(model).pop(_HOOK, None)


def _check_causal_lm(model: keras.Model) -> None:
    try:
        from keras_hub.models import CausalLM
    except ImportError as error:
        raise ImportError(
            "`compile_generate` is for models of KerasHub. Install it with: "
            "pip install 'keras-weightmods[hub]'"
        ) from error
    if not isinstance(model, CausalLM):
        raise ValueError(
            "`model` must be a keras_hub.models.CausalLM, which has a "
            f"`generate`. Received: {type(model).__name__}"
        )
