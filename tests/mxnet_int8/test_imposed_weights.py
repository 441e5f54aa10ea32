"""Float weights that MXNet's own quantization rounds to given codes."""
import numpy as np
import pytest

from gluonquant.mxnet_int8.weights import filling, imposed


def rounded(weights):
    """What MXNet makes of float weights (channels, ...)."""
    rows = weights.reshape(len(weights), -1)
    return np.clip(np.rint(rows * (np.float32(127.5) / abs(rows).max(axis=1, keepdims=True))), -128, 127)


@pytest.mark.parametrize('row', [[127, 3, -127], [-128, 127, 1], [-8, 7, 3], [1, 0, -1], [127, -126, 126],
                                 [-128, 5, 1]])
def test_weights_round_to_the_codes(row, rng):
    codes = np.tile(np.array(row), (256, 1)).reshape(256, 3, 1, 1)
    weights, _, missed = imposed(codes, rng.uniform(1e-4, 1e-2, 256), 0.02, np.zeros(256))
    np.testing.assert_array_equal(rounded(weights), codes.reshape(256, 3) * filling(np.array(row)))
    assert not missed


def test_codes_that_cannot_be_are_counted(rng):
    codes = np.tile([5, -127, 2, -127], (512, 1)).reshape(512, 4, 1, 1)
    weights, _, missed = imposed(codes, rng.uniform(1e-4, 1e-2, 512), 0.02, np.zeros(512))
    wrong = rounded(weights) != codes.reshape(512, 4)
    assert wrong.sum() == missed <= 5
    assert (rounded(weights)[wrong] == -128).all()


def test_scales_of_weight_and_data_cancel(rng):
    codes = rng.integers(-127, 128, (64, 9))
    codes[:, 2] = 127
    step = rng.uniform(1e-4, 1e-2, 64)
    weights, factor, _ = imposed(codes, step, 0.02, np.zeros(64))
    found = abs(weights).max(axis=1) / 127.5 * factor
    np.testing.assert_allclose(found, step, rtol=3e-4)      # a channel's largest weight is moved by up to 2048 ulps


def test_a_channel_of_zeros_adds_next_to_nothing():
    bias = np.array([3.0, 0.0])
    weights, factor, _ = imposed(np.zeros((2, 9), int), np.ones(2), 0.02, bias)
    steps = abs(weights).max(axis=1) / 127.5 * factor * 0.02
    assert abs(bias[0] / steps[0]) < 2 ** 30
    assert (127 * 255 * steps < 1e-4 * np.maximum(bias, 1e-6)).all()


def test_the_reason_is_told():
    assert imposed(np.array([[7], [-6]]).T, np.ones(1), 1.0, np.zeros(1)) == (
        'channel 0 of the weight has codes from -6 to 7, none of them 127')
    assert imposed(np.array([[127]]), np.ones(1), 1.0, np.array([2.0 ** 31])) == (
        'the bias of channel 0 has 2.15e+09 steps')
