"""Distillation of logits, with sample weights and masks, by a frozen twin.

If a model can be split at its head, the losses are computed from the head's
inputs, with the logits of a few positions at a time.
"""

import contextlib
import warnings
from typing import Any

import keras
from keras import ops

from keras_weightmods import backend
from keras_weightmods.core import keras_compat
from keras_weightmods.core.head import splittable_head
from keras_weightmods.core.reparameterization import (
    left_out,
    reparameterizations,
)
from keras_weightmods.ops.distillation import chunk_positions, chunked_losses
from keras_weightmods.utils import checks
from keras_weightmods.utils.dtypes import bytes_of


class LogitsDistiller(keras.distillation.Distiller):
    """Train a student on labels and on the logits of a teacher.

    `loss = weight * KL(teacher || student) + (1 - weight) * label loss`

    Keras' own `Distiller` leaves out sample weights, masks and the losses of
    the student's layers, and has no frozen twin as a teacher.

    Some models end in a known head, and have plain cross-entropy from logits as
    the loss. A step then computes the losses from the last hidden states, with
    the logits of a few positions at a time.

    Args:
        model: The student, a built `keras.Model`.
        teacher: `"self"` for a frozen copy of `model` as it is now, another
            `keras.Model`, or `None` for the label loss alone.
        weight: Float in [0, 1], of the distillation.
        temperature: Float > 0, of the distillation.
        teacher_dtype: Dtype of the copy. `None` keeps the model's own.
        name: String.

    Raises:
        ValueError: If an argument is outside these ranges, or `teacher` does
            not fit `model`. Both are unchanged then.
    """

    def __init__(
        self, model, teacher, weight, temperature, teacher_dtype, name
    ):
        is_self = isinstance(teacher, str) and teacher == "self"
        # A teacher that is not built would have random weights.
        is_other = isinstance(teacher, keras.Model) and teacher.built
        if teacher is model or not (is_self or is_other or teacher is None):
            expected = '"self" for a frozen copy, another built `keras.Model`'
            raise checks.error("teacher", f"{expected} or None", teacher)
        # Only a copy is cast; another model has its own dtype.
        dtypes = ("float32", "bfloat16", "float16") if is_self else ()
        checks.check_choice("teacher_dtype", teacher_dtype, (None, *dtypes))
        weight = checks.check_float("distillation_weight", weight, 0, 1)
        temperature = checks.check_float("temperature", temperature, above=0)
        if teacher is None:
            # A Distiller needs a teacher; without one this is a plain Model.
            keras.Model.__init__(self, name=name, **_TRANSPARENT)
            self.student, self.teacher = model, None
            self.student_loss_weight = 1.0
        else:
            if is_self:
                teacher = FrozenTwin(model, teacher_dtype)
            super().__init__(
                teacher=teacher,
                student=model,
                # For its checks; `compute_loss` here takes `LogitsKL`.
                distillation_losses=keras.distillation.LogitsDistillation(),
                student_loss_weight=1 - weight,
                name=name,
                **_TRANSPARENT,
            )
            _warn_about_outputs(model)
        self._temperature = temperature
        # The heads of student and teacher, if losses are computed in chunks.
        # The model then ends before its head in a step.
        self._heads: Any = None
        self._is_split = False
        self.built = True

    @property
    def output_names(self) -> Any:
        """The names of the model's outputs, which Keras' losses use."""
        return self.student.output_names

    @property
    def teacher_bytes(self) -> int:
        """The memory of the teacher's weights, in bytes."""
        variables = self.teacher.variables if self.teacher else []
        return bytes_of(variables)

    def compile(self, optimizer=None, loss=None, **kwargs):
        """Configure the training, as `keras.Model.compile` does."""
        # Bypasses Distiller.compile and its compute_loss, which leave out
        # sample weights, masks and the layers' own losses.
        keras.Model.compile(self, optimizer=optimizer, loss=loss, **kwargs)
        self._heads = None
        names = ("metrics", "weighted_metrics", "loss_weights")
        if (
            all(kwargs.get(name) is None for name in names)
            and _is_plain_entropy(loss)
            and keras.distribution.distribution() is None
        ):
            # A frozen twin has that of the student. Without a teacher it is
            # unused.
            is_other = not isinstance(self.teacher, FrozenTwin | None)
            models = self.student, self.teacher if is_other else self.student
            heads = list(map(splittable_head, models))
            self._heads = None if None in heads else tuple(heads)

    def train_step(self, *args, **kwargs):
        """Train on a batch, with the models split where they can be."""
        with self._splitting():
            return super().train_step(*args, **kwargs)

    def test_step(self, *args, **kwargs):
        """Evaluate on a batch, with the models split where they can be."""
        with self._splitting():
            return super().test_step(*args, **kwargs)

    @contextlib.contextmanager
    def _splitting(self):
        self._is_split = self._heads is not None
        try:
            yield
        finally:
            self._is_split = False

    def call(self, inputs, training=None, **kwargs):
        """Return the logits; in a split step, the inputs of the head."""
        if self._is_split:
            return self._heads[0].body(inputs, training=training)
        return super().call(inputs, training=training, **kwargs)

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        """Return the weighted sum of the label and the distillation loss."""
        weight = self.student_loss_weight
        if self._is_split and _are_of_tokens(y, sample_weight):
            total, label_loss, distillation_loss = self._split_losses(
                x, y, y_pred, sample_weight, training
            )
            own = sum(map(ops.sum, self.losses))
            label_loss, total = label_loss + own, total + weight * own
        else:
            if self._is_split:
                y_pred = self._heads[0](y_pred, training)
            elif y_pred is None:
                y_pred = self(x, training=training)
            if y is None and self.loss is not None:
                expected = "the labels that the loss compares with"
                raise checks.error("y", expected, y)
            # Keras multiplies masks into the weights, on torch in place.
            label_loss = keras.Model.compute_loss(
                self, x, y, y_pred, _copied(sample_weight), training
            )
            distillation_loss = self._divergence(x, y_pred, sample_weight)
            total = weight * label_loss + (1 - weight) * distillation_loss
        if self.teacher is not None:
            self.student_loss_tracker.update_state(label_loss)
            self.distillation_loss_tracker.update_state(distillation_loss)
            self.total_loss_tracker.update_state(total)
        return total

    def _divergence(self, x, y_pred, sample_weight):
        """Return the teacher's loss, over all outputs in their order."""
        if self.teacher is None:
            return 0.0
        taught = keras.tree.flatten(self.teacher(x, training=False))
        taught = list(map(ops.stop_gradient, taught))
        weights = keras.tree.flatten(_copied(sample_weight))
        if len(weights) == 1:
            weights = weights * len(taught)
        loss = LogitsKL(self._temperature)
        return sum(map(loss, taught, keras.tree.flatten(y_pred), weights))

    def _split_losses(self, x, y, hidden, sample_weight, training):
        """Return the total, the label loss and the distillation loss.

        Args:
            x, y, sample_weight, training: As in `compute_loss`.
            hidden: What enters the head of the student.
        """
        head = self._heads[0]
        trained = [v for v in head.variables if v.trainable]
        teacher, taught = self._taught(x)
        weights = _weights(head, hidden, sample_weight)
        losses = chunked_losses(
            head.function(trained, training),
            [v.value for v in trained],
            teacher,
            _flat(hidden),
            taught,
            ops.reshape(ops.cast(y, "int32"), (-1,)),
            ops.reshape(weights, (-1,)),
            1 - self.student_loss_weight,
            self._temperature,
            chunk_size=chunk_positions(head.classes),
            with_gradients=training,
        )
        return losses[0], *map(ops.stop_gradient, (losses[1], losses[2]))

    def _taught(self, x):
        """Return the teacher's head as a function, and its inputs."""
        model, head = self.teacher, self._heads[-1]
        if model is None:
            return None, None
        if isinstance(model, FrozenTwin):
            values = model.values_of(head.variables)
            taught = model.run(head.body, x)
        else:
            values = [v.value for v in head.variables]
            taught = head.body(x, training=False)
        values = list(map(ops.stop_gradient, values))
        logits = head.function(head.variables)
        return lambda x: logits(x, *values), ops.stop_gradient(_flat(taught))

    def reset_metrics(self) -> None:
        """Reset all metrics; without a teacher there are fewer."""
        keras.Model.reset_metrics(self)


