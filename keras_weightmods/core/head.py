"""The head of a language model, which turns hidden states into logits."""

from typing import Any

import keras
from keras import ops

from keras_weightmods.core import keras_compat
from keras_weightmods.core.reparameterized_layer import plain_view
from keras_weightmods.core.targets import Target, target_of
from keras_weightmods.core.weight_keys import weight_keys

# Operations that KerasHub's models put after the head, such as a soft cap.
_ELEMENTWISE = ("Divide", "Multiply", "Tanh", "TrueDivide")


class Head:
    """The end of a functional model, from its last hidden states to logits.

    Attributes:
        body: `keras.Model`, from the model's inputs to what enters the head.
        layers: List of the layers in the head.
        classes: Int, the size of the vocabulary.
    """

    def __init__(self, model: Any, graph: keras.Function) -> None:
        (entry,) = graph.inputs
        self.body = keras.Model(input_of(model), entry, name="body")
        self.classes = graph.outputs[0].shape[-1]
        self._entry, self._exit = id(entry), id(graph.outputs[0])
        self._nodes = keras_compat.nodes_of(graph)
        operations = [node.operation for node in self._nodes]
        self.layers = [
            each for each in operations if isinstance(each, keras.layers.Layer)
        ]

    @property
    def variables(self) -> list[keras.Variable]:
        """The variables of its layers. Changes of these have an effect."""
        found = [v for layer in self.layers for v in layer.variables]
        return list({id(variable): variable for variable in found}.values())

    def __call__(
        self, hidden: Any, training: bool = False, plain: bool = False
    ) -> Any:
        """Return the logits of any number of positions.

        This bypasses the check of a `keras.Function` that the number is that of
        the whole model.
        """
        known = {self._entry: hidden}
        for node in self._nodes:
            args, kwargs = node.arguments.fill_in(known)
            operation = plain_view(node.operation) if plain else node.operation
            call = keras_compat.graph_call(operation, training)
            known[id(node.outputs[0])] = call(*args, **kwargs)
        return known[self._exit]

    def function(
        self, variables: Any, training: bool = False, plain: bool = False
    ) -> Any:
        """Return the head as a function of hidden states and some variables.

        Args:
            variables: List of its variables. The others keep their values.
            training: Bool, whether layers are run as in training.
            plain: Bool, whether they multiply by what they store, and not by
                what their reparameterizations make of it.
        """
        named = set(map(id, variables))
        # The scope names all variables, because it hides the values that an
        # outer one holds. On TensorFlow a value is still a variable, which a
        # gradient would ask for.
        rest = [
            (v, ops.stop_gradient(v.value))
            for v in self.variables
            if id(v) not in named
        ]

        def logits(hidden: Any, *values: Any) -> Any:
            with keras.StatelessScope([*zip(variables, values), *rest]):
                return self(hidden, training, plain)

        return logits

    def compute_mask(self, mask: Any) -> Any:
        """Return the mask of the logits for the `mask` of `hidden`."""
        for node in self._nodes:
            if mask is None or node.operation not in self.layers:
                return None
            mask = node.operation.compute_mask(None, mask)
        return mask


def reversible_embeddings(model: Any) -> list[Target]:
    """Return a `Target` for the head of each reversible embedding of a model.

    If the table is tied, it is the table, contracted by the head, which
    multiplies by the transpose. Otherwise it is the kernel of the head.
    """
    keys, found = weight_keys(model), []
    for layer in keras_compat.layers_of(model):
        if isinstance(layer, keras.layers.ReversibleEmbedding):
            tied = layer.tie_weights
            name = "embeddings" if tied else "reverse_embeddings"
            if keras_compat.stored_variable(layer, name) is not None:
                found.append(target_of(layer, name, keys=keys))
    return found


def find_head(model: Any) -> Head | None:
    """Return the head of a language model; None if it is unknown.

    Known are a `ReversibleEmbedding`, or in a model with an `Embedding` a
    `Dense` without activation, and what KerasHub's models put after them.

    Args:
        model: A Keras model.

    Example:

    ```python
    import keras
    from keras_weightmods.core.head import find_head

    model = keras.Sequential(
        [
            keras.Input((None,), dtype="int32"),
            keras.layers.Embedding(7, 4),
            keras.layers.Dense(7),
        ]
    )
    head = find_head(model)
    assert head.layers == [model.layers[-1]]
    assert head.body.output.shape == (None, None, 4)
    ```
    """
    outputs = getattr(model, "outputs", None) or []
    # A user's class may do more than run its graph.
    if len(outputs) != 1 or keras_compat.graph_of(model) is None:
        return None
    (tensor,) = outputs
    while True:
        operation, inputs = keras_compat.producer(tensor)
        is_head = isinstance(operation, keras.layers.ReversibleEmbedding) or (
            isinstance(operation, keras.layers.Dense)
            and operation.activation is keras.activations.linear
            and any(
                isinstance(layer, keras.layers.Embedding)
                for layer in keras_compat.layers_of(model)
            )
        )
        if not is_head and type(operation).__name__ not in _ELEMENTWISE:
            return None
        if len(inputs) != 1 or len(inputs[0].shape) != 3:
            return None
        (tensor,) = inputs
        if is_head:
            return Head(model, keras.Function(tensor, outputs[0]))


def splittable_head(model: Any) -> Head | None:
    """Return the head of a model that can be run apart from it, or None."""
    head = find_head(model)
    if head is None or any(
        # Gradients in float16 would vanish, because they are taken before the
        # loss is scaled. Gradients of quantized layers may not be sums over
        # parts. The activity loss is a mean over the batch.
        layer.compute_dtype == "float16"
        or getattr(layer, "quantization_mode", None)
        or getattr(layer, "activity_regularizer", None)
        for layer in head.layers
    ):
        return None
    return head


def input_of(model: Any) -> Any:
    """Return the structure of a model's symbolic inputs, or None."""
    if isinstance(model, keras.Sequential):
        return model.inputs[0]
    return model.input if getattr(model, "inputs", None) else None


def output_of(model: Any) -> Any:
    """Return the structure of a functional model's symbolic outputs."""
    if isinstance(model, keras.Sequential):
        return model.outputs[0]
    return model.output
