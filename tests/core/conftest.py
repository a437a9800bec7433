import pytest

from keras_weightmods.core import target_rules


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr(target_rules, "_RULES", dict(target_rules._RULES))
