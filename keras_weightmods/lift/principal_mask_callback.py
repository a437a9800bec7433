"""PrincipalMaskCallback: fine-tunes the principal weights of a model alone."""

import dataclasses
import random
import time
import warnings
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_weightmods import backend
from keras_weightmods.core import filters, keras_compat, train_step
from keras_weightmods.core.free_memory import warn_if_short
from keras_weightmods.core.restored import RestoredOnError
from keras_weightmods.core.wrapping_optimizer import inner_optimizer
from keras_weightmods.lift.attach import Plan
from keras_weightmods.lift.frozen import freeze, unfreeze, unfreeze_on_error
from keras_weightmods.lift.masked_state import MaskedState
from keras_weightmods.lift.report import PrincipalMaskReport, Refresh
from keras_weightmods.ops.principal_mask import Selection, mask_indices
from keras_weightmods.ops.random_places import seed_of
from keras_weightmods.utils import checks
from keras_weightmods.utils.dtypes import bytes_of
from keras_weightmods.utils.progress import Progress


class PrincipalMaskCallback(keras.callbacks.Callback):
    """Fine-tunes only the principal weights of each kernel.

    LIFT (Low-rank Informed Sparse Fine-Tuning, arXiv 2506.00772) trains few
    entries of each kernel and nothing else. They are the largest entries of the
    kernel's best low-rank approximation. They are chosen before the first step
    and again every `refresh_every` updates. An entry that leaves the mask keeps
    its value.

    The guide to LIFT compares it with training all weights, random masks and
    LoRA.

    With `SparseAdamW` the optimizer's state is as small as the masks. Any other
    Keras optimizer is wrapped in a `MaskedOptimizer`, which stays the model's
    optimizer after the training. A step is compiled once: a refresh assigns to
    variables.

    The optimizer's state holds the masks, so a checkpoint holds them too. Put
    `Checkpoint` behind this callback: a run that is resumed after a whole epoch
    then equals an uninterrupted run bit for bit, with `Dropout` too.
    `BackupAndRestore` keeps no random numbers. Behind this callback it does the
    same only for models that draw none. To load the weights of a checkpoint
    yourself, call `attach(model)` before. Another `fit` continues with the
    masks.

    This callback adds three numbers to the logs at the end of each epoch:

    - `mask_density`: the share of the kernels' entries that is trained;
    - `mask_changed`: the mean share of these that was new at the refreshes of
      the epoch, 0 without any;
    - `mask_seconds`: the time of these refreshes, and in the first epoch also
      that of the first choice.

    History and the progress bar always show them. `CSVLogger`, `TensorBoard`
    and other callbacks see them if they come after this one in the list. The
    attribute `refreshes` lists all refreshes, with `step`, `changed` and
    `seconds`.

    All other weights are frozen during the training, except those that
    `also_train` names. Their trainable flags are restored at the end, and on an
    error or Ctrl-C in a step. After an error elsewhere, in another callback for
    instance, the next `fit` with this callback restores them, or
    `detach(model)`. A kernel too small for a single chosen entry is frozen, and
    a warning names it.

    Args:
        density: Float in (0, 1], the share of the entries of each kernel that
            is trained. Defaults to 0.05 where `rank` is not given.
        rank: Int, in place of `density`: trains as many entries of each kernel
            as a LoRA of this rank has numbers, `(m + n) * rank` for m x n.
        filter_rank: Int, the rank of the approximation. Defaults to `rank`, or
            to the rank of a LoRA with about as many numbers.
        refresh_every: Int, the updates between two choices; `None` to choose
            only once. It counts updates, not batches, where gradients are
            accumulated. If a refresh comes due within one execution of several
            steps (`steps_per_execution`), it happens after it. Defaults to 200.
        criterion: `"principal"`, or for comparison `"magnitude"`, `"gradient"`
            (needs `data`) or `"random"`. `"random"` draws other places in each
            kernel from `seed`, anew at each refresh. With `refresh_every=None`
            `Patch.save` stores the seed instead of these places. Defaults to
            `"principal"`.
        targets: The kernels, as `find_targets(model)` returns them or in a
            form that its `include` takes. Defaults to all that it finds.
        also_train: Weights to train whole beside the masks, such as a new head,
            norms or biases (`modules_to_save` of peft): a regex searched for in
            the paths of all trainable weights; a layer or a layer type, for all
            weights inside of them; or a list of these. Kernels among them have
            no mask. Defaults to `None`, for nothing.
        seed: Int in [0, 2**31), of random choices. A continued run keeps its
            first seed. By default Python's `random` draws one, which
            `keras.utils.set_random_seed` governs.
        keep_pattern: Bool, whether zeros stay zeros. A 2:4 model then trains
            only its kept weights, and stays exactly 2:4. Kernels that
            `SemiStructuredSparse` constrains need it. Defaults to `False`.
        method: As in `ops.principal_mask`. Defaults to `"auto"`.
        data: Pair `(x, y)` or triple with sample weights, one batch to take
            the gradients of the loss on, for `criterion="gradient"`.

    Raises:
        ValueError: For an argument outside the ranges above. When the training
            starts or `attach` is called, before anything is changed: if no
            kernel is found, or an element of `also_train` matches no trainable
            weight. If a kernel has fewer entries than are to be trained, is
            reparameterized or not finite, or has a constraint other than
            `SemiStructuredSparse`, which would change more than the masked
            entries. If the optimizer is built for other variables.

    Example:

    ```python
    import keras
    import numpy as np
    import keras_weightmods as kwm

    model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(8)])
    model.compile(kwm.SparseAdamW(1e-3), "mse")
    x = np.random.normal(size=(64, 16))
    model.fit(
        x, x[:, :8], epochs=2, verbose=0,
        callbacks=[kwm.PrincipalMaskCallback(density=0.1, refresh_every=2)],
    )
    ```

    Reference: [LIFT the Veil for the Truth](https://arxiv.org/abs/2506.00772),
    algorithm 1.
    """

    def __init__(
        self,
        density: float | None = None,
        rank: int | None = None,
        filter_rank: int | None = None,
        refresh_every: int | None = 200,
        *,
        criterion: str = "principal",
        targets: Any = None,
        also_train: Any = None,
        seed: int | None = None,
        keep_pattern: bool = False,
        method: str = "auto",
        data: Any = None,
    ) -> None:
        super().__init__()
        if density is None and rank is None:
            density = 0.05
        if seed is None:
            seed = random.randrange(2**31)
        seed = checks.check_int("seed", seed, 0, 2**31 - 1)
        self._selection = Selection(
            rank, density, filter_rank, criterion, method, seed
        )
        self.refresh_every: Any = checks.check_int(
            "refresh_every", refresh_every, 1, optional=True
        )
        self.keep_pattern = checks.check_bool("keep_pattern", keep_pattern)
        is_batch = isinstance(data, (tuple, list)) and len(data) in (2, 3)
        if criterion == "gradient" and not is_batch:
            expected = "a batch `(x, y)`, to take gradients on"
            raise checks.error("data", expected, type(data).__name__)
        self._data = data
        self._targets = targets
        self._also_train = () if also_train is None else also_train
        self._attached: Any = None
        self._batches: Any = None
        self._mask_step = -1
        self._accumulated = 1
        self.refreshes: list[Refresh] = []
        self._before_epoch = 0
        self._first_seconds = 0.0

    def attach(self, model: keras.Model) -> PrincipalMaskReport:
        """Prepare a compiled model to train the masked entries alone.

        `fit` calls this when it begins. Call it yourself before you load a
        checkpoint with the optimizer's state, or for your own training loop.
        The masks are then chosen from the current weights. Flags left by an
        interrupted training are restored first.

        Args:
            model: A built and compiled Keras model.

        Returns:
            A `PrincipalMaskReport`.

        Raises:
            ValueError: As the class. The model is unchanged then.
        """
        checks.check_model(model)
        unfreeze(model)
        self._attached = model
        optimizer: Any = inner_optimizer(getattr(model, "optimizer", None))
        parts = optimizer, getattr(optimizer, "optimizer", None)
        try:
            with (
                RestoredOnError(model, *filter(None, parts)),
                keras_compat.strategy_scope(model),
            ):
                return self._attach(model)
        except BaseException:
            unfreeze(model)
            raise

    def detach(self, model: keras.Model | None = None) -> None:
        """Restore the trainable flags; called when `fit` ends.

        Call it after your own training loop, and where another callback has
        ended `fit` by an error.

        Args:
            model: The model, also one that another callback was attached to.
                Defaults to the one that this callback was attached to last.

        Raises:
            ValueError: If `model` is no Keras model.
        """
        model = self._attached if model is None else model
        if model is not None:
            checks.check_model(model)
            unfreeze(model)

    def on_train_begin(self, logs: Any = None) -> None:
        # Keras has already worked for about a second.
        began = time.perf_counter() - 1
        model = self.model
        report = self.attach(model)
        self._unfreezing(model, self._prepare, model, report, began)

    def _prepare(
        self, model: Any, report: PrincipalMaskReport, began: float
    ) -> None:
        self._density = report.totals["trained"] / report.totals["entries"]
        keras_compat.list_hidden_parameters(model)
        if model.train_function is None:
            model.make_train_function(force=True)
        train_step.keep_weights(model)
        if keras.backend.backend() != "jax":
            train_step.put_around(model, "frozen weights", unfreeze_on_error)
        verbose = (self.params or {}).get("verbose", 0)
        train_step.show_first(model, verbose, began)
        self._batches = None

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._first_batch = batch
        if self.refresh_every is None:
            return
        if self._batches is None or self._is_due():
            # Read the true count: updates with gradients that are not finite
            # are skipped.
            self._look()
            if self._is_due():
                model = self.model
                self._unfreezing(model, self._refresh, model)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self._batches is not None:
            self._batches += batch - self._first_batch + 1

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._before_epoch = len(self.refreshes)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if logs is None:
            return
        found = self.refreshes[self._before_epoch :]
        changed = sum(each.changed for each in found)
        logs["mask_density"] = self._density
        logs["mask_changed"] = changed / max(1, len(found))
        seconds = sum(each.seconds for each in found)
        logs["mask_seconds"] = seconds + self._first_seconds
        self._first_seconds = 0.0

    def on_train_end(self, logs: Any = None) -> None:
        self.detach()

    def _unfreezing(self, model: Any, step: Any, *args: Any) -> None:
        if keras.backend.backend() == "jax":
            # The end of `fit` does this, as in `unfreeze_on_error`.
            step(*args)
        else:
            unfreeze_on_error(model, step, *args)

    def _look(self) -> None:
        """Continue the counts from the optimizer's state."""
        optimizer = inner_optimizer(self.model.optimizer)
        applied = keras_compat.applied_steps(optimizer)
        self._batches = int(ops.convert_to_numpy(applied))
        self._mask_step = optimizer.mask_step
        self._seed = optimizer.mask_seed
        inner = getattr(optimizer, "optimizer", optimizer)
        self._accumulated = inner.gradient_accumulation_steps or 1

    def _is_due(self) -> Any:
        updates, rest = divmod(self._batches, self._accumulated)
        periods = updates // self.refresh_every
        return not rest and periods > self._mask_step // self.refresh_every

    def _refresh(self, model: Any) -> None:
        began = time.perf_counter()
        optimizer = inner_optimizer(model.optimizer)
        step = self._batches // self._accumulated
        variables = optimizer.masked_variables
        targets = [self._target_of[id(v)] for v in variables]
        verbose = (self.params or {}).get("verbose", 0)
        counts = []

        def counted(chosen: Any) -> Any:
            # One at a time, so that nothing of the others is held.
            for variable, indices in zip(variables, chosen):
                before = optimizer.indices_of(variable)
                new = np.setdiff1d(indices, before, assume_unique=True)
                counts.append((len(new), len(indices)))
                yield indices

        with (
            Progress(len(targets), "mask", verbose) as progress,
            keras_compat.strategy_scope(model),
        ):
            chosen = self._choose(model, targets, step, optimizer)
            optimizer.set_masks(progress.each(counted(chosen)), step)
        self._mask_step = step
        seconds = time.perf_counter() - began
        new, entries = map(sum, zip(*counts))
        self.refreshes.append(Refresh(step, new / max(1, entries), seconds))

    def _attach(self, model: Any) -> PrincipalMaskReport:
        if getattr(model, "optimizer", None) is None:
            expected = "compiled with an optimizer"
            raise checks.error("model", expected, model.name)
        whole = filters.matching_weights(
            "also_train", self._also_train, model, trainable=True
        )
        options = self.keep_pattern, self._selection
        plan = Plan(model, self._targets, whole, *options)
        if plan.tiny:
            warnings.warn(
                f"`PrincipalMaskCallback` leaves {len(plan.tiny)} kernels "
                f"frozen, too small for an entry: {plan.tiny[:5]}. Select more "
                "to train these too.",
                stacklevel=2,
            )
        if plan.sparse and not self.keep_pattern:
            warnings.warn(
                f"`PrincipalMaskCallback` trains zeros of {len(plan.sparse)} "
                f"kernels that are 2:4: {plan.sparse[:5]}. They lose that "
                "pattern. Pass `keep_pattern=True` to keep it.",
                stacklevel=2,
            )
        optimizer = inner_optimizer(model.optimizer)
        plan.check_optimizer(optimizer)
        warn_if_short(
            *("PrincipalMaskCallback", plan.variables),
            bytes_of(plan.variables),
            "Give fewer `targets`, or shorter rows.",
        )
        is_new = not (isinstance(optimizer, MaskedState) and optimizer.built)
        chosen = None
        if is_new or optimizer.mask_step < 0:
            began = time.perf_counter()
            verbose = (self.params or {}).get("verbose", 1)
            with Progress(len(plan.targets), "mask", verbose) as progress:
                found = self._choose(model, plan.targets, 0, None)
                chosen = list(progress.each(found))
            self._first_seconds = time.perf_counter() - began
        if is_new:
            optimizer = plan.install(model, optimizer)
        trained = {id(v) for v in plan.variables}
        freeze(model, [v for v in plan.known if id(v) not in trained])
        if chosen is not None:
            optimizer.set_masks(chosen, 0, self._selection.seed)
        self._target_of = {id(t.variable): t for t in plan.targets}
        return plan.report

    def _choose(self, model: Any, targets: Any, step: int, before: Any) -> Any:
        """Yield the entries of each target to train from this step on."""
        own = self._selection
        seed = own.seed if before is None else self._seed
        gradients = [None] * len(targets)
        if own.criterion == "gradient":
            variables = [target.variable for target in targets]
            batch = keras.tree.map_structure(ops.convert_to_tensor, self._data)
            x, y, weight = (*batch, None)[:3]
            gradients = _loss_gradients(model, variables, x, y, weight)
        for number, (target, gradient) in enumerate(zip(targets, gradients)):
            next_seed = (seed + step) % 2**31
            if own.criterion == "random":
                # Kernels of the same shape get different masks.
                next_seed = seed_of(seed, step, number)
            selection = dataclasses.replace(own, seed=next_seed)
            value, candidates = target.variable.value, None
            if self.keep_pattern:
                candidates = ops.convert_to_numpy(value) != 0
                if before is not None:
                    # A trained entry that became zero stays in the mask.
                    inside = before.indices_of(target.variable)
                    candidates.reshape(-1)[inside] = True
            axes = target.contraction_axes, target.stack_axes
            try:
                mask = selection.mask(value, *axes, gradient, candidates)
            except ValueError as error:
                raise ValueError(
                    f"No entries can be chosen of {target.path!r}. {error}"
                ) from error
            yield mask_indices(mask)


def _loss_gradients(
    model: Any, variables: Any, x: Any, y: Any, sample_weight: Any
) -> Any:
    """Return the gradients of a compiled model's loss, in inference mode."""

    def loss_at(*values: Any) -> Any:
        with keras.StatelessScope(zip(variables, values)):
            return model.compute_loss(
                x, y, model(x, training=False), sample_weight, training=False
            )

    values = [ops.convert_to_tensor(v.value) for v in variables]
    loss, pullback = backend.current().vjp(loss_at, *values)
    return pullback(ops.ones_like(loss))


# The name of the method in the paper.
LIFT = PrincipalMaskCallback
