"""Views of kernels against NumPy, an index at a time."""

import numpy as np
import pytest

from keras_weightmods.utils import matrix as m
from tests.backends import breadth
from tests.models import normal, numpy

AXES = [((0,), ()), ((1, 0), (3,)), ((2,), (3, 1)), ((0, 1, 2), ()), ((3,), ())]


@breadth(("rows", "stacks"), AXES, 1)
def test_stack(rows, stacks):
    shape = (2, 3, 4, 5)
    x = normal(*shape)
    stack = numpy(m.to_stack(x, rows, stacks))
    assert stack.shape == m.stack_shape(shape, rows, stacks)
    columns = [i for i in range(4) if i not in (*rows, *stacks)]
    for index in np.ndindex(*shape):
        place = tuple(
            np.ravel_multi_index(
                [index[i] for i in axes], [shape[i] for i in axes]
            )
            if axes
            else 0
            for axes in (stacks, rows, columns)
        )
        assert stack[place] == x[index]
    back = numpy(m.from_stack(stack, shape, rows, stacks))
    np.testing.assert_array_equal(back, x)
    if not stacks:
        matrix = m.to_matrix(x, rows)
        np.testing.assert_array_equal(numpy(matrix), stack[0])
        back = numpy(m.from_matrix(matrix, shape, rows))
        np.testing.assert_array_equal(back, x)


@pytest.mark.one_backend
def test_groups_split_or_join_the_columns():
    x = normal(6, 8)
    groups = numpy(m.to_stack(x, 0, (), 2))
    np.testing.assert_array_equal(groups, [x[:, :4], x[:, 4:]])
    back = numpy(m.from_stack(groups, (6, 8), 0))
    np.testing.assert_array_equal(back, x)
    experts = normal(2, 6, 4)
    (joined,) = numpy(m.to_stack(experts, 1, 0, 1))
    np.testing.assert_array_equal(joined, np.concatenate([*experts], axis=1))
    back = numpy(m.from_stack(joined[None], (2, 6, 4), 1, 0))
    np.testing.assert_array_equal(back, experts)


@pytest.mark.one_backend
def test_along():
    vector = normal(6)
    laid_out = numpy(m.along(vector, (2, 5, 3), (2, 0)))
    expected = vector.reshape(3, 2).T[:, None, :]
    np.testing.assert_array_equal(laid_out, expected)


@pytest.mark.one_backend
@pytest.mark.parametrize("axis", [2, (0, -2), None, 0.5])
def test_wrong_axes(axis):
    with pytest.raises(ValueError, match="`axis`"):
        m.to_matrix(np.ones((8, 2)), axis)
