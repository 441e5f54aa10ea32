"""The integer runner against ONNX Runtime, operator by operator."""
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from gluonquant.export.onnx_file import to_proto, write
from gluonquant.integer import Model, Node, Runner, read
from gluonquant.integer.window import convolve, matmul

SHAPE = (2, 4, 9, 9)
RANDOM = np.random.RandomState(0)


def session(proto):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=['CPUExecutionProvider'])


def model(nodes, constants=None, opset=13):
    """From x to y."""
    constants = {name: np.asarray(array) for name, array in (constants or {}).items()}
    return Model([Node(*node, name=str(number)) for number, node in enumerate(nodes)], constants, {'x': SHAPE},
                 {'y': None}, opset)


def runtime(made, x):
    """The outputs of ONNX Runtime, which finds the shape of y itself."""
    nodes = [helper.make_node(node.op, node.inputs, node.outputs, **node.attrs) for node in made.nodes]
    graph = helper.make_graph(nodes, 'graph', [helper.make_tensor_value_info('x', TensorProto.FLOAT, SHAPE)],
                              [helper.make_empty_tensor_value_info('y')],
                              [onnx.numpy_helper.from_array(array, name) for name, array in made.constants.items()])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid('', made.opset)], ir_version=8)
    return session(proto).run(['y'], {'x': x})[0]


W = RANDOM.randn(6, 4, 3, 3).astype(np.float32)
REALS = {
    'conv': ('Conv', {'kernel_shape': [3, 3], 'strides': [2, 1], 'pads': [1, 0, 2, 1], 'dilations': [1, 2]}, [W]),
    'conv transpose': ('ConvTranspose', {'kernel_shape': [3, 3], 'strides': [2, 2], 'pads': [1, 1, 1, 1],
                                         'output_padding': [1, 0]}, [W[:4]]),
    'grouped conv transpose': ('ConvTranspose', {'kernel_shape': [3, 3], 'group': 2, 'pads': [0, 1, 2, 0]}, [W[:4]]),
    'average pool': ('AveragePool', {'kernel_shape': [3, 2], 'strides': [2, 2], 'pads': [1, 1, 0, 1]}, []),
    'average pool with pads': ('AveragePool', {'kernel_shape': [3, 3], 'strides': [2, 1], 'pads': [1, 1, 1, 1],
                                               'count_include_pad': 1}, []),
    'max pool': ('MaxPool', {'kernel_shape': [3, 3], 'strides': [2, 2], 'pads': [1, 1, 1, 1]}, []),
    'max pool, ceil': ('MaxPool', {'kernel_shape': [2, 3], 'strides': [2, 3], 'ceil_mode': 1}, []),
    'global average': ('GlobalAveragePool', {}, []), 'global max': ('GlobalMaxPool', {}, []),
    'relu': ('Relu', {}, []), 'clip': ('Clip', {}, [np.float32(-0.5), np.float32(1)]), 'tanh': ('Tanh', {}, []),
    'sigmoid': ('Sigmoid', {}, []), 'leaky': ('LeakyRelu', {'alpha': 0.1}, []), 'elu': ('Elu', {'alpha': 0.7}, []),
    'selu': ('Selu', {'alpha': 1.67, 'gamma': 1.05}, []),
    'hard sigmoid': ('HardSigmoid', {'alpha': 0.2, 'beta': 0.4}, []),
    'softplus': ('Softplus', {}, []), 'softsign': ('Softsign', {}, []), 'erf': ('Erf', {}, []),
    'prelu': ('PRelu', {}, [W[0, :, :1, :1]]), 'softmax': ('Softmax', {'axis': 1}, []),
    'log softmax': ('LogSoftmax', {'axis': -1}, []),
    'lrn': ('LRN', {'size': 3, 'alpha': 0.1, 'beta': 0.6, 'bias': 1.5}, []),
    'batch norm': ('BatchNormalization', {'epsilon': 1e-3}, list(abs(W[:4, :, 0, 0]) + 0.5)),
    'mean': ('ReduceMean', {'axes': [2, 3], 'keepdims': 0}, []), 'sum': ('ReduceSum', {'keepdims': 1}, [np.int64([1])]),
    'max': ('ReduceMax', {'axes': [1], 'keepdims': 1}, []), 'norm': ('ReduceL2', {'axes': [1]}, []),
    'lp norm': ('LpNormalization', {'axis': 1, 'p': 2}, []),
    'add': ('Add', {}, [W[0, :, :1, :1]]), 'mul': ('Mul', {}, [np.float32(3)]), 'div': ('Div', {}, [np.float32(3)]),
    'pow': ('Pow', {}, [np.float32(2)]), 'maximum': ('Max', {}, [np.float32(0.3)]),
    'flatten': ('Flatten', {'axis': 2}, []), 'reshape': ('Reshape', {}, [np.int64([0, -1, 3])]),
    'transpose': ('Transpose', {'perm': [0, 2, 3, 1]}, []), 'unsqueeze': ('Unsqueeze', {}, [np.int64([1])]),
    'slice': ('Slice', {}, [np.int64(a) for a in ([1, 7], [4, -20], [1, 2], [2, -3])]),
    'gather': ('Gather', {'axis': 1}, [np.int64([2, 0])]), 'tile': ('Tile', {}, [np.int64([1, 2, 1, 3])]),
    'expand': ('Expand', {}, [np.int64([3, 1, 1, 1, 1])]),
    'depth to space': ('DepthToSpace', {'blocksize': 2}, []),
    'pad': ('Pad', {}, [np.int64([0, 0, 1, 2, 0, 0, 3, 0]), np.float32(1.5)]),
    'reflect': ('Pad', {'mode': 'reflect'}, [np.int64([0, 0, 1, 2, 0, 0, 3, 0])]),
    'nearest': ('Resize', {'mode': 'nearest', 'coordinate_transformation_mode': 'asymmetric', 'nearest_mode': 'floor'},
                [None, np.float32([1, 1, 2, 3])]),
    'bilinear': ('Resize', {'mode': 'linear', 'coordinate_transformation_mode': 'align_corners'},
                 [None, np.float32([1, 1, 2, 1.7])])}


