"""The references against numbers worked out by hand from the papers' formulas, and against numeric derivatives."""
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from . import METHODS, affine, cliprelu, dorefa, fqn, gdrq, int8, lsq, lsqplus, none, observers, pact, qil, sawb
from .common import EPS, near_edge, near_half, near_half_measured, round_half_even

# Parameters and scales are rounded to float32 (relative error 6e-8); sums of a few of them stay below this.
CLOSE = {'rtol': 1e-6, 'atol': 1e-9}


def f32(*values):
    return np.array(values, np.float32)


def ones(x):
    return np.ones(x.shape)


# common

def test_halves_round_to_even():
    assert_array_equal(round_half_even(np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])), [-2, -2, 0, 0, 2, 2])


def test_exact_halves_and_exact_edges_are_not_ties():
    assert_array_equal(near_half(np.array([0.5, 0.50001, 0.499, 1.49995, -2.5])), [False, True, False, True, False])
    assert_array_equal(near_edge(np.array([2.0, 2.000001, 2.1, 1.999999]), 2.0), [False, True, False, True])


def test_exact_halves_of_a_measured_scale_are_ties_unless_the_scale_is_a_short_number():
    marked = near_half_measured(np.array([0.5, 0.5, 0.3]), np.array([0.75, 1 / 3, 1 / 3]))
    assert_array_equal(marked, [False, True, False])


# int8

def test_int8_weight_codes():
    x = f32(0.5, -1.5, 3, 0.4, 2.5)                         # Q = 3, s = 1
    result = int8.weight(x, ones(x), 3)
    assert_array_equal(result.codes, [0, -2, 3, 0, 2])
    assert_array_equal(result.scale, [1])
    assert not result.ties.any()


@pytest.mark.parametrize('axis', [0, 1])
def test_int8_weight_channels_have_their_own_scale(axis):
    x = np.array([[3, 1, -2], [6, 0, 2]], np.float32)
    x = x if axis == 0 else x.T
    result = int8.weight(x, ones(x), 3, per_channel=True, axis=axis)
    codes = np.array([[3, 1, -2], [3, 0, 1]])
    assert_array_equal(result.scale, [1, 2])
    assert_array_equal(result.codes, codes if axis == 0 else codes.T)


def test_int8_activation_moves_amax_then_uses_it():
    x = f32(8, 1, 0)                                        # 0.75 * 4 + 0.25 * 8 = 5, s = 5 / 3
    result = int8.activation(x, ones(x), 2, state={'amax': [4], 'steps': [7]}, ema_decay=0.75, grad_mode='clip')
    assert_array_equal(result.state['amax'], [5])
    assert_array_equal(result.state['steps'], [8])
    assert_array_equal(result.codes, [3, 1, 0])             # 4.8 clipped, 0.6, 0
    assert_array_equal(result.dx, [0, 1, 1])


def test_int8_delay_collects_but_does_not_quantize():
    state, x = None, f32(1, 0.3)
    for step in range(3):
        result = int8.activation(x, ones(x), 2, signed=True, state=state, delay_quant=2)
        state = result.state
        assert_array_equal(result.y, x if step < 2 else [1, 0])
    assert_array_equal(state['amax'], [1])


def test_int8_activation_without_state_returns_x_in_inference():
    x = f32(1, 0.3)
    assert_array_equal(int8.activation(x, ones(x), 8, training=False).y, x)


def test_ewgs_scales_the_gradient_by_the_rounding_error():
    x = f32(2.25, 2.25, 3)                                  # s = 1, v - q = 0.25, factor 1 +- 0.2 * 0.25
    assert_allclose(int8.weight(x, np.array([2, -2, 1]), 3, ewgs=0.2).dx, [2.1, -1.9, 1], **CLOSE)


# affine and FQN

def test_affine_zero_point():
    x = f32(-1, -0.4, 0.6, 2)                               # s = 3 / 3, z = 1
    result = affine.weight(x, ones(x), 2)
    assert_array_equal(result.scale, [1])
    assert_array_equal(result.zero_point, [1])
    assert_array_equal(result.codes, [0, 1, 2, 3])
    assert_array_equal(result.y, [-1, 0, 1, 2])


