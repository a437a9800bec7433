import gzip
import struct

import numpy as np
import pytest

from examples.data.fashion_mnist import load_fashion_mnist

pytestmark = pytest.mark.one_backend


def write(folder, name, array):
    head = struct.pack(">BBBB", 0, 0, 8, array.ndim)
    head += struct.pack(f">{array.ndim}I", *array.shape)
    (folder / name).write_bytes(gzip.compress(head + array.tobytes()))


@pytest.fixture
def folder(tmp_path):
    random = np.random.default_rng(0)
    for name, count in (("train", 7), ("t10k", 3)):
        images = random.integers(256, size=(count, 28, 28), dtype="uint8")
        write(tmp_path, f"{name}-images-idx3-ubyte.gz", images)
        write(tmp_path, f"{name}-labels-idx1-ubyte.gz", images[:, 0, 0] % 10)
    return tmp_path


def test_images_and_labels(folder):
    data = load_fashion_mnist(folder)
    random = np.random.default_rng(0)
    for part, count in (("train", 7), ("test", 3)):
        expected = random.integers(256, size=(count, 28, 28), dtype="uint8")
        images, labels = data[part]
        assert images.dtype == "float32"
        np.testing.assert_allclose(images[..., 0] * 255, expected, atol=1e-4)
        np.testing.assert_array_equal(labels, expected[:, 0, 0] % 10)
