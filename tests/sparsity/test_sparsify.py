import json
import weakref

import keras
import keras_hub
import numpy as np
import pytest
from keras import ops

import keras_weightmods as kwm
from keras_weightmods.core import keras_private
from keras_weightmods.sparsity import walk as walk_module
from keras_weightmods.sparsity.scaling import attach_scaling
from tests import references

METHODS = ("magnitude", "wanda", "sparsegpt")


def normal(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def values(model):
    return [np.array(ops.convert_to_numpy(v)) for v in model.weights]


def assert_same(left, right):
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a, b)


def randomize(model, seed=0):
    rng = np.random.default_rng(seed)
    for variable in model.weights:
        if variable.name in ("kernel", "bias", "embeddings"):
            variable.assign(rng.normal(size=variable.shape) * 0.4)
    return model


def make_mlp():
    return randomize(
        keras.Sequential(
            [
                keras.Input((16,)),
                keras.layers.Dense(24, activation="relu"),
                keras.layers.Dense(8, activation="tanh"),
                keras.layers.Dense(3),
            ]
        )
    )


def make_llm(preprocessor=None, layers=2):
    keras.utils.set_random_seed(0)
    size = 20 if preprocessor is None else 13
    backbone = keras_hub.models.LlamaBackbone(
        vocabulary_size=size,
        num_layers=layers,
        num_query_heads=2,
        num_key_value_heads=1,
        hidden_dim=8,
        intermediate_dim=12,
    )
    model = keras_hub.models.LlamaCausalLM(backbone, preprocessor)
    for variable in model.weights:
        variable.assign(normal(variable.shape, len(variable.shape)) * 0.4)
    return model


def make_tokens(samples=6, length=5, seed=0):
    ids = np.random.default_rng(seed).integers(1, 20, (samples, length))
    return {"token_ids": ids, "padding_mask": np.ones_like(ids)}


def by_method(method, w, x, n, m):
    """The reference of each method, for a matrix and its inputs."""
    if method == "magnitude":
        return np.where(references.nm_mask(w, n, m, 0), w, 0.0)
    if method == "wanda":
        return references.wanda(w, x, n, m)
    x = x.astype("float64")
    return references.sparsegpt(w, x.T @ x / len(x), n, m)


# The numbers


@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
@pytest.mark.parametrize("method", METHODS)
def test_layer_by_layer_on_the_sparse_prefix(method, pattern):
    model = make_mlp()
    n, m = kwm.ops.parse_pattern(pattern)
    weights = [v.astype("float64") for v in values(model)]
    x = normal((40, 16), 1)
    report = kwm.sparsify(model, pattern, method, x, batch_size=16, verbose=0)
    hidden = x.astype("float64")
    activations = [lambda z: np.maximum(z, 0), np.tanh, lambda z: z]
    for i, activation in enumerate(activations):
        w, bias = weights[2 * i : 2 * i + 2]
        sparse = by_method(method, w, hidden, n, m)
        np.testing.assert_allclose(
            values(model)[2 * i], sparse, rtol=5e-3, atol=5e-4
        )
        change = np.sum((hidden @ (sparse - w)) ** 2)
        assert report.kernels[i].error == pytest.approx(
            change / np.sum((hidden @ w) ** 2), rel=1e-2
        )
        hidden = activation(hidden @ sparse + bias)
    kwm.assert_sparse(model, pattern)
    assert [k.method for k in report.kernels] == [method] * 3


EINSUMS = [
    ("...x,xy->...y", 6, (3, 8)),
    ("bquh,uhm->bqm", (3, 6), (3, 2, 4)),
    # The kernel's order of the contracted axes, not the input's.
    ("bhqu,uhm->bqm", (3, 6), (4, 3, 2)),
    ("btd,ndh->btnh", (3, 2, 5), (3, 8)),
    # A stack of kernels, each with inputs of its own.
    ("bei,eio->beo", (3, 5), (3, 8)),
    # An axis of the input that is summed over.
    ("abc,cd->ad", 5, (3, 8)),
]


