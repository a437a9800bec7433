"""The tiny models, inputs and comparisons that the tests share.

A model is drawn with Keras' seed 0; `randomize` gives it other weights.
"""

import keras
import numpy as np
from keras import ops

from keras_weightmods import WeightSignature, find_targets
from keras_weightmods.ops import nm_project

# `jit_compile` for a fit of few steps. Without it JAX compiles each operation
# by itself, and each `cond` anew at each step.
JIT = keras.backend.backend() == "jax"


def normal(*shape, seed=0):
    """Return normal float32 numbers."""
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def sequential(shape, *layers, name=None, dtype=None):
    """Return a model of these layers on inputs of `shape`."""
    return keras.Sequential(
        [keras.Input(shape, dtype=dtype), *layers], name=name
    )


def mlp(*sizes, activation="relu", name=None, **kwargs):
    """Return Dense layers: inputs, then units. 8, 16 and 4 by default.

    The last has no activation; `kwargs` go to every layer.
    """
    keras.utils.set_random_seed(0)
    inputs, *hidden, last = sizes or (8, 16, 4)
    layers = [
        keras.layers.Dense(units, activation=activation, **kwargs)
        for units in hidden
    ]
    last = keras.layers.Dense(last, **kwargs)
    return sequential((inputs,), *layers, last, name=name)


def conv_net(classes=3, dtype="float32", name=None):
    """Return four layers with a kernel, and two batch normalizations."""
    keras.utils.set_random_seed(0)
    return sequential(
        (6, 6, 1),
        keras.layers.Conv2D(2, 3, dtype=dtype),
        keras.layers.BatchNormalization(dtype=dtype),
        keras.layers.Conv2D(3, 3, dtype=dtype),
        keras.layers.BatchNormalization(dtype=dtype),
        keras.layers.Flatten(),
        keras.layers.Dense(4, dtype=dtype),
        keras.layers.Dense(classes, dtype=dtype),
        name=name,
    )


# Places among the weights of `conv_net`.
CONV, CONV_B, DENSE, HEAD = 0, 6, 12, 14
STATISTICS = (4, 5, 10, 11)


def make_signature(model, seed=1, **kwargs):
    """Return a signature from random checkpoints; depth 2 by default."""
    if "targets" not in kwargs:
        kwargs.setdefault("depth", 2)
    kwargs.setdefault("statistics", "keep")
    init, clean, robust = (
        random_weights(model, 100 * seed + i) for i in range(3)
    )
    return WeightSignature.extract(init, clean, robust, like=model, **kwargs)


def einsum_net(time=None, width=8, heads=2, head_size=4, **kwargs):
    """Return a projection to heads, named "heads", and back, "joined"."""
    keras.utils.set_random_seed(0)
    return sequential(
        (time, width),
        keras.layers.EinsumDense(
            "btd,dhk->bthk", (time, heads, head_size), name="heads", **kwargs
        ),
        keras.layers.EinsumDense(
            "bthk,hkd->btd", (time, width), name="joined", **kwargs
        ),
    )


