import keras
import pytest

from keras_weightmods.backend.generation import CannotCompile

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="needs the torch backend"
)


def test_logits_that_are_rounded_are_not_others():
    """Of many in half precision one may be far off, and a row may not be."""
    import torch

    from keras_weightmods.backend.torch import generation

    torch.manual_seed(0)
    exact = torch.randn(8, 1, 4096)
    expected = exact.to(torch.bfloat16)
    rounded = (exact * (1 + 0.01 * torch.randn(exact.shape))).to(torch.bfloat16)
    rounded[3, 0, 7] = expected[3, 0, 7] + 0.06 * exact.abs().max()
    # What is added to a whole row changes no probability.
    rounded[4] += 0.5
    generation._check(rounded, expected, False)
    rounded[3] = expected[4]
    for others, logits in ((rounded, expected), (exact * 1.01, exact)):
        with pytest.raises(CannotCompile, match="other logits"):
            generation._check(others, logits, False)


def test_a_step_that_gives_nan_where_the_model_does_not_is_refused():
    import torch

    from keras_weightmods.backend.torch import generation

    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        expected = torch.randn(2, 1, 64).to(dtype)
        broken = expected.clone()
        broken[1] = float("nan")
        # Where the model gives it too, there is nothing to compare.
        generation._check(broken, broken, False)
        for rounds_inputs in (False, True):
            with pytest.raises(CannotCompile, match="other logits"):
                generation._check(broken, expected, rounds_inputs)
