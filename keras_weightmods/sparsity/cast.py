"""CAST: train a model into exact N:M sparsity."""

import inspect
import itertools
import math
import re
import sys
import warnings
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_weightmods.core import keras_private, seam
from keras_weightmods.core.targets import Skipped, Targets, resolve_targets
from keras_weightmods.ops.nm import contraction_size, parse_pattern
from keras_weightmods.sparsity.adam_s import AdamS
from keras_weightmods.sparsity.calibration import input_norms
from keras_weightmods.sparsity.data import (
    batches,
    holds_strings,
    preprocessed,
)
from keras_weightmods.sparsity.scaling import Scaling, attach_scaling
from keras_weightmods.sparsity.sparsify import (
    METHODS,
    OneShot,
    SparsifyReport,
)

# The recipes that `compile(optimizer=None)` uses: the first chosen by
# benchmarks/cast_quality.py, the second with the rate of Adam that is best
# under a fixed mask, over four, and not searched for.
_FROM_DENSE = {
    "learning_rate": 1.5e-4,
    "decay": "relative",
    "ramp": 0.4,
    "criterion": "activation",
}
_FROM_SPARSE = {
    "learning_rate": 2.5e-4,
    "decay": "relative",
    "ramp": 0.0,
    "criterion": "magnitude",
}
_DEFAULT_WARMUP = 0.1

# The importance of inputs is measured on so many batches.
_MEASURED_BATCHES = 8

_TEACHER_DTYPES = ("float32", "bfloat16", "float16")

# For the wrappers around the model: its own layers cast what they are given,
# and a global mixed-precision policy must not cast it before.
_TRANSPARENT = {"dtype": "float32", "autocast": False}


