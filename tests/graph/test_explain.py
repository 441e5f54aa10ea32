"""`explain`: what decided about every operator, in words that name it."""
import copy
import pickle

import pytest
from graph_nets import Net, images, node, ready, small
from mxnet import nd
from mxnet.gluon import nn
from preact_resnet import preact_resnet18

import gluonquant as gq
from gluonquant.graph import TARGETS
from gluonquant.symbol_graph import QUANTIZE, VARIABLE

every_target = pytest.mark.parametrize('target', [None, *sorted(TARGETS)])


@pytest.fixture
def net(seed):
    return small()


def preact(**options):
    return gq.attach(preact_resnet18(small=True), **options)


def rows(net, name):
    """{input: (quantizer, reason)} of an operator."""
    return {row.input: (row.quantizer, row.reason) for row in gq.explain(net).rows if row.node == name}


def operators(net):
    return [node for node in net.graph.nodes() if node.op not in (VARIABLE, QUANTIZE)]


# ---------------------------------------------------------------- every operator


@every_target
@pytest.mark.parametrize('make', [lambda **options: gq.attach(small(), **options), preact], ids=['small', 'preact'])
def test_every_operator_appears_in_the_order_of_the_graph(make, target):
    net = make(target=target)
    found = list(dict.fromkeys((row.node, row.op) for row in gq.explain(net).rows))
    assert found == [(net.label(node), node.op) for node in operators(net)]


@every_target
def test_every_quantized_input_has_a_row_with_its_quantizer(net, target):
    attached = gq.attach(net, target=target)
    read = {(attached.label(node), entry.node.attrs['quantizer']) for node in operators(attached)
            for entry in node.inputs if entry.node.op == QUANTIZE}
    assert read and read <= {(row.node, row.quantizer) for row in gq.explain(attached).rows}


def test_without_a_target_no_row_names_a_quantizer_that_is_not_read(net):
    attached = gq.attach(net, rules=[gq.Rule('5.first', activation='none'), gq.Rule('4.first', weight='none')])
    for row in gq.explain(attached).rows:
        sources = [entry.node.attrs.get('quantizer') for entry in node(attached, row.node).inputs]
        assert row.quantizer is None or row.quantizer in sources, row


def test_a_quantized_operator_has_a_row_for_each_input(net):
    attached = gq.attach(net)
    assert sorted(rows(attached, '4.first')) == ['pool0_fwd', 'residual0_conv0_weight']
    assert sorted(rows(attached, 'residual1__plus0')) == ['residual0_relu1', 'residual1_conv1_fwd']


def test_an_operator_that_stays_float_has_one_row(net):
    assert rows(gq.attach(net), 'batchnorm0_fwd') == {'': (None, 'BatchNorm is not among ops')}


# ---------------------------------------------------------------- reasons


REASONS = [
    ({}, '4.first', 'pool0_fwd', 'pool0_fwd.output_quantizer', 'Convolution is among ops'),
    ({}, '4.first', 'residual0_conv0_weight', '4.first.weight_quantizer', 'Convolution is among ops'),
    ({}, 'residual0_relu0', '', None, 'relu is not among ops'),
    ({'exclude': ['4.fir*', '5']}, '4.first', '', None, "exclude='4.fir*'"),
    ({'exclude': ['4.fir*', '5']}, '5.second', '', None, "exclude='5'"),
    ({'exclude': '*residual0_conv0_fwd'}, '4.first', '', None, "exclude='*residual0_conv0_fwd'"),
    ({'skip': {'Convolution': 2}}, '4.first', '', None,
     'skip: number 2 of the Convolution nodes, the first 2 stay float'),
    ({'only': {'elemwise_add': 1}}, 'residual1__plus0', '', None,
     'only: number 2 of the elemwise_add nodes, the first 1 are quantized'),
    ({'first_last_bits': None}, '0', '', None, 'first or last layer, first_last_bits=None'),
    ({'first_last_bits': 6}, '6', 'residual1_relu1', 'residual1_relu1.output_quantizer',
     'FullyConnected is among ops; first or last layer: first_last_bits=6'),
    ({'rules': [{'pattern': '4.*', 'bits': 3}]}, '4.second', 'residual0_relu0', 'residual0_relu0.output_quantizer',
     "Convolution is among ops; rule '4.*'"),
    ({'rules': [{'pattern': '4', 'bits': 3}, {'pattern': '*.second', 'bits': 5}]}, '4.second', 'residual0_conv1_weight',
     '4.second.weight_quantizer', "Convolution is among ops; rule '4'; rule '*.second'"),
    ({'rules': [{'pattern': '6', 'bits': 3}]}, '6', 'dense0_weight', '6.weight_quantizer',
     "FullyConnected is among ops; first or last layer: first_last_bits=8; rule '6'"),
    ({'rules': [{'pattern': '4.first', 'weight': 'none'}]}, '4.first', 'residual0_conv0_weight', None,
     "Convolution is among ops; rule '4.first'; method 'none'"),
    ({'activation': 'none'}, '4.first', 'pool0_fwd', None, "Convolution is among ops; method 'none'"),
]


