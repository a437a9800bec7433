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
    ("spec", "shape", "options", "rows", "columns", "left"),
    [
        ((None, "model"), (36, 64), {}, (), ("model",), []),
        (("model", "batch"), (128, 32), {}, ("model",), ("batch",), []),
        ((("batch", "model"),), (256, 20), {}, ("batch", "model"), (), []),
        # SmolLM2: 576 rows are 18 blocks, and columns 36.
        (("model", "batch"), (576, 576), {}, ("batch",), ("model",), []),
        (("model",), (96, 20), {}, (), (), ["model"]),
        (("model",), (128, 64), {}, ("model",), (), []),
        # (heads, size, out), of which the first two are contracted.
        (
            *(
                ("model", None, "batch"),
                (256, 64),
                {"contraction_axes": (0, 1)},
            ),
            *(("model",), ("batch",), []),
        ),
        # Scales of int4 values are for 64 rows.
        (("model",), (128, 64), {"dtype": "int4"}, (), ("model",), []),
        ((None, "model"), (128, 64), {"sides": ("rows",)}, ("model",), (), []),
    ],
)
def test_a_matrix_is_split_by_the_axes_of_the_kernel_that_divide_its_blocks(
    spec, shape, options, rows, columns, left
):
    layout = NamedSharding(MESH, PartitionSpec(*spec))
    about = {"contraction_axes": (0,), "dtype": "float32", "sides": BOTH}
    about |= {"matrix_shape": shape, **options}
    split, found = layouts.split_of(layout, **about)
    assert (split.rows, split.columns, found) == (rows, columns, left)


def test_a_vector_is_split_by_all_axes_of_the_weight():
    layout = NamedSharding(MESH, PartitionSpec("model", None, "batch"))
    sharding, parts = layouts.split_vector(layout)
    assert tuple(sharding.spec) == (("model", "batch"),)
    assert parts == 8
    whole = NamedSharding(MESH, PartitionSpec(None, None))
    assert layouts.split_vector(whole) is None
    assert layouts.split_vector(None) is None
