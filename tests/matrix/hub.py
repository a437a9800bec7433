"""KerasHub's models, tiny, by the arguments of `hub_sizes`."""

import inspect

import numpy as np

from tests.matrix.hub_sizes import GIVEN, OWN, SIZES, Part

# Base classes, which are no models.
BASES = ("Backbone", "FeaturePyramidBackbone", "CausalLM")


def families():
    """Yield the name, the kind and the maker of each family."""
    import keras_hub

    public = [n for n in sorted(dir(keras_hub.models)) if n not in BASES]
    tasks = [name for name in public if name.endswith("CausalLM")]
    taken = {_named(name).backbone_cls for name in tasks}
    for name in tasks:
        yield _named(name).__name__, "language", lambda n=name: make(n)
    for name in public:
        if name.endswith("Backbone") and _named(name) not in taken:
            yield name, "encoder", lambda n=name: make(n)


def make(name, /, **own):
    """Return a model or a layer of KerasHub; `own` goes over `hub_sizes`."""
    cls = _named(name)
    parameters = inspect.signature(cls.__init__).parameters
    arguments = {key: SIZES[key] for key in parameters if key in SIZES}
    arguments |= OWN.get(cls.__name__, {}) | own
    if "backbone" in parameters and hasattr(cls, "backbone_cls"):
        arguments["backbone"] = Part(cls.backbone_cls.__name__)
    for key, value in arguments.items():
        if isinstance(value, Part):
            arguments[key] = make(value.name, **value.own)
    return cls(**arguments)


def given(name, rows):
    """Return {input: array} for inputs that do not tell what they take."""
    return {key: np.stack([x] * rows) for key, x in GIVEN.get(name, {}).items()}


def _named(name):
    import keras_hub

    if name == "VAEBackbone":  # Not exported.
        from keras_hub.src.models.vae.vae_backbone import VAEBackbone

        return VAEBackbone
    is_model = hasattr(keras_hub.models, name)
    return getattr(keras_hub.models if is_model else keras_hub.layers, name)
