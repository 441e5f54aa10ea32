"""DoReFa: tanh weights, unit-range activations."""
import numpy as np
import pytest
from cases import Case, infer, run, same_bits
from mxnet import nd
from numpy.testing import assert_allclose

from reference import dorefa


@pytest.mark.parametrize('bits', [2, 3, 4, 8])
def test_a_zero_weight_gets_code_plus_1(bits):
    q = Case('dorefa', 'weight', bits).make()
    assert q.quantize(nd.array([[0, 0.5, -1.0]])).asnumpy()[0, 0] == 1


def test_outputs_reach_1_in_the_paper_and_the_largest_weight_with_rescale():
    x = np.array([[-2.5, 0.3, 1]], np.float32)
    assert infer(Case('dorefa', 'weight', 3).make(), x)[0, 0] == -1
    assert_allclose(infer(Case('dorefa', 'weight', 3).make(rescale='max'), x)[0, 0], -2.5, rtol=1e-6)   # 7 * (2.5 / 7)


def test_one_bit_is_the_mean_magnitude_with_the_sign():
    x = np.array([[-3, 0, 1, 4.0]], np.float32)
    q = Case('dorefa', 'weight', 1).make()
    same_bits(infer(q, x), [[-2, 2, 2, 2]])
    same_bits(q.quantize(nd.array(x)).asnumpy(), [[-1, 1, 1, 1]])
    assert q.qparams(nd.array(x)).scale == 2


def test_one_bit_passes_the_gradient():
    case = Case('dorefa', 'weight', 1)
    same_bits(run(case.make(), case.data(1), case.data(2))[1], case.data(2))


@pytest.mark.parametrize('rescale', [None, 'max'])
@pytest.mark.parametrize('signs', [(1, 1), (-1, -1), (1, -1)])
def test_tied_maxima_share_the_gradient_of_the_maximum(signs, rescale):
    x = np.array([[0.9 * signs[0], 0.1, -0.4, 0.9 * signs[1]]], np.float32)
    g = np.array([[0.3, -1.0, 2.0, 0.7]], np.float32)
    expected = dorefa.weight(x, g, 4, rescale=rescale).dx
    dx = run(Case('dorefa', 'weight', 4).make(rescale=rescale), x, g)[1]
    assert_allclose(dx, expected, rtol=1e-5, atol=1e-6)     # differences of float32 sums of four terms


def test_a_constant_maximum_passes_only_the_slope_of_tanh():
    x, g = np.array([[0.9, 0.1, -0.4]], np.float32), np.array([[0.3, -1.0, 2.0]], np.float32)
    dx = run(Case('dorefa', 'weight', 4).make(detach_max=True), x, g)[1]
    t = np.tanh(x.astype(np.float64))
    assert_allclose(dx, g / np.abs(t).max() * (1 - t ** 2), rtol=1e-6)


@pytest.mark.parametrize('bits', [1, 2, 4])
@pytest.mark.parametrize('rescale', [None, 'max'])
def test_a_zero_weight_tensor_gives_zero_and_no_gradient(bits, rescale):
    case = Case('dorefa', 'weight', bits)
    y, dx, _ = run(case.make(rescale=rescale), np.zeros(case.shape, np.float32))
    assert not y.any()
    assert bits == 1 or not dx.any()


def test_saturated_tanh_keeps_finite_gradients():
    x = np.array([[50, -80, 1e30]], np.float32)
    dx = run(Case('dorefa', 'weight', 4).make(), x)[1]
    same_bits(dx, [[0, 0, 0]])


def test_activations_are_clipped_to_the_unit_range():
    q = Case('dorefa', 'activation', 2).make()
    x = np.array([[-1, 0, 0.2, 0.4, 1, 7]], np.float32)
    same_bits(q.quantize(nd.array(x)).asnumpy(), [[0, 0, 1, 1, 3, 3]])
    assert_allclose(infer(q, x), np.array([[0, 0, 1, 1, 3, 3]]) / 3, rtol=1e-6)


def test_exact_halves_of_one_bit_activations_round_to_even():
    q = Case('dorefa', 'activation', 1).make()
    same_bits(q.quantize(nd.array([[0.5, 0.50000006, 0.49999997]])).asnumpy(), [[0, 1, 0]])
