"""A tour of the library: nothing of Keras or a backend is replaced by it.

Not for a moment: a second thread compares all classes and modules while each
method runs.
"""

import contextlib
import dataclasses
import threading
import time

import keras
import numpy as np
import pytest

pytest.importorskip("keras_hub")

import keras_weightmods as kwm
from keras_weightmods.exporting import export
from tests import attributes, models
from tests.backends import breadth
from tests.matrix import methods
from tests.matrix.families import families

FAMILIES = families()


@pytest.fixture(scope="module", autouse=True)
def _all_imported():
    """What is imported on first use is no change."""
    for package in ("keras", "keras_hub"):
        attributes.import_all(package)


def packed_generate(family):
    """Pack a language model and let it write: one compilation for both."""
    model = family.make()
    kwm.sparsify(model, verbose=0)
    kwm.pack(model)
    model.compile(sampler="greedy")
    kwm.compile_generate(model)
    tokens = {"token_ids": np.ones((1, 6), int), "padding_mask": MASK}
    model.generate(tokens, stop_token_ids=None)
    kwm.uncompile_generate(model)
    kwm.unpack(model)


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # The methods of the matrix write files.


MASK = np.array([[1, 1, 1, 0, 0, 0]])
METHODS = {**methods.METHODS, "packed_generate": packed_generate}


def _run(method, name, snapshot):
    family = FAMILIES[name]
    family = dataclasses.replace(
        family, make=lambda: snapshot.add(FAMILIES[name].make())
    )
    with contextlib.suppress(ValueError):
        METHODS[method](family)  # or it is refused, in words


# What a user asks for, and `uncompile_generate` takes off. KerasHub's `compile`
# would drop a `generate_function` that was set, without a word.
ASKED = {"make_generate_function"}


# Every method on one backend, those with code of each backend on all.
CASES = [(method, "Dense") for method in METHODS if "generate" not in method]
OWN = {"cast", "compander", "lift", "pack", "quantize"}
EVERYWHERE = [i for i, (method, _) in enumerate(CASES) if method in OWN]
CASES += [(method, "LlamaCausalLM") for method in METHODS]


@breadth(("method", "name"), CASES, *EVERYWHERE)
@pytest.mark.filterwarnings("ignore")
def test_nothing_is_replaced(method, name):
    with attributes.watched() as (snapshot, changed):
        _run(method, name, snapshot)
    assert changed == (ASKED if "generate" in method else set())


@pytest.mark.filterwarnings("ignore")
def test_a_packed_model_is_left_alone_while_it_is_exported(monkeypatch):
    monkeypatch.setattr(export, "FORMATS", dict(export.FORMATS))
    model, seen = models.make_sparse(models.mlp(16, 16, 16)), []
    kwm.pack(model)

    def writer(dense):
        return lambda path, progress: seen.append(time.sleep(0.5))

    kwm.register_export_format("slow", writer)
    with attributes.watched() as (snapshot, changed):
        snapshot.add(model)
        kwm.export(model, "model", "slow")
    assert seen
    assert changed == set()


@pytest.mark.filterwarnings("ignore")
def test_nothing_is_replaced_by_several_threads():
    names = ("magnitude", "lift", "pack", "save_packed", "delta")
    with attributes.watched() as (snapshot, changed):
        threads = [
            threading.Thread(target=_run, args=(name, "Dense", snapshot))
            for name in names
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert changed == set()


def test_the_watch_sees_what_lasts_a_moment():
    plain = keras.layers.Dense.call
    with attributes.watched() as (_, changed):
        for _ in range(3):
            keras.layers.Dense.call = lambda self, x: x
            threading.Event().wait(0.2)
            keras.layers.Dense.call = plain
    assert changed == {"keras.src.layers.core.dense.Dense.call"}


def test_the_watch_sees_a_method_of_a_model():
    with attributes.watched() as (snapshot, changed):
        model = snapshot.add(FAMILIES["Dense"].make())
        model.layers[0].call = lambda x: x
        model.get_config = dict
    assert changed == {"call", "get_config"}