def test_affine_zero_point_is_nudged_and_the_range_moves_with_it():
    x = f32(-1, 0, 5)                                       # s = 2, z = R(0.5) = 0, range [0, 6]
    result = affine.weight(x, ones(x), 2, grad_mode='clip')
    assert_array_equal(result.zero_point, [0])
    assert_array_equal(result.y, [0, 0, 4])                 # 2.5 to even
    assert_array_equal(result.dx, [0, 1, 1])


def test_affine_constant_channel_is_exact():
    x = np.array([[6, 6], [0, 0], [-3, -3]], np.float32)
    result = affine.weight(x, ones(x), 2, per_channel=True)
    assert_array_equal(result.y, x)
    assert_array_equal(result.codes, [[3, 3], [0, 0], [0, 0]])
    assert_array_equal(result.zero_point, [0, 0, 3])


def test_affine_activation_range_is_set_then_averaged():
    state = affine.activation(f32(-1, 3), np.ones(2), 8).state
    assert [state[k][0] for k in ('lo', 'hi', 'initialized')] == [-1, 3, 1]
    state = affine.activation(f32(-5, 1), np.ones(2), 8, state=state, ema_decay=0.75).state
    assert [state['lo'][0], state['hi'][0]] == [-2, 2.5]


def test_affine_keeps_its_state_when_the_batch_is_not_finite():
    state = {'lo': [-1], 'hi': [3], 'initialized': [1]}
    result = affine.activation(f32(np.nan, 1), np.ones(2), 8, state=state)
    assert [result.state['lo'][0], result.state['hi'][0]] == [-1, 3]
    assert np.isnan(result.y[0]) and np.isfinite(result.y[1])


def test_fqn_activation_range_leaves_out_one_in_a_thousand():
    x = np.arange(1001, dtype=np.float32)
    state = fqn.activation(x, ones(x), 8).state
    assert_allclose([state['lo'][0], state['hi'][0]], [1, 999], **CLOSE)


# PACT

def test_pact_unsigned():
    x = f32(-1, 0.4, 1.5, 2.5, 3, 4)                        # s = 1
    result = pact.activation(x, np.array([1., 2, 4, 8, 16, 32]), 2, params={'alpha': [3]})
    assert_array_equal(result.codes, [0, 0, 2, 2, 3, 3])
    assert_array_equal(result.dx, [0, 2, 4, 8, 0, 0])
    assert_array_equal(result.dparams['alpha'], [48])


def test_pact_signed():
    x = f32(-4, -3, -1, 2, 3)
    result = pact.activation(x, np.array([1., 2, 4, 8, 16]), 3, signed=True, params={'alpha': [3]})
    assert_array_equal(result.codes, [-3, -3, -1, 2, 3])
    assert_array_equal(result.dx, [0, 0, 4, 8, 0])
    assert_array_equal(result.dparams['alpha'], [16 - 3])


def test_pact_negative_alpha_still_receives_its_gradient():
    x = f32(1, 2)
    result = pact.activation(x, ones(x), 4, params={'alpha': [-1]})
    assert_array_equal(result.dparams['alpha'], [2])
    assert_allclose(result.y, [EPS, EPS], **CLOSE)


def test_pact_initial():
    assert pact.initial()['alpha'] == 8
    assert_allclose(pact.initial(np.arange(1001))['alpha'], [999], **CLOSE)


# SAWB

def test_sawb_two_bit_levels():
    x = f32(3, -3, 1, -1)                                   # mean|w| = 2, mean w^2 = 5
    result = sawb.weight(x, ones(x), 2)
    a = 2.8485322                                           # 3.12 * 2.2360680 - 2.064 * 2
    assert_allclose(result.scale, [a / 3], **CLOSE)
    assert_array_equal(result.codes, [3, -3, 1, -1])
    assert_allclose(result.y, [a, -a, a / 3, -a / 3], **CLOSE)


def test_sawb_tread():
    x = f32(3, -3, 1, -1)
    result = sawb.weight(x, np.array([1., 2, 4, 8]), 2, grid='tread', grad_mode='clip')
    assert_allclose(result.scale, [2.3937767], **CLOSE)     # 2.6 * 2.2360680 - 1.71 * 2
    assert_array_equal(result.codes, [1, -1, 0, 0])
    assert_array_equal(result.dx, [0, 0, 4, 8])