@pytest.mark.parametrize(("equation", "output", "shape"), EINSUMS)
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_einsum_dense(method, equation, output, shape):
    layer = keras.layers.EinsumDense(equation, output)
    model = randomize(keras.Sequential([keras.Input(shape), layer]))
    (target,) = kwm.find_targets(model)
    kernel = values(model)[0].astype("float64")
    x = normal((30, *shape), 1)
    kwm.sparsify(model, "2:4", method, x, verbose=0)
    order = [*target.stack_axes, *target.contraction_axes, *target.output_axes]
    stacks = int(np.prod([target.shape[i] for i in target.stack_axes]))
    size = (stacks, target.contraction_size, -1)
    rows = {
        "...x,xy->...y": "btx->btx",
        "bquh,uhm->bqm": "bquh->bquh",
        "bhqu,uhm->bqm": "bhqu->bquh",
        "btd,ndh->btnh": "btd->btd",
        "bei,eio->beo": "bei->ebi",
        "abc,cd->ad": "abc->ac",
    }[equation]
    rows = np.einsum(rows, x).reshape(stacks, -1, size[1])
    expected = [
        by_method(method, w, r, 2, 4)
        for w, r in zip(np.transpose(kernel, order).reshape(size), rows)
    ]
    actual = np.transpose(values(model)[0], order).reshape(size)
    np.testing.assert_allclose(actual, expected, rtol=5e-3, atol=5e-4)
    kwm.assert_sparse(model, "2:4")


def test_sparsegpt_is_the_best_start_of_a_model():
    errors = {}
    for method in METHODS:
        model = randomize(
            keras.Sequential(
                [
                    keras.Input((32,)),
                    keras.layers.Dense(64, activation="relu"),
                    keras.layers.Dense(16),
                ]
            )
        )
        mix = normal((32, 32), 2) * np.linspace(0.1, 4, 32)
        x = (normal((400, 32), 1) @ mix).astype("float32")
        dense = ops.convert_to_numpy(model(x))
        kwm.sparsify(model, "2:4", method, x, verbose=0)
        changes = ops.convert_to_numpy(model(x)) - dense
        errors[method] = np.mean(changes**2)
    assert errors["sparsegpt"] < 0.8 * errors["wanda"]
    assert errors["wanda"] < errors["magnitude"]


# The walk through a model


def add(a, b):
    return keras.layers.Add()([a, b])


def branching():
    inputs = keras.Input((16,))
    first = keras.layers.Dense(16, activation="relu")(inputs)
    left = keras.layers.Dense(16, activation="tanh")(first)
    right = keras.layers.Dense(16)(first) * 0.5
    joined = add(add(left, right), first)
    return keras.Model(
        inputs, {"a": keras.layers.Dense(4)(joined), "b": left}
    ), normal((20, 16), 1)


def nested():
    inner_input = keras.Input((16,))
    inner = keras.Model(
        inner_input,
        keras.layers.Dense(16)(keras.layers.Dense(16, "relu")(inner_input)),
    )
    inputs = keras.Input((16,))
    outputs = keras.layers.Dense(4)(add(inner(inputs), inputs))
    return keras.Model(inputs, outputs), normal((20, 16), 1)


def shared():
    layer = keras.layers.Dense(16, activation="relu")
    inputs = keras.Input((16,))
    return keras.Model(
        inputs, keras.layers.Dense(4)(layer(layer(inputs)))
    ), normal((20, 16), 1)


def masked():
    model = keras.Sequential(
        [
            keras.Input((6,), dtype="int32"),
            keras.layers.Embedding(20, 16, mask_zero=True),
            keras.layers.Dense(16, activation="relu"),
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(4),
        ]
    )
    return model, np.random.default_rng(0).integers(0, 3, (20, 6))


def convolutions():
    model = keras.Sequential(
        [
            keras.Input((9, 8, 4)),
            keras.layers.Conv2D(8, 3, padding="same", strides=2),
            keras.layers.BatchNormalization(),
            keras.layers.Conv2D(8, (3, 2), groups=2, activation="relu"),
            keras.layers.DepthwiseConv2D(2),
            keras.layers.Flatten(),
            keras.layers.Dense(4),
        ]
    )
    return model, normal((20, 9, 8, 4), 1)


