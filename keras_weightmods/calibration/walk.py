"""Going through a model once, from target to target, on calibration data."""

from typing import Any

import keras
from keras import ops

from keras_weightmods.calibration import inputs as calibration
from keras_weightmods.core import keras_compat
from keras_weightmods.core.layer_kinds import reason_unread
from keras_weightmods.core.reparameterization import slots
from keras_weightmods.core.restored import RestoredOnError

_UNREACHED = "the data do not reach it"
_METRIC = "output error"


def change_kernels(model, targets, batches, change, rebuild=None, verbose=1):
    """Change each of `targets`, in the order of execution, or none.

    Args:
        model: A built Keras model or layer.
        targets: Iterable of `Target`.
        batches: List of pairs (inputs, sample weights or None) to walk on, or
            None: all targets are changed at once then, without a moment.
        change: Callable from a list of targets that share their inputs, the
            second moment of these, or None, and a note, as `visit` of `Walk`.
            It changes them and returns or yields a row for each, with an
            attribute `error`.
        rebuild: As in `Walk`. Defaults to `None`.
        verbose: 0 or 1. 0 shows no progress bar. Defaults to `1`.

    Returns:
        List of the rows.

    Raises:
        ValueError: If inputs are not finite. All targets are as they were
            then, as they are after any other error.
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

    def visit(group, moment, note=""):
        if moment is not None and not bool(ops.all(ops.isfinite(moment))):
            raise ValueError(
                "The calibration data must give finite activations. Received: "
                f"NaN or infinite ones at the input of {group[0].path}"
            )
        for row in change(group, moment, note):
            rows.append(row)
            errors = [] if moment is None else [(_METRIC, row.error)]
            progress.update(len(rows), errors)

    changed = [target.variable for target in ordered]
    with RestoredOnError(model, values=changed):
        if batches is None:
            visit(ordered, None)
        else:
            Walk(model, ordered, batches, visit, rebuild)()
    return rows


def check_stored(caller, targets):
    """Raise ValueError for a target that is reparameterized."""
    taken = [t.path for t in targets if t.attribute in slots(t.layer)]
    if taken:
        raise ValueError(
            f"`{caller}` changes stored kernels, which are not what these "
            f"layers compute with: {taken[:5]}. Call `kwm.fold(model)` first, "
            "or leave them out of `targets`."
        )


def check_finite(variables, way_out="Load finite weights first."):
    """Raise ValueError for weights with NaN or infinity.

    Args:
        variables: Iterable of variables.
        way_out: String, what to do then.
    """
    bad = [v.path for v in variables if not ops.all(ops.isfinite(v.value))]
    if bad:
        raise ValueError(
            "Weights must be finite to be pruned or rounded. Received: NaN or "
            f"infinity in {len(bad)} of them, {bad[:5]}. {way_out}"
        )


class Walk:
    """Visits each target with the inputs that the model has for it by then.

    All batches run through the model side by side. What `visit` changes in a
    kernel is in the inputs of the later ones.

    Args:
        model: A built Keras model or layer.
        targets: List of `Target`, in the order of execution.
        batches: List of pairs (inputs, sample weights or None).
        visit: Callable from a list of targets that share their inputs, the
            second moment of these, of shape (S, K, K), and a note. Where
            there is no moment, `None`, the note says why.
        rebuild: Callable for each operation (layer or block) once its
            targets have been visited, from the operation, these targets, its
            calls, the outputs that it would have in the unchanged model, and
            the positions that count. Its changes are in the inputs of the
            later ones, too. Defaults to `None`.
    """

    def __init__(self, model, targets, batches, visit, rebuild=None):
        self.model, self.batches = model, batches
        self.pending = list(targets)
        self.used = [calibration.used_positions(w) for _, w in batches]
        self.visit, self.rebuild = visit, rebuild

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
            # What the unchanged model computes runs beside it.
            calls *= 2
        with calibration.eager_forward():
            self.run(model, calls)
        for target in self.pending:
            self.visit([target], None, _UNREACHED)

    def run(self, operation, calls):
        """Visit what is pending in an operation, then run it.

        Args:
            operation: Keras operation, such as a layer or a model.
            calls: List of pairs (args, kwargs), one for each batch; with
                `rebuild` the same again for the unchanged model.

        Returns:
            List of outputs, one for each call; None once nothing is pending.
        """
        inside = _layers_inside(operation)
        targets = [t for t in self.pending if id(t.layer) in inside]
        graph = keras_compat.graph_of(operation)
        if (
            targets
            and graph is not None
            and all(map(_has_inputs_alone, calls))
            and _each_once(graph, targets)
        ):
            return self._run_graph(graph, [args[0] for args, _ in calls])
        call = keras_compat.graph_call(operation)

        def outputs_of(calls):
            return [call(*args, **kwargs) for args, kwargs in calls]

        own, taught = calls[: len(self.batches)], calls[len(self.batches) :]
        taught = outputs_of(taught)
        while here := [t for t in self.pending if id(t.layer) in inside]:
            self._visit_next(call, own, here)
        if targets and self.rebuild is not None:
            self.rebuild(operation, targets, own, taught, self.used)
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
        for place, node in enumerate(nodes):
            calls = [node.arguments.fill_in(known) for known in values]
            outputs = self.run(node.operation, calls)
            if outputs is None:
                return None
            for known, output in zip(values, outputs):
                flat = keras.tree.flatten(output)
                known.update(zip(map(id, node.outputs), flat))
                for x in node.input_tensors:
                    if last_use[id(x)] == place:
                        known.pop(id(x), None)
        return [
            keras_compat.graph_outputs(
                graph, [known[id(x)] for x in graph.outputs]
            )
            for known in values
        ]

    def _visit_next(self, call, calls, here):
        """Visit the first of `here`, with all that have the same inputs."""
        leader = here[0]
        group, moment = [leader], None
        note = reason_unread(leader.layer, leader.attribute)
        if note is None:
            here = [t for t in here if not reason_unread(t.layer, t.attribute)]
            group, moment = self._shared_inputs(call, calls, here)
            note = _UNREACHED if moment is None else _idle_note(moment)
        else:
            note = f"its inputs cannot be read: {note}"
        self.pending = [t for t in self.pending if t not in group]
        with calibration.compiled():
            self.visit(group, moment, note)

    def _shared_inputs(self, call, calls, targets):
        """Return the first of `targets`, with those that have its inputs.

        And the second moment of these, of shape (S, K, K); None if there was
        no call.
        """
        total, rows_seen, first = 0.0, 0, None
        # By the place of a target: its calls, and those with the same inputs.
        count, same = [0] * len(targets), [0] * len(targets)

        def see(place, rows, used):
            nonlocal total, rows_seen, first
            if place == 0:
                first = rows
                moment, number = rows.moment(used)
                total += moment
                rows_seen += number
            count[place] += 1
            same[place] += first is not None and rows.same(first)

        def places():
            return [i for i, n in enumerate(count) if same[i] == n == count[0]]

        calls = [(used, *each) for used, each in zip(self.used, calls)]
        calibration.see_calls(self.model, targets, call, calls, see, places)
        group = [targets[place] for place in places()]
        return group, total / rows_seen if rows_seen else None


def _idle_note(moment):
    """Say of how many experts no token was seen."""
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


def _has_inputs_alone(call):
    """Whether a call has one argument, but for masks that are not there."""
    args, kwargs = call
    rest = keras.tree.flatten(kwargs)
    return len(args) == 1 and all(value is None for value in rest)


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