def test_sawb_binary_weights_keep_their_size():
    x = f32(1, -1, -1, 1)                                   # 3.12 - 2.064 = 1.056 is clipped to max|w|
    assert_allclose(sawb.weight(x, ones(x), 2).y, x, **CLOSE)


def test_sawb_eight_bits_use_the_narrow_grid():
    x = np.linspace(-1, 1, 101).astype(np.float32)
    assert np.abs(sawb.weight(x, ones(x), 8).codes).max() <= 127
    assert 0 in sawb.weight(x, ones(x), 8).codes


# DoReFa

def test_dorefa_weight_codes():
    x = np.arctanh([0.6, -0.3, 0]).astype(np.float32)       # v L = 3, 0.75, 1.5
    result = dorefa.weight(x, ones(x), 2)
    assert_array_equal(result.codes, [3, -1, 1])
    assert_allclose(result.y, [1, -1 / 3, 1 / 3], **CLOSE)
    assert not result.ties.any()


def test_dorefa_weight_gradient():
    x = np.arctanh([0.6, -0.3, 0.3]).astype(np.float32)     # sum g t = 1.2; dt_0 = 1 / 0.6 - 1.2 / 0.36
    g = np.array([1., 2, 4])
    tolerance = {'rtol': 1e-6}                             # x was rounded to float32
    assert_allclose(dorefa.weight(x, g, 2).dx, [-1.0666667, 3.0333333, 6.0666667], **tolerance)
    assert_allclose(dorefa.weight(x, g, 2, detach_max=True).dx, [1.0666667, 3.0333333, 6.0666667], **tolerance)


def test_dorefa_tied_maxima_share_their_term():
    x = np.arctanh([0.5, -0.5]).astype(np.float32)          # sum g t = 0.5 * (1 - 3) = -1; the term is 4, half to each
    dx = dorefa.weight(x, np.array([1., 3]), 2).dx
    assert_allclose(dx, [0.75 * (2 + 2), 0.75 * (6 - 2)], rtol=1e-6)


def test_dorefa_weight_gradient_is_the_derivative_without_rounding():
    x, g = np.random.RandomState(0).randn(7), np.random.RandomState(1).randn(7)
    def loss(w):
        return np.sum(g * np.tanh(w) / np.abs(np.tanh(w)).max())
    assert_allclose(dorefa.weight(x, g, 4).dx, numeric(loss, x), rtol=1e-6, atol=1e-8)      # of central differences


def test_dorefa_one_bit():
    x = f32(0, -1, 3)
    assert_allclose(dorefa.weight(x, ones(x), 1).y, [4 / 3, -4 / 3, 4 / 3], **CLOSE)


def test_dorefa_activation():
    x = f32(-1, 0, 0.5, 1, 2)
    result = dorefa.activation(x, ones(x), 2)
    assert_array_equal(result.codes, [0, 0, 2, 3, 3])       # 0.5 * 3 = 1.5 to even
    assert_array_equal(result.dx, [0, 1, 1, 1, 0])


def test_dorefa_gradient_quantizer():
    g = np.array([[1, -1, 0.5], [2, 0, 0]])                 # (g / 2M + 1 / 2) * 3 = 3, 0, 2.25 and 3, 1.5, 1.5
    assert_allclose(dorefa.gradient(g, 2, noise=0), [[1, -1, 1 / 3], [2, 2 / 3, 2 / 3]], **CLOSE)


# QIL

def test_qil_weight():
    x = f32(0.5, 1.5, -2.25, 4)                             # p = 1, t = 3, u = -, 0.25, 0.625, -; q = 3
    result = qil.weight(x, ones(x), 3, params={'center': [2], 'distance': [1], 'gamma': [1]})
    assert_array_equal(result.codes, [0, 1, -2, 3])
    assert_array_equal(result.y, [0, 1, -2, 3])
    assert_array_equal(result.dx, [0, 1.5, 1.5, 0])
    assert_allclose(result.dparams['center'], [2 / 3], **CLOSE)              # 3 * (-0.5) * (1 - 1) + 2 / 3
    assert_allclose(result.dparams['distance'], [1.125 + 2 / 3], **CLOSE)    # 3 * (-0.5) * (-0.5 - 0.25) + 2 / 3
    assert_allclose(result.dparams['gamma'], [-0.1584639], **CLOSE)          # 3 * (0.25 ln 0.25 - 0.625 ln 0.625)