def attention_net(time=5, width=16, num_heads=2, key_dim=8):
    """Return multi-head attention of the input to itself."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((time, width))
    attention = keras.layers.MultiHeadAttention(num_heads, key_dim)
    return keras.Model(inputs, attention(inputs, inputs))


def token_net(vocabulary=20, width=8, length=None, mask_zero=False):
    """Return logits of shape (batch, time, vocabulary), a token at a time."""
    keras.utils.set_random_seed(0)
    return sequential(
        (length,),
        keras.layers.Embedding(vocabulary, width, mask_zero=mask_zero),
        keras.layers.Dense(width, activation="tanh"),
        keras.layers.Dense(vocabulary),
        dtype="int32",
    )


def shared_net(size=8, units=4):
    """Return a model that runs one layer, named "shared", twice."""
    keras.utils.set_random_seed(0)
    layer = keras.layers.Dense(size, activation="relu", name="shared")
    inputs = keras.Input((size,))
    return keras.Model(inputs, keras.layers.Dense(units)(layer(layer(inputs))))


def nested_net(size=8, units=4):
    """Return two models of one kind, a skip, and a layer after them.

    Their layers share the name "same".
    """
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((size,))
    for name in ("a", "b"):
        layer = keras.layers.Dense(size, activation="relu", name="same")
        x = keras.layers.Add()([x, sequential((size,), layer, name=name)(x)])
    return keras.Model(inputs, keras.layers.Dense(units)(x))


def two_heads(as_dict=False, size=8, units=4):
    """Return a model of two outputs, "z" before "a"."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((size,))
    heads = {name: keras.layers.Dense(units, name=name) for name in "za"}
    outputs = {name: layer(inputs) for name, layer in heads.items()}
    return keras.Model(inputs, outputs if as_dict else list(outputs.values()))


class Subclassed(keras.Model):
    """Runs its layers in another order than it makes them; no config."""

    def __init__(self, size=8, units=4):
        super().__init__()
        self.last = keras.layers.Dense(units)
        self.block = keras.Sequential(
            [keras.layers.Dense(size, "relu"), keras.layers.Dense(size)]
        )

    def call(self, x):
        return self.last(self.block(x) + x)


# The families of `backbone` that are mixtures of experts.
MIXTURES = ("mixtral", "qwen_moe", "qwen3_moe", "qwen3_5_moe", "gpt_oss")


def backbone(family="llama", **sizes):
    """Return a KerasHub backbone.

    "llama", "llama3", "gpt2", "gemma", "gemma4_moe" or one of `MIXTURES`.
    """
    from keras_hub import models

    keras.utils.set_random_seed(0)
    heads = {"num_query_heads": 2, "num_key_value_heads": 1}
    # Stacks with whole blocks of 16 units and without.
    experts = {"num_experts": 4, "top_k": 2}
    shared = {**heads, **experts, "moe_intermediate_dim": 12}
    name, own = {
        "llama": ("Llama", heads),
        "llama3": ("Llama3", heads),
        "gpt2": ("GPT2", {"num_heads": 2, "max_sequence_length": 16}),
        "gemma": ("Gemma", {**heads, "head_dim": 8}),
        "mixtral": ("Mixtral", {**heads, **experts}),
        "qwen_moe": (
            "QwenMoe",
            {**shared, "shared_expert_intermediate_dim": 12},
        ),
        "qwen3_moe": ("Qwen3Moe", {**shared, "head_dim": 8}),
        "qwen3_5_moe": (
            "Qwen3_5Moe",
            {
                **shared,
                "head_dim": 8,
                "shared_expert_intermediate_size": 12,
                "layer_types": ["full_attention"] * sizes.get("num_layers", 1),
            },
        ),
        "gemma4_moe": (
            "Gemma4",
            {
                **heads,
                "head_dim": 8,
                "image_size": 16,
                "enable_moe_block": True,
                "num_experts": 4,
                "num_experts_per_token": 2,
                "expert_intermediate_dim": 12,
            },
        ),
        "gpt_oss": ("GptOss", {**heads, **experts, "head_dim": 8}),
    }[family]
    arguments = {
        "vocabulary_size": 20,
        "num_layers": 1,
        "hidden_dim": 16,
        "intermediate_dim": 24,
        **own,
        **sizes,
    }
    return getattr(models, f"{name}Backbone")(**arguments)


def causal_lm(family="llama", preprocessor=None, **sizes):
    """Return a KerasHub language model; see `backbone`."""
    from keras_hub import models

    if preprocessor is not None:
        sizes["vocabulary_size"] = preprocessor.tokenizer.vocabulary_size()
    inner = backbone(family, **sizes)
    cls = type(inner).__name__.replace("Backbone", "CausalLM")
    return getattr(models, cls)(inner, preprocessor=preprocessor)


