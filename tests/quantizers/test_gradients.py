"""Gradients against the float64 references, ties and clip edges included."""
import itertools

import numpy as np
import pytest
from cases import ACTIVATIONS, EVERYTHING, ROUNDING, Case, compared, learned, over, run, same_bits
from mxnet import autograd, nd
from numpy.testing import assert_allclose

from gluonquant.quantizers import OBSERVE, OFF

# Elementwise products of a few float32 numbers.
INPUT = 1e-5
# Sums over hundreds of elements of both signs, in float32.
PARAMETER = 1e-4


def assert_gradients(one):
    """Input and Parameter gradients of a `Pass` equal the reference's."""
    decided = ~one.expected.ties
    assert decided.mean() > 0.75
    largest = np.abs(one.expected.dx[decided]).max(initial=0)
    assert_allclose(one.dx[decided], one.expected.dx[decided], rtol=0, atol=INPUT * max(largest, 1e-30))
    assert_parameter_gradients(one)


def assert_parameter_gradients(one):
    for name, gradient in one.dparams.items():
        expected = one.expected.dparams[name]
        assert_allclose(gradient, expected, rtol=0, atol=PARAMETER * np.abs(expected).max(), err_msg=name)


@over(EVERYTHING)
def test_gradients_of_two_training_passes_and_inference_equal_the_reference(case):
    q = case.make()
    for seed, size, training in ((1, 1.0, True), (2, 1.7, True), (3, 2.5, False)):
        assert_gradients(compared(case, q, case.data(seed, size), seed + 10, training))


@over([case for case in ROUNDING if learned(case.make())])
def test_learned_parameters_are_those_of_the_reference(case):
    one = compared(case, case.make(), case.data(1), seed=2)
    assert set(one.dparams) == set(one.expected.dparams)


@over([case for case in ROUNDING if learned(case.make())])
def test_gradients_at_other_values_of_the_parameters_equal_the_reference(case):
    x = case.data(1)
    for factor in (0.3, 1.6):
        q = case.ready(x)
        for name in learned(q):
            if name != 'gamma':
                q.write(**{name: q.value(name) * np.float32(factor)})
        assert_gradients(compared(case, q, x, seed=3))


OPTIONS = [
    Case('int8', 'activation', 4, True, options=(('grad_mode', 'clip'),)),
    Case('int8', 'activation', 4, False, options=(('grad_mode', 'clip'),)),
    Case('int8', 'activation', 8, True, options=(('ema_decay', 0.5),)),
    Case('affine', 'activation', 4, options=(('grad_mode', 'ste'),)),
    Case('affine', 'activation', 4, options=(('percentile', 97.0), ('ema_decay', 0.5))),
    Case('fqn', 'activation', 4, options=(('percentile', 90.0),)),
    Case('dorefa', 'weight', 3, options=(('rescale', 'max'),)),
    Case('dorefa', 'weight', 3, options=(('detach_max', True),)),
    Case('dorefa', 'weight', 3, options=(('rescale', 'max'), ('detach_max', True))),
    Case('sawb', 'weight', 4, options=(('grid', 'tread'),)),
    Case('sawb', 'weight', 4, options=(('grad_mode', 'clip'),)),
    Case('sawb', 'weight', 4, options=(('grid', 'tread'), ('grad_mode', 'clip'))),
    Case('sawb', 'weight', 3, per_channel=True, options=(('grad_mode', 'clip'),)),
    Case('qil', 'weight', 3, options=(('rescale', False),)),
    Case('qil', 'activation', 3, options=(('rescale', False),)),
    Case('gdrq', 'weight', 4, options=(('grad_mode', 'clip'),)),
    Case('gdrq', 'weight', 4, options=(('group_size', 2),)),
    Case('gdrq', 'weight', 4, options=(('group_size', 4), ('grad_mode', 'clip'), ('ktimes', 3.0))),
    Case('gdrq', 'weight', 4, options=(('do_quant', False), ('grad_mode', 'clip'))),
    Case('gdrq', 'weight', 4, options=(('group_size', 2), ('do_quant', False))),
    Case('gdrq', 'activation', 4, True, options=(('grad_mode', 'ste'), ('lam', 0.05))),
    Case('gdrq', 'activation', 4, False, options=(('do_quant', False),)),
    Case('gdrq', 'activation', 4, True, options=(('do_quant', False), ('ktimes', 3.0))),
    Case('cliprelu', 'activation', 4, options=(('threshold', 1.5),)),
    Case('int8', 'activation', 4, True, options=(('delay_quant', 2),)),
]


