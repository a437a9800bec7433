from keras_weightmods.constraints.semi_structured_sparse import (
    AttachReport as AttachReport,
)
from keras_weightmods.constraints.semi_structured_sparse import (
    SemiStructuredSparse as SemiStructuredSparse,
)