class CAST(keras.distillation.Distiller):
    """Trains a model into exact N:M sparsity with hardly any loss.

    Continuous Adaptive Sparse Trainer (arXiv 2509.25996): the `AdamS`
    optimizer pulls the weights outside a changing mask to zero, learnable
    scales restore the magnitude that takes away (equations 11-12), and the
    dense start teaches the model while it gets sparse (equation 13):

    `loss = eta * KL(teacher || student) + (1 - eta) * cross-entropy`

    Usage is `compile`, `fit`, `finalize`. The model itself is trained, in
    place; `finalize` returns it as a plain model.

    An interrupted run is resumed in a `CAST` made and compiled in the same
    way, by `load_weights` of what `save_weights` wrote and `fit` with the
    same `epochs`:

    - saved at the end of an epoch: `fit(..., initial_epoch=...)`, which
      `keras.callbacks.BackupAndRestore` does by itself. With its
      `save_freq=<batches>` Keras begins the epoch again on the weights from
      the middle of it, which trains on some batches twice;
    - saved after any step: `fit` on the batches that remain of that epoch,
      then `fit(..., initial_epoch=...)` on whole ones.

    The file holds the model with its scales, the teacher, the optimizer with
    its masks, the length of the run and the state of dropout. Given the same
    batches (`shuffle=False`, or a dataset with its own seed) the weights are
    bit for bit those of a run that was not interrupted.

    Args:
        model: A built `keras.Model`, for example a KerasHub `CausalLM`. It
            is trained in place.
        pattern: String `"n:m"` or pair of ints: n weights kept of every m.
            Defaults to `"2:4"`.
        teacher: `"self"` for a frozen copy of `model` as it is now, another
            `keras.Model` with the same inputs and outputs, or `None` to train
            without distillation. Outputs are taken as logits.
            Defaults to `"self"`.
        distillation_weight: Float in [0, 1], eta. Defaults to `1/3`.
        temperature: Float > 0, of the distillation. Defaults to `1.0`.
        scaling_groups: Int, learnable scales for each output unit; `0` for
            none. Defaults to `2`.
        targets: A list from `find_targets(model)`, or `None` for all of them.
            Defaults to `None`.
        init: `"dense"` to begin with the model as it is; or `"magnitude"`,
            `"wanda"` or `"sparsegpt"`, a method of `sparsify` that makes the
            model sparse in one shot when `fit` begins, on the first rows of
            its data. The default optimizer then trains under the mask of
            that start; the teacher is the dense model still. On SmolLM2 with
            30,720 tokens that is as good on text of the kind trained on, and
            worse on other text. Defaults to `"dense"`.
        init_rows: Int, the rows (texts, images) that the one-shot start is
            made on, rounded up to whole batches. Defaults to `128`, as many
            as SparseGPT's authors take.
        teacher_dtype: Dtype in which the copy of `teacher="self"` is kept,
            for example `"bfloat16"` for half the memory. `None` keeps the
            model's own. Defaults to `None`.
        name: Defaults to `"cast"`.

    Attributes:
        targets: The kernels that get sparse.
        skipped: Paths of what stays dense, with reasons.
        teacher_bytes: Int, the memory of the teacher's weights.
        init_report: The `SparsifyReport` of the one-shot start, once `fit`
            has made it; `None` before.

    Raises:
        ValueError: For an argument outside the ranges above, an unbuilt
            model, or a model without any kernel that fits `pattern`. The
            model is unchanged then.

    Example:

    ```python
    import keras
    import numpy as np
    import keras_weightmods as kwm

    model = keras.Sequential(
        [
            keras.Input((16,)),
            keras.layers.Dense(32, activation="relu"),
            keras.layers.Dense(4),
        ]
    )
    x = np.random.normal(size=(64, 16))
    y = np.random.randint(4, size=(64,))

    cast = kwm.CAST(model, pattern="2:4")
    cast.compile(
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    cast.fit(x, y, batch_size=16, epochs=3, verbose=0)
    sparse = cast.finalize()
    kwm.assert_sparse(sparse, "2:4")
    ```
    """

    optimizer: Any
    train_function: Any
    test_function: Any
    predict_function: Any

    def __init__(
        self,
        model,
        pattern="2:4",
        teacher="self",
        distillation_weight=1 / 3,
        temperature=1.0,
        scaling_groups=2,
        targets=None,
        init="dense",
        init_rows=128,
        teacher_dtype=None,
        name="cast",
    ):
        n, m = parse_pattern(pattern)
        if init not in ("dense", *METHODS):
            raise ValueError(
                f"`init` must be one of {('dense', *METHODS)}. "
                f"Received: init={init!r}"
            )
        if type(init_rows) is not int or init_rows < 1:
            raise ValueError(
                "`init_rows` must be an int of at least 1. "
                f"Received: init_rows={init_rows!r}"
            )
        if not isinstance(model, keras.Model) or not model.built:
            raise ValueError(
                "`model` must be a built `keras.Model`. Build it by calling "
                f"it on data first. Received: model={model!r}"
            )
        if not (
            teacher is None
            or isinstance(teacher, keras.Model)
            or (isinstance(teacher, str) and teacher == "self")
        ):
            raise ValueError(
                '`teacher` must be "self", a `keras.Model` or None. '
                f"Received: teacher={teacher!r}"
            )
        if teacher is model:
            raise ValueError(
                "`teacher` must not be the model that is trained; its weights "
                'would change with it. Use teacher="self" for a frozen copy.'
            )
        if teacher != "self" and teacher_dtype is not None:
            raise ValueError(
                '`teacher_dtype` applies to teacher="self" only. Received: '
                f"teacher_dtype={teacher_dtype!r}, teacher={teacher!r}"
            )
        if teacher_dtype not in (None, *_TEACHER_DTYPES):
            raise ValueError(
                f"`teacher_dtype` must be one of {_TEACHER_DTYPES} or None. "
                f"Received: teacher_dtype={teacher_dtype!r}"
            )
        if not (
            isinstance(distillation_weight, (int, float))
            and 0 <= distillation_weight <= 1
        ):
            raise ValueError(
                "`distillation_weight` must be in [0, 1]. Received: "
                f"distillation_weight={distillation_weight!r}"
            )
        if not (isinstance(temperature, (int, float)) and temperature > 0):
            raise ValueError(
                "`temperature` must be positive. "
                f"Received: temperature={temperature!r}"
            )
        if type(scaling_groups) is not int or scaling_groups < 0:
            raise ValueError(
                "`scaling_groups` must be an int of at least 0. "
                f"Received: scaling_groups={scaling_groups!r}"
            )
        found = resolve_targets(model, targets)
        usable, left_dense = [], []
        for target in found:
            if target.contraction_size % m:
                reason = f"contraction size is no multiple of {m}"
            elif not target.variable.trainable:
                reason = "frozen"
            else:
                usable.append(target)
                continue
            left_dense.append(Skipped(target.path, reason))
        if not usable:
            raise ValueError(
                f"`CAST` found no kernel that fits pattern {n}:{m}. "
                f"Received: targets {[(t.path, t.shape) for t in found]}, "
                f"skipped {(*found.skipped, *left_dense)}"
            )

        if scaling_groups:
            attach_scaling(
                model, targets=usable, groups=scaling_groups, pattern=(n, m)
            )
        twin = _FrozenTwin(model, teacher_dtype) if teacher == "self" else None
        if teacher is None:
            # A Distiller needs a teacher; without one this is a plain Model.
            keras.Model.__init__(self, name=name, **_TRANSPARENT)
            self.student = model
            self.teacher = None
            self.student_loss_weight = 1.0
        else:
            try:
                super().__init__(
                    teacher=twin or teacher,
                    student=model,
                    distillation_losses=[_LogitsDistillation(temperature)],
                    student_loss_weight=1 - distillation_weight,
                    name=name,
                    **_TRANSPARENT,
                )
            except ValueError:
                # A teacher that does not fit. It is frozen only once it does,
                # so the scales, all ones, have to come first.
                if scaling_groups:
                    seam.fold(model, Scaling)
                raise
            _warn_about_outputs(model)
        self.n, self.m = n, m
        self.init = init
        self.init_rows = init_rows
        self.init_report = None
        self._is_started = init == "dense"
        self.scaling_groups = scaling_groups
        self.targets = Targets(usable, (*found.skipped, *left_dense))
        if twin is not None:
            twin.capture()
        self.built = True
        self._optimizer_is_default = False
        self._planned_batches = None
        self._finalized = False
        self._random_stream = None
        if keras.backend.backend() == "torch":
            from keras_weightmods.backend.torch.random_stream import (
                RandomStream,
            )

            self._random_stream = RandomStream()

    @property
    def pattern(self):
        """The pattern as a string, `"n:m"`."""
        return f"{self.n}:{self.m}"

    @property
    def output_names(self):
        """The names of the model's outputs, by which Keras takes losses."""
        return self.student.output_names

    @property
    def skipped(self):
        """What stays dense, with reasons."""
        return self.targets.skipped

    @property
    def teacher_bytes(self):
        """The memory of the teacher's weights, in bytes."""
        if self.teacher is None:
            return 0
        return sum(
            math.prod(v.shape) * _item_bytes(v.dtype)
            for v in self.teacher.variables
        )

    @staticmethod
    def default_recipe(init="dense"):
        """The arguments of the `AdamS` of `compile(optimizer=None)`."""
        return dict(_FROM_DENSE if init == "dense" else _FROM_SPARSE)

    @property
    def adam_s(self):
        """The `AdamS` in `optimizer`, also inside a loss-scaling wrapper."""
        optimizer = getattr(self, "optimizer", None)
        return getattr(optimizer, "inner_optimizer", optimizer)

    def compile(self, optimizer=None, loss=None, metrics=None, **kwargs):
        """Configures the training.

        Args:
            optimizer: An `AdamS`, or `None` for one with this library's
                recipe for short runs: from a dense start, the pull scaled to
                arrive at 40 % of the run and the mask ranked by
                activation-weighted magnitude, measured on the first batches;
                from a one-shot start, its mask fixed. Both with a warm-up and
                linear decay of the learning rate. Its `targets` and
                `total_steps` are filled in where they are not given. Defaults
                to `None`.
            loss: The loss on the labels. `None` takes the cross-entropy from
                logits for a KerasHub language model, and is an error for any
                other. Sample weights and masks apply to it and to the
                distillation alike.
            metrics, **kwargs: As in `keras.Model.compile`.

        Raises:
            ValueError: If `optimizer` is no `AdamS` or has another pattern,
                or `loss` is missing.
        """
        is_default = optimizer is None
        if is_default:
            optimizer = AdamS(
                pattern=self.pattern, **self.default_recipe(self.init)
            )
        inner = getattr(optimizer, "inner_optimizer", optimizer)
        if not isinstance(inner, AdamS):
            raise ValueError(
                "`CAST` trains with `AdamS`, which moves the weights into the "
                "pattern. Pass `optimizer=AdamS(...)` or leave it out. "
                f"Received: optimizer={optimizer!r}"
            )
        if inner.pattern != self.pattern:
            raise ValueError(
                "The patterns of `CAST` and of its `AdamS` must be the same. "
                f"Received: {self.pattern} and {inner.pattern}"
            )
        if loss is None:
            if not hasattr(self.student, "backbone"):
                raise ValueError(
                    "`loss` is missing. Pass the loss on the labels, as in "
                    "`keras.Model.compile`. Received: loss=None"
                )
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        inner.use_targets(self.targets)
        if (
            kwargs.get("auto_scale_loss", True)
            and inner is optimizer
            and any(
                layer.compute_dtype == "float16"
                for layer in keras_private.layers_of(self.student)
            )
        ):
            # Keras goes by the policy of the outermost model, this wrapper.
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
        # Past Distiller.compile and its compute_loss, which leave out sample
        # weights, masks and the layers' own losses.
        keras.Model.compile(
            self, optimizer=optimizer, loss=loss, metrics=metrics, **kwargs
        )
        self._optimizer_is_default = is_default
        self._planned_batches = None

    def compute_loss(
        self,
        x=None,
        y=None,
        y_pred=None,
        sample_weight=None,
        training=True,
    ):
        """The weighted sum of the label loss and the distillation loss."""
        if y_pred is None:
            y_pred = self(x, training=training)
        label_loss = keras.Model.compute_loss(
            self,
            x=x,
            y=y,
            y_pred=y_pred,
            sample_weight=sample_weight,
            training=training,
        )
        if self.teacher is None:
            return label_loss
        self.student_loss_tracker.update_state(label_loss)
        taught = [
            ops.stop_gradient(output)
            for output in _in_order_of(
                getattr(self, "output_names", None),
                self.teacher(x, training=False),
                getattr(self.teacher, "output_names", None),
            )
        ]
        distillation_loss = sum(
            weight * loss.compute_loss(taught, y_pred, sample_weight)
            for loss, weight in zip(
                self.distillation_losses, self.distillation_loss_weights
            )
        )
        self.distillation_loss_tracker.update_state(distillation_loss)
        total = (
            self.student_loss_weight * label_loss
            + (1 - self.student_loss_weight) * distillation_loss
        )
        self.total_loss_tracker.update_state(total)
        return total

    def reset_metrics(self):
        """Resets all metrics; without a teacher there are fewer."""
        keras.Model.reset_metrics(self)

    def make_train_function(self, force=False):
        """Prepares the train step; on torch, with random numbers of its own."""
        if self.train_function is not None and not force:
            return
        super().make_train_function(force)
        stream = self._random_stream
        if stream is not None:
            step = self.train_function

            def train_function(data):
                with stream.active():
                    return step(data)

            self.train_function = train_function

    def zero_grad(self, set_to_none=True):
        """Clears the gradients (called by the trainer of torch)."""
        # torch knows Keras' variables by their paths, which are not unique:
        # of two of the same path it clears one, and the other's gradients
        # would add up over the steps.
        for variable in self.trainable_variables:
            variable.value.grad = None

    def fit(
        self,
        x=None,
        y=None,
        batch_size=None,
        epochs=1,
        verbose="auto",
        callbacks=None,
        validation_split=0.0,
        validation_data=None,
        sample_weight=None,
        steps_per_epoch=None,
        **kwargs,
    ):
        """Trains the model into the pattern.

        Takes what `keras.Model.fit` takes, and raw strings where the model is
        a KerasHub task with a preprocessor. Fills in `total_steps` of the
        optimizer, where it was not given, from the steps of an epoch times
        `epochs`. The plan stands from the first step on; a later `fit` that
        goes beyond it is warned about.

        Raises:
            ValueError: If `total_steps` was not given and the data do not say
                how many batches they have; if a target is not among what the
                optimizer sparsifies; after `finalize`.
        """
        self._check_not_finalized("fit")
        if not self.compiled:
            raise ValueError("Call `compile()` before `fit()`.")
        x, y, sample_weight = self._preprocessed(x, y, sample_weight)
        if validation_data is not None:
            validation_data = self._preprocessed_validation(validation_data)
        taken = int(ops.convert_to_numpy(self.adam_s.iterations))
        if self.adam_s.total_steps is None or (
            self._planned_batches is not None and not taken
        ):
            steps = steps_per_epoch or _batch_count(
                x, batch_size, validation_split
            )
            self._plan(epochs * steps)
        elif taken:
            self._warn_about_the_end(
                taken,
                lambda: (
                    (epochs - kwargs.get("initial_epoch", 0))
                    * (
                        steps_per_epoch
                        or _batch_count(x, batch_size, validation_split)
                    )
                ),
                callbacks,
            )
        self.optimizer.build(self.trainable_variables)
        self._check_all_sparsified()
        if not taken:
            read: list = []
            source = _noting(x, read) if inspect.isgenerator(x) else x
            self._start(source, batch_size, sample_weight, verbose)
            if read:
                x = (batch for batch in itertools.chain(read, x))
        return super().fit(
            x=x,
            y=y,
            batch_size=batch_size,
            epochs=epochs,
            verbose=verbose,
            callbacks=callbacks,
            validation_split=validation_split,
            validation_data=validation_data,
            sample_weight=sample_weight,
            steps_per_epoch=steps_per_epoch,
            **kwargs,
        )

    def evaluate(
        self,
        x=None,
        y=None,
        batch_size=None,
        verbose="auto",
        sample_weight=None,
        **kwargs,
    ):
        """As `keras.Model.evaluate`; takes raw strings as `fit` does."""
        x, y, sample_weight = self._preprocessed(x, y, sample_weight)
        optimizer = self.optimizer
        if self.compiled and self.adam_s.total_steps is None:
            # Keras builds it here, before `fit` has told the length of the run.
            self.optimizer = None
        try:
            return super().evaluate(
                x=x,
                y=y,
                batch_size=batch_size,
                verbose=verbose,
                sample_weight=sample_weight,
                **kwargs,
            )
        finally:
            self.optimizer = optimizer

    def finalize(self):
        """Prunes by the last mask, folds the scales, and returns the model.

        Returns:
            The model given to `CAST`, now exactly N:M in its targets and
            without anything of this package in it.

        Raises:
            ValueError: If the model was not trained, a target was frozen when
                it was, or it is finalized already. The model is unchanged
                then.
        """
        self._check_not_finalized("finalize")
        if not self.compiled or not self.adam_s.built:
            raise ValueError(
                "`CAST.finalize()` prunes by the last mask of the training. "
                "Received: a model that was not trained. Call `compile()` "
                "and `fit()` first."
            )
        self._check_all_sparsified()
        self.adam_s.prune()
        if self.scaling_groups:
            seam.fold(self.student, Scaling)
        self._finalized = True
        # As TensorFlow traced them, they hold the scales of that time.
        self.train_function = None
        self.test_function = None
        self.predict_function = None
        return self.student

    def get_config(self):
        raise NotImplementedError(
            "A `CAST` holds a model in the middle of its training. Keep "
            "checkpoints with `save_weights` or `keras.callbacks.BackupAnd"
            "Restore`; save the model itself after `finalize()`."
        )

    def save_own_variables(self, store):
        if self.init != "dense":
            store["is_started"] = np.asarray(self._is_started)
        if self._planned_batches is not None:
            store["planned_batches"] = np.asarray(self._planned_batches)
        for i, variable in enumerate(self._seed_states()):
            store[f"seed_state_{i}"] = variable
        if self._random_stream is not None:
            for device, state in self._random_stream.states.items():
                store[f"random_state_{device}"] = state

    def load_own_variables(self, store):
        # Comes before the optimizer's own state, which loads only into one
        # that is built, and that takes the length of the run.
        keys = list(store.keys())
        if "is_started" in keys:
            self._is_started = bool(np.asarray(store["is_started"]))
        states = {
            device: np.asarray(store[f"random_state_{device}"])
            for device in ("cpu", "cuda")
            if f"random_state_{device}" in keys
        }
        if self._random_stream is not None and states:
            self._random_stream.states = states
        for i, variable in enumerate(self._seed_states()):
            if f"seed_state_{i}" in keys:
                variable.assign(store[f"seed_state_{i}"])
        if not self.compiled:
            return
        if self.adam_s.total_steps is None and "planned_batches" in keys:
            self._plan(int(np.asarray(store["planned_batches"])))
        if self.adam_s.total_steps is not None:
            self.optimizer.build(self.trainable_variables)

    def _seed_states(self):
        """The states of dropout, which Keras leaves out of checkpoints."""
        return [
            variable
            for variable in self.student.non_trainable_variables
            if variable.name == "seed_generator_state"
        ]

    def _plan(self, batches):
        """Sets the length of the run, and the default's schedule by it."""
        optimizer = self.adam_s
        accumulated = optimizer.gradient_accumulation_steps or 1
        optimizer.total_steps = max(1, batches // accumulated)
        if self._optimizer_is_default:
            warmup = max(1, round(_DEFAULT_WARMUP * batches))
            optimizer.learning_rate = WarmupLinearDecay(
                self.default_recipe(self.init)["learning_rate"], warmup, batches
            )
        self._planned_batches = batches
        # Compiled, it holds the length of an earlier plan.
        self.train_function = None

    def _warn_about_the_end(self, taken, count_batches, callbacks):
        """Warns where a fit goes beyond the planned run."""
        planned = self.adam_s.total_steps
        if taken >= planned:
            message = (
                f"the run of {planned} steps that was planned at its start "
                f"is over ({taken} are taken): the pull is done"
            )
            if self._optimizer_is_default:
                message += " and the learning rate is 0, nothing will change"
        else:
            given = keras.tree.flatten(callbacks)
            if any(
                isinstance(c, keras.callbacks.BackupAndRestore) for c in given
            ):
                # Which epoch it begins with is not known yet.
                return
            try:
                batches = count_batches()
            except ValueError:
                return
            accumulated = self.adam_s.gradient_accumulation_steps or 1
            wanted = taken + batches // accumulated
            if wanted <= planned:
                return
            message = (
                f"this fit goes to step {wanted}, beyond the {planned} that "
                "were planned at the start of the run"
            )
            if self._optimizer_is_default:
                message += ", from where on the learning rate is 0"
        warnings.warn(
            f"CAST: {message}. To resume an interrupted run, pass the "
            "`initial_epoch` to begin with. To train in several calls of "
            "`fit`, pass the sum of their steps as "
            "`AdamS(total_steps=...)`. For another run, `finalize()` and make "
            "a new `CAST`.",
            stacklevel=3,
        )

    def _start(self, x, batch_size, sample_weight, verbose):
        """What is done on the first batches, before the first step."""
        is_ranked_by_inputs = self.adam_s.criterion == "activation"
        if self._is_started and not is_ranked_by_inputs:
            return
        rows = 0 if self._is_started else self.init_rows
        first, enough = _first_batches(x, rows, batch_size, sample_weight)
        if not self._is_started:
            progress = keras.utils.Progbar(
                len(self.targets),
                unit_name="kernel",
                verbose=1 if verbose in ("auto", 1) else 0,
                stateful_metrics=["output error"],
            )
            start = OneShot(self.n, self.m, self.init)
            kernels = start(
                self.student, self.targets, first[:enough], progress
            )
            self.init_report = SparsifyReport(
                self.pattern, self.init, tuple(kernels), self.skipped
            )
            self._is_started = True
        if is_ranked_by_inputs:
            self._measure_importance(first[:_MEASURED_BATCHES])

    def _measure_importance(self, batches):
        norms = input_norms(self.student, self.targets, batches, weighted=True)
        by_id = {id(t.variable): v for t, v in zip(self.targets, norms)}
        unknown = [t.path for t, v in zip(self.targets, norms) if v is None]
        if unknown:
            warnings.warn(
                "CAST ranks the weights of these kernels by magnitude alone, "
                f"since their layers' inputs could not be read: {unknown[:5]}",
                stacklevel=3,
            )
        importance = []
        for variable, spec, _ in self.adam_s.sparsified_state:
            norm = by_id.get(id(variable))
            size = contraction_size(spec.shape, spec.axes)
            importance.append(np.ones(size) if norm is None else norm)
        self.adam_s.set_importance(importance)

    def _preprocessed(self, x, y=None, sample_weight=None):
        return preprocessed(self.student, x, y, sample_weight)

    def _preprocessed_validation(self, data):
        if hasattr(data, "map"):
            return self._preprocessed(data)[0]
        if not isinstance(data, tuple):
            # Not a list of strings, taken by Keras as (x, y, ...).
            return self._preprocessed(data) if holds_strings(data) else data
        data = keras.utils.unpack_x_y_sample_weight(data)
        return keras.utils.pack_x_y_sample_weight(*self._preprocessed(*data))

    def _check_all_sparsified(self):
        sparsified = {id(variable) for variable in self.adam_s.sparsified}
        left_out = [
            t.path for t in self.targets if id(t.variable) not in sparsified
        ]
        if left_out:
            raise ValueError(
                "Each target of `CAST` must be trained by its `AdamS`. "
                f"Received: {len(left_out)} that are not, frozen since or "
                "missing in the `targets` of the optimizer: "
                f"{left_out[:5]}. Set `trainable = True` on their layers and "
                "call `compile()` and `fit()` again, or make the `CAST` with "
                "`targets=` that leave them out."
            )

    def _check_not_finalized(self, what):
        if self._finalized:
            raise ValueError(
                f"`CAST.{what}()` was called after `finalize()`. The model is "
                "a plain one now; make a new `CAST` to train it on."
            )


@keras.saving.register_keras_serializable(package="keras_weightmods")
class WarmupLinearDecay(keras.optimizers.schedules.LearningRateSchedule):
    """Rises linearly to the rate, then falls linearly to zero.

    Keras' own decays with a warm-up follow a cosine; AdamS leaves masked
    weights at about the last rate, so it has to reach zero.

    Args:
        learning_rate: Float, the peak.
        warmup_steps: Int, steps to the peak.
        total_steps: Int, steps to zero.

    Example:

    ```python
    import numpy as np
    from keras_weightmods.sparsity.cast import WarmupLinearDecay

    schedule = WarmupLinearDecay(1.0, warmup_steps=10, total_steps=30)
    rates = [float(schedule(t)) for t in (0, 9, 20, 30)]
    assert np.allclose(rates, [0.1, 1.0, 0.5, 0.0])
    ```
    """

    def __init__(self, learning_rate, warmup_steps, total_steps):
        super().__init__()
        self.learning_rate = learning_rate
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps

    def __call__(self, step):
        step = ops.cast(step, "float32")
        rise = (step + 1) / max(1, self.warmup_steps)
        fall = (self.total_steps - step) / max(
            1, self.total_steps - self.warmup_steps
        )
        share = ops.maximum(ops.minimum(ops.minimum(rise, fall), 1.0), 0.0)
        return self.learning_rate * share

    def get_config(self):
        return {
            "learning_rate": self.learning_rate,
            "warmup_steps": self.warmup_steps,
            "total_steps": self.total_steps,
        }


class _FrozenTwin(keras.Model):
    """The model as it was: its own graph, run on a frozen copy of weights.

    Rebuilding a model from its config can change it (some backbones drop
    tied embeddings from theirs), so the graph is shared.
    """

    def __init__(self, model, dtype):
        super().__init__(name="teacher", **_TRANSPARENT)
        # In a closure, or Keras would track, save and freeze the original.
        self._get_model = lambda: model
        self._storage_dtype = dtype

    def capture(self):
        model = self._get_model()
        self._copies = [self._copy(v) for v in model.variables]
        self._place = {id(v): i for i, v in enumerate(model.variables)}
        self.built = True

    def call(self, inputs, training=False):
        model = self._get_model()
        # By variable: which are trainable, and whether there still are
        # scales, can change after the copy was taken.
        values = [
            [
                ops.convert_to_tensor(self._copies[self._place[id(v)]])
                for v in vs
            ]
            for vs in (
                model.trainable_variables,
                model.non_trainable_variables,
            )
        ]
        outputs, _ = model.stateless_call(*values, inputs, training=False)
        return outputs

    def _copy(self, variable):
        dtype = keras.backend.standardize_dtype(variable.dtype)
        if self._storage_dtype and "float" in dtype:
            dtype = self._storage_dtype
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


class _LogitsDistillation(keras.distillation.LogitsDistillation):
    """KL(teacher || student) of logits, with sample weights and masks.

    Keras' own takes the mean over all positions, padding included, and goes
    through probabilities clipped at 1e-7, which a large vocabulary feels.
    """

    def __init__(self, temperature=1.0):
        super().__init__(temperature=temperature)
        self._kl = _LogitsKL(temperature)

    def compute_loss(
        self, teacher_outputs, student_outputs, sample_weight=None
    ):
        taught = keras.tree.flatten(teacher_outputs)
        learned = keras.tree.flatten(student_outputs)
        weights = keras.tree.flatten(sample_weight)
        if len(weights) == 1:
            weights = weights * len(learned)
        return sum(map(self._kl, taught, learned, weights))


class _LogitsKL(keras.losses.Loss):
    def __init__(self, temperature):
        super().__init__(name="logits_kl")
        self.temperature = temperature

    def call(self, y_true, y_pred):
        teacher = ops.log_softmax(y_true / self.temperature, axis=-1)
        student = ops.log_softmax(y_pred / self.temperature, axis=-1)
        kl = ops.sum(ops.exp(teacher) * (teacher - student), axis=-1)
        return self.temperature**2 * kl


def _warn_about_outputs(model):
    """Warns where the last layer shows that outputs are no logits."""
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
            "CAST takes the outputs of model and teacher as logits of "
            "classes, over the last axis, in its distillation. Received: the "
            f"output {operation.name!r}, which {found}. Let the model give "
            "logits (and use a loss with `from_logits=True`), or train "
            "without distillation: `teacher=None`.",
            stacklevel=3,
        )