def llm():
    return make_llm(), make_tokens()


def half():
    model = keras.Sequential(
        [
            keras.Input((16,)),
            keras.layers.Dense(16, activation="relu", dtype="mixed_bfloat16"),
            keras.layers.Dense(16, dtype="mixed_bfloat16"),
            keras.layers.Dense(4),
        ]
    )
    return model, normal((20, 16), 1)


class Subclassed(keras.Model):
    """Runs its layers in another order than it creates them."""

    def __init__(self):
        super().__init__()
        self.last = keras.layers.Dense(4)
        self.block = keras.Sequential(
            [keras.layers.Dense(16, "relu"), keras.layers.Dense(16)]
        )

    def call(self, x):
        return self.last(self.block(x) + x)


def subclassed():
    model = Subclassed()
    model(normal((1, 16)))
    return model, normal((20, 16), 1)


def attention():
    inputs = keras.Input((5, 16))
    attended = keras.layers.MultiHeadAttention(2, 8)(inputs, inputs)
    return keras.Model(inputs, keras.layers.Dense(4)(attended)), normal(
        (8, 5, 16), 1
    )


MODELS = [
    branching,
    llm,
    nested,
    shared,
    masked,
    convolutions,
    half,
    subclassed,
    attention,
]
if keras.backend.backend() != "torch":
    # The walk is the same on all; to compile its parts takes the time.
    MODELS = MODELS[:2]


@pytest.mark.parametrize("make", MODELS)
def test_the_walk_is_the_model_run_for_each_kernel(make, monkeypatch):
    """What is cached between layers is what the whole model would give."""
    results = []
    for whole in (False, True):
        model, x = make()
        randomize(model)
        if whole:
            monkeypatch.setattr(keras_private, "graph_of", lambda _: None)
            monkeypatch.setattr(
                walk_module.SharedInputs, "places", lambda _: [0]
            )
        report = kwm.sparsify(
            model, "2:4", "sparsegpt", x, batch_size=8, verbose=0
        )
        assert [k.method for k in report.kernels] == ["sparsegpt"] * len(
            report.kernels
        )
        kwm.assert_sparse(model, "2:4")
        results.append(values(model))
        for layer in model._flatten_layers():
            assert "call" not in vars(layer)
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def count_calls(layer):
    """Counts the calls of a layer, past Keras' attribute tracking."""
    calls = []
    call = layer.call

    def counting(*args, **kwargs):
        calls.append(1)
        return call(*args, **kwargs)

    object.__setattr__(layer, "call", counting)
    return calls


def test_blocks_are_run_as_often_as_they_must():
    model = make_llm(layers=3)
    targets = kwm.find_targets(model)
    blocks = [count_calls(b) for b in model.backbone.transformer_layers]
    head = count_calls(model.backbone.token_embedding)
    output = [
        count_calls(b._feedforward_output_dense)
        for b in model.backbone.transformer_layers
    ]
    data = make_tokens()
    options = {"targets": targets, "batch_size": 2, "verbose": 0}
    kwm.sparsify(model, "2:4", "sparsegpt", data, **options)
    # Query, key and value share their inputs, and gate and value: 4 passes,
    # and one for the outputs, which nothing after the last block needs.
    batches = 3
    assert [len(c) for c in blocks] == [5 * batches, 5 * batches, 4 * batches]
    assert len(head) == batches
    # A pass ends where its kernels have been reached, once the first batch
    # has shown where that is.
    assert [len(c) for c in output] == [4 + batches, 4 + batches, 4]


