import numpy as np
import pytest

from examples.data import robust_nets
from examples.data.digits import load_digits
from keras_weightmods import WeightSignature

pytestmark = pytest.mark.one_backend


def test_no_image_is_in_two_parts():
    data = robust_nets.load_data(seed=3)
    tuned = [*data["mnist"].values(), *data["digits"].values()]
    parts = [data["pretrain"], *tuned]
    seen = [image.tobytes() for part in parts for image in part[0]]
    assert len(set(seen)) > 0.999 * len(seen)


@pytest.mark.parametrize("name", robust_nets.NETS)
def test_the_shallow_part_is_a_small_one(name):
    make, shallow = robust_nets.NETS[name]
    model = make()
    weights = model.get_weights()
    signature = WeightSignature.extract(None, model, weights, **shallow)
    # In the transformer, one block of six.
    times = 5 if name == "vit_like" else 8
    assert signature.model_nbytes > times * signature.nbytes


def test_fine_tuning_starts_where_it_is_told():
    images, labels = load_digits()
    model = robust_nets.make_vgg()
    start = model.get_weights()
    arguments = (model, start, images[:64], labels[:64], 1)
    first = robust_nets.fine_tune(*arguments, "contrast", seed=0)
    again = robust_nets.fine_tune(*arguments, "contrast", seed=0)
    clean = robust_nets.fine_tune(*arguments, None, seed=0)
    np.testing.assert_array_equal(first[0], again[0])
    assert not np.array_equal(first[0], clean[0])
    tests = robust_nets.Tests(images[:20], labels[:20], ["contrast"], seed=0)
    assert tests.images["contrast"].shape == (100, 16, 16, 1)
    assert 0 <= tests.accuracy(model, first, "contrast") <= 1
