import ml_dtypes
import pytest

from keras_weightmods.utils.dtypes import bytes_of, numpy_dtype

pytestmark = pytest.mark.one_backend


def test_names_of_keras():
    assert numpy_dtype("float16") == "float16"
    assert numpy_dtype("bfloat16") == ml_dtypes.bfloat16
    assert bytes_of([((2, 3), "bfloat16"), ((), "float8_e4m3fn")]) == 13
