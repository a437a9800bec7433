"""The public names, one a line; `__init__.py` reads them from here."""

from . import ops as ops
from . import plot as plot
from . import reports as reports
from .calibration.self_generated import self_generated as self_generated
from .core.layer_kinds import register_layer_kind as register_layer_kind
from .core.targets import Target as Target
from .core.targets import Targets as Targets
from .core.targets import find_targets as find_targets
from .evaluation.lm_eval import lm_eval_model as lm_eval_model
from .evaluation.perplexity import Perplexity as Perplexity
from .evaluation.perplexity import perplexity as perplexity
from .evaluation.scaling_law import ScalingLaw as ScalingLaw
from .evaluation.scaling_law import fit_scaling_law as fit_scaling_law
from .exporting.export import export as export
from .exporting.export import register_export_format as register_export_format
from .exporting.load_gguf import load_gguf as load_gguf
from .generation.compile_generate import compile_generate as compile_generate
from .generation.compile_generate import (
    uncompile_generate as uncompile_generate,
)
from .lift.masked_optimizer import MaskedOptimizer as MaskedOptimizer
from .lift.principal_mask_callback import LIFT as LIFT
from .lift.principal_mask_callback import (
    PrincipalMaskCallback as PrincipalMaskCallback,
)
from .lift.sparse_adamw import SparseAdamW as SparseAdamW
from .merging.merge import merge as merge
from .merging.methods import register_merge_method as register_merge_method
from .packing.pack import pack as pack
from .packing.pack import unpack as unpack
from .patches.patch import Patch as Patch
from .patches.signature import WeightSignature as WeightSignature
from .quantization.quantize import quantize as quantize
from .reparameterize.compander import attach_compander as attach_compander
from .reparameterize.compander_layers import CompanderConv1D as CompanderConv1D
from .reparameterize.compander_layers import CompanderConv2D as CompanderConv2D
from .reparameterize.compander_layers import CompanderConv3D as CompanderConv3D
from .reparameterize.compander_layers import CompanderDense as CompanderDense
from .reparameterize.compander_layers import (
    CompanderDepthwiseConv2D as CompanderDepthwiseConv2D,
)
from .reparameterize.compander_layers import (
    CompanderEinsumDense as CompanderEinsumDense,
)
from .reparameterize.compander_optimizer import (
    CompanderOptimizer as CompanderOptimizer,
)
from .reparameterize.fold import fold as fold
from .reparameterize.weight_norm import attach_weight_norm as attach_weight_norm
from .saving.checkpoint import Checkpoint as Checkpoint
from .saving.model import load_model as load_model
from .saving.model import save_model as save_model
from .saving.model_card import ModelCard as ModelCard
from .sparsity.adam_s import AdamS as AdamS
from .sparsity.cast import CAST as CAST
from .sparsity.merge_lora import merge_lora as merge_lora
from .sparsity.report import assert_sparse as assert_sparse
from .sparsity.report import sparsity_report as sparsity_report
from .sparsity.scaling import attach_scaling as attach_scaling
from .sparsity.semi_structured_sparse import (
    SemiStructuredSparse as SemiStructuredSparse,
)
from .sparsity.sparsify import sparsify as sparsify
from .sparsity.sparsity_monitor import SparsityMonitor as SparsityMonitor
from .sparsity.swap_sparse_ema_weights import (
    SwapSparseEMAWeights as SwapSparseEMAWeights,
)

__version__: str