@over(OPTIONS)
def test_options_give_the_outputs_and_gradients_of_the_reference(case):
    q = case.make()
    for seed, size, training in ((1, 1.0, True), (2, 1.7, True), (3, 2.5, True), (4, 2.5, False)):
        one = compared(case, q, case.data(seed, size), seed + 10, training)
        decided = ~one.expected.ties
        assert_allclose(one.y[decided], one.expected.y[decided], rtol=0, atol=INPUT * np.abs(one.expected.y).max())
        assert_gradients(one)


# ---------------------------------------------------------------- element-wise gradient scaling

EWGS = [Case(name, role, bits, signed, per_channel, options=(('ewgs', 0.2),))
        for name, role, signed, per_channel in [
            ('int8', 'weight', None, False), ('int8', 'weight', None, True), ('int8', 'activation', True, False),
            ('int8', 'activation', False, False), ('affine', 'weight', None, True),
            ('affine', 'activation', None, False),
            ('lsq', 'weight', None, False), ('lsq', 'weight', None, True), ('lsq', 'activation', True, False),
            ('lsq', 'activation', False, False), ('pact', 'activation', True, False),
            ('pact', 'activation', False, False)]
        for bits in (2, 4)]
EWGS += [Case('int8', 'activation', 3, True, options=(('ewgs', 0.2), ('grad_mode', 'clip')))]


@over(EWGS)
def test_element_wise_gradient_scaling_equals_the_reference(case):
    q = case.make()
    for seed, size in ((1, 1.0), (2, 1.7)):
        assert_gradients(compared(case, q, case.data(seed, size), seed + 10))


@over(EWGS[::2])
def test_hybridized_element_wise_gradient_scaling_equals_imperative(case):
    x, g = case.data(1), case.data(2)
    for static, dynamic in zip(run(case.make(True), x, g)[:2], run(case.make(), x, g)[:2]):
        same_bits(static, dynamic)


@over(EWGS[::2])
def test_element_wise_gradient_scaling_with_delta_0_is_straight_through(case):
    plain = Case(case.name, case.role, case.bits, case.signed, case.per_channel)
    zero = Case(case.name, case.role, case.bits, case.signed, case.per_channel, options=(('ewgs', 0.0),))
    x, g = case.data(1), case.data(2)
    _, dx, dparams = run(plain.make(), x, g)
    _, dx_zero, dparams_zero = run(zero.make(), x, g)
    same_bits(dx_zero, dx)
    for name in dparams:
        assert_allclose(dparams_zero[name], dparams[name], rtol=PARAMETER)      # summed in another order


# ---------------------------------------------------------------- edges, ties: hand-made numbers that float32 holds


def at_edges(case, x, **parameters):
    """dx and Parameter gradients of each x alone, head gradient 1."""
    q = case.make()
    q.write(**parameters)
    columns = [run(q, np.array([[value]], np.float32), training=False) for value in x]
    return [float(dx[0, 0]) for _, dx, _ in columns], [dparams for _, _, dparams in columns]


def test_pact_passes_gradient_from_0_inclusive_to_alpha_exclusive():
    below, above = np.nextafter(np.float32(3), np.float32(0)), np.nextafter(np.float32(3), np.float32(4))
    dx, dparams = at_edges(Case('pact', 'activation', 2), [-1e-30, 0, below, 3, above], alpha=3.0)
    assert dx == [0, 1, 1, 0, 0]
    assert [float(d['alpha'][0]) for d in dparams] == [0, 0, 0, 1, 1]