@pytest.mark.parametrize('options, name, source, quantizer, reason', REASONS,
                         ids=[f'{options} {name}' for options, name, *_ in REASONS])
def test_the_reason_names_the_argument_or_the_rule_that_decided(net, options, name, source, quantizer, reason):
    assert rows(gq.attach(net, **options), name)[source] == (quantizer, reason)


def test_skip_scalars_is_named_with_the_input(seed):
    net = Net(lambda net, F, x: F.relu(F.broadcast_mul(x, F.mean(x, keepdims=True, name='one'), name='product')))
    attached = gq.attach(net, ops=('broadcast_mul', 'relu'), skip_scalars=True, shapes={'data': (2, 3)})
    assert rows(attached, 'product') == {'': (None, "its input 'one' has one element (skip_scalars)")}


def test_a_parameter_among_the_inputs_is_named_as_the_reason(seed):
    net = Net(lambda net, F, x: F.broadcast_add(x, F.ones((1, 3), name='ones'), name='sum'))
    attached = gq.attach(net, ops=('broadcast_add',))
    assert rows(attached, 'sum')['ones'] == (None, 'a Parameter, or computed from Parameters only')


def test_a_weight_that_is_computed_from_data_is_the_reason():
    net = Net(lambda net, F, a, b: F.FullyConnected(a, b, num_hidden=3, no_bias=True, name='mixed') + a)
    assert rows(gq.attach(net, inputs=('a', 'b')), 'mixed') == {'': (None, 'its weight is computed from data')}


def two_layers():
    net = ready(Net(lambda net, F, x: net.a(x) + net.b(x), a=nn.Dense(3), b=nn.Dense(3)), nd.ones((2, 4)))
    return gq.attach(net, rules=[gq.Rule('a', activation_bits=3), gq.Rule('b', activation_bits=6)])


def test_a_reader_that_asked_for_fewer_bits_reads_why_it_has_more(seed):
    own, shared = rows(two_layers(), 'a')['data'][1].split('; one quantizer for the tensor: ')
    assert own.endswith("rule 'a'") and shared.endswith("rule 'b'; others that read it ask for 3 bits")


def test_a_reader_that_has_what_it_asked_for_reads_its_own_reason(seed):
    assert rows(two_layers(), 'b')['data'][1].endswith("rule 'b'")


# ---------------------------------------------------------------- reasons of a target


def test_a_float_summand_is_explained_by_the_target(net):
    quantizer, reason = rows(gq.attach(net, target='tensorrt'), 'residual1__plus0')['residual1_conv1_fwd']
    assert quantizer is None
    assert reason.startswith("tensorrt computes the sum 'residual1__plus0' together with 'residual1_conv1_fwd'")


def test_a_pooling_says_that_the_quantizer_stands_behind_it(net):
    quantizer, reason = rows(gq.attach(net, target='openvino'), 'pool0_fwd')['relu0_fwd']
    assert quantizer == 'pool0_fwd.output_quantizer' and reason.endswith('so the quantizer stands behind it')


def test_what_passes_a_quantizer_through_is_named(seed):
    net = Net(lambda net, F, x: (lambda y: (net.a(y), net.b(F.Flatten(y, name='flat'))))(F.relu(x, name='y')),
              a=nn.Dense(3), b=nn.Dense(3))
    quantizer, reason = rows(gq.attach(ready(net, images()), target='openvino'), 'b')['flat']
    assert quantizer == 'y.output_quantizer' and reason.endswith('Flatten passes it through')


