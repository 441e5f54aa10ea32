"""The first convolution on blocks of 2x2 places."""
import numpy as np
import onnxruntime
import pytest
from mxnet import nd
from mxnet.gluon import nn

import gluonquant as gq
from gluonquant.export.engines import ENGINES
from gluonquant.export.lower import Lowering, lower


def net(kernel, padding, channels=3, **options):
    made = nn.HybridSequential()
    made.add(nn.Conv2D(8, kernel, strides=2, padding=padding, **options), nn.Activation('relu'), nn.Conv2D(4, 3))
    made.initialize()
    x = nd.array(np.random.RandomState(0).randn(2, channels, 22, 19))
    made(x)
    quantized = gq.attach(made, 8, target='onnxruntime')
    gq.calibrate(quantized, [x])
    return gq.finalize(quantized), x.asnumpy()


def first(model):
    return next(node for node in model.nodes if node.op == 'Conv')


KERNELS = [(7, 3), (3, 1), (5, 2), (3, 0), (2, 0), (4, 1), ((5, 3), (1, 0)), (1, 0), (7, 2)]


@pytest.mark.parametrize('kernel, padding', KERNELS)
def test_outputs_are_equal_and_the_stride_is_gone(kernel, padding, tmp_path):
    final, x = net(kernel, padding)
    shapes = {'data': (1, 3, 22, 19)}
    plain, deep = Lowering(final, shapes, ENGINES['onnxruntime']).model(), lower(final, shapes)
    expected = gq.integer.run(plain, x)['output']
    if any(node.op == 'SpaceToDepth' for node in deep.nodes):
        assert first(deep).attrs['strides'] == [1, 1]
        assert deep.constants['0.weight.codes'].shape[1] == 12
    assert np.array_equal(gq.integer.run(deep, x)['output'], expected)
    gq.export_onnx(final, str(tmp_path / 'net.onnx'), (1, 3, 22, 19))
    session = onnxruntime.InferenceSession(str(tmp_path / 'net.onnx'), providers=['CPUExecutionProvider'])
    # The last convolution has no quantizer behind it, and ONNX Runtime computes it in float.
    np.testing.assert_allclose(session.run(None, {'data': x})[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('kernel, padding', [(7, 3), (3, 1)])
def test_the_stems_of_the_zoo_are_rewritten(kernel, padding):
    final, _ = net(kernel, padding)
    assert 'SpaceToDepth' in [node.op for node in lower(final, {'data': (1, 3, 224, 224)}).nodes]


@pytest.mark.parametrize('changes', [{'channels': 8}, {'dilation': 2}])
def test_other_convolutions_stay(changes):
    channels = changes.pop('channels', 3)
    final, _ = net(3, 1, channels, **changes)
    model = lower(final, {'data': (1, channels, 22, 19)})
    assert first(model).attrs['strides'] == [2, 2]


@pytest.mark.parametrize('target', ['openvino', 'tensorrt'])
def test_other_engines_get_the_net_as_it_is(target):
    made = nn.Conv2D(8, 3, strides=2, padding=1)
    made.initialize()
    x = nd.array(np.random.RandomState(0).randn(2, 3, 8, 8))
    made(x)
    quantized = gq.attach(made, 8, target=target)
    gq.calibrate(quantized, [x])
    assert first(lower(gq.finalize(quantized), {'data': x.shape}, target)).attrs['strides'] == [2, 2]
