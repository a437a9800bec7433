"""Attention, by the kernel and by Keras."""

import functools
import importlib

import keras
import numpy as np
import pytest
from keras import ops

from keras_weightmods import native
from keras_weightmods.backend import attention

BACKEND = keras.backend.backend()
if not native.is_available():
    pytest.skip("no compiled kernels", allow_module_level=True)

place = f"{BACKEND}.attention" if BACKEND != "torch" else "torch.rewrites"
kernel = importlib.import_module(f"keras_weightmods.backend.{place}").kernel
attend = functools.partial(attention.attend, kernel)
# Keras repeats keys by itself.
plain = ops.dot_product_attention


def inputs(batch=2, queries=1, heads=6, places=21, key_heads=3, size=32):
    rng = np.random.default_rng(0)
    q = rng.standard_normal((batch, queries, heads, size), "float32")
    keys, values = rng.standard_normal(
        (2, batch, places, key_heads, size), "float32"
    )
    return [ops.convert_to_tensor(x) for x in (q, keys, values)]


numbers = ops.convert_to_numpy


def assert_close(x, y):
    np.testing.assert_allclose(numbers(x), numbers(y), rtol=1e-5, atol=1e-6)


def prompt_mask(queries):
    mask = np.arange(21) < np.array([[5], [21]])
    mask = mask[:, None, None] & np.tri(queries, 21, 21 - queries, bool)
    return ops.convert_to_tensor(mask)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("queries", "scale"), [(1, None), (1, 0.3), (19, 0.3)])
def test_it_is_what_keras_gives(masked, queries, scale):
    options = {"mask": prompt_mask(queries) if masked else None, "scale": scale}
    q, keys, values = inputs(queries=queries)
    expected = plain(q, keys, values, **options)
    assert_close(attend(q, keys, values, **options), expected)
    # Keys in a cache of all layers are read where they are.
    cache = ops.stack([keys, values, keys, values], axis=1)
    assert_close(attend(q, cache[:, 0], cache[:, 3], **options), expected)


@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        ({"size": 24}, {}),
        ({}, {"bias": np.zeros((1, 1, 1, 21))}),
        ({}, {"attn_logits_soft_cap": 5.0}),
        ({}, {"is_causal": True}),
        ({}, {"mask": np.ones((1, 6, 1, 21), bool)}),
    ],
)
def test_what_it_is_not_made_for_goes_to_keras(shapes, options):
    q, keys, values = inputs(**shapes)
    assert attend(q, keys, values, **options) is None
    assert attend(q, keys, ops.cast(values, "bfloat16")) is None
    assert attend(*[ops.cast(x, "int32") for x in (q, keys, values)]) is None


@pytest.mark.parametrize(
    ("dtype", "queries"), [("bfloat16", 1), ("float16", 19)]
)
def test_half_precision_is_rounded_at_the_end_alone(dtype, queries):
    halves = [ops.cast(x, dtype) for x in inputs(queries=queries)]
    mask = prompt_mask(queries)
    got = attend(*halves, mask=mask)
    assert keras.backend.standardize_dtype(got.dtype) == dtype
    expected = attend(*(ops.cast(x, "float32") for x in halves), mask=mask)
    found, expected = (
        numbers(ops.cast(ops.cast(x, dtype), "float32"))
        for x in (got, expected)
    )
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("masked", "queries"), [(False, 1), (True, 3)])
def test_repeated_keys_are_read_once(queries, masked, monkeypatch):
    seen = []

    def watched(query, key, *rest):
        seen.append((key.shape[2], rest[-1]))
        return kernel(query, key, *rest)

    mask = prompt_mask(queries) if masked else None
    if BACKEND == "tensorflow" and not masked:
        pytest.skip("KerasHub's models there always have a mask")

    def repeated_attention(q, keys, values):
        keys, values = (ops.repeat(x, 2, axis=2) for x in (keys, values))
        if BACKEND != "tensorflow":
            return plain(q, keys, values, mask=mask, scale=0.2)
        # KerasHub's models there.
        scores = ops.einsum("bquh,bkuh->buqk", q, keys)
        scores = ops.multiply(scores, ops.cast(0.2, "float32"))
        weights = keras.layers.Softmax(dtype="float32")(scores, mask)
        weights = ops.cast(weights, "float32")
        return ops.einsum("buqk,bkuh->bquh", weights, values)

    given = inputs(queries=queries)
    expected = repeated_attention(*given)
    got = by_kernel(repeated_attention, given, watched, monkeypatch)
    assert seen[-1] == (3, pytest.approx(0.2))
    assert_close(got, expected)


@pytest.mark.parametrize("queries", [1, 19])
def test_groups_of_heads_as_in_gemma(queries, monkeypatch):
    seen, mask = [], numbers(prompt_mask(queries)[:, 0]).copy()
    # Keras' softmax gives zeros to a query that attends to nothing.
    mask[0, -1] = False
    mask = ops.convert_to_tensor(mask)

    def watched(*args):
        seen.append(args[1].shape[2])
        return kernel(*args)

    def by_groups(q, keys, values):
        grouped = ops.reshape(q * 0.2, (2, queries, 3, 2, 32))
        scores = ops.einsum("btkgh,bskh->bkgts", grouped, keys)
        softmax = keras.layers.Softmax(dtype="float32")
        weights = softmax(scores, mask=mask[:, None, None])
        result = ops.einsum("bkgts,bskh->btkgh", weights, values)
        return ops.reshape(result, q.shape)

    given = inputs(queries=queries)
    got = by_kernel(by_groups, given, watched, monkeypatch)
    assert seen[-1] == 3
    assert_close(got, by_groups(*given))


def test_what_is_nearly_an_attention_is_none(monkeypatch):
    def other(q, keys, values):
        return plain(
            q, ops.repeat(keys, 2, axis=2), ops.tile(values, (1, 1, 2, 1))
        )

    given = inputs()
    got = by_kernel(other, given, kernel, monkeypatch)
    assert_close(got, other(*given))


def by_kernel(function, given, kernel, monkeypatch):
    if BACKEND == "jax":
        from keras_weightmods.backend.jax import attention, traced_call

        monkeypatch.setattr(attention, "kernel", kernel)
        key_shape = given[1].shape[1:]
        return traced_call.call(function, *given, key_shape=key_shape)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        from keras_weightmods.backend.tensorflow import attention, traced_call

        monkeypatch.setattr(attention, "kernel", kernel)

        @tf.function(autograph=False)
        def run(*given):
            traced = traced_call.Traced(
                lambda *given: [function(*given)], given, given[1].shape[1:]
            )
            return traced(*given)[0]

        return run(*given)
    from keras_weightmods.backend.torch import recorded_call, rewrites

    monkeypatch.setattr(rewrites, "kernel", kernel)

    def run(_, *given):
        with rewrites.Rewrites(given):
            return function(*given)

    return recorded_call.record(run, given, [])[1]