def test_an_output_that_is_quantized_for_the_target_says_so(seed):
    net = Net(lambda net, F, x: net.b(F.sigmoid(net.a(x), name='s')), a=nn.Dense(3, prefix='net_a_'),
              b=nn.Dense(3, prefix='net_b_'))
    quantizer, reason = rows(gq.attach(ready(net, images()), target='onnxruntime'), 's')['a_fwd']
    assert quantizer == 'a_fwd.output_quantizer' and "onnxruntime computes 'a_fwd' in integers" in reason


def test_an_operator_that_is_not_among_ops_says_why_it_reads_a_quantized_tensor():
    quantizer, reason = rows(preact(target='tensorrt'), 'stage1_unit2_bn1')['_plus0']
    assert quantizer == '_plus0.output_quantizer'
    assert reason.startswith('BatchNorm is not among ops, but reads what is stored quantized: ')


STAYING = [{'exclude': '4.first'}, {'skip': {'Convolution': 2}}]


@pytest.mark.parametrize('options', STAYING, ids=str)
def test_a_layer_that_stays_float_says_why_it_reads_a_quantized_tensor(net, options):
    attached = gq.attach(net, target='openvino', **options)
    quantizer, reason = rows(attached, '4.first')['pool0_fwd']
    assert quantizer == 'pool0_fwd.output_quantizer' and 'reads what is stored quantized' in reason


@pytest.mark.parametrize('options', STAYING, ids=str)
def test_a_layer_that_stays_float_still_says_what_decided_that(net, options):
    attached = gq.attach(net, target='openvino', **options)
    name = next(iter(options))
    assert any(row.reason.startswith(name) for row in gq.explain(attached, '4.first').rows)


# ---------------------------------------------------------------- patterns, table, files


@pytest.mark.parametrize('pattern, expected', [
    ('4.*', ['4.first', '4.second', '4.shortcut']), ('4.first', ['4.first']), ('elemwise_add', ['residual0__plus0',
                                                                                              'residual1__plus0']),
    ('*pool*', ['pool0_fwd']), ('Fully*', ['6']), ('residual1_*', ['residual1_batchnorm0_fwd', 'residual1_relu0',
                                                                  'residual1__plus0', 'residual1_relu1'])])
def test_a_pattern_chooses_operators_or_kinds_of_them(net, pattern, expected):
    found = gq.explain(gq.attach(net), pattern).rows
    assert list(dict.fromkeys(row.node for row in found)) == expected


def test_printed_it_is_a_table_with_a_line_for_each_row(net):
    explained = gq.explain(gq.attach(net, exclude='4.first'))
    header, _, *lines = str(explained).splitlines()
    assert header.split() == ['node', 'op', 'input', 'quantizer', 'reason'] and len(lines) == len(explained.rows)


def test_a_printed_line_says_all_and_a_dash_for_nothing(net):
    lines = str(gq.explain(gq.attach(net, exclude='4.first'), '4.*')).splitlines()
    assert lines[2].split() == ['4.first', 'Convolution', '-', '-', "exclude='4.first'"]
    assert lines[-1].split() == ['4.shortcut', 'Convolution', 'pool0_fwd', 'pool0_fwd.output_quantizer', 'Convolution',
                                 'is', 'among', 'ops']


@pytest.mark.parametrize('again', [
    lambda net, path: gq.save(net, path) or gq.load(path),
    lambda net, path: gq.save(net, path) or gq.load(path, small()),
    lambda net, path: copy.deepcopy(net), lambda net, path: pickle.loads(pickle.dumps(net))],
    ids=['loaded alone', 'loaded with a float net', 'deepcopy', 'pickle'])
def test_it_survives_files_and_copies(net, tmp_path, again):
    attached = gq.attach(net, target='onnxruntime', exclude='4.first', rules=[gq.Rule('5.*', bits=3)])
    gq.calibrate(attached, [images()])
    expected = gq.explain(attached)
    assert len(expected.rows) > 20 and gq.explain(again(attached, str(tmp_path / 'net.npz'))) == expected


@pytest.mark.parametrize('make, name', [(lambda net: net, 'HybridSequential'), (gq.convert, 'HybridSequential'),
                                        (lambda net: net.collect_params(), 'ParameterDict')],
                         ids=['float', 'converted', 'no net'])
def test_another_net_is_refused(net, make, name):
    with pytest.raises(TypeError, match=f'{name} is no net of gq.attach. For a converted net, see gq.summary'):
        gq.explain(make(net))
