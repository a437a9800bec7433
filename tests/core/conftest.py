import pytest

from keras_weightmods.core import layer_kinds


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr(layer_kinds, "_KINDS", dict(layer_kinds._KINDS))
