import threading

import pytest

from keras_weightmods.utils import parallel

# Plain Python.
pytestmark = pytest.mark.one_backend


def test_map_ahead_keeps_the_order_and_is_few_items_ahead():
    for count in (0, 1, 50):
        found = list(parallel.map_ahead(lambda x: x * x, range(count)))
        assert found == [x * x for x in range(count)]
    taken = []

    def items():
        for item in range(100):
            taken.append(item)
            yield item

    results = parallel.map_ahead(lambda x: x, items())
    next(results)
    assert len(taken) <= 2 * parallel.threads() + 1
    results.close()
    assert len(taken) < 100


def test_map_ahead_raises_the_first_error():
    def fail(x):
        if x in (3, 7):
            raise ValueError(f"at {x}")
        return x

    before, found = threading.active_count(), []
    with pytest.raises(ValueError, match="at 3"):
        for x in parallel.map_ahead(fail, range(10)):
            found.append(x)
    assert found == [0, 1, 2]
    assert threading.active_count() == before
