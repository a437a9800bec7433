import pytest

from keras_weightmods.core import target_rules


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch):
    """What a test registers is gone after it."""
    rules = {cls: dict(r) for cls, r in target_rules._RULES.items()}
    monkeypatch.setattr(target_rules, "_RULES", rules)
