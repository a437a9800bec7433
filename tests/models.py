"""The tiny models, inputs and comparisons that the tests share.

A model is drawn with Keras' seed 0; `randomize` gives it other weights.
"""

import functools
import io

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


def correlated(size, units, rows=200, seed=0):
    """Return inputs with large correlations, of unlike sizes, and a matrix."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(size, size)) * rng.uniform(0.2, 3, size)
    x = rng.normal(size=(rows, size)) @ mix
    return x, rng.normal(size=(size, units)).astype("float32")


def split(x):
    """Return the rows of data that are fitted to, and those held out."""
    is_held = np.arange(len(x)) % 8 == 7
    return x[~is_held], x[is_held]


def sequential(shape, *layers, name=None, dtype=None):
    """Return a model of these layers on inputs of `shape`."""
    inputs = keras.Input(shape, dtype=dtype)
    return keras.Sequential([inputs, *layers], name=name)


def share_kernel(first, second):
    """Have a built layer hold the kernel of another one as its own."""
    second._tracker.unlock()
    second._untrack_variable(second._kernel)
    second._kernel = first._kernel
    second._tracker.lock()


def mlp(*sizes, activation="relu", name=None, **kwargs):
    """Return Dense layers: inputs, then units. 8, 16 and 4 by default.

    The last has no activation; `kwargs` go to every layer.
    """
    keras.utils.set_random_seed(0)
    inputs, *hidden, last = sizes or (8, 16, 4)
    dense = functools.partial(keras.layers.Dense, **kwargs)
    layers = [dense(units, activation=activation) for units in hidden]
    return sequential((inputs,), *layers, dense(last), name=name)


def conv_net(classes=3, dtype="float32", name=None):
    """Return four layers with a kernel, and two batch normalizations."""
    keras.utils.set_random_seed(0)
    layers, of = keras.layers, {"dtype": dtype}
    convolutions = []
    for filters in (2, 3):
        convolutions.append(layers.Conv2D(filters, 3, **of))
        convolutions.append(layers.BatchNormalization(**of))
    head = layers.Dense(4, **of), layers.Dense(classes, **of)
    return sequential(
        (6, 6, 1), *convolutions, layers.Flatten(), *head, name=name
    )


# Places among the weights of `conv_net`.
CONV, CONV_B, DENSE, HEAD = 0, 6, 12, 14
STATISTICS = (4, 5, 10, 11)


def make_signature(model, seed=1, **kwargs):
    """Return a signature from random checkpoints; depth 2 by default."""
    if "targets" not in kwargs:
        kwargs.setdefault("depth", 2)
    kwargs.setdefault("statistics", "keep")
    drawn = (random_weights(model, 100 * seed + i) for i in range(3))
    init, clean, robust = drawn
    return WeightSignature.extract(init, clean, robust, like=model, **kwargs)


def einsum_net(time=None, width=8, heads=2, head_size=4, **kwargs):
    """Return a projection to heads, named "heads", and back, "joined"."""
    keras.utils.set_random_seed(0)
    layers = []
    for name, equation, shape in (
        ("heads", "btd,dhk->bthk", (time, heads, head_size)),
        ("joined", "bthk,hkd->btd", (time, width)),
    ):
        layer = keras.layers.EinsumDense(equation, shape, name=name, **kwargs)
        layers.append(layer)
    return sequential((time, width), *layers)


def attention_net():
    """Return multi-head attention of the input to itself."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((5, 16))
    attention = keras.layers.MultiHeadAttention(2, 8)
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
_HEADS = {"num_query_heads": 2, "num_key_value_heads": 1}
_EXPERTS = {**_HEADS, "num_experts": 4, "top_k": 2}
# Stacks with whole blocks of 16 units and without.
_SHARED = {**_EXPERTS, "moe_intermediate_dim": 12}
_OF_GEMMA4 = {"num_experts": 4, "num_experts_per_token": 2, "image_size": 16}
_OF_GEMMA4 |= {"expert_intermediate_dim": 12, "enable_moe_block": True}
_GEMMA3 = (
    *("query_head_dim_normalize", "use_query_key_norm"),
    *("use_post_ffw_norm", "use_post_attention_norm"),
)
_BACKBONES = {
    "llama": ("Llama", _HEADS),
    "llama3": ("Llama3", _HEADS),
    "qwen": ("Qwen", _HEADS),
    "qwen3": ("Qwen3", {**_HEADS, "head_dim": 8}),
    "gpt2": ("GPT2", {"num_heads": 2, "max_sequence_length": 16}),
    "gemma": ("Gemma", {**_HEADS, "head_dim": 8}),
    # Calls its backbone by a keyword, on inputs that are not in order.
    "gemma3": (
        "Gemma3",
        {
            **_HEADS,
            **dict.fromkeys(("image_size", "vision_encoder")),
            **dict.fromkeys(_GEMMA3, True),
            "head_dim": 8,
        },
    ),
    "mixtral": ("Mixtral", _EXPERTS),
    "qwen_moe": ("QwenMoe", {**_SHARED, "shared_expert_intermediate_dim": 12}),
    "qwen3_moe": ("Qwen3Moe", {**_SHARED, "head_dim": 8}),
    "qwen3_5_moe": (
        "Qwen3_5Moe",
        {**_SHARED, "head_dim": 8, "shared_expert_intermediate_size": 12},
    ),
    "gemma4_moe": ("Gemma4", {**_HEADS, **_OF_GEMMA4, "head_dim": 8}),
    "gpt_oss": ("GptOss", {**_EXPERTS, "head_dim": 8}),
    "smollm3": (
        "SmolLM3",
        {
            **_HEADS,
            **dict.fromkeys(("attention_bias", "mlp_bias"), False),
            **{"attention_dropout": 0.0, "partial_rotary_factor": 1.0},
            **{"layer_norm_epsilon": 1e-6, "max_position_embeddings": 128},
            "rope_theta": 1e4,
        },
    ),
    "phi3": ("Phi3", _HEADS),
}