def test_signed_pact_passes_gradient_between_the_edges_exclusive():
    below = np.nextafter(np.float32(3), np.float32(0))
    dx, dparams = at_edges(Case('pact', 'activation', 3, True), [-4, -3, -below, below, 3, 4], alpha=3.0)
    assert dx == [0, 0, 1, 1, 0, 0]
    assert [float(d['alpha'][0]) for d in dparams] == [-1, -1, 0, 0, 1, 1]


def test_lsq_passes_gradient_between_the_codes_exclusive():
    below = np.nextafter(np.float32(0.75), np.float32(0))
    dx, _ = at_edges(Case('lsq', 'activation', 2), [-0.1, 0, 1e-6, below, 0.75, 0.8], scale=0.25, initialized=1.0)
    assert dx == [0, 0, 1, 1, 0, 0]
    dx, _ = at_edges(Case('lsq', 'activation', 3, True), [-1.1, -1, -0.99, 0, 0.74, 0.75], scale=0.25, initialized=1.0)
    assert dx == [0, 0, 1, 1, 1, 0]


def test_lsq_step_gradient_is_the_residual_inside_and_the_bound_outside():
    case = Case('lsq', 'activation', 2)
    _, dparams = at_edges(case, [-5, 0, 0.375, 0.625, 0.3125, 0.75, 5], scale=0.25, initialized=1.0)
    factor = 1 / np.sqrt(1 * 3)                                         # one element in a sample, qmax = 3
    expected = [0, 0, 2 - 1.5, 2 - 2.5, 1 - 1.25, 3, 3]                 # halves to even
    assert_allclose([d['scale'][0] for d in dparams], factor * np.array(expected), rtol=3e-7)    # a float32 rsqrt


def test_lsqplus_offset_receives_what_the_input_does_not():
    dx, dparams = at_edges(Case('lsqplus', 'activation', 2), [-0.6, -0.5, -0.4, 0.2, 0.25, 0.5], scale=0.25,
                           offset=-0.5, initialized=1.0)
    assert dx == [0, 0, 1, 1, 0, 0]
    factor = 1 / np.sqrt(3)
    assert_allclose([d['offset'][0] for d in dparams], factor * (1 - np.array(dx)), rtol=3e-7)


def test_qil_passes_gradient_on_the_closed_interval():
    dx, _ = at_edges(Case('qil', 'weight', 3), [-3.5, -3, -1, -0.5, 0, 0.5, 1, 3, 3.5], center=2.0, distance=1.0,
                     start=1.0, initialized=1.0)
    assert_allclose(dx, np.array([0, 1, 1, 0, 0, 0, 1, 1, 0]) * 3 * 0.5, rtol=3e-7)   # r = t = 3, B * 0.5 / d


@pytest.mark.parametrize('case, parameters, edges', [
    (Case('int8', 'activation', 3, True, options=(('grad_mode', 'clip'),)), {'amax': 3.0}, (-3, 3)),
    (Case('int8', 'activation', 2, False, options=(('grad_mode', 'clip'),)), {'amax': 3.0}, (0, 3)),
    (Case('affine', 'activation', 2), {'lo': -1.0, 'hi': 2.0, 'initialized': 1.0}, (-1, 2)),
    (Case('gdrq', 'activation', 2, False), {'threshold': 3.0}, (0, 3)),
    (Case('gdrq', 'activation', 3, True), {'threshold': 3.0}, (-3, 3)),
    (Case('dorefa', 'activation', 2), {}, (0, 1)),
    (Case('cliprelu', 'activation', 2, options=(('threshold', 3.0),)), {}, (0, 3)),
], ids=str)
def test_clip_passes_gradient_on_the_closed_range(case, parameters, edges):
    low, high = np.float32(edges)
    outside = [np.nextafter(low, np.float32(-9)), np.nextafter(high, np.float32(9))]
    if low == 0:
        outside[0] = np.float32(-1e-30)                                 # float32 hardware may flush denormals
    dx, _ = at_edges(case, [outside[0], low, high, outside[1]], **parameters)
    assert dx == [0, 1, 1, 0]


@over([case for case in ROUNDING if case.name in ('int8', 'affine', 'gdrq', 'sawb') and case.role == 'weight'])
def test_weights_receive_the_gradient_unchanged(case):
    x, g = case.data(1), case.data(2)
    same_bits(run(case.make(), x, g)[1], g)


