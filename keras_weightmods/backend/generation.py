"""What the compiled `generate` of all backends has in common."""


class CannotCompile(Exception):
    """The model does what a backend cannot compile, or record and repeat."""


class Generation:
    """`generate` on a batch of tokens, for a model as it is now.

    Args:
        model: A `keras_hub.models.CausalLM`.
        functions_by, replaced_attributes, rotations_by: Of
            `core.keras_compat`.
    """

    def __init__(self, model, functions_by, replaced_attributes, rotations_by):
        self.model = model
        self.functions_by = functions_by
        self.replaced_attributes = replaced_attributes
        self.rotations_by = rotations_by
