import pytest

from tests.models import conv_net, random_weights


@pytest.fixture(scope="session")
def model():
    return conv_net()


@pytest.fixture
def trio(model):
    """Three checkpoints of `model`, as lists."""
    return [random_weights(model, seed) for seed in range(3)]