def test_qil_activation_prunes_and_clips():
    x = f32(-5, 0.5, 1.5, 2.25, 4)
    result = qil.activation(x, ones(x), 2, params={'center': [2], 'distance': [1]}, rescale=False)
    assert_array_equal(result.codes, [0, 0, 1, 2, 3])
    assert_allclose(result.y, [0, 0, 1 / 3, 2 / 3, 1], **CLOSE)
    assert_array_equal(result.dx, [0, 0, 0.5, 0.5, 0])


@pytest.mark.parametrize('name', ['center', 'distance', 'gamma'])
def test_qil_gradients_are_the_derivatives_without_rounding(name):
    x, g = np.random.RandomState(0).randn(20), np.random.RandomState(1).randn(20)
    params = {'center': np.array([0.75]), 'distance': np.array([0.5]), 'gamma': np.array([1.5])}

    def loss(value):
        c, d, gamma = (value[0] if n == name else params[n][0] for n in ('center', 'distance', 'gamma'))
        return np.sum(g * np.sign(x) * np.clip((np.abs(x) - (c - d)) / (2 * d), 0, 1) ** gamma)

    result = qil.weight(x, g, 4, params=params, rescale=False)
    assert_allclose(result.dparams[name], numeric(loss, params[name]), rtol=1e-6, atol=1e-8)


def test_qil_starts_as_the_identity():
    x = f32(0.5, -2, 1)
    params = qil.initial(x, 4, 'weight')
    assert [params[k][0] for k in ('center', 'distance', 'gamma')] == [1, 1, 1]
    assert_allclose(qil.weight(x, ones(x), 16, params=params).y, x, atol=2 / 32767)     # one step


# GDRQ

def test_gdrq_weight():
    x = f32(1, -1, 3, -3)                                   # T = 4, s = 4 / 3, v = 0.75, 2.25
    result = gdrq.weight(x, ones(x), 3)
    assert_array_equal(result.codes, [1, -1, 2, -2])
    assert_allclose(result.scale, [4 / 3], **CLOSE)


def test_gdrq_groups_of_output_channels():
    x = np.array([[1, 1], [3, 3], [2, 2], [0, 0]], np.float32)              # mean|w| = 2 and 1
    result = gdrq.weight(x, ones(x), 2, ktimes=1.0, group_size=2, grad_mode='clip')
    assert_array_equal(result.scale, [2, 2, 1, 1])
    assert_array_equal(result.codes, [[0, 0], [1, 1], [1, 1], [0, 0]])
    assert_array_equal(result.dx, [[1, 1], [0, 0], [0, 0], [1, 1]])


def test_gdrq_activation_threshold_approaches_the_batch():
    x = f32(1, 0, 0.5, 0.5)                                 # t = 2 * 0.5; 4 + 0.25 * (1 - 4)
    state = gdrq.activation(x, ones(x), 4, state={'threshold': [4], 'phase': [1]}, lam=0.25).state
    assert_array_equal(state['threshold'], [3.25])


def test_gdrq_reshaping_only_clips():
    x = f32(1, -1, 3, -3)
    assert_array_equal(gdrq.weight(x, ones(x), 3, ktimes=1.0, do_quant=False).y, [1, -1, 2, -2])


# LSQ

def test_lsq_weight():
    x = f32(-3, -0.7, 0.1, 0.6, 2)                          # v = -6, -1.4, 0.2, 1.2, 4; r = -4, 0.4, -0.2, -0.2, 3
    result = lsq.weight(x, np.array([1., 2, 3, 4, 5]), 3, params={'scale': [0.5]})
    assert_array_equal(result.codes, [-4, -1, 0, 1, 3])
    assert_array_equal(result.dx, [0, 2, 3, 4, 0])
    assert_allclose(result.dparams['scale'], [10.4 / np.sqrt(15)], **CLOSE)


def test_lsq_activation_counts_one_sample():
    x = f32(0.4, 5).reshape(2, 1)                           # L = 3, r = -0.4, 3, N = 1
    result = lsq.activation(x, ones(x), 2, params={'scale': [1]})
    assert_allclose(result.dparams['scale'], [2.6 / np.sqrt(3)], **CLOSE)


