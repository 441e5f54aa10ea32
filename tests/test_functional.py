"""The shared arithmetic, imperative and symbolic."""
import mxnet as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from mxnet import autograd, nd
from mxnet.gluon import HybridBlock
from numpy.testing import assert_allclose, assert_array_equal

import strategies
from gluonquant import functional as Q
from reference import dorefa

floats = st.floats(-1e6, 1e6, width=32)
vectors = arrays(np.float32, st.integers(1, 30), elements=floats)
few = settings(max_examples=60, deadline=None)
EITHER = pytest.mark.parametrize('hybridized', [False, True], ids=['imperative', 'hybridized'])


class Function(HybridBlock):
    """A function of (F, *inputs) as a block."""

    def __init__(self, function, hybridized):
        super().__init__()
        self._function = function
        if hybridized:
            self.hybridize(static_alloc=True, static_shape=True)

    def hybrid_forward(self, F, *inputs):
        return self._function(F, *inputs)


def gradient(function, x, g):
    """(y, dx)."""
    x = nd.array(x)
    x.attach_grad()
    with autograd.record():
        y = function(mx.nd, x)
    y.backward(nd.array(g))
    return y.asnumpy(), x.grad.asnumpy()


# rounding


@few
@given(arrays(np.float32, st.integers(1, 30), elements=st.floats(-2.0 ** 22 + 1, 2.0 ** 22 - 1, width=32)))
def test_round_half_even_is_numpys_rint(x):
    assert_array_equal(Q.round_half_even(nd, nd.array(x)).asnumpy(), np.rint(x))


@few
@given(st.lists(st.integers(-2 ** 20, 2 ** 20), min_size=1, max_size=30))
def test_exact_halves_go_to_the_even_neighbour(whole):
    x = np.array(whole, np.float32) + np.float32(0.5)
    rounded = Q.round_half_even(nd, nd.array(x)).asnumpy()
    assert (rounded % 2 == 0).all()
    assert (np.abs(rounded - x) == 0.5).all()


@few
@given(st.integers(-1000, 1000).flatmap(lambda k: st.sampled_from(strategies.neighbours(k + 0.5))))
def test_neighbours_of_halves_go_to_the_nearest(value):
    assert Q.round_half_even(nd, nd.array([value])).asscalar() == np.rint(value)


@EITHER
def test_rounding_survives_a_compiled_graph(hybridized):
    x = np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 0.49999997], np.float32)
    y = Function(Q.round_half_even, hybridized)(nd.array(x)).asnumpy()
    assert_array_equal(y, [-2, -2, 0, 0, 2, 2, 0])


def test_rounding_passes_the_gradient():
    x, g = np.array([0.2, 0.5, -7.7]), np.array([1.0, -2.0, 3.0])
    assert_array_equal(gradient(Q.round_half_even, x, g)[1], g)


# small pieces


@few
@given(vectors, floats, floats)
def test_limit_is_numpys_clip(x, a, b):
    low, high = min(a, b), max(a, b)
    assert_array_equal(Q.limit(nd, nd.array(x), low, high).asnumpy(), np.clip(x, np.float32(low), np.float32(high)))


@few
@given(arrays(np.float32, 20, elements=st.floats(width=32, allow_nan=False, allow_infinity=False)))
def test_zero_with_gradient_is_zero_for_every_finite_number(x):
    assert_array_equal(Q.zero_with_gradient(nd, nd.array(x)).asnumpy(), 0 * x)


def test_zero_with_gradient_passes_the_gradient():
    g = np.array([1.0, -2.0])
    assert_array_equal(gradient(Q.zero_with_gradient, [3.0, 1e30], g)[1], g)


def test_zero_with_gradient_does_not_hide_broken_numbers():
    assert np.isnan(Q.zero_with_gradient(nd, nd.array([np.nan, np.inf, -np.inf])).asnumpy()).all()


