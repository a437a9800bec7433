import pytest

from keras_weightmods import native
from tests.gpu.xla import FakeGpu


@pytest.fixture(scope="session")
def library():
    if not native.is_available():
        pytest.skip(native.reason_unavailable())
    return native.library()


@pytest.fixture(scope="session")
def fake_gpu(library, tmp_path_factory):
    return FakeGpu(tmp_path_factory.mktemp("fake_gpu"))
