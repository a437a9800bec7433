import difflib
import random

import pytest

from examples.data.typos import NOISES, mistype

pytest.importorskip("typo")

pytestmark = pytest.mark.one_backend

TEXTS = ["It moves between heartbreak and rebellion, and never stops."] * 40


@pytest.mark.parametrize("name", NOISES)
def test_rate_and_seed(name):
    before = random.getstate()
    found = mistype(TEXTS, name, 0.1, seed=1)
    assert random.getstate() == before
    assert found == mistype(TEXTS, name, 0.1, seed=1)
    assert found != mistype(TEXTS, name, 0.1, seed=2)
    assert mistype(TEXTS, name, 0.0, seed=1) == TEXTS
    assert len(set(found)) > 35
    letters = sum(map(str.isalnum, TEXTS[0]))
    errors = 0
    for text, new in zip(TEXTS, found):
        matcher = difflib.SequenceMatcher(None, text, new, autojunk=False)
        errors += sum(kind != "equal" for kind, *_ in matcher.get_opcodes())
        if name == "spaces":
            assert new.replace(" ", "") == text.replace(" ", "")
    # A swap is an insertion and a deletion; errors that touch are one.
    assert 0.06 < errors / letters / len(TEXTS) < 0.16
