"""Affine quantization with an integer zero point: min/max and FQN."""
import numpy as np
import pytest
from cases import Case, infer, run, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from mxnet import nd
from numpy.testing import assert_allclose

import strategies
from gluonquant import quantizers

few = settings(max_examples=50, deadline=None)
ACTIVATION = Case('affine', 'activation', 4)


def ranged(low, high, bits=4, **options):
    q = Case('affine', 'activation', bits).make(**options)
    q.write(lo=low, hi=high, initialized=1.0)
    return q


@few
@given(st.data(), strategies.powers_of_two, st.integers(0, 15))
def test_codes_are_numpys_for_difficult_numbers(data, scale, zero_point):
    q = ranged(-zero_point * scale, (15 - zero_point) * scale)
    x = data.draw(strategies.adversarial_arrays(scale, -zero_point, 15 - zero_point)).reshape(1, -1)
    with np.errstate(over='ignore'):
        expected = np.clip(np.rint(x / np.float32(scale)) + zero_point, 0, 15)
    assert q.qparams() == (np.float32(scale), zero_point)
    same_bits(q.quantize(nd.array(x)).asnumpy(), expected)
    same_bits(infer(q, x), (expected - zero_point).astype(np.float32) * np.float32(scale))


@few
@given(st.floats(-100, 100, width=32), st.floats(-100, 100, width=32), st.sampled_from([1, 2, 4, 8]))
def test_the_zero_point_is_an_integer_on_the_grid_whatever_the_range(a, b, bits):
    q = ranged(min(a, b), max(a, b), bits)
    scale, zero_point = q.qparams()
    assert scale > 0
    assert 0 <= zero_point <= 2 ** bits - 1
    assert infer(q, np.zeros((1, 1), np.float32)) == 0


@pytest.mark.parametrize('low, high, zero_point', [(1.0, 3.0, 0), (-3.0, -1.0, 3), (-1.0, 2.0, 1)])
def test_the_range_always_contains_zero(low, high, zero_point):
    assert ranged(low, high, 2).qparams() == (1.0, zero_point)


def test_a_constant_positive_channel_has_the_highest_code_and_is_exact():
    x = np.full((1, 3), 3.75, np.float32)
    q = Case('affine', 'weight', 4).make()
    same_bits(q.quantize(nd.array(x)).asnumpy(), [[15] * 3])
    same_bits(infer(q, x), x)


def test_a_constant_negative_channel_has_code_0_and_is_exact():
    x = np.full((1, 3), -3.75, np.float32)
    q = Case('affine', 'weight', 4).make()
    same_bits(q.quantize(nd.array(x)).asnumpy(), [[0] * 3])
    same_bits(infer(q, x), x)


def test_all_zeros_have_the_code_of_zero():
    q = Case('affine', 'weight', 4).make()
    zeros = nd.zeros((1, 3))
    same_bits(q.quantize(zeros).asnumpy(), [[int(q.qparams(zeros).zero_point[0])] * 3])


def test_each_end_of_the_range_moves_by_itself():
    q = ACTIVATION.make(ema_decay=0.75)
    run(q, np.array([[-4, 8.0]], np.float32))
    run(q, np.array([[-8, 4.0]], np.float32))
    assert (q.value('lo'), q.value('hi'), q.value('initialized')) == (-5, 7, 1)


def test_a_range_that_is_zero_at_first_counts_as_set():
    """The flag tells, not the value: after an all-zero batch the average goes on."""
    q = ACTIVATION.make(ema_decay=0.75)
    run(q, np.zeros((1, 4), np.float32))
    run(q, np.array([[-4, 8.0]], np.float32))
    assert (q.value('lo'), q.value('hi')) == (-1, 2)


@pytest.mark.parametrize('name, percentile', [('affine', 100), ('fqn', 99.9)])
def test_the_batch_range_is_the_percentile_of_the_method(name, percentile):
    x = np.random.default_rng(1).normal(size=(4, 5000)).astype(np.float32)
    q = Case(name, 'activation', 4).make()
    run(q, x)
    low, high = np.percentile(x.astype(np.float64), [100 - percentile, percentile])
    assert_allclose([q.value('lo')[0], q.value('hi')[0]], [low, high], rtol=1e-6)       # float32 interpolation


def test_fqn_weights_are_affine_per_channel():
    x = Case('fqn', 'weight', 4).data(1)
    same_bits(infer(quantizers.create('fqn', 4), x), infer(quantizers.create('affine', 4, per_channel=True), x))


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_a_broken_batch_before_the_first_range_leaves_it_unset(bad):
    q = ACTIVATION.make()
    run(q, np.array([[1, bad]], np.float32))
    assert (q.value('lo'), q.value('hi'), q.value('initialized')) == (0, 0, 0)


@pytest.mark.parametrize('place', range(0, 40, 7))
def test_nan_anywhere_keeps_the_percentile_range(place):
    q = Case('fqn', 'activation', 4).make()
    x = np.random.default_rng(1).normal(size=(1, 40)).astype(np.float32)
    run(q, x)
    before = q.value('lo'), q.value('hi')
    x[0, place] = np.nan
    run(q, 3 * x)
    assert (q.value('lo'), q.value('hi')) == before


def test_calibration_takes_the_range_of_the_data():
    q = ACTIVATION.make()
    q.init_from(nd.array([[-1, 0.5, 14]]))
    assert (q.value('lo'), q.value('hi'), q.value('initialized')) == (-1, 14, 1)
