"""The functions of Weight Compander against NumPy float64."""

import importlib.metadata
import math

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from keras_weightmods.ops import compand, compand_derivative, compand_inverse
from keras_weightmods.ops.compand import compand_limit
from tests import models
from tests.models import normal, numpy

FUNCTIONS = ("arctan", "arsinh", "erf")
TOLERANCE = {"float32": 3e-7, "bfloat16": 2**-8, "float16": 2**-11}
PAIRS = [(0.5, 1.0), (1.0, 0.6), (8.0, 11.0), (0.15, 0.02)]
erf = np.vectorize(math.erf, otypes=["float64"])


def reference(v, a, b, function):
    u = np.float64(v) / b
    f = {"arctan": np.arctan, "arsinh": np.arcsinh, "erf": erf}[function]
    return a * f(u)


def reference_derivative(v, a, b, function):
    u = np.float64(v) / b
    with np.errstate(over="ignore", under="ignore"):
        slope = {
            "arctan": lambda: 1 / (1 + u**2),
            "arsinh": lambda: 1 / np.hypot(1, u),
            "erf": lambda: 2 / np.sqrt(np.pi) * np.exp(-(u**2)),
        }[function]()
    return a / b * slope


def values(dtype, largest=None):
    """Small and large, both signs, zero, as `dtype` has them."""
    if largest is None:
        largest = {"float16": 6e4, "bfloat16": 1e30, "float32": 1e30}[dtype]
    x = np.geomspace(1e-4, largest, 301)
    x = np.concatenate([-x, [0.0], x, np.linspace(-3, 3, 401)])
    x = ops.cast(ops.convert_to_tensor(x, "float32"), dtype)
    return x, np.float64(numpy(x))


