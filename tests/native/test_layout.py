import pytest

from keras_weightmods.native import layout

pytestmark = pytest.mark.one_backend


def test_what_is_no_shape_of_a_kernel():
    for shape in [(4,), [4, 4], (4, -1), (4.0, 4)]:
        with pytest.raises(ValueError, match="`shape` must be a pair"):
            layout.packed_arrays(shape, "float32")
