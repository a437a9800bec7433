"""Distillation of logits, with sample weights and masks, by a frozen twin."""

import math
import warnings
from typing import Any

import keras
from keras import ops

from keras_weightmods.core import keras_private
from keras_weightmods.saving.container import numpy_dtype
from keras_weightmods.utils import checks

# Of a copy; another model has its own.
_TEACHER_DTYPES = (None, "float32", "bfloat16", "float16")

# For the wrappers around the model: its own layers cast what they are given,
# and a global mixed-precision policy must not cast it before.
_TRANSPARENT = {"dtype": "float32", "autocast": False}


class LogitsDistiller(keras.distillation.Distiller):
    """Train a student on labels and on the logits of a teacher.

    `loss = weight * KL(teacher || student) + (1 - weight) * label loss`

    Keras' own `Distiller` leaves out sample weights, masks and the losses of
    the student's layers, and has no frozen twin as a teacher.

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
        is_other = isinstance(teacher, keras.Model) and teacher is not model
        if not (is_self or is_other or teacher is None):
            expected = '"self" for a frozen copy, another `keras.Model` or None'
            raise checks.error("teacher", expected, teacher)
        dtypes = _TEACHER_DTYPES if is_self else (None,)
        checks.check_choice("teacher_dtype", teacher_dtype, dtypes)
        checks.check_float("distillation_weight", weight, 0, 1)
        checks.check_float("temperature", temperature, above=0)
        if teacher is None:
            # A Distiller needs a teacher; without one this is a plain Model.
            keras.Model.__init__(self, name=name, **_TRANSPARENT)
            self.student = model
            self.teacher = None
            self.student_loss_weight = 1.0
        else:
            if is_self:
                teacher = FrozenTwin(model, teacher_dtype)
            super().__init__(
                teacher=teacher,
                student=model,
                distillation_losses=[LogitsDistillation(temperature)],
                student_loss_weight=1 - weight,
                name=name,
                **_TRANSPARENT,
            )
            _warn_about_outputs(model)
        self.built = True

    @property
    def output_names(self) -> Any:
        """The names of the model's outputs, by which Keras takes losses."""
        return self.student.output_names

    @property
    def teacher_bytes(self) -> int:
        """The memory of the teacher's weights, in bytes."""
        variables = self.teacher.variables if self.teacher else []
        return sum(
            math.prod(v.shape) * numpy_dtype(v.dtype).itemsize
            for v in variables
        )

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        """Return the weighted sum of the label and the distillation loss."""
        if y_pred is None:
            y_pred = self(x, training=training)
        label_loss = keras.Model.compute_loss(
            self, x, y, y_pred, sample_weight, training
        )
        if self.teacher is None:
            return label_loss
        self.student_loss_tracker.update_state(label_loss)
        taught = _in_order_of(
            getattr(self, "output_names", None),
            self.teacher(x, training=False),
            getattr(self.teacher, "output_names", None),
        )
        taught = list(map(ops.stop_gradient, taught))
        (loss,) = self.distillation_losses
        distillation_loss = loss.compute_loss(taught, y_pred, sample_weight)
        self.distillation_loss_tracker.update_state(distillation_loss)
        weight = self.student_loss_weight
        total = weight * label_loss + (1 - weight) * distillation_loss
        self.total_loss_tracker.update_state(total)
        return total

    def reset_metrics(self) -> None:
        """Reset all metrics; without a teacher there are fewer."""
        keras.Model.reset_metrics(self)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients (called by the trainer of torch)."""
        # torch knows Keras' variables by their paths, which are not unique:
        # of two of the same path it clears one, and the other's gradients
        # would add up over the steps.
        for variable in self.trainable_variables:
            variable.value.grad = None


class FrozenTwin(keras.Model):
    """The model as it was: its own graph, run on a frozen copy of weights.

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
        self.built = True

    def call(self, inputs, training=False):
        model = self._get_model()
        # By variable: which are trainable, and whether there still are
        # scales, can change after the copy was taken.
        values = [
            [ops.convert_to_tensor(self._copies[id(v)]) for v in variables]
            for variables in (
                model.trainable_variables,
                model.non_trainable_variables,
            )
        ]
        outputs, _ = model.stateless_call(*values, inputs, training=False)
        return outputs

    def _copy(self, variable, dtype):
        own_dtype = keras.backend.standardize_dtype(variable.dtype)
        if dtype is None or "float" not in own_dtype:
            dtype = own_dtype
        copy = self.add_weight(
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


class LogitsDistillation(keras.distillation.LogitsDistillation):
    """KL(teacher || student) of logits, with sample weights and masks.

    Keras' own takes the mean over all positions, padding included, and goes
    through probabilities clipped at 1e-7, which a large vocabulary feels.

    Args:
        temperature: Float > 0.
    """

    def compute_loss(
        self, teacher_outputs, student_outputs, sample_weight=None
    ):
        """Return the sum over the outputs."""
        taught = keras.tree.flatten(teacher_outputs)
        learned = keras.tree.flatten(student_outputs)
        weights = keras.tree.flatten(sample_weight)
        if len(weights) == 1:
            weights = weights * len(learned)
        return sum(map(LogitsKL(self.temperature), taught, learned, weights))


class LogitsKL(keras.losses.Loss):
    """The Kullback-Leibler divergence of two arrays of logits.

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
    """Warn where the last layer shows that outputs are no logits."""
    for output in keras.tree.flatten(getattr(model, "outputs", None) or []):
        operation, _ = keras_private.producer(output)
        activation = getattr(operation, "activation", operation)
        name = getattr(activation, "__name__", type(activation).__name__)
        if name.lower() in ("softmax", "sigmoid"):
            found = f"ends in {name.lower()}"
        elif output.shape[-1] == 1:
            found = "has one entry on its last axis"
        else:
            continue
        warnings.warn(
            "The outputs of model and teacher are taken as logits of classes, "
            "over the last axis, in the distillation. Received: the output "
            f"{operation.name!r}, which {found}. Let the model give logits "
            "(and use a loss with `from_logits=True`), or train without "
            "distillation: `teacher=None`.",
            stacklevel=4,
        )


def _in_order_of(names, outputs, own_names):
    """Return the leaves of `outputs`, by name where the names are the same."""
    leaves = keras.tree.flatten(outputs)
    if own_names and sorted(own_names) == sorted(names or ()):
        by_name = dict(zip(own_names, leaves))
        if len(by_name) == len(leaves):
            return [by_name[name] for name in names]
    return leaves
