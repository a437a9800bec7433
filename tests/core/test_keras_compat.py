import ast
import pathlib
import re

import keras
import numpy as np
import pytest

import keras_weightmods
from keras_weightmods.core import keras_compat
from tests import models
from tests.core.layers import built

one_backend = pytest.mark.one_backend
ROOT = pathlib.Path(keras_weightmods.__file__).parent
TREES = {
    file.relative_to(ROOT).as_posix(): ast.parse(file.read_text())
    for file in ROOT.rglob("*.py")
}
# What the package may touch elsewhere, with the reason.
ALLOWED = {
    # The update of AdamS on torch: `optimizer` is what calls it, an AdamS.
    "backend/torch/in_place.py": {"_get_variable_index"},
    # An attribute of torch's tensors, and torch's cuSPARSELt.
    "backend/torch/sparse_matmul_gpu.py": {
        "_cslt_compress",
        "_cslt_sparse_mm",
        "_version",
    },
    # A dataclass of the package.
    "packing/packed_parameters.py": {"vars"},
}


def of_keras(name):
    classes = keras.Sequential, keras.optimizers.Optimizer, keras.Variable
    classes += keras.KerasTensor, keras.callbacks.Callback
    return any(hasattr(cls, name) for cls in classes)


def own_names(trees):
    names = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        match node:
            case (
                ast.FunctionDef(name=name)
                | ast.AnnAssign(target=ast.Name(id=name))
                | ast.Attribute(ast.Name("self" | "cls"), name, ast.Store())
            ):
                names.add(name)
    return {name for name in names if not of_keras(name)}


