"""BatchNorm folded into a layer: which can be, and the arithmetic, imperative and symbolic, against the reference."""
import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, nd
from mxnet.gluon import nn

from gluonquant import functional as Q
from gluonquant.batchnorm import Layer, Settings, factor_and_shift, folded, folded_weight, pairs
from gluonquant.symbol_graph import QUANTIZE, Entry, Graph, invoke
from reference import batchnorm as reference

# Results are float32 sums of some hundred terms: their error counts in units of the largest one.
CLOSE = 2e-5


def assert_close(actual, expected, tolerance=CLOSE):
    actual = np.asarray(actual, 'float64')
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * max(np.abs(expected).max(), 1e-3))


# ---------------------------------------------------------------- what can be folded

data = mx.sym.var('data')


def convolution(x=data, name='conv', **attrs):
    return mx.sym.Convolution(x, name=name, **{'num_filter': 2, 'kernel': (1, 1), 'no_bias': True, **attrs})


def batchnorm(x, name='bn', **attrs):
    return mx.sym.BatchNorm(x, name=name, **{'fix_gamma': False, **attrs})


def dense(x=data, name='fc', **attrs):
    return mx.sym.FullyConnected(x, name=name, **{'num_hidden': 2, **attrs})


def transposed(x=data, name='up', **attrs):
    return mx.sym.Deconvolution(x, name=name, **{'num_filter': 2, 'kernel': (2, 2), **attrs})


def found(symbol):
    return [(layer.name, norm.name) for layer, norm in pairs(Graph.of(symbol))[0]]


def refusal(symbol, name='bn'):
    """Why the BatchNorm ``name``, the only one that is refused, cannot be folded."""
    (node, reason), = pairs(Graph.of(symbol))[1].items()
    assert node.name == name
    return reason


@pytest.mark.parametrize('layer', [
    convolution(), convolution(no_bias=False), convolution(kernel=(3,)), convolution(kernel=(1, 1, 1)),
    convolution(num_group=2), transposed(), transposed(no_bias=False), dense(), dense(no_bias=True)],
    ids=['conv', 'bias', '1d', '3d', 'grouped', 'transposed', 'transposed with bias', 'dense', 'dense without bias'])
def test_a_layer_and_the_batchnorm_behind_it_are_a_pair(layer):
    assert found(batchnorm(layer)) == [(layer.name, 'bn')]


def test_pairs_come_in_the_order_of_the_graph():
    net = batchnorm(dense(mx.sym.relu(batchnorm(convolution(), 'first'))), 'second')
    assert found(net) == [('conv', 'first'), ('fc', 'second')]


def test_a_layer_without_batchnorm_is_neither_pair_nor_refused():
    assert pairs(Graph.of(mx.sym.relu(convolution()))) == ([], {})


def test_a_quantized_weight_can_be_folded():
    graph = Graph.of(batchnorm(convolution()))
    layer = next(node for node in graph.nodes() if node.op == 'Convolution')
    quantizer = graph.add(QUANTIZE, 'q', [layer.inputs[1]])
    graph.connect(layer, [layer.inputs[0], Entry(quantizer)])
    assert [pair.layer for pair in pairs(graph)[0]] == [layer]


def test_batchnorm_of_a_weight_quantizer_that_two_layers_read_stays():
    graph = Graph.of(mx.sym.Group([batchnorm(convolution()), convolution(name='other')]))
    first, other = (node for node in graph.nodes() if node.op == 'Convolution')
    quantizer = graph.add(QUANTIZE, 'q', [first.inputs[1]])
    for layer in (first, other):
        graph.connect(layer, [layer.inputs[0], Entry(quantizer)])
    assert list(pairs(graph)[1].values()) == ["the weight of 'conv' is computed, or shared with another layer"]


def test_batchnorm_behind_relu_stays():
    assert refusal(batchnorm(mx.sym.relu(convolution(), name='act'))) == "it reads 'act' (relu), which has no weight"


def test_batchnorm_of_the_input_stays():
    assert refusal(batchnorm(data)) == "it reads 'data' (null), which has no weight"


def test_batchnorm_behind_batchnorm_stays():
    reason = refusal(batchnorm(batchnorm(convolution()), 'second'), 'second')
    assert reason == "it reads 'bn' (BatchNorm), which has no weight"


def test_batchnorm_of_a_layer_that_another_operator_reads_stays():
    layer = convolution()
    assert refusal(batchnorm(layer) + mx.sym.relu(layer, name='other')) == "'other' reads 'conv' too"


