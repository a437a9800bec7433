"""One-shot N:M sparsity: magnitude, Wanda and SparseGPT."""

import contextlib
import dataclasses
import functools
import math
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_weightmods.core import keras_private
from keras_weightmods.core.seam import is_reparameterized
from keras_weightmods.core.targets import Skipped, resolve_targets
from keras_weightmods.ops.nm import nm_project, parse_pattern
from keras_weightmods.ops.sparsegpt import (
    inverse_factor,
    reconstruction_error,
    sparsegpt,
    wanda,
)
from keras_weightmods.sparsity.calibration import (
    InputReader,
    from_stack,
    inputs_seen,
    to_stack,
    used_positions,
    without_gradients,
)
from keras_weightmods.sparsity.data import batches, preprocessed
from keras_weightmods.utils.tables import PrintsAsTable

_UNREACHED = "the data do not reach it"

METHODS = ("magnitude", "wanda", "sparsegpt")


@dataclasses.dataclass(frozen=True)
class SparsifiedKernel:
    """One kernel of a `SparsifyReport`.

    Attributes:
        key: String, place and path of the kernel in the model.
        path: String.
        shape: Tuple of ints.
        method: String, the method by which it was pruned.
        error: Float, what that changes of the layer's outputs on the
            calibration data, `|X W' - X W|^2 / |X W|^2`; None without data.
        note: String, why another method than the one asked for was taken.
    """

    key: str
    path: str
    shape: tuple[int, ...]
    method: str
    error: float | None
    note: str = ""


@dataclasses.dataclass(frozen=True)
class SparsifyReport(PrintsAsTable):
    """What `sparsify` did. Prints as a table.

    Attributes:
        pattern: String, `"n:m"`.
        method: String.
        kernels: Tuple of `SparsifiedKernel`, in the order they were pruned.
        skipped: Tuple of `Skipped(path, reason)`: kernels left dense.
    """

    pattern: str
    method: str
    kernels: tuple[SparsifiedKernel, ...]
    skipped: tuple[Skipped, ...]

    def to_dict(self):
        """The whole report as plain Python values, ready for JSON."""
        return {
            "pattern": self.pattern,
            "method": self.method,
            "kernels": [
                {**dataclasses.asdict(row), "shape": list(row.shape)}
                for row in self.kernels
            ],
            "skipped": [dataclasses.asdict(skip) for skip in self.skipped],
        }

    def __rich_console__(self, console, options):
        from rich.table import Table

        errors = [r.error for r in self.kernels if r.error is not None]
        table = Table(
            title=f"{self.pattern} by {self.method}",
            caption=f"{len(self.kernels)} kernels, {len(self.skipped)} weights "
            "left dense"
            + (f"; mean error {np.mean(errors):.1%}" if errors else ""),
        )
        table.add_column("kernel")
        for name in ("shape", "output error"):
            table.add_column(name, justify="right")
        table.add_column("note")
        for row in self.kernels:
            table.add_row(
                row.path,
                "x".join(map(str, row.shape)),
                "" if row.error is None else f"{row.error:.1%}",
                f"{row.method}: {row.note}" if row.note else "",
            )
        yield table


