"""TensorRT: ranges, and the rules of explicit quantization."""
import json
import struct
from collections import Counter

import numpy as np
import pytest
from mxnet import nd

import gluonquant as gq
from deploy_nets import SHAPE, attached, images
from gluonquant.integer import Model, Node


@pytest.fixture
def net():
    return attached(8, 'tensorrt', method='int8')


def test_a_net_for_tensorrt_breaks_no_rule(net, tmp_path):
    gq.export_onnx(net, tmp_path / 'net.onnx', SHAPE, 'tensorrt')
    assert gq.lint_tensorrt(tmp_path / 'net.onnx') == []


def test_a_net_for_tensorrt_computes_what_the_final_net_does(net, tmp_path):
    final = gq.export_onnx(net, tmp_path / 'net.onnx', SHAPE, 'tensorrt')
    found = gq.integer.run(str(tmp_path / 'net.onnx'), images())['output']
    np.testing.assert_allclose(found, final(nd.array(images())).asnumpy(), rtol=1e-4, atol=1e-4)


def test_a_net_for_onnx_runtime_breaks_the_rules_that_it_should(tmp_path):
    gq.export_onnx(attached(8, method='int8'), tmp_path / 'net.onnx', SHAPE)
    found = gq.lint_tensorrt(tmp_path / 'net.onnx')
    assert {'signed', 'symmetric', 'float bias', 'pairs', 'fused sum'} <= {finding.rule for finding in found}
    assert [finding.severity for finding in found] == sorted(finding.severity for finding in found)


def model(nodes, opset=13, **constants):
    """A graph of one layer on codes."""
    return Model([Node(*node) for node in nodes], {'s': np.float32(0.1), 'z': np.int8(0),
                                                   'w': np.zeros((4, 3, 1, 1), np.int8), **constants},
                 {'x': (None, 3, 8, 8)}, {'y': (None, 4, 8, 8)}, opset)


PAIR = [('QuantizeLinear', ['x', 's', 'z'], ['q']), ('DequantizeLinear', ['q', 's', 'z'], ['d'])]
WEIGHT = ('DequantizeLinear', ['w', 's', 'z'], ['v'])
CONV = ('Conv', ['d', 'v'], ['y'])


@pytest.mark.parametrize('made, rules', [
    (model([*PAIR, WEIGHT, CONV]), {}),
    (model([*PAIR, WEIGHT, CONV], opset=12), {'opset': 1}),
    (model([*PAIR, WEIGHT, CONV], z=np.int8(3)), {'symmetric': 3}),
    (model([*PAIR, WEIGHT, CONV], z=np.uint8(0)), {'signed': 3}),
    (model([*PAIR, WEIGHT, CONV], s=np.float32(0)), {'positive scale': 3}),
    (model([*PAIR, WEIGHT, CONV], s=np.float32([0.1, 0.2, 0.3])), {'scale per tensor': 2, 'output channels': 1}),
    (model([WEIGHT, ('Conv', ['x', 'v'], ['y'])]), {'both inputs': 1}),
    (model([*PAIR, ('Conv', ['d', 'w'], ['y'])]), {'both inputs': 1}),
    (model([PAIR[0], ('Clip', ['q', 'z', 'z'], ['c']), ('DequantizeLinear', ['c', 's', 'z'], ['d']), WEIGHT, CONV]),
     {'pairs': 1, 'integers': 1}),
    (model([*PAIR, WEIGHT, ('Conv', ['d', 'v'], ['t']), ('QuantizeLinear', ['t', 's', 'z'], ['u']),
            ('DequantizeLinear', ['u', 's', 'z'], ['f']), ('Relu', ['f'], ['y'])]), {'fusion': 1})])
def test_rules(made, rules):
    assert Counter(finding.rule for finding in gq.lint_tensorrt(made)) == rules


def test_ranges_belong_to_tensors_of_the_float_graph(net, tmp_path):
    final = gq.finalize(net)
    ranges = gq.export_tensorrt_ranges(final, tmp_path / 'ranges.json', SHAPE, onnx_path=tmp_path / 'float.onnx')
    plain = gq.integer.read(str(tmp_path / 'float.onnx'))
    assert set(ranges) <= {*plain.maker(), *plain.inputs}
    assert not any(node.op == 'QuantizeLinear' for node in plain.nodes)
    assert json.loads((tmp_path / 'ranges.json').read_text()) == ranges
    amax = final._children['data.output_quantizer'].value('amax')[0]
    assert ranges['data'] == pytest.approx(amax, rel=1e-6)


def test_a_calibration_cache_holds_scales_as_hexadecimal_floats(net, tmp_path):
    ranges = gq.export_tensorrt_ranges(net, tmp_path / 'net.cache', SHAPE)
    header, *lines = (tmp_path / 'net.cache').read_text().splitlines()
    found = {name: struct.unpack('>f', bytes.fromhex(scale))[0] for name, scale in (line.split(': ') for line in lines)}
    assert header.startswith('TRT-')
    assert found == pytest.approx({name: reach / 127 for name, reach in ranges.items()}, rel=1e-6)


@pytest.mark.parametrize('bits, target, message', [
    (8, 'onnxruntime', "codes, int8 of 8 bits, reach from 0 to 255.*Attach with target='tensorrt'"),
    (4, 'tensorrt', 'of 4 bits is no symmetric 8-bit grid')])
def test_other_grids_than_symmetric_8_bits_are_refused(bits, target, message, tmp_path):
    net = attached(bits, target, method='int8' if bits == 8 else None)
    with pytest.raises(ValueError, match=message):
        gq.export_tensorrt_ranges(net, tmp_path / 'net.cache', SHAPE)
    assert not (tmp_path / 'net.cache').exists()