def test_batchnorm_of_a_layer_that_the_net_returns_stays():
    layer = convolution()
    assert refusal(mx.sym.Group([batchnorm(layer), layer])) == "'the output of the net' reads 'conv' too"


def test_both_batchnorms_of_one_layer_stay():
    layer = convolution()
    refused = pairs(Graph.of(batchnorm(layer, 'one') + batchnorm(layer, 'two')))[1]
    assert {node.name: reason for node, reason in refused.items()} == {'one': "'two' reads 'conv' too",
                                                                      'two': "'one' reads 'conv' too"}


@pytest.mark.parametrize('output', [1, 2], ids=['mean', 'deviation'])
def test_batchnorm_whose_statistics_an_operator_reads_stays(output):
    norm = batchnorm(convolution(), output_mean_var=True)
    assert refusal(mx.sym.broadcast_add(norm[0], norm[output])) == 'its mean or variance is read'


def test_batchnorm_whose_statistics_the_net_returns_stays():
    assert refusal(batchnorm(convolution(), output_mean_var=True)) == 'its mean or variance is read'


@pytest.mark.parametrize('axis', [0, 2, 3, -1])
def test_batchnorm_over_another_axis_stays(axis):
    assert refusal(batchnorm(convolution(), axis=axis)) == f"its axis {axis} is not known to be the channels of 'conv'"


def test_batchnorm_of_a_channel_last_convolution_stays():
    # Axis 1 of (N, H, W, C) is the height.
    assert 'channels of ' in refusal(batchnorm(convolution(layout='NHWC'), axis=1))


@pytest.mark.parametrize('flatten', [False, 'False', 0])
def test_batchnorm_of_a_dense_layer_that_does_not_flatten_stays(flatten):
    assert refusal(batchnorm(dense(flatten=flatten))) == "its axis 1 is not known to be the channels of 'fc'"


def test_batchnorm_of_a_grouped_transposed_convolution_stays():
    assert refusal(batchnorm(transposed(num_group=2))) == \
        "axis 1 of the weight of 'up' counts the channels of one group only"


def test_batchnorm_of_a_layer_whose_weight_another_layer_reads_stays():
    weight = mx.sym.var('w')
    net = mx.sym.Group([batchnorm(convolution(weight=weight)), convolution(weight=weight, name='other')])
    assert refusal(net) == "the weight of 'conv' is computed, or shared with another layer"


def test_batchnorm_of_a_layer_with_a_computed_weight_stays():
    net = batchnorm(convolution(weight=mx.sym.var('w') * 2))
    assert refusal(net) == "the weight of 'conv' is computed, or shared with another layer"


def test_batchnorm_of_a_layer_with_a_computed_bias_stays():
    net = batchnorm(convolution(no_bias=False, bias=mx.sym.var('b') * 2))
    assert 'conv' in refusal(net)


@pytest.mark.parametrize('which', ['gamma', 'beta'])
def test_batchnorm_with_computed_parameters_stays(which):
    net = batchnorm(convolution(), **{which: mx.sym.var('p') * 2})
    assert refusal(net)


# ---------------------------------------------------------------- what a BatchNorm and a layer are told

def test_settings_of_an_operator_that_says_nothing_are_its_defaults():
    assert Settings.of({}) == Settings(eps=1e-3, momentum=0.9, fix_gamma=True, frozen=False)


def test_the_defaults_are_those_of_the_operator():
    """eps and fix_gamma of `mx.nd.BatchNorm` itself, by what it computes."""
    x, gamma, beta, mean, var = (nd.array(values) for values in ([[3.0]], [5.0], [0.0], [1.0], [0.0]))
    told = Settings.of({})
    expected = 2 * (1 if told.fix_gamma else 5) / np.sqrt(told.eps)
    np.testing.assert_allclose(nd.BatchNorm(x, gamma, beta, mean, var).asscalar(), expected, rtol=1e-6)


def test_settings_are_read_from_strings():
    attrs = {'eps': '1e-05', 'momentum': '0.99', 'fix_gamma': 'False', 'use_global_stats': 'True'}
    assert Settings.of(attrs) == Settings(1e-5, 0.99, False, True)


@pytest.mark.parametrize('text, value', [('True', True), ('true', True), ('1', True), (1, True), (True, True),
                                         ('False', False), ('false', False), ('0', False), (0, False), (False, False)])