@over([Case('int8', 'activation', 4, True), Case('int8', 'activation', 4, False)])
def test_int8_activations_receive_the_gradient_unchanged(case):
    x, g = case.data(1), case.data(2)
    same_bits(run(case.make(), x, g)[1], g)


# ---------------------------------------------------------------- smooth parts against numeric differences


@pytest.mark.parametrize('name', ['center', 'distance', 'gamma'])
def test_qil_parameter_gradients_follow_numeric_differences_of_the_transform(name):
    """With 16 bits rounding is far below the step of the difference, so y is smooth."""
    case = Case('qil', 'weight', 16, options=(('rescale', False),))
    x = np.random.default_rng(5).uniform(-2, 2, (1, 400)).astype(np.float32)
    x = x[(np.abs(np.abs(x) - 0.4) > 0.1) & (np.abs(np.abs(x) - 1.6) > 0.1)].reshape(1, -1)
    g = np.random.default_rng(6).normal(size=x.shape).astype(np.float32)
    start = {'center': 1.0, 'distance': 0.6, 'gamma': 1.3, 'start': 1.0, 'initialized': 1.0}
    q = case.make()
    q.write(**start)
    gradient = run(q, x, g)[2][name][0]
    totals = []
    for sign in (1, -1):
        q.write(**{**start, name: start[name] + sign * 0.02})
        totals.append((run(q, x, training=False)[0].astype(np.float64) * g).sum())
    # central difference: error of third order in 0.02; rounding 2**-16 / 0.04 on some 300 terms
    assert_allclose(gradient, (totals[0] - totals[1]) / 0.04, rtol=0.02, atol=0.05)


@pytest.mark.parametrize('rescale', [None, 'max'])
def test_dorefa_weight_gradients_follow_numeric_differences_of_the_transform(rescale):
    case = Case('dorefa', 'weight', 16, options=(('rescale', rescale),))
    x = np.random.default_rng(5).uniform(-1, 1, (1, 12)).astype(np.float32)
    x[0, 3] = -1.5                                                      # the largest, negative
    g = np.random.default_rng(6).normal(size=x.shape).astype(np.float32)
    dx = run(case.make(), x, g)[1]
    scale = np.float64(1.5 if rescale else 1.0)

    def loss(w):
        t = np.tanh(w.astype(np.float64))
        return (scale * t / np.abs(t).max() * g).sum()

    for i in range(x.size):
        step = np.zeros_like(x, dtype=np.float64)
        step[0, i] = 1e-5
        numeric = (loss(x + step) - loss(x - step)) / 2e-5
        assert_allclose(dx[0, i], numeric, rtol=1e-4, atol=1e-5)        # float32 sum against float64 difference


# ---------------------------------------------------------------- head gradients


@over([case for case in ROUNDING if case.bits == 4])
def test_gradients_accumulate_with_grad_req_add(case):
    x, g = nd.array(case.data(1)), nd.array(case.data(2))
    q = case.ready(case.data(1))
    once = run(q, case.data(1), case.data(2), training=False)
    x.attach_grad(grad_req='add')
    for _ in range(2):
        with autograd.record(train_mode=False):
            y = q(x)
        y.backward(g, train_mode=False)
    assert_allclose(x.grad.asnumpy(), 2 * once[1], rtol=1e-6)           # one float32 addition


@over([case for case in ROUNDING if case.bits == 4])
def test_a_zero_head_gradient_gives_zero_gradients(case):
    x = case.data(1)
    _, dx, dparams = run(case.make(), x, np.zeros_like(x))
    for gradient in (dx, *dparams.values()):
        assert not gradient.any()


@over([case for case in ACTIVATIONS if case.bits == 4])
def test_switched_off_the_gradient_is_the_head_gradient(case):
    x, g = case.data(1, 5.0), case.data(2)
    for mode, training in itertools.product((OFF, OBSERVE), (True, False)):
        q = case.ready(case.data(1))
        q.set_mode(mode)
        _, dx, dparams = run(q, x, g, training)
        same_bits(dx, g)
        assert not any(gradient.any() for gradient in dparams.values())