def sparsify(
    model,
    pattern="2:4",
    method="magnitude",
    data=None,
    targets=None,
    batch_size=8,
    damping=0.01,
    block_size=128,
    verbose=1,
):
    """Makes a model N:M sparse in one shot, in place, without training.

    - `"magnitude"` keeps the largest weights of each group.
    - `"wanda"` keeps the largest `|w| * ||x||`, x being the weight's input
      over the calibration data (arXiv 2306.11695).
    - `"sparsegpt"` keeps those whose removal costs most when the others make
      up for it, and changes the others so that they do (arXiv 2301.00774). It
      is the strongest of the three; give it some 100 rows of text or more.

    Kernels are pruned one after the other, in the order of execution, each
    for the inputs that the pruned layers before it give. Only these are kept
    between two layers: a functional model (KerasHub's, ResNets, `Sequential`)
    is gone through once, a layer or a transformer block at a time, and a
    block is run again for each kernel in it that has inputs of its own. A
    subclassed model is run again as a whole.

    For SparseGPT and Wanda a kernel with K inputs takes `4 * K**2` bytes
    while it is worked on. A copy of all targets is held to the end, for the
    case of an error.

    Args:
        model: A built `keras.Model` or layer.
        pattern: String `"n:m"` or pair of ints: n weights kept of every m.
            Defaults to `"2:4"`.
        method: `"magnitude"`, `"wanda"` or `"sparsegpt"`. Defaults to
            `"magnitude"`.
        data: What the model is calibrated on: inputs as for `predict`, as
            arrays, a `tf.data.Dataset`, a `keras.utils.PyDataset` or a
            generator of batches; pairs or triples as for `fit`, whose labels
            are ignored and whose sample weights of 0 leave positions out; or
            raw strings, for a KerasHub task with a preprocessor. With
            `"magnitude"` it serves the errors in the report alone. Defaults
            to `None`.
        targets: A list from `find_targets(model)`, or `None` for all of them.
            Defaults to `None`.
        batch_size: Int, the rows run at a time where `data` are arrays or
            strings. Defaults to `8`.
        damping: Float > 0, for `"sparsegpt"`: the share of the mean of the
            second moment's diagonal that is added to it. Defaults to `0.01`.
        block_size: Int, for `"sparsegpt"`: see
            `keras_weightmods.ops.sparsegpt.sparsegpt`. Defaults to `128`.
        verbose: 0 or 1. 0 shows no progress bar. Defaults to `1`.

    Returns:
        A `SparsifyReport`: print it for a table, or take `to_dict()`. Kernels
        whose layers' inputs cannot be read (`register_target`), or that the
        data do not reach, are pruned by magnitude; the report names them.

    Raises:
        ValueError: If an argument is outside the ranges above, `data` is
            missing, empty or endless, no target fits the pattern, a target is
            reparameterized, or an activation is not finite. The model is
            unchanged then, as it is after any other error.

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
    report = kwm.sparsify(model, "2:4", "sparsegpt", data=x, verbose=0)
    kwm.assert_sparse(model, "2:4")
    print(report)
    ```
    """
    n, m = parse_pattern(pattern)
    _check_choice("method", method, METHODS)
    for name, value in (("batch_size", batch_size), ("block_size", block_size)):
        if type(value) is not int or value < 1:
            raise ValueError(
                f"`{name}` must be an int of at least 1. "
                f"Received: {name}={value!r}"
            )
    if not (isinstance(damping, (int, float)) and 0 < damping < math.inf):
        raise ValueError(
            f"`damping` must be a positive float. Received: damping={damping!r}"
        )
    if data is None and method != "magnitude":
        raise ValueError(
            f"`method={method!r}` ranks weights by what their inputs are like "
            "and needs calibration data, about 100 rows of text or more. "
            'Pass `data=`, or take `method="magnitude"`. Received: data=None'
        )
    found = resolve_targets(model, targets)
    usable = [t for t in found if t.contraction_size % m == 0]
    skipped = [
        *found.skipped,
        *(
            Skipped(t.path, f"contraction size is no multiple of {m}")
            for t in found
            if t.contraction_size % m
        ),
    ]
    if not usable:
        raise ValueError(
            f"`sparsify` found no kernel that fits pattern {n}:{m}. "
            f"Received: targets {[(t.path, t.shape) for t in found]}, "
            f"skipped {skipped}"
        )
    taken = [t for t in usable if is_reparameterized(t.layer, t.attribute)]
    if taken:
        raise ValueError(
            "`sparsify` prunes stored kernels, which are not what these "
            f"layers compute with: {[t.path for t in taken[:5]]}. Call "
            "`kwm.fold(model)` first, or leave them out of `targets`."
        )
    calibration = None
    if data is not None:
        calibration = list(_calibration_batches(model, data, batch_size))
        if not calibration:
            raise ValueError(
                "`data` must hold one batch at least. Received: "
                f"data of type {type(data).__name__}, which is empty"
            )
    pruner = OneShot(n, m, method, damping, block_size)
    progress = keras.utils.Progbar(
        len(usable),
        unit_name="kernel",
        verbose=verbose,
        stateful_metrics=["output error"],
    )
    kernels = pruner(model, usable, calibration, progress)
    return SparsifyReport(f"{n}:{m}", method, tuple(kernels), tuple(skipped))


