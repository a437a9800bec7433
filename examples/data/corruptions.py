"""Corruptions of small images, under the names of the C-benchmarks.

These are the kinds from the 19 of arXiv 1903.12261 that scikit-image, with
Pillow, can make. Weather (fog, frost, snow, spatter), lens effects (defocus,
motion, glass) and color are missing.
"""

import io

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


def _shot_noise(images, photons, generator):
    return generator.poisson(images * photons) / photons


def _impulse_noise(images, amount, generator):
    from skimage.util import random_noise

    return random_noise(images, "s&p", rng=generator, amount=amount)


def _speckle_noise(images, variance, generator):
    from skimage.util import random_noise

    return random_noise(images, "speckle", rng=generator, var=variance)


def _gaussian_blur(images, sigma, generator):
    from skimage.filters import gaussian

    return gaussian(images, sigma=(0, sigma, sigma), mode="constant")


def _zoom_blur(images, largest, generator):
    from skimage.transform import AffineTransform, warp

    # `warp` takes what it moves alike as channels, behind height and width.
    stack = np.moveaxis(images, 0, -1)
    centre = (np.array(stack.shape[1::-1]) - 1) / 2
    blurred = []
    for zoom in np.linspace(1, largest, 6):
        shift = centre * (1 - 1 / zoom)
        back = AffineTransform(scale=1 / zoom, translation=shift)
        blurred.append(warp(stack, back))
    return np.moveaxis(np.mean(blurred, axis=0), -1, 0)


def _elastic_transform(images, pixels, generator):
    from skimage.filters import gaussian
    from skimage.transform import warp

    size = images.shape[1:]
    shifts = generator.normal(size=(len(images), 2, *size))
    shifts = gaussian(shifts, sigma=(0, 0, 2, 2), mode="reflect")
    shifts *= pixels / shifts.std()
    grid = np.indices(size)
    return np.stack(
        [warp(image, grid + shift) for image, shift in zip(images, shifts)]
    )


def _pixelate(images, share, generator):
    from skimage.transform import resize

    count, *size = images.shape
    small = [max(1, round(share * side)) for side in size]
    coarse = resize(images, (count, *small), anti_aliasing=True)
    return resize(coarse, images.shape, order=0)


def _jpeg_compression(images, quality, generator):
    from PIL import Image

    compressed = []
    for image in np.round(255 * images).astype("uint8"):
        with io.BytesIO() as file:
            Image.fromarray(image).save(file, "JPEG", quality=quality)
            compressed.append(np.asarray(Image.open(file)))
    return np.stack(compressed) / 255


def _brightness(images, added, generator):
    return images + added


def _contrast(images, factor, generator):
    # Towards a middle grey, as fog does.
    return 0.5 + factor * (images - 0.5)


# {name: (function, its parameter at severities 1 to 5)}
CORRUPTIONS = {
    "gaussian noise": (_gaussian_noise, (0.02, 0.05, 0.1, 0.2, 0.4)),
    "shot noise": (_shot_noise, (20, 10, 5, 3, 1.5)),
    "impulse noise": (_impulse_noise, (0.05, 0.1, 0.2, 0.3, 0.4)),
    "speckle noise": (_speckle_noise, (0.1, 0.2, 0.4, 0.7, 1.2)),
    "gaussian blur": (_gaussian_blur, (0.6, 1.0, 1.4, 1.8, 2.2)),
    "zoom blur": (_zoom_blur, (1.2, 1.4, 1.6, 1.8, 2.0)),
    "elastic transform": (_elastic_transform, (0.5, 0.8, 1.1, 1.4, 1.7)),
    "pixelate": (_pixelate, (0.75, 0.6, 0.5, 0.4, 0.3)),
    "jpeg compression": (_jpeg_compression, (25, 18, 15, 10, 7)),
    "brightness": (_brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": (_contrast, (0.5, 0.35, 0.25, 0.15, 0.1)),
}
