"""`Target`: where each engine gets its quantizers."""
from collections import Counter

import numpy as np
import pytest
from gluoncv.model_zoo import get_model
from graph_nets import (
    Net,
    images,
    quantizer_of,
    reads,
    ready,
    same,
    settings,
    small,
    train_step,
)
from mxnet import autograd, gluon, init, nd
from mxnet.gluon import nn
from preact_resnet import STAGES, preact_resnet18

import gluonquant as gq
from gluonquant.graph import TARGETS, Target
from gluonquant.layers import quantizers
from gluonquant.symbol_graph import QUANTIZE

every_target = pytest.mark.parametrize('target', sorted(TARGETS))
SHORTCUT = ['onednn', 'openvino', 'tensorrt']       # these compute a sum together with a convolution
hybridized_or_not = pytest.mark.parametrize('hybridized', [False, True], ids=['imperative', 'hybridized'])


def conv(name, channels=4, kernel=1, **kwargs):
    return nn.Conv2D(channels, kernel, prefix=f'net_{name}_', **kwargs)


def dense(name='dense'):
    return nn.Dense(3, prefix=f'net_{name}_', use_bias=False)


def attached(net, *inputs, **options):
    """``net``, run once, attached, and calibrated on ``inputs``, default `images`."""
    made = gq.attach(ready(net, *(inputs or [images()])), **options)
    gq.calibrate(made, [inputs or [images()]], forward=lambda net, batch: net(*batch))
    return made


def calibrated(net, **options):
    made = gq.attach(net, **options)
    gq.calibrate(made, [images()])
    return made


# ---------------------------------------------------------------- what passes quantizers through

PASSING = {
    'max pooling': lambda F, x: F.Pooling(x, kernel=(2, 2), stride=(2, 2), pool_type='max', name='op'),
    'global max pooling': lambda F, x: F.Pooling(x, global_pool=True, kernel=(1, 1), pool_type='max', name='op'),
    'reshape': lambda F, x: F.reshape(x, shape=(0, -1), name='op'),
    'transpose': lambda F, x: F.transpose(x, axes=(0, 2, 3, 1), name='op'),
    'flatten': lambda F, x: F.Flatten(x, name='op'),
    'swapaxes': lambda F, x: F.swapaxes(x, dim1=1, dim2=2, name='op'),
    'expand_dims': lambda F, x: F.expand_dims(x, axis=1, name='op'),
    'slice': lambda F, x: F.slice_axis(x, axis=2, begin=1, end=5, name='op'),
    'split': lambda F, x: F.SliceChannel(x, num_outputs=3, axis=1, name='op')[0],
    'tile': lambda F, x: F.tile(x, reps=(1, 2, 1, 1), name='op'),
    'padding with zeros': lambda F, x: F.pad(x, mode='constant', constant_value=0, pad_width=(0,) * 4 + (1,) * 4,
                                             name='op'),
    'padding with the edge': lambda F, x: F.pad(x, mode='edge', pad_width=(0,) * 4 + (1,) * 4, name='op'),
    'nearest upsampling': lambda F, x: F.UpSampling(x, scale=2, sample_type='nearest', name='op'),
    'identity': lambda F, x: F.identity(x, name='op')}
COMPUTING = {
    'average pooling': lambda F, x: F.Pooling(x, kernel=(2, 2), pool_type='avg', name='op'),
    'global average pooling': lambda F, x: F.Pooling(x, global_pool=True, kernel=(1, 1), pool_type='avg', name='op'),
    'padding with ones': lambda F, x: F.pad(x, mode='constant', constant_value=1, pad_width=(0,) * 4 + (1,) * 4,
                                            name='op'),
    'sigmoid': lambda F, x: F.sigmoid(x, name='op')}


def two_readers(function, **options):
    """A layer reads a tensor; another one reads what ``function`` makes of it."""
    net = Net(lambda net, F, x: (lambda y: (net.first(y), net.second(function(F, y))))(F.relu(x, name='y')),
              first=dense('first'), second=dense('second'))
    return attached(net, **options)


