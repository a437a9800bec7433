import keras
import ml_dtypes
import numpy as np
import pytest

from keras_weightmods.utils import checks
from keras_weightmods.utils.dtypes import bytes_of, numpy_dtype

pytestmark = pytest.mark.one_backend


@pytest.mark.parametrize(
    ("value", "arguments", "expected"),
    [
        (True, {}, "an int"),
        (1.0, {}, "an int"),
        (0, {"least": 1}, "an int >= 1"),
        (3, {"least": 1, "most": 2}, "an int >= 1 and <= 2"),
        (0, {"least": 1, "optional": True}, "an int >= 1 or None"),
        (True, {}, "a finite float"),
        (float("nan"), {}, "a finite float"),
        (1.0, {"least": 0, "below": 1}, "a finite float >= 0 and < 1"),
        (2, {"most": 1, "optional": True}, "a finite float <= 1 or None"),
        (10**400, {}, "a finite float"),
    ],
)
def test_what_is_no_number(value, arguments, expected):
    is_int = expected.startswith("an int")
    check = checks.check_int if is_int else checks.check_float
    with pytest.raises(ValueError) as info:
        check("n", value, **arguments)
    text = f"`n` must be {expected}. Received: n={value!r}"
    assert str(info.value) == text


def test_numbers():
    for value in (1, np.int8(1), np.uint64(1)):
        assert type(checks.check_int("n", value, 1, 1)) is int
    assert checks.check_int("n", None, 1, optional=True) is None
    for value in (0, 0.0, np.float32(0), np.int64(0), np.float64(1)):
        received = checks.check_float("x", value, least=0, most=1)
        assert received == value
        assert type(received) is float
    # An int that no backend takes as a number.
    assert type(checks.check_float("x", 2**70)) is float
    assert checks.check_float("x", None, optional=True) is None


def test_others():
    assert checks.check_bool("b", False) is False
    assert checks.check_choice("c", "a", ("a", None)) == "a"
    assert checks.check_choice("c", None, ("a", None)) is None
    assert checks.check_string("s", "a") == "a"
    assert checks.check_string("s", None, optional=True) is None
    for verbose in (0, 1, False, True):
        assert checks.check_verbose(verbose) is verbose
    checks.check_model(keras.layers.Dense(1))
    for check, arguments, message in (
        (checks.check_bool, ("b", 1), "`b` must be a bool"),
        (checks.check_choice, ("c", 1, (True, 2)), "one of True, 2. "),
        (checks.check_choice, ("c", np.ones(2), ("a",)), "one of 'a'"),
        (checks.check_verbose, (2,), "`verbose` must be one of 0, 1, "),
        (checks.check_string, ("s", ""), "a non-empty string. "),
        (checks.check_string, ("s", 1, True), "string or None. "),
        (checks.check_model, ([1],), r"a Keras model or layer.*=\[1\]"),
        (checks.raise_all, ("It has", ["a"]), r"^It has 1 problem:\n  a$"),
        (checks.raise_all, ("", iter("ab")), r"2 problems:\n  a\n  b$"),
    ):
        with pytest.raises(ValueError, match=message):
            check(*arguments)
    checks.raise_all("The file has", [])


def test_what_is_long_is_cut():
    laughs = ["ha"] * 10
    for _ in range(8):
        laughs = [laughs] * 10  # its own `repr` would take gigabytes
    deep = []
    for _ in range(10_000):
        deep = [deep]
    for value in (laughs, deep, "x" * 5000, 16**5000, {"x" * 5000: laughs}):
        text = str(checks.error("x", "y" * 5000, value))
        assert 5 < len(checks.shown(value)) <= 500
        assert len(text) < 1400
    assert checks.shown(10**499) == str(10**499)
    with pytest.raises(ValueError, match=r"300 problems:\n  0x") as info:
        checks.raise_all("s" * 5000, (f"{i}{'x' * 40}" for i in range(300)))
    assert len(str(info.value)) < 2000


def test_dtypes():
    assert numpy_dtype("float16") == "float16"
    assert numpy_dtype("bfloat16") == ml_dtypes.bfloat16
    shapes = ((2, 3), "bfloat16"), ((), "float8_e4m3fn")
    assert bytes_of(keras.KerasTensor(*each) for each in shapes) == 13