def read_names(tree):
    for node in ast.walk(tree):
        match node:
            case ast.Import(names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(str(name)):
                yield name
            case ast.Attribute(
                ast.Name("self" | "cls") | ast.Call(ast.Name("super"))
            ):
                pass
            case ast.Attribute(ast.Name("keras" | "object" as owner), name):
                yield f"{owner}.{name}"
            case (
                ast.Attribute(_, name)
                | ast.Call(
                    ast.Name("getattr" | "setattr" | "hasattr"),
                    [_, ast.Constant(str(name)), *_],
                )
                | ast.Call(ast.Name("vars" as name))
            ):
                yield name


def touched(tree, own=()):
    return {
        name
        for name in read_names(tree)
        if name.startswith("keras.src")
        or name in ("vars", "__dict__", "object.__setattr__")
        or (
            name.startswith("_") and not name.endswith("__") and name not in own
        )
    }


@one_backend
def test_private_keras_is_in_one_folder():
    own = own_names(TREES.values())
    found = {}
    for name, tree in TREES.items():
        names = touched(tree, own) - ALLOWED.get(name, set())
        if name.startswith(("backend/", "native/")):
            # Private attributes of the backend's own library.
            names = {n for n in names if n.startswith("keras") or of_keras(n)}
        if names:
            found[name] = names
    assert {str(pathlib.Path(name).parent) for name in found} == {
        "core/keras_compat"
    }


@one_backend
def test_upstream_names_all_that_is_private():
    text = (ROOT.parent / "docs" / "upstream.md").read_text()
    named = set(re.findall(r"`(\w+)`", text.replace("\n", " ")))
    public = set()
    trees = [t for name, t in TREES.items() if "/keras_compat/" in name]
    for node in (node for tree in trees for node in tree.body):
        match node:
            case ast.FunctionDef(name=name) | ast.Assign([ast.Name(name)]):
                public.add(name)
            case ast.ImportFrom(names=names):
                public |= {each.asname for each in names if each.asname}
    assert len(public) > 40
    assert public - named == set()


# Ways to reach what runs, to change what is imported, or what others define.
FORBIDDEN = re.compile(
    r"\b(meta_path|path_hooks|currentframe|_getframe|f_locals|f_back|f_globals"
    r"|settrace|setprofile|FunctionType|CodeType|__code__|__globals__"
    r"|_initializing)\b"
    r"|^ *(keras|keras_hub|tf|tensorflow|torch|jax|sys|builtins)(\.\w+)+ = ",
    re.MULTILINE,
)


@one_backend
def test_nothing_of_others_is_replaced():
    for file in ROOT.rglob("*.py"):
        assert not FORBIDDEN.search(file.read_text()), file


@one_backend
def test_the_checks_find():
    for text in (
        "import keras\nkeras.layers.Dense.call = f",
        "import tensorflow as tf\ntf.random.shuffle = f",
        "import sys\nsys.meta_path.insert(0, f)",
        "import inspect\ninspect.currentframe()",
        "getattr(f, '__code__')",
    ):
        assert FORBIDDEN.search(text)
    for text in (
        "from keras.src import tree",
        "import keras.src.backend",
        "keras.src.tree",
        "layer._kernel",
        "getattr(layer, '_kernel', None)",
        "vars(layer)['call'] = 0",
        "layer.__dict__",
        "object.__setattr__(layer, 'call', 0)",
        "model.optimizer._iterations",
    ):
        assert touched(ast.parse(text))


def test_a_variable_leaves_and_comes_back():
    layer = built(keras.layers.Dense(2), 3)
    kernel, bias = layer.weights
    value = keras.ops.convert_to_numpy(kernel)
    place = keras_compat.remove_variable(layer, kernel, "_kernel")
    keras_compat.release_value(kernel, "gone until then")
    assert layer.weights == [bias]
    assert not keras_compat.has_value(kernel)
    with pytest.raises(ValueError, match="gone until then"):
        keras.ops.convert_to_numpy(kernel)
    keras_compat.restore_value(kernel, value)
    keras_compat.put_variable_back(layer, kernel, place)
    assert [id(v) for v in layer.weights] == [id(kernel), id(bias)]
    assert (keras.ops.convert_to_numpy(kernel) == value).all()
    with pytest.raises(ValueError, match="cannot add new"):
        layer.extra = keras.Variable(1.0)


@one_backend
def test_the_names_of_layers_are_as_if_none_was_made():
    keras_compat.layers_of(keras.Sequential())
    with keras_compat.without_traces():
        inside = keras.layers.Dense(2).name
    assert keras.layers.Dense(2).name == inside


@one_backend
def test_each_call_of_nested_graphs_is_wrapped():
    """Also of the model in a language model of KerasHub."""
    wrapped = []

    def wrap(call):
        wrapped.append(call)
        return call

    ids = np.ones((2, 12), "int32")
    texts = {"token_ids": ids, "padding_mask": ids}
    for model, x, count in (
        # Two models of a layer each, two sums and the last layer.
        (models.nested_net(), models.normal(2, 8), 5),
        # Embedding, block, norm and head.
        (models.causal_lm("llama"), texts, 4),
    ):
        x = keras.tree.map_structure(keras.ops.convert_to_tensor, x)
        wrapped.clear()
        found = keras_compat.wrapped_call(model, wrap)(x)
        models.assert_same([models.numpy(found)], [models.numpy(model(x))])
        assert len(wrapped) == count


@one_backend
def test_wrapped_calls_have_the_precision_of_their_model():
    """Keras casts the weights of a layer outside of a model in another way."""

    class Seen(keras.layers.Embedding):
        def call(self, inputs):
            dtype = self.embeddings.value.dtype
            types.append(keras.backend.standardize_dtype(dtype))
            return super().call(inputs)

    types: list[str] = []
    layer = Seen(5, 4, dtype="mixed_bfloat16")
    inputs = keras.Input((3,))
    inner = keras.Model(inputs, layer(inputs))
    inner.dtype_policy = "mixed_bfloat16"
    model = keras.Model(inputs, inner(inputs))
    x = keras.ops.ones((2, 3))
    types.clear()
    model(x)
    keras_compat.wrapped_call(model, lambda call: call)(x)
    assert len(types) == 2
    assert types[0] == types[1]