class LogitsKL(keras.losses.Loss):
    """KL(teacher || student) of two arrays of logits.

    Keras' own distillation takes the mean over all positions, padding
    included, and goes through probabilities clipped at 1e-7, which a large
    vocabulary feels.

    Args:
        temperature: Float > 0. The loss is multiplied by its square, as in
            Hinton et al. (arXiv 1503.02531).
    """

    def __init__(self, temperature=1.0):
        super().__init__(name="logits_kl")
        self.temperature = temperature

    def call(self, y_true, y_pred):
        teacher = ops.log_softmax(y_true / self.temperature, axis=-1)
        student = ops.log_softmax(y_pred / self.temperature, axis=-1)
        kl = ops.sum(ops.exp(teacher) * (teacher - student), axis=-1)
        return self.temperature**2 * kl


def _warn_about_outputs(model):
    """Warn if the last layer shows that outputs are no logits."""
    for output in keras.tree.flatten(getattr(model, "outputs", None) or []):
        operation, _ = keras_compat.producer(output)
        activation = getattr(operation, "activation", operation)
        name = getattr(activation, "__name__", type(activation).__name__)
        is_one = output.shape[-1] == 1
        if is_one or name.lower() in ("softmax", "sigmoid"):
            found = (
                "has one entry on its last axis" if is_one else f"is a {name}"
            )
            warnings.warn(
                "Distillation takes the outputs of model and teacher as "
                "logits of classes over the last axis. Received: "
                f"the output {operation.name!r}, which {found}. Let the model "
                "give logits, with a loss of `from_logits=True`, or train "
                "without distillation: `teacher=None`.",
                stacklevel=4,
            )


