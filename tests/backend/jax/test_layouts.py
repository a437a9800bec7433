import keras
import pytest

if keras.backend.backend() != "jax":
    pytest.skip("needs JAX", allow_module_level=True)

import jax
from jax.sharding import NamedSharding, PartitionSpec

from keras_weightmods.backend.jax import layouts

MESH = jax.sharding.AbstractMesh((2, 4), ("batch", "model"))
BOTH = "rows", "columns"


@pytest.mark.parametrize(
    ("spec", "shape", "rows", "columns", "left"),
    [
        ((None, "model"), (36, 64), (), ("model",), []),
        (("model", "batch"), (128, 32), ("model",), ("batch",), []),
        ((("batch", "model"),), (256, 20), ("batch", "model"), (), []),
        # SmolLM2: 576 rows are 18 blocks, and columns 36.
        (("model", "batch"), (576, 576), ("batch",), ("model",), []),
        (("model",), (96, 20), (), (), ["model"]),
        (("model",), (128, 64), ("model",), (), []),
    ],
)
def test_a_matrix_is_split_by_the_axes_of_the_kernel_that_divide_its_blocks(
    spec, shape, rows, columns, left
):
    assert split_of(spec, shape) == (rows, columns, left)


def test_other_matrices():
    # (heads, size, out), of which the first two are contracted.
    split = split_of(("model", None, "batch"), (256, 64), (0, 1))
    assert split == (("model",), ("batch",), [])
    # Scales of int4 values are for 64 rows.
    split = split_of(("model",), (128, 64), dtype="int4")
    assert split == ((), ("model",), [])
    split = split_of((None, "model"), (128, 64), sides=("rows",))
    assert split == (("model",), (), [])


def split_of(spec, shape, axes=(0,), dtype="float32", sides=BOTH):
    layout = NamedSharding(MESH, PartitionSpec(*spec))
    split, left = layouts.split_of(layout, axes, shape, dtype, sides)
    return split.rows, split.columns, left


def test_a_vector_is_split_by_all_axes_of_the_weight():
    layout = NamedSharding(MESH, PartitionSpec("model", None, "batch"))
    sharding, parts = layouts.split_vector(layout)
    assert tuple(sharding.spec) == (("model", "batch"),)
    assert parts == 8
    whole = NamedSharding(MESH, PartitionSpec(None, None))
    assert layouts.split_vector(whole) is None
    assert layouts.split_vector(None) is None
