"""The functions of Weight Compander against NumPy float64."""

import importlib.metadata
import math

import keras
import numpy as np
import pytest
from keras import ops

from keras_weightmods.ops import compand, compand_derivative, compand_inverse
from keras_weightmods.ops.compand import compand_limit
from tests import models
from tests.backends import breadth
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


CASES = [(function, dtype) for dtype in TOLERANCE for function in FUNCTIONS]


@breadth(("function", "dtype"), CASES, 0, 1, 2, 4)
def test_compand_and_its_derivative_equal_the_reference(function, dtype):
    v, exact = values(dtype)
    for a, b in PAIRS:
        w = compand(v, a, b, function)
        assert keras.backend.standardize_dtype(w.dtype) == dtype
        close(w, reference(exact, a, b, function), dtype)
    # Beyond, the slope of arsinh is below what the tolerance sees.
    v, exact = values(dtype, largest=6e4)
    for a, b in PAIRS:
        slope = compand_derivative(v, a, b, function)
        expected = reference_derivative(exact, a, b, function)
        close(slope, expected, dtype, 6e-8 if dtype == "float16" else 1e-7)
        assert numpy(slope).min() >= 0


@breadth(("function", "dtype"), CASES, 0)
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


@breadth(("function", "limit"), [("arctan", np.pi / 2), ("erf", 1)])
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
    """Gradients of sum(upstream * compand(v, a, b)), by the backend."""

    def loss(v, a, b):
        w = compand(v, a, b, function)
        return ops.sum(ops.convert_to_tensor(upstream) * w)

    return models.gradients(loss, *map(np.float32, (v, a, b)))


GRADIENT_CASES = [
    *[(f, scale, (7, 5)) for f in FUNCTIONS for scale in (0.1, 3.0, 1e12)],
    *[("arctan", 1.0, shape) for shape in [(), (0, 4), (130, 70)]],
]


@breadth(("function", "scale", "shape"), GRADIENT_CASES, 1)
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


def test_tensors_for_a_and_b_broadcast():
    v = np.float32(np.random.default_rng(0).normal(size=(4, 3)))
    a = np.float32([[0.5, 1.0, 2.0]])
    b = np.float32([[1.0], [2.0], [3.0], [4.0]])
    w = compand(v, ops.convert_to_tensor(a), ops.convert_to_tensor(b))
    close(w, reference(v, a, b, "arctan"), "float32")
    v = compand_inverse(w, a, b)
    close(reference(numpy(v), a, b, "arctan"), numpy(w), "float32")


@pytest.mark.one_backend
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
    w = numpy(compand(v, 0.5, 1.0))
    # XLA of TensorFlow 2.20 gives the arctangent of NaN as -pi / 2.
    version = importlib.metadata.version(keras.backend.backend())
    assert np.isnan(w[0]) or version.startswith("2.20.")
    np.testing.assert_allclose(w[1:], [np.pi / 4, -np.pi / 4], rtol=1e-6)


@pytest.mark.one_backend
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
