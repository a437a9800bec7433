"""Private parts of Keras' optimizers, and of the `fit` that runs them."""

import contextlib
import inspect
from typing import Any

import keras
from keras.src.trainers.epoch_iterator import EpochIterator


def strategy_scope(model: Any) -> Any:
    """Return the scope of the strategy that a model was made in.

    On TensorFlow, where `fit` of Keras runs in it by itself. Variables made
    outside of it are one for each replica, and drift apart.
    """
    strategy = getattr(model, "distribute_strategy", None)
    return contextlib.nullcontext() if strategy is None else strategy.scope()


def optimizer_variables(optimizer: Any) -> list[Any]:
    """Return the variables that a built optimizer updates."""
    return optimizer._trainable_variables


def check_known(optimizer: Any, variables: list[Any]) -> None:
    """Raise ValueError unless a built optimizer updates all `variables`."""
    optimizer._check_variables_are_known(variables)


def applied_steps(optimizer: Any) -> keras.Variable:
    """Return the count of `apply`; `iterations` counts what accumulates."""
    return optimizer._iterations


def given_learning_rate(optimizer: Any) -> Any:
    """Return the schedule, if there is one; `learning_rate` is its value."""
    return optimizer._learning_rate


def decays(optimizer: Any, variable: Any) -> bool:
    """Return whether an optimizer applies weight decay to a variable."""
    return optimizer._use_weight_decay(variable)


def exclude_from_decay(optimizer: Any, keys: set[str]) -> None:
    """Leave more variables, by `_var_key`, out of weight decay.

    The public `exclude_from_weight_decay` forgets what the user has said.
    """
    optimizer._exclude_from_weight_decay = keys.union(
        getattr(optimizer, "_exclude_from_weight_decay", ())
    )
    optimizer._exclude_from_weight_decay_cache = {}


def drop_averages(optimizer: Any) -> None:
    """Take the moving averages out of a built optimizer, if it has any."""
    averages = getattr(optimizer, "_model_variables_moving_average", None)
    if averages is not None:
        for average in averages:
            if average is not None:
                optimizer._untrack_variable(average)
        del optimizer._model_variables_moving_average


def set_optimizer(model: Any, optimizer: Any) -> None:
    """Give a compiled model another optimizer, also in what it saves.

    `compile` would drop the model's state of metrics.
    """
    model.optimizer = optimizer
    config = getattr(model, "_compile_config", None)
    if config is not None and "optimizer" in config.config:
        config.config["optimizer"] = optimizer
    model.train_function = None


class FitData:
    """What a running `fit` of Keras draws its batches from.

    Keras hands it to no callback: it is a local variable of `fit`, and its
    order and place cannot be set from outside.

    Args:
        model: The model whose `fit` calls us, through a callback.

    Raises:
        ValueError: If there is no such `fit`.
    """

    def __init__(self, model: Any) -> None:
        frame = inspect.currentframe()
        while frame is not None:
            own = frame.f_locals
            iterator = own.get("epoch_iterator")
            if own.get("self") is model and isinstance(iterator, EpochIterator):
                break
            frame = frame.f_back
        else:
            raise ValueError(
                "The data of this `fit` cannot be found, which works with "
                f"Keras' own `fit` alone. Received: {type(model).__name__}"
            )
        # Batches go on while callbacks run in another thread, where `fit` is
        # given no list of callbacks but a single one.
        if hasattr(own["callbacks"], "_async_train"):
            own["callbacks"]._async_train = False
        self._iterator: Any = iterator
        self._new = iterator._get_iterator
        self._steps = iterator._enumerate_iterator
        self.adapter = iterator.data_adapter
        self.kind = type(self.adapter).__name__
        self.is_arrays = self.kind == "ArrayDataAdapter"
        # What is shuffled only when an epoch begins draws nothing later.
        self.draws_at_start = (
            self.is_arrays and self.adapter._shuffle != "batch"
        )
        self.steps_per_execution = iterator.steps_per_execution
        self.steps_per_epoch = iterator.steps_per_epoch

    def install(self, new: Any, steps: Any) -> None:
        """Have `fit` take iterators from `new()`, and its steps from `steps()`.

        Each step is a triple (first, last, iterator to draw the batches of).
        """
        self._iterator._get_iterator = new
        self._iterator._enumerate_iterator = steps

    def new_batches(self) -> Any:
        """Return a new iterator of batches, as `fit` would without us.

        But on TensorFlow Keras draws from Python's data ahead, in a thread,
        when random numbers may be any. Here it happens when asked for.
        """
        is_python = not self.is_arrays and self.kind != "TFDatasetAdapter"
        if keras.backend.backend() != "tensorflow" or not is_python:
            return iter(self._new())
        import tensorflow as tf

        def tensor(leaf):
            return None if leaf is None else tf.convert_to_tensor(leaf)

        return (
            keras.tree.map_structure(tensor, batch)
            for batch in self.adapter.get_numpy_iterator()
        )

    def steps(self) -> Any:
        """Return the iterator of the steps of an epoch, as `fit` would."""
        return self._steps()

    @property
    def steps_of_epoch(self) -> int | None:
        """The steps of an epoch; None where they are not known yet."""
        return self._iterator.num_batches

    @property
    def num_batches(self) -> int | None:
        """The batches of a pass; None where they are not known yet."""
        return self._iterator._num_batches

    @num_batches.setter
    def num_batches(self, count: int | None) -> None:
        if self._iterator._num_batches is None:
            self._iterator._num_batches = count

    @property
    def steps_seen(self) -> int:
        """The steps made with the iterator that is in use."""
        return int(self._iterator._steps_seen)

    def go_on_with(self, batches: Any, steps_seen: int) -> None:
        """Put an iterator into use, where it outlives an epoch."""
        self._iterator._current_iterator = batches
        self._iterator._steps_seen = steps_seen

    def shuffle_by_seed(self) -> Any:
        """Return a variable of two ints that sets the order, on TensorFlow.

        Keras shuffles arrays there with `tf.random.shuffle` within `tf.data`,
        whose state cannot be read or set. None where nothing is shuffled.
        """
        is_tensorflow = keras.backend.backend() == "tensorflow"
        if not (is_tensorflow and self.is_arrays and self.adapter._shuffle):
            return None
        import tensorflow as tf

        seed = tf.Variable([0, 0], dtype="int64", trainable=False)

        def shuffle(indices):
            # The batch too, of which with `shuffle="batch"` there are many.
            words = seed + tf.stack([0, indices[0]])
            return tf.random.experimental.stateless_shuffle(indices, words)

        plain, tf.random.shuffle = tf.random.shuffle, shuffle
        try:
            dataset = self.adapter.get_tf_dataset()
        finally:
            tf.random.shuffle = plain
        self._iterator._distributed_dataset = dataset
        return seed


def begin_with_epoch(model: Any, epoch: int | None) -> None:
    """Have the `fit` that is starting begin with an epoch, counted from 0."""
    model._initial_epoch = epoch


def hold_state(model: Any, state: Any) -> None:
    """Have `fit` on JAX put a state into the variables when it ends."""
    names = "trainable", "non_trainable", "optimizer", "metrics"
    model._jax_state = {
        f"{name}_variables": values for name, values in zip(names, state)
    }
    model._jax_state_synced = False


def build_metrics(model: Any, batch: Any) -> None:
    """Build metrics and loss; TensorFlow's trainer does it in the first step.

    Args:
        model: A compiled model.
        batch: What `fit` draws from its data.
    """
    model._symbolic_build(data_batch=batch)
