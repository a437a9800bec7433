"""See `backend.interface`."""

import jax
import jax.numpy as jnp
import numpy as np

from keras_weightmods.backend.interface import Backend


class _JAX(Backend):
    def vjp(self, function, *inputs):
        return jax.vjp(function, *inputs)

    def full_precision(self):
        return jax.default_matmul_precision("highest")

    def compiled(self, function, static=()):
        program = jax.jit(function, static_argnums=static)

        def call(*args):
            # Even where a forward pass runs op by op.
            with jax.disable_jit(False):
                return program(*args)

        return call

    def compiled_call(self, layer):
        # `Model.predict_on_batch` passes all weights out and back in, which
        # takes as long as a row of tokens takes a language model.
        @jax.jit
        def stateless(values, inputs):
            return layer.stateless_call(*values, inputs, training=False)[0]

        def call(inputs):
            groups = layer.trainable_variables, layer.non_trainable_variables
            return stateless([[v.value for v in g] for g in groups], inputs)

        return call

    def after(self, tensors, first):
        if not tensors:
            return tensors
        numbers = [jnp.reshape(x, (-1,))[0].astype("float32") for x in first]
        # Sorted, because XLA computes a sum anew for each of its users.
        number = jnp.sort(jnp.stack(numbers))[0]
        # Always true, also for NaN, but XLA does not know.
        is_there = jnp.logical_not(number > jnp.abs(number))
        return [jnp.where(is_there, x, -x) for x in tensors]

    def view_of(self, tensor):
        if isinstance(tensor, jax.core.Tracer):
            return None
        if [device.platform for device in tensor.devices()] == ["cpu"]:
            return np.asarray(tensor)
        return None

    def tensor_of(self, array):
        # Shares the memory of an aligned array. Without the dtype JAX copies
        # it.
        return jnp.asarray(array, dtype=array.dtype)

    def processes(self):
        several = jax.process_count() > 1
        return self._module("processes") if several else None


backend = _JAX()
