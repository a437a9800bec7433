"""Distillation of logits, with sample weights and masks, by a frozen twin."""

import contextlib
import warnings
from typing import Any

import keras
from keras import ops

from keras_weightmods.core import data, keras_compat
from keras_weightmods.sparsity.frozen_twin import TRANSPARENT, FrozenTwin
from keras_weightmods.sparsity.split_loss import SplitLoss
from keras_weightmods.utils import checks
from keras_weightmods.utils.dtypes import bytes_of

# Of a copy; another model has its own.
_TEACHER_DTYPES = (None, "float32", "bfloat16", "float16")


class LogitsDistiller(keras.distillation.Distiller):
    """Train a student on labels and on the logits of a teacher.

    `loss = weight * KL(teacher || student) + (1 - weight) * label loss`

    Keras' own `Distiller` leaves out sample weights, masks and the losses of
    the student's layers, and has no frozen twin as a teacher.

    Where the models end in a head that is known, and the loss is the plain
    cross-entropy from logits, the losses of a step are taken from the last
    hidden states, with the logits of a few positions at a time.

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
        if is_other and not teacher.built:
            # It would be built in training, by random weights.
            expected = "a built `keras.Model`. Call it on data, and load it"
            raise checks.error("teacher", expected, teacher)
        if not (is_self or is_other or teacher is None):
            expected = '"self" for a frozen copy, another `keras.Model` or None'
            raise checks.error("teacher", expected, teacher)
        dtypes = _TEACHER_DTYPES if is_self else (None,)
        checks.check_choice("teacher_dtype", teacher_dtype, dtypes)
        weight = checks.check_float("distillation_weight", weight, 0, 1)
        temperature = checks.check_float("temperature", temperature, above=0)
        if teacher is None:
            # A Distiller needs a teacher; without one this is a plain Model.
            keras.Model.__init__(self, name=name, **TRANSPARENT)
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
                **TRANSPARENT,
            )
            _warn_about_outputs(model)
        self._temperature = temperature
        self._split: Any = None
        self._is_split = False
        self.built = True

    @property
    def output_names(self) -> Any:
        """The names of the model's outputs, by which Keras takes losses."""
        return self.student.output_names

    @property
    def teacher_bytes(self) -> int:
        """The memory of the teacher's weights, in bytes."""
        variables = self.teacher.variables if self.teacher else []
        return bytes_of((v.shape, v.dtype) for v in variables)

    def compile(self, optimizer=None, loss=None, **kwargs):
        """Configure the training, as `keras.Model.compile` does."""
        # Past Distiller.compile and its compute_loss, which leave out sample
        # weights, masks and the layers' own losses.
        keras.Model.compile(self, optimizer=optimizer, loss=loss, **kwargs)
        self._split = SplitLoss.of(
            self.student, self.teacher, self._temperature, loss, kwargs
        )

    def train_step(self, *args, **kwargs):
        """Train on a batch, with the models split where they can be."""
        with self._splitting():
            return super().train_step(*args, **kwargs)

    def test_step(self, *args, **kwargs):
        """Evaluate on a batch, with the models split where they can be."""
        with self._splitting():
            return super().test_step(*args, **kwargs)

    def predict(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Predict as `keras.Model` does; takes raw strings as `fit` does."""
        x, *_ = data.preprocess(self.student, x)
        data.check(x)
        return super().predict(x, *args, **kwargs)

    @contextlib.contextmanager
    def _splitting(self):
        self._is_split = self._split is not None
        try:
            yield
        finally:
            self._is_split = False

    def call(self, inputs, training=None, **kwargs):
        """Return the logits; within a split step, what enters the head."""
        if self._is_split:
            return self._split.body(inputs, training=training)
        return super().call(inputs, training=training, **kwargs)

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        """Return the weighted sum of the label and the distillation loss."""
        weight = self.student_loss_weight
        if self._is_split:
            if self._split.takes(y, sample_weight):
                total, label_loss, distillation_loss = self._split(
                    x, y, y_pred, sample_weight, 1 - weight, training
                )
                own = sum(map(ops.sum, self.losses))
                label_loss, total = label_loss + own, total + weight * own
                return self._track_losses(label_loss, distillation_loss, total)
            y_pred = self._split.logits(y_pred, training)
        if y_pred is None:
            y_pred = self(x, training=training)
        if y is None and self.loss is not None:
            expected = "the labels that the loss compares with"
            raise checks.error("y", expected, y)
        # Copies, since Keras multiplies masks into them, on torch in place.
        label_loss = keras.Model.compute_loss(
            self, x, y, y_pred, _copied(sample_weight), training
        )
        if self.teacher is None:
            return label_loss
        taught = _in_order_of(
            getattr(self, "output_names", None),
            self.teacher(x, training=False),
            getattr(self.teacher, "output_names", None),
        )
        taught = list(map(ops.stop_gradient, taught))
        (loss,) = self.distillation_losses
        distillation_loss = loss.compute_loss(
            taught, y_pred, _copied(sample_weight)
        )
        total = weight * label_loss + (1 - weight) * distillation_loss
        return self._track_losses(label_loss, distillation_loss, total)

    def _track_losses(self, label_loss, distillation_loss, total):
        if self.teacher is not None:
            self.student_loss_tracker.update_state(label_loss)
            self.distillation_loss_tracker.update_state(distillation_loss)
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
        operation, _ = keras_compat.producer(output)
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


def _copied(weights):
    return keras.tree.map_structure(
        lambda each: None if each is None else ops.copy(each), weights
    )


def _in_order_of(names, outputs, own_names):
    """Return the leaves of `outputs`, by name where the names are the same."""
    leaves = keras.tree.flatten(outputs)
    if own_names and sorted(own_names) == sorted(names or ()):
        by_name = dict(zip(own_names, leaves))
        if len(by_name) == len(leaves):
            return [by_name[name] for name in names]
    return leaves
