"""Weight scaling: exact at the start, trainable, foldable, never lost."""

import importlib.util

import keras
import numpy as np
import pytest
from keras import ops

from keras_weightmods.core.targets import find_targets, register_target
from keras_weightmods.ops.nm import nm_mask, nm_project, nm_violations
from keras_weightmods.reparameterize.fold import fold
from keras_weightmods.sparsity.scaling import attach_scaling, compute_scaled

HAS_HUB = importlib.util.find_spec("keras_hub") is not None


def reference_scaled(kernel, scale, axes):
    """One entry after another, in NumPy float64."""
    kernel, scale = np.float64(kernel), np.float64(scale)
    size = int(np.prod([kernel.shape[a] for a in axes]))
    scaled = np.zeros_like(kernel)
    for index in np.ndindex(kernel.shape):
        row = 0
        for axis in axes:
            row = row * kernel.shape[axis] + index[axis]
        others = tuple(i for a, i in enumerate(index) if a not in axes)
        group = row // (size // scale.shape[0])
        scaled[index] = kernel[index] * scale[(group, *others)]
    return scaled


@pytest.mark.parametrize(
    ("shape", "axes", "groups"),
    [
        ((8, 3), (0,), 2),
        ((8, 3), (0,), 1),
        ((3, 8), (1,), 4),
        ((2, 8, 3), (1,), 2),
        ((2, 4, 3), (0, 1), 2),
        ((3, 2, 4), (1, 2), 2),
        ((4, 3, 2), (0, 2), 2),
        ((4, 3, 2), (-1, 0), 4),
        ((3, 3, 4, 5), (0, 1, 2), 3),
        ((8,), (0,), 2),
    ],
)
def test_compute_scaled_equals_reference(shape, axes, groups):
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=shape).astype("float32")
    absolute = [axis % len(shape) for axis in axes]
    others = [d for i, d in enumerate(shape) if i not in absolute]
    scale = rng.uniform(0.5, 2, (groups, *others)).astype("float32")
    scaled = ops.convert_to_numpy(compute_scaled(kernel, scale, axes))
    expected = reference_scaled(kernel, scale, absolute)
    np.testing.assert_allclose(scaled, expected, rtol=1e-6)


@pytest.mark.parametrize("scale_shape", [(3, 3), (2, 4), (2,), ()])
def test_compute_scaled_rejects_a_wrong_scale(scale_shape):
    with pytest.raises(ValueError, match=r"Received: kernel\.shape"):
        compute_scaled(np.ones((8, 3)), np.ones(scale_shape), 0)


def dense_model():
    return keras.Sequential(
        [
            keras.Input((16,)),
            keras.layers.Dense(8, activation="relu"),
            keras.layers.Dense(4, use_bias=False),
        ]
    )


def single_layer(layer, shape):
    return keras.Sequential([keras.Input(shape), layer])


def attention_model():
    inputs = keras.Input((5, 16))
    attention = keras.layers.MultiHeadAttention(num_heads=2, key_dim=4)
    return keras.Model(inputs, attention(inputs, inputs))


MODELS = {
    "dense": dense_model,
    "einsum first": lambda: single_layer(
        keras.layers.EinsumDense("bqm,muh->bquh", (None, 2, 3)), (5, 8)
    ),
    "einsum middle": lambda: single_layer(
        keras.layers.EinsumDense("bqm,umh->bquh", (None, 2, 3)), (5, 8)
    ),
    "einsum several": lambda: single_layer(
        keras.layers.EinsumDense("bquh,uhm->bqm", (None, 3)), (5, 2, 4)
    ),
    "einsum apart": lambda: single_layer(
        keras.layers.EinsumDense("bquh,umh->bqm", (None, 3)), (5, 2, 4)
    ),
    "conv2d": lambda: single_layer(
        keras.layers.Conv2D(3, 3, padding="same"), (5, 5, 4)
    ),
    "separable": lambda: single_layer(
        keras.layers.SeparableConv2D(3, 3), (5, 5, 8)
    ),
    "attention": attention_model,
}


