"""500 mutants of each kind of file; 20,000 are in `make mutants`."""

import sys

import pytest

from tests.faults import mutants


@pytest.mark.one_backend
@pytest.mark.skipif(sys.platform != "linux", reason="measures as Linux does")
@pytest.mark.parametrize("kind", mutants.KINDS)
def test_mutants_are_refused_in_words(kind):
    accepted, failures = mutants.run(kind, 500)
    assert failures == {}
    # Not all of what is changed matters, but most.
    assert 0 < accepted < 100