@pytest.mark.parametrize('function', PASSING.values(), ids=PASSING)
def test_behind_an_operator_that_moves_values_no_second_quantizer_stands(function):
    net = two_readers(function, target='openvino')
    assert list(settings(net)) == ['y']
    assert (reads(net, 'op')[0], reads(net, 'second')[0]) == ('Q(y)', 'op')


@pytest.mark.parametrize('function', COMPUTING.values(), ids=COMPUTING)
def test_behind_an_operator_that_computes_values_a_second_quantizer_stands(function):
    net = two_readers(function, target='openvino')
    assert list(settings(net)) == ['y', 'op']
    assert (reads(net, 'op')[0], reads(net, 'second')[0]) == ('Q(y)', 'Q(op)')


@pytest.mark.parametrize('function', [PASSING['max pooling'], PASSING['reshape']])
def test_without_a_target_every_reader_has_the_quantizer_of_its_own_input(function):
    net = two_readers(function, ops=('FullyConnected',))
    assert (reads(net, 'op')[0], reads(net, 'second')[0]) == ('y', 'Q(op)')


@pytest.mark.parametrize('function', PASSING.values(), ids=PASSING)
@hybridized_or_not
def test_the_output_is_the_same_as_with_the_quantizer_in_front(function, hybridized):
    net = attached(Net(lambda net, F, x: net.dense(function(F, F.relu(x))), dense=dense()), target='onednn',
                   weight='none', rules=[gq.Rule('dense', activation='lsq', bits=3, weight='none')])
    assert reads(net, 'dense')[0] == 'Q(op)' and list(settings(net)) == ['op']
    moved = function(nd, quantizer_of(net, 'dense')(nd.relu(images())))
    net.hybridize(hybridized)
    same(net(images()), nd.FullyConnected(moved, net._reg_params['dense.weight'].data(), num_hidden=3, no_bias=True))


def test_a_max_pooling_asks_for_the_quantizer_behind_it():
    net = Net(lambda net, F, x: F.sigmoid(F.Pooling(x, kernel=(2, 2), pool_type='max', name='pool'), name='end'))
    made = gq.attach(net, target='openvino')
    assert (reads(made, 'pool'), reads(made, 'end')) == (['data'], ['Q(pool)'])


@every_target
def test_an_average_pooling_reads_a_quantized_tensor_and_a_layer_behind_it_another_one(target):
    net = Net(lambda net, F, x: net.dense(F.Pooling(F.relu(x, name='y'), kernel=(2, 2), pool_type='avg', name='pool')),
              dense=dense())
    made = attached(net, target=target)
    assert (reads(made, 'pool')[0], reads(made, 'dense')[0]) == ('Q(y)', 'Q(pool)')


def test_the_widest_grid_wins_on_both_sides_of_an_operator_that_moves_values():
    for first, second in ((3, 6), (6, 3)):
        net = two_readers(PASSING['flatten'], target='openvino', first_last_bits=4,
                          rules=[gq.Rule('first', activation_bits=first), gq.Rule('second', activation_bits=second)])
        assert settings(net) == {'y': 'int8 6u'}


# ---------------------------------------------------------------- concatenation


class Branches(nn.HybridBlock):
    """relu(a(x)) and b(x) concatenated for a layer; more layers read the parts named in ``also``."""

    def __init__(self, also=''):
        super().__init__(prefix='net_')
        self.also = also
        self.a, self.b, self.last = conv('a'), conv('b'), dense('last')
        for part in also:
            setattr(self, f'reads_{part}', dense(f'reads_{part}'))

    def hybrid_forward(self, F, x):
        parts = {'a': F.relu(self.a(x), name='left'), 'b': self.b(x)}
        both = F.concat(parts['a'], parts['b'], dim=1, name='both')
        return [self.last(both), *(getattr(self, f'reads_{part}')(parts[part]) for part in self.also)]


