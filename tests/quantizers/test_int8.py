"""Symmetric max-based quantization."""
import numpy as np
import pytest
from cases import STATIC, Case, infer, run, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from mxnet import nd
from numpy.testing import assert_allclose

import strategies
from gluonquant import quantizers
from reference import int8

few = settings(max_examples=50, deadline=None)
SIGNED, UNSIGNED = Case('int8', 'activation', 4, True), Case('int8', 'activation', 4, False)


@few
@given(st.data(), strategies.powers_of_two, st.sampled_from([2, 3, 4, 8]))
def test_exact_ties_of_weights_round_to_even(data, scale, bits):
    """The largest weight makes the scale an exact power of two, so that v = k + 0.5 is exact."""
    qmax = 2 ** (bits - 1) - 1
    halves = data.draw(st.lists(st.integers(-qmax, qmax - 1), min_size=1, max_size=20))
    x = np.array([[qmax, *(k + 0.5 for k in halves)]], np.float32) * np.float32(scale)
    q = Case('int8', 'weight', bits).make()
    same_bits(q.quantize(nd.array(x)).asnumpy(), np.rint(x / np.float32(scale)))


@few
@given(st.data(), strategies.powers_of_two, st.booleans())
def test_codes_of_activations_are_numpys_for_difficult_numbers(data, scale, signed):
    case = SIGNED if signed else UNSIGNED
    q = case.make()
    q.write(amax=scale * q.grid.qmax)
    x = data.draw(strategies.adversarial_arrays(scale, q.grid.qmin, q.grid.qmax)).reshape(1, -1)
    with np.errstate(over='ignore'):
        expected = np.clip(np.rint(x / np.float32(scale)), q.grid.qmin, q.grid.qmax)
    same_bits(q.quantize(nd.array(x)).asnumpy(), expected)
    same_bits(infer(q, x), expected.astype(np.float32) * np.float32(scale))


def test_a_scale_that_is_no_power_of_two_divides_like_float32():
    q = Case('int8', 'activation', 8, True).make()
    q.write(amax=1.0)
    scale = np.float32(1) / np.float32(127)
    x = (np.arange(-127, 127, dtype=np.float32) + np.float32(0.5)) * scale
    x = np.concatenate([np.array(strategies.neighbours(value)) for value in x]).reshape(1, -1)
    same_bits(q.quantize(nd.array(x)).asnumpy(), np.rint(x / scale))


def test_the_scale_is_the_largest_magnitude_over_qmax():
    x = np.array([[1, -6, 3], [0.5, 0.25, 0]], np.float32)
    q = Case('int8', 'weight', 3, per_channel=True).make(shape=x.shape)
    same_bits(q.qparams(nd.array(x)).scale, [2, np.float32(0.5) / np.float32(3)])


def test_weights_are_quantized_per_channel_by_default():
    assert quantizers.create('int8', 8).per_channel


def test_a_zero_channel_has_code_0_and_the_least_scale():
    x = np.array([[0, 0], [1, 2]], np.float32)
    q = Case('int8', 'weight', 8, per_channel=True).make(shape=x.shape)
    same_bits(q.quantize(nd.array(x)).asnumpy()[0], [0, 0])
    assert_allclose(q.qparams(nd.array(x)).scale[0], 1e-8 / 127, rtol=1e-6)     # one float32 division


def test_a_constant_channel_is_exact():
    x = np.full((1, 4), -0.7, np.float32)
    q = Case('int8', 'weight', 8).make()
    same_bits(q.quantize(nd.array(x)).asnumpy(), np.full((1, 4), -127))
    assert_allclose(infer(q, x), x, rtol=3e-7)                                  # Q * (m / Q)


def test_the_first_batch_sets_amax_and_the_second_moves_it():
    q = SIGNED.make(ema_decay=0.75)
    run(q, np.array([[1, -4.0]], np.float32))
    assert q.value('amax') == 4
    run(q, np.array([[8, 0.0]], np.float32))
    assert q.value('amax') == 5


def test_unsigned_amax_follows_the_maximum_not_the_magnitude():
    q = UNSIGNED.make()
    run(q, np.array([[1, -4.0]], np.float32))
    assert q.value('amax') == 1


def test_the_new_amax_is_used_in_the_same_pass():
    q = SIGNED.make(ema_decay=0.0)
    for top in (7.0, 14.0):
        x = np.array([[top, -top]], np.float32)
        same_bits(run(q, x)[0], x)


def test_unsigned_batches_without_a_positive_value_give_zero():
    """m = max(amax, EPS), code = clip(R(x / s), 0, L)."""
    q = UNSIGNED.make()
    same_bits(run(q, np.array([[-1, -4.0]], np.float32))[0], [[0, 0]])


@pytest.mark.parametrize('hybridized', [False, True])
def test_the_delay_follows_the_reference(hybridized):
    q, state = SIGNED.make(delay_quant=2), None
    if hybridized:
        q.hybridize(**STATIC)
    for step in range(4):
        x = SIGNED.data(step, 1 + step)
        expected = int8.activation(x, x, 4, signed=True, state=state, delay_quant=2)
        state = expected.state
        y = run(q, x)[0]
        decided = ~expected.ties
        assert_allclose(y[decided], expected.y[decided], rtol=1e-6)             # a float32 product
        assert_allclose(q.value('amax'), state['amax'], rtol=1e-6)
        assert q.value('steps') == state['steps']


def test_calibration_takes_the_largest_magnitude():
    q = SIGNED.make()
    q.init_from(nd.array([[1, -4.0]]))
    assert q.value('amax') == 4
