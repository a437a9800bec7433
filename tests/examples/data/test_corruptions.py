import numpy as np
import pytest

from examples.data.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from examples.data.digits import load_digits

pytestmark = pytest.mark.one_backend


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruptions(name):
    images = load_digits()[0][:50]
    distances = []
    for severity in SEVERITIES:
        got = corrupt(images, name, severity, seed=1)
        assert got.shape == images.shape
        assert got.dtype == "float32"
        assert 0 <= got.min() < got.max() <= 1
        distances.append(np.abs(got - images).mean())
    assert distances == sorted(distances)
    assert distances[0] > 0.01
    mixed = corrupt(images, name, np.repeat(SEVERITIES, 10), seed=1)
    change = np.abs(mixed - images).reshape(5, -1).mean(axis=1)
    assert change[0] < change[-1]