def test_lsq_channels_have_their_own_gradient():
    x = np.array([[0.4, 5], [0.2, 0.2]], np.float32)        # qmax = 1, N = 2
    result = lsq.weight(x, ones(x), 2, per_channel=True, params={'scale': [1, 0.1]})
    assert_allclose(result.dparams['scale'], [0.6 / np.sqrt(2), 2 / np.sqrt(2)], **CLOSE)


def test_lsq_with_ewgs():
    x = f32(0.6)                                            # v = 1.2, q = 1, factor 1.1; 1 - 1.1 * 1.2
    result = lsq.weight(x, ones(x), 3, params={'scale': [0.5]}, ewgs=0.5)
    assert_allclose(result.dx, [1.1], **CLOSE)
    assert_allclose(result.dparams['scale'], [-0.32 / np.sqrt(3)], **CLOSE)


def test_lsq_initial():
    assert_allclose(lsq.initial(f32(1, -3), 3, 'weight')['scale'], [4 / np.sqrt(3)], **CLOSE)
    assert_allclose(lsq.initial(f32(1, 3), 2, 'activation')['scale'], [4 / np.sqrt(3)], **CLOSE)


def test_lsqplus_activation():
    x = f32(-2, -0.8, 0, 0.3, 1).reshape(1, 5)              # v = -2, 0.4, 2, 2.6, 4; r = 0, -0.4, 0, 0.4, 3
    g = np.array([[1., 2, 3, 4, 5]])
    result = lsqplus.activation(x, g, 2, params={'scale': [0.5], 'offset': [-1]})
    assert_array_equal(result.codes, [[0, 0, 2, 3, 3]])
    assert_array_equal(result.y, [[-1, -1, 0, 0.5, 0.5]])
    assert_array_equal(result.dx, [[0, 2, 3, 4, 0]])
    assert_allclose(result.dparams['scale'], [15.8 / np.sqrt(15)], **CLOSE)
    assert_allclose(result.dparams['offset'], [6 / np.sqrt(15)], **CLOSE)
    assert_array_equal(result.zero_point, [2])


def test_lsqplus_initial():
    params = lsqplus.initial(f32(-1, 0, 1, 2), 2, 'activation')              # already on the grid: no shrinking
    assert [params['scale'][0], params['offset'][0]] == [1, -1]
    assert lsqplus.initial(f32(1, -1), 3, 'weight')['scale'] == [0.75]       # 3 sigma / 4


# fixed clip, none

def test_cliprelu():
    x = f32(-1, 1, 3, 5, 6, 7)                              # s = 2
    result = cliprelu.activation(x, ones(x), 2)
    assert_array_equal(result.codes, [0, 0, 2, 2, 3, 3])
    assert_array_equal(result.dx, [0, 1, 1, 1, 1, 0])


def test_none():
    x = f32(1, -2)
    assert_array_equal(none.weight(x, x, 4).y, x)
    assert_array_equal(none.activation(x, x, 4).dx, x)


# observers

def test_observers_of_ranges():
    batches = [f32(-1, 3), f32(-5, 1)]
    assert observers.minmax(batches) == (-5, 3)
    assert observers.ema(batches, 0.75) == (-2, 2.5)
    assert observers.ema_amax(batches, 0.75) == 3.5
    assert observers.ema_amax(batches, 0.75, signed=False) == 2.5


def test_percentile_interpolates():
    assert observers.percentile(np.arange(11), 25) == 2.5
    assert observers.percentile(f32(-4, 2), 100, signed=True) == 4
    values = np.random.RandomState(0).randn(999)
    assert_allclose(observers.percentile(values, 99.9), np.percentile(values, 99.9), rtol=1e-12)


def test_mse_keeps_values_that_are_on_the_grid_and_clips_an_outlier():
    assert observers.mse(np.arange(-3, 4), -3, 3) == 3
    # 2-bit narrow grid: with scale 0.2 * 10 only the outlier is wrong (by 8); any larger scale misses all the twos
    assert_allclose(observers.mse(np.append(np.full(1000, 2), 10), -1, 1), 2)


