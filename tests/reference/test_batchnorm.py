"""The reference of folded BatchNorm against BatchNorm as it is defined, numbers worked out by hand and numeric
derivatives."""
import numpy as np
import pytest
from numpy.testing import assert_allclose

from .batchnorm import Convolution, Dense, Transposed, along, batch, frozen, merged, normalized

# float64 sums of some hundred terms
CLOSE = {'rtol': 1e-10, 'atol': 1e-10}
# central differences with step 1e-5 of float64 functions: step^2 times a third derivative, and 1e-16 / 1e-5
NUMERIC = {'rtol': 1e-6, 'atol': 1e-8}
LAYERS = {
    'dense': (Dense(), (6, 5), (4, 5)),
    'conv': (Convolution((1, 1), (1, 1)), (3, 2, 4, 5), (4, 2, 3, 3)),
    'grouped': (Convolution((2, 1), (1, 0), dilate=(1, 2), groups=2), (3, 4, 5, 6), (4, 2, 3, 2)),
    'depthwise 1d': (Convolution((2,), (1,), groups=3), (3, 3, 9), (3, 1, 3)),
    'transposed': (Transposed((2, 1), (1, 0), adjust=(1, 0)), (3, 2, 3, 4), (2, 4, 2, 3)),
}
EPS = 1e-3


def drawn(name, seed=0):
    layer, x_shape, w_shape = LAYERS[name]
    rng = np.random.default_rng(seed)
    n = w_shape[layer.weight_axis]
    values = {'x': rng.normal(size=x_shape), 'weight': rng.normal(size=w_shape), 'bias': rng.normal(size=n),
              'gamma': rng.normal(size=n), 'beta': rng.normal(size=n)}
    statistics = {'mean': rng.normal(size=n), 'var': rng.uniform(0.5, 2, n)}
    return layer, values, statistics, rng.normal(size=layer.forward(values['x'], values['weight']).shape)


def numeric(f, values, name, step=1e-5):
    gradient = np.zeros_like(values[name])
    for index in np.ndindex(gradient.shape):
        ends = []
        for sign in (1, -1):
            moved = dict(values, **{name: values[name].copy()})
            moved[name][index] += sign * step
            ends.append(f(**moved))
        gradient[index] = (ends[0] - ends[1]) / (2 * step)
    return gradient


def test_convolution_of_a_worked_example():
    x = np.array([[[1., 2, 3, 4]]])
    w = np.array([[[1., 10]]])
    assert_allclose(Convolution((2,), (1,)).forward(x, w), [[[10, 32, 4]]])


def test_grouped_convolution_of_a_worked_example():
    x = np.array([[[1.], [2], [3], [4]]])
    w = np.array([[[1.], [10]], [[100], [1000]]])
    assert_allclose(Convolution((1,), (0,), groups=2).forward(x, w), [[[21], [4300]]])


def test_transposed_convolution_of_a_worked_example():
    x = np.array([[[1., 2]]])
    w = np.array([[[1., 10, 100]]])
    assert_allclose(Transposed((2,), (0,)).forward(x, w), [[[1, 10, 102, 20, 200]]])


@pytest.mark.parametrize('name', LAYERS)
def test_transposes_satisfy_their_definition(name):
    layer, values, _, g = drawn(name)
    x, w = values['x'], values['weight']
    assert_allclose((layer.to_x(g, w, x) * x).sum(), (layer.forward(x, w) * g).sum(), **CLOSE)
    assert_allclose((layer.to_w(g, x, w) * w).sum(), (layer.forward(x, w) * g).sum(), **CLOSE)


@pytest.mark.parametrize('fix_gamma', [False, True])
@pytest.mark.parametrize('name', LAYERS)
def test_merged_layer_is_the_layer_and_its_batchnorm(name, fix_gamma):
    layer, values, statistics, _ = drawn(name)
    x = values.pop('x')
    weight, bias = merged(layer, **values, **statistics, eps=EPS, fix_gamma=fix_gamma)
    plain = layer.forward(x, values['weight'])
    expected = normalized(plain + along(values['bias'], plain.ndim, 1), values['gamma'], values['beta'], **statistics,
                          eps=EPS, fix_gamma=fix_gamma)
    assert_allclose(layer.forward(x, weight) + along(bias, plain.ndim, 1), expected, **CLOSE)


