"""Weight scaling. What it owes every layer: the contract test of `core`."""

import keras
import numpy as np
import pytest

import keras_weightmods as kwm
from keras_weightmods.ops.nm import nm_mask, nm_project
from keras_weightmods.sparsity.scaling import attach_scaling, compute_scaled
from tests import models
from tests.models import assert_same, mlp, normal, numpy, weights_of


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
    absolute = [axis % len(shape) for axis in axes]
    others = [d for i, d in enumerate(shape) if i not in absolute]
    kernel, scale = normal(*shape), normal(groups, *others, seed=1)
    scaled = numpy(compute_scaled(kernel, scale, axes))
    expected = reference_scaled(kernel, scale, absolute)
    np.testing.assert_allclose(scaled, expected, rtol=1e-6)


@pytest.mark.parametrize("scale_shape", [(3, 3), (2, 4), (2,), ()])
def test_compute_scaled_rejects_a_wrong_scale(scale_shape):
    with pytest.raises(ValueError, match=r"Received: kernel\.shape"):
        compute_scaled(np.ones((8, 3)), np.ones(scale_shape), 0)


def scales_of(report, seed=None):
    """Return the scales of all kernels, random with a seed."""
    scales = [kernel.scale for kernel in report.kernels]
    if seed is not None:
        rng = np.random.default_rng(seed)
        for scale in scales:
            scale.assign(rng.uniform(0.5, 2, scale.shape))
    return scales


def test_the_kernel_property_is_the_effective_weight():
    model = mlp(16, 8, 4)
    layer, stored = model.layers[0], model.weights[0]
    (scale, _) = scales_of(attach_scaling(model), seed=2)
    expected = reference_scaled(numpy(stored), numpy(scale), (0,))
    np.testing.assert_allclose(numpy(layer.kernel), expected, rtol=1e-6)
    assert isinstance(layer, keras.layers.Dense)
    assert scale.path == stored.path + "_scale"
    assert layer.count_params() == 16 * 8 + 8 + 2 * 8


def test_groups_are_reduced_or_the_kernel_skipped():
    model = mlp(12, 6, 4, 2)
    report = attach_scaling(model, groups=2)
    assert [k.groups for k in report.kernels] == [1, 1]
    (skipped,) = report.skipped
    assert "multiple of m=4" in skipped.reason
    assert "multiple" in str(report)
    kwm.fold(model)
    report = attach_scaling(model, groups=3, pattern="1:2")
    assert [k.groups for k in report.kernels] == [3, 3, 2]


NETS = {
    "dense": lambda: mlp(16, 8, 4),
    "einsum": lambda: models.sequential(
        (5, 2, 4), keras.layers.EinsumDense("bquh,umh->bqm", (None, 3))
    ),
    "conv2d": lambda: models.sequential((5, 5, 4), keras.layers.Conv2D(3, 3)),
}


@pytest.mark.parametrize("pattern", [(2, 4), "1:4", (1, 2)])
@pytest.mark.parametrize("name", NETS)
def test_the_mask_is_unchanged(name, pattern):
    model = NETS[name]()
    targets = kwm.find_targets(model)
    report = attach_scaling(model, targets=targets, pattern=pattern)
    assert len(report.kernels) == len(targets)
    masks = []
    for target in targets:
        variable, axes = target.variable, target.contraction_axes
        masks.append(numpy(nm_mask(variable.value, pattern, axes)))
        variable.assign(nm_project(variable.value, pattern, axes))
    scales_of(report, seed=2)
    kwm.fold(model)
    assert_same([numpy(t.variable) != 0 for t in targets], masks)


