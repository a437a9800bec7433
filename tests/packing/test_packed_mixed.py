"""Kernels of which some blocks of columns are 2:4 and the others are not."""

import keras
import numpy as np
import pytest
from keras import layers
from numpy.testing import assert_allclose

import keras_weightmods as kwm
from keras_weightmods.core.targets import find_targets
from keras_weightmods.packing import packed_mixed
from tests import models, references
from tests.backends import breadth
from tests.models import normal, numpy, outputs, sequential

one_backend = pytest.mark.one_backend
DENSE = (1, 4)  # of 5 blocks, the last one of 8 columns


def make(layer=None, shape=(64,)):
    keras.utils.set_random_seed(0)
    model = sequential(shape, layer or layers.Dense(72))
    models.randomize(model)
    (target,) = find_targets(model)
    kernel = numpy(target.variable).copy()
    flat = kernel.reshape(-1, 72)
    for block in set(range(5)) - set(DENSE):
        own = flat[:, 16 * block : 16 * block + 16]
        own.reshape(-1, 4, own.shape[1])[:, 1:3] = 0
    target.variable.assign(kernel)
    return model


@breadth("dtypes", [(None, "int8"), ("int8", "int4"), ("int4", "int4")], 1, 2)
def test_each_part_is_rounded_as_it_is_alone(dtypes):
    model, x = make(), normal(3, 64, seed=1)
    (layer,) = model.layers
    dense = np.isin(np.arange(72) // 16, DENSE)
    before, bias = numpy(layer.kernel), numpy(layer.bias)
    dtype, other = dtypes
    (weight,) = kwm.pack(model, dtype, dense=other).weights
    assert weight.pattern == "2:4 in part"
    kernel = numpy(layer.kernel)
    for part, arguments in (
        (~dense, {"dtype": dtype}),
        (dense, {"dense": other}),
    ):
        single = sequential((64,), layers.Dense(int(part.sum())))
        single.layers[0].kernel.assign(before[:, part])
        kwm.pack(single, **arguments)
        models.assert_same(numpy(single.layers[0].kernel), kernel[:, part])
    rounded = references.round_activations(x)
    inputs = x if dtype is None else rounded
    wide = kernel.astype("float64")
    expected = np.where(dense, rounded @ wide, inputs @ wide) + bias
    assert_allclose(outputs(model, x), expected, atol=2e-5)


@one_backend
def test_bytes_files_and_back(tmp_path):
    model, x = make(), normal(2, 64)
    report = kwm.pack(model, "int4", dense="int4")
    # 48 columns in 3.25 bits, and 32, of which 8 are padding, in 4.25.
    assert report.weights[0].bits == pytest.approx(
        (48 * 3.25 + 32 * 4.25) / 72, abs=0.01
    )
    before = outputs(model, x)
    kwm.save_model(model, tmp_path / "m.safetensors")
    loaded = kwm.load_model(tmp_path / "m.safetensors")
    models.assert_same(outputs(loaded, x), before)
    kernel = numpy(loaded.layers[0].kernel)
    kwm.unpack(loaded)
    models.assert_same(numpy(loaded.layers[0].kernel), kernel)


@one_backend
def test_convolutions_and_lora():
    model = make(layers.Conv2D(72, 2), (4, 4, 16))
    x = normal(2, 4, 4, 16)
    kwm.pack(model, dense="int8")
    before = outputs(model, x)
    (layer,) = model.layers
    layer.enable_lora(2)
    layer.lora_kernel_b.assign(normal(*layer.lora_kernel_b.shape))
    assert np.abs(outputs(model, x) - before).max() > 0.01


@one_backend
def test_few_sparse_columns_stay_with_the_others():
    model = make()
    kernel = numpy(model.layers[0].kernel).copy()
    kernel[:, 16:72] = 1
    model.layers[0].kernel.assign(kernel)
    (weight,) = kwm.pack(model, dense="int8").weights
    assert weight.pattern is None


@one_backend
@pytest.mark.parametrize(
    "blocks", [[], [1, 1], [4, 1], [5], [-1], [True], "1", [0, 1, 2, 3, 4]]
)
def test_blocks_of_a_file_are_checked(blocks):
    (target,) = find_targets(make())
    with pytest.raises(ValueError, match="`blocks` must be some of the 5"):
        packed_mixed.MixedKernel.from_config(
            target, {"dtype": "float32", "dense": "int8", "blocks": blocks}
        )
