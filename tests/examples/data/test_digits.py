import numpy as np
import pytest

from examples.data.digits import load_digits, load_mnist

pytestmark = pytest.mark.one_backend


def test_images():
    for load, count in ((load_mnist, 5000), (load_digits, 1797)):
        images, labels = load(16)
        assert images.shape == (count, 16, 16, 1)
        assert images.dtype == "float32"
        assert 0 == images.min() < images.max() <= 1
        assert np.bincount(labels).min() > 0.08 * count
