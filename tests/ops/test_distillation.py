import numpy as np
import pytest
from keras import ops

from keras_weightmods.ops.distillation import chunked_losses, logits_losses
from tests import references
from tests.backends import breadth
from tests.models import gradients, normal, numpy

WIDTH, CLASSES, CAP = 6, 13, 2.0


def capped(hidden, kernel, bias):
    return CAP * ops.tanh((ops.matmul(hidden, kernel) + bias) / CAP)


def reference(hidden, kernel, bias, taught, labels, weights, share, t):
    """Losses and gradients of `capped`, and of a teacher, in float64."""
    cap = np.tanh((hidden.astype("float64") @ kernel + bias) / CAP)
    losses, slope = references.distillation(
        CAP * cap, taught, labels, weights, share, t
    )
    slope = slope * (1 - cap**2)
    return losses, [slope @ kernel.T, hidden.T @ slope, slope.sum(axis=0)]


@breadth(
    ("chunk_size", "share", "temperature"),
    [
        *((4, 1 / 3, 2.5), (1, 1 / 3, 1.0), (100, 0.0, 2.5)),
        *((4, 0.0, 1.0), (4, 1.0, 1.0), (100, 1.0, 2.5), (1, 1.0, 2.5)),
    ],
    *(0, 1),
)
def test_losses_and_gradients(chunk_size, share, temperature):
    positions = 11
    arguments = [
        normal(positions, WIDTH),
        normal(WIDTH, CLASSES, seed=1),
        normal(CLASSES, seed=2),
    ]
    teacher = normal(WIDTH, CLASSES, seed=3)
    states = normal(positions, WIDTH, seed=4)
    rng = np.random.default_rng(0)
    labels = rng.integers(CLASSES, size=positions)
    weights = rng.uniform(0, 2, size=positions).astype("float32")
    labels[3], labels[4], weights[5] = -1, CLASSES, 0
    after = labels, weights, share, temperature
    expected, slopes = reference(*arguments, states @ teacher, *after)

    def losses(hidden, *parameters, with_gradients=True):
        return chunked_losses(
            capped,
            parameters,
            lambda hidden: ops.matmul(hidden, teacher),
            hidden,
            states,
            *after,
            chunk_size=chunk_size,
            with_gradients=with_gradients,
        )

    for with_gradients in (True, False):
        found = losses(*arguments, with_gradients=with_gradients)
        np.testing.assert_allclose(numpy(found), expected, rtol=1e-5)
    # Only the first of the three has a gradient, times what comes from above.
    found = gradients(lambda *args: 3 * losses(*args)[0], *arguments)
    for gradient, slope in zip(found, slopes, strict=True):
        np.testing.assert_allclose(gradient, 3 * slope, rtol=1e-4, atol=1e-5)


@pytest.mark.one_backend
def test_without_a_teacher():
    logits, labels = normal(5, CLASSES), np.arange(5)
    weights = np.ones(5, "float32")
    entropy, kl, gradient = logits_losses(
        ops.convert_to_tensor(logits), None, labels, weights, 0.0
    )
    expected, slope = references.distillation(
        logits, logits, labels, weights, 0.0, 1.0
    )
    assert float(entropy) == pytest.approx(expected[1], rel=1e-5)
    assert float(kl) == 0
    np.testing.assert_allclose(numpy(gradient()), slope, atol=1e-6)
