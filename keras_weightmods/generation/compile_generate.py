"""KerasHub's `generate` without Keras' overhead for each operation."""

import dataclasses

import keras

from keras_weightmods.core import keras_compat
from keras_weightmods.generation.generate_function import GenerateFunction
from keras_weightmods.utils import checks
from keras_weightmods.utils.report import Report, Table

_HOOK = "make_generate_function"


@dataclasses.dataclass(frozen=True)
class GenerateReport(Report):
    """The result of `compile_generate`.

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
    """Make `generate` of a KerasHub language model faster, in place.

    - On torch, Keras' own work for each op and copies of the cache take most of
      the time at batch 1. This function records the model's step at its first
      use as a flat list of torch's operations. It replays the list for each
      token, and writes into the cache in place.
    - On TensorFlow, XLA compiles all of `generate`. Keras alone runs it op by
      op on a CPU by default.
    - On JAX, KerasHub already compiles all of it.

    On JAX and TensorFlow the cache stays in one part for each layer, so that
    nothing stacks it anew for each token. A compiled kernel computes the
    attention, on a CPU in float32. It reads each visible key and value once for
    all heads that share it, and of a prompt only what each token sees. The
    first pass reads only as many tokens as the shortest prompt has.

    On Linux the weights on a CPU move to huge pages of memory, which are read
    faster, on JAX and torch. Their memory stays as it is otherwise.

    `model.generate` takes and returns the same as before: strings or tokens,
    `max_length` and stop tokens. It takes any sampler of KerasHub that goes
    through the tokens once: greedy, top-k, top-p, random, or your own
    `get_next_token`. Rounding differs by about 1e-6 of the logits in float32.
    Where two tokens are about equally probable, the text can then differ. This
    happens sooner with int8 activations, `pack`'s default for int8 weights,
    which enlarge any rounding difference to some percent. Samplers draw the
    same random numbers on torch and JAX. On TensorFlow, XLA draws others from
    the same seed.

    Each shape is compiled when it first occurs. A shape is the batch size,
    `max_length` and the length of the shortest prompt, rounded up to a multiple
    of 16, or by a quarter where it is long. On torch this takes some seconds,
    and compares the first step of each batch size and length with the model's
    own. Elsewhere it takes as long as XLA does. There `max_length` is rounded
    up to a multiple of 64, and other stop tokens or samplers are compiled anew.

    `generate` uses new numbers in the weights (`fit`, `set_weights`,
    `load_weights`). It compiles itself anew after a change of the model's
    variables or layers (`pack`, `enable_lora`, `fold`, `quantize`). Call this
    function again after any other change of what the layers compute, such as an
    attribute.

    Where `generate` cannot be compiled it runs as before, and a warning says
    why. This concerns images, beam search and other samplers that keep several
    caches. It also concerns models that keep more than keys and values, or do
    what cannot be repeated.

    `save_model` does not save this: call it again after loading.

    Args:
        model: A `keras_hub.models.CausalLM`. It is changed; see
            `uncompile_generate`.
        verbose: 0 or 1. 1 shows the seconds in `generate` where a shape takes
            longer than two to compile; 0 shows nothing. Defaults to `1`.

    Returns:
        A `GenerateReport`: print it.

    Raises:
        ValueError: If the model is no `keras_hub.models.CausalLM`, or `verbose`
            is neither 0 nor 1.

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
    """Undo `compile_generate`, if it was called.

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
        raise checks.not_installed(
            "`compile_generate`", "keras-hub", error
        ) from error
    if not isinstance(model, CausalLM):
        raise ValueError(
            "`model` must be a keras_hub.models.CausalLM, which has a "
            f"`generate`. Received: {type(model).__name__}"
        )
