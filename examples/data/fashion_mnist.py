"""Fashion-MNIST: 70,000 real images of clothes, from a package of Debian."""

import gzip
import math
import pathlib

import numpy as np

FOLDER = "/usr/share/datasets/fashion-mnist"
_FILES = {"train": "train", "test": "t10k"}


def load_fashion_mnist(folder=FOLDER):
    """Return the images of Fashion-MNIST (arXiv 1708.07747) and their classes.

    Args:
        folder: Where its four files lie. Defaults to the folder of Debian's
            package, which `apt-get install dataset-fashion-mnist` installs.

    Returns:
        Dict from `"train"` and `"test"` to a pair: float32 images
        `(n, 28, 28, 1)` in [0, 1], and int32 labels from 0 to 9. In the data
        set itself n is 60,000 and 10,000.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is not what its name says.
    """
    return {
        part: (
            _read(folder, f"{name}-images-idx3-ubyte.gz", 3)[..., None]
            / np.float32(255),
            _read(folder, f"{name}-labels-idx1-ubyte.gz", 1).astype("int32"),
        )
        for part, name in _FILES.items()
    }


def _read(folder, name, dimensions):
    file = pathlib.Path(folder) / name
    if not file.exists():
        raise FileNotFoundError(
            f"Expected the files of Fashion-MNIST in {str(folder)!r}. "
            f"Received: no {name} there. On Debian and Ubuntu install them "
            "with: apt-get install dataset-fashion-mnist. Elsewhere give the "
            "folder that holds them."
        )
    content = gzip.decompress(file.read_bytes())
    # Two zeros, the type (8: bytes), how many sizes; then the sizes.
    head = 4 + 4 * dimensions
    shape = [
        int.from_bytes(content[at : at + 4], "big") for at in range(4, head, 4)
    ]
    if content[:4] != bytes((0, 0, 8, dimensions)) or len(
        content
    ) != head + math.prod(shape):
        raise ValueError(
            f"Expected {name} to hold bytes in {dimensions} dimension(s), in "
            f"the format IDX. Received: {len(content)} bytes that begin with "
            f"{content[:head]!r}. Install the files again."
        )
    return np.frombuffer(content, np.uint8, offset=head).reshape(shape)
