import json

import numpy as np

from keras_weightmods.calibration.schedule import WarmupLinearDecay
from tests.models import numpy


def test_a_schedule_to_zero():
    schedule = WarmupLinearDecay(2.0, 4, 12)
    rates = [float(numpy(schedule(t))) for t in range(14)]
    np.testing.assert_allclose(rates[:4], [0.5, 1.0, 1.5, 2.0])
    falling = [2, 1.75, 1.5, 1.25, 1, 0.75, 0.5, 0.25, 0, 0]
    np.testing.assert_allclose(rates[4:], falling)
    config = json.loads(json.dumps(schedule.get_config()))
    assert WarmupLinearDecay.from_config(config).get_config() == config
