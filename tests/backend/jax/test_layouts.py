import keras
import pytest

if keras.backend.backend() != "jax":
    pytest.skip("needs JAX", allow_module_level=True)

import jax
from jax.sharding import NamedSharding, PartitionSpec

from keras_weightmods.backend.jax import layouts

MESH = jax.sharding.AbstractMesh((2, 4), ("batch", "model"))
BOTH = "rows", "columns"


def split_of(spec, contraction_axes, shape, dtype="float32", sides=BOTH):
    layout = NamedSharding(MESH, PartitionSpec(*spec))
    split, left = layouts.split_of(
        layout, contraction_axes, shape, dtype, sides
    )
    return split.rows, split.columns, left


def test_a_matrix_is_split_by_the_axes_that_split_the_kernel():
    split = split_of((None, "model"), (0,), (36, 64))
    assert split == ((), ("model",), [])
    split = split_of(("model", "batch"), (0,), (128, 32))
    assert split == (("model",), ("batch",), [])
    # (heads, size, out), of which the first two are contracted.
    split = split_of(("model", None, "batch"), (0, 1), (256, 64))
    assert split == (("model",), ("batch",), [])
    split = split_of((("batch", "model"),), (0,), (256, 20))
    assert split == (("batch", "model"), (), [])


def test_an_axis_that_does_not_divide_the_blocks_is_taken_for_the_others():
    # SmolLM2: 576 rows are 18 blocks, and columns 36.
    split = split_of(("model", "batch"), (0,), (576, 576))
    assert split == (("batch",), ("model",), [])
    assert split_of(("model",), (0,), (96, 20)) == ((), (), ["model"])
    # Scales of int4 values are for 64 rows.
    assert split_of(("model",), (0,), (128, 64)) == (("model",), (), [])
    split = split_of(("model",), (0,), (128, 64), "int4")
    assert split == ((), ("model",), [])
    split = split_of((None, "model"), (0,), (128, 64), sides=("rows",))
    assert split == (("model",), (), [])


def test_a_vector_is_split_by_all_axes_of_the_weight():
    layout = NamedSharding(MESH, PartitionSpec("model", None, "batch"))
    sharding, parts = layouts.split_vector(layout)
    assert tuple(sharding.spec) == (("model", "batch"),)
    assert parts == 8
    whole = NamedSharding(MESH, PartitionSpec(None, None))
    assert layouts.split_vector(whole) is None
    assert layouts.split_vector(None) is None
