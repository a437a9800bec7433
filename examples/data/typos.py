"""Typing errors, by the PyPI package `typo`."""

import random

import numpy as np

# {name: the methods of `typo.StrErrer` of which each error is one}
NOISES = {
    # Two letters swapped, one left out, one doubled, a neighbour on the keys.
    "typos": ("char_swap", "missing_char", "repeated_char", "nearby_char"),
    # A space inside a word, or none between two.
    "spaces": ("random_space", "skipped_space"),
}


def mistype(texts, name, rate, seed):
    """Make typing errors in texts.

    Args:
        texts: List of strings.
        name: A key of `NOISES`.
        rate: Float in [0, 1], the errors for each letter or digit, on average.
        seed: Int.

    Returns:
        A list of strings.

    Raises:
        ImportError: If `typo` is not installed.
    """
    try:
        from typo import StrErrer
    except ImportError as error:
        raise ImportError(
            "The typing errors are those of the package `typo`. Install it "
            "with: pip install typo"
        ) from error
    generator = np.random.default_rng(seed)
    mistyped = []
    # `StrErrer` seeds Python's own generator, which others draw from.
    state = random.getstate()
    try:
        for text in texts:
            errors = generator.binomial(sum(map(str.isalnum, text)), rate)
            errer = StrErrer(text, seed=int(generator.integers(2**32)))
            for kind in generator.choice(NOISES[name], errors):
                getattr(errer, kind)()
            mistyped.append(errer.result)
    finally:
        random.setstate(state)
    return mistyped
