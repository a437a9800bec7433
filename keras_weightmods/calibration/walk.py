"""One walk through a model, from target to target, on calibration data."""

import collections
import dataclasses
import functools
import math
import warnings
from typing import Any

import keras
from keras import ops

from keras_weightmods.calibration import inputs as calibration
from keras_weightmods.core import free_memory, keras_compat
from keras_weightmods.core.layer_kinds import reason_unread
from keras_weightmods.core.reparameterization import slots
from keras_weightmods.ops.sparsegpt import output_energy
from keras_weightmods.utils.report import Skipped

_METRIC = "output error"
# The most entries of a weight that are checked at once.
_ENTRIES = 2**22


@dataclasses.dataclass(frozen=True)
class Moments:
    """The second moments of the inputs of a product, and rows held out.

    Attributes:
        fit: Tensor of shape (S, K, K), over the rows that a kernel is fitted
            to.
        rows: Int, their number.
        measure: Callable to the rows held out: a tensor (rows, K) for each of
            the S matrices, or none where no such row reaches the kernel.
    """

    fit: Any
    rows: int
    measure: Any

    @functools.cached_property
    def held(self):
        """What `measure` returns.

        It is computed on first use. Until then it takes no memory beside the
        factor of `fit`. Nothing may have been changed before.
        """
        return self.measure()

    def errors(self, before, candidates):
        """Return `|X W' - X W|^2 / |X W|^2` of each candidate W'.

        Args:
            before: Tensor of shape (S, K, R), W.
            candidates: Iterable of such tensors.

        Returns:
            List of floats. X are the rows held out, or those of `fit` where
            there are none.
        """
        before = ops.cast(before, "float32")

        def energy(stack):
            if not self.held:
                return sum(map(output_energy, stack, self.fit))
            outputs = map(ops.matmul, self.held, stack)
            return sum(float(ops.sum(ops.square(y))) for y in outputs)

        whole = energy(before)
        return [
            energy(ops.cast(each, "float32") - before) / whole
            if whole > 0
            else 0.0
            for each in candidates
        ]


def change_kernels(
    model,
    targets,
    batches,
    change,
    rebuild=None,
    verbose=1,
    held=None,
    recall=None,
    stacklevel=4,
):
    """Change each of `targets`, in the order of execution.

    Args:
        model: A built Keras model or layer.
        targets: Iterable of `Target`.
        batches: List of pairs (inputs, sample weights or None) to walk on, or
            None: all targets are changed at once then, without moments.
        change: Callable from a list of targets that share their inputs, the
            `Moments` of these, or None, and a note, as `visit` of `Walk`.
            It changes them and returns or yields a row for each, with an
            attribute `error`.
        rebuild: As in `Walk`. Defaults to `None`.
        verbose: 0 or 1. 0 shows no progress bar. Defaults to `1`.
        held: List of pairs as `batches`, to measure on alone, where something
            is fitted. Defaults to `None`.
        recall: As in `Walk`, but it returns pairs of a target and its row,
            with an attribute `rows`: those that it was fitted to, or None.
            Defaults to `None`.
        stacklevel: Int, of a warning. Defaults to `4`, for what is called by
            what the user calls.

    Returns:
        List of the rows.

    Raises:
        ValueError: If inputs are not finite.
    """
    ordered = sorted(targets, key=lambda target: target.depth)
    progress = keras.utils.Progbar(
        len(ordered),
        unit_name="kernel",
        verbose=verbose,
        stateful_metrics=[_METRIC],
    )
    progress.update(0)
    rows: list[Any] = []
    few: list[str] = []

    def see(target, row, fitted):
        rows.append(row)
        errors = [] if row.error is None else [(_METRIC, row.error)]
        progress.update(len(rows), errors)
        size = target.contraction_size
        if fitted is not None and fitted < size:
            few.append(f"{target.path} ({fitted} for {size} inputs)")

    def recalled(targets):
        pairs = recall(targets) if recall else []
        for target, row in pairs:
            see(target, row, row.rows)
        return [target for target, _ in pairs]

    def visit(group, moments, note=""):
        fitted = None if moments is None else moments.rows
        for row, target in zip(change(group, moments, note), group):
            see(target, row, fitted)

    if batches is None:
        visit(ordered, None)
    else:
        walk = Walk(
            model, ordered, batches, visit, rebuild, held or (), recalled
        )
        walk()
    if few and held is not None:
        warnings.warn(
            f"{len(few)} of {len(rows)} kernels were fitted to fewer rows than "
            f"they have inputs. The first is {few[0]}. On other rows they may "
            "be far off. Pass more `data`, some 100 rows of text.",
            stacklevel=stacklevel,
        )
    return rows


def check_reached(rows, way_out):
    """Raise ValueError if the data reached no kernel at all.

    Args:
        rows: List of what `change_kernels` returns, with a `path` and a `note`.
        way_out: String, what takes no data.
    """
    if all(row.error is None for row in rows):
        left = [Skipped(row.path, row.note) for row in rows]
        raise calibration.unreached(left, way_out)