def _in_order_of(names, outputs, own_names):
    """The leaves of `outputs`; by name, where those of both are the same."""
    leaves = keras.tree.flatten(outputs)
    if own_names and sorted(own_names) == sorted(names or ()):
        by_name = dict(zip(own_names, leaves))
        if len(by_name) == len(leaves):
            return [by_name[name] for name in names]
    return leaves


def _item_bytes(dtype):
    # From the name: NumPy knows no bfloat16.
    bits = re.search(r"\d+", dtype)
    return int(bits.group()) // 8 if bits else 1


def _batch_count(x, batch_size, validation_split=0.0):
    """Batches in one pass over `x`."""
    leaves = keras.tree.flatten(x)
    if all(hasattr(leaf, "shape") for leaf in leaves):
        samples = math.floor(leaves[0].shape[0] * (1 - validation_split))
        return math.ceil(samples / (batch_size or 32))
    count = getattr(x, "num_batches", None)
    if count is None and hasattr(x, "cardinality"):
        count = int(x.cardinality())
    if count is None and hasattr(x, "__len__"):
        count = len(x)
    # Endless data says -1, or in grain the largest int.
    if count is None or not 0 < count < sys.maxsize:
        raise ValueError(
            "`fit` cannot tell how many batches there are, which the ramp of "
            "`AdamS` needs. Pass `steps_per_epoch`, or "
            "`AdamS(total_steps=...)`. "
            f"Received: x of type {type(x).__name__}"
        )
    return count


def _first_batches(x, rows, batch_size=None, sample_weight=None):
    """Pairs (inputs, sample weights) of the first batches of `x`.

    Returns:
        Pair of the list, as long as importance is measured on at least, and
        of how many of them it takes for `rows` rows.
    """
    first: list = []
    held = enough = 0
    for batch in batches(x, batch_size, sample_weight):
        first.append(batch)
        if held < rows:
            held += len(keras.tree.flatten(batch[0])[0])
            enough = len(first)
        if held >= rows and len(first) >= _MEASURED_BATCHES:
            break
    return first, enough


def _noting(items, read):
    """Yields `items`, and keeps them in `read`."""
    for item in items:
        read.append(item)
        yield item