def test_fit_trains_scales_and_kernels_by_the_gradient():
    model = models.sequential((8,), keras.layers.Dense(3, use_bias=False))
    (kernel,) = model.weights
    (scale,) = scales_of(attach_scaling(model), seed=2)
    w, a = np.float64(numpy(kernel)), np.float64(numpy(scale))
    x = normal(8, 8)
    model.compile(keras.optimizers.SGD(0.1), loss="mse", jit_compile=False)
    y = np.ones((8, 3), "float32")
    model.fit(x, y, batch_size=8, epochs=2, verbose=0, shuffle=False)
    for _ in range(2):
        spread = np.repeat(a, 4, axis=0)
        error = 2 * (np.float64(x) @ (spread * w) - 1) / (8 * 3)
        effective_grad = np.float64(x).T @ error
        scale_grad = (effective_grad * w).reshape(2, 4, 3).sum(axis=1)
        w, a = w - 0.1 * effective_grad * spread, a - 0.1 * scale_grad
    np.testing.assert_allclose(numpy(kernel), w, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(numpy(scale), a, rtol=1e-5, atol=1e-6)


def test_scales_can_be_left_out_of_weight_decay():
    model = mlp(16, 8, 4)
    stored = model.weights[0]
    (scale, _) = scales_of(attach_scaling(model))
    optimizer = keras.optimizers.AdamW(weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_names=["kernel_scale"])
    optimizer.build(model.trainable_variables)
    assert not optimizer._use_weight_decay(scale)
    assert optimizer._use_weight_decay(stored)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_computes_the_product_in_float32(policy):
    einsum = keras.layers.EinsumDense("bx,xy->by", 8, dtype=policy)
    layers = [keras.layers.Dense(8, dtype=policy), einsum]
    model, x = models.sequential((16,), *layers), normal(2, 16)
    scales_of(attach_scaling(model), seed=2)
    expected = models.outputs(model, x)
    kwm.fold(model)
    np.testing.assert_array_equal(models.outputs(model, x), expected)


def test_mixed_precision_trains_steps_too_small_for_bfloat16():
    model = mlp(16, 4, dtype="mixed_bfloat16")
    (scale,) = scales_of(attach_scaling(model))
    model.compile(keras.optimizers.SGD(1e-3), loss="mse", jit_compile=False)
    model.fit(normal(8, 16), np.ones((8, 4), "float32"), verbose=0)
    moved = np.abs(numpy(scale) - 1)
    assert moved.min() > 0
    assert moved.max() < 2**-8


def test_a_checkpoint_of_other_groups_is_an_error(tmp_path):
    model, other = mlp(16, 8, 4), mlp(16, 8, 4)
    attach_scaling(other, groups=1)
    other.save_weights(tmp_path / "one.weights.h5")
    attach_scaling(model)
    before = weights_of(models.randomize(model))
    with pytest.raises(ValueError, match=r"kwm\.fold\(model\)"):
        model.load_weights(tmp_path / "one.weights.h5")
    assert_same(weights_of(model), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"groups": 0}, "groups=0"),
        ({"groups": 2.0}, "groups=2.0"),
        ({"pattern": "4:2"}, "pattern"),
        ({"pattern": "1:7"}, "no kernel that can be scaled"),
    ],
)
def test_errors_leave_the_model_untouched(arguments, message):
    model = mlp(16, 8, 4)
    before = weights_of(model), [type(layer) for layer in model.layers]
    with pytest.raises(ValueError, match=message):
        attach_scaling(model, **arguments)
    assert_same(weights_of(model), before[0])
    assert [type(layer) for layer in model.layers] == before[1]
    assert len(attach_scaling(model).kernels) == 2


class Experts(keras.layers.Layer):
    """Two kernels in plain attributes, with a leading axis of experts."""

    def build(self, input_shape):
        self.up = self.add_weight(shape=(2, input_shape[-1], 4), name="up")
        self.down = self.add_weight(shape=(2, 4, 8), name="down")

    def call(self, x):
        x = keras.ops.einsum("bi,eio->beo", x, self.up)
        return keras.ops.einsum("beo,eod->bd", x, self.down)


def test_a_stack_of_kernels_has_scales_of_its_own():
    axes = {"contraction_axes": (1,), "stack_axes": (0,)}
    kwm.register_layer_kind(Experts, {"up": axes, "down": axes})
    scales = scales_of(attach_scaling(models.sequential((8,), Experts())))
    shapes = {scale.name: tuple(scale.shape) for scale in scales}
    assert shapes == {"up_scale": (2, 2, 4), "down_scale": (1, 2, 8)}