def check_stored(caller, targets):
    """Raise ValueError for a target that is reparameterized."""
    taken = [t.path for t in targets if t.attribute in slots(t.layer)]
    if taken:
        raise ValueError(
            f"`{caller}` changes stored kernels, but these layers compute "
            f"with others: {taken[:5]}. Call `kwm.fold(model)` first, "
            "or leave them out of `targets`."
        )


def check_finite(variables, way_out="Load finite weights first."):
    """Raise ValueError for weights with NaN or infinity.

    Args:
        variables: Iterable of variables.
        way_out: String, what to do then.
    """
    bad = [v.path for v in variables if not _is_finite(v.value)]
    if bad:
        raise ValueError(
            "Weights must be finite to be pruned or rounded. Received: NaN or "
            f"infinity in {len(bad)} of them, {bad[:5]}. {way_out}"
        )


def _is_finite(value):
    # At once, a table would take several times its memory.
    size = max(1, _ENTRIES // math.prod(value.shape[1:]))
    parts = (value[i : i + size] for i in range(0, value.shape[0], size))
    return all(ops.all(ops.isfinite(part)) for part in parts)


class Walk:
    """Visit each target with the inputs that it gets from the changed model.

    All batches run through the model side by side. A change of a kernel by
    `visit` shows in the inputs of later kernels.

    Args:
        model: A built Keras model or layer.
        targets: List of `Target`, in the order of execution.
        batches: List of pairs (inputs, sample weights or None).
        visit: Callable from a list of targets that share their inputs, the
            `Moments` of these, and a note. Where there are no moments,
            `None`, the note says why.
        rebuild: Callable for each operation (layer or block) once its
            targets have been visited, from the operation, these targets, and
            for `batches` and for `held` a triple of lists: its calls, the
            outputs that it would have in the unchanged model, and the
            positions that count. Its changes are in the inputs of the
            later ones, too. A model that cannot be entered is no block, if
            it is the only one of its class: a warning says why. Defaults to
            `None`.
        held: List of pairs as `batches`, on which nothing is fitted.
            Defaults to none.
        recall: Callable from the pending targets of an operation to those
            that it has changed as an earlier walk did: the others are visited.
            With `rebuild` these are all or none. Defaults to none.
    """

    def __init__(
        self,
        model,
        targets,
        batches,
        visit,
        rebuild=None,
        held=(),
        recall=lambda targets: [],
    ):
        self.model, self.fitted = model, len(batches)
        self.batches = [*batches, *held]
        self.pending = list(targets)
        self.used = [calibration.used_positions(w) for _, w in self.batches]
        self.visit, self.rebuild, self.recall = visit, rebuild, recall

    def __call__(self):
        """Go through the model once."""
        model = self.model
        inputs = [x for x, _ in self.batches]
        inputs = keras.tree.map_structure(ops.convert_to_tensor, inputs)
        calls: list[Any] = [((x,), {}) for x in inputs]
        if self.rebuild is not None:
            if keras_compat.graph_of(model) is None:
                raise ValueError(
                    "Blocks are found in the graph of a functional model. "
                    f"Received: {model.name!r} of type {type(model).__name__}, "
                    "which has none. Leave 'blocks' out of `refine`."
                )
            # The values of the unchanged model are computed alongside.
            calls *= 2
        with calibration.eager_forward():
            self.run(model, calls)
        for target in self.pending:
            self.visit([target], None, calibration.UNREACHED)

    def run(self, operation, calls, is_repeated=False):
        """Visit the pending targets of an operation, then run it.

        Args:
            operation: Keras operation, such as a layer or a model.
            calls: List of pairs (args, kwargs), one for each batch; with
                `rebuild` the same again for the unchanged model.
            is_repeated: Bool, whether the graph that it is in calls others of
                its class.

        Returns:
            List of outputs, one for each call; None once nothing is pending.
        """
        inside = _layers_inside(operation)
        targets = [t for t in self.pending if id(t.layer) in inside]
        graph = keras_compat.graph_of(operation)
        inputs = [keras_compat.inputs_alone(*call) for call in calls]
        reason = ""
        if graph is None:
            reason = "it is no functional model"
        elif any(each is None for each in inputs):
            reason = "it is called on more than its inputs"
        elif not _each_once(graph, targets):
            reason = "one of its layers is called several times"
        elif targets:
            return self._run_graph(graph, inputs)
        call = keras_compat.graph_call(operation)

        def outputs_of(calls):
            return [call(*args, **kwargs) for args, kwargs in calls]

        own, taught = calls[: len(self.batches)], calls[len(self.batches) :]
        # The inputs in the unchanged model are not needed again. The caller has
        # let them go.
        del calls[len(self.batches) :], inputs
        taught = outputs_of(taught)
        known = self.recall(targets)
        targets = [t for t in targets if t not in known]
        self.pending = [t for t in self.pending if t not in known]
        while here := [t for t in self.pending if id(t.layer) in inside]:
            self._visit_next(call, own, here)
        if targets and self.rebuild is not None:
            if isinstance(operation, keras.Model) and not is_repeated:
                warnings.warn(
                    f"The blocks of {operation.name!r}, with {len(targets)} "
                    "kernels, were not trained. They are not found, since "
                    f"{reason}.",
                    stacklevel=2,
                )
            else:
                lists = own, taught, self.used
                place = self.fitted
                fit, held = (
                    [each[part] for each in lists]
                    for part in (slice(place), slice(place, None))
                )
                self.rebuild(operation, targets, fit, held)
        if not self.pending:
            return None
        return outputs_of(own) + taught

    def _run_graph(self, graph, inputs):
        nodes = keras_compat.nodes_of(graph)
        last_use = {
            id(x): place
            for place, node in enumerate(nodes)
            for x in node.input_tensors
        }
        last_use.update({id(x): len(nodes) for x in graph.outputs})
        values = [
            dict(zip(map(id, graph.inputs), flat))
            for flat in (keras_compat.graph_inputs(graph, x) for x in inputs)
        ]
        classes = collections.Counter(type(node.operation) for node in nodes)
        for place, node in enumerate(nodes):
            calls = [node.arguments.fill_in(known) for known in values]
            for x in node.input_tensors:
                if last_use[id(x)] == place:
                    for known in values:
                        known.pop(id(x), None)
            is_repeated = classes[type(node.operation)] > 1
            outputs = self.run(node.operation, calls, is_repeated)
            if outputs is None:
                return None
            for known, output in zip(values, outputs):
                flat = keras.tree.flatten(output)
                known.update(zip(map(id, node.outputs), flat))
        return [
            keras_compat.graph_outputs(
                graph, [known[id(x)] for x in graph.outputs]
            )
            for known in values
        ]

    def _visit_next(self, call, calls, here):
        """Visit the first of `here`, with those that have its inputs."""
        # Each kernel takes several large arrays.
        free_memory.give_back()
        leader = here[0]
        group, moments = [leader], None
        note = reason_unread(leader.layer, leader.attribute)
        if note is None:
            here = [t for t in here if not reason_unread(t.layer, t.attribute)]
            group, moments = self._shared_inputs(call, calls, here)
            note = calibration.UNREACHED
            if moments is not None:
                note = _idle_note(moments.fit)
        else:
            note = f"its inputs cannot be read: {note}"
        self.pending = [t for t in self.pending if t not in group]
        free_memory.give_back()
        with calibration.compiled():
            self.visit(group, moments, note)

    def _shared_inputs(self, call, calls, targets):
        """Return the first of `targets`, with those that have its inputs.

        And their `Moments`; None if there was no call.
        """
        first = None
        # {place of a target: its calls, and those with the same inputs}.
        count, same = [0] * len(targets), [0] * len(targets)

        def compare(place, rows):
            nonlocal first
            if place == 0:
                first = rows
            count[place] += 1
            same[place] += first is not None and rows.same(first)

        def places():
            return [i for i, n in enumerate(count) if same[i] == n == count[0]]

        calls = [(batch, *each) for batch, each in enumerate(calls)]
        fit, held = calls[: self.fitted], calls[self.fitted :]
        moment, rows = self._moment(call, fit, targets, compare, places)
        group = [targets[place] for place in places()]
        if moment is None:
            return group, None

        def measure():
            parts = []

            def see(place, rows, batch):
                parts.append(rows.matrices(self.used[batch]))

            own = targets[:1]
            with calibration.eager_forward():
                calibration.see_calls(self.model, own, call, held, see)
            found = [ops.concatenate(each) for each in zip(*parts)]
            _check_activations(found, targets[0])
            return found

        return group, Moments(moment, rows, measure)

    def _moment(self, call, calls, targets, compare, needed):
        """Return the mean moment at the first target, and the rows of it."""
        total, number = 0.0, 0

        def see(place, rows, batch):
            nonlocal total, number
            if place == 0:
                moment, seen = rows.moment(self.used[batch])
                total += moment
                number += seen
            compare(place, rows)

        calibration.see_calls(self.model, targets, call, calls, see, needed)
        if not number:
            return None, 0
        total = total / number
        _check_activations(total, targets[0])
        return total, number


def _check_activations(matrices, target):
    if not all(map(_is_finite, matrices)):
        raise ValueError(
            "The calibration data must give finite activations. Received: NaN "
            f"or infinite ones at the input of {target.path}"
        )


def _idle_note(moment):
    """Say how many experts saw no token."""
    if len(moment) == 1:
        return ""
    energy = ops.convert_to_numpy(ops.sum(ops.diagonal(moment, 0, 1, 2), 1))
    idle = int((energy == 0).sum())
    if not idle:
        return ""
    return (
        f"{idle} of its {len(moment)} matrices had no input but zeros, and go "
        "by magnitude"
    )


def _each_once(graph, targets):
    """Whether each target is in one place of the graph."""
    nodes = keras_compat.nodes_of(graph)
    places = [_layers_inside(node.operation) for node in nodes]
    return all(
        sum(id(target.layer) in inside for inside in places) <= 1
        for target in targets
    )


def _layers_inside(operation):
    if not isinstance(operation, keras.layers.Layer):
        return frozenset()
    return frozenset(map(id, keras_compat.layers_of(operation)))