def backbone(family="llama", **sizes):
    """Return a KerasHub backbone of a family in `_BACKBONES`."""
    from keras_hub import models

    keras.utils.set_random_seed(0)
    name, own = _BACKBONES[family]
    arguments = {"vocabulary_size": 20, "num_layers": 1, "hidden_dim": 16}
    arguments |= {"intermediate_dim": 24, **own, **sizes}
    if family == "qwen3_5_moe":
        arguments["layer_types"] = ["full_attention"] * arguments["num_layers"]
    if family == "smollm3":
        blocks = range(arguments["num_layers"])
        arguments["num_attention_heads"] = arguments.pop("num_query_heads")
        arguments["layer_types"] = ["full_attention" for _ in blocks]
        rotated = [i % 4 != 3 for i in blocks]
        arguments.setdefault("rope_layer_enabled_list", rotated)
    return getattr(models, f"{name}Backbone")(**arguments)


def causal_lm(family="llama", preprocessor=None, **sizes):
    """Return a KerasHub language model; see `backbone`."""
    from keras_hub import models

    if preprocessor is not None:
        sizes["vocabulary_size"] = preprocessor.tokenizer.vocabulary_size()
    inner = backbone(family, **sizes)
    cls = type(inner).__name__.replace("Backbone", "CausalLM")
    return getattr(models, cls)(backbone=inner, preprocessor=preprocessor)


def gpt2_preprocessor(length=16, characters="abcdefgh", **kwargs):
    """Return a byte-pair preprocessor of these letters, space, line break."""
    from keras_hub import models, tokenizers

    # "Ġ" is how byte-pair encoding writes a space, "Ċ" a line break.
    tokens = ["<|endoftext|>", *characters, "Ġ", "Ċ", "ab", "Ġab"]
    places = {token: i for i, token in enumerate(tokens)}
    tokenizer = tokenizers.GPT2Tokenizer(places, ["a b", "Ġ ab"])
    kwargs["sequence_length"] = length
    return models.GPT2CausalLMPreprocessor(tokenizer, **kwargs)


def gemma3_preprocessor(length=16):
    """Return one of Gemma 3, which takes no strings but prompts."""
    import sentencepiece
    from keras_hub import models, tokenizers

    file = io.BytesIO()
    marks = [f"<{x}>" for x in ("pad", "eos", "bos", "unk")]
    ends = [
        f"<{x}_of_{y}>" for x in ("start", "end") for y in ("image", "turn")
    ]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["abc dab cab bad " * 9]),
        model_writer=file,
        vocab_size=40,
        hard_vocab_limit=False,
        model_type="BPE",
        user_defined_symbols=["<img>", *ends],
        minloglevel=2,
        **{f"{x[1:-1]}_piece": x for x in marks},
        **{f"{x[1:-1]}_id": i for i, x in enumerate(marks)},
    )
    tokenizer = tokenizers.Gemma3Tokenizer(proto=file.getvalue())
    return models.Gemma3CausalLMPreprocessor(
        tokenizer, image_converter=None, sequence_length=length
    )


def random_weights(model, seed=0, scale=1.0):
    """Return normal weights for `model`, with variances above zero."""
    rng = np.random.default_rng(seed)
    weights = []
    for variable in model.weights:
        value = rng.normal(size=variable.shape) * scale
        if "variance" in variable.name:
            value = np.abs(value) + 0.1
        weights.append(value.astype(ops.convert_to_numpy(variable).dtype))
    return weights


def randomize(model, seed=0, scale=0.4):
    """Give `model` normal weights, those of integers apart, and return it."""
    drawn = random_weights(model, seed, scale)
    for variable, value in zip(model.weights, drawn):
        if "float" in variable.dtype:
            variable.assign(value)
    return model


def changed(model, change, *args, **kwargs):
    """Return a model after a change in place."""
    change(model, *args, **kwargs)
    return model


def make_sparse(model, pattern="2:4", seed=0):
    """Give every kernel that fits N:M sparse numbers; return the model."""
    m = int(pattern.split(":")[1])
    for i, target in enumerate(find_targets(model)):
        if target.contraction_size % m == 0:
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


def loss_after(make, dtype, fit):
    """Return a loss in float32 after the training of a model in a dtype.

    Args:
        make: Callable of a dtype that returns a model.
        dtype: String.
        fit: Callable of the model and numbers to learn.
    """
    start = [numpy(v) for v in make("bfloat16").variables]
    model, judge = make(dtype), make("float32")
    model.set_weights(start)
    x = normal(200, 8)
    y = np.tanh(x @ normal(8, 4)) + 0.3 * normal(200, 4, seed=1)
    fit(model, x, y)
    judge.set_weights([numpy(v) for v in model.variables])
    return float(np.mean((numpy(judge(x)) - y) ** 2))


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
