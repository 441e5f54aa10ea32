"""`attach`: which tensors of a graph it quantizes and how, and that the net it makes lives as any other."""
import copy
import gc
import json
import pickle
from collections import Counter
from functools import lru_cache

import mxnet as mx
import numpy as np
import pytest
from graph_nets import (
    STATIC,
    Net,
    images,
    node,
    quantizer_of,
    reads,
    ready,
    same,
    settings,
    small,
    train,
    train_step,
    values,
)
from mxnet import autograd, gluon, init, nd
from mxnet.gluon import nn
from preact_resnet import STAGES, preact_resnet18

import gluonquant as gq
from gluonquant.graph import Graph, as_graph
from gluonquant.layers import quantizers
from gluonquant.plan import PRESETS
from gluonquant.symbol_graph import QUANTIZE
from zoo import ZOO, build

hybridized_or_not = pytest.mark.parametrize('hybridized', [False, True], ids=['imperative', 'hybridized'])


@pytest.fixture
def net(seed):
    return small()


def calibrated(net, **options):
    """``net`` attached and calibrated on `images`."""
    attached = gq.attach(net, **options)
    gq.calibrate(attached, [images()])
    return attached


# ---------------------------------------------------------------- pre-activation ResNet-18: expected by hand

STAGE = range(1, STAGES + 1)
RELUS = [f'stage{stage}_unit{unit}_relu{number}' for stage in STAGE for unit in (1, 2) for number in (1, 2)]
# Sums read two convolutions in the first unit of a stage, a convolution and the sum of the first unit in the second.
SUMMANDS = [name for stage in STAGE for name in (f'stage{stage}_unit1_conv2', f'stage{stage}_unit1_sc',
                                                 f'stage{stage}_unit2_conv2', f'_plus{2 * stage - 2}')]
CONVOLUTIONS = [f'stage{stage}_unit{unit}_{part}' for stage in STAGE
                for unit, part in [(1, 'conv1'), (1, 'conv2'), (1, 'sc'), (2, 'conv1'), (2, 'conv2')]]
ACTIVATIONS = {'bn_data': 'int8 8s', **dict.fromkeys(['relu0', *RELUS, 'relu1'], 'lsq 4u'),
               **dict.fromkeys(SUMMANDS, 'lsq 4s'), 'flatten': 'int8 8u'}
WEIGHTS = {'conv0_weight': 'int8 8s', **{f'{name}_weight': 'lsq 4s' for name in CONVOLUTIONS}, 'fc1_weight': 'int8 8s'}


@lru_cache(maxsize=None)
def preact_symbol():
    return preact_resnet18(filters=(8, 8, 16, 24, 32), small=True)


@lru_cache(maxsize=None)
def preact_values():
    return values(preact_symbol(), data=(1, 3, 32, 32))


def preact(**options):
    return gq.attach(preact_symbol(), params=preact_values(), **options)


def without(table, *names):
    return {name: text for name, text in table.items() if name not in names}


def only(table, *names):
    return {name: table[name] for name in names}


def test_the_symbol_has_the_operators_of_the_example():
    count = Counter(node.op for node in Graph.of(preact_resnet18()).nodes())
    assert [count[op] for op in ('Convolution', 'FullyConnected', 'elemwise_add', 'Pooling')] == [21, 1, 8, 2]


def test_by_default_the_inputs_of_layers_sums_and_poolings_are_quantized():
    assert len(ACTIVATIONS) == 36 and settings(preact()) == ACTIVATIONS


def test_by_default_all_weights_are_quantized():
    assert len(WEIGHTS) == 22 and settings(preact(), 'weight') == WEIGHTS


@pytest.mark.parametrize('name, expected', [
    ('conv0', ['Q(bn_data)', 'Q(conv0_weight)']),
    ('pool0', ['Q(relu0)']),
    ('stage1_unit1_conv1', ['Q(stage1_unit1_relu1)', 'Q(stage1_unit1_conv1_weight)']),
    ('stage1_unit1_sc', ['Q(stage1_unit1_relu1)', 'Q(stage1_unit1_sc_weight)']),
    ('stage3_unit2_conv2', ['Q(stage3_unit2_relu2)', 'Q(stage3_unit2_conv2_weight)']),
    ('_plus0', ['Q(stage1_unit1_conv2)', 'Q(stage1_unit1_sc)']),
    ('_plus1', ['Q(stage1_unit2_conv2)', 'Q(_plus0)']),
    ('_plus7', ['Q(stage4_unit2_conv2)', 'Q(_plus6)']),
    ('stage1_unit2_relu1', ['stage1_unit2_bn1']),
    ('pool1', ['Q(relu1)']),
    ('flatten', ['pool1']),
    ('fc1', ['Q(flatten)', 'Q(fc1_weight)', 'fc1_bias'])])
def test_every_operator_reads_what_it_asks_for(name, expected):
    assert reads(preact(), name) == expected


@pytest.mark.parametrize('name, source', [('bn_data', 'data'), ('stage1_unit1_bn1', 'pool0'), ('bn0', 'conv0'),
                                          ('stage1_unit2_bn1', '_plus0'), ('stage2_unit1_bn1', '_plus1'),
                                          ('bn1', '_plus7')])
def test_batchnorm_reads_floats_even_where_others_read_the_tensor_quantized(name, source):
    assert reads(preact(), name)[0] == source


def test_the_output_of_the_net_is_float():
    net = preact()
    assert [net.label(entry.node) for entry in net.graph.heads.inputs] == ['fc1']


def test_two_convolutions_on_one_tensor_read_one_quantizer():
    net = preact()
    assert node(net, 'stage2_unit1_conv1').inputs[0].node is node(net, 'stage2_unit1_sc').inputs[0].node


def test_skip_leaves_the_first_convolution_float():
    net = preact(skip={'Convolution': 1})
    assert settings(net) == without(ACTIVATIONS, 'bn_data')
    assert settings(net, 'weight') == without(WEIGHTS, 'conv0_weight')


def test_a_skipped_convolution_reads_floats():
    assert reads(preact(skip={'Convolution': 1}), 'conv0') == ['bn_data', 'conv0_weight']


def test_skip_counts_each_operator_for_itself():
    net = preact(skip={'Convolution': 2, 'elemwise_add': 1, 'Pooling': 1, 'FullyConnected': 1})
    assert settings(net, 'weight') == without(WEIGHTS, 'conv0_weight', 'stage1_unit1_conv1_weight', 'fc1_weight')
    # stage1_unit1_relu1 stays, as the input of the shortcut
    assert settings(net) == without(ACTIVATIONS, 'bn_data', 'stage1_unit1_conv2', 'stage1_unit1_sc', 'relu0', 'flatten')


def test_only_quantizes_the_first_convolutions():
    net = preact(only={'Convolution': 3})
    assert settings(net, 'weight') == only(WEIGHTS, 'conv0_weight', 'stage1_unit1_conv1_weight',
                                           'stage1_unit1_conv2_weight', 'fc1_weight')
    assert settings(net) == only(ACTIVATIONS, 'bn_data', 'relu0', 'stage1_unit1_relu1', 'stage1_unit1_relu2',
                                 *SUMMANDS, 'relu1', 'flatten')


def test_a_convolution_beyond_only_reads_floats_beside_one_that_does_not():
    net = preact(only={'Convolution': 3})
    assert reads(net, 'stage1_unit1_conv1')[0] == 'Q(stage1_unit1_relu1)'
    assert reads(net, 'stage1_unit1_sc') == ['stage1_unit1_relu1', 'stage1_unit1_sc_weight']


def test_only_for_all_operators_leaves_nothing_else():
    net = preact(only={'Convolution': 2, 'FullyConnected': 0, 'Pooling': 1, 'elemwise_add': 1})
    assert settings(net, 'weight') == only(WEIGHTS, 'conv0_weight', 'stage1_unit1_conv1_weight')
    assert settings(net) == only(ACTIVATIONS, 'bn_data', 'stage1_unit1_relu1', 'relu0', 'stage1_unit1_conv2',
                                 'stage1_unit1_sc')


def test_skip_and_only_together_leave_what_is_between():
    net = preact(ops=('Convolution',), skip={'Convolution': 1}, only={'Convolution': 2})
    assert settings(net, 'weight') == only(WEIGHTS, 'stage1_unit1_conv1_weight')


def test_an_alias_of_an_operator_counts_as_the_operator():
    assert settings(preact(only={'_plus': 1})) == without(ACTIVATIONS, *SUMMANDS[2:])


def test_excluded_nodes_stay_float():
    net = preact(exclude=['conv0', '_plus*', 'fc1', 'stage2_*_sc'])
    assert settings(net, 'weight') == without(WEIGHTS, 'conv0_weight', 'fc1_weight', 'stage2_unit1_sc_weight')
    assert settings(net) == without(ACTIVATIONS, 'bn_data', *SUMMANDS, 'flatten')


def test_an_excluded_convolution_reads_the_float_tensor_that_another_reads_quantized():
    net = preact(exclude='stage2_unit1_sc')
    assert reads(net, 'stage2_unit1_conv1')[0] == 'Q(stage2_unit1_relu1)'
    assert reads(net, 'stage2_unit1_sc') == ['stage2_unit1_relu1', 'stage2_unit1_sc_weight']


def test_methods_of_the_roles_are_those_that_are_named():
    net = preact(weight='int8', activation='pact')
    weights = {name: 'int8 8s' if text == 'int8 8s' else 'int8 4s' for name, text in WEIGHTS.items()}
    assert settings(net) == {name: text.replace('lsq', 'pact') for name, text in ACTIVATIONS.items()}
    assert settings(net, 'weight') == weights


@pytest.mark.parametrize('method', PRESETS)
def test_a_preset_names_the_methods_of_both_roles(method):
    net = preact(method=method)
    weight, activation = settings(net, 'weight')['stage1_unit1_conv1_weight'], settings(net)['stage1_unit1_relu1']
    assert (weight[:-1], activation[:-1]) == tuple(f'{name} 4' for name in PRESETS[method])


@pytest.mark.parametrize('method', ['qil', 'dorefa'])
def test_methods_for_relu_outputs_fall_back_to_int8_where_values_are_negative(method):
    assert settings(preact(method=method))['_plus0'] == 'int8 4s'


