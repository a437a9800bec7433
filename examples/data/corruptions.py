"""Corruptions of small images."""

import numpy as np

SEVERITIES = (1, 2, 3, 4, 5)


def corrupt(images, name, severity, seed):
    """Corrupt images.

    Args:
        images: Float array `(n, height, width, 1)` in [0, 1].
        name: A key of `CORRUPTIONS`.
        severity: Int from 1 to 5, or an array of one for each image.
        seed: Int.

    Returns:
        A float32 array of the same shape, in [0, 1].
    """
    generator = np.random.default_rng(seed)
    levels = np.broadcast_to(severity, len(images))
    corrupted = np.empty_like(images)
    for level in SEVERITIES:
        chosen = levels == level
        if chosen.any():
            function, values = CORRUPTIONS[name]
            batch = images[chosen, ..., 0]
            changed = function(batch, values[level - 1], generator)
            corrupted[chosen, ..., 0] = np.clip(changed, 0, 1)
    return corrupted


def _gaussian_noise(images, variance, generator):
    from skimage.util import random_noise

    return random_noise(images, "gaussian", rng=generator, var=variance)


def _impulse_noise(images, amount, generator):
    from skimage.util import random_noise

    return random_noise(images, "s&p", rng=generator, amount=amount)


def _gaussian_blur(images, sigma, generator):
    from skimage.filters import gaussian

    return gaussian(images, sigma=(0, sigma, sigma), mode="constant")


def _contrast(images, factor, generator):
    # Towards a middle grey, as fog does.
    return 0.5 + factor * (images - 0.5)


# {name: (function, its parameter at severities 1 to 5)}
CORRUPTIONS = {
    "gaussian noise": (_gaussian_noise, (0.02, 0.05, 0.1, 0.2, 0.4)),
    "impulse noise": (_impulse_noise, (0.05, 0.1, 0.2, 0.3, 0.4)),
    "gaussian blur": (_gaussian_blur, (0.6, 1.0, 1.4, 1.8, 2.2)),
    "contrast": (_contrast, (0.5, 0.35, 0.25, 0.15, 0.1)),
}
