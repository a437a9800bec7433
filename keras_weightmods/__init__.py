"""Changes to a Keras model's weights, on JAX, TensorFlow and torch."""

from keras_weightmods import ops as ops
from keras_weightmods.core.report import (
    ReparameterizationReport as ReparameterizationReport,
)
from keras_weightmods.core.target_rules import (
    register_target as register_target,
)
from keras_weightmods.core.targets import Target as Target
from keras_weightmods.core.targets import Targets as Targets
from keras_weightmods.core.targets import find_targets as find_targets
from keras_weightmods.evaluation.lm_eval import lm_eval_model as lm_eval_model
from keras_weightmods.evaluation.perplexity import Perplexity as Perplexity
from keras_weightmods.evaluation.perplexity import perplexity as perplexity
from keras_weightmods.evaluation.scaling_law import ScalingLaw as ScalingLaw
from keras_weightmods.evaluation.scaling_law import (
    fit_scaling_law as fit_scaling_law,
)
from keras_weightmods.generation.compile_generate import (
    GenerateReport as GenerateReport,
)
from keras_weightmods.generation.compile_generate import (
    compile_generate as compile_generate,
)
from keras_weightmods.generation.compile_generate import (
    uncompile_generate as uncompile_generate,
)
from keras_weightmods.lift.masked_optimizer import (
    MaskedOptimizer as MaskedOptimizer,
)
from keras_weightmods.lift.principal_mask_callback import (
    PrincipalMaskCallback as PrincipalMaskCallback,
)
from keras_weightmods.lift.principal_mask_callback import (
    PrincipalMaskReport as PrincipalMaskReport,
)
from keras_weightmods.lift.sparse_adamw import SparseAdamW as SparseAdamW
from keras_weightmods.packing.pack import pack as pack
from keras_weightmods.packing.pack import unpack as unpack
from keras_weightmods.packing.report import PackReport as PackReport
from keras_weightmods.patches.delta import apply_delta as apply_delta
from keras_weightmods.patches.delta import remove_delta as remove_delta
from keras_weightmods.patches.delta import save_delta as save_delta
from keras_weightmods.patches.patches import Patches as Patches
from keras_weightmods.patches.report import DeltaReport as DeltaReport
from keras_weightmods.patches.report import PatchReport as PatchReport
from keras_weightmods.patches.report import SignatureReport as SignatureReport
from keras_weightmods.patches.sum_signatures import (
    sum_signatures as sum_signatures,
)
from keras_weightmods.patches.weight_signature import (
    WeightSignature as WeightSignature,
)
from keras_weightmods.reparameterize.compander import (
    attach_compander as attach_compander,
)
from keras_weightmods.reparameterize.compander_layers import (
    CompanderConv1D as CompanderConv1D,
)
from keras_weightmods.reparameterize.compander_layers import (
    CompanderConv2D as CompanderConv2D,
)
from keras_weightmods.reparameterize.compander_layers import (
    CompanderConv3D as CompanderConv3D,
)
from keras_weightmods.reparameterize.compander_layers import (
    CompanderDense as CompanderDense,
)
from keras_weightmods.reparameterize.compander_layers import (
    CompanderDepthwiseConv2D as CompanderDepthwiseConv2D,
)
from keras_weightmods.reparameterize.compander_layers import (
    CompanderEinsumDense as CompanderEinsumDense,
)
from keras_weightmods.reparameterize.compander_optimizer import (
    CompanderOptimizer as CompanderOptimizer,
)
from keras_weightmods.reparameterize.fold import fold as fold
from keras_weightmods.reparameterize.weight_norm import (
    attach_weight_norm as attach_weight_norm,
)
from keras_weightmods.saving.checkpoint import Checkpoint as Checkpoint
from keras_weightmods.saving.model import load_model as load_model
from keras_weightmods.saving.model import save_model as save_model
from keras_weightmods.sparsity.adam_s import AdamS as AdamS
from keras_weightmods.sparsity.cast import CAST as CAST
from keras_weightmods.sparsity.merge_lora import merge_lora as merge_lora
from keras_weightmods.sparsity.quantize_sparse import (
    QuantizeReport as QuantizeReport,
)
from keras_weightmods.sparsity.quantize_sparse import (
    quantize_sparse as quantize_sparse,
)
from keras_weightmods.sparsity.report import ChangeReport as ChangeReport
from keras_weightmods.sparsity.report import SparsityReport as SparsityReport
from keras_weightmods.sparsity.report import assert_sparse as assert_sparse
from keras_weightmods.sparsity.report import sparsity_report as sparsity_report
from keras_weightmods.sparsity.scaling import attach_scaling as attach_scaling
from keras_weightmods.sparsity.self_generated import (
    self_generated as self_generated,
)
from keras_weightmods.sparsity.semi_structured_sparse import (
    SemiStructuredSparse as SemiStructuredSparse,
)
from keras_weightmods.sparsity.sensitivity import (
    SensitivityReport as SensitivityReport,
)
from keras_weightmods.sparsity.sensitivity import sensitivity as sensitivity
from keras_weightmods.sparsity.sparsify import SparsifyReport as SparsifyReport
from keras_weightmods.sparsity.sparsify import sparsify as sparsify
from keras_weightmods.sparsity.sparsity_monitor import (
    SparsityMonitor as SparsityMonitor,
)
from keras_weightmods.utils.report import Report as Report
from keras_weightmods.version import __version__ as __version__