def test_floored_keeps_the_gradient_below_the_floor():
    y, dx = gradient(lambda F, x: Q.floored(F, x, 0.5), [-1.0, 0.5, 2.0], [1.0, 2.0, 3.0])
    assert_array_equal(y, [0.5, 0.5, 2])
    assert_array_equal(dx, [1, 2, 3])


@few
@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 1000))
def test_times_is_a_product_of_rows(rows, columns, seed):
    rng = np.random.default_rng(seed)
    x, factor = (rng.normal(size=shape).astype(np.float32) for shape in ((rows, columns), (rows, 1)))
    assert_array_equal(Q.times(nd, nd.array(x), nd.array(factor)).asnumpy(), x * factor)


def test_the_gradient_of_times_sums_over_the_row():
    rng = np.random.default_rng(1)
    x, g = (rng.normal(size=(3, 50)).astype(np.float32) for _ in range(2))
    factor = nd.ones((3, 1))
    factor.attach_grad()
    with autograd.record():
        y = Q.times(nd, nd.array(x), factor)
    y.backward(nd.array(g))
    expected = (x.astype(np.float64) * g).sum(axis=1, keepdims=True)
    assert_allclose(factor.grad.asnumpy(), expected, rtol=1e-5, atol=1e-5)      # 50 float32 additions


@pytest.mark.parametrize('low, high', [(-1.0, 2.0), (0.0, 0.0)])
def test_inside_is_closed_on_both_ends(low, high):
    x = np.array([[-1.5, -1, 0, 1.999999, 2, 2.0000002, np.nan]], np.float32)
    mask = Q.inside(nd, nd.array(x), nd.array([[low]]), nd.array([[high]])).asnumpy()
    assert_array_equal(mask, (low <= x) & (x <= high))


@pytest.mark.parametrize('flag', [0.0, 1.0])
def test_choose_returns_one_of_its_inputs_exactly(flag):
    yes, no = nd.array([[1.1, 1e38, -3.3]]), nd.array([[7.7, -1e38, 1e-38]])
    assert_array_equal(Q.choose(nd, nd.array([flag]), yes, no).asnumpy(), (yes if flag else no).asnumpy())


def test_finite_means_neither_nan_nor_infinite():
    x = nd.array([0, 1e38, -1e38, np.nan, np.inf, -np.inf])
    assert_array_equal(Q.is_finite(nd, x).asnumpy(), [1, 1, 1, 0, 0, 0])


# training or not


@EITHER
def test_is_training_follows_the_mode_of_each_call(hybridized):
    block = Function(lambda F, x: F.broadcast_mul(x, Q.is_training(F)), hybridized)
    x = nd.ones((2,))
    for _ in range(2):
        assert_array_equal(block(x).asnumpy(), [0, 0])
        with autograd.record():
            assert_array_equal(block(x).asnumpy(), [1, 1])
        with autograd.record(train_mode=False):
            assert_array_equal(block(x).asnumpy(), [0, 0])
        with autograd.train_mode():
            assert_array_equal(block(x).asnumpy(), [1, 1])
        with autograd.record(), autograd.predict_mode():
            assert_array_equal(block(x).asnumpy(), [0, 0])


# state


class Counter(HybridBlock):
    """Adds its input to a state and returns the new value."""

    def __init__(self):
        super().__init__()
        with self.name_scope():
            self.total = self.params.get('total', shape=(1,), init='zeros', grad_req='null')

    def hybrid_forward(self, F, x, total):
        return Q.assign(F, total, F.BlockGrad(total) + x)


@EITHER
def test_assign_writes_the_state_and_returns_what_it_wrote(hybridized):
    block = Counter()
    block.initialize()
    if hybridized:
        block.hybridize(static_alloc=True, static_shape=True)
    for value, total in ((1.5, 1.5), (2.0, 3.5), (-1.0, 2.5)):
        assert block(nd.array([value])).asscalar() == total
        assert block.total.data().asscalar() == total


@EITHER
@pytest.mark.parametrize('value', [0.1, 1e38, 1e-38, -3.3333333])
def test_assign_writes_to_the_last_bit(hybridized, value):
    block = Counter()
    block.initialize()
    if hybridized:
        block.hybridize()
    with autograd.record():
        block(nd.array([value])).wait_to_read()
    assert block.total.data().asscalar() == np.float32(value)


