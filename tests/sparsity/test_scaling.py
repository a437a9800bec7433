"""Weight scaling. What it owes every layer: the contract test of `core`."""

import keras
import numpy as np
import pytest

import keras_weightmods as kwm
from keras_weightmods.core.reparameterization import (
    left_out,
    reparameterizations,
)
from keras_weightmods.sparsity.scaling import attach_scaling, compute_scaled
from tests import models
from tests.backends import breadth
from tests.models import mlp, normal, numpy

one_backend = pytest.mark.one_backend


def reference_scaled(kernel, scale, axes):
    kernel, scale = np.float64(kernel), np.float64(scale)
    sizes = [kernel.shape[a] for a in axes]
    size = int(np.prod(sizes))
    scaled = np.zeros_like(kernel)
    for index in np.ndindex(kernel.shape):
        row = np.ravel_multi_index([index[a] for a in axes], sizes)
        others = tuple(i for a, i in enumerate(index) if a not in axes)
        group = row // (size // scale.shape[0])
        scaled[index] = kernel[index] * scale[(group, *others)]
    return scaled


@breadth(
    ("shape", "axes", "groups"),
    [
        ((2, 8, 3), (1,), 2),
        ((2, 4, 3), (0, 1), 2),
        ((3, 2, 4), (1, 2), 2),
        ((4, 3, 2), (2, 0), 4),
        ((3, 3, 4, 5), (0, 1, 2), 3),
        ((8,), (0,), 2),
    ],
)
def test_compute_scaled_equals_reference(shape, axes, groups):
    others = [d for i, d in enumerate(shape) if i not in axes]
    kernel, scale = normal(*shape), normal(groups, *others, seed=1)
    scaled = numpy(compute_scaled(kernel, scale, axes))
    expected = reference_scaled(kernel, scale, axes)
    np.testing.assert_allclose(scaled, expected, rtol=1e-6)


def test_scales_are_left_out_for_a_while():
    model, x = mlp(8, 4, 2), normal(3, 8)
    plain = numpy(model(x))
    attach_scaling(model)
    first, second = reparameterizations(model)
    assert all(item.is_identity() for item in (first, second))
    first.parameters[0].assign(2 * np.ones((2, 4)))
    assert not first.is_identity()
    scaled = numpy(model(x))
    assert np.abs(scaled - plain).max() > 0.1
    with left_out([first, second]):
        np.testing.assert_array_equal(numpy(model(x)), plain)
    np.testing.assert_array_equal(numpy(model(x)), scaled)


@one_backend
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


def test_fit_trains_scales_and_kernels_by_the_gradient():
    model = models.sequential((8,), keras.layers.Dense(3, use_bias=False))
    (kernel,) = model.weights
    scale = attach_scaling(model).kernels[0].scale
    scale.assign(np.random.default_rng(2).uniform(0.5, 2, scale.shape))
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