class OneShot:
    """The pruning that `sparsify` does, without its checks.

    Args:
        n, m, method, damping, block_size: As in `sparsify`.

    Example:

    ```python
    import keras
    from keras_weightmods import assert_sparse, find_targets
    from keras_weightmods.sparsity.sparsify import OneShot

    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    (kernel,) = OneShot(2, 4, "magnitude")(model, find_targets(model))
    assert_sparse(model, "2:4")
    ```
    """

    def __init__(self, n, m, method, damping=0.01, block_size=128):
        self.n, self.m = n, m
        self.method = method
        self.damping = damping
        self.block_size = block_size

    def __call__(self, model, targets, calibration=None, progress=None):
        """Prunes all of `targets` or, on an error, none.

        Args:
            model: A built Keras model or layer.
            targets: `Target`s of it that fit the pattern.
            calibration: List of pairs (inputs, sample weights or None).
            progress: `keras.utils.Progbar` or None.

        Returns:
            List of `SparsifiedKernel`, in the order of execution.
        """
        kernels = []

        def prune(group, moment, note=""):
            for kernel in self._prune(group, moment, note):
                kernels.append(kernel)
                if progress is not None:
                    error = kernel.error
                    progress.update(
                        len(kernels),
                        [] if error is None else [("output error", error)],
                    )

        targets = sorted(targets, key=lambda target: target.depth)
        # Copies: on torch an array shares the memory of the variable.
        before = [np.array(ops.convert_to_numpy(t.variable)) for t in targets]
        try:
            if calibration is None:
                for target in targets:
                    prune([target], None)
            else:
                self._walk(model, targets, calibration, prune)
        except BaseException:
            for target, value in zip(targets, before):
                target.variable.assign(value)
            raise
        return kernels

    def _walk(self, model, targets, calibration, prune):
        walk = _Walk(
            targets, [used_positions(weights) for _, weights in calibration]
        )
        calls: list = [
            ((keras.tree.map_structure(ops.convert_to_tensor, inputs),), {})
            for inputs, _ in calibration
        ]
        with without_gradients():
            walk.run(model, calls, prune)
        for target in walk.pending:
            prune([target], None, _UNREACHED)

    def _prune(self, group, moment, note):
        """Prunes kernels that share their inputs; yields what was done."""
        method = self.method if moment is not None else "magnitude"
        factors: list = []
        if moment is not None and not bool(ops.all(ops.isfinite(moment))):
            raise ValueError(
                "The calibration data must give finite activations. Received: "
                f"NaN or infinite ones at the input of {group[0].path}"
            )
        for target in group:
            stacks = 1 if moment is None else moment.shape[0]
            variable = target.variable
            before = to_stack(variable.value, target, stacks)
            if method == "sparsegpt" and not factors:
                factors = [
                    inverse_factor(h, self.damping)
                    for h in ops.convert_to_numpy(moment)
                ]
            after = []
            for i in range(stacks):
                if method == "sparsegpt":
                    matrix = sparsegpt(
                        before[i],
                        factors[i],
                        (self.n, self.m),
                        self.block_size,
                    )
                elif method == "wanda":
                    norms = ops.sqrt(ops.diagonal(moment[i]))
                    matrix = wanda(before[i], norms, (self.n, self.m))
                else:
                    matrix = nm_project(before[i], (self.n, self.m))
                after.append(matrix)
            after = ops.stack(after)
            error = None
            if moment is not None:
                error = _relative_error(before, after, moment)
            variable.assign(from_stack(after, target))
            yield SparsifiedKernel(
                key=target.key,
                path=target.path,
                shape=target.shape,
                method=method,
                error=error,
                note=note,
            )


class _Walk:
    """Runs all batches through a model side by side.

    Args:
        targets: List of `Target`, in the order of execution.
        used: List with an array of the positions used, or None, for each
            batch.
    """

    def __init__(self, targets, used):
        self.pending = list(targets)
        self.used = used

    def run(self, operation, calls, prune):
        """Prunes what is pending in an operation, then runs it.

        Args:
            operation: Keras operation, such as a layer or a model.
            calls: List of pairs (args, kwargs), one for each batch.
            prune: Callable from targets that share their inputs, the second
                moment of these of shape (S, K, K), or None, and a note.

        Returns:
            List of outputs, one for each call; None once nothing is pending.
        """
        inside = _layers_inside(operation)
        graph = keras_private.graph_of(operation)
        by_graph = (
            graph is not None
            and any(id(t.layer) in inside for t in self.pending)
            and all(map(_has_inputs_alone, calls))
            and self._each_once(graph)
        )
        if by_graph:
            return self._run_graph(graph, [args[0] for args, _ in calls], prune)
        call = keras_private.inference_call(operation)
        while True:
            here = [t for t in self.pending if id(t.layer) in inside]
            if not here:
                break
            self._prune_next(call, calls, here, prune)
        if not self.pending:
            return None
        return [call(*args, **kwargs) for args, kwargs in calls]

    def _each_once(self, graph):
        """Whether each pending target is in one place of the graph."""
        places = [
            _layers_inside(node.operation)
            for node in keras_private.nodes_of(graph)
        ]
        return all(
            sum(id(t.layer) in inside for inside in places) <= 1
            for t in self.pending
        )

    def _run_graph(self, graph, inputs, prune):
        nodes = keras_private.nodes_of(graph)
        last_use = {
            id(x): place
            for place, node in enumerate(nodes)
            for x in node.input_tensors
        }
        last_use.update({id(x): len(nodes) for x in graph.outputs})
        values = [
            dict(
                zip(map(id, graph.inputs), keras_private.graph_inputs(graph, x))
            )
            for x in inputs
        ]
        for place, node in enumerate(nodes):
            outputs = self.run(
                node.operation,
                [node.arguments.fill_in(known) for known in values],
                prune,
            )
            if outputs is None:
                return None
            for known, output in zip(values, outputs):
                names = map(id, node.outputs)
                known.update(zip(names, keras.tree.flatten(output)))
                for x in node.input_tensors:
                    if last_use[id(x)] == place:
                        known.pop(id(x), None)
        return [
            keras_private.graph_outputs(
                graph, [known[id(x)] for x in graph.outputs]
            )
            for known in values
        ]

    def _prune_next(self, call, calls, here, prune):
        """Prunes the first of `here`, with all that have the same inputs."""
        leader = here[0]
        reader = InputReader.of(leader)
        if reader is None:
            self._done([leader])
            name = type(leader.layer).__name__
            prune([leader], None, f"the inputs of {name} cannot be read")
            return
        shared = _SharedInputs(reader, here)
        shared.observe(call, calls, self.used)
        self._done(shared.group)
        if shared.count:
            prune(shared.group, shared.second_moment)
        else:
            prune([leader], None, _UNREACHED)

    def _done(self, group):
        gone = {id(target) for target in group}
        self.pending = [t for t in self.pending if id(t) not in gone]


