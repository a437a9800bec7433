"""What the compiled `generate` of all backends has in common."""

from typing import Any


class CannotCompile(Exception):
    """The model does what a backend cannot compile, or record and repeat."""


def view_of(obj: Any, **attributes: Any) -> Any:
    """Return a second object of the same class and state, but for attributes.

    What runs on the view sees them; whoever calls `obj` meanwhile does not.

    Args:
        obj: A model, or a sampler of KerasHub.
        **attributes: What the view has in place of its own.
    """
    view = object.__new__(type(obj))
    vars(view).update(vars(obj), **attributes)
    return view


def bounded(sampler: Any, length: Any) -> Any:
    """Return a view of a sampler of KerasHub that stops at a length.

    Args:
        sampler: A `keras_hub.samplers.Sampler` that has the loop of its base.
        length: Int or scalar tensor; prompts may be padded past it.
    """
    # Here, as exported models take what is in this folder without Keras.
    from keras import ops

    def run_loop(cond, body, **kwargs):
        def both(prompt, cache, index, mask):
            is_within = index < ops.cast(length, "int32")
            return ops.logical_and(is_within, cond(prompt, cache, index, mask))

        return sampler.run_loop(both, body, **kwargs)

    return view_of(sampler, run_loop=run_loop)
