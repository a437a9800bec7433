"""CAST: train a model into exact N:M sparsity."""

import contextlib
import math
import time
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_weightmods.calibration.schedule import WarmupLinearDecay
from keras_weightmods.core import data, keras_compat, seam, train_step
from keras_weightmods.core.free_memory import kept, warn_if_short
from keras_weightmods.core.reparameterization import reparameterizations
from keras_weightmods.core.restored import RestoredOnError
from keras_weightmods.core.targets import resolve_targets
from keras_weightmods.core.wrapping_optimizer import inner_optimizer
from keras_weightmods.ops.nm import Pattern, parse_pattern
from keras_weightmods.saving.checkpoint import Checkpoint
from keras_weightmods.sparsity import cast_run, sparsify
from keras_weightmods.sparsity.adam_s import AdamS
from keras_weightmods.sparsity.distillation import LogitsDistiller
from keras_weightmods.sparsity.report import SparsityReport, sparsity_report
from keras_weightmods.sparsity.scaling import Scaling, attach_scaling
from keras_weightmods.utils import checks
from keras_weightmods.utils.dtypes import bytes_of
from keras_weightmods.utils.progress import Progress, Waiting


class CAST(LogitsDistiller):
    """Train a model to exact N:M sparsity, with its dense self as the teacher.

    Continuous Adaptive Sparse Trainer (arXiv 2509.25996) has three parts. The
    `AdamS` optimizer pulls the weights outside a changing mask to zero.
    Learnable scales restore the magnitude that this takes away (equations
    11-12). The dense model at the start teaches the model while it gets sparse
    (equation 13):

    `loss = eta * KL(teacher || student) + (1 - eta) * cross-entropy`

    Call `compile`, `fit` and `finalize`. CAST trains the model itself, in
    place, and `finalize` returns it as a plain model. A model that was trained
    before is left uncompiled, as its optimizer has state of another training.

    The weights reach the pattern at the end of the run: do not stop it early. A
    further `fit` of the finished model loses the pattern, unless
    `SemiStructuredSparse.attach(model, pattern, frozen=True)` holds it.

    With `Checkpoint` among the callbacks, run an interrupted program again, and
    it continues after its last whole epoch. The files of Keras work too: make
    and compile a `CAST` in the same way, and load what `save_weights` wrote by
    `load_weights`. Then `fit` with the same `epochs` and with `initial_epoch`.
    `keras.callbacks.BackupAndRestore` does this by itself. After a save within
    an epoch, first `fit` the rest of its batches.
    `BackupAndRestore(save_freq=...)` trains on all of them again.

    The file holds the model with its scales and the seeds of its layers, the
    teacher, the optimizer with its masks, and the length of the run. With the
    same batches (`shuffle=False`, or a dataset with its own seed) the weights
    equal those of an uninterrupted run, bit for bit.

    Args:
        model: A built `keras.Model`, for example a KerasHub `CausalLM`. It
            is trained in place.
        pattern: String `"n:m"` or pair of ints: n weights kept of every m.
            Defaults to `"2:4"`.
        teacher: `"self"` for a frozen copy of `model` as it is now, another
            `keras.Model` with the same inputs and outputs, or `None` to train
            without distillation. Outputs are taken as logits.
            Defaults to `"self"`.
        targets: The kernels that become sparse: `Targets`, or what `include=`
            of `find_targets` takes. Defaults to `None`, for all of them.
        distillation_weight: Float in [0, 1], eta in the formula. Defaults to
            `1/3`.
        temperature: Float > 0, the temperature of the distillation. Defaults to
            `1.0`.
        scaling_groups: Int, learnable scales for each output unit; `0` for
            none. Defaults to `2`.
        init: `"dense"` to begin with the model as it is; or `"magnitude"`,
            `"wanda"` or `"sparsegpt"`, a criterion of `sparsify`. The criterion
            makes the model sparse in one shot when `fit` begins, on the first
            rows of its data. The default optimizer then trains under the mask
            of that start. The teacher is still the dense model. Defaults to
            `"dense"`.
        init_refine: As `refine` of `sparsify`, for a one-shot start. With
            `"blocks"` the default learning rate is lower. Defaults to `None`.
        init_rows: Int, the rows (texts, images) that the one-shot start is
            made on, rounded up to whole batches. Defaults to `128`.
        teacher_dtype: Dtype in which the copy of `teacher="self"` is kept,
            for example `"bfloat16"` for half the memory. `None` keeps the
            model's own. Defaults to `None`.
        name: Defaults to `"cast"`.

    Attributes:
        targets: `Targets`, the kernels that become sparse. Its `skipped` lists
            what stays dense, with reasons.
        teacher_bytes: Int, the memory of the teacher's weights.
        init_report: The `SparsifyReport` of the one-shot start, once `fit`
            has made it; `None` before.
        report: The `SparsityReport` of the model that `finalize` returns;
            `None` before.

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
    print(cast.report)
    ```
    """

    optimizer: Any
    train_function: Any

    default_recipe = staticmethod(cast_run.default_recipe)

    def __init__(
        self,
        model: keras.Model,
        pattern: Pattern = "2:4",
        *,
        teacher: Any = "self",
        targets: Any = None,
        distillation_weight: float = 1 / 3,
        temperature: float = 1.0,
        scaling_groups: int = 2,
        init: str = "dense",
        init_refine: Any = None,
        init_rows: int = 128,
        teacher_dtype: str | None = None,
        name: str = "cast",
    ) -> None:
        n, m = parse_pattern(pattern)
        checks.check_int("init_rows", init_rows, 1)
        checks.check_int("scaling_groups", scaling_groups, 0)
        if not isinstance(model, keras.Model) or not model.built:
            expected = "a built `keras.Model`. Call it on data first"
            raise checks.error("model", expected, model)
        usable = sparsify.fitting_targets(
            "CAST",
            resolve_targets(model, targets),
            pattern,
            lambda target: None if target.variable.trainable else "frozen",
        )
        recipe = cast_run.default_recipe(init, init_refine, usable)
        others = [teacher] if isinstance(teacher, keras.Model) else []
        with RestoredOnError(model, *others):
            if seam.has_built_optimizer(model):
                # It would not know the scales, and `compile` sets another one.
                model.optimizer, model.compiled = None, False
            # The teacher is frozen once it fits, so attach the scales first.
            # They change nothing yet.
            if scaling_groups:
                attach_scaling(
                    model,
                    targets=usable,
                    groups=scaling_groups,
                    pattern=pattern,
                )
            super().__init__(
                model,
                teacher,
                distillation_weight,
                temperature,
                teacher_dtype,
                name,
            )
            self.pattern = f"{n}:{m}"
            self.init = init
            self.init_refine = init_refine
            self.init_rows = init_rows
            self.scaling_groups = scaling_groups
            self.targets = usable
            self.init_report: sparsify.SparsifyReport | None = None
            self.report: SparsityReport | None = None
            self._recipe = recipe
            self._optimizer_is_default = False
            # Checkpoint state beside variables: the length of the run, None if
            # it is not planned here, and whether the one-shot start is done.
            self._planned: int | None = None
            self.is_started = init == "dense"
            self._run_losses = cast_run.Losses()
            self._verbose: Any = 0
            self._building = contextlib.ExitStack()

    @property
    def adam_s(self) -> AdamS:
        """The `AdamS` in `optimizer`, also inside a loss-scaling wrapper."""
        inner: AdamS = inner_optimizer(self.optimizer)
        return inner

    def compile(
        self, optimizer: Any = None, loss: Any = None, **kwargs: Any
    ) -> None:
        """Configure the training.

        Args:
            optimizer: An `AdamS`, or `None` for one with this library's recipe
                for short runs. From a dense start, the recipe scales the pull
                to arrive at 40 % of the run. It ranks the mask by
                activation-weighted magnitude, measured on the first batches.
                From a one-shot start, it keeps the mask fixed. Both recipes
                have a warm-up and linear decay of the learning rate, which is
                lower for a model with small weights (see `default_recipe`).
                `targets` and `total_steps` are filled in where they are not
                given. Defaults to `None`.
            loss: The loss on the labels. `None` takes the cross-entropy from
                logits for a KerasHub language model, and is an error for any
                other. Sample weights and masks apply to it and to the
                distillation alike.
            **kwargs: As in `keras.Model.compile`.

        Raises:
            ValueError: If `optimizer` is not an `AdamS` or has another pattern,
                or `loss` is missing.
        """
        is_default = optimizer is None
        if is_default:
            optimizer = AdamS(pattern=self.pattern, **self._recipe)
        inner = inner_optimizer(optimizer)
        if not isinstance(inner, AdamS) or inner.pattern != self.pattern:
            expected = f"an `AdamS` of pattern {self.pattern!r}, or None"
            raise checks.error("optimizer", expected, optimizer)
        if loss is None:
            if not hasattr(self.student, "backbone"):
                expected = "the loss on the labels, as in `keras.Model.compile`"
                raise checks.error("loss", expected, loss)
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        inner.use_targets(self.targets)
        layers = keras_compat.layers_of(self.student)
        if (
            kwargs.get("auto_scale_loss", True)
            and inner is optimizer
            and any(layer.compute_dtype == "float16" for layer in layers)
        ):
            # Keras uses the policy of the outermost model, this wrapper.
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
        super().compile(optimizer, loss, **kwargs)
        self._optimizer_is_default = is_default
        self._planned = None

    def make_train_function(self, force: bool = False) -> None:
        """Prepare the train step. On JAX it keeps the weights on an error."""
        # By now `fit` has called the model on data.
        self._building.close()
        keras_compat.list_hidden_parameters(self)
        super().make_train_function(force)
        train_step.show_first(self, self._verbose)
        train_step.keep_weights(self)

    def fit(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        epochs: int = 1,
        verbose: Any = "auto",
        **kwargs: Any,
    ) -> keras.callbacks.History:
        """Train the model into the pattern.

        Takes the arguments of `keras.Model.fit`. Language models of KerasHub
        with a preprocessor also take strings. They also take rows of token ids;
        their labels are the next tokens where there is no `y`.

        If the optimizer has no `total_steps`, it is the steps of an epoch times
        `epochs`. This plan is fixed from the first step on. A `fit` that goes
        beyond its end gets a warning, before it starts if the number of batches
        is known, else after it. Compiling the step may take a minute: the
        seconds are shown meanwhile, unless `verbose` is 0. A warning comes
        first where gradients and the optimizer take more than the free memory.

        Raises:
            ValueError: If `total_steps` was not given and the data do not say
                how many batches they have; if the optimizer does not sparsify a
                target; after `finalize`.
        """
        began = time.perf_counter()
        self._check_not_finalized("fit")
        if not self.compiled:
            raise ValueError("Call `compile()` before `fit()`.")
        checks.check_int("batch_size", batch_size, 1, 2**31 - 1, optional=True)
        checks.check_int("epochs", epochs, 0, 2**31 - 1)
        if not isinstance(verbose, bool):
            checks.check_choice("verbose", verbose, ("auto", 0, 1, 2))
        given = data.with_next_tokens(
            self.student, x, y, kwargs.get("sample_weight")
        )
        x, y, kwargs["sample_weight"] = data.preprocess(self.student, *given)
        data.check(x, y)
        kwargs["validation_data"] = data.preprocess_pairs(
            self.student, kwargs.get("validation_data")
        )
        split = kwargs.get("validation_split", 0.0)
        steps = kwargs.get("steps_per_epoch")
        steps = steps or data.batch_count(x, batch_size, split) or math.inf
        # With these, `epochs` includes the epochs of an interrupted fit.
        is_resumed = False
        callbacks = keras.tree.flatten(kwargs.get("callbacks"))
        # Before a `Checkpoint`, which saves what they hold.
        kwargs["callbacks"] = [self._run_losses, *filter(None, callbacks)]
        for callback in callbacks:
            is_resumed |= isinstance(callback, keras.callbacks.BackupAndRestore)
            if isinstance(callback, Checkpoint):
                # Load before the start of the run, so that it is not made
                # again.
                is_resumed |= callback.restore(self)
        optimizer, taken = self.adam_s, cast_run.steps_taken(self.adam_s)
        if optimizer.total_steps is None or (
            self._planned is not None and not taken
        ):
            if steps == math.inf:
                raise ValueError(
                    "`fit` cannot tell how many batches there are, which the "
                    "ramp of `AdamS` needs. Pass `steps_per_epoch`, or "
                    "`AdamS(total_steps=...)`. Received: x of type "
                    f"{type(x).__name__}"
                )
            self._plan(epochs * int(steps))
            last = optimizer.total_steps
        elif steps == math.inf:
            last = taken + 1
        else:
            last = self._updates(epochs * int(steps))
            if not is_resumed:
                first = kwargs.get("initial_epoch", 0) * int(steps)
                last += taken - self._updates(first)
        cast_run.warn_about_the_end(optimizer, last)
        if not self.optimizer.built:
            trained = self.trainable_variables
            warn_if_short(
                *("CAST.fit", trained, 3 * bytes_of(trained)),
                "Freeze more layers by `trainable = False`, or call "
                "`kwm.sparsify(model, data)`, which takes one block at a time.",
            )
        with keras_compat.strategy_scope(self):
            with Waiting("Building the optimizer", verbose, began):
                self._build_optimizer()
            cast_run.check_sparsified(self.adam_s, self.targets)
            if not taken:
                rows = x, batch_size, kwargs["sample_weight"]
                x = cast_run.start(self, *rows, verbose, began)
        self._verbose = verbose
        with contextlib.ExitStack() as self._building, kept():
            waiting = Waiting("Building the training step", verbose, began)
            self._building.enter_context(waiting)
            history = super().fit(x, y, batch_size, epochs, verbose, **kwargs)
        if last <= optimizer.total_steps:
            cast_run.warn_about_the_end(optimizer)
        return history

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as `keras.Model` does."""
        optimizer = self.optimizer
        try:
            if self.compiled and self.adam_s.total_steps is None:
                # Keras builds it here, before `fit` knows the length of the
                # run.
                self.optimizer = None
            return super().evaluate(*args, **kwargs)
        finally:
            self.optimizer = optimizer

    def finalize(self, verbose: int = 1) -> keras.Model:
        """Prune by the last mask, fold the scales, and return the model.

        Before the end of the run this cuts weights that still matter. A warning
        then says how much, and how to continue. Another one comes if the loss
        rose from a one-shot start.

        Args:
            verbose: 0 or 1. 0 shows no progress bar; 1 shows one once it has
                taken two seconds. Defaults to `1`.

        Returns:
            The model given to `CAST`, without anything of this package in it.
            Its targets are now exactly N:M, as `report` shows. A further `fit`
            loses the pattern.

        Raises:
            ValueError: If the model was not trained, a target was frozen during
                the training, the model is finalized already, or the training
                gave NaN. The model is unchanged then.
        """
        checks.check_verbose(verbose)
        self._check_not_finalized("finalize")
        if not self.compiled or not self.adam_s.built:
            raise ValueError(
                "`CAST.finalize()` prunes by the last mask of the training. "
                "Received: a model that was not trained. Call `compile()` "
                "and `fit()` first."
            )
        cast_run.check_sparsified(self.adam_s, self.targets)
        scales = reparameterizations(self.student, Scaling)
        scaled = [item.target.variable for item in scales]
        with (
            Progress(2, "step", verbose) as progress,
            RestoredOnError(self, values=[*self.adam_s.sparsified, *scaled]),
        ):
            self.adam_s.prune()
            progress.add()
            seam.fold_items(self.student, scales)
            if self.init != "dense":
                self._run_losses.warn_if_they_rose()
            self.report = sparsity_report(
                self.student, self.pattern, targets=self.targets, verbose=0
            )
            # Functions traced by TensorFlow still hold the old scales.
            for name in ("train", "test", "predict"):
                setattr(self, f"{name}_function", None)
        return self.student

    def _check_not_finalized(self, what: str) -> None:
        if self.report is not None:
            raise ValueError(
                f"`CAST.{what}()` was called after `finalize()`. The model is "
                "a plain one now; make a new `CAST` to train it on."
            )

    def get_config(self) -> Any:
        raise NotImplementedError(
            "A `CAST` holds a model in the middle of its training. Keep "
            "checkpoints by `kwm.Checkpoint` or `save_weights`, and save the "
            "model itself after `finalize()`."
        )

    def save_own_variables(self, store: Any) -> None:
        for place, state in enumerate(self._random_states()):
            store[f"random_{place}"] = ops.convert_to_numpy(state)
        store["is_started"] = np.asarray(self.is_started)
        store["losses"] = np.asarray(self._run_losses.values)
        if self._planned is not None:
            store["planned_batches"] = np.asarray(self._planned)

    def load_own_variables(self, store: Any) -> None:
        # Precedes the optimizer's state, which loads only into a built
        # optimizer. Building takes the length of the run.
        saved = {key: np.asarray(store[key]) for key in list(store.keys())}
        self.is_started = bool(saved.get("is_started", self.is_started))
        self._run_losses.values = saved.get("losses", np.zeros(0)).tolist()
        for place, state in enumerate(self._random_states()):
            state.assign(saved.get(f"random_{place}", state))
        if not self.compiled:
            return
        if self.adam_s.total_steps is None and "planned_batches" in saved:
            self._plan(int(saved["planned_batches"]))
        if self.adam_s.total_steps is not None:
            self._build_optimizer()

    def _random_states(self) -> list[Any]:
        """Return those of the model's layers, which Keras does not save."""
        saved = set(map(id, self.student.weights))
        return [v for v in self.student.variables if id(v) not in saved]

    def _build_optimizer(self) -> None:
        # A rebuilt `LossScaleOptimizer` would add its variables again.
        if not self.optimizer.built:
            self.optimizer.build(self.trainable_variables)

    def _plan(self, batches: int) -> None:
        """Set the length of the run, and the default schedule."""
        optimizer = self.adam_s
        optimizer.total_steps = max(1, self._updates(batches))
        if self._optimizer_is_default:
            rate = self._recipe["learning_rate"]
            warmup = max(1, round(cast_run.WARMUP * batches))
            schedule = WarmupLinearDecay(rate, warmup, batches)
            optimizer.learning_rate = schedule
        self._planned = batches
        # The compiled step holds the length of an earlier plan.
        self.train_function = None

    def _updates(self, batches: int) -> int:
        return batches // (self.adam_s.gradient_accumulation_steps or 1)