def test_settings_know_every_spelling_of_a_boolean(text, value):
    told = Settings.of({'fix_gamma': text, 'use_global_stats': text})
    assert (told.fix_gamma, told.frozen) == (value, value)


def test_settings_of_a_block():
    norm = nn.BatchNorm(epsilon=1e-4, momentum=0.8, scale=False, use_global_stats=True)
    assert Settings.of(norm._kwargs) == Settings(1e-4, 0.8, True, True)


def test_settings_of_a_traced_block_are_those_of_the_block():
    norm = nn.BatchNorm(epsilon=0.02, momentum=0.75)
    node = next(node for node in Graph.of(norm(data)).nodes() if node.op == 'BatchNorm')
    assert Settings.of(node.attrs) == Settings.of(norm._kwargs) == Settings(0.02, 0.75, False, False)


@pytest.mark.parametrize('op, attrs, expected', [
    ('FullyConnected', {'num_hidden': '7'}, (0, 2, 1)),
    ('Convolution', {'kernel': '(3,)'}, (0, 3, 1)),
    ('Convolution', {'kernel': '(3, 3)'}, (0, 4, 1)),
    ('Convolution', {'kernel': '[3,3]'}, (0, 4, 1)),
    ('Convolution', {'kernel': (3, 3)}, (0, 4, 1)),
    ('Convolution', {'kernel': '(3, 3, 3)', 'num_group': '4'}, (0, 5, 4)),
    ('Convolution', {'kernel': '(3L, 3L)'}, (0, 4, 1)),         # as Python 2 wrote it, and MXNet still reads it
    ('Deconvolution', {'kernel': '(2, 2)', 'num_group': 2}, (1, 4, 2))])
def test_the_geometry_of_a_layer_is_read_from_its_attributes(op, attrs, expected):
    assert Layer.of(op, attrs) == Layer(*expected)


def test_values_per_channel_meet_weight_and_output():
    assert (Layer(0, 4).along_weight, Layer(0, 4).along_output) == ((-1, 1, 1, 1), (1, -1, 1, 1))


def test_values_per_channel_meet_a_transposed_weight_on_axis_1():
    assert (Layer(1, 5).along_weight, Layer(1, 5).along_output) == ((1, -1, 1, 1, 1), (1, -1, 1, 1, 1))


def test_values_per_channel_meet_a_dense_weight():
    assert (Layer(0, 2).along_weight, Layer(0, 2).along_output) == ((-1, 1), (1, -1))


# ---------------------------------------------------------------- the layers of the tests below

# name -> operator, its attributes, shape of x and of the weight, the layer in the reference
CASES = {
    'conv1d': ('Convolution', {'kernel': (3,), 'stride': (2,), 'pad': (1,), 'num_filter': 4}, (3, 2, 9), (4, 2, 3),
               reference.Convolution((2,), (1,))),
    'conv2d': ('Convolution', {'kernel': (3, 2), 'stride': (1, 2), 'pad': (1, 0), 'num_filter': 4}, (3, 2, 5, 6),
               (4, 2, 3, 2), reference.Convolution((1, 2), (1, 0))),
    'dilated': ('Convolution', {'kernel': (3, 2), 'dilate': (1, 2), 'num_filter': 4}, (3, 2, 5, 6), (4, 2, 3, 2),
                reference.Convolution((1, 1), (0, 0), dilate=(1, 2))),
    'grouped': ('Convolution', {'kernel': (3, 3), 'num_group': 2, 'num_filter': 4}, (3, 4, 5, 5), (4, 2, 3, 3),
                reference.Convolution((1, 1), (0, 0), groups=2)),
    'depthwise': ('Convolution', {'kernel': (3, 3), 'pad': (1, 1), 'num_group': 4, 'num_filter': 4}, (3, 4, 5, 5),
                  (4, 1, 3, 3), reference.Convolution((1, 1), (1, 1), groups=4)),
    'conv3d': ('Convolution', {'kernel': (2, 2, 2), 'num_filter': 4}, (2, 2, 3, 4, 3), (4, 2, 2, 2, 2),
               reference.Convolution((1, 1, 1), (0, 0, 0))),
    'transposed': ('Deconvolution', {'kernel': (2, 3), 'stride': (2, 1), 'pad': (1, 0), 'adj': (1, 0),
                                     'num_filter': 4}, (3, 2, 3, 4), (2, 4, 2, 3),
                   reference.Transposed((2, 1), (1, 0), (1, 0))),
    'dense': ('FullyConnected', {'num_hidden': 4}, (6, 2, 3), (4, 6), reference.Dense()),
}
EPS, MOMENTUM, SCALE = 0.01, 0.75, 0.25
NAMES = ('x', 'weight', 'bias', 'gamma', 'beta')


