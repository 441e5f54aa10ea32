"""`summary`: what every layer costs and whether it is ready."""
import math

import pytest
from gluoncv.model_zoo import get_model
from mxnet import nd
from mxnet.gluon import nn

import gluonquant as gq


def small():
    net = nn.HybridSequential()
    net.add(nn.Conv2D(4, 3, in_channels=3), nn.Activation('relu'), nn.Conv2D(6, 3, in_channels=4),
            nn.Activation('relu'), nn.Dense(3, in_units=96))
    net.initialize()
    return net


def images():
    return nd.random.uniform(-1, 1, (2, 3, 8, 8))


def rows(net):
    return {row.name: row for row in gq.summary(net).rows}


def test_there_is_one_row_for_each_layer_in_order():
    assert list(rows(gq.convert(small()))) == ['0', '2', '4']


def test_a_row_names_type_shape_methods_and_signs():
    row = rows(gq.convert(small(), bits=3, weight='sawb', activation='gdrq'))['2']
    assert (row.type, row.shape, row.input, row.weight) == ('QConv2D', (6, 4, 3, 3), 'gdrq 3u', 'sawb 3s')
    assert rows(gq.convert(small()))['0'].input == 'int8 8s'


def test_bytes_per_tensor_are_packed_codes_and_one_scale():
    row = rows(gq.convert(small(), bits=3, weight='sawb'))['2']
    assert row.float_bytes == 4 * 6 * 4 * 3 * 3 == 864
    assert row.quantized_bytes == 6 * 4 * 3 * 3 * 3 // 8 + 4 == 85


def test_bytes_per_channel_have_a_scale_for_each_channel():
    assert rows(gq.convert(small(), bits=4, method='int8'))['2'].quantized_bytes == 216 // 2 + 4 * 6


def test_bytes_per_group_have_a_scale_for_each_group():
    net = gq.convert(small(), bits=4, weight='gdrq', weight_options={'group_size': 2})
    assert rows(net)['2'].quantized_bytes == 216 // 2 + 4 * 3


def test_codes_that_do_not_fill_a_byte_are_rounded_up():
    net = nn.Dense(1, in_units=3)
    net.initialize()
    gq.convert(net, first_last_bits=3, method='int8', per_channel=False)
    assert rows(net)[''].quantized_bytes == math.ceil(9 / 8) + 4


def test_float_layers_count_in_full():
    net = gq.convert(small(), exclude=['2'])
    row = rows(net)['2']
    assert (row.type, row.input, row.weight, row.calibrated) == ('Conv2D', 'float', 'float', '')
    assert row.quantized_bytes == row.float_bytes == 864


def test_a_float_weight_of_a_quantized_layer_counts_in_full():
    row = rows(gq.convert(small(), weight='none'))['2']
    assert (row.weight, row.quantized_bytes) == ('float', 864) and row.input == 'lsq 4u'


def test_a_float_net_has_a_summary():
    summary = gq.summary(small())
    assert summary.float_bytes == summary.quantized_bytes == 4 * (4 * 27 + 216 + 288)


def test_totals_are_the_sums_of_the_rows():
    summary = gq.summary(gq.convert(small()))
    assert summary.float_bytes == 4 * (4 * 27 + 216 + 288)
    assert summary.quantized_bytes == (4 * 27 + 4 * 4) + (216 // 2 + 4 * 6) + (288 + 4 * 3)


@pytest.mark.parametrize('method, before', [('lsq', 'no'), ('int8', 'no'), ('qil', 'no')])
def test_calibrated_turns_from_no_to_yes(method, before):
    net = gq.convert(small(), method=method)
    assert rows(net)['2'].calibrated == before
    gq.calibrate(net, [images()])
    assert [row.calibrated for row in gq.summary(net).rows] == ['yes'] * 3


def test_methods_without_a_range_are_calibrated_at_once():
    assert rows(gq.convert(small(), method='dorefa'))['2'].calibrated == 'yes'


def test_unknown_shapes_are_empty_and_cost_nothing():
    net = nn.HybridSequential()
    net.add(nn.Dense(3), nn.Dense(2))
    row = rows(gq.convert(net))['0']
    assert (row.shape, row.float_bytes, row.quantized_bytes) == (None, 0, 0) and '0  ' in str(gq.summary(net))


def test_a_shared_input_names_its_owner():
    net = get_model('cifar_resnet20_v1', classes=4)
    net.initialize()
    table = rows(gq.convert(net, method='int8'))
    assert table['features.3.0.body.0'].input == 'int8 4u of features.3.0.downsample.0'
    assert table['features.3.0.downsample.0'].input == 'int8 4u'


def test_it_prints_as_a_table():
    net = gq.convert(small(), exclude=['2'])
    gq.calibrate(net, [images()])
    lines = str(gq.summary(net)).splitlines()
    assert lines[0].split() == ['name', 'type', 'shape', 'input', 'weight', 'calibrated', 'float', 'bytes', 'quantized',
                                'bytes']
    assert [line.split() for line in lines[2:5]] == [
        ['0', 'QConv2D', '4x3x3x3', 'int8', '8s', 'int8', '8s', 'yes', '432', '124'],
        ['2', 'Conv2D', '6x4x3x3', 'float', 'float', '864', '864'],
        ['4', 'QDense', '3x96', 'int8', '8u', 'int8', '8s', 'yes', '1152', '300']]
    assert lines[6].split() == ['total', str(432 + 864 + 1152), str(124 + 864 + 300)]
    assert lines[1] == lines[5] == '-' * max(map(len, lines))


def test_asking_changes_nothing():
    net = gq.convert(small())
    before = [(name, p._reduce().asnumpy().tolist()) for name, p in net._collect_params_with_prefix().items()]
    gq.summary(net)
    assert [(name, p._reduce().asnumpy().tolist()) for name, p in net._collect_params_with_prefix().items()] == before
