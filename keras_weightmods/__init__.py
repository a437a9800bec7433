"""Changes to a Keras model's weights, on JAX, TensorFlow and torch.

Importing this package loads neither Keras nor a backend. A public name is
loaded when it is first used. Our classes, such as `AdamS`, register with Keras
at the first use of a public name, or at once if Keras is already imported.
Keras can then read files that contain them.
"""

import ast
import difflib
import importlib
import pathlib
import sys

from keras_weightmods.version import __version__ as __version__


def _public_names():
    """Return {public name: (its module, its name there)}, as in the stub.

    Type checkers and editors read the stub too, so each name stands once.
    """
    stub = pathlib.Path(__file__).with_name("__init__.pyi").read_text()
    return {
        alias.asname: (statement.module, alias.name)
        for statement in ast.parse(stub).body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }


_NAMES = _public_names()
__all__ = [*_NAMES]
# Importing these registers classes with Keras, or reparameterizations for
# `load_model`.
_REGISTERED = (
    *("AdamS", "CAST", "CompanderDense", "CompanderOptimizer"),
    *("MaskedOptimizer", "SemiStructuredSparse", "SparseAdamW"),
    *("pack", "attach_scaling", "attach_weight_norm"),
)
# Names that other libraries use for the same thing.
_OTHER_WORDS = {
    "prune": "sparsify",
    "quantize_sparse": "quantize",
    "load": "load_model",
    "save": "save_model",
}


def __getattr__(name):
    if name not in _NAMES:
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(f"{message}{_suggestion(name)}")
    value = _load(name)
    for other in _REGISTERED:
        _load(other)
    return value


def __dir__():
    return sorted({*globals(), *_NAMES})


def _load(name):
    if name not in globals():
        module, attribute = _NAMES[name]
        found = importlib.import_module(f"{__name__}.{module or attribute}")
        globals()[name] = getattr(found, attribute) if module else found
    return globals()[name]


def _suggestion(name):
    """Return the end of an error message: the name that may be meant."""
    if name.startswith("_"):
        return ""
    if name.endswith("Report"):
        return f". Reports are in `{__name__}.reports`."
    close = difflib.get_close_matches(name, _NAMES, 1)
    meant = _OTHER_WORDS.get(name) or "".join(close)
    return f". Did you mean: {meant!r}?" if meant in _NAMES else ""


if "keras" in sys.modules:
    for _name in _REGISTERED:
        _load(_name)