@every_target
def test_what_is_only_concatenated_is_quantized_behind_the_concatenation(target):
    net = attached(Branches(), target=target)
    assert reads(net, 'both') == ['left', 'b'] and reads(net, 'last')[0] == 'Q(both)'


@every_target
@pytest.mark.parametrize('also, expected', [('a', ['Q(left)', 'b']), ('b', ['left', 'Q(b)'])])
def test_a_concatenated_tensor_that_is_read_elsewhere_shares_the_scale(target, also, expected):
    net = attached(Branches(also), target=target)
    assert reads(net, 'both') == expected and reads(net, 'last')[0] == 'Q(both)'
    assert quantizer_of(net, f'reads_{also}') is quantizer_of(net, 'last')


@every_target
def test_a_concatenation_of_quantized_tensors_needs_no_quantizer(target):
    net = attached(Branches('ab'), target=target)
    assert reads(net, 'both') == ['Q(left)', 'Q(b)'] and reads(net, 'last')[0] == 'both'
    assert quantizer_of(net, 'reads_a') is quantizer_of(net, 'reads_b')


def unequal(**options):
    """A concatenation of a small and a large tensor, both read by layers too."""
    def function(net, F, x):
        small, large = F.relu(x, name='small'), F.relu(10 * x, name='large')
        return net.a(small), net.b(large), net.last(F.concat(small, large, name='both'))
    x = nd.array([[0.25, 0.5]])
    net = ready(Net(function, a=dense('a'), b=dense('b'), last=dense('last')), x)
    return gq.attach(net, target='openvino', method='int8', first_last_bits=4, **options), x


@pytest.mark.parametrize('observer', [None, 'minmax', 'ema'])
def test_the_calibrated_scale_of_a_concatenation_covers_all_its_inputs(observer):
    net, x = unequal()
    gq.calibrate(net, [x], observer=observer)
    assert quantizer_of(net, 'a').value('amax') == 5


@pytest.mark.parametrize('name', ['small', 'large'])
def test_a_table_names_any_of_the_tensors_on_one_scale(name):
    net, _ = unequal(table={name: 2.0})
    assert quantizer_of(net, 'a').value('amax') == 2


def test_the_scale_of_a_concatenation_is_signed_if_one_input_is():
    assert settings(attached(Branches('ab'), target='openvino'))['left'][-1] == 's'


def test_without_a_target_concatenated_tensors_have_scales_of_their_own():
    net = attached(Branches('ab'))
    assert reads(net, 'both') == ['Q(left)', 'Q(b)'] and reads(net, 'last')[0] == 'Q(both)'
    assert quantizer_of(net, 'reads_a') is not quantizer_of(net, 'reads_b')


def test_concatenations_of_concatenations_share_one_scale():
    def function(net, F, x):
        a, b, c = F.relu(net.a(x)), F.relu(net.b(x)), F.relu(net.c(x))
        inner = F.concat(a, b, name='inner')
        return net.reads_c(c), net.reads_inner(inner), net.last(F.concat(inner, c, name='outer'))
    net = attached(Net(function, a=conv('a'), b=conv('b'), c=conv('c'), reads_c=conv('reads_c'),
                       reads_inner=conv('reads_inner'), last=dense('last')), target='openvino')
    assert reads(net, 'outer') == ['Q(inner)', 'Q(relu2)'] and reads(net, 'last')[0] == 'outer'
    assert quantizer_of(net, 'reads_c') is quantizer_of(net, 'reads_inner')


@hybridized_or_not
def test_a_shared_scale_trains_and_is_saved(tmp_path, hybridized):
    net = attached(Branches('ab'), target='openvino', rules=[gq.Rule('*', activation='lsq')])
    net.hybridize(hybridized)
    before = quantizer_of(net, 'reads_a').value('scale')
    trainer = gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': 0.01}, kvstore=None)
    train_step(net, images())
    trainer.step(1)
    assert quantizer_of(net, 'reads_a').value('scale') != before
    gq.save(net, str(tmp_path / 'net.npz'))
    same(gq.load(str(tmp_path / 'net.npz'))(images()), net(images()))


