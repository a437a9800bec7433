import keras
import numpy as np
import pytest

import keras_weightmods as kwm
from benchmarks import compander_quality as bench

pytestmark = pytest.mark.one_backend

pytest.importorskip("scipy")


def test_search_ends_between_its_neighbours():
    def measure(rate, decay):
        return -(np.log2(rate / 1.6) ** 2) - np.log2(decay / 0.001) ** 2

    parameters = ("rate", 0.05, 2), ("decay", 0.016, 4)
    best, tried = bench.search(measure, parameters)
    assert best == {"rate": 1.6, "decay": 0.001}
    values = {(row["rate"], row["decay"]): row["value"] for row in tried}
    assert len(values) == len(tried)
    for near in ((0.8, 0.001), (3.2, 0.001), (1.6, 0.004), (1.6, 0.00025)):
        assert values[near] < values[1.6, 0.001]
    assert tried[0]["value"] == max(values.values())


@pytest.mark.parametrize("method", bench.METHODS)
def test_methods_start_from_the_same_weights(method):
    own = {name: start for name, start, _ in bench.METHODS[method]}
    del own["rate"]
    trainer = bench.Trainer("plain", method, batch=2, **own)
    images = np.random.default_rng(0).random((20, 28, 28, 1), "float32")
    labels = np.arange(20) % 10
    keras.utils.set_random_seed(3)
    start = bench.make_net("plain").get_weights()
    for values in (None, [1.5 * w for w in start]):
        trained = trainer(images, labels, 1, 0.0, 3, values)
        # The head is never that of the start.
        expected = start if values is None else [*values[:-2], *start[-2:]]
        for got, weight in zip(
            bench.plain_weights(trained), expected, strict=True
        ):
            np.testing.assert_allclose(got, weight, atol=1e-6)
    trained = trainer(images, labels, 1, 0.1, 3)
    moved = bench.plain_weights(trained)
    assert all((a != b).any() for a, b in zip(moved, start))


def test_b_of_a_fixed_pair_scales_the_rate_alone():
    random = np.random.default_rng(0)
    x, y = random.normal(size=(8, 6)), random.normal(size=(8, 3))
    kernels = []
    for b, rate in ((1.0, 0.2), (0.5, 0.05), (0.5, 0.2)):
        keras.utils.set_random_seed(0)
        dense = keras.layers.Dense(3, use_bias=False)
        model = keras.Sequential([keras.Input((6,)), dense])
        kwm.attach_compander(
            model, a=0.5, b=b, learnable=False, out_of_range="clip", verbose=0
        )
        sgd = keras.optimizers.SGD(rate, momentum=0.9, weight_decay=0.1)
        model.compile(kwm.CompanderOptimizer(sgd), "mse")
        start = keras.ops.convert_to_numpy(dense.kernel)
        model.fit(x, y, epochs=9, shuffle=False, verbose=0)
        kernels.append(keras.ops.convert_to_numpy(dense.kernel))
    assert np.abs(kernels[0] - start).max() > 0.1
    np.testing.assert_allclose(kernels[0], kernels[1], atol=1e-5)
    assert np.abs(kernels[0] - kernels[2]).max() > 0.01
