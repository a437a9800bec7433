"""Training a pruned block to give the outputs of the dense one."""

import dataclasses
import math
import operator
import warnings

import keras
import numpy as np
from keras import ops

from keras_weightmods import backend
from keras_weightmods.calibration import inputs as calibration
from keras_weightmods.calibration.schedule import WarmupLinearDecay
from keras_weightmods.core import free_memory, keras_compat
from keras_weightmods.core.reparameterization import slots
from keras_weightmods.core.restored import RestoredOnError
from keras_weightmods.utils import dtypes
from keras_weightmods.utils.report import Table

# Learning rates are given for weights of this root mean square.
ROOT_MEAN_SQUARE = 0.2


@dataclasses.dataclass(frozen=True)
class ReconstructedBlock:
    """One block in the report of `sparsify` or `quantize` with blocks.

    Attributes:
        name: String, of the layer.
        kernels: Int, how many of its kernels were trained.
        before, after: Floats, `|Y' - Y|^2 / |Y|^2`, the mean over the
            positions of the rows held out: Y are the outputs of the model as
            given there, Y' those of the changed one. What did not get better
            there is left as it was.
    """

    name: str
    kernels: int
    before: float
    after: float


def blocks_table(blocks):
    """Return the `Table` of a report on reconstructed blocks."""
    columns = "block=name kernels error_before=before:.2% after:.2%"
    return Table("Blocks, reconstructed", blocks, columns)


def warn_of_undone(blocks, stacklevel):
    """Warn where the training of most blocks was undone."""
    undone = sum(block.after == block.before > 0 for block in blocks)
    if 2 * undone > len(blocks):
        warnings.warn(
            f"On rows held out the training of {undone} of {len(blocks)} "
            "blocks gave larger errors, and was undone. Pass a smaller "
            "`learning_rate` or more `data`, or leave 'blocks' out of "
            "`refine`, which takes less time.",
            stacklevel=stacklevel + 1,
        )


def train_block(
    operation, targets, fit, held, epochs, learning_rate, positions=None
):
    """Train the nonzero weights of one block after the other.

    A block gets the outputs of the changed blocks before it. Adam trains it to
    give its outputs in the unchanged model, so it also makes up for errors of
    the earlier blocks. Zeros stay zero. arXiv 2510.14444 compares such windows
    with one nonlinear block each.

    The loss is the squared error at each position over the energy of the output
    wanted there. A few positions of a language model have a hundred times the
    norm of the others.

    Args:
        operation: Keras operation, the block.
        targets: List of `Target` in it, changed.
        fit: Triple of lists with an entry for each batch: pairs (args,
            kwargs) for it; the outputs wanted; boolean arrays over leading
            axes of the outputs, or None: the positions that count.
        held: The same for the rows held out. What is worse on these after the
            training is undone. Where there are none, `fit` decides.
        epochs: Int, passes over the calibration data.
        learning_rate: Float > 0, the peak for a kernel whose nonzero weights
            have a root mean square of 0.2, and in proportion for others; it
            rises over a tenth of the steps and falls to zero.
        positions: Int, those of a step: as many rows as have so many, or one.
            Defaults to `None`, for a batch.

    Returns:
        A `ReconstructedBlock`; None, with a warning, for a block without a
        float in its outputs.
    """
    data = Batches(*fit, positions=positions)
    if not data.places:
        warnings.warn(
            f"The block {operation.name!r} gives no float. Its "
            f"{len(targets)} kernels are not trained.",
            stacklevel=2,
        )
        return None
    trained = [target.variable for target in targets]
    for target in targets:
        item = slots(target.layer).get(target.attribute)
        trained += item.parameters if item and not item.is_idle else ()
    sparse = {}
    for v in (target.variable for target in targets):
        kept = ops.not_equal(v.value, 0)
        kept = None if bool(ops.all(kept)) else kept
        sparse[id(v)] = root_mean_square(v) / ROOT_MEAN_SQUARE, kept
    part = Part(operation, operation, relative_error, data)
    before, after = train_part(
        part,
        trained,
        data,
        Batches(*held) if held[0] else data,
        epochs,
        learning_rate,
        sparse,
    )
    if not math.isfinite(after):
        raise ValueError(
            f"The loss of {operation.name!r} must stay finite while it is "
            f"trained. Received: {after}, at {targets[0].path}, with a "
            f"learning rate of {learning_rate}. Give a smaller one, or leave "
            "'blocks' out of `refine`."
        )
    errors = before, min(before, after)
    return ReconstructedBlock(operation.name, len(targets), *errors)