# ---------------------------------------------------------------- sums


def sum_of(left, right, **layers):
    """A net that adds ``left(net, F, y)`` to ``right(net, F, y)``, where y comes from a ReLU, for a layer."""
    def function(net, F, x):
        y = F.relu(net.stem(x), name='y')
        return net.last(F.relu(F.elemwise_add(left(net, F, y), right(net, F, y), name='sum')))
    return Net(function, stem=conv('stem'), last=dense('last'), **layers)


IDENTITY = {'left': lambda net, F, y: net.a(y), 'right': lambda net, F, y: y}
NORMED = {'left': lambda net, F, y: net.norm(net.a(y)), 'right': lambda net, F, y: y}


@pytest.mark.parametrize('target', SHORTCUT)
def test_a_convolution_is_added_in_float_and_the_shortcut_is_quantized(target):
    assert reads(attached(sum_of(**IDENTITY, a=conv('a')), target=target), 'sum') == ['a', 'Q(y)']


@pytest.mark.parametrize('target', SHORTCUT)
def test_the_order_of_the_summands_does_not_matter(target):
    net = sum_of(IDENTITY['right'], IDENTITY['left'], a=conv('a'))
    assert reads(attached(net, target=target), 'sum') == ['Q(y)', 'a']


@pytest.mark.parametrize('target', SHORTCUT)
def test_batchnorm_belongs_to_the_convolution_before_it(target):
    net = sum_of(**NORMED, a=conv('a'), norm=nn.BatchNorm(prefix='net_norm_'))
    assert reads(attached(net, target=target), 'sum') == ['norm_fwd', 'Q(y)']


@pytest.mark.parametrize('target', SHORTCUT)
def test_of_two_convolutions_that_are_added_one_is_quantized(target):
    net = sum_of(IDENTITY['left'], lambda net, F, y: net.b(y), a=conv('a'), b=conv('b'))
    assert sorted(reads(attached(net, target=target), 'sum')) in (['Q(a)', 'b'], ['Q(b)', 'a'])


@pytest.mark.parametrize('target', SHORTCUT)
def test_a_convolution_that_something_else_reads_is_added_quantized(target):
    def function(net, F, x):
        y, z = F.relu(x, name='y'), net.a(x)
        return net.last(F.elemwise_add(y, z, name='sum')), net.other(F.sigmoid(z))
    net = attached(Net(function, a=conv('a', 3), last=dense('last'), other=dense('other')), target=target)
    assert reads(net, 'sum') == ['Q(y)', 'Q(a)']


@every_target
def test_a_sum_without_a_convolution_reads_both_tensors_quantized(target):
    net = sum_of(lambda net, F, y: F.sigmoid(y, name='left'), lambda net, F, y: y)
    assert reads(attached(net, target=target), 'sum') == ['Q(left)', 'Q(y)']


def test_onnxruntime_adds_quantized_tensors():
    net = sum_of(**NORMED, a=conv('a'), norm=nn.BatchNorm(prefix='net_norm_'))
    assert reads(attached(net, target='onnxruntime'), 'sum') == ['Q(norm_fwd)', 'Q(y)']


def test_a_sum_of_several_tensors_reads_all_but_the_convolution_quantized():
    def function(net, F, x):
        y, z = F.relu(x, name='y'), F.sigmoid(x, name='z')
        return net.last(F.add_n(y, net.a(y), z, name='sum'))
    net = attached(Net(function, a=conv('a', 3), last=dense('last')), target='tensorrt')
    assert reads(net, 'sum') == ['Q(y)', 'a', 'Q(z)']