def test_bits_of_the_roles_override_bits():
    net = preact(bits=5, weight_bits=3, activation_bits=6)
    assert settings(net)['_plus0'] == 'lsq 6s' and settings(net, 'weight')['stage1_unit1_sc_weight'] == 'lsq 3s'


def test_signed_true_forces_signed_grids():
    assert settings(preact(signed=True)) == {name: text.replace('u', 's') for name, text in ACTIVATIONS.items()}


def test_first_last_bits_none_leaves_first_and_last_layer_float():
    net = preact(first_last_bits=None)
    assert settings(net) == without(ACTIVATIONS, 'bn_data', 'flatten')
    assert settings(net, 'weight') == without(WEIGHTS, 'conv0_weight', 'fc1_weight')


def test_first_last_bits_are_those_of_both_ends():
    net = preact(first_last_bits=6)
    assert settings(net) == {**ACTIVATIONS, 'bn_data': 'int8 6s', 'flatten': 'int8 6u'}
    assert settings(net, 'weight') == {**WEIGHTS, 'conv0_weight': 'int8 6s', 'fc1_weight': 'int8 6s'}


def in_a_row(*layers):
    """Layers that take and give (2, 3, 4, 4), one behind the other."""
    def function(net, F, x):
        for layer in (net.a, net.b, net.c):
            x = F.reshape(layer(x), shape=(-1, 3, 4, 4))
        return x
    return ready(Net(function, **dict(zip('abc', layers, strict=True))), images(size=4))


@pytest.mark.parametrize('middle', [nn.Dense(48), nn.Conv2D(3, 1)], ids=['dense', 'conv'])
def test_the_last_layer_is_the_one_that_no_other_depends_on(middle):
    net = gq.attach(in_a_row(nn.Conv2D(3, 1), middle, nn.Conv2D(3, 1)))
    assert settings(net, 'weight') == {'a.weight': 'int8 8s', 'b.weight': 'lsq 4s', 'c.weight': 'int8 8s'}


@pytest.mark.parametrize('kind', [gq.Rule, dict])
def test_a_rule_changes_the_nodes_it_names(kind):
    net = preact(rules=[kind(pattern='stage1_*', weight_bits=2, activation_bits=3)])
    stage = {f'stage1_unit{unit}_relu{number}': 'lsq 3u' for unit in (1, 2) for number in (1, 2)}
    assert settings(net) == {**ACTIVATIONS, **stage}
    assert settings(net, 'weight') == {name: 'lsq 2s' if name.startswith('stage1') else text
                                       for name, text in WEIGHTS.items()}


def test_a_rule_changes_operators_without_weights_too():
    net = preact(rules=[gq.Rule('_plus*', activation='int8', bits=8)])
    assert settings(net) == {**ACTIVATIONS, **dict.fromkeys(SUMMANDS, 'int8 8s')}


def test_later_rules_win_and_keep_what_they_do_not_name():
    net = preact(rules=[gq.Rule('*_conv2', bits=6), gq.Rule('stage4_unit2_conv2', weight_bits=3)])
    assert settings(net, 'weight')['stage4_unit2_conv2_weight'] == 'lsq 3s'
    assert settings(net)['stage4_unit2_relu2'] == 'lsq 6u'


def test_rules_win_over_first_and_last():
    net = preact(rules=[gq.Rule('fc1', weight_bits=5, activation_bits=6)])
    assert settings(net)['flatten'] == 'int8 6u' and settings(net, 'weight')['fc1_weight'] == 'int8 5s'


def test_a_rule_with_method_none_leaves_that_role_float():
    net = preact(rules=[gq.Rule('stage4_unit2_conv2', weight='none'), gq.Rule('stage4_unit2_conv1', activation='none')])
    assert reads(net, 'stage4_unit2_conv2') == ['Q(stage4_unit2_relu2)', 'stage4_unit2_conv2_weight']
    assert reads(net, 'stage4_unit2_conv1') == ['stage4_unit2_relu1', 'Q(stage4_unit2_conv1_weight)']


def test_rules_and_exclude_know_layers_by_their_path(net):
    attached = gq.attach(net, rules=[gq.Rule('4.first', bits=3)], exclude=['5'])
    weights = settings(attached, 'weight')
    assert weights['4.first.weight'] == 'lsq 3s' and weights['4.second.weight'] == 'lsq 4s'
    assert '5.first.weight' not in weights and '5.second.weight' not in weights


def test_rules_and_exclude_know_layers_by_their_name_in_the_graph(net):
    attached = gq.attach(net, rules=[gq.Rule('*residual0_conv0_fwd', bits=3)], exclude=['net_residual1_conv0_fwd'])
    assert settings(attached, 'weight')['4.first.weight'] == 'lsq 3s'
    assert reads(attached, '5.first') == ['residual0_relu1', 'residual1_conv0_weight']


# ---------------------------------------------------------------- operators on request


def both(function):
    return lambda net, F, a, b: function(F, a, b)


REQUESTS = {
    'relu': (lambda net, F, x: F.relu(x), ['data']),
    'Activation': (lambda net, F, x: F.Activation(x, act_type='tanh'), ['data']),
    'sigmoid': (lambda net, F, x: F.sigmoid(x), ['data']),
    'mean': (lambda net, F, x: F.mean(x, axis=(2, 3)), ['data']),
    'max': (lambda net, F, x: F.max(x, axis=1), ['data']),
    'Dropout': (lambda net, F, x: F.Dropout(x), ['data']),
    'broadcast_add': (both(lambda F, a, b: F.broadcast_add(a, b)), ['a', 'b']),
    'broadcast_mul': (both(lambda F, a, b: F.broadcast_mul(a, b)), ['a', 'b'])}
on_request = pytest.mark.parametrize('op', REQUESTS)


@on_request
def test_an_operator_on_request_reads_all_its_inputs_quantized(op):
    function, inputs = REQUESTS[op]
    assert settings(gq.attach(Net(function), inputs=inputs, ops=(op,))) == dict.fromkeys(inputs, 'lsq 4s')


@on_request
def test_it_stays_float_unless_requested(op):
    function, inputs = REQUESTS[op]
    with pytest.raises(ValueError, match='nothing is left to quantize'):
        gq.attach(Net(function), inputs=inputs)


def test_only_the_requested_operators_are_quantized():
    net = preact(ops=('Activation',))
    norms = ['bn0', *(f'stage{stage}_unit{unit}_bn{number}' for stage in STAGE for unit in (1, 2) for number in (1, 2)),
             'bn1']
    assert settings(net) == dict.fromkeys(norms, 'lsq 4s') and not settings(net, 'weight')


def test_one_operator_by_itself_may_be_a_string():
    assert settings(preact(ops='FullyConnected')) == only(ACTIVATIONS, 'flatten')


class WithParameter(nn.HybridBlock):
    """``function(F, x, scale)`` with a Parameter ``scale``."""

    def __init__(self, function, shape, constant=False):
        super().__init__(prefix='net_')
        self.function = function
        with self.name_scope():
            self.scale = self.params.get_constant('scale', nd.full(shape, 1.5)) if constant else \
                self.params.get('scale', shape=shape, init=init.Constant(1.5))

    def hybrid_forward(self, F, x, scale):
        return self.function(F, x, scale)


@pytest.mark.parametrize('constant', [False, True])
def test_inputs_that_are_parameters_stay_float(constant):
    net = ready(WithParameter(lambda F, x, scale: F.broadcast_mul(x, scale), (1, 3, 1, 1), constant), images())
    assert reads(gq.attach(net, ops=('broadcast_mul',)), 'broadcast_mul0') == ['Q(data)', 'scale']


def test_what_is_computed_from_parameters_alone_stays_float():
    net = ready(WithParameter(lambda F, x, scale: F.broadcast_add(x, F.exp(scale)), (1, 3, 1, 1)), images())
    assert reads(gq.attach(net, ops=('broadcast_add', 'exp')), 'broadcast_add0') == ['Q(data)', 'exp0']


def test_a_layer_whose_weight_is_computed_from_data_stays_float():
    net = Net(both(lambda F, a, b: F.FullyConnected(a, b, num_hidden=3, no_bias=True, name='mixed') + a))
    attached = gq.attach(net, inputs=('a', 'b'))
    assert reads(attached, 'mixed') == ['a', 'b']


def test_numbers_of_numpy_are_numbers():
    net = preact(bits=np.int64(5), activation='int8', activation_options={'ema_decay': np.float32(0.5)},
                 rules=[gq.Rule('fc1', bits=np.int64(6))])
    assert quantizer_of(net, 'pool0').ema_decay == 0.5
    assert settings(net)['relu0'] == 'int8 5u' and settings(net, 'weight')['fc1_weight'] == 'int8 6s'


# ---------------------------------------------------------------- training on real images


LOSS = gluon.loss.SoftmaxCrossEntropyLoss()


def losses(net, trainer, x, y, steps, size=32):
    """Losses of training on batches taken in turn."""
    found = []
    for start in range(0, steps * size, size):
        rows = [place % len(x) for place in range(start, start + size)]
        with autograd.record():
            loss = LOSS(net(nd.array(x[rows])), nd.array(y[rows])).mean()
        loss.backward()
        trainer.step(1)
        found.append(loss.asscalar())
    return found


def assert_it_learns(x, y, least=0.7, **options):
    """Five steps in float first: until BatchNorm has statistics, calibration sees other values than training does."""
    net = preact(**options)
    net.hybridize(**STATIC)
    trainer = gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': 0.05, 'momentum': 0.9}, kvstore=None)
    losses(gq.set_mode(net, 'off'), trainer, x, y, 5)
    gq.calibrate(net, [x[:32]])
    found = losses(gq.set_mode(net, 'quantize'), trainer, x, y, 20)
    assert np.mean(found[-5:]) < least * np.mean(found[:5]), found


@lru_cache(maxsize=None)
def digits():
    """The first 128 scanned digits of scikit-learn as (128, 3, 32, 32) and their classes."""
    from sklearn.datasets import load_digits
    found = load_digits()
    x = (found.images[:128] / 16 - 0.305) / 0.376
    return np.repeat(np.kron(x, np.ones((4, 4)))[:, None], 3, axis=1).astype('float32'), found.target[:128]


