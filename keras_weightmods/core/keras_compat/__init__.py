"""All that this package touches of Keras beyond its public API.

Written for Keras 3.15; each function says why it is needed. No other folder
reads `keras.src`, a private attribute of a Keras object, or what lies behind
Keras' attribute tracking: `tests/core/test_keras_compat.py` checks that.
Overriding a hook of a base class (`_backend_update_step`) is subclassing and
stays in the subclass. `docs/upstream.md` lists what Keras could offer instead.
"""

from keras_weightmods.core.keras_compat.graph import *  # noqa: F403
from keras_weightmods.core.keras_compat.layers import *  # noqa: F403
from keras_weightmods.core.keras_compat.optimizer import *  # noqa: F403
from keras_weightmods.core.keras_compat.quantized import *  # noqa: F403
from keras_weightmods.core.keras_compat.structure import *  # noqa: F403
from keras_weightmods.core.keras_compat.variables import *  # noqa: F403