def test_the_rule_of_sums_is_for_broadcasting_ones_on_request_too():
    def function(net, F, x):
        y = F.relu(x, name='y')
        return net.last(F.broadcast_add(net.a(y), y, name='sum'))
    net = attached(Net(function, a=conv('a', 1), last=dense('last')), target='tensorrt',
                   ops=('Convolution', 'FullyConnected', 'broadcast_add'))
    assert reads(net, 'sum') == ['a', 'Q(y)']


# ---------------------------------------------------------------- signs


def test_tensorrt_has_signed_grids_only():
    assert {text[-1] for text in settings(calibrated(small(), target='tensorrt')).values()} == {'s'}


@pytest.mark.parametrize('target', ['onednn', 'onnxruntime', 'openvino'])
def test_other_engines_have_unsigned_grids_behind_relu(target):
    found = {name: text[-1] for name, text in settings(calibrated(small(), target=target)).items()}
    assert (found['data'], found['residual0_relu0'], found['pool0_fwd']) == ('s', 'u', 'u')


# ---------------------------------------------------------------- outputs


def returning(function, **options):
    return attached(Net(function, a=conv('a'), norm=nn.BatchNorm(prefix='net_norm_'), last=dense('last')), **options)


@every_target
def test_what_the_net_returns_is_float_even_where_a_layer_reads_it_quantized(target):
    net = returning(lambda net, F, x: (lambda y: [y, net.last(y)])(F.relu(net.a(x), name='y')), target=target)
    assert reads(net, 'last')[0] == 'Q(y)'
    assert [net.label(entry.node) for entry in net.graph.heads.inputs] == ['y', 'last']


@every_target
def test_an_output_of_the_net_that_only_passes_values_on_is_float(target):
    net = returning(lambda net, F, x: F.Flatten(F.relu(net.a(x)), name='end'), target=target)
    assert [net.label(entry.node) for entry in net.graph.heads.inputs] == ['end']
    assert 'end' not in settings(net)


def test_outputs_of_integer_operators_are_quantized_behind_batchnorm_and_relu():
    net = returning(lambda net, F, x: net.last(F.sigmoid(F.relu(net.norm(net.a(x)), name='y'), name='s')),
                    target='onnxruntime')
    assert (reads(net, 'norm_fwd')[0], reads(net, 'y'), reads(net, 's')) == ('a', ['norm_fwd'], ['Q(y)'])


def test_outputs_of_integer_operators_are_quantized_behind_what_moves_values():
    net = returning(lambda net, F, x: net.last(F.sigmoid(F.transpose(net.a(x), name='t'), name='s')),
                    target='onnxruntime')
    assert (reads(net, 't'), reads(net, 's')) == (['a'], ['Q(t)'])


def test_other_targets_leave_such_outputs_float():
    net = returning(lambda net, F, x: net.last(F.sigmoid(net.a(x), name='s')), target='openvino')
    assert reads(net, 's') == ['a']


def test_outputs_behind_which_no_integer_operator_comes_are_float():
    net = returning(lambda net, F, x: F.sigmoid(net.last(net.a(x)), name='s'), target='onnxruntime')
    assert reads(net, 's') == ['last']


def test_the_output_of_a_sum_is_quantized_before_a_batchnorm_that_no_engine_computes_with_it():
    net = returning(lambda net, F, x: net.last(net.norm(F.elemwise_add(F.relu(x), F.sigmoid(x), name='sum'))),
                    target='onnxruntime')
    assert reads(net, 'norm_fwd')[0] == 'Q(sum)'


# ---------------------------------------------------------------- targets of one's own


def test_a_target_of_ones_own_may_want_equal_scales_in_sums():
    net = attached(sum_of(**IDENTITY, a=conv('a')), target=Target('own', equal=('elemwise_add',)))
    assert reads(net, 'sum') == ['Q(a)', 'Q(y)']
    assert quantizer_of(net, 'sum', 0) is quantizer_of(net, 'sum', 1)
    assert quantizer_of(net, 'sum', 0).grid.signed