def test_assign_blocks_the_gradient():
    block = Counter()
    block.initialize()
    x = nd.array([2.0])
    x.attach_grad()
    with autograd.record():
        y = block(x) * x
    y.backward()
    assert x.grad.asscalar() == 2                           # of the factor x, not of the state


@pytest.mark.parametrize('old, batch, learning, unset, expected', [
    (4, 8, 1, 0, 5), (4, 8, 0, 0, 4), (0, 8, 1, 1, 8), (0, 8, 0, 1, 0), (4, np.nan, 1, 0, 4), (4, np.inf, 1, 0, 4),
    (0, np.nan, 1, 1, 0)])
def test_moving_average(old, batch, learning, unset, expected):
    arguments = [nd.array([value]) for value in (old, batch)]
    flags = [nd.array([value]) for value in (learning, unset)]
    assert Q.moving_average(nd, *arguments, 0.75, *flags).asscalar() == expected


# percentile


@few
@given(vectors, st.sampled_from([0.1, 1, 25, 50, 90, 99, 99.9, 100]))
def test_percentile_is_numpys(x, percent):
    expected = np.percentile(x.astype(np.float64), percent)
    actual = Q.percentile(nd, nd.array(x), percent).asscalar()
    # one float32 product and sum of numbers of this size
    assert_allclose(actual, expected, rtol=1e-6, atol=3e-7 * np.abs(x).max())


@EITHER
def test_percentile_of_a_million_numbers_finds_its_place(hybridized):
    x = np.random.default_rng(1).permutation(2 ** 20 + 1).astype(np.float32)
    block = Function(lambda F, x: Q.percentile(F, x, 99.9), hybridized)
    # the place 1047527.424 needs float64; float32 would be off by 1/16
    assert_allclose(block(nd.array(x)).asscalar(), 2 ** 20 * 0.999, rtol=1e-7)


# element-wise gradient scaling


@EITHER
def test_gradient_scaling_depends_on_the_sign_of_the_gradient(hybridized):
    x, error = nd.array([1.0, 2.0, 3.0, 4.0]), nd.array([0.5, 0.5, -0.25, 0.0])
    x.attach_grad()
    block = Function(lambda F, x, error: Q.elementwise_gradient_scaling(F, x, error, 0.2), hybridized)
    with autograd.record():
        y = block(x, error)
    y.backward(nd.array([2.0, -2.0, 1.0, 5.0]))
    assert_array_equal(y.asnumpy(), x.asnumpy())
    # g * (1 + 0.2 * sign(g) * error), in float32
    assert_allclose(x.grad.asnumpy(), [2 * 1.1, -2 * 0.9, 0.95, 5], rtol=3e-7)


# DoReFa's gradient quantization


def quantized_gradient(g, bits, hybridized=False):
    x = nd.zeros(g.shape)
    x.attach_grad()
    block = Function(lambda F, x: Q.quantize_gradient(F, x, bits), hybridized)
    with autograd.record():
        y = block(x)
    y.backward(nd.array(g))
    assert_array_equal(y.asnumpy(), 0)
    return x.grad.asnumpy()


@pytest.mark.parametrize('bits', [1, 2, 4])
@EITHER
def test_quantized_gradients_lie_on_the_levels_of_their_sample(bits, hybridized, rng):
    g = rng.normal(size=(3, 4, 5)).astype(np.float32) * np.array([1, 10, 0.01], np.float32).reshape(3, 1, 1)
    got = quantized_gradient(g, bits, hybridized)
    steps = 2 ** bits - 1
    reach = np.abs(g).max(axis=(1, 2), keepdims=True)
    codes = (got / (2 * reach) + 0.5) * steps
    assert_allclose(codes, np.rint(codes), atol=1e-4)       # float32 quotient of a number up to 15
    assert np.rint(codes).min() >= 0
    assert np.rint(codes).max() <= steps
    assert len(np.unique(np.rint(codes))) > 1


