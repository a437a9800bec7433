"""See `backend.interface`."""

import contextlib
import functools

import numpy as np
import tensorflow as tf

from keras_weightmods.backend.interface import Backend


class _TensorFlow(Backend):
    def vjp(self, function, *inputs):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            output = function(*inputs)

        def pullback(upstream):
            return tape.gradient(
                output, inputs, upstream, unconnected_gradients="zero"
            )

        return output, pullback

    @contextlib.contextmanager
    def full_precision(self):
        config = tf.config.experimental
        before = config.tensor_float_32_execution_enabled()
        config.enable_tensor_float_32_execution(False)
        try:
            yield
        finally:
            config.enable_tensor_float_32_execution(before)

    def fused(self, function):
        return _by_shape(function, jit_compile=True)

    def compiled(self, function, static=()):
        # XLA would compile the unrolled loops for many seconds.
        return _once(function)

    def after(self, tensors, first):
        with tf.control_dependencies(first):
            return [tf.identity(tensor) for tensor in tensors]

    def outside_trace(self):
        return tf.init_scope()

    def view_of(self, tensor):
        device = tf.DeviceSpec.from_string(tensor.device).device_type
        # NumPy makes no array of a scalar in bfloat16.
        if device != "CPU" or not tensor.shape.rank:
            return None
        return np.asarray(tensor)

    def tensor_of(self, array):
        if array.ctypes.data % 64:
            # Its operations abort Python on memory that is not aligned.
            return tf.constant(array)
        if array.dtype == "bfloat16":
            # Dtypes of ml_dtypes are not part of DLPack's interface in NumPy.
            bits = self.tensor_of(array.view("uint16"))
            return tf.bitcast(bits, tf.bfloat16)
        return tf.experimental.dlpack.from_dlpack(array.__dlpack__())


def _by_shape(function, jit_compile=False):
    """Return a function that is one program for each shape of its inputs."""
    # A function for each: with one for all, TensorFlow warns of retracing
    # where there are many shapes.
    functions = {}

    def call(*args):
        args = tf.nest.map_structure(_dense, args)
        key = tuple(
            tuple(x.shape) if tf.is_tensor(x) else x
            for x in tf.nest.flatten(args)
        )
        if key not in functions:
            functions[key] = tf.function(
                function, autograph=False, jit_compile=jit_compile
            )
        return functions[key](*args)

    return call


_once = functools.cache(_by_shape)


def _dense(x):
    """Return the tensor of a variable or of a sparse gradient."""
    return tf.convert_to_tensor(x) if hasattr(x, "dtype") else x


backend = _TensorFlow()
