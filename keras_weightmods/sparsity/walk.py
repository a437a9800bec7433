"""Going through a model once, from target to target, on calibration data."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_weightmods.core import keras_private
from keras_weightmods.core.targets import Target
from keras_weightmods.sparsity.calibration import (
    InputReader,
    inputs_seen,
    used_positions,
    without_gradients,
)

_UNREACHED = "the data do not reach it"


class Walk:
    """Visits each target with the inputs that the model has for it by then.

    All batches run through the model side by side. What `visit` changes in a
    kernel is in the inputs of the later ones.

    Args:
        targets: List of `Target`, in the order of execution.
        batches: List of pairs (inputs, sample weights or None).
        visit: Callable from a list of targets that share their inputs, the
            second moment of these, of shape (S, K, K), and a note. Where
            there is no moment, `None`, the note says why.
    """

    def __init__(
        self,
        targets: list[Target],
        batches: list[tuple[Any, Any]],
        visit: Callable[[list[Target], Any, str], None],
    ) -> None:
        self.pending = list(targets)
        self.batches = batches
        self.used = [used_positions(weights) for _, weights in batches]
        self.visit = visit

    def __call__(self, model: keras.layers.Layer) -> None:
        """Go through `model`, a built Keras model or layer, once."""
        calls: list[Any] = [
            ((keras.tree.map_structure(ops.convert_to_tensor, inputs),), {})
            for inputs, _ in self.batches
        ]
        with without_gradients():
            self.run(model, calls)
        for target in self.pending:
            self.visit([target], None, _UNREACHED)

    def run(self, operation: Any, calls: list[Any]) -> list[Any] | None:
        """Visit what is pending in an operation, then run it.

        Args:
            operation: Keras operation, such as a layer or a model.
            calls: List of pairs (args, kwargs), one for each batch.

        Returns:
            List of outputs, one for each call; None once nothing is pending.
        """
        inside = _layers_inside(operation)
        graph = keras_private.graph_of(operation)
        if (
            graph is not None
            and any(id(t.layer) in inside for t in self.pending)
            and all(map(_has_inputs_alone, calls))
            and self._each_once(graph)
        ):
            return self._run_graph(graph, [args[0] for args, _ in calls])
        call = keras_private.inference_call(operation)
        while here := [t for t in self.pending if id(t.layer) in inside]:
            self._visit_next(call, calls, here)
        if not self.pending:
            return None
        return [call(*args, **kwargs) for args, kwargs in calls]

    def _each_once(self, graph: Any) -> bool:
        """Whether each pending target is in one place of the graph."""
        nodes = keras_private.nodes_of(graph)
        places = [_layers_inside(node.operation) for node in nodes]
        return all(
            sum(id(t.layer) in inside for inside in places) <= 1
            for t in self.pending
        )

    def _run_graph(self, graph: Any, inputs: list[Any]) -> list[Any] | None:
        nodes = keras_private.nodes_of(graph)
        last_use = {
            id(x): place
            for place, node in enumerate(nodes)
            for x in node.input_tensors
        }
        last_use.update({id(x): len(nodes) for x in graph.outputs})
        values = [
            dict(zip(map(id, graph.inputs), flat))
            for flat in (keras_private.graph_inputs(graph, x) for x in inputs)
        ]
        for place, node in enumerate(nodes):
            outputs = self.run(
                node.operation,
                [node.arguments.fill_in(known) for known in values],
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

    def _visit_next(self, call: Any, calls: list[Any], here: Any) -> None:
        """Visit the first of `here`, with all that have the same inputs."""
        leader = here[0]
        reader = InputReader.of(leader)
        group, moment = [leader], None
        note = f"the inputs of {type(leader.layer).__name__} cannot be read"
        if reader is not None:
            shared = SharedInputs(reader, here)
            shared.observe(call, calls, self.used)
            group, moment = shared.group, shared.second_moment
            note = _UNREACHED if moment is None else ""
        self.pending = [t for t in self.pending if t not in group]
        self.visit(group, moment, note)


class SharedInputs:
    """Sums `X^T X` over the calls of a layer; finds who has the same X.

    Args:
        reader: The `InputReader` of the first target.
        targets: List of `Target`, the first of which counts, with those that
            turn out to share its inputs.
    """

    def __init__(self, reader: InputReader, targets: list[Target]) -> None:
        self.reader = reader
        self.targets = [
            target
            for target in targets
            if getattr(InputReader.of(target), "layout", None) == reader.layout
        ]
        self.count = 0
        self.total: Any = 0.0
        self.inputs: Any = None
        self.used: np.ndarray | None = None
        # Of each target: calls, those with the inputs of the first target,
        # and the place of the last one among all calls of a batch.
        self.calls = [0] * len(self.targets)
        self.same = [0] * len(self.targets)
        self.last = [0] * len(self.targets)
        self.seen = 0
        self.enough: int | None = None

    @property
    def group(self) -> list[Target]:
        """The targets that have the same inputs in every call so far."""
        return [self.targets[place] for place in self.places()]

    @property
    def second_moment(self) -> Any:
        """Tensor of shape (S, K, K); None if there was no call."""
        return self.total / self.count if self.count else None

    def observe(self, call: Any, calls: list[Any], used: list[Any]) -> None:
        """Run the calls, each to where all that is to be seen has been."""
        with contextlib.ExitStack() as stack:
            for place, target in enumerate(self.targets):
                see = functools.partial(self._see, place)
                stack.enter_context(inputs_seen(target.layer, see))
            for self.used, (args, kwargs) in zip(used, calls):
                self.seen = 0
                with contextlib.suppress(_Enough):
                    call(*args, **kwargs)
                if self.enough is None:
                    # The first batch is run to its end to find out.
                    self.enough = max(self.last[i] for i in self.places())

    def places(self) -> list[int]:
        """Return the places of `group` among the targets."""
        return [
            place
            for place, (calls, same) in enumerate(zip(self.calls, self.same))
            if same == calls == self.calls[0]
        ]

    def _see(self, place: int, inputs: Any) -> None:
        if place == 0:
            self.inputs = inputs
            rows, count = self.reader.rows(inputs, self.used)
            square = ops.matmul(ops.transpose(rows, (0, 2, 1)), rows)
            self.total = self.total + square
            self.count += count
        self.calls[place] += 1
        self.same[place] += inputs is self.inputs
        self.seen += 1
        self.last[place] = self.seen
        if self.seen == self.enough:
            raise _Enough


class _Enough(BaseException):
    """Ends a forward pass where all that is to be seen has been.

    The rest of a block, up to half of the time, would be computed for
    nothing, and there is no other way out of the code of a layer. Not an
    `Exception`, which Keras would rewrite at each level and a layer may catch.
    """


def _has_inputs_alone(call: Any) -> bool:
    """Whether a call has one argument, but for masks that are not there."""
    args, kwargs = call
    rest = keras.tree.flatten(kwargs)
    return len(args) == 1 and all(value is None for value in rest)


def _layers_inside(operation: Any) -> frozenset[int]:
    if not isinstance(operation, keras.layers.Layer):
        return frozenset()
    return frozenset(map(id, keras_private.layers_of(operation)))
