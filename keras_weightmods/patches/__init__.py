"""Changes put on the weights of a model, and taken off bit for bit."""

# All kinds of patches, so that `Patch.load` knows them.
from keras_weightmods.patches.signature import (
    WeightSignature as WeightSignature,
)
