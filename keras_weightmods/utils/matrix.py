"""Kernels as matrices: contraction axes flattened to rows, others to columns.

A matrix is (K, R). A kernel with axes that index whole matrices, as experts
do, is a stack (S, K, R).
"""

import math
from collections.abc import Sequence

from keras import ops

from keras_weightmods.utils.checks import shown

Axes = int | Sequence[int]


def to_matrix(x, axis):
    """Return a tensor as a matrix (K, R), `axis` (int or ints) as its rows."""
    return ops.reshape(_transposed(x, axis), stack_shape(x.shape, axis)[1:])


def from_matrix(matrix, shape, axis):
    """Undo `to_matrix` for a tensor of `shape`."""
    order = _order(len(shape), axis)
    x = ops.reshape(matrix, [shape[i] for i in order])
    back = [order.index(i) for i in range(len(order))]
    return x if back == sorted(back) else ops.transpose(x, back)


def to_stack(x, contraction_axes, stack_axes=(), stacks=None):
    """Return a kernel as its matrices, a tensor of shape (S, K, R).

    Args:
        x: Tensor, variable or array.
        contraction_axes, stack_axes: Ints or sequences of ints.
        stacks: Int, S where it is another than that of `stack_axes`, as for
            the groups of a convolution: the columns are split, or joined.
    """
    shape = stack_shape(x.shape, contraction_axes, stack_axes)
    axes = _tuple(stack_axes) + _tuple(contraction_axes)
    return _regrouped(ops.reshape(_transposed(x, axes), shape), stacks)


def from_stack(stack, shape, contraction_axes, stack_axes=()):
    """Undo `to_stack` for a kernel of `shape`."""
    stack = _regrouped(stack, contraction_size(shape, stack_axes))
    axes = _tuple(stack_axes) + _tuple(contraction_axes)
    return from_matrix(stack, shape, axes)


def stack_shape(shape, contraction_axes, stack_axes=()):
    """Return the shape (S, K, R) of the matrices of a kernel of `shape`."""
    stacks, rows = _tuple(stack_axes), _tuple(contraction_axes)
    columns = _order(len(shape), stacks + rows)[len(stacks + rows) :]
    axes = stacks, rows, columns
    return tuple(math.prod(shape[i] for i in each) for each in axes)


def contraction_size(shape, axis):
    """Return the number of entries along `axis`, an int or several."""
    return math.prod(shape[i] for i in _tuple(axis))


def along(vector, shape, axis):
    """Lay a vector over `axis` out so that it broadcasts to `shape`."""
    axes = _tuple(axis)
    sizes = tuple(size if i in axes else 1 for i, size in enumerate(shape))
    return from_matrix(vector, sizes, axes)


def _regrouped(stack, stacks):
    """Regroup matrices with the same columns into another number of them."""
    if stacks is None or stacks == stack.shape[0]:
        return stack
    rows = ops.transpose(stack, (1, 0, 2))
    rows = ops.reshape(rows, (stack.shape[1], stacks, -1))
    return ops.transpose(rows, (1, 0, 2))


def _transposed(x, axes):
    """Return the tensor with `axes` first."""
    x = ops.convert_to_tensor(x)
    order = _order(len(x.shape), axes)
    return x if order == sorted(order) else ops.transpose(x, order)


def _order(rank, axis):
    axes = _tuple(axis)
    if not all(isinstance(i, int) and -rank <= i < rank for i in axes):
        raise ValueError(
            f"`axis` must be an int or a tuple of ints in [-{rank}, {rank}) "
            f"for a tensor of rank {rank}. Received: axis={shown(axis)}"
        )
    axes = [i % rank for i in axes]
    if len(set(axes)) != len(axes):
        raise ValueError(
            f"`axis` names an axis twice. Received: axis={shown(axis)}"
        )
    return axes + [i for i in range(rank) if i not in axes]


def _tuple(axis):
    return tuple(axis) if isinstance(axis, Sequence) else (axis,)
