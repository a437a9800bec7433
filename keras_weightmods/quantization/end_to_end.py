"""Training the scales of a rounded model, end to end."""

from typing import Any

import keras
from keras import ops

from keras_weightmods.calibration.block_reconstruction import (
    Batches,
    Part,
    relative_error,
    train_part,
)
from keras_weightmods.core import free_memory, seam
from keras_weightmods.core.head import Head, input_of, output_of
from keras_weightmods.ops.distillation import chunk_positions, chunked_losses
from keras_weightmods.quantization.grid_weights import GridScales
from keras_weightmods.quantization.head import Outputs


def train_scales(
    model: Any,
    head: Head | None,
    values: Any,
    outputs: Outputs,
    items: list[GridScales],
    steps: int,
    learning_rate: float,
    positions: int | None,
    verbose: Any,
) -> tuple[float, float]:
    """Train the scales of a model to reproduce its earlier outputs.

    The integers stay. This is the second phase of EfficientQAT (arXiv
    2407.11062), with the model itself as the teacher. For a language model the
    loss is KL(before || now) of the logits, for other models that of a block.

    Args:
        model: A functional Keras model, rounded.
        head: `Head` of a language model, or None.
        values: Dict by id of the values of its variables before, which is
            emptied.
        outputs: `Outputs` from before, of the head's body or the model.
        items: List of `GridScales`, not attached.
        steps: Int, about how many are made: in whole epochs, at least one.
        learning_rate: Float > 0, the peak rate of Adam for factors of the
            scales, which are 1 at the start.
        positions: Int, about those of a step, or None for a batch.
        verbose: 0 or 1, whether to show Keras' progress bars.

    Returns:
        Pair of floats, the mean loss of a position held out, before the
        training and after it. They are equal where the training was undone.
    """
    # This stage has the largest arrays. First it gets what others freed.
    free_memory.give_back()
    # It has no optimizer or compiled functions of its own.
    whole = keras.Model(input_of(model), output_of(model))
    calls: Any = [((x,), {}) for x, _ in outputs.batches]
    calls = keras.tree.map_structure(ops.convert_to_tensor, calls)
    fit, held = (
        Batches(calls[part], outputs.states[part], outputs.used[part], size)
        for part, size in ((outputs.fit, positions), (outputs.held, None))
    )
    # On an error the caller restores the model.
    seam.attach_items(whole, items)
    trained = [each for item in items for each in item.parameters]
    loss = _Divergence(head, values, trained) if head else relative_error
    run = head.body if head else whole
    part = Part(whole, run, loss, fit, recompute=True)
    epochs = max(1, round(steps / len(fit)))
    before, after = train_part(
        part, trained, fit, held, epochs, learning_rate, verbose=verbose
    )
    seam.fold_items(whole, items)
    return before, after if after <= before else before


class _Divergence(keras.layers.Layer):
    """KL(before || now) of a position's logits, from hidden states.

    Args:
        head: `Head`, as it is now.
        values: Dict by id of its variables' values before, which is emptied.
        trained: List of variables, those of the head among them.
    """

    def __init__(self, head: Head, values: Any, trained: Any) -> None:
        super().__init__(dtype="float32", autocast=False)
        self.head = head
        chosen = set(map(id, trained))
        self.trained = [v for v in head.variables if id(v) in chosen]
        self.stored = [v for v in head.variables if id(v) in values]
        self.taught = []
        for variable in self.stored:
            value = values.pop(id(variable))
            copy = self.add_weight(
                shape=value.shape,
                dtype=keras.backend.standardize_dtype(value.dtype),
                trainable=False,
                autocast=False,
                initializer="zeros",
            )
            # Copy: JAX would share the buffer, and donate it twice.
            copy.assign(ops.copy(value))
            self.taught.append(copy)
        self.built = True

    def call(self, hidden: Any, taught: Any, weights: Any) -> Any:
        # Each chunk computes the head's weights, and sums the gradients of
        # what is trained: those of a table would be as large as its values.
        now = [ops.convert_to_tensor(v) for v in self.trained]
        before = [ops.convert_to_tensor(copy) for copy in self.taught]
        plain = self.head.function(self.stored, plain=True)
        weights = ops.reshape(weights, (-1,))
        total = ops.maximum(ops.sum(weights), 1.0)
        return chunked_losses(
            self.head.function(self.trained),
            now,
            lambda x: plain(x, *before),
            ops.reshape(hidden, (-1, hidden.shape[-1])),
            ops.reshape(taught, (-1, taught.shape[-1])),
            ops.zeros_like(weights, dtype="int32"),
            weights / total,
            1.0,
            # CAST takes more at a time, to sum the gradient of a table less.
            chunk_size=chunk_positions(self.head.classes) // 2,
        )[0]


def values_of(head: Head | None, value_of: Any) -> dict[int, Any]:
    """Return copies of the values of a head's variables, by their ids.

    Args:
        head: `Head`, or None.
        value_of: Callable from a variable to its value.
    """
    if head is None:
        return {}
    dtype = head.layers[0].compute_dtype
    return {
        id(each): ops.stop_gradient(ops.copy(ops.cast(value_of(each), dtype)))
        for each in head.variables
    }