class Case:
    """A layer with a BatchNorm of given settings, and values of everything: the same for us and for the reference."""

    def __init__(self, name, rng, bias=True, fix_gamma=False, frozen=True, rounded=False):
        op, attrs, x_shape, w_shape, self.layer = CASES[name]
        self.op, self.attrs = op, {key: str(value) for key, value in attrs.items()}
        self.geometry = Layer.of(op, self.attrs)
        self.settings = Settings(EPS, MOMENTUM, fix_gamma, frozen)
        self.rounded = rounded
        channels = w_shape[self.layer.weight_axis]
        gamma, var = rng.choice([-1, 1], channels) * rng.uniform(0.5, 2, channels), rng.uniform(0.3, 2, channels)
        k = (1 if fix_gamma else gamma) / np.sqrt(var + EPS)
        # k w lies at most 0.4 steps beside a level, so that float32 and float64 round it to the same one
        steps = rng.integers(-6, 7, w_shape) + rng.uniform(-0.4, 0.4, w_shape)
        weight = SCALE * steps / reference.along(k, len(w_shape), self.layer.weight_axis)
        self.values = {'x': rng.normal(size=x_shape), 'weight': weight, 'bias': rng.normal(size=channels),
                       'gamma': gamma, 'beta': rng.normal(size=channels), 'mean': rng.normal(size=channels), 'var': var}
        if not bias:
            self.values['bias'] = None
        self.g = rng.normal(size=self.layer.forward(self.values['x'], weight).shape)

    def reference(self):
        def quantize(weight):
            return SCALE * np.rint(weight / SCALE) if self.rounded else weight
        frozen, fix_gamma = self.settings.frozen, self.settings.fix_gamma
        given = {'eps': EPS, 'g': self.g, 'fix_gamma': fix_gamma, 'quantize': quantize}
        if frozen:
            return reference.frozen(self.layer, **self.values, **given)
        return reference.batch(self.layer, **self.values, **given, momentum=MOMENTUM)

    def folded(self, F, tensors):
        def run(x, weight, bias):
            node = Graph.of(getattr(mx.sym, self.op)(name='layer', **self.attrs, no_bias=bias is None)).heads.inputs[0]
            invokes = [x, weight] if bias is None else [x, weight, bias]
            if self.op == 'Deconvolution':
                return Q.computed_deconvolution(F, lambda *wide: invoke(F, node.node, list(wide)), *invokes)
            return invoke(F, node.node, invokes)

        def quantize(weight):
            if not self.rounded:
                return weight
            return F.BlockGrad(Q.round_half_even(F, weight / SCALE) * SCALE) + Q.zero_with_gradient(F, weight)
        return folded(F, run, quantize, self.geometry, self.settings, *(tensors[name] for name in
                                                                        (*NAMES, 'mean', 'var')))

    def imperative(self, training=True):
        """(output, {name: gradient}, {name: statistics after the step}) of one pass on arrays."""
        arrays = {name: None if value is None else nd.array(value) for name, value in self.values.items()}
        given = [name for name in NAMES if arrays[name] is not None]
        for name in given:
            arrays[name].attach_grad()
        with autograd.record(train_mode=training):
            out = self.folded(nd, arrays)
        out.backward(nd.array(self.g), train_mode=training)
        return (out.asnumpy(), {name: arrays[name].grad.asnumpy() for name in given},
                {name: arrays[name].asnumpy() for name in ('mean', 'var')})

    def symbolic(self, training=True):
        """The same of one pass of an executor."""
        arrays = {name: nd.array(value) for name, value in self.values.items() if value is not None}
        tensors = {name: None if value is None else mx.sym.var(name) for name, value in self.values.items()}
        symbol = self.folded(mx.sym, tensors)
        auxiliary = symbol.list_auxiliary_states()
        grads = {name: nd.zeros(arrays[name].shape) for name in NAMES if name in arrays}
        executor = symbol.bind(mx.cpu(), {name: arrays[name] for name in symbol.list_arguments()},
                               {name: grads[name] for name in grads},
                               {name: 'write' if name in grads else 'null' for name in symbol.list_arguments()},
                               {name: arrays[name] for name in auxiliary})
        out, = executor.forward(is_train=training)
        out = out.asnumpy()
        if training:
            executor.backward([nd.array(self.g)])
        return (out, {name: grad.asnumpy() for name, grad in grads.items()},
                {name: arrays[name].asnumpy() for name in ('mean', 'var')})


