"""GDRQ: thresholds from the mean magnitude, groups, two phases, search."""
import numpy as np
import pytest
from cases import STATIC, Case, compared, infer, run, same_bits
from mxnet import gluon, nd
from numpy.testing import assert_allclose

from reference import observers

WEIGHT, ACTIVATION = Case('gdrq', 'weight', 4), Case('gdrq', 'activation', 4)
HYBRIDIZED = pytest.mark.parametrize('hybridized', [False, True], ids=['imperative', 'hybridized'])


@pytest.mark.parametrize('group_size', [1, 2, 4])
def test_each_group_of_channels_has_its_own_threshold(group_size):
    x = WEIGHT.data(1) * np.array([1, 2, 3, 4], np.float32).reshape(4, 1, 1, 1)
    q = WEIGHT.make(group_size=group_size, shape=x.shape)
    thresholds = 2 * np.abs(x.astype(np.float64)).reshape(4 // group_size, -1).mean(axis=1)
    # a float32 mean over up to 216 numbers
    assert_allclose(q.qparams(nd.array(x)).scale, np.repeat(thresholds, group_size) / 7, rtol=2e-6)


@pytest.mark.parametrize('shape', [(4, 6, 3, 3), None], ids=['shape known', 'shape unknown'])
def test_a_group_size_that_does_not_divide_the_channels_is_an_error(shape):
    with pytest.raises(ValueError, match='group_size=3 does not divide the 4 output channels'):
        q = WEIGHT.make(group_size=3, shape=shape)
        run(q, WEIGHT.data(1))


@HYBRIDIZED
def test_in_the_first_phase_weights_are_clipped_only(hybridized):
    q = WEIGHT.make(hybridized, do_quant=False)
    x = WEIGHT.data(1)
    threshold = q.qparams(nd.array(x)).scale[0] * 7
    assert_allclose(run(q, x)[0], np.clip(x, -threshold, threshold), rtol=1e-6)         # threshold / 7 * 7


@HYBRIDIZED
@pytest.mark.parametrize('signed', [True, False])
def test_in_the_first_phase_activations_are_clipped_only(hybridized, signed):
    q = Case('gdrq', 'activation', 4, signed).make(hybridized, do_quant=False)
    x = ACTIVATION.data(1)
    y = run(q, x)[0]
    threshold = q.value('threshold')
    same_bits(y, np.clip(x, -threshold if signed else 0, threshold))
    same_bits(infer(q, x), y)                               # inference follows the phase


@HYBRIDIZED
@pytest.mark.parametrize('case', [WEIGHT, ACTIVATION], ids=str)
def test_a_running_graph_follows_the_phase(case, hybridized):
    q, quantizing = case.make(do_quant=False), case.make()
    if hybridized:
        q.hybridize(**STATIC)
    x = case.data(1)
    run(q, x)
    run(quantizing, x)
    q.set_phase(True)
    same_bits(infer(q, x), infer(quantizing, x))
    q.set_phase(False)
    assert len(np.unique(infer(q, x))) > 16


@pytest.mark.parametrize('case', [WEIGHT, ACTIVATION], ids=str)
def test_the_phase_is_saved(case, tmp_path):
    q = case.make()
    run(q, case.data(1))
    q.set_phase(False)
    q.save_parameters(str(tmp_path / 'q'))
    other = case.make()
    other.load_parameters(str(tmp_path / 'q'))
    same_bits(infer(other, case.data(1)), infer(q, case.data(1)))


def test_the_threshold_moves_towards_the_batch():
    q = ACTIVATION.make(lam=0.25)
    run(q, np.array([[1, 3.0]], np.float32))                # 2 * mean = 4
    assert q.value('threshold') == 4
    run(q, np.array([[2, 6.0]], np.float32))                # 4 + 0.25 * (8 - 4)
    assert q.value('threshold') == 5


def test_zeros_count_in_the_mean():
    q = ACTIVATION.make(ktimes=3.0)
    run(q, np.array([[0, 0, 0, 4.0]], np.float32))
    assert q.value('threshold') == 3


def test_the_threshold_converges_on_a_constant_distribution():
    q = ACTIVATION.make(lam=0.5)
    run(q, np.full((1, 4), 100.0, np.float32))
    for _ in range(30):
        run(q, np.full((1, 4), 2.0, np.float32))
    assert_allclose(q.value('threshold'), 4, rtol=1e-6)     # 196 / 2**30


def test_search_finds_the_threshold_of_least_squared_error():
    x = WEIGHT.data(1)
    q = WEIGHT.make(do_quant=False, alpha_mode='search')
    q.search(nd.array(x))
    expected = observers.mse(x.astype(np.float64), -7, 7)
    assert_allclose(q.qparams(nd.array(x)).scale, expected / 7, rtol=1e-5)      # through the ratio to a float32 mean


def test_search_is_done_for_each_group():
    x = WEIGHT.data(1)
    x[2:] **= 3
    q = WEIGHT.make(group_size=2, alpha_mode='search', shape=x.shape)
    q.search(nd.array(x))
    expected = [observers.mse(half.astype(np.float64), -7, 7) / 7 for half in (x[:2], x[2:])]
    assert_allclose(q.qparams(nd.array(x)).scale, np.repeat(expected, 2), rtol=1e-5)


def test_after_the_search_the_threshold_follows_the_mean_magnitude():
    x = WEIGHT.data(1)
    q = WEIGHT.make(alpha_mode='search')
    q.search(nd.array(x))
    before = q.qparams(nd.array(x)).scale
    assert_allclose(q.qparams(nd.array(3 * x)).scale, 3 * before, rtol=1e-6)


def test_the_search_survives_saving(tmp_path):
    x = WEIGHT.data(1)
    q = WEIGHT.make(alpha_mode='search')
    q.search(nd.array(x))
    q.save_parameters(str(tmp_path / 'q'))
    other = WEIGHT.make(alpha_mode='search')
    other.load_parameters(str(tmp_path / 'q'))
    same_bits(infer(other, x), infer(q, x))


def test_entering_the_second_phase_searches_the_weight_of_the_layer():
    weight = gluon.Parameter('weight', shape=WEIGHT.shape)
    weight.initialize(init='uniform')
    q = WEIGHT.make(do_quant=False, alpha_mode='search')
    q.bind(weight)
    q.set_phase(True)
    expected = observers.mse(weight.data().asnumpy().astype(np.float64), -7, 7)
    assert_allclose(q.qparams().scale, expected / 7, rtol=1e-5)


def test_a_zero_group_gives_zero():
    x = WEIGHT.data(1)
    x[:2] = 0
    q = WEIGHT.make(group_size=2, shape=x.shape)
    assert not infer(q, x)[:2].any()


def test_transposed_convolutions_group_axis_1():
    x = WEIGHT.data(1)
    q = Case('gdrq', 'weight', 4, axis=1).make(group_size=3, shape=x.shape)
    other = WEIGHT.make(group_size=3, shape=x.swapaxes(0, 1).shape)
    same_bits(infer(q, x), infer(other, x.swapaxes(0, 1)).swapaxes(0, 1))


def test_a_frozen_threshold_stays():
    q = ACTIVATION.make()
    run(q, ACTIVATION.data(1))
    q.freeze()
    before = q.value('threshold')
    one = compared(ACTIVATION, q, ACTIVATION.data(2, 3.0), 1, training=False)
    run(q, ACTIVATION.data(2, 3.0))
    same_bits(q.value('threshold'), before)
    same_bits(run(q, ACTIVATION.data(2, 3.0))[0], one.y)