def test_a_target_that_does_not_ask_for_equal_scales_leaves_concatenated_tensors_their_own():
    net = attached(Branches('ab'), target=Target('own', equal=()))
    assert reads(net, 'both') == ['Q(left)', 'Q(b)'] and reads(net, 'last')[0] == 'Q(both)'
    assert quantizer_of(net, 'reads_a') is not quantizer_of(net, 'reads_b')


def test_a_target_of_ones_own_may_be_a_changed_one():
    net = attached(sum_of(**IDENTITY, a=conv('a')), target=Target('own', signed=True))
    assert reads(net, 'sum') == ['Q(a)', 'Q(y)'] and {text[-1] for text in settings(net).values()} == {'s'}


def test_a_target_refuses_an_unknown_rule_for_sums():
    with pytest.raises(ValueError, match="sums='first': pass 'both' or 'shortcut'"):
        Target('own', sums='first')


def test_an_unknown_target_is_refused_with_the_nearest_and_all_known_ones():
    with pytest.raises(ValueError, match="unknown target 'onxruntime'. Did you mean 'onnxruntime'. Known targets: "
                                         'onednn, onnxruntime, openvino, tensorrt'):
        gq.attach(small(), target='onxruntime')


# ---------------------------------------------------------------- all readers alike


def preact(**options):
    return gq.attach(preact_resnet18(filters=(8, 8, 16, 24, 32), small=True), **options)


def resnet(**options):
    net = get_model('resnet18_v1b', classes=4)
    net.initialize(init.Xavier())
    return gq.attach(net, **options)


def sliced(**options):
    def function(net, F, x):
        a, b, c = F.SliceChannel(x, num_outputs=3, axis=1, name='parts')
        return [net.last(F.concat(a, F.sigmoid(c)) + F.concat(b, b)), a]
    return attached(Net(function, last=dense('last')), **options)


NETS = {'small': lambda **options: calibrated(small(), **options), 'preact': preact, 'resnet': resnet,
        'branches': lambda **options: attached(Branches('ab'), **options), 'sliced': sliced}


def read_in_two_ways(net):
    """[(operator, tensor)]: who reads in float what another operator reads quantized."""
    quantized = {entry[:2] for node in net.graph.nodes() if node.op == QUANTIZE for entry in node.inputs}
    return [(net.label(node), net.label(entry.node)) for node in net.graph.nodes() if node.op != QUANTIZE
            for entry in node.inputs if entry[:2] in quantized]


@every_target
@pytest.mark.parametrize('name', NETS)
def test_whoever_reads_a_quantized_tensor_reads_it_quantized(target, name):
    net = NETS[name](target=target)
    assert quantizers(net, 'activation') and not read_in_two_ways(net)


def test_without_a_target_others_read_the_float_tensor():
    assert ('stage1_unit2_bn1', '_plus0') in read_in_two_ways(preact())


@every_target
def test_an_excluded_layer_reads_the_tensor_as_it_is_stored(target):
    net = calibrated(small(), target=target, exclude='4.first')
    assert reads(net, '4.first') == ['Q(pool0_fwd)', 'residual0_conv0_weight']


@every_target
@hybridized_or_not
def test_all_parameters_get_gradients(target, hybridized):
    net = calibrated(small(), target=target)
    net.hybridize(hybridized)
    train_step(net, images())
    learned = {name: parameter.grad().asnumpy() for name, parameter in net.collect_params().items()
               if parameter.grad_req != 'null'}
    assert len(learned) > 20
    assert not [name for name, gradient in learned.items() if not np.isfinite(gradient).all()]
    assert all(np.abs(gradient).max() > 0 for name, gradient in learned.items() if name.endswith('weight'))


# ---------------------------------------------------------------- whole nets: expected by hand