every_case = pytest.mark.parametrize('name', CASES)
every_way = pytest.mark.parametrize('way', ['imperative', 'symbolic'])
every_mode = pytest.mark.parametrize('frozen', [True, False], ids=['frozen', 'batch'])
rounded_or_not = pytest.mark.parametrize('rounded', [False, True], ids=['float', 'rounded'])


# ---------------------------------------------------------------- merging

@pytest.mark.parametrize('fix_gamma', [False, True], ids=['gamma', 'fixed'])
@pytest.mark.parametrize('bias', [False, True], ids=['no bias', 'bias'])
@every_case
def test_factor_and_shift_merge_like_the_reference(rng, name, bias, fix_gamma):
    case = Case(name, rng, bias, fix_gamma)
    values = {key: case.values[key] for key in ('gamma', 'beta', 'mean', 'var', 'bias')}
    factor, shift = factor_and_shift(case.settings, **values)
    weight, expected = reference.merged(case.layer, case.values['weight'], eps=EPS, fix_gamma=fix_gamma, **values)
    # float64 on both sides
    np.testing.assert_allclose(case.values['weight'] * factor.reshape(case.geometry.along_weight), weight, rtol=1e-12)
    np.testing.assert_allclose(shift, expected, rtol=1e-12, atol=1e-12)


def test_factor_and_shift_of_a_worked_example():
    factor, shift = factor_and_shift(Settings(1, 0.9, False, False), [3, -3, 0], [5, 5, 5], [2, 2, 2], [3, 3, 3],
                                     [1, 1, 1])
    assert factor.tolist() == [1.5, -1.5, 0] and shift.tolist() == [3.5, 6.5, 5]


def test_factor_and_shift_of_float32_arrays_are_float64():
    one = np.ones(1, 'float32')
    factor, shift = factor_and_shift(Settings(1e-5, 0.9, False, False), one, one, one / 3, one, one)
    assert factor.dtype == shift.dtype == np.float64
    assert factor[0] == 1 / np.sqrt(1 + 1e-5)           # float32 would be 3e-8 off


def test_a_fixed_gamma_counts_as_one_whatever_its_value():
    factor, _ = factor_and_shift(Settings(1, 0.9, True, False), [7], [0], [0], [3])
    assert factor.tolist() == [0.5]


@pytest.mark.parametrize('fix_gamma', [False, True], ids=['gamma', 'fixed'])
@every_case
def test_the_folded_weight_is_k_w(rng, name, fix_gamma):
    case = Case(name, rng, fix_gamma=fix_gamma)
    weight, gamma, var = (nd.array(case.values[key]) for key in ('weight', 'gamma', 'var'))
    result = folded_weight(nd, case.geometry, case.settings, weight, gamma, var)
    expected = reference.merged(case.layer, **{key: case.values[key] for key in ('weight', 'bias', 'gamma', 'beta',
                                                                                 'mean', 'var')},
                                eps=EPS, fix_gamma=fix_gamma)[0]
    assert_close(result.asnumpy(), expected, 3e-7)      # a few roundings to float32, no sum


# ---------------------------------------------------------------- training

@rounded_or_not
@every_mode
@every_way
@every_case
def test_output_of_training(rng, name, way, frozen, rounded):
    case = Case(name, rng, frozen=frozen, rounded=rounded)
    assert_close(getattr(case, way)()[0], case.reference().y)


@rounded_or_not
@every_mode
@every_way
@every_case
def test_gradients(rng, name, way, frozen, rounded):
    case = Case(name, rng, frozen=frozen, rounded=rounded)
    expected = case.reference()
    for which, gradient in getattr(case, way)()[1].items():
        assert_close(gradient, getattr(expected, f'd{which}'), 1e-4)        # variances cancel: sums of larger terms


@every_mode
@every_way
@every_case
def test_a_layer_without_bias(rng, name, way, frozen):
    case = Case(name, rng, bias=False, frozen=frozen, rounded=True)
    out, gradients, _ = getattr(case, way)()
    assert_close(out, case.reference().y)
    assert_close(gradients['gamma'], case.reference().dgamma, 1e-4)