def test_merged_numbers_of_a_worked_example():
    weight, bias = merged(Dense(), [[8.], [8.]], [1., 1.], [3., -3.], [5., 5.], [2., 2.], [3., 3.], 1.)
    assert_allclose(weight, [[12], [-12]])          # k = 3 / sqrt(3 + 1)
    assert_allclose(bias, [3.5, 6.5])               # (1 - 2) k + 5


def test_frozen_equals_the_merged_layer():
    layer, values, statistics, g = drawn('conv')
    result = frozen(layer, **values, **statistics, eps=EPS, g=g)
    x = values.pop('x')
    weight, bias = merged(layer, **values, **statistics, eps=EPS)
    assert_allclose(result.y, layer.forward(x, weight) + along(bias, 4, 1), **CLOSE)


@pytest.mark.parametrize('name', LAYERS)
def test_batch_without_quantizer_equals_batchnorm_in_training(name):
    layer, values, statistics, g = drawn(name)
    result = batch(layer, **values, **statistics, eps=EPS, g=g)
    plain = layer.forward(values['x'], values['weight'])
    plain += along(values['bias'], plain.ndim, 1)
    others = tuple(axis for axis in range(plain.ndim) if axis != 1)
    assert_allclose(result.y, normalized(plain, values['gamma'], values['beta'], plain.mean(axis=others),
                                         plain.var(axis=others), EPS), **CLOSE)


def test_batch_moves_running_statistics_by_one_minus_momentum():
    result = batch(Dense(), [[1.], [3.]], [[2.]], [1.], [1.], [0.], [0.], [1.], EPS, np.zeros((2, 1)), momentum=0.75)
    assert_allclose(result.mean, [1.25])            # 0.75 * 0 + 0.25 * mean(3, 7)
    assert_allclose(result.var, [1.75])             # 0.75 * 1 + 0.25 * 4: the variance divides by N


@pytest.mark.parametrize('which', ['x', 'weight', 'bias', 'gamma', 'beta'])
@pytest.mark.parametrize('fold', [frozen, batch])
@pytest.mark.parametrize('name', LAYERS)
def test_gradients_without_quantizer_are_numeric_derivatives(name, fold, which):
    layer, values, statistics, g = drawn(name)
    result = fold(layer, **values, **statistics, eps=EPS, g=g)
    expected = numeric(lambda **v: (fold(layer, **v, **statistics, eps=EPS, g=g).y * g).sum(), values, which)
    assert_allclose(getattr(result, 'd' + which), expected, **NUMERIC)


@pytest.mark.parametrize('which', ['x', 'weight', 'bias', 'gamma', 'beta'])
@pytest.mark.parametrize('fold', [frozen, batch])
@pytest.mark.parametrize('name', ['dense', 'grouped', 'transposed'])
def test_gradients_with_a_rounding_are_those_of_a_constant_shift(name, fold, which):
    """Straight through a rounding: Q(w') = w' + c with c held still."""
    layer, values, statistics, g = drawn(name)
    captured = {}

    def rounding(folded):
        captured.setdefault('shift', np.rint(folded * 4) / 4 - folded)
        return folded + captured['shift']

    result = fold(layer, **values, **statistics, eps=EPS, g=g, quantize=rounding)
    assert np.abs(captured['shift']).max() > 0.05
    expected = numeric(lambda **v: (fold(layer, **v, **statistics, eps=EPS, g=g, quantize=rounding).y * g).sum(),
                       values, which)
    assert_allclose(getattr(result, 'd' + which), expected, **NUMERIC)


@pytest.mark.parametrize('fold', [frozen, batch])
def test_fixed_gamma_counts_as_one_and_gets_no_gradient(fold):
    layer, values, statistics, g = drawn('dense')
    fixed = fold(layer, **values, **statistics, eps=EPS, g=g, fix_gamma=True)
    ones = fold(layer, **dict(values, gamma=np.ones(4)), **statistics, eps=EPS, g=g)
    assert_allclose(fixed.y, ones.y, **CLOSE)
    assert not fixed.dgamma.any()