def test_only_what_is_needed_is_kept(monkeypatch):
    inputs = keras.Input((8,))
    x = inputs
    for _ in range(8):
        x = keras.layers.Dense(8)(x)
    model = keras.Model(inputs, x)
    outputs, alive = [], []
    run = walk_module.Walk.run

    def watched(self, operation, calls):
        result = run(self, operation, calls)
        alive.append(sum(ref() is not None for ref in outputs))
        outputs.extend(map(weakref.ref, result or []))
        return result

    monkeypatch.setattr(walk_module.Walk, "run", watched)
    kwm.sparsify(model, "2:4", "wanda", normal((4, 8)), verbose=0)
    assert len(alive) == 9
    assert max(alive) <= 2


def test_layers_that_no_data_reach_or_nobody_can_read():
    class Square(keras.layers.Layer):
        def build(self, input_shape):
            self.kernel = self.add_weight(shape=(8, 8), name="kernel")

        def call(self, x):
            return ops.matmul(x, self.kernel)

    kwm.register_target(Square, contraction_axes=(0,))

    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.unused = keras.layers.Dense(4)
            self.square = Square()
            self.dense = keras.layers.Dense(4)
            self.unused.build((None, 8))

        def call(self, x):
            return self.dense(self.square(x))

    model = Model()
    model(normal((1, 8)))
    square, unused = randomize(model).square, model.unused
    expected = [
        by_method("magnitude", values(layer)[0], None, 2, 4)
        for layer in (square, unused)
    ]
    report = kwm.sparsify(model, "2:4", "wanda", normal((5, 8)), verbose=0)
    rows = {k.path: k for k in report.kernels}
    assert [k.method for k in report.kernels].count("wanda") == 1
    for layer, w, note in zip(
        (square, unused), expected, ("cannot be read", "do not reach")
    ):
        np.testing.assert_allclose(values(layer)[0], w)
        row = rows[layer.kernel.path]
        assert row.method == "magnitude"
        assert note in row.note
    assert "magnitude:" in str(report)


# Data


class Batches(keras.utils.PyDataset):
    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return self.batches[index]


@pytest.mark.parametrize(
    "kind", ["tf.data", "PyDataset", "generator", "labels", "weights"]
)
def test_data(kind):
    x, y = normal((24, 16), 1), np.zeros(24)
    expected = make_mlp()
    kwm.sparsify(expected, "2:4", "wanda", x, verbose=0)
    parts = [(x[i : i + 4], y[i : i + 4]) for i in range(0, 24, 4)]
    if kind == "tf.data":
        import tensorflow as tf

        data = tf.data.Dataset.from_tensor_slices((x, y)).batch(4)
    elif kind == "weights":
        # Rows of weight 0 are left out, whatever they hold.
        garbage = np.full((3, 16), 1e3, "float32")
        weights = np.array([1] * 24 + [0] * 3)
        data = (np.concatenate([x, garbage]), np.zeros(27), weights)
    else:
        data = {
            "PyDataset": Batches(parts),
            "generator": (part for part in parts),
            "labels": (x, y),
        }[kind]
    model = make_mlp()
    kwm.sparsify(model, "2:4", "wanda", data, verbose=0)
    for a, b in zip(values(model), values(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_raw_strings():
    tokens = ["<|endoftext|>", *"abcdefgh Ġ", "ab", "cd"]
    tokenizer = keras_hub.models.GPT2Tokenizer(
        vocabulary={token: i for i, token in enumerate(tokens)},
        merges=["a b", "c d"],
    )
    preprocessor = keras_hub.models.GPT2CausalLMPreprocessor(
        tokenizer, sequence_length=6
    )
    texts = ["abcdef", "fed abc", "a b", "hgfedcba"]
    x, _, weights = keras.tree.map_structure(np.asarray, preprocessor(texts))
    assert (weights == 0).any()
    results = []
    for data in (texts, np.array(texts), (x, None, weights)):
        model = make_llm(preprocessor)
        kwm.sparsify(model, "2:4", "sparsegpt", data, verbose=0)
        results.append(values(model))
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])
    with pytest.raises(ValueError, match="preprocessor"):
        kwm.sparsify(make_mlp(), "2:4", "wanda", texts)


# The report