def test_kl_divergence_of_small_histograms():
    # P = (4, 0, 4) / 8, Qd = (4, 0, 2) / 6
    assert_allclose(observers._divergence(np.array([4., 0, 2, 2]), 3, 2), 0.5 * np.log(0.75) + 0.5 * np.log(1.5))
    # P = (1, 1, 2) / 4, Qd = (1, 1, 0) / 2 and 1e-4 for the last
    assert_allclose(observers._divergence(np.array([1., 1, 0, 2]), 3, 3), 0.5 * np.log(0.5) + 0.5 * np.log(5000))


def test_kl_clips_a_far_outlier_and_falls_back_on_constants():
    values = np.append(np.random.RandomState(0).rand(20000), 50)
    assert 0.9 < observers.kl(values, 4) < 5
    assert observers.kl(f32(2, 2), 8) == 2
    assert observers.kl([], 8) == 0


# every method

PARAMS = {'alpha': [2.0], 'scale': [0.3], 'offset': [-0.4], 'center': [1.0], 'distance': [0.9], 'gamma': [1.0]}
CASES = [(name, role) for name, module in METHODS.items() for role in ('weight', 'activation')
         if hasattr(module, role) and name != 'none']


@pytest.mark.parametrize('bits', [2, 3, 4, 7, 8])
@pytest.mark.parametrize('name, role', CASES)
def test_no_method_has_more_levels_than_its_bits_allow(name, role, bits):
    x = np.random.RandomState(0).randn(8, 2000).astype(np.float32) * 3
    result = getattr(METHODS[name], role)(x, ones(x), bits, params=PARAMS)
    assert len(np.unique(result.codes)) <= 2 ** bits
    assert result.ties.mean() < 0.02        # the tests that use ties must still see nearly everything
    assert result.y.shape == result.codes.shape == result.dx.shape == result.ties.shape == x.shape
    assert result.scale.shape == result.zero_point.shape == (1,)
    offset = -0.4 if (name, role) == ('lsqplus', 'activation') else 0
    y = result.scale * (result.codes - (0 if offset else result.zero_point)) + offset
    assert_allclose(result.y, y, rtol=1e-7, atol=1e-7)      # the offset is stored in float32


@pytest.mark.parametrize('name, role', CASES)
def test_all_zero_data_stay_zero_with_finite_gradients(name, role):
    x = np.zeros((4, 5), np.float32)
    params = dict(PARAMS, offset=[0.0])
    result = getattr(METHODS[name], role)(x, ones(x), 4, params=params)
    assert_allclose(result.y, 0, atol=EPS)                  # the mid-rise grid has no zero, only +-EPS / L
    for gradient in [result.dx, *result.dparams.values()]:
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize('name, role', CASES)
def test_empty_batches_pass(name, role):
    x = np.zeros((0, 5), np.float32)
    assert getattr(METHODS[name], role)(x, ones(x), 4, params=PARAMS).y.shape == (0, 5)


@pytest.mark.parametrize('name, role', [case for case in CASES if case[1] == 'activation'])
def test_nan_is_never_hidden(name, role):
    x = f32(np.nan, 1.0, 0.5).reshape(1, 3)
    with np.errstate(invalid='ignore'):
        y = getattr(METHODS[name], role)(x, ones(x), 4, params=PARAMS).y
    assert np.isnan(y[0, 0]) and np.isfinite(y[0, 1:]).all()


@pytest.mark.parametrize('call', [lambda x: int8.weight(x, x, 1), lambda x: gdrq.weight(x, x, 1),
                                  lambda x: qil.weight(x, x, 1, params=PARAMS),
                                  lambda x: lsq.weight(x, x, 1, params=PARAMS),
                                  lambda x: pact.activation(x, x, 1, signed=True, params=PARAMS)])
def test_one_bit_has_no_useful_signed_grid(call):
    with pytest.raises(ValueError, match='needs bits >= 2'):
        call(np.ones((2, 2), np.float32))


def test_group_size_must_divide_the_channels():
    with pytest.raises(ValueError, match='group_size 2 does not divide 3'):
        gdrq.weight(np.ones((3, 1)), np.ones((3, 1)), 4, group_size=2)


def numeric(function, x, step=1e-6):
    """Central differences."""
    gradient = np.zeros(x.shape)
    for i in range(x.size):
        difference = np.zeros(x.shape)
        difference[i] = step
        gradient[i] = (function(x + difference) - function(x - difference)) / (2 * step)
    return gradient
