"""Whether an error says what was wrong, in words that someone wrote for it."""

import ast
import functools
import pathlib
import traceback

import keras

import keras_weightmods

_OURS = str(pathlib.Path(keras_weightmods.__file__).parent)
_ROOT = f"{pathlib.Path(__file__).absolute().parent.parent.parent}/"
_KERAS = str(pathlib.Path(keras.__file__).parent)
# Characters of an error of ours, at most.
_MOST = 2000
# What Python raises by itself, whoever the error is for.
_OBSCURE = (AttributeError, LookupError, MemoryError, NameError, RecursionError)


def why_obscure(error, argument=None):
    """Return why an error is none to show to a user, or None.

    One that Keras raises is good enough if it names the argument that was
    wrong, or what was expected.
    """
    if isinstance(error, _OBSCURE):
        return summary(error)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    is_raised = _raises(frame.filename, frame.lineno)
    if is_raised and frame.filename.startswith(_OURS):
        is_long = len(str(error)) > _MOST
        return f"{len(str(error))} characters" if is_long else None
    text = str(error).lower()
    # Keras leaves its own frames out of what is raised in a layer's call.
    of_keras = "exception encountered when calling" in text
    of_keras |= is_raised and frame.filename.startswith(_KERAS)
    words = (argument or "expected", "expected", "incompatible")
    if of_keras and any(word in text for word in words):
        return None
    if isinstance(error, OSError) and error.filename is not None:
        return None
    return summary(error)


def summary(error):
    """Return an error and where it comes from, in a line."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if frame.filename.startswith(_OURS)]
    places = [
        f"{frame.filename.removeprefix(_ROOT)[-40:]}:{frame.lineno}"
        for frame in (*ours[-1:], frames[-1])
    ]
    text = " ".join(str(error).split())[:160]
    return f"{type(error).__name__}: {text} ({' > '.join(places)})"


def _raises(filename, line):
    return any(first <= line <= last for first, last in _raise_lines(filename))


@functools.cache
def _raise_lines(filename):
    """Return (first, last) line of each `raise` of a new error in a file."""
    try:
        tree = ast.parse(pathlib.Path(filename).read_text())
    except (OSError, SyntaxError):
        return []
    return [
        (node.lineno, node.end_lineno)
        for node in ast.walk(tree)
        if isinstance(node, ast.Raise) and node.exc is not None
    ]