def inputs_for(model, batch=2):
    rng = np.random.default_rng(1)
    return rng.normal(size=(batch, *model.input_shape[1:])).astype("float32")


def randomize(scales, seed=2):
    rng = np.random.default_rng(seed)
    for scale in scales:
        scale.assign(rng.uniform(0.5, 2, scale.shape))


def outputs(model, x):
    return ops.convert_to_numpy(model(x))


@pytest.mark.parametrize("name", MODELS)
def test_attach_is_bit_equal_and_fold_keeps_the_function(name):
    model = MODELS[name]()
    layers = list(model._flatten_layers())
    classes = [type(layer) for layer in layers]
    names = [(layer.name, layer.path) for layer in layers]
    weights, paths = list(model.weights), [w.path for w in model.weights]
    config = model.to_json()
    x = inputs_for(model)
    before = outputs(model, x)

    targets = find_targets(model)
    report = attach_scaling(model)
    assert report.kernels
    again = find_targets(model)
    assert [id(t.variable) for t in again] == [id(t.variable) for t in targets]
    assert len(model.weights) == len(weights) + len(report.scales)
    assert len({w.path for w in model.weights}) == len(model.weights)
    assert all(s.name.endswith("kernel_scale") for s in report.scales)
    np.testing.assert_array_equal(outputs(model, x), before)

    randomize(report.scales)
    scaled = outputs(model, x)
    assert np.abs(scaled - before).max() > 1e-3
    folded = fold(model)
    assert [k.path for k in folded.kernels] == [k.path for k in report.kernels]
    np.testing.assert_allclose(outputs(model, x), scaled, rtol=0, atol=1e-6)
    assert [type(layer) for layer in layers] == classes
    assert [(layer.name, layer.path) for layer in layers] == names
    assert [id(w) for w in model.weights] == [id(w) for w in weights]
    assert [w.path for w in model.weights] == paths
    assert model.to_json() == config
    assert fold(model).kernels == ()


def test_the_kernel_property_is_the_effective_weight():
    model = dense_model()
    layer = model.layers[0]
    (scale, _) = attach_scaling(model).scales
    randomize([scale])
    np.testing.assert_allclose(
        ops.convert_to_numpy(layer.kernel),
        reference_scaled(layer._kernel.numpy(), scale.numpy(), (0,)),
        rtol=1e-6,
    )
    assert isinstance(layer, keras.layers.Dense)
    assert scale.path == layer._kernel.path + "_scale"
    assert layer.count_params() == 16 * 8 + 8 + 2 * 8


def test_groups_are_reduced_or_the_kernel_skipped():
    model = keras.Sequential(
        [
            keras.Input((12,)),
            keras.layers.Dense(6),
            keras.layers.Dense(4),
            keras.layers.Dense(2),
        ]
    )
    report = attach_scaling(model, groups=2)
    assert [k.groups for k in report.kernels] == [1, 1]
    assert report.reduced == report.kernels
    (skipped,) = report.skipped
    assert "6 is not a multiple of 4" in skipped.reason
    assert "1 group(s) of 2" in str(report)
    assert "multiple" in str(report)
    fold(model)
    report = attach_scaling(model, groups=3, pattern="1:2")
    assert [k.groups for k in report.kernels] == [3, 3, 2]


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (1, 2)])
@pytest.mark.parametrize("name", ["dense", "einsum apart", "conv2d"])
def test_the_mask_is_unchanged(name, pattern):
    model = MODELS[name]()
    n, m = (
        pattern if isinstance(pattern, tuple) else map(int, pattern.split(":"))
    )
    report = attach_scaling(model, pattern=pattern)
    paths = [kernel.path for kernel in report.kernels]
    targets = [t for t in find_targets(model) if t.path in paths]
    assert targets
    masks = []
    for target in targets:
        variable, axes = target.variable, target.contraction_axes
        masks.append(nm_mask(variable.value, (n, m), axes))
        variable.assign(nm_project(variable.value, (n, m), axes))
    randomize(report.scales)
    fold(model)
    for target, mask in zip(targets, masks, strict=True):
        value, axes = target.variable.value, target.contraction_axes
        assert int(nm_violations(value, (n, m), axes)) == 0
        np.testing.assert_array_equal(
            ops.convert_to_numpy(value != 0), ops.convert_to_numpy(mask)
        )