def close(actual, expected, dtype, absolute=1e-7):
    np.testing.assert_allclose(
        numpy(actual), expected, rtol=TOLERANCE[dtype], atol=absolute
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_compand_equals_reference(function, dtype):
    v, exact = values(dtype)
    for a, b in PAIRS:
        w = compand(v, a, b, function)
        assert keras.backend.standardize_dtype(w.dtype) == dtype
        close(w, reference(exact, a, b, function), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_derivative_equals_reference(function, dtype):
    # Beyond, the slope of arsinh is below what the tolerance sees.
    v, exact = values(dtype, largest=6e4)
    for a, b in PAIRS:
        slope = compand_derivative(v, a, b, function)
        expected = reference_derivative(exact, a, b, function)
        close(slope, expected, dtype, 6e-8 if dtype == "float16" else 1e-7)
        assert numpy(slope).min() >= 0


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_inverse_gives_the_weight_again(function, dtype):
    for a, b in PAIRS:
        limit = 0.99 * compand_limit(a, b, function, dtype)
        limit = min(limit, 5 * a)
        w = ops.cast(np.linspace(-limit, limit, 801, dtype="float32"), dtype)
        v = compand_inverse(w, a, b, function)
        assert np.isfinite(numpy(v)).all()
        again = reference(np.float64(numpy(v)), a, b, function)
        # The rounding of v, in 16 bits, is the one error there is.
        close(again, np.float64(numpy(w)), dtype, a * TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("function", "limit"), [("arctan", np.pi / 2), ("erf", 1)]
)
def test_inverse_at_and_beyond_the_range_is_nan(function, limit):
    for a in (0.5, 1.0, 0.7):
        first = np.float32(a * limit * (1 + 1e-7))
        beyond = np.float32([1.0, 1.0001, 1.5, 2.0, 3.0, 1e6]) * first
        for w in (beyond, -beyond):
            v = numpy(compand_inverse(w, a, 1.0, function))
            assert np.isnan(v).all()
        inside = np.float32([a * limit * 0.999, -a * limit * 0.999])
        v = numpy(compand_inverse(inside, a, 1.0, function))
        assert (np.sign(v) == [1, -1]).all()


def gradients(v, function, upstream, a=0.7, b=1.3):
    """Of sum(upstream * compand(v, a, b)), by the backend."""

    def loss(v, a, b):
        w = compand(v, a, b, function)
        return ops.sum(ops.convert_to_tensor(upstream) * w)

    return models.gradients(loss, *map(np.float32, (v, a, b)))


SHAPES = [(), (0, 4), (1,), (130, 70), (3, 2, 5)]
GRADIENT_CASES = [
    *[(f, scale, (7, 5)) for f in FUNCTIONS for scale in (0.1, 3.0, 1e12)],
    *[("arctan", 1.0, shape) for shape in SHAPES],
]


@pytest.mark.parametrize(("function", "scale", "shape"), GRADIENT_CASES)
def test_gradients_equal_reference(function, scale, shape):
    v, upstream = np.float32(scale) * normal(*shape), normal(*shape, seed=1)
    to_v, *found = gradients(v, function, upstream)
    assert to_v.shape == shape
    slope = reference_derivative(v, 0.7, 1.3, function)
    close(to_v, upstream * slope, "float32", 1e-6)
    to_a = upstream * reference(v, 0.7, 1.3, function) / 0.7
    to_b = -upstream * slope * np.float64(v) / 1.3
    for got, terms in zip(found, (to_a, to_b)):
        assert abs(got - terms.sum()) <= 1e-6 * np.abs(terms).sum()


def test_second_derivatives():
    v, a, b = np.float32([[-1.5, 0.2], [0.9, 3.0]]), 0.7, 1.3
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        def total(v, b):
            inner = jax.grad(lambda v: ops.sum(compand(v, a, b)))
            return ops.sum(ops.square(inner(v)))

        found = jax.grad(total, (0, 1))(v, b)
    elif backend == "tensorflow":
        import tensorflow as tf

        pair = tf.constant(v), tf.constant(b)
        with tf.GradientTape() as tape:
            tape.watch(pair)
            with tf.GradientTape() as inner:
                inner.watch(pair)
                w = ops.sum(compand(pair[0], a, pair[1]))
            total = ops.sum(ops.square(inner.gradient(w, pair[0])))
        found = tape.gradient(total, pair)
    else:
        import torch

        pair = [torch.tensor(x, requires_grad=True) for x in (v, b)]
        w = ops.sum(compand(pair[0], a, pair[1]))
        (slope,) = torch.autograd.grad(w, pair[0], create_graph=True)
        found = torch.autograd.grad(ops.sum(ops.square(slope)), pair)
    # Of the sum of squares of s = a b / (b**2 + v**2).
    exact = np.float64(v)
    square = b**2 + exact**2
    slope = a * b / square
    close(found[0], -4 * exact * slope**2 / square, "float32", 1e-6)
    to_b = np.sum(2 * slope * a * (exact**2 - b**2) / square**2)
    close(found[1], to_b, "float32", 1e-6)


def test_tensors_for_a_and_b_broadcast():
    v = np.float32(np.random.default_rng(0).normal(size=(4, 3)))
    a = np.float32([[0.5, 1.0, 2.0]])
    b = np.float32([[1.0], [2.0], [3.0], [4.0]])
    w = compand(v, ops.convert_to_tensor(a), ops.convert_to_tensor(b))
    close(w, reference(v, a, b, "arctan"), "float32")
    v = compand_inverse(w, a, b)
    close(reference(numpy(v), a, b, "arctan"), numpy(w), "float32")


def test_float64_is_kept():
    if keras.backend.backend() == "jax":
        pytest.skip("JAX has no float64 unless told")
    v = np.linspace(-3, 3, 11)
    w = compand(ops.convert_to_tensor(v, "float64"), 0.5, 1.0)
    assert keras.backend.standardize_dtype(w.dtype) == "float64"
    np.testing.assert_allclose(
        numpy(w), reference(v, 0.5, 1.0, "arctan"), rtol=1e-14
    )


def test_nan_and_infinity_pass_through():
    v = np.float32([np.nan, np.inf, -np.inf])
    for function in ("arctan", "erf"):
        w = numpy(compand(v, 0.5, 1.0, function))
        # XLA of TensorFlow 2.20 gives the arctangent of NaN as -pi / 2.
        version = importlib.metadata.version(keras.backend.backend())
        assert np.isnan(w[0]) or version.startswith("2.20.")
        limit = np.pi / 4 if function == "arctan" else 0.5
        np.testing.assert_allclose(w[1:], [limit, -limit], rtol=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    v=st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=8),
    a=st.floats(0.01, 10),
    b=st.floats(0.01, 10),
    function=st.sampled_from(FUNCTIONS),
)
def test_odd_rising_and_within_the_range(v, a, b, function):
    v = np.sort(np.float32(v))
    w = numpy(compand(v, a, b, function))
    np.testing.assert_array_equal(numpy(compand(-v, a, b, function)), -w)
    step = np.abs(w).max() * 1e-6
    assert (np.diff(w) >= -step).all()
    limit = {"arctan": np.pi / 2, "erf": 1, "arsinh": np.inf}[function]
    assert np.abs(w).max() <= a * limit * (1 + 1e-6)


@pytest.mark.parametrize("f", [compand, compand_inverse, compand_derivative])
def test_wrong_arguments(f):
    x = np.zeros(2, "float32")
    for wrong in (0, -1.0, math.nan, math.inf, np.array([1, 0])):
        for name in "ab":
            message = f"`{name}` must be positive.*Received: {name}="
            with pytest.raises(ValueError, match=message):
                f(x, **{"a": 1.0, "b": 1.0, name: wrong})
    for wrong in ("tanh", None, "Arctan"):
        with pytest.raises(ValueError, match="`function` must be one of"):
            f(x, 1.0, 1.0, wrong)
