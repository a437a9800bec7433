"""The order of operations where a step is traced."""

import tensorflow as tf


def after(earlier, tensors):
    """Return the tensors, at hand only once `earlier` are computed.

    What is computed from a variable may otherwise still be under way when the
    variable is updated in its place; seen in the branch of a condition.

    Args:
        earlier: List of tensors.
        tensors: List of tensors, or `tf.IndexedSlices`.

    Returns:
        List like `tensors`.
    """
    with tf.control_dependencies(earlier):
        return [tf.identity(tensor) for tensor in tensors]