@pytest.mark.parametrize('options', [{}, {'weight': 'int8', 'activation': 'pact'}, {'target': 'onnxruntime'},
                                     {'target': 'tensorrt', 'method': 'int8', 'bits': 8}], ids=str)
def test_it_learns_digits(seed, options):
    assert_it_learns(*digits(), **options)


def test_it_learns_photographs(seed, shared):
    path = shared / 'data' / 'cifar10' / 'val.rec'
    if not path.is_file():
        pytest.skip(f'needs {path}')
    data = gluon.data.vision.ImageRecordDataset(str(path))
    pairs = [data[place] for place in range(64)]
    x = np.stack([image.asnumpy().transpose(2, 0, 1) for image, _ in pairs]).astype('float32') / 64 - 2
    assert_it_learns(x, np.array([label for _, label in pairs]), least=0.85)


# ---------------------------------------------------------------- convert and attach agree


LAYERS = ('Convolution', 'FullyConnected', 'Deconvolution')
ALIKE = [('gluoncv', 'cifar_resnet20_v1', ()), ('gluoncv', 'resnet18_v1b', ()), ('gluon', 'mobilenetv2_0.25', ()),
         ('gluon', 'squeezenet1.0', ()), ('gluon', 'alexnet', pytest.mark.slow), ('gluon', 'vgg11', pytest.mark.slow),
         ('gluon', 'densenet121', pytest.mark.slow), ('gluon', 'inceptionv3', pytest.mark.slow)]


@pytest.fixture(scope='module', params=[pytest.param(case[:2], id=case[1], marks=case[2]) for case in ALIKE])
def twins(request, tmp_path_factory):
    """(name, x, a converted net, an attached one) with the same weights, calibrated with the same batch."""
    entry = next(entry for entry in ZOO if (entry.source, entry.name) == request.param)
    x = images(1, 2, entry.size)
    float_nets = build(entry), build(entry)
    mx.random.seed(0)
    ready(float_nets[0], x)
    path = str(tmp_path_factory.mktemp('twins') / 'float.params')
    float_nets[0].save_parameters(path)
    float_nets[1].load_parameters(path)
    nets = gq.convert(float_nets[0]), gq.attach(float_nets[1], ops=LAYERS)
    with pytest.MonkeyPatch.context() as patch:
        # Searching a graph for common subexpressions takes time quadratic in its size.
        patch.setenv('MXNET_ELIMINATE_COMMON_EXPR', '0')
        for net in nets:
            gq.calibrate(net, [x])
        yield (entry.name, x, *nets)
    gc.collect()


def test_convert_and_attach_calibrate_alike(twins):
    _, _, converted, attached = twins
    ranges = [sorted(quantizer.affine_bounds() for quantizer in quantizers(net, 'activation').values())
              for net in (converted, attached)]
    assert ranges[0] == ranges[1]


@hybridized_or_not
def test_convert_and_attach_give_equal_outputs(twins, hybridized):
    _, x, converted, attached = twins
    for net in (converted, attached):
        net.hybridize(hybridized)
    assert np.isfinite(attached(x).asnumpy()).all()
    same(attached(x), converted(x))


@hybridized_or_not
def test_convert_and_attach_give_equal_gradients(twins, hybridized):
    name, x, converted, attached = twins
    found = []
    for net in (converted, attached):
        net.hybridize(hybridized)
        mx.random.seed(1)           # Dropout draws the same masks in both, in the same order
        train_step(net, x)
        found.append({path: parameter.grad().asnumpy() for path, parameter in net._collect_params_with_prefix().items()
                      if path in attached._reg_params and parameter.grad_req != 'null'})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 15
    for path, expected in found[0].items():
        # The tape sums up the gradients of a tensor in the order in which its readers ran. This net's code runs the
        # body of a block before the shortcut, the graph sorts the shortcut first: float32 sums in another order.
        reordered = name == 'cifar_resnet20_v1' and not hybridized
        bound = 1e-5 * np.abs(expected).max() if reordered else 0
        np.testing.assert_allclose(found[1][path], expected, rtol=0, atol=bound, err_msg=path)


# ---------------------------------------------------------------- one quantizer for each tensor


def two_layers(**options):
    net = ready(Net(lambda net, F, x: net.a(x) + net.b(x), a=nn.Dense(3), b=nn.Dense(3)), nd.ones((2, 4)))
    return gq.attach(net, first_last_bits=4, **options)


@pytest.mark.parametrize('a, b', [(3, 6), (6, 3)])
def test_the_widest_grid_wins_where_readers_ask_for_different_bits(a, b):
    net = two_layers(rules=[gq.Rule('a', bits=a), gq.Rule('b', bits=b)])
    assert settings(net)['data'] == 'int8 6s'
    assert settings(net, 'weight') == {'a.weight': f'int8 {a}s', 'b.weight': f'int8 {b}s'}


@hybridized_or_not
def test_a_shared_average_advances_once_per_step(hybridized):
    net = two_layers(method='int8', activation_options={'ema_decay': 0.5})
    net.hybridize(hybridized)
    for amax in (1, 2, 4):
        train_step(net, nd.full((2, 4), amax))
    assert quantizer_of(net, 'a').value('amax') == 0.5 * (0.5 * (1 + 2)) + 0.5 * 4


@hybridized_or_not
def test_a_tensor_read_twice_by_one_operator_has_one_quantizer(hybridized):
    net = gq.attach(Net(lambda net, F, x: x + x), method='int8')
    assert reads(net, '_plus0') == ['Q(data)', 'Q(data)'] and len(quantizers(net)) == 1
    x = nd.array([0.3, -0.9, 7])
    gq.calibrate(net, [x])
    net.hybridize(hybridized)
    x.attach_grad()
    with autograd.record():
        out = net(x)
    out.backward()
    same(out, 2 * quantizer_of(net, '_plus0')(x))
    assert x.grad.asnumpy().tolist() == [2, 2, 2]


def sliced(function):
    """A net that reads ``function`` of the two halves of its input, one of which is small and one large."""
    net = Net(lambda net, F, x: function(F, *F.SliceChannel(x, num_outputs=2, axis=1, name='parts')))
    return net, nd.array([[0.5, -0.25, 8, 4]])


def test_the_outputs_of_one_operator_have_quantizers_of_their_own():
    net, x = sliced(lambda F, a, b: a + b)
    attached = gq.attach(net, method='int8')
    assert reads(attached, '_plus0') == ['Q(parts)', 'Q(parts[1])']
    gq.calibrate(attached, [x], observer='minmax')
    assert [quantizer_of(attached, '_plus0', slot).value('amax')[0] for slot in (0, 1)] == [0.5, 8]


def test_one_output_of_an_operator_may_be_quantized_and_another_one_not():
    net, x = sliced(lambda F, a, b: F.Concat(F.relu(a), F.sigmoid(b)))
    attached = gq.attach(net, ops=('sigmoid',), method='int8')
    assert settings(attached) == {'parts[1]': 'int8 4s'}
    gq.calibrate(attached, [x])
    same(attached(x)[:, :2], nd.relu(x[:, :2]))