@pytest.mark.parametrize('bits', [2, 4])
def test_quantized_gradients_are_one_of_the_two_neighbours(bits, rng):
    g = rng.normal(size=(4, 50)).astype(np.float32)
    step = 2 * np.abs(g).max(axis=1, keepdims=True) / (2 ** bits - 1)
    assert (np.abs(quantized_gradient(g, bits) - g) <= step * (1 + 1e-5)).all()     # float32 rounding of a level


@pytest.mark.parametrize('bits', [2, 4])
def test_quantized_gradients_are_unbiased_away_from_the_extremes(bits, seed):
    g = np.linspace(-1, 1, 41, dtype=np.float32).reshape(1, -1)
    runs = 20000
    mean = quantized_gradient(np.repeat(g, runs, axis=0), bits).mean(axis=0, dtype=np.float64)
    step = 2 / (2 ** bits - 1)
    # a level is hit with a spread of at most half a step; 5 standard errors
    assert_allclose(mean[1:-1], g[0, 1:-1], rtol=0, atol=5 * step / 2 / np.sqrt(runs))


def test_quantized_gradients_have_the_noise_of_the_reference(seed):
    """Levels and frequencies of many draws, reference and library, for a gradient a quarter between two levels."""
    g = np.array([[1.0, 0.5 / 3, -1.0]], np.float32)        # 2 bits: levels -1, -1/3, 1/3, 1; 0.5/3 is 3/4 of the way
    g = np.repeat(g, 10000, axis=0)
    noise = np.random.default_rng(seed).uniform(-1, 1, g.shape) / 6
    expected, actual = dorefa.gradient(g, 2, noise), quantized_gradient(g, 2)
    assert_allclose(np.unique(np.round(actual, 5)), np.unique(np.round(expected, 5)), atol=1e-4)
    # two proportions near 3/4 of 10000 draws differ by less than 5 standard errors
    assert_allclose((actual > 0).mean(axis=0), (expected > 0).mean(axis=0), atol=5 * np.sqrt(2 * 0.1875 / 10000))


def test_a_zero_gradient_stays_zero():
    assert np.abs(quantized_gradient(np.zeros((2, 3), np.float32), 4)).max() <= 1e-29


def test_the_largest_gradient_of_a_sample_is_kept():
    g = np.array([[1.0, 0.0, 0.0], [0.0, -8.0, 0.0]], np.float32)
    for _ in range(20):
        got = quantized_gradient(g, 3)
        assert got[0, 0] == 1
        assert got[1, 1] == -8


def test_quantizing_gradients_between_convolutions_changes_no_output():
    outputs, gradients = [], []
    for bits in (None, 16):
        mx.random.seed(0)
        layers = [mx.gluon.nn.Conv2D(16, 3, padding=1, in_channels=channels) for channels in (3, 16)]

        class Stack(mx.gluon.HybridBlock):
            def hybrid_forward(self, F, x, layers=layers, bits=bits):
                for layer in layers:
                    x = layer(x) if bits is None else Q.quantize_gradient(F, layer(x), bits)
                return x
        net = Stack()
        for layer in layers:
            net.register_child(layer)
        net.initialize(mx.init.Xavier())
        x = nd.array(np.random.RandomState(0).randn(4, 3, 16, 16))
        x.attach_grad()
        with autograd.record():
            out = net(x)
        out.backward()
        outputs.append(out.asnumpy())
        gradients.append(x.grad.asnumpy())
    # The product in front makes oneDNN hand over its result once more; 16 bits hold gradients to 1e-4.
    np.testing.assert_allclose(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradients[1], gradients[0], atol=1e-3 * abs(gradients[0]).max())


def test_quantizing_gradients_of_a_hybridized_net_warns_of_what_mxnet_does():
    with pytest.warns(UserWarning, match='train imperatively, or set MXNET_ENGINE_TYPE=NaiveEngine'):
        Q.quantize_gradient(mx.sym, mx.sym.var('x'), 8)