def gpt2_preprocessor(length=16, characters="abcdefgh", **kwargs):
    """Return a byte-pair preprocessor of these letters, space, line break."""
    from keras_hub import models, tokenizers

    # "Ġ" is how byte-pair encoding writes a space, "Ċ" a line break.
    tokens = ["<|endoftext|>", *characters, "Ġ", "Ċ", "ab", "Ġab"]
    tokenizer = tokenizers.GPT2Tokenizer(
        {token: i for i, token in enumerate(tokens)}, ["a b", "Ġ ab"]
    )
    return models.GPT2CausalLMPreprocessor(
        tokenizer, sequence_length=length, **kwargs
    )


def random_weights(model, seed=0, scale=1.0):
    """Return normal weights for `model`, with variances above zero."""
    rng = np.random.default_rng(seed)
    weights = []
    for variable in model.weights:
        value = rng.normal(size=variable.shape) * scale
        if "variance" in variable.name:
            value = np.abs(value) + 0.1
        dtype = ops.convert_to_numpy(variable.value).dtype
        weights.append(value.astype(dtype))
    return weights


def randomize(model, seed=0, scale=0.4):
    """Give `model` normal weights, those of integers apart, and return it."""
    weights = random_weights(model, seed, scale)
    for variable, value in zip(model.weights, weights):
        if "float" in variable.dtype:
            variable.assign(value)
    return model


def make_sparse(model, pattern="2:4", seed=0):
    """Give every kernel that fits N:M sparse numbers; return the model."""
    m = int(pattern.split(":")[1])
    for i, target in enumerate(find_targets(model)):
        if target.contraction_size % m:
            continue
        kernel = normal(*target.shape, seed=seed + i)
        kernel /= target.contraction_size**0.5
        kernel = nm_project(kernel, pattern, target.contraction_axes)
        target.variable.assign(kernel)
    return model


def numpy(value):
    """Return a copy, of float32 where NumPy has no such dtype."""
    if "bfloat16" in keras.backend.standardize_dtype(value.dtype):
        value = ops.cast(value, "float32")
    return np.array(ops.convert_to_numpy(value))


def gradients(function, *inputs):
    """Return those of a scalar function, by the backend, as NumPy arrays."""
    inputs = [ops.convert_to_tensor(each) for each in inputs]
    if keras.backend.backend() == "jax":
        import jax

        found = jax.grad(function, tuple(range(len(inputs))))(*inputs)
    elif keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(inputs)
            total = function(*inputs)
        found = tape.gradient(total, inputs)
    else:
        inputs = [each.detach().requires_grad_() for each in inputs]
        function(*inputs).backward()
        found = [each.grad for each in inputs]
    return [numpy(each) for each in found]


def fit_step(model, x, y, optimizer=None):
    """Train on one batch, by SGD of rate 0.1 where no optimizer is given."""
    optimizer = optimizer or keras.optimizers.SGD(0.1)
    model.compile(optimizer, "mse", jit_compile=False)
    model.fit(x, y, batch_size=len(x), verbose=0)


def outputs(model, x):
    """Return what `model` makes of `x` as NumPy arrays."""
    return keras.tree.map_structure(numpy, model(x))


def weights_of(model):
    """Return copies: what JAX gives may be a view of the variable."""
    return [np.array(w) for w in model.get_weights()]


def assert_same(received, expected):
    """Assert that two structures of arrays are equal, NaN included."""
    received, expected = map(keras.tree.flatten, (received, expected))
    for left, right in zip(received, expected, strict=True):
        np.testing.assert_array_equal(left, right)


def assert_same_bits(received, expected):
    """Assert that two lists of arrays have equal dtypes, shapes and bits."""
    for left, right in zip(received, expected, strict=True):
        assert left.dtype == right.dtype
        assert left.shape == right.shape
        assert left.tobytes() == right.tobytes()