class Twice(nn.HybridBlock):
    """One layer on two tensors."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        with self.name_scope():
            self.dense = nn.Dense(4, in_units=4)

    def hybrid_forward(self, F, x):
        return self.dense(F.relu(self.dense(x)))


def test_a_weight_that_two_operators_read_has_one_quantizer():
    net = gq.attach(ready(Twice(), nd.ones((1, 4))))
    layers = [node for node in net.graph.nodes() if node.op == 'FullyConnected']
    assert settings(net, 'weight') == {'dense.weight': 'int8 8s'}
    assert layers[0].inputs[1].node is layers[1].inputs[1].node and layers[0].inputs[1].node.op == QUANTIZE


def test_a_layer_used_twice_has_a_quantizer_for_each_of_its_inputs():
    assert settings(gq.attach(ready(Twice(prefix='net_'), nd.ones((1, 4))))) == {'data': 'int8 8s', 'relu0': 'int8 8u'}


@hybridized_or_not
def test_a_weight_that_two_operators_read_gets_the_gradients_of_both(hybridized):
    float_net = ready(Twice(), nd.ones((1, 4)))
    net = gq.attach(float_net, weight='int8', activation='none', first_last_bits=8)
    net.hybridize(hybridized)
    float_net.dense.weight.set_data(nd.array(2 * np.eye(4)))
    train_step(net, nd.ones((1, 4)))
    # w (w x): the second layer gives its input, 2; the first one gives x times the second one's weight, 2
    np.testing.assert_array_equal(np.diag(float_net.dense.weight.grad().asnumpy()), np.full(4, 4.0))


class Weights(nn.HybridBlock):
    """``function(F, x, weight)`` with a Parameter ``weight``."""

    def __init__(self, function, shape, prefix='net_'):
        super().__init__(prefix=prefix)
        self.function = function
        with self.name_scope():
            self.weight = self.params.get('weight', shape=shape)

    def hybrid_forward(self, F, x, weight):
        return self.function(F, x, weight)


def layer(F, x, weight, name, units=4):
    return F.FullyConnected(x, weight, num_hidden=units, no_bias=True, name=name)


def test_a_weight_that_an_embedding_reads_too_stays_float_there():
    net = Weights(lambda F, x, weight: layer(F, F.Embedding(x, weight, input_dim=4, output_dim=4, name='words'), weight,
                                             'logits'), (4, 4))
    attached = gq.attach(ready(net, nd.array([2])))
    assert reads(attached, 'words') == ['data', 'weight'] and reads(attached, 'logits') == ['Q(words)', 'Q(weight)']


def test_a_computed_weight_is_quantized_where_the_layer_reads_it():
    net = gq.attach(ready(Weights(lambda F, x, weight: layer(F, x, F.tanh(weight), 'a'), (4, 4)), nd.ones((1, 4))))
    assert reads(net, 'a') == ['Q(data)', 'Q(tanh0)'] and reads(net, 'tanh0') == ['weight']


def test_the_range_of_a_computed_weight_is_that_of_its_values():
    net = Weights(lambda F, x, weight: layer(F, x, weight * 10, 'a'), (4, 4))
    attached = gq.attach(ready(net, nd.ones((1, 4))), weight='int8', first_last_bits=8, per_channel=False)
    amax = 10 * np.abs(net.weight.data().asnumpy()).max()
    assert quantizer_of(attached, 'a', 1).qparams().scale == pytest.approx(amax / 127, rel=1e-6)    # float32 products


@hybridized_or_not
def test_a_weight_and_what_is_computed_from_it_have_quantizers_of_their_own(hybridized):
    net = Weights(lambda F, x, weight: layer(F, layer(F, x, weight, 'a'), weight * 10, 'b'), (4, 4))
    attached = gq.attach(ready(net, nd.ones((1, 4))), weight='int8', activation='none', first_last_bits=8)
    assert len(quantizers(attached, 'weight')) == 2
    attached.hybridize(hybridized)
    train_step(attached, nd.ones((1, 4)))
    assert np.abs(net.weight.grad().asnumpy()).max() > 0


# ---------------------------------------------------------------- layers


def test_the_output_is_what_the_operators_compute_from_quantized_inputs():
    net = Net(lambda net, F, x: net.dense(F.Pooling(F.relu(net.conv(x)), kernel=(2, 2), pool_type='avg', name='pool')),
              conv=nn.Conv2D(4, 3, in_channels=3), dense=nn.Dense(3))
    net = calibrated(ready(net, images()), bits=3)
    value = {path: parameter.data() for path, parameter in net._reg_params.items()}
    q = {(name, slot): quantizer_of(net, name, slot) for name, slot in
         [('conv', 0), ('conv', 1), ('pool', 0), ('dense', 0), ('dense', 1)]}
    x = nd.Convolution(q['conv', 0](images()), q['conv', 1](value['conv.weight']), value['conv.bias'], kernel=(3, 3),
                       num_filter=4)
    x = nd.Pooling(q['pool', 0](nd.relu(x)), kernel=(2, 2), pool_type='avg')
    same(net(images()), nd.FullyConnected(q['dense', 0](x), q['dense', 1](value['dense.weight']), value['dense.bias'],
                                          num_hidden=3))


DECONVOLUTIONS = {1: (6,), 2: (1,)}     # groups: shape of the weight's scale


def deconvolution(groups):
    layer = nn.Conv2DTranspose(6, 3, groups=groups, in_channels=4)
    return ready(Net(lambda net, F, x: net.up(x), up=layer), nd.ones((1, 4, 5, 5)))


@pytest.mark.parametrize('groups', DECONVOLUTIONS)
def test_a_transposed_convolution_has_a_scale_per_output_channel_if_it_has_no_groups(groups):
    net = gq.attach(deconvolution(groups), weight='int8', first_last_bits=8)
    weight = net._reg_params['up.weight'].data().asnumpy()
    amax = np.abs(weight).max(axis=(0, 2, 3)) if groups == 1 else np.abs(weight).max().reshape(1)
    scale = quantizer_of(net, 'up', 1).qparams().scale
    assert scale.shape == DECONVOLUTIONS[groups]
    np.testing.assert_array_equal(scale, amax / np.float32(127))


@pytest.mark.parametrize('groups', DECONVOLUTIONS)
@hybridized_or_not
def test_a_transposed_convolution_trains_as_a_converted_one(groups, hybridized):
    x = nd.array(np.random.default_rng(0).normal(size=(2, 4, 5, 5)))
    found = []
    for make in (gq.attach, gq.convert):
        mx.random.seed(0)
        net = make(deconvolution(groups), bits=3)
        gq.calibrate(net, [x])
        net.hybridize(hybridized)
        train_step(net, x)
        found += net.collect_params('.*weight$').values()
    assert np.abs(found[0].grad().asnumpy()).max() > 0
    np.testing.assert_array_equal(found[0].grad().asnumpy(), found[1].grad().asnumpy())


@pytest.mark.parametrize('flatten', [True, False])
@hybridized_or_not
def test_a_dense_layer_flattens_its_quantized_input_or_not(flatten, hybridized):
    x = images(count=2, size=4)
    dense = nn.Dense(3, flatten=flatten, use_bias=False)
    net = gq.attach(ready(Net(lambda net, F, x: net.dense(x), dense=dense), x), method='int8', first_last_bits=8)
    gq.calibrate(net, [x])
    net.hybridize(hybridized)
    x_q, weight_q = quantizer_of(net, 'dense')(x), quantizer_of(net, 'dense', 1)(dense.weight.data())
    same(net(x), nd.FullyConnected(x_q, weight_q, num_hidden=3, no_bias=True, flatten=flatten))


@pytest.mark.parametrize('make, shape', [(nn.Conv1D, (2, 3, 9)), (nn.Conv3D, (2, 3, 5, 5, 5))])
def test_convolutions_of_other_dimensions_train(make, shape):
    x = nd.array(np.random.default_rng(0).normal(size=shape))
    net = gq.attach(ready(Net(lambda net, F, x: net.conv(x), conv=make(4, 3)), x))
    gq.calibrate(net, [x])
    net.hybridize()
    train_step(net, x)
    assert np.abs(net._reg_params['conv.weight'].grad().asnumpy()).max() > 0


@hybridized_or_not
def test_the_body_of_a_loop_stays_float_and_the_layer_behind_it_is_quantized(hybridized):
    def function(net, F, x, state):
        return net.dense(F.contrib.foreach(lambda x, state: (F.tanh(x + state),) * 2, x, state)[0])
    x, state = nd.array(np.random.default_rng(0).normal(size=(3, 2, 4))), nd.zeros((2, 4))
    net = ready(Net(function, dense=nn.Dense(3, flatten=False)), x, state)
    attached = gq.attach(net, inputs=('x', 'state'))
    gq.calibrate(attached, [x], forward=lambda net, x: net(x, state))
    attached.hybridize(hybridized)
    train_step(attached, x, state)
    assert len(settings(attached)) == 1 and list(settings(attached, 'weight')) == ['dense.weight']
    same(gq.set_mode(attached, 'off')(x, state), net(x, state))


# ---------------------------------------------------------------- inputs and outputs


def two_inputs():
    net = Net(lambda net, F, a, b: net.dense(a) + b, dense=nn.Dense(4, prefix='net_dense_'))
    return ready(net, nd.ones((2, 3)), nd.ones((2, 4)))


@hybridized_or_not
def test_a_net_takes_its_inputs_in_their_order(hybridized):
    a, b = nd.array([[1, -2, 3]]), nd.array([[5, 6, -7, 8]])
    net = two_inputs()
    attached = gq.attach(net, inputs=('a', 'b'))
    gq.calibrate(attached, [(a, b)], forward=lambda net, batch: net(*batch))
    assert list(settings(attached)) == ['a', 'dense_fwd', 'b']
    gq.set_mode(attached, 'off').hybridize(hybridized)
    same(attached(a, b), net(a, b))


def test_a_wrong_number_of_inputs_is_refused_with_their_names():
    attached = gq.attach(two_inputs(), inputs=('a', 'b'))
    with pytest.raises(ValueError, match=r'the net takes 2 inputs \(a, b\), not 1'):
        gq.set_mode(attached, 'off')(nd.ones((2, 3)))


FORMS = {
    'one': lambda net, F, x: net.dense(x),
    'list of one': lambda net, F, x: [net.dense(x)],
    'list': lambda net, F, x: [net.dense(x), F.relu(x)],
    'nested': lambda net, F, x: (F.relu(x), [net.dense(x), (x * 2, F.relu(net.dense(x)))]),
    'outputs of one operator': lambda net, F, x: F.SliceChannel(net.dense(x), num_outputs=2),
    'one of several outputs': lambda net, F, x: F.SliceChannel(net.dense(x), num_outputs=2)[1],
    'twice the same': lambda net, F, x: (net.dense(x),) * 2}


def form(out):
    return [form(part) for part in out] if isinstance(out, (list, tuple)) else out.shape


@pytest.mark.parametrize('function', FORMS.values(), ids=FORMS)
@hybridized_or_not
def test_outputs_come_in_the_form_in_which_the_net_gives_them(function, hybridized):
    x = nd.array([[1.0, -2, 3]])
    net = ready(Net(function, dense=nn.Dense(4)), x)
    attached = calibrate_off(gq.attach(net), x)
    attached.hybridize(hybridized)
    assert form(attached(x)) == form(net(x))
    same(attached(x), net(x))


def calibrate_off(net, *batches):
    gq.calibrate(net, batches)
    return gq.set_mode(net, 'off')


def test_an_output_that_a_layer_reads_too_stays_float():
    net = ready(Net(lambda net, F, x: (lambda y: (y, net.dense(y)))(F.relu(x, name='seen')), dense=nn.Dense(4)),
                images())
    attached = calibrated(net)
    assert reads(attached, 'dense')[0] == 'Q(seen)'
    same(attached(images())[0], nd.relu(images()))


@hybridized_or_not
def test_a_constant_of_the_net_is_a_constant_of_the_attached_one(hybridized):
    net = ready(WithParameter(lambda F, x, scale: F.broadcast_mul(x, scale), (1, 3, 1, 1), constant=True), images())
    attached = gq.attach(net, ops=('broadcast_mul',), method='int8')
    gq.calibrate(attached, [images()])
    attached.hybridize(hybridized)
    assert attached._reg_params['scale'] is net.scale
    same(attached(images()), quantizer_of(attached, 'broadcast_mul0')(images()) * 1.5)


def test_a_net_without_parameters_is_quantized_and_trains_what_comes_before():
    x = images()
    net = calibrated(Net(lambda net, F, x: F.Pooling(x, kernel=(2, 2), pool_type='avg')))
    x.attach_grad()
    train_step(net, x)
    assert np.abs(x.grad.asnumpy()).max() > 0


# ---------------------------------------------------------------- symbols and their files


def test_a_symbol_takes_the_values_of_its_parameters():
    net = preact()
    for name, value in preact_values().items():
        np.testing.assert_array_equal(net.parameter(name).data().asnumpy(), value.asnumpy(), err_msg=name)


@pytest.mark.parametrize('change', [lambda name, value: (f'{"aux" if "moving" in name else "arg"}:{name}', value),
                                    lambda name, value: (name, value.asnumpy())], ids=['with prefixes', 'numpy'])
def test_parameters_come_as_any_arrays_under_names_of_a_checkpoint(change):
    x = images(size=32)
    given = dict(change(name, value) for name, value in preact_values().items())
    attached = gq.attach(preact_symbol(), params=given)
    same(calibrate_off(attached, x)(x), calibrate_off(preact(), x)(x))


def test_statistics_of_batchnorm_are_not_trained():
    net = preact()
    fixed = {name for name in preact_values() if net.parameter(name).grad_req == 'null'}
    assert fixed == set(preact_symbol().list_auxiliary_states())


def test_learning_rates_noted_in_a_symbol_are_those_of_the_parameters():
    weight = mx.sym.var('fc_weight', lr_mult=0.5, wd_mult=0.25)
    symbol = mx.sym.FullyConnected(mx.sym.var('data'), weight, num_hidden=3, no_bias=True, name='fc')
    parameter = gq.attach(symbol, params={'fc_weight': nd.ones((3, 4))}).parameter('fc_weight')
    assert (parameter.lr_mult, parameter.wd_mult) == (0.5, 0.25)


def test_a_symbol_without_values_is_initialized_later():
    net = gq.attach(preact_symbol(), first_last_bits=8)
    net.initialize(init.Xavier())
    gq.calibrate(net, [images(size=32)])
    assert net(images(size=32)).shape == (2, 10)


def test_a_symbol_of_several_outputs_returns_them_in_a_list():
    data = mx.sym.var('data')
    symbol = mx.sym.Group([mx.sym.FullyConnected(data, num_hidden=3, name='fc'), mx.sym.relu(data)])
    net = gq.attach(symbol, params=values(symbol, data=(2, 4)))
    assert form(calibrate_off(net, nd.ones((2, 4)))(nd.ones((2, 4)))) == [(2, 3), (2, 4)]


def test_a_graph_that_is_attached_stays_as_it_is():
    graph = Graph.of(preact_symbol())
    before = graph.dump()
    assert settings(gq.attach(graph, params=preact_values())) == ACTIVATIONS and graph.dump() == before


def test_a_symbol_with_a_label_names_it_among_the_inputs():
    symbol = mx.sym.SoftmaxOutput(preact_symbol(), name='softmax')
    net = gq.attach(symbol, params=preact_values(), inputs=('data', 'softmax_label'))
    x, y = images(size=32), nd.array([3, 7])
    gq.calibrate(net, [x], forward=lambda net, x: net(x, y))
    np.testing.assert_allclose(net(x, y).asnumpy().sum(axis=1), 1, rtol=1e-6)       # float32 sums


@pytest.fixture
def exported(net, tmp_path):
    """(symbol file, parameter file) of ``net``."""
    net.hybridize()
    net(images())
    net.export(str(tmp_path / 'float'))
    return str(tmp_path / 'float-symbol.json'), str(tmp_path / 'float-0000.params')


@hybridized_or_not
def test_files_that_export_wrote_give_the_quantized_net(net, exported, hybridized):
    path, params = exported
    attached = gq.attach(path, params=params)
    expected = gq.attach(net)
    ranges = gq.calibrate(attached, [images()]), gq.calibrate(expected, [images()])
    assert len(ranges[0]) == 10 and sorted(ranges[0].values()) == sorted(ranges[1].values())
    attached.hybridize(hybridized)
    same(attached(images()), expected(images()))


def test_a_symbol_block_shares_its_parameters(net, exported):
    path, params = exported
    block = gluon.SymbolBlock.imports(path, ['data'], params)
    attached = gq.attach(block)
    same(calibrate_off(attached, images())(images()), net(images()))
    mine = attached.collect_params()
    assert all(mine[name] is parameter for name, parameter in block.collect_params().items() if name != 'data')


def test_a_float_graph_can_be_attached(net):
    attached = gq.attach(as_graph(net))
    assert settings(attached) == settings(gq.attach(net))
    same(calibrate_off(attached, images())(images()), net(images()))


# ---------------------------------------------------------------- shapes that are not known yet


def initialize_attached(net, attached):
    attached.initialize(init.Xavier())


def initialize_float(net, attached):
    net.initialize(init.Xavier())


def run_float(net, attached):
    net.initialize(init.Xavier())
    net(images())


LATER = pytest.mark.parametrize('initialize', [initialize_attached, initialize_float, run_float])


@LATER
@hybridized_or_not
@pytest.mark.parametrize('options', [{}, {'weight': 'int8'}, {'weight': 'sawb', 'per_channel': False}], ids=str)
def test_a_net_may_be_initialized_after_it_was_attached(seed, initialize, hybridized, options):
    net = small(ran=False)
    attached = gq.attach(net, **options)
    initialize(net, attached)
    attached.hybridize(hybridized)
    gq.calibrate(attached, [images()])
    out = attached(images()).asnumpy()
    fresh = gq.attach(net, **options)
    gq.calibrate(fresh, [images()])
    # Hybridized, a convolution may add up in another order for an input in another layout.
    np.testing.assert_allclose(out, fresh(images()).asnumpy(), rtol=0, atol=1e-5 * np.abs(out).max())


@hybridized_or_not
def test_a_net_that_is_initialized_but_never_ran_trains(seed, hybridized):
    net = small(ran=False)
    net.initialize(init.Xavier())
    attached = gq.attach(net, weight='int8', activation='int8')
    attached.hybridize(hybridized)
    train(attached)
    assert net[4].first.weight.shape == (6, 4, 3, 3)


def test_a_net_that_is_hybridized_and_has_run_can_be_attached(net):
    net.hybridize(**STATIC)
    expected = net(images()).asnumpy()
    attached = calibrate_off(gq.attach(net), images())
    np.testing.assert_array_equal(attached(images()).asnumpy(), expected)


# ---------------------------------------------------------------- scalars, tables, BatchNorm


def scaled(shape):
    """A dense layer, and a product with a Parameter of this shape."""
    net = WithParameter(lambda F, x, scale: F.broadcast_mul(x, scale, name='product'), shape)
    return ready(net, images())


@pytest.mark.parametrize('shape, floats', [((1,), True), ((1, 1, 1, 1), True), ((1, 3, 1, 1), False)])
def test_skip_scalars_leaves_a_product_with_one_number_float(shape, floats):
    net = gq.attach(Net(lambda outer, F, x: F.relu(outer.inner(x)), inner=scaled(shape)), ops=('broadcast_mul', 'relu'),
                    skip_scalars=True)
    assert reads(net, 'product')[0] == ('data' if floats else 'Q(data)')


def test_without_skip_scalars_such_a_product_is_quantized():
    assert reads(gq.attach(scaled((1,)), ops=('broadcast_mul',)), 'product')[0] == 'Q(data)'


def test_skip_scalars_leaves_operators_with_a_number_float():
    net = gq.attach(Net(lambda net, F, x: F.relu(x * 3)), ops=('_mul_scalar', 'relu'), skip_scalars=True)
    assert settings(net) == {'_mulscalar0': 'lsq 4s'}


def product_with_mean():
    return Net(lambda net, F, x: F.relu(F.broadcast_mul(x, F.mean(x, axis=(1, 2, 3), keepdims=True), name='product')))


@pytest.mark.parametrize('count, floats', [(1, True), (2, False)])
def test_shapes_tell_skip_scalars_which_tensors_have_one_element(count, floats):
    net = gq.attach(product_with_mean(), ops=('broadcast_mul', 'relu'), skip_scalars=True,
                    shapes={'data': (count, 3, 8, 8)})
    assert ('product' in settings(net), 'data' in settings(net)) == (True, not floats)


def test_without_shapes_skip_scalars_keeps_what_may_have_more_elements():
    net = gq.attach(product_with_mean(), ops=('broadcast_mul', 'relu'), skip_scalars=True)
    assert reads(net, 'product')[0] == 'Q(data)'


RANGED = ['int8', 'pact', 'lsq', 'gdrq', 'qil', 'affine', 'fqn', 'lsqplus']
# A range is the float32 scale times the largest code.
FLOAT32 = 1e-6


@pytest.mark.parametrize('method', RANGED)
def test_a_table_sets_ranges_exactly(net, method):
    attached = gq.attach(net, activation=method, table={'residual0_relu0': 2.5})
    assert quantizer_of(attached, '4.second').affine_bounds() == pytest.approx((0, 2.5), rel=FLOAT32)


@pytest.mark.parametrize('name', ['residual0_conv1_fwd', 'residual0_conv1_fwd.output_quantizer'])
@pytest.mark.parametrize('entry', [3.5, (-3.5, 3.5), [-1, 3.5]], ids=str)
def test_a_table_names_tensors_or_quantizers_and_gives_a_magnitude_or_a_range(net, name, entry):
    attached = gq.attach(net, activation='int8', table={name: entry})
    assert quantizer_of(attached, 'residual0__plus0').value('amax')[0] == 3.5


def test_a_table_may_be_a_file(net, tmp_path):
    (tmp_path / 'table.json').write_text(json.dumps({'pool0_fwd': 1.25, 'residual0_conv1_fwd': [-3, 2]}))
    attached = gq.attach(net, activation='int8', table=str(tmp_path / 'table.json'))
    assert quantizer_of(attached, '4.first').value('amax')[0] == 1.25


def test_calibrating_what_a_table_leaves_open_makes_a_net_ready(net):
    attached = gq.attach(net, table={'relu0_fwd': 2.0})
    gq.calibrate(attached, [images()], table={'relu0_fwd': 2.0})
    assert all(row.calibrated == 'yes' for row in gq.summary(attached).rows)
    assert quantizer_of(attached, 'pool0_fwd').affine_bounds() == pytest.approx((0, 2), rel=FLOAT32)


@pytest.mark.parametrize('how', ['attach', 'calibrate', 'file'])
def test_what_calibrate_returns_is_a_table(net, tmp_path, how):
    first = gq.attach(net, method='int8')
    table = gq.calibrate(first, [images()])
    assert len(table) == 10
    path = tmp_path / 'table.json'
    path.write_text(json.dumps(table))
    given = {'attach': {'table': table}, 'file': {'table': str(path)}, 'calibrate': {}}[how]
    second = gq.attach(net, method='int8', **given)
    if how == 'calibrate':
        gq.calibrate(second, [9 * images()], table=table)
    for name, quantizer in quantizers(second, 'activation').items():
        assert quantizer.affine_bounds() == pytest.approx(table[name], rel=FLOAT32), name


def statistics(net):
    return [parameter.data().asnumpy() for parameter in net.collect_params('.*running_.*').values()]


def moved(before, after):
    return [not np.array_equal(old, new) for old, new in zip(before, after, strict=True)]


@pytest.mark.parametrize('how, frozen', [('no', False), ('attach', True), ('switch', True), ('switch back', False)])
@hybridized_or_not
def test_frozen_statistics_of_batchnorm_stay_in_training(net, how, frozen, hybridized):
    attached = calibrated(net, freeze_batchnorm=how == 'attach')
    attached.hybridize(hybridized)
    if how.startswith('switch'):
        train(gq.freeze_batchnorm(attached))
    if how == 'switch back':
        gq.freeze_batchnorm(attached, False)
    before = statistics(attached)
    train(attached)
    assert moved(before, statistics(attached)) == [not frozen] * 6


# ---------------------------------------------------------------- the float net


class Snapshot:
    """What a float net is, to compare with later."""

    def __init__(self, net):
        self.net, self.before, self.output = net, self.now(net), net(images()).asnumpy()

    @staticmethod
    def now(net):
        return [(path, block, type(block), sorted(block._children)) for path, block in
                gq.layers.named_blocks(net)], list(net.collect_params().items())

    def check(self):
        assert self.now(self.net) == self.before
        np.testing.assert_array_equal(self.net(images()).asnumpy(), self.output)


@hybridized_or_not
def test_the_float_net_does_not_change(net, hybridized):
    net.hybridize(hybridized)
    before = Snapshot(net)
    attached = gq.attach(net, target='tensorrt', freeze_batchnorm=True)
    gq.calibrate(attached, [images()])
    attached(images())
    before.check()


@hybridized_or_not
def test_switched_off_the_net_gives_the_outputs_of_the_float_net_bit_for_bit(net, hybridized):
    attached = gq.set_mode(calibrated(net), 'off')
    for each in (net, attached):
        each.hybridize(hybridized)
    same(attached(images(1)), net(images(1)))


def test_the_parameters_are_those_of_the_float_net_under_the_same_names(net):
    attached = gq.attach(net)
    mine, structural = attached.collect_params(), attached._collect_params_with_prefix()
    assert all(mine[name] is parameter for name, parameter in net.collect_params().items())
    assert all(structural[path] is parameter for path, parameter in net._collect_params_with_prefix().items())


def test_every_other_parameter_belongs_to_a_quantizer(net):
    new = set(gq.attach(net).collect_params()) - set(net.collect_params())
    assert new and all('_quantizer_' in name for name in new)


@hybridized_or_not
def test_training_the_attached_net_trains_the_float_net(net, hybridized):
    net.hybridize(hybridized, **STATIC)
    before = net(images()).asnumpy()
    attached = calibrated(net)
    train(attached)
    assert not np.array_equal(net(images()).asnumpy(), before)
    same(gq.set_mode(attached, 'off')(images()), net(images()))


def test_a_net_can_be_attached_twice_with_different_settings(net):
    first, second = calibrated(net, bits=2), calibrated(net, bits=8, target='onednn')
    expected = first(images()).asnumpy()
    assert not np.array_equal(second(images()).asnumpy(), expected)
    np.testing.assert_array_equal(first(images()).asnumpy(), expected)


def test_what_only_the_float_net_has_is_left_out():
    net = ready(Net(lambda net, F, x: net.dense(x), dense=nn.Dense(3), auxiliary=nn.Dense(3)), images())
    assert sorted(path for path in gq.attach(net)._reg_params) == ['dense.bias', 'dense.weight']


@pytest.mark.parametrize('write', [lambda net, path: net.save_parameters(path),
                                   lambda net, path: net.collect_params().save(path)], ids=['paths', 'full names'])
def test_a_float_checkpoint_loads_into_the_attached_net(net, tmp_path, write):
    write(net, str(tmp_path / 'float.params'))
    expected = net(images()).asnumpy()
    other = small()
    attached = gq.attach(other)
    attached.load_parameters(str(tmp_path / 'float.params'), allow_missing=True)
    np.testing.assert_array_equal(other(images()).asnumpy(), expected)


# ---------------------------------------------------------------- files and copies


def state(net):
    return {name: parameter._reduce().asnumpy() for name, parameter in net._collect_params_with_prefix().items()}


def assert_same_state(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name], value, err_msg=name)


@pytest.fixture
def trained(net):
    """An attached net whose every state has moved."""
    return train(calibrated(net, method='lsq', rules=[gq.Rule('5', activation='int8')]), 2)


SAVED = {'rules': [gq.Rule('5', activation='int8')]}


@pytest.mark.filterwarnings('ignore:Cannot decide type')        # Gluon says so of any input
@pytest.mark.parametrize('target', [None, 'onnxruntime'])
def test_export_writes_a_symbol_that_gives_the_outputs_of_the_net(net, tmp_path, target):
    attached = calibrated(net, target=target)
    attached.hybridize()
    expected = attached(images()).asnumpy()
    attached.export(str(tmp_path / 'quantized'))
    block = gluon.SymbolBlock.imports(str(tmp_path / 'quantized-symbol.json'), ['data'],
                                      str(tmp_path / 'quantized-0000.params'))
    np.testing.assert_array_equal(block(images()).asnumpy(), expected)


def test_parameters_saved_by_gluon_load_into_a_net_that_is_attached_alike(trained, tmp_path):
    trained.save_parameters(str(tmp_path / 'quantized.params'))
    other = gq.attach(small(), **SAVED)
    other.load_parameters(str(tmp_path / 'quantized.params'))
    assert_same_state(state(other), state(trained))
    same(other(images()), trained(images()))


def unnamed():
    """As in most tutorials, without ``name_scope``: Gluon counts the layers of a process."""
    net = nn.HybridSequential()
    net.add(nn.Conv2D(4, 3), nn.Activation('relu'), nn.Dense(3))
    return ready(net, images())


def test_parameters_saved_by_gluon_load_into_a_net_whose_layers_are_numbered_on(seed, tmp_path):
    net, other = calibrated(unnamed()), gq.attach(unnamed())
    net.save_parameters(str(tmp_path / 'quantized.params'))
    other.load_parameters(str(tmp_path / 'quantized.params'))
    same(other(images()), net(images()))


def test_a_table_fits_a_net_whose_layers_are_numbered_on(seed):
    first, second = gq.attach(unnamed(), method='int8'), gq.attach(unnamed(), method='int8')
    gq.calibrate(second, [2 * images()], table=gq.calibrate(first, [images()]))
    assert [quantizer.affine_bounds() for quantizer in quantizers(first, 'activation').values()] == [
        quantizer.affine_bounds() for quantizer in quantizers(second, 'activation').values()]


NETS = {'none': lambda: None, 'float': small, 'uninitialized': lambda: small(ran=False),
        'attached': lambda: gq.attach(small(), **SAVED)}


@pytest.mark.parametrize('kind', NETS)
def test_a_saved_net_is_loaded_again(trained, tmp_path, kind):
    gq.save(trained, str(tmp_path / 'net.npz'))
    loaded = gq.load(str(tmp_path / 'net.npz'), NETS[kind]())
    assert_same_state(state(loaded), state(trained))
    same(loaded(images(5)), trained(images(5)))


@pytest.mark.parametrize('kind', ['none', 'float', 'attached'])
def test_a_loaded_net_trains_on_as_the_saved_one(trained, tmp_path, kind):
    gq.save(trained, str(tmp_path / 'net.npz'))
    loaded = gq.load(str(tmp_path / 'net.npz'), NETS[kind]())
    for each in (trained, loaded):
        each.hybridize(**STATIC)
        train(each, 2)
    assert_same_state(state(loaded), state(trained))


def test_loading_with_a_float_net_shares_its_parameters(trained, tmp_path):
    gq.save(trained, str(tmp_path / 'net.npz'))
    net = small()
    loaded = gq.load(str(tmp_path / 'net.npz'), net)
    assert loaded._reg_params['4.first.weight'] is net[4].first.weight
    np.testing.assert_array_equal(net[6].weight.data().asnumpy(), trained._reg_params['6.weight'].data().asnumpy())


def test_loading_into_an_attached_net_changes_that_net(trained, tmp_path):
    gq.save(trained, str(tmp_path / 'net.npz'))
    net = gq.attach(small(), **SAVED)
    assert gq.load(str(tmp_path / 'net.npz'), net) is net


def test_loading_into_a_net_whose_layers_are_numbered_on_works(seed, tmp_path):
    net = calibrated(unnamed())
    gq.save(net, str(tmp_path / 'net.npz'))
    same(gq.load(str(tmp_path / 'net.npz'), gq.attach(unnamed()))(images()), net(images()))


def nested():
    net = Net(lambda net, F, a, b: [net.dense(a), (F.relu(b), net.dense(b))], dense=nn.Dense(4))
    return ready(net, nd.ones((1, 3)), nd.ones((1, 3)))


def test_a_net_loaded_alone_returns_its_outputs_in_their_form(tmp_path):
    attached = gq.attach(nested(), inputs=('a', 'b'))
    gq.calibrate(attached, [nd.ones((1, 3))], forward=lambda net, x: net(x, -x))
    gq.save(attached, str(tmp_path / 'net.npz'))
    loaded = gq.load(str(tmp_path / 'net.npz'))
    assert form(loaded(nd.ones((1, 3)), nd.ones((1, 3)))) == [(1, 4), [(1, 3), (1, 4)]]


def test_a_net_loaded_alone_keeps_the_rates_of_its_parameters(net, tmp_path):
    net.collect_params('.*bias').setattr('lr_mult', 2.0)
    gq.save(calibrated(net), str(tmp_path / 'net.npz'))
    assert gq.load(str(tmp_path / 'net.npz'))._reg_params['6.bias'].lr_mult == 2.0


def test_frozen_batchnorm_is_saved(net, tmp_path):
    gq.save(calibrated(net, freeze_batchnorm=True), str(tmp_path / 'net.npz'))
    loaded = gq.load(str(tmp_path / 'net.npz'), gq.attach(small()))
    before = statistics(loaded)
    train(loaded)
    assert not any(moved(before, statistics(loaded)))


def test_a_constant_is_saved(tmp_path):
    net = ready(WithParameter(lambda F, x, scale: F.broadcast_mul(x, scale), (1, 3, 1, 1), constant=True), images())
    attached = gq.attach(net, ops=('broadcast_mul',))
    gq.calibrate(attached, [images()])
    gq.save(attached, str(tmp_path / 'net.npz'))
    loaded = gq.load(str(tmp_path / 'net.npz'))
    same(loaded(images()), attached(images()))


def wider():
    net = nn.HybridSequential(prefix='net_')
    with net.name_scope():
        net.add(*list(small(ran=False))[:6], nn.Dense(5))
    return ready(net, images())


OTHERS = {
    'other bits': (lambda: gq.attach(small(), bits=3), 'saved from another graph, or with other quantizers'),
    'other architecture': (lambda: ready(nn.Dense(3), images()),
                           r"Parameter '(0\.)?weight' of the (graph|net) is missing"),
    'other sizes': (wider, r"Parameter '6.weight' has shape \(3, 96\) in the file, but \(5, 96\) in the net"),
    'converted': (lambda: gq.convert(small()), 'holds a graph, but the net is converted')}


@pytest.mark.parametrize('make, message', OTHERS.values(), ids=OTHERS)
def test_loading_into_another_net_is_refused_and_changes_nothing(trained, tmp_path, make, message):
    gq.save(trained, str(tmp_path / 'net.npz'))
    net = make()
    before = state(net)
    with pytest.raises(ValueError, match=message):
        gq.load(str(tmp_path / 'net.npz'), net)
    assert_same_state(state(net), before)


def chain(depth):
    net = nn.HybridSequential(prefix='net_')
    with net.name_scope():
        net.add(*(nn.Dense(3) for _ in range(depth)))
    return ready(net, nd.ones((1, 3)))


def test_loading_into_a_net_that_goes_on_behind_the_saved_one_is_refused(tmp_path):
    net = gq.attach(chain(2))
    gq.calibrate(net, [nd.ones((1, 3))])
    gq.save(net, str(tmp_path / 'net.npz'))
    with pytest.raises(ValueError, match="'2.weight'"):
        gq.load(str(tmp_path / 'net.npz'), chain(3))


COPIES = {'deepcopy': copy.deepcopy, 'pickle': lambda net: pickle.loads(pickle.dumps(net))}
copied = pytest.mark.parametrize('make', COPIES.values(), ids=COPIES)


@copied
@hybridized_or_not
def test_a_copy_gives_the_same_outputs(trained, make, hybridized):
    trained.hybridize(hybridized)
    same(make(trained)(images(5)), trained(images(5)))


@copied
def test_a_copy_trains_as_the_original(trained, make):
    other = make(trained)
    assert_same_state(state(train(other, 2)), state(train(trained, 2)))


@copied
def test_a_copy_shares_no_parameters(trained, make):
    expected = state(trained)
    train(make(trained))
    assert_same_state(state(trained), expected)


@copied
def test_a_copy_keeps_switches_and_frozen_ranges(trained, make):
    gq.set_mode(gq.freeze(trained), 'observe')
    other = make(trained)
    ranges = {path: quantizer.affine_bounds() for path, quantizer in quantizers(other, 'activation').items()}
    train(other)
    assert {quantizer.value('mode')[0] for quantizer in quantizers(other).values()} == {1}
    assert ranges == {path: quantizer.affine_bounds() for path, quantizer in quantizers(other, 'activation').items()}


@copied
def test_a_copy_of_a_net_with_another_type_has_that_type(net, make):
    attached = calibrated(net)
    attached.cast('float64')
    x = images().astype('float64')
    same(make(attached)(x), attached(x))


# ---------------------------------------------------------------- a net like any other


@pytest.mark.parametrize('flags', [{}, {'static_alloc': True}, STATIC], ids=['plain', 'static memory', 'static'])
@pytest.mark.parametrize('target', [None, 'onnxruntime', 'tensorrt'])
def test_hybridized_it_gives_the_outputs_of_the_imperative_net(net, flags, target):
    attached = calibrated(net, target=target)
    expected = attached(images(1)).asnumpy()
    attached.hybridize(**flags)
    for _ in range(2):
        out = attached(images(1)).asnumpy()
        # A convolution may add up in another order for an input in another layout.
        np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize('in_units', [3, 0], ids=['known sizes', 'unknown sizes'])
def test_inside_another_hybridized_block_it_trains(net, in_units):
    outer = nn.HybridSequential()
    outer.add(calibrated(net), nn.Dense(2, in_units=in_units))
    outer[1].initialize()
    outer.hybridize()
    before = net[0].weight.data().asnumpy()
    train(outer)
    assert not np.array_equal(net[0].weight.data().asnumpy(), before)


def test_two_attached_nets_train_under_one_trainer(seed):
    first, second = calibrated(small(prefix='first_')), calibrated(small(prefix='second_'))
    parameters = first.collect_params()
    parameters.update(second.collect_params())
    assert len(list(parameters)) == len(list(first.collect_params())) + len(list(second.collect_params()))


def test_two_attached_nets_stand_in_one_net(seed):
    net = nn.HybridSequential()
    net.add(calibrated(small(prefix='first_')), nn.Dense(3 * 8 * 8, in_units=3, prefix='between_'),
            nn.HybridLambda(lambda F, x: F.reshape(x, shape=(-1, 3, 8, 8)), prefix='shape_'),
            calibrated(small(prefix='second_')))
    net[1].initialize()
    net.hybridize()
    assert train(net)(images()).shape == (2, 3)


def test_names_that_differ_in_a_dot_and_an_underscore_only_are_different_names():
    x = mx.sym.relu(mx.sym.relu(mx.sym.var('data'), name='layer.0'), name='layer_0')
    net = gq.attach(mx.sym.relu(x), ops='relu')
    assert list(settings(net)) == ['data', 'layer.0', 'layer_0'] and len(list(net.collect_params())) == 3 * len(
        list(quantizer_of(net, 'layer.0').params))


def test_cast_to_half_precision_leaves_batchnorm_in_float32_as_gluon_does(net):
    attached = calibrated(net)
    attached.cast('float16')
    assert np.dtype(net[1].gamma.dtype) == np.float32 and np.dtype(net[0].weight.dtype) == np.float16


@hybridized_or_not
def test_a_trainer_moves_learned_ranges(net, hybridized):
    attached = calibrated(net, activation='lsq')
    attached.hybridize(hybridized)
    before = attached.quantizer(node(attached, '4.second').inputs[0]).value('scale')
    train(attached, 2)
    assert quantizer_of(attached, '4.second').value('scale') != before


def test_it_trains_on_two_devices(seed):
    net = small(ran=False)
    devices = [mx.cpu(0), mx.cpu(1)]
    net.initialize(init.Xavier(), ctx=devices)
    net(images())
    attached = calibrated(net)
    trainer = gluon.Trainer(attached.collect_params(), 'sgd', {'learning_rate': 0.1})
    with autograd.record():
        loss = [(attached(x) ** 2).mean() for x in gluon.utils.split_and_load(images(count=4), devices)]
    autograd.backward(loss)
    trainer.step(4)
    scales = quantizer_of(attached, '4.second').scale.list_data()
    assert [scale.context for scale in scales] == devices
    np.testing.assert_array_equal(scales[0].asnumpy(), scales[1].asnumpy())


@pytest.mark.parametrize('hybridized', [False, True])
def test_training_before_calibration_is_refused_with_the_tensor(net, hybridized):
    attached = gq.attach(net)
    attached.hybridize(hybridized)
    with pytest.raises(RuntimeError, match=r'relu0_fwd.output_quantizer \(LSQActivation\) has no range yet'):
        train_step(attached, images())


def test_inference_before_calibration_warns_and_passes_tensors_unquantized(net):
    attached = gq.attach(net, ops=('Pooling',))
    with pytest.warns(UserWarning, match='relu0_fwd.output_quantizer .* is not calibrated'):
        out = attached(images())
    same(out, net(images()))


def ranges_of(net):
    return {path: quantizer.affine_bounds() for path, quantizer in quantizers(net, 'activation').items()}


@hybridized_or_not
def test_frozen_ranges_stay_and_unfrozen_ones_move(net, hybridized):
    attached = gq.freeze(calibrated(net))
    attached.hybridize(hybridized)
    before = ranges_of(attached)
    assert ranges_of(train(attached)) == before
    assert ranges_of(train(gq.unfreeze(attached))) != before


@hybridized_or_not
def test_observing_gives_float_outputs_and_moves_averages(net, hybridized):
    attached = gq.set_mode(calibrated(net, method='int8'), 'observe')
    attached.hybridize(hybridized)
    before = ranges_of(attached)
    same(attached(images()), net(images()))
    assert ranges_of(train(attached, size=5)) != before


def test_the_summary_has_a_row_for_each_operator_that_reads_quantized_tensors(net):
    rows = {row.name: row for row in gq.summary(calibrated(net)).rows}
    assert list(rows) == ['0', 'pool0_fwd', '4.first', '4.second', '4.shortcut', 'residual0__plus0', '5.first',
                          '5.second', 'residual1__plus0', '6']
    assert (rows['4.first'].input, rows['4.first'].weight, rows['4.first'].shape) == ('lsq 4u', 'lsq 4s', (6, 4, 3, 3))
    assert (rows['residual1__plus0'].input, rows['residual1__plus0'].weight) == ('lsq 4s, lsq 4u', '')


def test_the_summary_tells_what_is_calibrated(net):
    rows = gq.summary(gq.attach(net, table={'pool0_fwd': 1.0}, weight='int8')).rows
    assert [row.name for row in rows if row.calibrated == 'yes'] == ['4.first', '4.shortcut']


# ---------------------------------------------------------------- refusals: nothing has changed


REFUSED = [
    ({'bits': 0}, ValueError, 'bits=0 is not a bit width: pass an integer from 1 to 16'),
    ({'bits': 17}, ValueError, 'bits=17 is not a bit width'),
    ({'bits': 2.5}, ValueError, r'bits=2\.5 is not a bit width'),
    ({'bits': True}, ValueError, 'bits=True is not a bit width'),
    ({'weight_bits': 0}, ValueError, 'weight_bits=0 is not a bit width'),
    ({'activation_bits': '4'}, ValueError, "activation_bits='4' is not a bit width"),
    ({'first_last_bits': 99}, ValueError, 'first_last_bits=99 is not a bit width'),
    ({'bits': 1}, ValueError, r'4.first.weight_quantizer: bits=1: .* supports 2 to 16 bits.*by a rule, .*exclude'),
    ({'rules': [{'pattern': '4.first', 'weight_bits': 2.5}]}, ValueError, r'4.first.weight_quantizer: bits=2\.5'),
    ({'method': 'qil', 'signed': True}, ValueError, 'relu0_fwd.output_quantizer: signed=True: '),
    ({'method': 'lqs'}, ValueError, "unknown method 'lqs'. Did you mean 'lsq'.*dorefa, fqn, gdrq, int8"),
    ({'weight': 'dorefas'}, ValueError, "unknown weight quantizer 'dorefas'. Did you mean 'dorefa'"),
    ({'activation': 'sawb'}, ValueError, "'sawb' quantizes weights only"),
    ({'weight_options': {'ktime': 2}}, TypeError, r'4.first.weight_quantizer: .*ktime'),
    ({'method': 'gdrq', 'activation_options': {'lam': 7}}, ValueError, 'relu0_fwd.output_quantizer: lam=7'),
    ({'ops': ('elemwise_ad',)}, ValueError, "ops: 'elemwise_ad' is no operator of MXNet.* Did you mean 'elemwise_add'"),
    ({'skip': {'Convolutio': 1}}, ValueError, "skip: 'Convolutio' is no operator .* Did you mean 'Convolution'"),
    ({'skip': {'Deconvolution': 1}}, ValueError, "skip names 'Deconvolution', .*Did you mean 'Convolution'"),
    ({'only': {'Concat': 1}}, ValueError, "only names 'Concat', which the graph does not have"),
    ({'skip': {'Convolution': -1}}, ValueError, r"skip={'Convolution': -1}: pass a number of nodes >= 0"),
    ({'only': {'Convolution': True}}, ValueError, r"only={'Convolution': True}: pass a number of nodes"),
    ({'exclude': ['4.frst']}, ValueError, r"pattern '4.frst' matches no node. Did you mean '4.first'.*Nodes: "),
    ({'exclude': 'feature*'}, ValueError, r"pattern 'feature\*' matches no node"),
    ({'rules': [{'pattern': '9', 'bits': 3}]}, ValueError, "pattern '9' matches no node"),
    ({'rules': [{'patern': '4'}]}, TypeError, 'patern'),
    ({'target': 'tensort'}, ValueError, "unknown target 'tensort'. Did you mean 'tensorrt'.* onednn, onnxruntime, "),
    ({'table': {'rlu0_fwd': 1.0}}, ValueError, "table names 'rlu0_fwd', .*Did you mean 'relu0_fwd'"),
    ({'table': {'relu0_fwd': -1.0}}, ValueError, "table gives 'relu0_fwd' the range -1.0: pass a positive amax"),
    ({'table': {'relu0_fwd': 'wide'}}, ValueError, "table gives 'relu0_fwd' the range 'wide'"),
    ({'exclude': '*'}, ValueError, 'nothing is left to quantize among the 18 operators'),
    ({'ops': ()}, ValueError, 'nothing is left to quantize among the 18 operators'),
    ({'weight': 'none', 'activation': 'none', 'first_last_bits': None}, ValueError, 'nothing is left to quantize'),
    ({'inputs': ('a', 'b')}, ValueError, r'HybridSequential cannot be traced with the inputs a, b .*inputs=\(\.\.\.\)'),
    ({'shapes': {'dat': (1, 3, 8, 8)}, 'skip_scalars': True}, ValueError, "'dat'.* Did you mean 'data'"),
]


@pytest.mark.parametrize('options, error, message', REFUSED, ids=[str(options) for options, _, _ in REFUSED])
def test_a_refused_call_says_why_and_leaves_the_net(net, options, error, message):
    before = Snapshot(net)
    with pytest.raises(error, match=message):
        gq.attach(net, **options)
    before.check()


def test_after_a_refusal_the_net_attaches_as_if_nothing_had_been(net):
    with pytest.raises(ValueError, match='bits=1'):
        gq.attach(net, bits=1)
    after, fresh = (gq.attach(each)._collect_params_with_prefix() for each in (net, small()))
    assert list(after) == list(fresh)


@pytest.mark.parametrize('net', [3, None, [nn.Dense(2)], nd.ones((2,))], ids=['int', 'None', 'list', 'NDArray'])
def test_something_that_is_no_net_is_refused(net):
    with pytest.raises(TypeError, match=f'net is a {type(net).__name__}: pass a HybridBlock, a Symbol, or the path'):
        gq.attach(net)


def test_a_plain_block_is_refused():
    net = nn.Sequential()
    net.add(nn.Dense(2))
    with pytest.raises(TypeError, match='Sequential is no HybridBlock, so there is no graph. Use gq.convert'):
        gq.attach(net)


def test_a_converted_net_is_refused(net):
    with pytest.raises(RuntimeError, match="the net is already converted: '0' is quantized. Attach to a fresh"):
        gq.attach(gq.convert(net))


def test_attaching_twice_is_refused(net):
    with pytest.raises(RuntimeError, match='quantizers are attached already: attach to the float net instead'):
        gq.attach(gq.attach(net))


@pytest.mark.parametrize('again', [gq.attach, gq.convert])
def test_a_net_with_an_attached_net_in_it_is_refused(net, again):
    outer = nn.HybridSequential()
    outer.add(calibrated(net), nn.Dense(2))
    outer[1].initialize()
    with pytest.raises(RuntimeError, match='attached already'):
        again(outer)


def test_converting_an_attached_net_is_refused(net):
    with pytest.raises(RuntimeError, match='attached already'):
        gq.convert(gq.attach(net))


def test_a_folded_net_is_refused(net):
    folded = gq.fold(as_graph(net), 'batch')
    with pytest.raises(RuntimeError, match='BatchNorm is folded already: attach first, then fold'):
        gq.attach(folded)


class UsesShape(nn.HybridBlock):
    def hybrid_forward(self, F, x):
        return x.reshape((x.shape[0], -1))


def test_a_net_that_cannot_be_traced_is_refused_with_its_own_error():
    with pytest.raises(ValueError, match=r'UsesShape cannot be traced with the inputs data \(.*shape.*use gq.convert'):
        gq.attach(UsesShape())


def test_another_layout_is_refused_with_the_node():
    conv = nn.Conv2D(4, 3, layout='NHWC', in_channels=3, prefix='net_conv_')
    with pytest.raises(ValueError, match=r"node 'net_conv_fwd' \(Convolution\) has layout NHWC; only .*NCW, NCHW, NCDHW"
                                         r".*exclude=\['net_conv_fwd'\]"):
        gq.attach(Net(lambda net, F, x: net.conv(x), conv=conv))


def test_another_layout_may_stay_float():
    net = Net(lambda net, F, x: net.dense(net.conv(x)), conv=nn.Conv2D(4, 3, layout='NHWC', in_channels=3),
              dense=nn.Dense(3))
    assert list(settings(gq.attach(net, exclude='conv'), 'weight')) == ['dense.weight']


def test_a_missing_parameter_is_named_with_its_node():
    given = {name.replace('conv0', 'conv_0'): value for name, value in preact_values().items()}
    with pytest.raises(ValueError, match=r"node 'conv0' \(Convolution\) reads 'conv0_weight', for which there is no "
                                         r"Parameter. Did you mean 'conv_0_weight'"):
        gq.attach(preact_symbol(), params=given)


def test_a_wrong_shape_is_named_with_its_node():
    given = {**preact_values(), 'stage2_unit1_conv1_weight': nd.ones((16, 8, 5, 5))}
    with pytest.raises(ValueError, match=r"node 'stage2_unit1_conv1' \(Convolution\) reads 'stage2_unit1_conv1_weight' "
                                         r'of shape \(16, 8, 5, 5\), but takes \(16, \?, 3, 3\)'):
        gq.attach(preact_symbol(), params=given)


def test_an_unknown_input_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="the graph has no input 'dat'. Did you mean 'data'"):
        gq.attach(preact_symbol(), params=preact_values(), inputs='dat')


def test_values_that_are_no_arrays_are_refused():
    with pytest.raises(TypeError, match=r"params\['conv0_weight'\] is a list, not an array"):
        gq.attach(preact_symbol(), params={**preact_values(), 'conv0_weight': [1, 2]})


def test_a_file_that_holds_no_parameters_is_named(exported):
    with pytest.raises(ValueError, match='float-symbol.json: not a file of parameters'):
        gq.attach(exported[0], params=exported[0])


def test_a_file_that_holds_no_symbol_is_named(tmp_path):
    (tmp_path / 'notes.txt').write_text('to do')
    with pytest.raises(ValueError, match='notes.txt: not the JSON of a symbol'):
        gq.attach(str(tmp_path / 'notes.txt'))


def test_a_broken_edge_in_a_file_is_named_with_its_node(exported, tmp_path):
    with open(exported[0], encoding='utf8') as file:
        content = json.load(file)
    broken = next(node for node in content['nodes'] if node['op'] == 'Pooling')
    broken['inputs'] = [[9999, 0, 0]]
    (tmp_path / 'broken-symbol.json').write_text(json.dumps(content))
    with pytest.raises(ValueError, match="broken-symbol.json: node 'net_pool0_fwd' reads node number 9999"):
        gq.attach(str(tmp_path / 'broken-symbol.json'), params=exported[1])