def fit_steps(model, steps=2, **compile_args):
    model.compile(
        keras.optimizers.SGD(0.1), loss="mse", jit_compile=False, **compile_args
    )
    x = inputs_for(model, batch=8)
    y = np.ones((8, *model.output_shape[1:]), "float32")
    model.fit(x, y, batch_size=8, epochs=steps, verbose=0, shuffle=False)


def test_fit_trains_scales_and_kernels_by_the_gradient():
    model = keras.Sequential(
        [keras.Input((8,)), keras.layers.Dense(3, use_bias=False)]
    )
    (kernel,) = model.weights
    (scale,) = attach_scaling(model).scales
    randomize([scale])
    w, a = np.float64(kernel.numpy()), np.float64(scale.numpy())
    x = np.float64(inputs_for(model, batch=8))
    fit_steps(model, steps=2)
    for _ in range(2):
        spread = np.repeat(a, 4, axis=0)
        error = 2 * (x @ (spread * w) - 1) / (8 * 3)
        effective_grad = x.T @ error
        scale_grad = (effective_grad * w).reshape(2, 4, 3).sum(axis=1)
        w, a = w - 0.1 * effective_grad * spread, a - 0.1 * scale_grad
    np.testing.assert_allclose(kernel.numpy(), w, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(scale.numpy(), a, rtol=1e-5, atol=1e-6)

    assert model.optimizer.built
    scaled = outputs(model, x)
    fold(model)
    assert not model.compiled
    predicted = model.predict(np.float32(x), verbose=0)
    np.testing.assert_allclose(predicted, scaled, atol=1e-6)
    fit_steps(model, steps=1)


def test_predict_forgets_what_was_compiled_before():
    model = dense_model()
    x = inputs_for(model)
    model.predict(x, verbose=0)
    randomize(attach_scaling(model).scales)
    scaled = model.predict(x, verbose=0)
    np.testing.assert_allclose(scaled, outputs(model, x), atol=1e-5)


def test_scales_can_be_left_out_of_weight_decay():
    model = dense_model()
    (scale, _) = attach_scaling(model).scales
    optimizer = keras.optimizers.AdamW(weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_names=["kernel_scale"])
    optimizer.build(model.trainable_variables)
    assert not optimizer._use_weight_decay(scale)
    assert optimizer._use_weight_decay(model.layers[0]._kernel)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_computes_the_product_in_float32(policy):
    model = keras.Sequential(
        [
            keras.Input((16,)),
            keras.layers.Dense(8, dtype=policy),
            keras.layers.EinsumDense("bx,xy->by", 8, dtype=policy),
        ]
    )
    x = inputs_for(model)
    before = outputs(model, x)
    scales = attach_scaling(model).scales
    np.testing.assert_array_equal(outputs(model, x), before)
    assert {s.dtype for s in scales} == {"float32"}
    randomize(scales)
    y = model(x)
    assert keras.backend.standardize_dtype(y.dtype) == policy[6:]
    scaled = ops.convert_to_numpy(y)
    fold(model)
    np.testing.assert_array_equal(outputs(model, x), scaled)


def test_mixed_precision_trains_steps_too_small_for_bfloat16():
    model = single_layer(keras.layers.Dense(4, dtype="mixed_bfloat16"), (16,))
    (scale,) = attach_scaling(model).scales
    model.compile(keras.optimizers.SGD(1e-3), loss="mse", jit_compile=False)
    x = inputs_for(model, batch=8)
    model.fit(x, np.ones((8, 4), "float32"), batch_size=8, verbose=0)
    moved = np.abs(scale.numpy() - 1)
    assert moved.min() > 0
    assert moved.max() < 2**-8


def test_bfloat16_variables_get_float32_scales():
    model = single_layer(keras.layers.Dense(4, dtype="bfloat16"), (16,))
    x = inputs_for(model)
    before = outputs(model, x)
    (scale,) = attach_scaling(model).scales
    assert scale.dtype == "float32"
    np.testing.assert_array_equal(outputs(model, x), before)
    fold(model)
    assert model.weights[0].dtype == "bfloat16"


def test_regularizer_sees_the_effective_weight():
    regularizer = keras.regularizers.L2(0.1)
    model = single_layer(
        keras.layers.Dense(4, kernel_regularizer=regularizer), (16,)
    )
    layer = model.layers[0]
    randomize(attach_scaling(model).scales)
    expected = 0.1 * np.sum(np.square(ops.convert_to_numpy(layer.kernel)))
    np.testing.assert_allclose(
        ops.convert_to_numpy(model.losses[0]), expected, rtol=1e-5
    )
    fold(model)
    np.testing.assert_allclose(
        ops.convert_to_numpy(model.losses[0]), expected, rtol=1e-5
    )
    assert layer._kernel.regularizer is regularizer


def lora_models():
    return [
        dense_model(),
        MODELS["einsum several"](),
        MODELS["conv2d"](),
    ]


def test_lora_adds_to_the_effective_weight_and_freezes_the_scales(tmp_path):
    for model in lora_models():
        x = inputs_for(model)
        scales = attach_scaling(model).scales
        randomize(scales)
        scaled = outputs(model, x)
        layer = model.layers[0]
        layer.enable_lora(2)
        assert not scales[0].trainable
        assert not layer._kernel.trainable
        np.testing.assert_allclose(outputs(model, x), scaled, atol=1e-6)

        rng = np.random.default_rng(3)
        layer.lora_kernel_b.assign(rng.normal(size=layer.lora_kernel_b.shape))
        adapted = outputs(model, x)
        effective = compute_scaled(
            layer._kernel,
            scales[0],
            find_targets(model)[0].contraction_axes,
        )
        delta = layer.lora_kernel_a.numpy() @ layer.lora_kernel_b.numpy()
        np.testing.assert_allclose(
            ops.convert_to_numpy(layer.kernel),
            ops.convert_to_numpy(effective) + delta,
            atol=1e-5,
        )
        model.save_weights(tmp_path / "lora.weights.h5")
        layer.lora_kernel_b.assign(layer.lora_kernel_b * 0)
        model.load_weights(tmp_path / "lora.weights.h5")
        np.testing.assert_array_equal(outputs(model, x), adapted)
        fold(model)
        np.testing.assert_allclose(outputs(model, x), adapted, atol=1e-5)
        assert layer.lora_enabled
        assert not layer._kernel.trainable


def test_scales_of_frozen_kernels_are_frozen():
    model = dense_model()
    model.layers[0].enable_lora(2)
    model.layers[1].trainable = False
    report = attach_scaling(model)
    assert not any(scale.trainable for scale in report.scales)


@pytest.mark.parametrize("name", ["dense", "separable", "attention"])
def test_checkpoints_hold_the_scales(name, tmp_path):
    path = tmp_path / "scaled.weights.h5"
    model, other, plain = MODELS[name](), MODELS[name](), MODELS[name]()
    x = inputs_for(model)
    randomize(attach_scaling(model).scales)
    model.save_weights(path)

    attach_scaling(other)
    other.load_weights(path)
    np.testing.assert_array_equal(outputs(other, x), outputs(model, x))
    for ours, theirs in zip(model.weights, other.weights, strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())

    before = plain.get_weights()
    with pytest.raises(ValueError, match="could not be loaded"):
        plain.load_weights(path)
    for old, new in zip(before, plain.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_checkpoint_into_a_plain_lora_model_is_an_error(tmp_path):
    # Keras does not count variables there.
    model, plain = dense_model(), dense_model()
    attach_scaling(model)
    model.save_weights(tmp_path / "a.weights.h5")
    for layer in plain.layers:
        layer.enable_lora(2)
    with pytest.raises(ValueError, match="could not be loaded"):
        plain.load_weights(tmp_path / "a.weights.h5")


def test_other_checkpoints_into_a_scaled_model_are_errors(tmp_path):
    plain, model, one_group = dense_model(), dense_model(), dense_model()
    plain.save_weights(tmp_path / "plain.weights.h5")
    attach_scaling(one_group, groups=1)
    one_group.save_weights(tmp_path / "one.weights.h5")
    attach_scaling(model)
    before = model.get_weights()
    for name in ("plain", "one"):
        with pytest.raises(ValueError, match="fold"):
            model.load_weights(tmp_path / f"{name}.weights.h5")
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


class Wrapper(keras.Model):
    """A subclassed model: its config does not hold its layers."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(4)

    def call(self, x):
        return self.dense(x)


@pytest.mark.filterwarnings("ignore:.*get_config")
@pytest.mark.parametrize("make", [dense_model, Wrapper])
def test_whole_model_save_wants_fold_first(make, tmp_path):
    model = make()
    model(np.ones((2, 16), "float32"))
    attach_scaling(model)
    with pytest.raises(ValueError, match=r"fold\(model\)"):
        model.save(tmp_path / "model.keras")


def test_clone_wants_fold_first():
    model = dense_model()
    attach_scaling(model)
    with pytest.raises(ValueError, match=r"fold\(model\)"):
        keras.models.clone_model(model)


def test_folded_model_saves_and_loads_as_plain_keras(tmp_path):
    model = dense_model()
    randomize(attach_scaling(model).scales)
    fold(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    x = inputs_for(model)
    np.testing.assert_array_equal(outputs(loaded, x), outputs(model, x))
    assert type(loaded.layers[0]) is keras.layers.Dense


@pytest.mark.filterwarnings("ignore:Layer InputLayer")
def test_quantize_of_a_scaled_layer_is_refused():
    model = dense_model()
    attach_scaling(model)
    x = inputs_for(model)
    before = outputs(model, x)
    with pytest.raises(NotImplementedError, match=r"fold\(model\)"):
        model.layers[0].quantize("int8", type_check=False)
    with pytest.warns(UserWarning, match=r"fold\(model\)"):
        model.quantize("int8")
    np.testing.assert_array_equal(outputs(model, x), before)
    fold(model)
    model.quantize("int8")
    assert model.layers[0].quantization_mode == "int8"


def state(model):
    return (
        [type(layer) for layer in model._flatten_layers()],
        [id(w) for w in model.weights],
        [w.numpy().tobytes() for w in model.weights],
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"groups": 0}, "groups=0"),
        ({"groups": -1}, "groups=-1"),
        ({"groups": 2.0}, "groups=2.0"),
        ({"groups": True}, "groups=True"),
        ({"pattern": "4:2"}, "pattern"),
        ({"pattern": "0:4"}, "pattern"),
        ({"pattern": "1:7"}, "no kernel that can be scaled"),
    ],
)
def test_errors_leave_the_model_untouched(arguments, message):
    model = dense_model()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        attach_scaling(model, **arguments)
    assert state(model) == before


def test_second_attach_is_an_error():
    model = dense_model()
    attach_scaling(model)
    before = state(model)
    with pytest.raises(ValueError, match=r"only once.*fold\(model\)"):
        attach_scaling(model)
    assert state(model) == before


def test_built_optimizer_is_an_error_with_a_way_out():
    model = dense_model()
    model.compile("sgd", loss="mse")
    model.optimizer.build(model.trainable_variables)
    before = state(model)
    with pytest.raises(ValueError, match="new optimizer"):
        attach_scaling(model)
    assert state(model) == before
    model.compile("sgd", loss="mse")
    attach_scaling(model)


def test_failure_while_attaching_is_rolled_back(monkeypatch):
    model = dense_model()
    before = state(model)
    last = model.layers[-1]

    def fail(*args, **kwargs):
        raise MemoryError("no room")

    monkeypatch.setattr(last, "add_weight", fail)
    with pytest.raises(MemoryError):
        attach_scaling(model)
    assert state(model) == before
    with pytest.raises(ValueError, match="already built"):
        model.layers[0].add_weight(shape=())


def test_layer_with_a_saver_of_its_own_is_skipped():
    class Counting(keras.layers.Dense):
        def save_own_variables(self, store):
            super().save_own_variables(store)
            store["calls"] = np.ones(())

    model = keras.Sequential(
        [keras.Input((16,)), Counting(8), keras.layers.Dense(4)]
    )
    report = attach_scaling(model)
    assert [k.shape for k in report.kernels] == [(8, 4)]
    assert any("save_own_variables" in s.reason for s in report.skipped)


class Experts(keras.layers.Layer):
    """Kernels in plain attributes, with a leading axis of experts."""

    def build(self, input_shape):
        self.up = self.add_weight(shape=(2, input_shape[-1], 4), name="up")
        self.down = self.add_weight(shape=(2, 4, 8), name="down")

    def call(self, x):
        x = ops.einsum("bi,eio->beo", x, self.up)
        return ops.einsum("beo,eod->bd", x, self.down)


def test_two_stacks_of_kernels_in_plain_attributes(tmp_path):
    for attribute in ("up", "down"):
        register_target(
            Experts, attribute, contraction_axes=(1,), stack_axes=(0,)
        )
    model, other = (single_layer(Experts(), (8,)) for _ in range(2))
    layer = model.layers[0]
    x = inputs_for(model)
    before, plain = outputs(model, x), state(model)
    report = attach_scaling(model)
    assert {s.name for s in report.scales} == {"up_scale", "down_scale"}
    assert {tuple(s.shape) for s in report.scales} == {(2, 2, 4), (1, 2, 8)}
    np.testing.assert_array_equal(outputs(model, x), before)
    randomize(report.scales)
    scaled = outputs(model, x)
    model.save_weights(tmp_path / "experts.weights.h5")
    attach_scaling(other)
    other.load_weights(tmp_path / "experts.weights.h5")
    np.testing.assert_array_equal(outputs(other, x), scaled)
    fold(model)
    np.testing.assert_allclose(outputs(model, x), scaled, atol=1e-5)
    assert state(model)[:2] == plain[:2]
    assert isinstance(layer.up, keras.Variable)


def test_shared_layer_is_scaled_once():
    layer = keras.layers.Dense(16)
    inputs = keras.Input((16,))
    model = keras.Model(inputs, layer(layer(inputs)))
    report = attach_scaling(model)
    assert len(report.kernels) == 1


@pytest.mark.skipif(not HAS_HUB, reason="needs keras-hub")
def test_tiny_llama(tmp_path):
    import keras_hub

    def make():
        keras.utils.set_random_seed(0)
        return keras_hub.models.LlamaBackbone(
            vocabulary_size=32,
            num_layers=2,
            num_query_heads=2,
            num_key_value_heads=1,
            hidden_dim=8,
            intermediate_dim=16,
        )

    model = make()
    classes = [type(layer) for layer in model._flatten_layers()]
    x = {
        "token_ids": np.arange(12).reshape(2, 6) % 32,
        "padding_mask": np.ones((2, 6), "int32"),
    }
    before = outputs(model, x)
    report = attach_scaling(model)
    assert len(report.kernels) == 14
    assert len({s.path for s in report.scales}) == 14
    np.testing.assert_array_equal(outputs(model, x), before)

    randomize(report.scales)
    scaled = outputs(model, x)
    model.save_weights(tmp_path / "llama.weights.h5")
    other = make()
    with pytest.raises(ValueError, match="could not be loaded"):
        other.load_weights(tmp_path / "llama.weights.h5")
    attach_scaling(other)
    other.load_weights(tmp_path / "llama.weights.h5")
    np.testing.assert_array_equal(outputs(other, x), scaled)
    with pytest.raises(ValueError, match=r"fold\(model\)"):
        model.save(tmp_path / "llama.keras")

    fold(model)
    np.testing.assert_allclose(outputs(model, x), scaled, atol=1e-6)
    assert [type(layer) for layer in model._flatten_layers()] == classes
    model.save(tmp_path / "llama.keras")
    loaded = keras.models.load_model(tmp_path / "llama.keras")
    np.testing.assert_array_equal(outputs(loaded, x), outputs(model, x))
