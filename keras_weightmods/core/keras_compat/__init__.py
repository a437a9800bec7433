"""All that this package touches of Keras beyond its public API, by subject.

Written for Keras 3.15; each function says why it is needed. No other file
reads `keras.src`, a private attribute of a Keras object, or what lies behind
Keras' attribute tracking: `tests/core/test_keras_compat.py` checks that.
Overriding a hook of a base class (`_backend_update_step`) is subclassing and
stays in the subclass. `docs/upstream.md` lists what Keras could offer instead.
"""

from keras_weightmods.core.keras_compat.graph import (
    constants_of as constants_of,
)
from keras_weightmods.core.keras_compat.graph import (
    graph_call as graph_call,
)
from keras_weightmods.core.keras_compat.graph import (
    graph_inputs as graph_inputs,
)
from keras_weightmods.core.keras_compat.graph import (
    graph_of as graph_of,
)
from keras_weightmods.core.keras_compat.graph import (
    graph_outputs as graph_outputs,
)
from keras_weightmods.core.keras_compat.graph import (
    nodes_of as nodes_of,
)
from keras_weightmods.core.keras_compat.graph import (
    producer as producer,
)
from keras_weightmods.core.keras_compat.layers import (
    AutocastScope as AutocastScope,
)
from keras_weightmods.core.keras_compat.layers import (
    ConvLSTMCell as ConvLSTMCell,
)
from keras_weightmods.core.keras_compat.layers import (
    KerasSaveable as KerasSaveable,
)
from keras_weightmods.core.keras_compat.layers import (
    ObjectSharingScope as ObjectSharingScope,
)
from keras_weightmods.core.keras_compat.layers import (
    SafeModeScope as SafeModeScope,
)
from keras_weightmods.core.keras_compat.layers import (
    attributes as attributes,
)
from keras_weightmods.core.keras_compat.layers import (
    get_autocast_scope as get_autocast_scope,
)
from keras_weightmods.core.keras_compat.layers import (
    get_keras_mask as get_keras_mask,
)
from keras_weightmods.core.keras_compat.layers import (
    layers_of as layers_of,
)
from keras_weightmods.core.keras_compat.layers import (
    list_hidden_parameters as list_hidden_parameters,
)
from keras_weightmods.core.keras_compat.layers import (
    list_torch_parameters as list_torch_parameters,
)
from keras_weightmods.core.keras_compat.layers import (
    own_variables as own_variables,
)
from keras_weightmods.core.keras_compat.layers import (
    parts_of as parts_of,
)
from keras_weightmods.core.keras_compat.layers import (
    restored_attributes as restored_attributes,
)
from keras_weightmods.core.keras_compat.layers import (
    set_keras_mask as set_keras_mask,
)
from keras_weightmods.core.keras_compat.layers import (
    stored_name as stored_name,
)
from keras_weightmods.core.keras_compat.layers import (
    stored_variable as stored_variable,
)
from keras_weightmods.core.keras_compat.layers import (
    takes_training as takes_training,
)
from keras_weightmods.core.keras_compat.layers import (
    to_snake_case as to_snake_case,
)
from keras_weightmods.core.keras_compat.layers import (
    track_torch_parameters as track_torch_parameters,
)
from keras_weightmods.core.keras_compat.layers import (
    view as view,
)
from keras_weightmods.core.keras_compat.layers import (
    walk_saveable as walk_saveable,
)
from keras_weightmods.core.keras_compat.layers import (
    without_traces as without_traces,
)
from keras_weightmods.core.keras_compat.optimizer import (
    applied_steps as applied_steps,
)
from keras_weightmods.core.keras_compat.optimizer import (
    begin_with_epoch as begin_with_epoch,
)
from keras_weightmods.core.keras_compat.optimizer import (
    check_known as check_known,
)
from keras_weightmods.core.keras_compat.optimizer import (
    decays as decays,
)
from keras_weightmods.core.keras_compat.optimizer import (
    drop_averages as drop_averages,
)
from keras_weightmods.core.keras_compat.optimizer import (
    exclude_from_decay as exclude_from_decay,
)
from keras_weightmods.core.keras_compat.optimizer import (
    given_learning_rate as given_learning_rate,
)
from keras_weightmods.core.keras_compat.optimizer import (
    hold_state as hold_state,
)
from keras_weightmods.core.keras_compat.optimizer import (
    optimizer_variables as optimizer_variables,
)
from keras_weightmods.core.keras_compat.optimizer import (
    set_optimizer as set_optimizer,
)
from keras_weightmods.core.keras_compat.optimizer import (
    strategy_scope as strategy_scope,
)
from keras_weightmods.core.keras_compat.variables import (
    add_laid_out as add_laid_out,
)
from keras_weightmods.core.keras_compat.variables import (
    global_seed as global_seed,
)
from keras_weightmods.core.keras_compat.variables import (
    has_value as has_value,
)
from keras_weightmods.core.keras_compat.variables import (
    in_stateless_scope as in_stateless_scope,
)
from keras_weightmods.core.keras_compat.variables import (
    initialize as initialize,
)
from keras_weightmods.core.keras_compat.variables import (
    layout_of as layout_of,
)
from keras_weightmods.core.keras_compat.variables import (
    put_variable_back as put_variable_back,
)
from keras_weightmods.core.keras_compat.variables import (
    release_value as release_value,
)
from keras_weightmods.core.keras_compat.variables import (
    remove_variable as remove_variable,
)
from keras_weightmods.core.keras_compat.variables import (
    restore_value as restore_value,
)
from keras_weightmods.core.keras_compat.variables import (
    unlocked as unlocked,
)
from keras_weightmods.core.keras_compat.variables import (
    without_values as without_values,
)