@pytest.mark.parametrize('name', REALS)
def test_real_operators(name):
    op, attrs, constants = REALS[name]
    names = ['' if array is None else f'c{number}' for number, array in enumerate(constants)]
    made = model([(op, ['x', *names], ['y'], attrs)],
                 {name: array for name, array in zip(names, constants) if array is not None})
    x = RANDOM.randn(*SHAPE).astype(np.float32)
    # Sums and elementary functions of float32 in another order and of another library: some ulps.
    np.testing.assert_allclose(Runner(made)(x)['y'], runtime(made, x), rtol=2e-5, atol=2e-6)


GRIDS = {'unsigned': (np.float32(0.021), np.uint8(0)), 'shifted': (np.float32(0.037), np.uint8(128)),
         'affine': (np.float32(0.0291), np.uint8(77))}


def quantized(nodes, constants=None, x='shifted', y='affine'):
    """QuantizeLinear, DequantizeLinear, ``nodes`` from a to b, QuantizeLinear, DequantizeLinear."""
    given = {'xs': GRIDS[x][0], 'xz': GRIDS[x][1], 'ys': GRIDS[y][0], 'yz': GRIDS[y][1], **(constants or {})}
    return model([('QuantizeLinear', ['x', 'xs', 'xz'], ['p']), ('DequantizeLinear', ['p', 'xs', 'xz'], ['a']), *nodes,
                  ('QuantizeLinear', ['b', 'ys', 'yz'], ['q']), ('DequantizeLinear', ['q', 'ys', 'yz'], ['y'])], given)


CODES = RANDOM.randint(-127, 128, (6, 4, 3, 3)).astype(np.int8)
WEIGHT = {'w': CODES, 'ws': RANDOM.uniform(0.001, 0.01, 6).astype(np.float32), 'wz': np.zeros(6, np.int8),
          'bias': RANDOM.randint(-20000, 20000, 6).astype(np.int32), 'bz': np.zeros(6, np.int32)}


