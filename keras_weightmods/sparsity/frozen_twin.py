"""A copy of a model as it was, to learn from."""

import keras
from keras import ops

from keras_weightmods.core import keras_compat

# For the wrappers around the model: its own layers cast what they are given,
# and a global mixed-precision policy must not cast it before.
TRANSPARENT = {"dtype": "float32", "autocast": False}


class FrozenTwin(keras.Model):
    """The model as it was: its own graph, run on a frozen copy of weights.

    Rebuilding a model from its config can change it (some backbones drop
    tied embeddings from theirs), so the graph is shared.

    Args:
        model: A built `keras.Model`.
        dtype: Dtype of the floats in the copy, or `None` for the model's own.
    """

    def __init__(self, model, dtype=None):
        super().__init__(name="teacher", **TRANSPARENT)
        # In a closure, or Keras would track, save and freeze the original.
        self._get_model = lambda: model
        self._copies = {id(v): self._copy(v, dtype) for v in model.variables}
        self.built = True

    def call(self, inputs, training=False):
        return self.run(self._get_model(), inputs)

    def run(self, part, inputs):
        """Run the model, or another one of its layers, on the copy."""
        # Which are trainable, and whether there still are scales, can change
        # after the copy was taken.
        values = map(
            self.values_of,
            (part.trainable_variables, part.non_trainable_variables),
        )
        # Unlike a call of the model, this passes on what `call` cannot take.
        takes = keras_compat.takes_training(part)
        options = {"training": False} if takes else {}
        outputs, _ = part.stateless_call(*values, inputs, **options)
        return outputs

    def values_of(self, variables):
        """Return the copies of some variables of the model, as tensors."""
        return [ops.convert_to_tensor(self._copies[id(v)]) for v in variables]

    def _copy(self, variable, dtype):
        own_dtype = keras.backend.standardize_dtype(variable.dtype)
        if dtype is None or "float" not in own_dtype:
            dtype = own_dtype
        layout = keras_compat.layout_of(variable)
        copy = keras_compat.add_laid_out(
            self.add_weight,
            layout,
            shape=variable.shape,
            dtype=dtype,
            initializer="zeros",
            trainable=False,
            autocast=False,
            name=variable.name,
        )
        # A copy indeed: JAX would share the buffer, then donate it in training.
        copy.assign(ops.copy(ops.cast(variable.value, dtype)))
        return copy