def _copied(weights):
    return keras.tree.map_structure(
        lambda each: None if each is None else ops.copy(each), weights
    )


def _are_of_tokens(y, sample_weight):
    """Return whether labels and weights are those of single tokens."""
    if y is None or any(map(keras.tree.is_nested, (y, sample_weight))):
        return False
    return len(y.shape) == 2 or (len(y.shape) == 3 and y.shape[2] == 1)


def _weights(head, hidden, sample_weight):
    """Return the factor of Keras for the loss of each position."""
    mask = head.compute_mask(keras_compat.get_keras_mask(hidden))
    mean_of = _Values(name="values", dtype="float32")
    sample_weight = _copied(sample_weight)

    def reduced(values):
        if mask is not None:
            keras_compat.set_keras_mask(values, mask)
        return mean_of(values, values, sample_weight)

    zeros = ops.zeros(ops.shape(hidden)[:2], "float32")
    mean, pullback = backend.current().vjp(reduced, zeros)
    return pullback(ops.ones_like(mean))[0]


class _Values(keras.losses.Loss):
    """Return the mean of values. It is linear: its gradient is the weights."""

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


# For wrappers around the model. Its own layers cast their inputs, and a global
# mixed-precision policy must not cast them earlier.
_TRANSPARENT = {"dtype": "float32", "autocast": False}


class FrozenTwin(keras.Model):
    """The former model: its own graph, run on a frozen copy of the weights.

    Rebuilding a model from its config can change it (some backbones drop
    tied embeddings from theirs), so the graph is shared.

    Args:
        model: A built `keras.Model`.
        dtype: Dtype of the floats in the copy, or `None` for the model's own.
    """

    def __init__(self, model, dtype=None):
        super().__init__(name="teacher", **_TRANSPARENT)
        # In a closure, or Keras would track, save and freeze the original.
        self._get_model = lambda: model
        self._copies = {id(v): self._copy(v, dtype) for v in model.variables}
        # Such as scales of one, which cost a pass over each kernel.
        items = reparameterizations(model)
        self._left_out = [item for item in items if item.is_identity()]
        self.built = True

    def call(self, inputs, training=False):
        return self.run(self._get_model(), inputs)

    def run(self, part, inputs):
        """Run the model, or another one of its layers, on the copy."""
        # Trainability, and the existence of scales, can change after the copy.
        values = map(
            self.values_of,
            (part.trainable_variables, part.non_trainable_variables),
        )
        # Unlike a call of the model, this passes on arguments that `call`
        # refuses.
        takes = keras_compat.takes_training(part)
        options = {"training": False} if takes else {}
        with left_out(self._left_out):
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
        # A true copy: JAX would share the buffer, then donate it in training.
        copy.assign(ops.copy(ops.cast(variable.value, dtype)))
        return copy
