"""Reports on what the library's functions found or changed.

Each prints as a table; `to_dict()` has the same as plain Python values.
"""

from keras_weightmods.core.seam import (
    ReparameterizationReport as ReparameterizationReport,
)
from keras_weightmods.generation.compile_generate import (
    GenerateReport as GenerateReport,
)
from keras_weightmods.lift.report import (
    PrincipalMaskReport as PrincipalMaskReport,
)
from keras_weightmods.merging.merge import MergeReport as MergeReport
from keras_weightmods.packing.report import PackReport as PackReport
from keras_weightmods.patches.report import LoraReport as LoraReport
from keras_weightmods.patches.report import (
    PatchContentsReport as PatchContentsReport,
)
from keras_weightmods.patches.report import PatchReport as PatchReport
from keras_weightmods.quantization.report import (
    QuantizeReport as QuantizeReport,
)
from keras_weightmods.sparsity.report import ChangeReport as ChangeReport
from keras_weightmods.sparsity.report import SparsityReport as SparsityReport
from keras_weightmods.sparsity.sparsify import SparsifyReport as SparsifyReport
from keras_weightmods.utils.report import Report as Report