def train_part(
    part,
    trained,
    fit,
    held,
    epochs,
    learning_rate,
    sparse=None,
    verbose=0,
):
    """Train some variables of a `Part`, by Adam; return two losses.

    Args:
        part: `Part`, of no use afterwards.
        trained: List of variables of it.
        fit, held: `Batches`, to train on and to measure on. What is worse on
            the latter after the training is undone.
        epochs, learning_rate: As in `train_block`.
        sparse: As of `SparseAdam`, whose variables nothing else constrains
            meanwhile. Defaults to `None`, for `keras.optimizers.Adam`.
        verbose: 0 or 1. 1 shows Keras' progress bars. Defaults to `0`.

    Returns:
        Pair of floats, the losses on `held` before and after. What was undone
        has a larger second one, or NaN.
    """
    steps = epochs * len(fit)
    schedule = WarmupLinearDecay(learning_rate, max(1, steps // 10), steps)
    # On JAX a step that fails loses all variables of the part.
    is_lost = keras.backend.backend() == "jax"
    values = part.operation.variables if is_lost else trained
    undo = RestoredOnError(part.operation, values=values, on_disk=True)
    with undo, calibration.gradients(), free_memory.kept():
        only_trained(part.operation, trained)
        for variable in trained:
            if sparse and id(variable) in sparse:
                variable.constraint = None
        # Keras' own Adam takes one step for all variables on torch.
        if sparse:
            part.compile(SparseAdam(schedule, sparse))
        else:
            part.compile(keras.optimizers.Adam(schedule))
        before = part.evaluate(held, verbose=0)
        # `Batches` shuffles, by a seed; Keras by the generator of Python.
        part.fit(fit, epochs=epochs, verbose=verbose, shuffle=False)
        after = part.evaluate(held, verbose=0)
        # True for NaN too.
        if not after <= before:
            undo.give_values_back()
        undo.structure.restore()
    # Gives the optimizer back now: Keras' models are in cycles.
    keras_compat.attributes(part).clear()
    return before, after


def only_trained(operation, trained):
    """Train only these variables of a Keras operation."""
    for layer in keras_compat.layers_of(operation):
        layer.trainable = True
    chosen = set(map(id, trained))
    for variable in operation.variables:
        variable.trainable = id(variable) in chosen


class Batches(keras.utils.PyDataset):
    """The inputs of a block, the outputs wanted, and the positions that count.

    Args:
        calls, taught, used: As `fit` of `train_block`.
        positions: As of `train_block`. A batch stays whole where not all
            tensors have its rows. Defaults to `None`.
    """

    def __init__(self, calls, taught, used, positions=None):
        super().__init__()
        self.example = calls[0]
        outputs = list(map(keras.tree.flatten, taught))
        # Each output of floats counts.
        self.places = [i for i, x in enumerate(outputs[0]) if is_float(x)]
        self.inputs = []
        for call, flat, mask in zip(calls, outputs, used):
            # A flat dict, for tf.data.
            inputs = {
                f"call_{i}": x
                for i, x in enumerate(keras.tree.flatten(call))
                # Keras takes no scalars as data.
                if ops.is_tensor(x) and len(x.shape) > 0
            }
            for i in self.places:
                weights = calibration.mask_of(mask, tuple(flat[i].shape[:-1]))
                inputs[f"taught_{i}"] = flat[i]
                inputs[f"weights_{i}"] = weights.astype("float32")
            counts = {len(x) for x in inputs.values()}
            step = most = max(counts)
            if positions and len(counts) == 1:
                step = max(1, positions * most // max(1, weights.size))
            self.inputs += [
                {name: x[start : start + step] for name, x in inputs.items()}
                for start in range(0, most, step)
            ]
        self.order = np.arange(len(self.inputs))
        self.random = np.random.default_rng(0)
        self._begin_apart()

    def __len__(self):
        return len(self.order)

    def __getitem__(self, index):
        return (self.inputs[self.order[index]],)

    def on_epoch_end(self):
        self.random.shuffle(self.order)
        self._begin_apart()

    def _begin_apart(self):
        """Make the first two batches differ in most of their dimensions.

        On TensorFlow Keras learns from them which dimensions are open.
        """
        shapes = [
            [size for x in self.inputs[i].values() for size in x.shape[1:]]
            for i in self.order
        ]
        differ = [sum(map(operator.ne, x, shapes[0])) for x in shapes]
        if any(differ):
            other = int(np.argmax(differ))
            self.order[[1, other]] = self.order[[other, 1]]


class Part(keras.Model):
    """Map the inputs of a layer or model, and target outputs, to a loss.

    Args:
        operation: Keras operation that has all variables.
        run: Keras operation in it, from its inputs to what is compared.
        loss: Callable from outputs, those taught and the weights of their
            positions to a loss.
        data: `Batches`.
        recompute: Bool, whether torch computes the inside of the layers of
            `run`, a functional model, twice, and holds less. Defaults to
            `False`.
    """

    def __init__(self, operation, run, loss, data, recompute=False):
        # Its layers cast their inputs themselves.
        super().__init__(name="part", dtype="float32", autocast=False)
        self.operation, self.loss_of = operation, loss
        self.run = keras_compat.graph_call(run)
        if recompute:
            recomputed = backend.current().recomputed
            self.run = keras_compat.wrapped_call(run, recomputed)
        self.example, self.places = data.example, data.places
        self.built = True

    @property
    def losses(self):
        # Leaves out the regularization of its layers.
        return []

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        # With a compiled loss Keras would run the part once more.
        return y_pred

    def call(self, inputs):
        leaves = [
            inputs.get(f"call_{i}", x)
            for i, x in enumerate(keras.tree.flatten(self.example))
        ]
        args, kwargs = keras.tree.pack_sequence_as(self.example, leaves)
        outputs = keras.tree.flatten(self.run(*args, **kwargs))
        losses = [
            self.loss_of(
                outputs[i], inputs[f"taught_{i}"], inputs[f"weights_{i}"]
            )
            for i in self.places
        ]
        return sum(losses)


def relative_error(outputs, taught, weights):
    taught = ops.cast(taught, "float32")
    change = ops.cast(outputs, "float32") - taught
    energy = ops.sum(ops.square(taught), axis=-1)
    # Where all outputs are zero, as after a ReLU, a share of the mean counts.
    floor = 1e-3 * ops.mean(energy) + keras.config.epsilon()
    errors = ops.sum(ops.square(change), axis=-1) / (energy + floor)
    total = ops.maximum(ops.sum(weights), 1.0)
    return ops.sum(errors * weights) / total


def root_mean_square(variable):
    """Return that of the weights that are not zero; 1 if all are."""
    weights = ops.cast(ops.stop_gradient(variable.value), "float32")
    count = ops.sum(ops.cast(ops.not_equal(weights, 0), "float32"))
    energy = ops.sum(ops.square(weights))
    return float(ops.sqrt(energy / count)) if float(count) else 1.0


class SparseAdam(keras.optimizers.Adam):
    """Adam that keeps the zeros of some variables, at rates of their own.

    A variable in 16 bits has its moments, and its value before rounding, in
    float32. (In bfloat16 the `beta_2` of Keras' Adam is 1, and all its steps
    are 0.)

    Args:
        learning_rate: As of `keras.optimizers.Adam`.
        sparse: Dict from the id of such a variable to what its rate is
            multiplied by, and a boolean tensor, where it may change, or None
            for everywhere.
    """

    def __init__(self, learning_rate, sparse):
        super().__init__(learning_rate, name="adam")
        self.sparse, self.own, self.masters = sparse, [], []
        self.places = {}

    def build(self, variables):
        super().build(variables)
        self.own = [self.sparse.get(id(v)) for v in variables]
        new = self.add_variable_from_reference
        self.masters = [
            new(v, "master") if dtypes.has_16_bits(v) else None
            for v in variables
        ]
        self.places = {
            id(v): i for i, v in enumerate(self.masters) if v is not None
        }

    def add_variable_from_reference(
        self, reference_variable, name=None, initializer="zeros"
    ):
        variable = reference_variable
        if not dtypes.has_16_bits(variable):
            new = super().add_variable_from_reference
            return new(variable, name, initializer)
        name = f"{variable.path.replace('/', '_')}_{name}"
        layout = keras_compat.layout_of(variable)
        return self.add_variable(
            variable.shape, initializer, "float32", layout=layout, name=name
        )

    def _get_variable_index(self, variable):
        if id(variable) in self.places:
            return self.places[id(variable)]
        return super()._get_variable_index(variable)

    def update_step(self, gradient, variable, learning_rate):
        place = self._get_variable_index(variable)
        # A weight that never gets a gradient stays.
        factor, kept = self.own[place] or (1.0, None)
        learning_rate = learning_rate * factor
        in_place, master = backend.current().in_place(), self.masters[place]
        if in_place is None:
            if kept is not None:
                gradient = gradient * ops.cast(kept, gradient.dtype)
            if master is None:
                super().update_step(gradient, variable, learning_rate)
                return
            whole = dtypes.restored(variable, ops.convert_to_tensor(master))
            self.assign(master, whole)
            super().update_step(gradient, master, learning_rate)
            self.assign(variable, ops.cast(master, variable.dtype))
            return
        state = [self._momentums[place], self._velocities[place]]
        if master is not None:
            state.append(master)
        # Keras' Adam adds epsilon before the correction.
        correction = 1 - self.beta_2 ** (int(self.iterations) + 1)
        rest = learning_rate, self.epsilon * correction**-0.5
        in_place.adamw(self, variable, gradient, state, *rest, kept=kept)


def is_float(x):
    """Return whether a tensor holds a vector of floats at each position."""
    dtype = keras.backend.standardize_dtype(x.dtype)
    return "float" in dtype and len(x.shape) > 1