@pytest.mark.parametrize('x', GRIDS)
@pytest.mark.parametrize('y', GRIDS)
@pytest.mark.parametrize('attrs', [{}, {'strides': [2, 1], 'pads': [1, 0, 2, 1], 'dilations': [1, 2]}, {'group': 2}])
def test_integer_convolutions_are_equal(x, y, attrs):
    weight = {**WEIGHT, 'w': CODES[:, :2] if attrs.get('group') else CODES, 'bs': GRIDS[x][0] * WEIGHT['ws']}
    made = quantized([('DequantizeLinear', ['w', 'ws', 'wz'], ['v'], {'axis': 0}),
                      ('DequantizeLinear', ['bias', 'bs', 'bz'], ['c'], {'axis': 0}),
                      ('Conv', ['a', 'v', 'c'], ['b'], {'kernel_shape': [3, 3], **attrs})], weight, x, y)
    data = RANDOM.randn(*SHAPE).astype(np.float32)
    assert np.array_equal(Runner(made)(data)['y'], runtime(made, data))


@pytest.mark.parametrize('x', GRIDS)
@pytest.mark.parametrize('y', GRIDS)
def test_integer_sums_are_equal(x, y):
    made = quantized([('QuantizeLinear', ['x', 'ys', 'yz'], ['r']), ('DequantizeLinear', ['r', 'ys', 'yz'], ['d']),
                      ('Add', ['a', 'd'], ['b'])], {}, x, y)
    data = RANDOM.randn(64, *SHAPE[1:]).astype(np.float32)[:2]
    assert np.array_equal(Runner(made)(data)['y'], runtime(made, data))


@pytest.mark.parametrize('x', GRIDS)
@pytest.mark.parametrize('y', GRIDS)
def test_integer_means_are_equal(x, y):
    made = quantized([('GlobalAveragePool', ['a'], ['b'])], {}, x, y)
    data = RANDOM.randn(*SHAPE).astype(np.float32)
    assert np.array_equal(Runner(made)(data)['y'], runtime(made, data))


def test_sums_of_products_are_exact_whatever_their_size():
    x, weight = np.full((1, 3000, 1, 1), 255, np.int32), np.full((1, 3000, 1, 1), -127, np.int32)
    assert convolve(x, weight, [1, 1], [0] * 4, [1, 1]).item() == -127 * 255 * 3000
    assert matmul(x.reshape(1, -1), weight.reshape(-1, 1)).item() == -127 * 255 * 3000


def test_an_operator_that_is_not_known_is_named():
    with pytest.raises(ValueError, match="node '0': the operator Loop does not run here"):
        Runner(model([('Loop', ['x'], ['y'])]))


@pytest.mark.parametrize('inputs, message', [
    ((), r'the model takes 1 inputs \(x\), not 0'),
    ((np.zeros((2, 3, 9, 9)),), r"the input 'x' has shape \(2, 3, 9, 9\), the model takes \(2, 4, 9, 9\)")])
def test_wrong_inputs_are_refused(inputs, message):
    with pytest.raises(ValueError, match=message):
        Runner(model([('Relu', ['x'], ['y'])]))(*inputs)


def test_a_node_that_fails_is_named():
    made = model([('AveragePool', ['x'], ['y'], {'kernel_shape': [2, 2], 'auto_pad': 'SAME_UPPER'})])
    with pytest.raises(ValueError, match=r"node '0' \(AveragePool\): auto_pad='SAME_UPPER' does not run here"):
        Runner(made)(np.zeros(SHAPE, np.float32))


def test_models_are_written_and_read_alike(tmp_path):
    made = quantized([('GlobalAveragePool', ['a'], ['b'])])
    made.outputs = {'y': (2, 4, 1, 1)}
    write(onnx, made, tmp_path / 'net.onnx')
    x = RANDOM.randn(*SHAPE).astype(np.float32)
    assert np.array_equal(Runner(read(tmp_path / 'net.onnx'))(x)['y'], Runner(made)(x)['y'])
    assert to_proto(onnx, made).ir_version == 8