STAGE = range(1, STAGES + 1)
# Where both summands come from convolutions, those of the first units, either may be the one that is stored.
PREACT = {'bn_data', 'pool0', *(f'stage{stage}_unit{unit}_relu{number}' for stage in STAGE for unit in (1, 2)
                                for number in (1, 2)), '_plus0', '_plus2', '_plus4', '_plus6', 'relu1', 'flatten'}
PAIRS = [{f'stage{stage}_unit1_conv2', f'stage{stage}_unit1_sc'} for stage in STAGE]


@pytest.mark.parametrize('target', SHORTCUT)
def test_placement_in_the_pre_activation_resnet_for_engines_that_fuse_sums(target):
    found = set(settings(preact(target=target)))
    assert [len(found & pair) for pair in PAIRS] == [1, 1, 1, 1]
    assert found - set.union(*PAIRS) == PREACT


def test_placement_in_the_pre_activation_resnet_for_onnxruntime():
    summands = set.union(*PAIRS) | {f'stage{stage}_unit2_conv2' for stage in STAGE}
    sums = {f'_plus{number}' for number in range(8)}        # BatchNorm, in float, reads them
    assert set(settings(preact(target='onnxruntime'))) == PREACT | summands | sums


@pytest.mark.parametrize('name, expected', [
    ('stage1_unit1_bn1', 'Q(pool0)'), ('pool0', 'relu0'), ('stage1_unit2_bn1', 'Q(_plus0)'), ('pool1', 'Q(relu1)'),
    ('flatten', 'pool1'), ('fc1', 'Q(flatten)')])
@every_target
def test_what_is_read_in_the_pre_activation_resnet(target, name, expected):
    assert reads(preact(target=target), name)[0] == expected


# The image, the max-pooling, a ReLU in each of 8 blocks and one behind each, the flattened average; of the 3 sums with
# a convolution in the shortcut one summand, or all summands that come from convolutions.
RESNET = {'null': 1, 'Pooling': 1, 'Activation': 16, 'Flatten': 1, 'BatchNorm': 3}


@pytest.mark.parametrize('target, expected', [*((target, RESNET) for target in SHORTCUT),
                                              ('onnxruntime', {**RESNET, 'BatchNorm': 11})])
def test_placement_in_resnet18(target, expected):
    net = resnet(target=target)
    tensors = {node.inputs[0].node for node in net.graph.nodes() if node.op == QUANTIZE}
    weights = {name for name in net.graph.variables() if name.endswith('weight')}
    assert Counter(node.op for node in tensors if node.name not in weights) == expected


@pytest.mark.parametrize('target', SHORTCUT)
def test_the_first_block_of_resnet18_adds_its_input_quantized_to_its_convolution(target):
    net = resnet(target=target)
    total = next(node for node in net.graph.nodes() if node.op == 'elemwise_add')
    assert sorted((net.quantizer(entry) is None, entry.node.op) for entry in total.inputs) == [
        (False, QUANTIZE), (True, 'BatchNorm')]


def test_the_summary_shows_the_grid_that_a_layer_reads_through_what_moves_values():
    rows = {row.name: row.input for row in gq.summary(two_readers(PASSING['flatten'], target='openvino')).rows}
    assert rows['second'] == rows['first'] == 'int8 8u'


def test_a_range_that_several_tensors_share_stays_as_calibrated_in_training():
    class Net(nn.HybridBlock):
        def hybrid_forward(self, F, x):
            small, large = F.relu(x, name='small'), F.relu(x * 10, name='large')
            return F.concat(F.concat(small, large, dim=1), F.square(small), F.square(large), dim=1) + 0

    net = gq.attach(Net(), ops=('Concat', 'square'), target='openvino', method='int8', bits=8)
    x = nd.array([[0.5]])
    gq.calibrate(net, [x], observer='minmax')
    before = {path: quantizer.value('amax') for path, quantizer in quantizers(net, 'activation').items()
              if quantizer.tensors[1:]}
    assert before
    with autograd.record():
        net(x)
    for path, value in before.items():
        assert quantizers(net, 'activation')[path].value('amax') == value
