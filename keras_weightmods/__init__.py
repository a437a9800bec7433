"""Changes to a Keras model's weights, on JAX, TensorFlow and torch."""

from keras_weightmods import ops as ops
from keras_weightmods.callbacks.principal_mask_callback import (
    PrincipalMaskCallback as PrincipalMaskCallback,
)
from keras_weightmods.callbacks.sparsity_monitor import (
    SparsityMonitor as SparsityMonitor,
)
from keras_weightmods.compander import compand_model as compand_model
from keras_weightmods.constraints.semi_structured_sparse import (
    SemiStructuredSparse as SemiStructuredSparse,
)
from keras_weightmods.evaluation.lm_eval import lm_eval_model as lm_eval_model
from keras_weightmods.evaluation.perplexity import Perplexity as Perplexity
from keras_weightmods.evaluation.perplexity import perplexity as perplexity
from keras_weightmods.evaluation.scaling_law import ScalingLaw as ScalingLaw
from keras_weightmods.evaluation.scaling_law import (
    fit_scaling_law as fit_scaling_law,
)
from keras_weightmods.fold import fold as fold
from keras_weightmods.layers.compander_conv1d import (
    CompanderConv1D as CompanderConv1D,
)
from keras_weightmods.layers.compander_conv2d import (
    CompanderConv2D as CompanderConv2D,
)
from keras_weightmods.layers.compander_conv3d import (
    CompanderConv3D as CompanderConv3D,
)
from keras_weightmods.layers.compander_dense import (
    CompanderDense as CompanderDense,
)
from keras_weightmods.layers.compander_depthwise_conv2d import (
    CompanderDepthwiseConv2D as CompanderDepthwiseConv2D,
)
from keras_weightmods.layers.compander_einsum_dense import (
    CompanderEinsumDense as CompanderEinsumDense,
)
from keras_weightmods.layers.pack_report import PackReport as PackReport
from keras_weightmods.layers.packing import pack as pack
from keras_weightmods.layers.packing import unpack as unpack
from keras_weightmods.merge_lora import merge_lora as merge_lora
from keras_weightmods.optimizers.adam_s import AdamS as AdamS
from keras_weightmods.optimizers.masked_optimizer import (
    MaskedOptimizer as MaskedOptimizer,
)
from keras_weightmods.optimizers.reparameterized_optimizer import (
    ReparameterizedOptimizer as ReparameterizedOptimizer,
)
from keras_weightmods.optimizers.sparse_adamw import SparseAdamW as SparseAdamW
from keras_weightmods.saving.delta import apply_delta as apply_delta
from keras_weightmods.saving.delta import remove_delta as remove_delta
from keras_weightmods.saving.delta import save_delta as save_delta
from keras_weightmods.saving.model import load_model as load_model
from keras_weightmods.saving.model import save_model as save_model
from keras_weightmods.signatures.combine import sum_signatures as sum_signatures
from keras_weightmods.signatures.patches import Patches as Patches
from keras_weightmods.signatures.weight_signature import (
    WeightSignature as WeightSignature,
)
from keras_weightmods.sparsity.cast import CAST as CAST
from keras_weightmods.sparsity.report import SparsityReport as SparsityReport
from keras_weightmods.sparsity.report import assert_sparse as assert_sparse
from keras_weightmods.sparsity.report import sparsity_report as sparsity_report
from keras_weightmods.sparsity.scaling import attach_scaling as attach_scaling
from keras_weightmods.sparsity.scaling import fold_scaling as fold_scaling
from keras_weightmods.sparsity.sparsify import SparsifyReport as SparsifyReport
from keras_weightmods.sparsity.sparsify import sparsify as sparsify
from keras_weightmods.targets import Target as Target
from keras_weightmods.targets import Targets as Targets
from keras_weightmods.targets import find_targets as find_targets
from keras_weightmods.targets import register_target as register_target
from keras_weightmods.version import __version__ as __version__
from keras_weightmods.weight_norm import weight_norm_model as weight_norm_model