def test_the_report():
    model = make_mlp()
    report = kwm.sparsify(model, "2:4", "wanda", normal((9, 16)), verbose=0)
    targets = kwm.find_targets(model)
    assert [k.key for k in report.kernels] == [t.key for t in targets]
    saved = json.loads(json.dumps(report.to_dict()))
    assert saved["kernels"][0]["shape"] == [16, 24]
    assert 0 < saved["kernels"][0]["error"] < 1
    assert targets[2].path in str(report)
    assert "2:4 by wanda" in str(report)
    without = kwm.sparsify(make_mlp(), "2:4", verbose=0)
    assert [k.error for k in without.kernels] == [None] * 3


def test_the_progress_bar(capsys):
    kwm.sparsify(make_mlp(), "2:4", "wanda", normal((9, 16)))
    assert "3/3" in capsys.readouterr().out


def test_what_does_not_fit_stays_dense():
    model = randomize(
        keras.Sequential(
            [keras.Input((6,)), keras.layers.Dense(8), keras.layers.Dense(4)]
        )
    )
    before = values(model)
    report = kwm.sparsify(model, "2:4", "wanda", normal((9, 6)), verbose=0)
    assert_same(values(model)[:2], before[:2])
    assert [k.shape for k in report.kernels] == [(8, 4)]
    assert "multiple of 4" in report.skipped[-1].reason
    model = randomize(model)
    targets = kwm.find_targets(model)[1:]
    kwm.sparsify(model, "2:4", targets=targets, verbose=0)
    with pytest.raises(ValueError, match="no kernel that fits"):
        kwm.sparsify(model, "2:4", targets=kwm.find_targets(model)[:1])


def test_masks_of_frozen_kernels_too():
    model = make_mlp()
    model.trainable = False
    kwm.sparsify(model, "2:4", verbose=0)
    kwm.assert_sparse(model)
    assert not model.trainable_variables


# Wrong use


def endless():
    class Endless(keras.utils.PyDataset):
        num_batches = None

        def __getitem__(self, index):
            return normal((2, 16))

    return Endless()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pattern": "4:2"}, "`pattern`"),
        ({"method": "obd"}, "`method`"),
        ({"method": "wanda"}, "calibration data"),
        ({"method": "wanda", "data": normal((0, 16))}, "one batch"),
        ({"method": "wanda", "data": endless()}, "endless"),
        ({"data": normal((4, 15))}, "incompatible|shape"),
        ({"batch_size": 0}, "`batch_size`"),
        ({"block_size": 1.5}, "`block_size`"),
        ({"damping": 0}, "`damping`"),
        ({"targets": ["kernel"]}, "`targets`"),
        (
            {
                "method": "sparsegpt",
                "data": np.where(np.arange(64).reshape(4, 16) == 60, np.nan, 1),
            },
            "finite",
        ),
    ],
)
def test_wrong_arguments_leave_the_model_alone(arguments, message):
    model = make_mlp()
    before = values(model)
    with pytest.raises(ValueError, match=message):
        kwm.sparsify(model, **arguments)
    assert_same(values(model), before)


def test_an_error_on_the_way_leaves_the_model_alone():
    model = make_mlp()
    before = values(model)
    # The first kernel is pruned when this is found.
    big = model.layers[1].kernel
    big.assign(ops.full(big.shape, np.inf))
    infinite = values(model)
    with pytest.raises(ValueError, match=model.layers[2].kernel.path):
        kwm.sparsify(model, "2:4", "wanda", normal((9, 16)), verbose=0)
    assert_same(values(model), infinite)
    big.assign(before[2])

    def interrupt(*args):
        raise KeyboardInterrupt

    model.layers[2].call = interrupt
    with pytest.raises(KeyboardInterrupt):
        kwm.sparsify(model, "2:4", "sparsegpt", normal((9, 16)), verbose=0)
    assert_same(values(model), before)
    assert "call" not in vars(model.layers[0])


def test_a_scaled_kernel_is_refused():
    model = make_mlp()
    attach_scaling(model)
    before = values(model)
    with pytest.raises(ValueError, match="fold"):
        kwm.sparsify(model)
    assert_same(values(model), before)
