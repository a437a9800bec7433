"""The losses of distillation for models that are split at their heads."""

import keras
from keras import ops

from keras_weightmods.backend import backend_module
from keras_weightmods.core import keras_compat
from keras_weightmods.core.head import find_head
from keras_weightmods.ops.distillation import chunked_losses
from keras_weightmods.sparsity.frozen_twin import FrozenTwin

# Of the logits of a chunk, in float32; some five such arrays exist at a time.
# Smaller chunks are products too small to be fast, and each adds to the
# gradient of the whole head once more.
CHUNK_BYTES = 64 * 2**20


class SplitLoss:
    """Takes the losses of student and teacher from what enters their heads.

    Args:
        student, teacher: `keras.Model`; the teacher may be `None`.
        heads: The `Head` of each.
        temperature: Float > 0, of the distillation.
    """

    def __init__(self, student, teacher, heads, temperature):
        self.body = heads[0].body
        self._heads = heads
        # In a closure, or Keras would track the models here, too.
        self._get_teacher = lambda: teacher
        self._temperature = temperature

    @classmethod
    def of(cls, student, teacher, temperature, loss, options):
        """Return it where it is what the whole models would give; else None.

        Args:
            student, teacher, temperature: As for the class.
            loss: What `compile` was given.
            options: Dict of the other arguments of `compile`.
        """
        names = ("metrics", "weighted_metrics", "loss_weights")
        if any(options.get(name) is not None for name in names):
            return None
        if not _is_plain_entropy(loss) or keras.distribution.distribution():
            return None
        heads = [_splittable_head(student)]
        if isinstance(teacher, FrozenTwin):
            heads.append(heads[0])
        elif teacher is not None:
            heads.append(_splittable_head(teacher))
        if None in heads:
            return None
        return cls(student, teacher, heads, temperature)

    def takes(self, y, sample_weight):
        """Return whether labels and weights are those of single tokens."""
        if y is None or any(map(keras.tree.is_nested, (y, sample_weight))):
            return False
        return len(y.shape) == 2 or (len(y.shape) == 3 and y.shape[2] == 1)

    def logits(self, hidden, training):
        """Return the student's logits."""
        return self._heads[0](hidden, training)

    def __call__(self, x, y, hidden, sample_weight, share, training):
        """Return the total, the label loss and the distillation loss.

        Args:
            x, y, sample_weight, training: As in `compute_loss`.
            hidden: What `body` makes of `x`.
            share: Float in [0, 1], of the distillation in the total.
        """
        head = self._heads[0]
        trained = [v for v in head.variables if v.trainable]
        # Within a scope, what it does not name has not the value of now.
        rest = [(v, v.value) for v in head.variables if not v.trainable]

        def student(hidden, *values):
            with keras.StatelessScope([*zip(trained, values), *rest]):
                return head(hidden, training)

        teacher = taught = None
        if len(self._heads) > 1:
            teacher, taught = self._teacher(x)
        weights = self._weights(hidden, sample_weight)
        losses = chunked_losses(
            student,
            [v.value for v in trained],
            teacher,
            _flat(hidden),
            taught,
            ops.reshape(ops.cast(y, "int32"), (-1,)),
            ops.reshape(weights, (-1,)),
            share,
            self._temperature,
            chunk_size=max(1, CHUNK_BYTES // (4 * head.classes)),
            with_gradients=training,
        )
        return losses[0], *map(ops.stop_gradient, (losses[1], losses[2]))

    def _teacher(self, x):
        """Return the teacher's head as a function, and what enters it."""
        model, head = self._get_teacher(), self._heads[1]
        if isinstance(model, FrozenTwin):
            values = model.values_of(head.variables)
            taught = model.run(head.body, x)
        else:
            values = [v.value for v in head.variables]
            taught = head.body(x, training=False)
        values = list(map(ops.stop_gradient, values))

        def teacher(hidden):
            with keras.StatelessScope([*zip(head.variables, values)]):
                return head(hidden)

        return teacher, ops.stop_gradient(_flat(taught))

    def _weights(self, hidden, sample_weight):
        """Return by what Keras multiplies the loss of each position."""
        mask = keras_compat.get_keras_mask(hidden)
        mask = self._heads[0].compute_mask(mask)

        def reduced(values):
            if mask is not None:
                keras_compat.set_keras_mask(values, mask)
            return _Values(name="values", dtype="float32")(
                values, values, sample_weight
            )

        # Keras multiplies a mask into the weights, on torch in place.
        if sample_weight is not None:
            sample_weight = ops.copy(sample_weight)
        zeros = ops.zeros(ops.shape(hidden)[:2], "float32")
        mean, pullback = backend_module("vjp").vjp(reduced, zeros)
        return pullback(ops.ones_like(mean))[0]


class _Values(keras.losses.Loss):
    """The mean of values; linear, so that its gradient are the weights."""

    def call(self, y_true, y_pred):
        return y_pred


def _flat(hidden):
    return ops.reshape(hidden, (-1, hidden.shape[-1]))


def _is_plain_entropy(loss):
    """Return whether a loss is the mean cross-entropy of labels and logits."""
    kind = keras.losses.SparseCategoricalCrossentropy
    if type(loss) is not kind or loss.dtype != "float32":
        return False
    plain = kind(from_logits=True, name=loss.name)
    return loss.get_config() == plain.get_config()


def _splittable_head(model):
    """Return the head of a model that can be run apart from it, or None."""
    # A class of the user may do more than run its graph.
    if keras_compat.graph_of(model) is None:
        return None
    head = find_head(model)
    if head is None or any(
        # Gradients in float16 vanish, as they are taken before the loss is
        # scaled; those of quantized layers may be no sums of those of parts;
        # and the loss of activities is a mean over the batch.
        layer.compute_dtype == "float16"
        or getattr(layer, "quantization_mode", None)
        or getattr(layer, "activity_regularizer", None)
        for layer in head.layers
    ):
        return None
    return head