class _SharedInputs:
    """Sums `X^T X` over the calls of a layer; finds who has the same X.

    Args:
        reader: The `InputReader` of the first target.
        targets: List of `Target`, the first of which counts, with those that
            turn out to share its inputs.
    """

    def __init__(self, reader, targets):
        self.reader = reader
        self.targets = [
            target
            for target in targets
            if getattr(InputReader.of(target), "layout", None) == reader.layout
        ]
        self.count = 0
        self.total: Any = None
        self.calls = [0] * len(self.targets)
        self.same = [0] * len(self.targets)
        self.inputs: Any = None
        self.used: Any = None
        self.sharing: set[int] = set()
        self.left = 0

    @property
    def group(self):
        """The targets that have the same inputs in every call so far."""
        return [self.targets[place] for place in self._places()]

    @property
    def second_moment(self):
        """Tensor of shape (S, K, K)."""
        return self.total / self.count

    def observe(self, call, calls, used):
        with contextlib.ExitStack() as stack:
            for place, target in enumerate(self.targets):
                record = functools.partial(self._record, place)
                stack.enter_context(inputs_seen(target.layer, record))
            for done, (args, kwargs) in enumerate(calls):
                # As often as in each batch so far; the first one is run to
                # its end to find out.
                expected = self.calls[0] // done if done else 0
                self.sharing = set(self._places())
                self.left = expected * len(self.sharing)
                self.used = used[done]
                with contextlib.suppress(_Enough):
                    call(*args, **kwargs)

    def _record(self, place, inputs):
        if place == 0:
            self.inputs = inputs
            rows, count = self.reader.rows(inputs, self.used)
            square = ops.matmul(ops.transpose(rows, (0, 2, 1)), rows)
            self.total = square if self.total is None else self.total + square
            self.count += count
        self.calls[place] += 1
        self.same[place] += inputs is self.inputs
        if place in self.sharing:
            self.left -= 1
            if self.left == 0:
                raise _Enough

    def _places(self):
        return [
            place
            for place, (calls, same) in enumerate(zip(self.calls, self.same))
            if same == calls == self.calls[0]
        ]


class _Enough(BaseException):
    """Ends a forward pass. Keras would add a message to an `Exception`."""


def _calibration_batches(model, data, batch_size):
    """Yields pairs of inputs and sample weights."""
    x, weights = data, None
    if isinstance(data, tuple):
        # Not of a list, which may be one of strings or of several inputs.
        x, _, weights = keras.utils.unpack_x_y_sample_weight(data)
    x, _, weights = preprocessed(model, x, None, weights)
    endless = getattr(x, "num_batches", 0) is None or (
        hasattr(x, "cardinality") and int(x.cardinality()) == -1
    )
    if endless:
        raise ValueError(
            "`data` must end. Received: endless data of type "
            f"{type(x).__name__}; take a part of it, with `.take(batches)` or "
            "`itertools.islice`"
        )
    return batches(x, batch_size, weights)


def _relative_error(before, after, moment):
    pairs = [
        reconstruction_error(before[i], after[i], moment[i])
        for i in range(moment.shape[0])
    ]
    change, whole = map(sum, zip(*pairs))
    return change / whole if whole > 0 else 0.0


def _has_inputs_alone(call):
    """Whether a call has one argument, but for masks that are not there."""
    args, kwargs = call
    rest = keras.tree.flatten(kwargs)
    return len(args) == 1 and all(value is None for value in rest)


def _layers_inside(operation):
    if not isinstance(operation, keras.layers.Layer):
        return frozenset()
    return frozenset(map(id, keras_private.layers_of(operation)))


def _check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(
            f"`{name}` must be one of {choices}. Received: {name}={value!r}"
        )