@every_mode
@every_way
@pytest.mark.parametrize('name', ['conv2d', 'transposed', 'dense'])
def test_a_fixed_gamma_counts_as_one_in_training_and_gets_no_gradient(rng, name, way, frozen):
    case = Case(name, rng, fix_gamma=True, frozen=frozen, rounded=True)
    out, gradients, _ = getattr(case, way)()
    assert_close(out, case.reference().y)
    assert not gradients['gamma'].any()


@every_way
@every_case
def test_running_statistics_of_frozen_stay(rng, name, way):
    case = Case(name, rng, frozen=True)
    statistics = getattr(case, way)()[2]
    for which in ('mean', 'var'):
        np.testing.assert_array_equal(statistics[which], case.values[which].astype('float32'))


@pytest.mark.parametrize('bias', [False, True], ids=['no bias', 'bias'])
@every_way
@every_case
def test_running_statistics_of_batch_move(rng, name, way, bias):
    case = Case(name, rng, bias, frozen=False, rounded=True)
    statistics, expected = getattr(case, way)()[2], case.reference()
    assert_close(statistics['mean'], expected.mean)
    assert_close(statistics['var'], expected.var)


@every_way
@every_case
def test_inference_of_batch_is_that_of_frozen(rng, name, way):
    case = Case(name, rng, frozen=False, rounded=True)
    out = getattr(case, way)(training=False)[0]
    case.settings = case.settings._replace(frozen=True)
    assert_close(out, case.reference().y)


@every_way
def test_inference_of_batch_leaves_the_running_statistics_alone(rng, way):
    case = Case('conv2d', rng, frozen=False)
    statistics = getattr(case, way)(training=False)[2]
    for which in ('mean', 'var'):
        np.testing.assert_array_equal(statistics[which], case.values[which].astype('float32'))


@pytest.mark.parametrize('broken', [np.nan, np.inf])
@every_way
def test_inference_of_batch_on_a_broken_image_leaves_the_running_statistics_alone(rng, way, broken):
    case = Case('conv2d', rng, frozen=False)
    case.values['x'][0, 0, 0, 0] = broken
    statistics = getattr(case, way)(training=False)[2]
    for which in ('mean', 'var'):
        np.testing.assert_array_equal(statistics[which], case.values[which].astype('float32'))


@every_way
def test_inference_of_batch_on_a_broken_image_leaves_the_other_images_alone(rng, way):
    case = Case('conv2d', rng, frozen=False)
    case.values['x'][0, 0, 0, 0] = np.nan
    assert np.isfinite(getattr(case, way)(training=False)[0][1:]).all()


@every_mode
@every_way
def test_a_channel_with_gamma_0_gives_beta(rng, way, frozen):
    case = Case('conv2d', rng, frozen=frozen)
    case.values['gamma'][1] = 0
    out = getattr(case, way)()[0]
    np.testing.assert_allclose(out[:, 1], case.values['beta'][1], rtol=1e-6)


@every_mode
@every_way
def test_a_channel_with_gamma_0_gets_the_gradients_of_the_reference(rng, way, frozen):
    case = Case('conv2d', rng, frozen=frozen)
    case.values['gamma'][1] = 0
    expected = case.reference()
    for which, gradient in getattr(case, way)()[1].items():
        assert_close(gradient, getattr(expected, f'd{which}'), 1e-4)


@every_way
def test_a_constant_channel_trains_with_finite_gradients(rng, way):
    case = Case('conv2d', rng, frozen=False)
    case.values['weight'][2] = 0                        # its batch variance is 0
    out, gradients, _ = getattr(case, way)()
    assert all(np.isfinite(array).all() for array in (out, *gradients.values()))
    assert_close(gradients['weight'], case.reference().dweight, 1e-4)


# A transposed convolution runs in float64 in part, and a symbol adds up gradients of x before they are rounded.
@pytest.mark.parametrize('name', [name for name in CASES if name != 'transposed'])
def test_imperative_and_symbolic_agree_bit_for_bit(rng, name):
    case = Case(name, rng, frozen=False, rounded=True)
    for mine, theirs in zip(case.imperative(), case.symbolic()):
        np.testing.assert_equal(mine, theirs)


def test_gradients_do_not_reach_the_statistics(rng):
    case = Case('conv2d', rng, frozen=True)
    arrays = {name: nd.array(value) for name, value in case.values.items()}
    for name in ('mean', 'var', 'gamma'):
        arrays[name].attach_grad()
    with autograd.record():
        out = case.folded(nd, arrays).sum()
    out.backward()
    assert not arrays['mean'].grad.asnumpy().any() and not arrays['var'].grad.asnumpy().any()
